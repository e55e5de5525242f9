"""What a scenario's `[enclave]` means on this machine: image, measurement, root, and how it is launched."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mpc.protocol.contract import Measurement
from mpc.protocol.errors import LocalError
from mpc.scenario import Enclave

if TYPE_CHECKING:
    from mpc.host.launched import Launched


@dataclass(frozen=True)
class Prepared:
    """An image that can be launched here, and what a contract says of it."""

    image: Path
    measurement: Measurement
    root: bytes  # fingerprint
    simulated: bool


def prepare(enclave: Enclave, image: Path | None, state: Path, announce: Callable[[], None] | None = None) -> Prepared:
    """Before anything starts.

    Args:   image: none: the one that this installation gives. state: where this machine's simulated root lives.
            announce: called before an image is built, which takes seconds.
    Raises: LocalError when this machine lacks something; ImageError for an image that is not one for this backend.
    """
    from mpc.host.simulated_root import SimulatedRoot

    if enclave.backend == "local":
        from mpc.image import cache

        path = image or cache.cached_image(enclave.image, announce)[0]
        own = SimulatedRoot.load_or_create(state).fingerprint
        return Prepared(path, measurement(enclave, path), own, simulated=True)
    from mpc.attestation.roots import ROOT_NAMES, root_fingerprint
    from mpc.host import nitro

    nitro.check()
    if image is None:
        raise LocalError(
            'backend = "nitro" needs an image with a kernel: build one (mpc image build --backend nitro; '
            "docs/NITRO.md), and name it with --image"
        )
    root = root_fingerprint(enclave.root)
    # Where nitro-cli is a stand-in, so is the root, and contract, screens and receipts must say so.
    simulated = root not in ROOT_NAMES.values() and root == SimulatedRoot.load_or_create(state).fingerprint
    return Prepared(image, measurement(enclave, image), root, simulated)


def measurement(enclave: Enclave, image: Path) -> Measurement:
    """What a contract and a policy list. Each party calls this itself, on its own installation.

    PCR2 is always this installation's: nobody has to believe an image's builder about the application. What `nitro`
    boots is measured from the image file; docs/NITRO.md says how far that is to be believed.
    Raises: LocalError when the image's application is not this installation's.
    """
    from mpc.image import cache

    own = cache.contract_measurement(enclave.image)
    if enclave.backend == "local":
        return own
    from mpc.host import nitro

    found = nitro.measure(image)
    if found.pcr2 != own.pcr2:
        raise LocalError(
            f"{image}: its application is not this installation's {enclave.image}; "
            f"`mpc measure {image} --from-source --variant {enclave.image}` names the first file that differs",
            expected=f"PCR2 {own.pcr2.hex()}",
            got=found.pcr2.hex(),
        )
    return Measurement(f"{own.label} nitro", found.pcr0, found.pcr1, found.pcr2)


def launcher(
    backend: str, image: Path, *, cpus: int, memory_bytes: int, state: Path, console: Path | None = None
) -> "Callable[[], Launched]":
    """What launches that image, as often as it is called. `console`: see `nitro.launch`."""
    if backend == "nitro":
        from mpc.host import nitro

        return partial(nitro.launch, image, cpus=cpus, memory_bytes=memory_bytes, console=console)
    from mpc.host import local
    from mpc.host.simulated_root import SimulatedRoot

    root = SimulatedRoot.load_or_create(state)
    return partial(local.launch, image, cpus=cpus, memory_bytes=memory_bytes, root=root)


def needs(enclave: Enclave) -> list[str]:
    """What `mpc run` needs for a nitro enclave, and what of that this machine lacks: a sentence each."""
    if enclave.backend == "local":
        return []
    from mpc.attestation.roots import ROOT_NAMES, root_fingerprint
    from mpc.host import nitro

    needed = [
        "`mpc run` launches an AWS Nitro Enclave: on an EC2 instance with enclaves enabled, with nitro-cli, and from "
        "an image with a kernel, which --image names; docs/NITRO.md says how to come by both"
    ]
    try:
        nitro.check()
    except LocalError as error:
        needed.append(f"`mpc run` cannot do that here: {error}")
    if enclave.cpus % 2:
        needed.append(f"enclave.cpus is {enclave.cpus}: x86 instances give whole cores, so an even number")
    if root_fingerprint(enclave.root) not in ROOT_NAMES.values():
        needed.append(
            f"enclave.root is none that this program knows ({enclave.root}): every party must have that fingerprint "
            "from where it gets its trust, and not from this file"
        )
    return needed
