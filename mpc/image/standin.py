"""What stands in a `local` image where a `nitro` image has a kernel and an operating system.

A local enclave runs on this machine's interpreter and C library. The image cannot hold them, so it describes them, by
version and digest, and its first PCRs change with them; the local backend starts no image that describes others.
"""

import hashlib
import json
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from mpc.image import cpio, local_init
from mpc.image.eif import Architecture, Buffer
from mpc.protocol.errors import LocalError

CMDLINE = b"python -I -B -S /init.py"
APPLICATION_FOLDER = "app"  # of the application ramdisk, in the enclave's root
INIT, INTERPRETER = "init.py", "interpreter.json"
# Folders of the standard library that no enclave needs; the sandbox shows it none of the installed packages.
HIDDEN = ("site-packages", "dist-packages")
_UNUSED = {*HIDDEN, "__pycache__", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"}
_PT_INTERP = 3


@dataclass(frozen=True)
class Interpreter:
    """Where this process's Python and C library lie, links resolved."""

    executable: Path
    library: Path | None  # libpython, where the executable is linked to it
    standard_library: Path
    c_library: Path
    loader: Path  # of the C library, at the name that the executable asks for

    @property
    def files(self) -> list[Path]:
        """All that the description depends on."""
        library = [self.library] if self.library else []
        return [self.executable, *library, self.c_library, *sorted(_sources(self.standard_library))]


def architecture() -> Architecture:
    machine = platform.machine()
    for known in get_args(Architecture):
        if machine == known:
            return known  # type: ignore[no-any-return]
    raise LocalError("this machine's architecture", expected="x86_64 or aarch64", got=machine)


@cache
def interpreter() -> Interpreter:
    """Of this process. Raises LocalError where there is no glibc."""
    mapped = {Path(line.split(maxsplit=5)[5].strip()) for line in _maps() if line.count("/")}
    c_library = next((path for path in mapped if path.name == "libc.so.6"), None)
    executable = Path(os.path.realpath(sys.executable))
    loader = _loader(executable)
    if c_library is None or loader is None:
        raise LocalError("images for the local backend need a Python that runs on glibc (Debian, Fedora, Ubuntu …)")
    library = next((path for path in mapped if path.name.startswith("libpython3")), None)
    return Interpreter(executable, library, Path(sysconfig.get_path("stdlib")), c_library, loader)


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def _loader(executable: Path) -> Path | None:
    """The PT_INTERP segment of an ELF64 file. Source: System V ABI, chapter 5."""
    with executable.open("rb") as file:
        start = file.read(64)
        if start[:5] != b"\x7fELF\x02":
            return None
        table, size, count = *struct.unpack_from("=Q", start, 32), *struct.unpack_from("=HH", start, 54)
        for index in range(count):
            file.seek(table + index * size)
            kind, _, offset, _, _, length = struct.unpack("=IIQQQQ", file.read(40))
            if kind == _PT_INTERP:
                file.seek(offset)
                return Path(file.read(length).rstrip(b"\0").decode())
    return None


def _sources(folder: Path) -> Iterator[Path]:
    """What of the standard library runs: Python files and shared objects."""
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir():
                if entry.name not in _UNUSED and not entry.name.startswith("config-"):
                    yield from _sources(Path(entry.path))
            elif entry.name.endswith((".py", ".so")) and entry.is_file():
                yield Path(entry.path)


def describe() -> dict[str, dict[str, str]]:
    """`kernel` and `interpreter`: names, versions and digests, the same for the same builds wherever they lie."""
    found = interpreter()
    everything = hashlib.sha256()
    for path in sorted(_sources(found.standard_library)):
        relative = path.relative_to(found.standard_library).as_posix()
        everything.update(f"{relative}\0{_digest(path)}\n".encode())
    return {
        "kernel": {
            "backend": "local: the kernel and the C library are the host's",
            "machine": platform.machine(),
            "c_library": os.confstr("CS_GNU_LIBC_VERSION") or "",
            "c_library_sha256": _digest(found.c_library),
        },
        "interpreter": {
            "version": f"{platform.python_implementation()} {platform.python_version()}",
            "executable_sha256": _digest(found.executable),
            "library_sha256": _digest(found.library) if found.library else "",
            "standard_library_sha256": everything.hexdigest(),
        },
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sections(described: dict[str, dict[str, str]]) -> tuple[bytes, list[Buffer]]:
    """Kernel and bootstrap ramdisk of a local image, from what `describe` says."""
    init = Path(local_init.__file__).read_bytes()
    return _json(described["kernel"]), cpio.pack({INIT: init, INTERPRETER: _json(described["interpreter"])})


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
