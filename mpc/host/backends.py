"""What a scenario's `backend` means on this machine: which image, which root, and how it is launched."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpc.attestation.roots import AWS_NITRO_ROOT_G1
from mpc.host.serve import Launched
from mpc.image import cache
from mpc.protocol.contract import Measurement
from mpc.protocol.errors import LocalError


@dataclass(frozen=True)
class Prepared:
    """An image that can be launched here, and what a contract says of it."""

    image: Path
    measurement: Measurement
    root: bytes  # fingerprint
    simulated: bool


def prepare(backend: str, variant: str, image: Path | None, state: Path) -> Prepared:
    """Before anything starts. `state` is where this machine's simulated root lives.

    Raises: LocalError when this machine lacks something; ImageError for an image that is not one for this backend.
    """
    if backend == "nitro":
        from mpc.host import nitro

        nitro.check()
        if image is None:
            raise LocalError(
                "the nitro backend needs an image with a kernel: build one (docs/NITRO.md), and name it with --image"
            )
        return Prepared(image, nitro_measurement(image, variant), AWS_NITRO_ROOT_G1, simulated=False)
    from mpc.host.simulated_root import SimulatedRoot

    path = image or cache.cached_image(variant)[0]
    root = SimulatedRoot.load_or_create(state).fingerprint
    return Prepared(path, cache.contract_measurement(variant), root, simulated=True)


def nitro_measurement(image: Path, variant: str) -> Measurement:
    """What a contract and a policy list for an image with a kernel.

    PCR2 is this installation's own: nobody has to believe the image's builder about the application. PCR0 and PCR1
    are as far to be believed as its kernel and bootstrap ramdisk are: see docs/NITRO.md on building both yourself.
    Raises: LocalError when the image's application is not this installation's.
    """
    from mpc.image.measure import measure

    own, found = cache.contract_measurement(variant), measure(image)
    if found.pcr2 != own.pcr2:
        raise LocalError(
            f"{image}: its application is not this installation's; `mpc measure {image} --from-source` names the file",
            expected=own.pcr2.hex(),
            got=found.pcr2.hex(),
        )
    return Measurement(f"{own.label} nitro", found.pcr0, found.pcr1, found.pcr2)


def launcher(backend: str, image: Path, *, cpus: int, memory_bytes: int, state: Path) -> Callable[[], Launched]:
    """What launches that image, as often as it is called."""
    if backend == "nitro":
        from mpc.host import nitro

        return partial(nitro.launch, image, cpus=cpus, memory_bytes=memory_bytes)
    from mpc.host import local
    from mpc.host.simulated_root import SimulatedRoot

    root = SimulatedRoot.load_or_create(state)
    return partial(local.launch, image, cpus=cpus, memory_bytes=memory_bytes, root=root)
