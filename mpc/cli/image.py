"""`mpc image`: build enclave images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpc.cli.files import PATH, read_bounded
from mpc.cli.output import CAUTION, GOOD, Output, examples, with_output
from mpc.protocol.errors import LocalError

if TYPE_CHECKING:
    from mpc.image.build import Boot
    from mpc.image.eif import Architecture
    from mpc.image.signature import Signer

PEM_BYTES_MAX = 1 << 16
NOT_LOCKED = "not compared: the list of its wheels is for CPython 3.11 on x86_64 (docs/decisions/image-inputs.md)"


def boot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what a nitro image boots; `boot` makes one of them."""
    for option in (
        click.option(
            "--arch", type=click.Choice(["x86_64", "aarch64"]), help="nitro: of the kernel.  [this machine's]"
        ),
        click.option("--ramdisk", type=PATH, metavar="FILE", help="nitro: the bootstrap ramdisk, with an interpreter."),
        click.option("--cmdline", metavar="TEXT", help="nitro: the kernel's command line."),
        click.option("--kernel", type=PATH, metavar="FILE", help="nitro: the kernel, a bzImage (x86_64) or Image."),
        click.option("--backend", type=click.Choice(["local", "nitro"]), default="local", show_default=True),
    ):
        command = option(command)
    return command


def boot(
    backend: str, kernel: Path | None, cmdline: str | None, ramdisk: Path | None, arch: "Architecture | None"
) -> "Boot | None":
    """None for the local backend. Raises LocalError when an option is missing, or is for the other backend."""
    given = (kernel, cmdline, ramdisk, arch)
    if backend == "local":
        if any(value is not None for value in given):
            raise LocalError("--kernel, --cmdline, --ramdisk and --arch are for --backend nitro")
        return None
    if kernel is None or cmdline is None or ramdisk is None:
        raise LocalError(
            "--backend nitro needs --kernel, --cmdline and --ramdisk; docs/NITRO.md says where they are from"
        )
    from mpc.image import standin
    from mpc.image.build import Boot

    return Boot.nitro(kernel, cmdline, ramdisk, arch or standin.architecture())


@click.group()
def image() -> None:
    """Build enclave images."""


@image.command(
    epilog=examples(
        "mpc image build",
        "mpc image build --variant core -o core.eif",
        "mpc image build --backend nitro --kernel bzImage --cmdline '…' --ramdisk boot.cpio -o sql.eif",
    )
)
@click.option("--variant", default="sql", show_default=True, help="Which image: what kind of program it runs.")
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Write the image here, and not into the cache.")
@boot_options
@click.option("--sign", type=PATH, nargs=2, metavar="KEY CERT", help="Sign the image (PEM files), which gives PCR8.")
@with_output
def build(out: Output, /, variant: str, output: Path | None, sign: tuple[Path, Path] | None, **options: Any) -> int:
    """Build an image from this installation's files, the same bytes each time.

    Exit status: 0 built; 2 a file is missing or was changed, or the image cannot be written.
    """
    from mpc.image import build as builder
    from mpc.image import cache, standin

    chosen = boot(**options)
    if output is None and (chosen is not None or sign):
        raise LocalError("name the image with -o: the cache keeps unsigned images of the local backend only")
    if output is None:
        path, pcrs = cache.cached_image(variant)
    else:
        path, pcrs = output, builder.build(variant, output, boot=chosen, signer=_signer(*sign) if sign else None)
    out.verdict("built", f"{path}", GOOD)
    out.line()
    out.facts(pcrs.shown().items())
    told = _inputs(variant, path)
    out.line()
    out.facts(
        [
            ("files", f"{told['files']} in the application, {told['application_bytes']:,} bytes"),
            ("image", f"{told['bytes']:,} bytes"),
            ("packages", ", ".join(told["packages"])),
            ("lock", "each is from a wheel that the lock file names" if told["locked"] else NOT_LOCKED),
        ]
    )
    if chosen is not None and chosen.architecture != standin.architecture():
        here = f"this installation's libraries, which are the image's application, are for {standin.architecture()}"
        out.points([f"The kernel is for {chosen.architecture}, but {here}."], "!", CAUTION)
    out.document({"image": str(path), "variant": variant, **told, "Measurements": pcrs.shown()})
    return 0


def _inputs(name: str, path: Path) -> dict[str, Any]:
    """What went in: files, bytes, packages, and whether these were compared with the lock file's wheels."""
    from mpc.image import variant, wheels

    found, packages = variant.files(name), variant.packages(name)
    return {
        "bytes": path.stat().st_size,
        "files": len(found),
        "application_bytes": sum(file.path.stat().st_size for file in found),
        "packages": packages,
        "locked": wheels.check(packages),
    }


def _signer(key: Path, certificate: Path) -> "Signer":
    from mpc.image.signature import Signer

    return Signer.load(read_bounded(key, PEM_BYTES_MAX), read_bounded(certificate, PEM_BYTES_MAX))


@image.command(epilog=examples("mpc image bootstrap root --driver nsm.ko -o bootstrap.cpio"))
@click.argument("root", type=PATH)
@click.option("--driver", type=PATH, multiple=True, metavar="FILE", help="A kernel driver; they load in this order.")
@click.option("-o", "--output", type=PATH, metavar="FILE", required=True, help="Write the ramdisk here.")
@with_output
def bootstrap(out: Output, root: Path, driver: tuple[Path, ...], output: Path) -> int:
    """Pack the bootstrap ramdisk of nitro images from ROOT, a distribution's root file system with our Python in it.

    Exit status: 0 packed; 2 something is missing, or the ramdisk cannot be written.
    """
    import hashlib

    from mpc.image import bootstrap as packer

    packed = packer.pack(root, list(driver))
    try:
        output.write_bytes(packed)
    except OSError as error:
        raise LocalError(f"{output}: cannot be written ({error.strerror})") from None
    digest = hashlib.sha384(packed).hexdigest()
    out.verdict("packed", f"{output}, {len(packed)} bytes", GOOD)
    out.facts([("SHA-384", digest)])
    out.document({"ramdisk": str(output), "bytes": len(packed), "sha384": digest})
    return 0
