"""The Enclave Image Format (EIF), version 4: written, and read with nothing taken on trust.

AWS's reader walks the sections one after the other, QEMU's follows the header's offsets; a crafted file can show
each another image. Here the two must agree, to the byte.

Source: aws-nitro-enclaves-image-format src/defs/mod.rs and src/utils/mod.rs; QEMU hw/core/eif.c.
"""

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, Literal

from mpc.files import open_regular
from mpc.protocol.errors import LocalError

MAGIC = b".eif"
VERSION = 4
HEADER = struct.Struct(">4sHHQQHH32Q32QII")  # magic … number of sections, offsets, sizes, unused, CRC
SECTION_HEADER = struct.Struct(">HHQ")  # type, flags, size
SECTIONS_MAX = 32
READ_BYTES = 1 << 20  # at a time: hashing a file of any size costs this much memory a thread
# AWS's builder writes these two, and nothing that launches an image reads them.
DEFAULT_MEMORY_BYTES, DEFAULT_CPUS = 1 << 30, 2

Architecture = Literal["x86_64", "aarch64"]
_ARCHITECTURES: tuple[Architecture, ...] = ("x86_64", "aarch64")  # bit 0 of the flags
Buffer = bytes | memoryview


class Kind(IntEnum):
    """Section types."""

    KERNEL = 1
    CMDLINE = 2
    RAMDISK = 3
    SIGNATURE = 4
    METADATA = 5


# Of a section that is read into memory. AWS's own signature sections are under 8 KiB.
SMALL_BYTES_MAX = {Kind.CMDLINE: 1 << 16, Kind.SIGNATURE: 1 << 15, Kind.METADATA: 1 << 20}


class ImageError(LocalError):
    """This file is not an enclave image that anybody should launch."""


@dataclass(frozen=True)
class Section:
    kind: Kind
    offset: int  # of its content in the file
    size: int


@dataclass(frozen=True)
class Image:
    """An open image file whose structure has been checked; its CRC has not (`measure` reads it all)."""

    path: Path
    architecture: Architecture
    sections: tuple[Section, ...]
    crc: int
    file: BinaryIO

    def of(self, kind: Kind) -> tuple[Section, ...]:
        """In the order of the file."""
        return tuple(section for section in self.sections if section.kind is kind)

    def chunks(self, offset: int, size: int) -> Iterator[memoryview]:
        """That part of the file. Each chunk is overwritten by the next; threads may read the same image."""
        space = memoryview(bytearray(min(size, READ_BYTES)))
        while size:
            count = os.preadv(self.file.fileno(), [space[: min(size, READ_BYTES)]], offset)
            if count == 0:
                raise ImageError(f"{self.path}: the file was cut while it was read")
            yield space[:count]
            offset, size = offset + count, size - count

    def reader(self, section: Section) -> Callable[[int, int], bytes]:
        """A function that reads that many bytes of a section from an offset in it, fewer where it ends."""
        descriptor = self.file.fileno()
        return lambda offset, size: os.pread(descriptor, min(size, section.size - offset), section.offset + offset)

    def read(self, section: Section) -> bytes:
        """A small section, whole."""
        return b"".join(map(bytes, self.chunks(section.offset, section.size)))


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """Read the headers (548 bytes and 12 for each section) and check everything that they say.

    Raises: ImageError naming the file and what is wrong in it; LocalError when it cannot be read.
    """
    with open_regular(path) as file:
        try:
            yield _check(path, file)
        except ImageError as error:
            if error.what.startswith(str(path)):
                raise
            raise ImageError(f"{path}: {error.what}", expected=error.expected, got=error.got) from None


