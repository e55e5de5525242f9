"""What is measured into the image: the lines of ours that strangers must trust, and what lies beside them."""

from collections import Counter
from importlib import metadata
from pathlib import Path

from bench.figures import Figure, Report
from mpc.image import local_init, variant

VARIANT = "sql"
LINES_MAX = 1700
PROGRAMS = "enclave_runtime/programs/"


def measure(rounds: int, work: Path) -> Report:
    ours, packages = Counter[str](), Counter[str]()
    init = Path(local_init.__file__)  # in the bootstrap ramdisk, so measured too
    for name, path in [(file.name, file.path) for file in variant.files(VARIANT)] + [("local_init.py", init)]:
        part = _part(name)
        if part in ("measured", "programs"):
            ours[part] += path.read_bytes().count(b"\n")
        else:
            packages[part] += path.stat().st_size
    figures = [
        Figure("lines of ours without programs", ours["measured"], "lines", LINES_MAX),
        Figure("lines of ours, programs", ours["programs"], "lines"),
        Figure("third-party packages", len(packages), ""),
        *(Figure(f"  {name}", size / (1 << 20), "MiB") for name, size in packages.most_common()),
        Figure("third-party bytes", sum(packages.values()) / (1 << 20), "MiB"),
    ]
    notes = ["Lines are all lines, comments and blank ones included; the interpreter and the C library come on top."]
    return Report(f"Image: variant {VARIANT}", figures, notes)


def _part(name: str) -> str:
    """Ours, programs apart, or the distribution that a file belongs to."""
    if name.startswith(PROGRAMS):
        return "programs"
    if name.startswith(("mpc/", "enclave_runtime/", "local_init.py")):
        return "measured"
    return _owners()[name]


def _owners() -> dict[str, str]:
    if not _OWNERS:
        for listed in variant.load(VARIANT).listed:
            if listed.distribution != variant.OURS:
                known = metadata.distribution(listed.distribution)
                title = f"{listed.distribution} {known.version}"
                _OWNERS.update(dict.fromkeys(variant.recorded(listed.distribution), title))
    return _OWNERS


_OWNERS: dict[str, str] = {}
