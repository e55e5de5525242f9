"""The lists of what is in an image, and the files of this installation that they name.

A variant is a checked-in TOML file beside this module. It names distributions and, of each, the files that go in;
nothing else does. Why the others stay out is said beside; a test sees to it that this is said of every file of the
locked versions.
"""

import base64
import csv
import hashlib
import mmap
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from mpc.image.eif import Buffer
from mpc.protocol.errors import LocalError

OURS = "enclave-mpc"
_OUR_PACKAGES = ("mpc", "enclave_runtime")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Exclusion:
    files: tuple[str, ...]  # globs
    why: str


@dataclass(frozen=True)
class Listed:
    """One distribution's part of a variant; globs are of paths as its RECORD has them."""

    distribution: str
    include: tuple[str, ...]
    exclude: tuple[Exclusion, ...]

    def why_not(self, name: str) -> str | None:
        """The reason why that file stays out; None for one that goes in, or of which nothing is said."""
        if _matches(self.include, name):
            return None
        return next((exclusion.why for exclusion in self.exclude if _matches(exclusion.files, name)), None)


@dataclass(frozen=True)
class Variant:
    name: str
    title: str
    listed: tuple[Listed, ...]


@dataclass(frozen=True)
class File:
    """A file of the application, and where this installation has it."""

    name: str  # as RECORD has it: relative, from the folder that is on Python's path
    path: Path
    sha256: str | None  # from RECORD, in its base64; None for our own files in a checkout, which has no RECORD

    def read(self) -> Buffer:
        """The content, mapped. Raises LocalError when RECORD says otherwise."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else b""
        except OSError as error:
            raise LocalError(f"{self.path}: cannot be read ({error.strerror})") from None
        if self.sha256 is not None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            if digest != self.sha256:
                raise LocalError(f"{self.path} was changed after it was installed: install its package again")
        return content


def variants() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


@cache
def load(name: str) -> Variant:
    """Raises LocalError for a variant that does not exist."""
    if name not in variants():
        raise LocalError("image variant", expected=f"one of {', '.join(variants())}", got=name)
    table = tomllib.loads((_FOLDER / f"{name}.toml").read_text())
    base = load(table["extends"]).listed if "extends" in table else ()
    return Variant(name, table["title"], (*base, *map(_listed, table["distributions"])))


def _listed(table: dict[str, Any]) -> Listed:
    exclusions = tuple(Exclusion(tuple(item["files"]), item["why"]) for item in table.get("exclude", ()))
    return Listed(table["name"], tuple(table["include"]), exclusions)


def packages(name: str) -> list[str]:
    """The distributions of others that the variant takes files from."""
    return sorted({listed.distribution for listed in load(name).listed} - {OURS})


def files(name: str) -> list[File]:
    """Every file of the variant's application, found in this installation but not read.

    Raises: LocalError when a distribution is not installed, or has no file for one of the list's entries.
    """
    found = {file.name: file for listed in load(name).listed for file in _found(listed)}
    return [found[name] for name in sorted(found)]


def _found(listed: Listed) -> Iterator[File]:
    unused = set(listed.include)
    for name, file in recorded(listed.distribution).items():
        if _matches(listed.include, name):
            unused -= {glob for glob in unused if _matches((glob,), name)}
            yield File(name, Path(file[0]), file[1])
    if unused:
        raise LocalError(f"{listed.distribution}: the installed version has no {', '.join(sorted(unused))}")


def recorded(distribution: str) -> dict[str, tuple[str, str | None]]:
    """Of all that was installed, by name: path, and digest as RECORD has it. Of ours: the Python files, also in a
    checkout, which has no digests.
    """
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        if distribution != OURS:
            raise LocalError(f"{distribution} is not installed: pip install {distribution}") from None
        digests = {}  # a checkout on Python's path
    else:
        # name, sha256=digest, size; neither digest nor size for what was made after the installation (bytecode)
        rows = csv.reader((found.read_text("RECORD") or "").splitlines())
        digests = {row[0]: row[1].removeprefix("sha256=") for row in rows if row[1].startswith("sha256=")}
        if distribution != OURS:
            root = found.locate_file("")
            return {name: (f"{root}/{name}", digest) for name, digest in digests.items()}
    folders = [(package, _package_folder(package)) for package in _OUR_PACKAGES]
    ours = {
        f"{package}/{path.relative_to(folder).as_posix()}": str(path)
        for package, folder in folders
        for path in folder.rglob("*.py")
    }
    return {name: (path, digests.get(name)) for name, path in ours.items()}


def _package_folder(package: str) -> Path:
    """Where a package of ours lies, in a checkout or in site-packages, without importing it."""
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        raise LocalError(f"the package {package} is not installed: install {OURS} again")
    return Path(spec.origin).parent


def _matches(globs: tuple[str, ...], name: str) -> bool:
    return bool(_pattern(globs).fullmatch(name))


@cache
def _pattern(globs: tuple[str, ...]) -> re.Pattern[str]:
    """`*` stands for anything but a slash, `**` for anything, `**/` for folders or none, `[0-9]` for a digit."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "[0-9]": "[0-9]"}
    tokens = [re.findall(r"\*\*/|\*\*|\*|\[0-9\]|[^*\[]+", glob) for glob in globs]
    return re.compile("|".join("".join(parts.get(token) or re.escape(token) for token in glob) for glob in tokens))
