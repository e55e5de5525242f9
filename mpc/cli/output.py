"""How commands print: for people, aligned and calm, in at most 100 columns; for machines, one JSON document."""

import functools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import click

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_MAX = 100
P = ParamSpec("P")

GOOD, BAD, CAUTION, FAINT = "green", "red", "yellow", "dim"


class Output:
    """Where a command prints. `--json`: people read on standard error. `--quiet`: only the verdict."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet

    @cached_property
    def console(self) -> "Console":
        """For what the methods below cannot print; obeys NO_COLOR."""
        from rich.console import Console

        class OwnConsole(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # `main` knows what that means, and gives another status than 1

        width = min(WIDTH_MAX, shutil.get_terminal_size((WIDTH_MAX, 24)).columns)
        return OwnConsole(stderr=self.as_json, width=width, markup=False, highlight=False, emoji=False)

    def _print(self, text: object, **how: Any) -> None:
        if not self.quiet:
            self.console.print(text, **how)

    def document(self, value: object) -> None:
        """The one JSON document, if it is wanted."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2) + "\n")

    def line(self, text: str = "", style: str = "") -> None:
        self._print(printable(text), style=style or None, soft_wrap=True)

    def heading(self, text: str) -> None:
        self.line()
        self.line(text, "bold")

    def verdict(self, word: str, about: str, style: str) -> None:
        """The first line: one word that stands for the exit status, and what it is about."""
        self.console.print(_text((word, f"bold {style}"), (f"  {about}", "bold")))

    def facts(self, rows: Iterable[tuple[str, str]]) -> None:
        """Labels and values in two columns; a value that is one long word gets a line of its own."""
        kept = [(label, printable(value)) for label, value in rows]
        left = max((len(label) for label, _ in kept), default=0) + 4
        for label, value in kept:
            if " " not in value and len(value) > self.console.width - left:
                self._print(_text((f"  {label}", FAINT)))
                self._print(f"  {value}", soft_wrap=True)
                continue
            lines = self._wrap(value, left) or [""]
            self._print(_text((f"  {label}".ljust(left), FAINT), (lines[0], "")))
            for line in lines[1:]:
                self._print(" " * left + line)

    def points(self, sentences: Iterable[str], mark: str = "–", style: str = "") -> None:
        """A list of sentences."""
        for sentence in sentences:
            for index, line in enumerate(self._wrap(printable(sentence), 4)):
                self._print(_text((f"  {mark if index == 0 else ' '} ", style), (line, "")))

    def block(self, text: str) -> None:
        """Text whose lines must stay as they are."""
        for line in printable(textwrap.dedent(text).strip("\n")).expandtabs(4).splitlines():
            self._print(f"    {line}", soft_wrap=True)

    def _wrap(self, text: str, left: int) -> list[str]:
        return [
            line
            for paragraph in text.splitlines()
            for line in textwrap.wrap(paragraph, self.console.width - left, break_on_hyphens=False)
        ]


def _text(*parts: tuple[str, str]) -> Any:
    from rich.text import Text

    return Text.assemble(*((printable(text), style) for text, style in parts))


def with_output(command: Callable[Concatenate[Output, P], int]) -> Callable[P, int]:
    """Give a command `--json` and `--quiet`, and an Output as its first argument; it returns the exit status."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, nothing else there.")
    @click.option("-q", "--quiet", is_flag=True, help="Results and errors only.")
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        as_json, quiet = bool(kwargs.pop("as_json")), bool(kwargs.pop("quiet"))
        quiet = quiet or bool(click.get_current_context().find_root().params.get("quiet"))
        return command(Output(as_json, quiet), *args, **kwargs)

    return run


def examples(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def printable(text: str) -> str:
    """Text that may be a stranger's, without what steers a terminal or turns its direction."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )
