"""The swarm: worlds by seed, as many as time allows, on all cores, with doubles of the cryptographic library.

Each run draws its setting and a random subset of the adversary's moves (swarm testing: a move that is off cannot hide
what the others reach; Groce et al. 2012). What breaks is made shorter while it still breaks, and is played again with
the real library. A step is one delivery or move, with all ten invariants checked after it; that is what is counted.
"""

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from random import Random
from typing import Any

from mpc.fuzz.doubles import doubles, forget
from mpc.fuzz.facts import Broken
from mpc.fuzz.moves import ALWAYS, MOVES, REST
from mpc.fuzz.setting import Move, Setting
from mpc.fuzz.world import World

MOVES_PER_RUN = 60
LONG = 0.1  # of the runs with a table of several chunks are played so: each takes the time of ten others
REPORT_S = 0.5  # between two reports of a worker

Coverage = Counter[tuple[int, str, str]]  # (number of the round, message, move) → how often
Settings = Callable[[Random], Setting]


@dataclass(frozen=True)
class Counterexample:
    """The shortest moves found after which `invariant` does not hold: play(seed, setting, moves) raises Broken."""

    seed: int
    setting: Setting
    moves: tuple[Move, ...]
    invariant: str
    why: str
    real: bool  # it also breaks with the real cryptographic library
    found_moves: int  # how many there were before it was made shorter


@dataclass
class Tally:
    """What a swarm did; `steps` also in the runs of its counterexample."""

    workers: int
    steps: int = 0
    runs: int = 0
    seconds: float = 0.0
    coverage: Coverage = field(default_factory=Counter)
    counterexample: Counterexample | None = None

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds if self.seconds else 0.0

    @property
    def steps_per_s_per_core(self) -> float:
        return self.steps_per_s / min(self.workers, os.cpu_count() or 1)


def plan(seed: int, settings: Settings = Setting.draw, kinds: Collection[str] = ()) -> tuple[Setting, tuple[Move, ...]]:
    """The setting and the moves of one run. `kinds`: of moves to draw subsets of; without them, of all."""
    random = Random(seed)
    setting = settings(random)
    if setting.long and random.random() > LONG:
        setting = replace(setting, long=False)
    names = sorted({*ALWAYS, *random.sample(among := sorted(kinds or MOVES), random.randint(1, len(among)))})
    drawn = random.choices(names, [MOVES[name].weight for name in names], k=MOVES_PER_RUN)
    return setting, (*(Move(name, random.getrandbits(32)) for name in drawn), *REST)


def swarm(
    seconds: float,
    *,
    runs: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    settings: Settings = Setting.draw,
    kinds: Collection[str] = (),
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Play seeds `seed`, `seed + 1`, … until time is up, `runs` are done, or an invariant does not hold.

    Args:    settings: draws a run's setting; for one job, `lambda random: Setting.draw(random, job)`.
             kinds: moves to draw from, by name; without them all. workers: processes, without it one for each core.
             progress: called in this process about twice a second.
    Raises:  KeyboardInterrupt when that came; by then no worker is left.
    """
    count = workers or len(os.sched_getaffinity(0))
    started, tally = time.monotonic(), Tally(count)
    context = multiprocessing.get_context("fork")  # settings need not be picklable
    pool: list[Any] = []
    ends: dict[Connection, Any] = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # no worker starts that we do not know of
    try:
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            seeds = range(seed + number, seed + runs if runs is not None else 1 << 62, count)
            told = (ours, theirs, seeds, started + seconds, settings, kinds)
            work = context.Process(target=_work, args=told, daemon=True)
            work.start()
            theirs.close()
            pool.append(work)
            ends[ours] = work
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        found = _gather(ends, tally, started, progress)
    finally:
        for work in pool:
            work.terminate()
        for work in pool:
            work.join()
        for end in ends:
            end.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    tally.seconds = time.monotonic() - started
    if found is not None:
        tally.counterexample = shorten(*found, settings=settings, kinds=kinds)
    return tally


def _gather(
    ends: dict[Connection, Any], tally: Tally, started: float, progress: Callable[[Tally], None] | None
) -> tuple[int, int] | None:
    """Add up what the workers report, until all are done or one has found something: its seed and number of moves."""
    waiting = set(ends)
    while waiting:
        for end in wait(list(waiting)):
            assert isinstance(end, Connection)
            try:
                steps, done, coverage, found = end.recv()
            except EOFError:
                waiting.discard(end)
                ends[end].join()
                if ends[end].exitcode:
                    raise RuntimeError(f"a worker of the swarm ended with status {ends[end].exitcode}") from None
                continue
            tally.steps, tally.runs = tally.steps + steps, tally.runs + done
            tally.coverage.update(coverage)
            tally.seconds = time.monotonic() - started
            if progress is not None:
                progress(tally)
            if found is not None:
                seed, moves = found
                return int(seed), int(moves)
    return None


def _work(
    other: Connection, end: Connection, seeds: range, until: float, settings: Settings, kinds: Collection[str]
) -> None:
    """One worker's life; it ends by itself when nobody listens at the other end any more."""
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started us ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    steps, runs, coverage, reported = 0, 0, Coverage(), time.monotonic()
    found: tuple[int, int] | None = None
    with doubles():
        for seed in seeds:
            setting, moves = plan(seed, settings, kinds)
            world = World(seed, setting)
            try:
                for move in moves:
                    world.step(move)
            except Broken:
                found = seed, len(world.moves)
            steps, runs = steps + world.stepped, runs + 1
            coverage.update(world.coverage)
            forget()
            now = time.monotonic()
            if found or now >= until:
                break
            if now >= reported + REPORT_S:
                end.send((steps, runs, coverage, None))
                steps, runs, coverage, reported = 0, 0, Coverage(), now
    end.send((steps, runs, coverage, found))
    end.close()


def shorten(seed: int, moves: int, *, settings: Settings = Setting.draw, kinds: Collection[str] = ()) -> Counterexample:
    """The counterexample of a seed whose first `moves` break something, with as few of them as still break the same."""
    setting, planned = plan(seed, settings, kinds)
    with doubles():
        broken = broken_by(seed, setting, planned[:moves])
        assert broken is not None, "the same seed and moves give the same events"
        short = minimal(planned[:moves], lambda fewer: _same(broken, broken_by(seed, setting, fewer)))
        last = broken_by(seed, setting, short) or broken
    return Counterexample(
        seed, setting, short, last.invariant, last.why, _same(last, broken_by(seed, setting, short)), moves
    )


def broken_by(seed: int, setting: Setting, moves: Sequence[Move]) -> Broken | None:
    """What these moves break, if they do."""
    try:
        world = World(seed, setting)
        for move in moves:
            world.step(move)
    except Broken as broken:
        return broken
    return None


def _same(one: Broken, other: Broken | None) -> bool:
    return other is not None and one.invariant == other.invariant


def minimal(moves: tuple[Move, ...], breaks: Callable[[tuple[Move, ...]], bool]) -> tuple[Move, ...]:
    """Delta debugging (Zeller, Hildebrandt 2002): leave out smaller and smaller parts, at last each single move."""
    parts = 2
    while len(moves) > 1:
        size = -(-len(moves) // parts)
        for start in range(0, len(moves), size):
            fewer = moves[:start] + moves[start + size :]
            if breaks(fewer):
                moves, parts = fewer, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(moves))
    return moves
