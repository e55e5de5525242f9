"""The documents are true: their commands give the shown output, their links and the tests that they name exist.

In a document, a ```console block holds commands (`$ …`) and their whole output; `…` stands for anything. White space,
times, durations and long hexadecimal numbers need not be the same. A block under a line that is only a file's name in
backticks is that file. Commands that may fail say so: `… || echo "exit status $?"`.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scenarios").rglob("*.md")])
RUN = ["README.md", "docs/TUTORIAL.md", "docs/UPDATING.md"]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^`([\w./-]+)`:\n\n$", re.MULTILINE)
_VARYING = (
    (r"\b[0-9a-f]{16,}\b", "HEX"),
    (r"\b\d{4}-\d\d-\d\d\s+\d\d:\d\d:\d\d\b", "TIME"),
    (r"\b\d+\.\d+\s+s\b", "DURATION"),
)


def steps(document: str) -> Iterator[tuple[str, str]]:
    """In order: (command, shown output), or (name of a file with a slash before it, its content)."""
    end = 0
    for block in _FENCE.finditer(document):
        named = _FILE.findall(document[end : block.start()][-200:])
        end = block.end()
        if block[1] == "console":
            for part in re.split(r"^\$ ", block[2], flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                yield command, output
        elif named:
            yield f"/{named[-1]}", block[2]


def pattern(shown: str) -> str:
    """What output must match to be as shown."""
    return ".*?".join(re.escape(part) for part in plain(shown).replace("…", "\0").split("\0"))


def plain(text: str) -> str:
    for varying, word in _VARYING:
        text = re.sub(varying, word, text)
    return "".join(text.split())


@pytest.mark.parametrize("name", RUN)
def test_commands_give_the_shown_output(name: str, tmp_path: Path) -> None:
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FORCE_", "MPC_"))} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_STATE_HOME": str(tmp_path / ".state"),
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
    }
    count = 0
    for command, shown in steps((ROOT / name).read_text()):
        if command.startswith("/"):
            (tmp_path / command[1:]).write_text(shown)
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        assert re.fullmatch(pattern(shown), plain(done.stdout)), f"{command}\nshown:\n{shown}\nprinted:\n{done.stdout}"
        count += 1
    assert count > 0


def test_every_console_block_is_run() -> None:
    """A block elsewhere, or with a typo in its language, would be shown and never checked."""
    for path in DOCUMENTS:
        prompts = len(re.findall(r"^\$ ", path.read_text(), re.MULTILINE))
        if path.relative_to(ROOT).as_posix() in RUN:
            commands = [command for command, _ in steps(path.read_text()) if not command.startswith("/")]
            assert len(commands) == prompts, path
        else:
            assert prompts == 0, f"{path}: add it to RUN"


def test_the_comparison_can_fail() -> None:
    assert re.fullmatch(pattern("a …\nc 1.5 s"), plain("a b\n  c 2.75 s\n"))
    for printed in ("a b\nd 2.75 s", "a b\nc 2.75 s more", "x a b\nc 2.75 s"):
        assert not re.fullmatch(pattern("a …\nc 1.5 s"), plain(printed))


def headings(document: str) -> set[str]:
    """Anchors, as GitHub makes them."""
    text = _FENCE.sub("", document)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{path}: {target}"
        assert not anchor or anchor in headings(there.read_text()), f"{path}: {target}"


def defined(module: Path) -> set[str]:
    tree = ast.parse(module.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_a_document_names_exist(path: Path) -> None:
    for module, name in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", path.read_text()):
        file = ROOT / "tests" / module
        assert file.exists(), f"{path} names {module}"
        assert not name or name in defined(file), f"{path} names {module}::{name}"


def test_every_attack_has_a_test_or_says_that_it_has_none() -> None:
    text = (ROOT / "docs/THREATS.md").read_text()
    section = text.partition("## Attacks and answers\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|(.+)\|(.+)\|(.+)\|$", section, re.MULTILINE)[2:]
    assert len(rows) >= 17
    for attack, answer, test in rows:
        assert answer.strip(), attack
        assert re.search(r"`test_\w+\.py::\w+`|\blater: \w+", test), attack
