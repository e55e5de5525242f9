"""How fast the engines are, and how soon they find each planted fault."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.faults import FAULTS
from bench.figures import Figure, Report, median
from bench.planting import by_hypothesis, by_swarm, hunt, planted
from mpc.fuzz.adversaries import ADVERSARIES
from mpc.fuzz.explorer import explore
from mpc.fuzz.moves import attack
from mpc.fuzz.setting import Setting

EXAMPLES = 60
THREE = Setting(parties=3, approvers=1, quorum=1, corrupt=frozenset({"party-1"}))
_ROW = "{:<84} {:<24} {:<10} {:>8} {:>8} {:>7}"


def measure(rounds: int, _: Path) -> Report:
    """One table of all faults; speeds are medians."""
    figures, notes = [], [_ROW.format("fault", "found by", "engine", "examples", "steps", "s")]
    for engine in (by_swarm, by_hypothesis):
        name = engine.__name__.removeprefix("by_")
        figures.append(Figure(f"{name}, one core, doubles: steps", median(_speeds(engine, rounds)), "1/s"))
    figures.append(Figure("the real library: steps", median(_real() for _ in range(rounds)), "1/s"))
    explored = [explore(adversary) for adversary in ADVERSARIES]
    seconds = sum(one.seconds for one in explored)
    figures += [
        Figure("explorer: states", sum(one.states for one in explored), ""),
        Figure("explorer: transitions", sum(one.transitions for one in explored), ""),
        Figure("explorer: transitions", sum(one.transitions for one in explored) / seconds, "1/s"),
        Figure(
            "explorer: adversaries whose states are not all visited",
            sum(not one.exhausted for one in explored),
            "",
            most=0,
        ),
    ]
    missed = 0
    for fault in FAULTS:
        with planted(fault):
            found = hunt(fault)
        missed += found is None or found.invariant != fault.finds
        told = (found.examples, found.steps, f"{found.seconds:.2f}") if found else ("–", "–", "NOT FOUND")
        notes.append(_ROW.format(fault.what, fault.finds, fault.engine, *told))
    figures += [Figure("planted faults", len(FAULTS), ""), Figure("of them not found", missed, "", most=0)]
    return Report("Fuzzing: planted faults", figures, notes)


Engine = Callable[[Setting, Sequence[str], int, int, list[int]], None]


def _speeds(engine: Engine, rounds: int) -> list[float]:
    """Steps a second; a step is a move or a delivery, with all invariants checked after it."""
    speeds = []
    for number in range(rounds):
        began, steps = time.perf_counter(), list[int]()
        engine(THREE, (), EXAMPLES, number * EXAMPLES, steps)
        speeds.append(sum(steps) / (time.perf_counter() - began))
    return speeds


def _real() -> float:
    began = time.perf_counter()
    steps = sum(attack(seed, setting=THREE).stepped for seed in range(EXAMPLES // 4))
    return steps / (time.perf_counter() - began)
