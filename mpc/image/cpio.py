"""The ramdisks that we build: uncompressed `newc` archives with one form for each list of files.

Sorted by name, every folder before what is in it; owner, time, device and mode fixed; inodes counted from 1.
Reading accepts that form only, so that an image can neither write outside its folder nor hide a file.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from mpc.image.eif import Buffer, ImageError

FILE_MODE, FOLDER_MODE = 0o100644, 0o40755
NAME_BYTES_MAX = 255
_HEADER_BYTES = 110
_TRAILER = "TRAILER!!!"
_NAME = re.compile(r"(?!\.\.?(/|$))[A-Za-z0-9._+-]+(/(?!\.\.?(/|$))[A-Za-z0-9._+-]+)*")


@dataclass(frozen=True)
class Entry:
    name: str  # relative, with slashes
    offset: int  # of its content in the archive's bytes
    size: int
    folder: bool


class Read(Protocol):
    def __call__(self, offset: int, size: int, /) -> bytes:
        """That part of the archive, shorter where it ends."""


def pack(files: Mapping[str, Buffer]) -> list[Buffer]:
    """The archive of these files (relative name → content), as a list of buffers. Folders follow from the names."""
    folders = {name[:cut] for name in files for cut in range(len(name)) if name[cut] == "/"}
    parts: list[Buffer] = []
    for inode, name in enumerate(sorted(folders | set(files)), start=1):
        if not _NAME.fullmatch(name) or len(name) > NAME_BYTES_MAX or name in folders & set(files):
            raise ImageError(f"file name {name!r}", expected="a relative path of letters, digits and . _ + -")
        content = files.get(name, b"")
        parts += [_head(name, inode, len(content), folder=name in folders), content, bytes(-len(content) % 4)]
    return [*parts, _head(_TRAILER, 0, 0, folder=None)]


def contents(parts: list[Buffer]) -> Iterator[tuple[str, Buffer]]:
    """Names and contents of an archive that `pack` gave as a list; a folder's content is empty."""
    for head, content in zip(parts[:-1:3], parts[1:-1:3], strict=True):
        yield bytes(head[_HEADER_BYTES:]).rstrip(b"\0").decode(), content


def entries(read: Read, size: int) -> Iterator[Entry]:
    """What an archive of `size` bytes holds. Raises ImageError at the first byte that `pack` would not have written."""
    place, inode, before, folders, empty = 0, 1, "", {""}, set[str]()
    while True:
        head = read(place, _HEADER_BYTES + NAME_BYTES_MAX + 4)
        try:
            mode, length, name_bytes = (int(head[at : at + 8], 16) for at in (14, 54, 94))
            name = head[_HEADER_BYTES : _HEADER_BYTES + name_bytes - 1].decode("ascii")
        except ValueError:
            raise ImageError(f"ramdisk: not a newc archive at byte {place}") from None
        if name == _TRAILER:
            break
        folder = mode == FOLDER_MODE
        expected = _head(name, inode, length, folder=folder)
        if not _NAME.fullmatch(name) or name <= before or name.rpartition("/")[0] not in folders:
            raise ImageError(f"ramdisk: name at byte {place}", expected="sorted relative paths, each in a folder of it")
        empty.discard(name.rpartition("/")[0])
        room = size - place - len(expected)
        if head[: len(expected)] != expected or (folder and length) or not 0 <= length <= room - -length % 4:
            raise ImageError(f"ramdisk: entry at byte {place} is not in the one form that our builder writes")
        place += len(expected)
        yield Entry(name, place, length, folder)
        place += length
        if any(read(place, -length % 4)):
            raise ImageError(f"ramdisk: padding at byte {place}")
        place += -length % 4
        inode, before = inode + 1, name
        if folder:
            folders.add(name)
            empty.add(name)
    if empty:
        raise ImageError("ramdisk: a folder with nothing in it", got=min(empty))
    end = _head(_TRAILER, 0, 0, folder=None)
    if read(place, len(end)) != end or place + len(end) != size:
        raise ImageError(f"ramdisk: its end at byte {place}", expected=f"{len(end)} bytes of trailer and no more")


def _head(name: str, inode: int, size: int, *, folder: bool | None) -> bytes:
    """Header, name and padding; `folder` is None for the trailer."""
    mode = 0 if folder is None else FOLDER_MODE if folder else FILE_MODE
    links = 2 if folder else 1
    fields = (inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode("ascii") + b"\0"
    return head + bytes(-len(head) % 4)
