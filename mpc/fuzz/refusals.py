"""Which rows of the rounds table and which refusals of the machines there are, and which of them fired.

Refusals are found in the source: each `raise` of one of our errors, and each comparison by `_same`. One fires when its
error is made at that line. A row fires when a session accepts a new message by it.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from enclave_runtime import enclave
from mpc.coordinator import mailbox
from mpc.protocol import errors, rounds
from mpc.protocol.contract import Contract
from mpc.protocol.errors import MpcError
from mpc.protocol.messages import KINDS
from mpc.protocol.rounds import Heard, Session
from parties import party

MODULES: tuple[ModuleType, ...] = (rounds, party, enclave, mailbox)
HELPERS = ("_same",)  # who calls them refuses


@dataclass(frozen=True, order=True)
class Refusal:
    """One place where a machine may refuse something."""

    module: str
    function: str
    what: str  # the words of its error, as far as they are fixed

    def __str__(self) -> str:
        return f"{self.module}.{self.function}: {self.what}"


# What no state of these adversaries can reach, and why that is right. A test holds this list to what is found.
UNREACHABLE = {
    Refusal("enclave", "handle", "the enclave has closed"): "the process of a closed enclave is gone",
    Refusal("party", "_attested", "roster"): "a party has heard its own consent: another check is before this one",
    Refusal("party", "_hear", "messages while this party prepares its tables"): "that takes 16 MiB",
    Refusal("party", "no_budget", "this party has no budget for noise"): "no table here is for noise",
}


@dataclass
class Fired:
    """What was seen to fire."""

    rows: set[str] = field(default_factory=set)  # kinds of message; each is one row
    refusals: set[Refusal] = field(default_factory=set)

    def add(self, other: "Fired") -> None:
        self.rows |= other.rows
        self.refusals |= other.refusals

    @property
    def rows_missing(self) -> set[str]:
        return all_rows() - self.rows

    @property
    def refusals_missing(self) -> set[Refusal]:
        return all_refusals() - self.refusals - set(UNREACHABLE)


def all_rows() -> set[str]:
    """Every kind of message: the table of rounds must have a row for each, or it cannot be said."""
    return set(KINDS)


@cache
def _places() -> dict[str, list[tuple[int, int, Refusal]]]:
    """Source file → (first line, last line, the refusal there)."""
    found: dict[str, list[tuple[int, int, Refusal]]] = {}
    for module in MODULES:
        path = inspect.getsourcefile(module) or ""
        name = module.__name__.rpartition(".")[2]
        places = found[path] = []
        for function in ast.walk(ast.parse(Path(path).read_text())):
            if isinstance(function, ast.FunctionDef) and function.name not in HELPERS:
                for call in _refusing(function):
                    refusal = Refusal(name, function.name, _words(call.args[0]))
                    places.append((call.lineno, call.end_lineno or call.lineno, refusal))
    return found


def _refusing(function: ast.FunctionDef) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args:
            ours = isinstance(node, ast.Raise) and isinstance(getattr(errors, call.func.id, None), type)
            if ours or call.func.id in HELPERS:
                yield call


def _words(text: ast.expr) -> str:
    if isinstance(text, ast.JoinedStr):
        return "".join(_words(part) for part in text.values)
    return str(text.value) if isinstance(text, ast.Constant) else "…"


def all_refusals() -> set[Refusal]:
    return {refusal for places in _places().values() for _, _, refusal in places}


@contextmanager
def recorded() -> Iterator[Fired]:
    """What fires within this block."""
    fired, make, hear, propose = Fired(), MpcError.__init__, Session.hear, vars(Session)["propose"]

    def made(error: MpcError, *args: Any, **kwargs: Any) -> None:
        make(error, *args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name in HELPERS:
            frame = frame.f_back
        if frame is not None:
            for first, last, refusal in _places().get(frame.f_code.co_filename, ()):
                if first <= frame.f_lineno <= last:
                    fired.refusals.add(refusal)

    def heard(session: Session, envelope: bytes) -> tuple[Session, Heard]:
        after, news = hear(session, envelope)
        if news.new:
            fired.rows.add(news.signed.kind)
        return after, news

    def proposed(cls: type[Session], *args: Any) -> Session:
        session: Session = propose.__func__(cls, *args)
        fired.rows.update(kind for kind, record in KINDS.items() if record is Contract)
        return session

    _put(made, heard, classmethod(proposed))
    try:
        yield fired
    finally:
        _put(make, hear, propose)


def _put(make: Any, hear: Any, propose: Any) -> None:
    for owner, name, function in ((MpcError, "__init__", make), (Session, "hear", hear), (Session, "propose", propose)):
        setattr(owner, name, function)
