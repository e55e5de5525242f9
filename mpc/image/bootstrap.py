"""The bootstrap ramdisk of `nitro` images: our /init, an interpreter with its libraries, and the kernel's drivers.

It is packed from the root file system of a distribution (a container image's, pinned by digest): same files, same
bytes. Of that only what the application needs goes in: one interpreter, its standard library, shared libraries.
"""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from mpc.files import open_regular
from mpc.image import nitro_init
from mpc.protocol.errors import LocalError

NEEDED_FOLDERS = ("dev", "modules", "var/empty")  # where /init mounts and looks, and where the engine goes
_LIBRARY_CACHE = "etc/ld.so.cache"
_LIBRARY_FOLDERS = ("lib", "lib64", "usr/lib", "usr/lib64", "usr/local/lib")
# Of the standard library.
_UNUSED = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo"}
_UNUSED |= {"ensurepip", "lib2to3"}
_LINKS = ("bin", "lib", "lib64")  # of systems with a merged /usr
_FOLDER, _FILE, _PROGRAM, _LINK, _DEVICE = 0o40755, 0o100644, 0o100755, 0o120777, 0o20666
_RANDOM = "dev/urandom"  # an interpreter that starts before the kernel has entropy asks for it, /dev unmounted as yet


def pack(root: Path, modules: list[Path]) -> bytes:
    """The ramdisk, an uncompressed newc archive.

    Args: root: of a file system with the Python of this process's minor version, for which the application's modules
        are built. modules: kernel drivers (nsm.ko), in the order in which they are loaded.
    Raises: LocalError when something is missing, or a driver is compressed.
    """
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    prefix = next((place for place in ("usr/local", "usr") if (root / place / "bin" / version).is_file()), None)
    if prefix is None:
        raise LocalError(f"{root}: has no {version} in usr/local/bin or usr/bin, for which this installation is built")
    first = Path(nitro_init.__file__).read_bytes()
    files: dict[str, tuple[int, bytes]] = {name: (_FOLDER, b"") for name in NEEDED_FOLDERS}
    files[_RANDOM] = _DEVICE, b""
    files["init"] = _PROGRAM, f"#!/{prefix}/bin/{version} -IBS\n".encode() + first
    for place, module in enumerate(modules):
        files[f"modules/{place:02}-{module.name}"] = _FILE, _module(module)
    try:
        files |= {name: _content(root / name) for name in _names(root, prefix, version)}
    except OSError as error:
        raise LocalError(f"{error.filename}: cannot be read ({error.strerror})") from None
    for name in list(files):
        files |= {str(parent): (_FOLDER, b"") for parent in Path(name).parents if str(parent) not in {".", *files}}
    return _archive(files)


def _module(path: Path) -> bytes:
    with open_regular(path) as file:
        content = file.read()
    if not content.startswith(b"\x7fELF"):
        raise LocalError(f"{path}: not a kernel driver; one that is compressed must be unpacked first (xz -d, zstd -d)")
    return content


def _names(root: Path, prefix: str, version: str) -> Iterator[str]:
    """What goes in, relative to `root`."""
    yield f"{prefix}/bin/{version}"
    yield from (name for name in _LINKS if (root / name).is_symlink())
    if (root / _LIBRARY_CACHE).is_file():
        yield _LIBRARY_CACHE
    library = root / prefix / "lib" / version
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _UNUSED and not name.startswith("config-")]
        found = [Path(folder, name) for name in files if name.endswith((".py", ".so"))]
        yield from (path.relative_to(root).as_posix() for path in found)
    for place in _LIBRARY_FOLDERS:
        if not (root / place).is_symlink():
            for pattern in ("*.so*", "*-linux-gnu/*.so*"):
                yield from (path.relative_to(root).as_posix() for path in (root / place).glob(pattern))


def _content(path: Path) -> tuple[int, bytes]:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return _LINK, os.fsencode(path.readlink())
    if not stat.S_ISREG(mode):
        raise LocalError(f"{path}: is no regular file, and none that a root file system should have there")
    return (_PROGRAM if mode & 0o111 else _FILE), path.read_bytes()


def _archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Sorted, so that every folder comes before what is in it; owner and time are zero."""
    parts = []
    for inode, (name, (mode, content)) in enumerate(sorted(files.items()), start=1):
        parts.append(_entry(name, mode, inode, content))
    return b"".join([*parts, _entry("TRAILER!!!", 0, 0, b"")])


def _entry(name: str, mode: int, inode: int, content: bytes) -> bytes:
    encoded = os.fsencode(name) + b"\0"
    links = 2 if mode == _FOLDER else 1
    major, minor = (1, 9) if mode == _DEVICE else (0, 0)  # /dev/urandom: Linux Documentation/admin-guide/devices.txt
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, major, minor, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
