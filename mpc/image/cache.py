"""What this installation gives, remembered under the user's cache folder.

An entry's key is the stat signature (path, size, times) of every file that goes into it, so a changed installation
finds nothing. The measurement of an image file is remembered in the same way; the local backend's host, who could lie
about it, is believed by nobody who does not own the machine.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mpc.image import build, standin, variant
from mpc.image.eif import Image
from mpc.image.measure import Measurements, measure_image
from mpc.protocol.contract import Measurement
from mpc.protocol.errors import LocalError

KEPT = 4  # entries of one kind: several installations take turns, and an image is about 200 MB


def folder() -> Path:
    """$XDG_CACHE_HOME/enclave-mpc, by default ~/.cache/enclave-mpc, for this user only. Raises LocalError."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    path = (Path(base) if base.startswith("/") else Path.home() / ".cache") / variant.OURS
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError(
            f"{path}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return path


def cached_image(name: str, announce: Callable[[], None] | None = None) -> tuple[Path, Measurements]:
    """The image of a variant for the local backend, built if this installation has not built it before.

    Args: announce: called before it is built, which takes seconds.
    """
    kind, key = f"image-{name}", _key(name)
    path = folder() / f"{kind}-{key}.eif"

    def make() -> dict[str, Any]:
        if announce is not None:
            announce()
        return {**build.build(name, path).shown(), "bytes": path.stat().st_size}

    made = remembered(kind, key, make, lambda made: path.is_file() and path.stat().st_size == made["bytes"])
    return path, _measurements(made)


def measure_from_source(name: str) -> Measurements:
    """What the image of a variant must measure if it was built from the files that this installation has."""
    return _measurements(
        remembered(f"source-{name}", _key(name), lambda: build.measure_installation(name).shown(), _is_whole)
    )


def contract_measurement(name: str) -> Measurement:
    """The same, as a contract and a policy list it."""
    pcrs = measure_from_source(name)
    label = f"{name} {build.own_version()} cp{sys.version_info[0]}{sys.version_info[1]} {platform.machine()}"
    return Measurement(label, pcrs.pcr0, pcrs.pcr1, pcrs.pcr2)


def description() -> dict[str, dict[str, str]]:
    """`standin.describe`, remembered."""
    return remembered("interpreter", _signature(_interpreter_files()), standin.describe)


def measured(image: Image) -> Measurements:
    """What an open image measures, remembered by the file's identity and times: whoever changes a byte changes those.

    Raises: ImageError.
    """
    found = os.fstat(image.file.fileno())
    identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, build.own_version())
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    return _measurements(remembered("measured", key, lambda: dict(measure_image(image)[0].shown()), _is_whole))


def _is_whole(made: dict[str, Any]) -> bool:
    """What a disk that was full, or somebody else, left there is made again."""
    return all(re.fullmatch("[0-9a-f]{96}", str(made.get(f"PCR{index}"))) for index in (0, 1, 2))


def _measurements(made: dict[str, Any]) -> Measurements:
    return Measurements(*(bytes.fromhex(made[f"PCR{index}"]) for index in (0, 1, 2, 8) if f"PCR{index}" in made))


def remembered(
    kind: str, key: str, make: Callable[[], dict[str, Any]], still: Callable[[dict[str, Any]], bool] = lambda _: True
) -> dict[str, Any]:
    """The entry's value; `make` runs, in one process at a time, when there is none or `still` says no to it."""
    entry = folder() / f"{kind}-{key}.json"
    if (value := _read(entry)) is not None and still(value):
        return value
    with _lock(kind):
        if (value := _read(entry)) is not None and still(value):
            return value
        value = make()
        partial = entry.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(value))
            partial.replace(entry)
        except OSError as error:
            raise LocalError(f"{entry}: cannot be written ({error.strerror})") from None
        _forget(kind)
    return value


def _read(entry: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(entry.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def _lock(kind: str) -> Iterator[None]:
    with (folder() / f"{kind}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget(kind: str) -> None:
    """All but the newest entries, and what a killed builder left. Who has an older image open keeps it."""
    for leftover in folder().glob(f".{kind}-*"):
        leftover.unlink(missing_ok=True)
    entries = sorted(folder().glob(f"{kind}-*.json"), key=lambda path: path.stat().st_mtime_ns)
    for entry in entries[:-KEPT]:
        entry.with_suffix(".eif").unlink(missing_ok=True)
        entry.unlink(missing_ok=True)


def _key(name: str) -> str:
    own = [str(path) for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".toml")]
    return _signature([*_interpreter_files(), *own, *(str(file.path) for file in variant.files(name))])


@cache
def _interpreter_files() -> list[str]:
    """While a process runs, its interpreter's list of files stays."""
    return [str(path) for path in standin.interpreter().files]


def _signature(paths: Iterable[str]) -> str:
    state = hashlib.sha256(build.own_version().encode())
    for path in sorted(paths):
        found = os.stat(path)  # noqa: PTH116 - 700 of them, and a Path object costs more than the call
        state.update(f"{path}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode())
    return state.hexdigest()[:32]
