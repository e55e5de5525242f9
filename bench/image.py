"""What is measured into the image: the lines of ours that strangers must trust, and what lies beside them."""

import ast
from collections import Counter
from functools import cache
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
            ours[f"{part}, code"] += _code_lines(path)
        else:
            packages[part] += path.stat().st_size
    figures = [
        Figure("lines of code of ours, without programs", ours["measured, code"], "lines", LINES_MAX),
        Figure("  with comments, docstrings and blank lines", ours["measured"], "lines"),
        Figure("lines of code of ours, programs", ours["programs, code"], "lines"),
        Figure("  programs with comments, docstrings and blank lines", ours["programs"], "lines"),
        Figure("third-party packages", len(packages), ""),
        *(Figure(f"  {name}", size / (1 << 20), "MiB") for name, size in packages.most_common()),
        Figure("third-party bytes", sum(packages.values()) / (1 << 20), "MiB"),
    ]
    notes = ["The interpreter and the C library come on top."]
    return Report(f"Image: variant {VARIANT}", figures, notes)


def _code_lines(path: Path) -> int:
    """Without blank lines, comments and docstrings."""
    text = path.read_text()
    code = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(code)


def _part(name: str) -> str:
    """Ours, programs apart, or the distribution that a file belongs to."""
    if name.startswith(PROGRAMS):
        return "programs"
    if name.startswith(("mpc/", "enclave_runtime/", "local_init.py")):
        return "measured"
    return _owners()[name]


@cache
def _owners() -> dict[str, str]:
    """Name of a file → its distribution and version."""
    owners = {}
    for listed in variant.load(VARIANT).listed:
        if listed.distribution != variant.OURS:
            title = f"{listed.distribution} {metadata.version(listed.distribution)}"
            owners.update(dict.fromkeys(variant.recorded(listed.distribution), title))
    return owners
