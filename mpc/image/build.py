"""Build an enclave image from this installation, or only measure what would be built.

The application ramdisk, and so PCR2, is the same for every backend; what starts it differs. The bytes follow from the
files alone: no time, no path, no machine is in them.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mpc.files import open_regular
from mpc.image import cpio, eif, standin, variant, wheels
from mpc.image.eif import Architecture, Buffer, ImageError, Kind
from mpc.image.measure import Content, Measurements, measure_sections, signed_by
from mpc.protocol.errors import LocalError

if TYPE_CHECKING:
    from mpc.image.signature import Signer

HASHING_THREADS = 4


@dataclass(frozen=True)
class Boot:
    """What starts the application: for `nitro` a kernel and a ramdisk with an interpreter, as AWS's tools make them."""

    kernel: Buffer = field(repr=False)
    cmdline: bytes
    bootstrap: list[Buffer] = field(repr=False)
    architecture: Architecture

    @classmethod
    def local(cls) -> "Boot":
        """This machine's interpreter and C library, described."""
        kernel, bootstrap = standin.sections(standin.describe())
        return cls(kernel, standin.CMDLINE, bootstrap, standin.architecture())

    @classmethod
    def nitro(cls, kernel: Path, cmdline: str, bootstrap: Path, architecture: Architecture) -> "Boot":
        """Raises LocalError when a file cannot be read, or the command line is not one."""
        text = cmdline.strip().encode()
        if not text.isascii() or b"\0" in text or not 0 < len(text) <= eif.SMALL_BYTES_MAX[Kind.CMDLINE]:
            raise LocalError("kernel command line", expected="some ASCII text")
        return cls(_read(kernel), text, [_read(bootstrap)], architecture)


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def build(name: str, out: Path, *, boot: Boot | None = None, signer: "Signer | None" = None) -> Measurements:
    """Write the image of a variant, for the local backend unless `boot` is given. The file appears whole or not at all.

    Raises: LocalError when a file of the installation is missing or was changed, or `out` cannot be written.
    """
    boot, files = _inputs(name, boot)
    return write_image(files, out, boot, title=name, signer=signer)


def measure_installation(name: str, boot: Boot | None = None) -> Measurements:
    """What `build` would give, without writing it: the answer to `is this measurement that source?`"""
    boot, files = _inputs(name, boot)
    return _measure(boot, pack(files))


def _inputs(name: str, boot: Boot | None) -> tuple[Boot, dict[str, Buffer]]:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        described = pool.submit(lambda: boot or Boot.local())
        found = variant.files(name)
        wheels.check(variant.packages(name))
        contents = pool.map(variant.File.read, found)
        files = {file.name: content for file, content in zip(found, contents, strict=True)}
        return described.result(), files


def pack(files: Mapping[str, Buffer]) -> list[Buffer]:
    """The application ramdisk."""
    return cpio.pack({f"{standin.APPLICATION_FOLDER}/{name}": content for name, content in files.items()})


def write_image(
    files: Mapping[str, Buffer], out: Path, boot: Boot, *, title: str, signer: "Signer | None" = None
) -> Measurements:
    """Write an image of any files (name → content). What users build comes from a variant; see `build`."""
    application = pack(files)
    sections: list[tuple[Kind, list[Buffer]]] = [
        (Kind.KERNEL, [boot.kernel]),
        (Kind.CMDLINE, [boot.cmdline]),
        (Kind.METADATA, [_metadata(title)]),
        (Kind.RAMDISK, boot.bootstrap),
        (Kind.RAMDISK, application),
    ]
    try:
        with (
            ThreadPoolExecutor(1) as pool,
            tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as file,
        ):
            Path(file.name).chmod(0o644)
            hashing = pool.submit(_measure, boot, application)
            try:
                if signer is not None:
                    sections.append((Kind.SIGNATURE, [signer.sign(hashing.result().pcr0)]))
                eif.write(Path(file.name), boot.architecture, sections)
                Path(file.name).replace(out)
            except BaseException:
                Path(file.name).unlink()
                raise
            measured = hashing.result()
    except OSError as error:
        raise LocalError(f"{out}: cannot be written ({error.strerror})") from None
    return measured if signer is None else signed_by(measured, signer.certificate)


def _measure(boot: Boot, application: list[Buffer]) -> Measurements:
    def content(*buffers: Buffer) -> Content:
        return lambda: buffers

    ramdisks = [content(*boot.bootstrap), content(*application)]
    return measure_sections(content(boot.kernel), content(boot.cmdline), ramdisks)


def _metadata(title: str) -> bytes:
    """Of AWS's form; nobody measures it. A build has no time, so that it can be repeated."""
    version = own_version()
    value = {
        "ImageName": f"{variant.OURS} {title}",
        "ImageVersion": version,
        "BuildMetadata": {
            "BuildTime": "1970-01-01T00:00:00+00:00",
            "BuildTool": variant.OURS,
            "BuildToolVersion": version,
            "OperatingSystem": "Linux",
            "KernelVersion": "",
        },
        "DockerInfo": {},
        "CustomMetadata": None,
    }
    return json.dumps(value).encode()


def own_version() -> str:
    try:
        return metadata.version(variant.OURS)
    except metadata.PackageNotFoundError:
        return "0+checkout"


def compare(path: Path, name: str, boot: Boot | None = None, *, application_only: bool = False) -> str | None:
    """The first thing in which an image differs from what this installation would give, or None.

    Raises: ImageError for a file that is no image, or whose ramdisk we cannot have packed, up to the first difference.
    """
    boot, files = _inputs(name, boot)
    with eif.opened(path) as image:
        bootstrap, *application = image.of(Kind.RAMDISK)
        if len(application) != 1:
            raise ImageError(f"{path}: application ramdisks", expected=1, got=len(application))
        if (found := _first_difference(image, application[0], pack(files))) or application_only:
            return found
        for section, expected in (
            (bootstrap, boot.bootstrap),
            (image.of(Kind.CMDLINE)[0], [boot.cmdline]),
            (image.of(Kind.KERNEL)[0], [boot.kernel]),
        ):
            if _digest(image.chunks(section.offset, section.size)) != _digest(expected):
                packed = section == bootstrap and boot.cmdline == standin.CMDLINE
                return (
                    _first_difference(image, section, boot.bootstrap) if packed else f"the {section.kind.name} section"
                )
    return None


def _first_difference(image: eif.Image, section: eif.Section, parts: list[Buffer]) -> str | None:
    """Of two ramdisks that we packed, the first name in which they differ.

    Both are sorted, so they are read side by side: a stranger's may list millions of files.
    """
    theirs = cpio.entries(image.reader(section), section.size)
    for name, content in cpio.contents(parts):
        entry = next(theirs, None)
        if entry is None or entry.name > name:
            return f"{name} (only here)"
        if entry.name < name:
            return f"{entry.name} (only in the image)"
        found = image.chunks(section.offset + entry.offset, entry.size)
        if entry.size != len(content) or _digest(found) != _digest([content]):
            return name
    rest = next(theirs, None)
    return None if rest is None else f"{rest.name} (only in the image)"


def _digest(buffers: Iterable[Buffer]) -> bytes:
    state = hashlib.sha384()
    for buffer in buffers:
        state.update(buffer)
    return state.digest()
