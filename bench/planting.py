"""Plant a fault in the product, and look for it: with the swarm's own runs, or with Hypothesis. bench/faults.py has the
faults."""

import importlib
import inspect
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from mpc.fuzz import invariants, swarm
from mpc.fuzz.doubles import doubles, forget
from mpc.fuzz.facts import Broken, opened
from mpc.fuzz.setting import Move, Setting
from mpc.fuzz.stateful import Search, TimeIsUp
from mpc.fuzz.world import World
from mpc.protocol import rounds

EXAMPLES_MAX = 400


@dataclass(frozen=True)
class Line:
    """Another line in a function of the product: `module:function` or `module:Class.method`."""

    where: str
    line: str
    instead: str


@dataclass(frozen=True)
class Row:
    """Another rule in the table of rounds."""

    round: str
    message: str
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Fault:
    """What is planted, which invariant must find it, and who and what is in the worlds that look for it."""

    what: str
    finds: str
    planted: tuple[Line | Row, ...]
    setting: Setting
    kinds: tuple[str, ...] = ()  # of moves; the swarm draws subsets of these, or of all
    engine: str = "swarm"


@dataclass(frozen=True)
class Found:
    """What an engine found, and how long it looked. Shortening it is another matter."""

    invariant: str
    seed: int
    moves: tuple[Move, ...]
    examples: int = 0
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, broken: Broken) -> "Found":
        assert broken.world is not None
        return cls(broken.invariant, broken.world.seed, tuple(move for move, _ in broken.world.moves))


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The product with that fault in it. Where an invariant finds it, the others look away."""
    undo: list[tuple[Any, Any]] = []
    table = dict(rounds.RULES)
    judges = invariants.INVARIANTS
    functions = dict.fromkeys(part.where for part in fault.planted if isinstance(part, Line))
    try:
        for where in functions:
            function = _function(where)
            source = textwrap.dedent(inspect.getsource(function))
            for part in fault.planted:
                if isinstance(part, Line) and part.where == where:
                    count = source.count(part.line)
                    assert count == 1, f"{where} has {count} times: {part.line}"
                    source = source.replace(part.line, part.instead)
            made: dict[str, Any] = {}
            exec(compile(source, where, "exec"), function.__globals__, made)
            undo.append((function, function.__code__))
            function.__code__ = made[function.__name__].__code__
        for part in fault.planted:
            if isinstance(part, Row):
                place = rounds.Round[part.round]
                ((message, rule),) = table[place].items()
                assert message.__name__ == part.message
                rounds.RULES[place] = {message: replace(rule, **dict(part.changes))}  # type: ignore[index]
        named = tuple(judge for judge in judges if judge.__name__ == fault.finds)
        invariants.INVARIANTS = named or judges
        opened.cache_clear()
        yield
    finally:
        invariants.INVARIANTS = judges
        for function, code in undo:
            function.__code__ = code
        rounds.RULES.update(table)  # type: ignore[attr-defined]
        opened.cache_clear()


def _function(where: str) -> FunctionType:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    for name in path.split("."):
        owner = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
    owner = getattr(owner, "__func__", owner)
    function = inspect.unwrap(owner.fget if isinstance(owner, property) else owner)
    assert isinstance(function, FunctionType)
    return function


def hunt(fault: Fault, most: int = EXAMPLES_MAX, seed: int = 0) -> Found | None:
    """Look for what breaks, with the fault's engine; None when `most` examples hold."""
    engine = {"swarm": by_swarm, "hypothesis": by_hypothesis}[fault.engine]
    began, steps = time.perf_counter(), list[int]()
    try:
        engine(fault.setting, fault.kinds, most, seed, steps)
    except Broken as broken:
        seconds = time.perf_counter() - began
        return replace(Found.of(broken), examples=len(steps), steps=sum(steps), seconds=seconds)
    return None


def by_swarm(setting: Setting, kinds: Sequence[str], most: int, seed: int, steps: list[int]) -> None:
    """Worlds of the swarm, one after the other; `steps` grows by each. Raises Broken."""
    with doubles():
        for number in range(seed, seed + most):
            _, moves = swarm.plan(number, lambda _: setting, kinds)
            world = World(number, setting)
            try:
                for move in moves:
                    world.step(move)
            finally:
                steps.append(world.stepped)
                forget()


def by_hypothesis(setting: Setting, kinds: Sequence[str], most: int, seed: int, steps: list[int]) -> None:
    """The same by Hypothesis, as far as the first that breaks."""

    def watch(world: World) -> None:
        steps.append(world.stepped)
        if search.best is not None:
            raise TimeIsUp

    search = Search(watch, setting=setting, names=kinds)
    try:
        search.run(examples=most, seed=seed)
    except TimeIsUp:
        assert search.best is not None
        broken = Broken(search.best.invariant, search.best.why)
        broken.world = search.best.world
        raise broken from None