def _check(path: Path, file: BinaryIO) -> Image:
    size = os.fstat(file.fileno()).st_size
    raw = os.pread(file.fileno(), HEADER.size, 0)
    if raw[:4] != MAGIC:
        raise ImageError("not an enclave image (EIF): it does not begin with .eif")
    if len(raw) < HEADER.size:
        raise ImageError("EIF header", expected=f"{HEADER.size} bytes", got=len(raw))
    _, version, flags, _, _, reserved, count, *rest = HEADER.unpack(raw)
    offsets, sizes, unused, crc = rest[:32], rest[32:64], rest[64], rest[65]
    if version != VERSION:
        raise ImageError("EIF version", expected=VERSION, got=version)
    if flags > 1 or reserved or unused:
        raise ImageError("EIF header: a flag or a reserved field is set", expected="0, or 1 in the flags for arm64")
    if not 3 <= count <= SECTIONS_MAX:
        raise ImageError("EIF header: number of sections", expected=f"3 to {SECTIONS_MAX}", got=count)
    if any(offsets[count:]) or any(sizes[count:]):
        raise ImageError(f"EIF header: there is an offset or a size beyond its {count} sections")
    sections = []
    place = HEADER.size
    for index in range(count):
        section = _section(file, place, index, offsets[index], sizes[index], size)
        place = section.offset + section.size
        sections.append(section)
    if place != size:
        raise ImageError("bytes after the last section", expected=f"a file of {place} bytes", got=size)
    _check_order([section.kind for section in sections])
    return Image(path, _ARCHITECTURES[flags], tuple(sections), crc, file)


def _section(file: BinaryIO, place: int, index: int, offset: int, size: int, file_bytes: int) -> Section:
    """The section that must begin at `place`; offset and size are what the file's header says of it."""
    if offset != place:
        raise ImageError(
            f"section {index}: offset in the header", expected=f"{place}, after the one before", got=offset
        )
    raw = os.pread(file.fileno(), SECTION_HEADER.size, place)
    if len(raw) < SECTION_HEADER.size:
        raise ImageError(f"section {index}: the file ends before its header")
    number, flags, own_size = SECTION_HEADER.unpack(raw)
    if number not in set(Kind):
        raise ImageError(f"section {index}: type", expected="1 to 5", got=number)
    kind = Kind(number)
    if flags:
        raise ImageError(f"section {index}: flags", expected=0, got=flags)
    if own_size != size:
        raise ImageError(f"section {index}: size", expected=f"{size}, as the file's header says", got=own_size)
    place += SECTION_HEADER.size
    if size > file_bytes - place:
        raise ImageError(f"section {index}: size", expected=f"at most the file's last {file_bytes - place}", got=size)
    if size > SMALL_BYTES_MAX.get(kind, size):
        raise ImageError(f"section {index} ({kind.name}): size", expected=f"at most {SMALL_BYTES_MAX[kind]}", got=size)
    return Section(kind, place, size)


def _check_order(kinds: list[Kind]) -> None:
    """Measured sections in the one order that AWS's builder writes: the PCRs hash them joined, without lengths."""
    measured = [kind for kind in kinds if kind in (Kind.KERNEL, Kind.CMDLINE, Kind.RAMDISK)]
    ramdisks = measured.count(Kind.RAMDISK)
    if measured != [Kind.KERNEL, Kind.CMDLINE, *[Kind.RAMDISK] * ramdisks] or not ramdisks:
        names = ", ".join(kind.name for kind in measured)
        raise ImageError("sections", expected="one kernel, one cmdline, then one or more ramdisks", got=names)
    for kind in (Kind.SIGNATURE, Kind.METADATA):
        if kinds.count(kind) > 1:
            raise ImageError(f"sections of type {kind.name}", expected="at most one", got=kinds.count(kind))


def write(path: Path, architecture: Architecture, sections: Sequence[tuple[Kind, Sequence[Buffer]]]) -> None:
    """A new file from the sections, each a list of buffers. The same sections give the same bytes.

    Raises: LocalError when it cannot be written; what was written by then stays.
    """
    sizes = [sum(map(len, content)) for _, content in sections]
    offsets, place = [], HEADER.size
    for size in sizes:
        offsets.append(place)
        place += SECTION_HEADER.size + size
    zeros = [0] * (SECTIONS_MAX - len(sections))
    flags = _ARCHITECTURES.index(architecture)
    start = (MAGIC, VERSION, flags, DEFAULT_MEMORY_BYTES, DEFAULT_CPUS, 0, len(sections))
    header = HEADER.pack(*start, *offsets, *zeros, *sizes, *zeros, 0, 0)[:-4]
    crc = zlib.crc32(header)
    try:
        with path.open("wb") as file:
            file.write(header + bytes(4))
            for (kind, content), size in zip(sections, sizes, strict=True):
                for buffer in (SECTION_HEADER.pack(kind, 0, size), *content):
                    file.write(buffer)
                    crc = zlib.crc32(buffer, crc)
            file.seek(len(header))
            file.write(crc.to_bytes(4, "big"))
    except OSError as error:
        raise LocalError(f"{path}: cannot be written ({error.strerror})") from None
