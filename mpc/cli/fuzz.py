"""`mpc fuzz`: play the adversary against a session, the user's own or the built-in one."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpc.cli.files import PATH
from mpc.cli.output import BAD, CAUTION, GOOD, Output, examples, with_output
from mpc.protocol.errors import LocalError

if TYPE_CHECKING:
    from mpc.fuzz.jobs import Job
    from mpc.fuzz.replay import Counterexample

EXAMPLES = 200
SEED_MAX = 2**32 - 1
PROGRESS_S = 0.25
FOR_EVER = 1 << 40  # examples


@dataclass
class Effort:
    """What an engine has done, and what it found."""

    engine: str
    seed: int
    what: str = "the built-in session"
    began: float = field(default_factory=time.monotonic)
    examples: int = 0
    moves: int = 0
    coverage: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    found: "Counterexample | None" = None
    interrupted: bool = False
    oracle: str = ""  # how results of the user's own program are judged
    seconds: float = 0.0

    def line(self) -> str:
        seconds = time.monotonic() - self.began
        each = self.examples / seconds if seconds else 0.0
        return f"{self.examples:,} examples, {each:.1f}/s, {self.moves:,} steps, {seconds:.0f} s"


@click.command(
    epilog=examples(
        "mpc fuzz",
        "mpc fuzz salaries --examples 1000 --seed 7",
        "mpc fuzz scenarios/flights --engine swarm --minutes 5",
        "mpc fuzz --replay counterexample-appraisal-1a2b3c4d.json",
    )
)
@click.argument("scenario", type=PATH, required=False)
@click.option("--examples", "count", type=click.IntRange(1), metavar="N", help=f"Runs to play.  [{EXAMPLES}]")
@click.option("--seed", type=click.IntRange(0, SEED_MAX), metavar="S", help="Where to begin.  [drawn, and printed]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), metavar="M", help="Stop after so long.")
@click.option(
    "--engine",
    type=click.Choice(["hypothesis", "swarm"]),
    help="hypothesis: finds the shortest attack; swarm: most steps, all cores.  [hypothesis]",
)
@click.option("--replay", type=PATH, metavar="FILE", help="Play a counterexample again, exactly.")
@click.option(
    "--out", "file", type=PATH, metavar="FILE", help="New file for a counterexample.  [counterexample-….json]"
)
@with_output
def fuzz(
    out: Output,
    scenario: Path | None,
    count: int | None,
    seed: int | None,
    minutes: float | None,
    engine: str | None,
    replay: Path | None,
    file: Path | None,
) -> int:
    """Attack the rounds of SCENARIO with a corrupt coordinator, network, host and participants, in memory.

    The real machines of all roles run SCENARIO's parties, tables, approvals, deadlines, program and rules on generated
    data; after each step ten invariants are checked. No file of data is read, nothing is sent. Without SCENARIO a
    built-in session is attacked, with other people in each run.

    SCENARIO is a folder with a scenario.toml, such a file, or the name of a shipped scenario.

    Exit status: 0 every invariant held; 1 a counterexample, whose story is printed and which is written to a file that
    --replay plays again; 2 a file cannot be used; 130 interrupted.
    """
    if replay is not None:
        if any(given is not None for given in (scenario, count, seed, minutes, engine, file)):
            raise click.UsageError("--replay FILE says it all: give no scenario and no other option with it")
        return _play_again(out, replay)
    if file is not None and file.exists():
        raise LocalError(f"{file} exists already; name a new file with --out")
    job = _job(scenario)
    effort = Effort(engine or "hypothesis", int.from_bytes(os.urandom(4)) if seed is None else seed)
    effort.oracle = job.oracle()
    effort.what = scenario.name if scenario else effort.what
    try:
        with _progress(out, effort) as show:
            _search(effort, job, count or (FOR_EVER if minutes else EXAMPLES), minutes, show)
    except KeyboardInterrupt:
        effort.interrupted = True
    effort.seconds = time.monotonic() - effort.began
    written = _write(effort.found, file) if effort.found else None
    _show(out, effort, scenario, written)
    return 1 if effort.found else 130 if effort.interrupted else 0


def _job(scenario: Path | None) -> "Job":
    from mpc.fuzz.setting import DIGEST

    if scenario is None:
        return DIGEST
    from mpc import scenario as scenarios
    from mpc.fuzz.scenario_job import ScenarioJob

    path = scenarios.find(scenario)
    try:
        return ScenarioJob(scenarios.load(path))
    except LocalError as error:
        raise error if str(path) in error.what else LocalError(f"{path}: {error.what}") from None


def _search(effort: Effort, job: "Job", count: int, minutes: float | None, show: Any) -> None:
    search = {"hypothesis": _by_hypothesis, "swarm": _by_swarm}[effort.engine]
    search(effort, job, count, minutes, show)


def _by_hypothesis(effort: Effort, job: "Job", count: int, minutes: float | None, show: Any) -> None:
    try:
        from mpc.fuzz.stateful import Search, TimeIsUp
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise LocalError(
            "the engine hypothesis is not installed: pip install 'enclave-mpc[fuzz]', or use --engine swarm"
        ) from None

    def watch(world: Any) -> None:
        effort.examples += 1
        effort.moves += world.stepped
        effort.coverage += world.coverage
        show()
        if minutes is not None and time.monotonic() - effort.began > 60 * minutes:
            raise TimeIsUp

    search = Search(watch, job=job)
    try:
        search.run(examples=count, seed=effort.seed)
    except TimeIsUp:
        pass
    finally:
        effort.found = search.shortest()
    if search.best is not None and effort.found is None:  # not a word about what the real library does not allow
        raise LocalError(f"seed {effort.seed} breaks {search.best.invariant}, but only with doubles: a bug of theirs")


def _by_swarm(effort: Effort, job: "Job", count: int, minutes: float | None, show: Any) -> None:
    from mpc.fuzz import swarm
    from mpc.fuzz.replay import play
    from mpc.fuzz.setting import Setting

    def progress(tally: "swarm.Tally") -> None:
        effort.examples, effort.moves, effort.coverage = tally.runs, tally.steps, tally.coverage
        show()

    seconds, runs = (60 * minutes if minutes else FOR_EVER), (count if count < FOR_EVER else None)
    tally = swarm.swarm(
        seconds,
        runs=runs,
        seed=effort.seed,
        settings=lambda random: Setting.draw(random, job),
        progress=progress,
    )
    progress(tally)
    if found := tally.counterexample:
        effort.found = play(found.seed, found.setting, found.moves)
        if effort.found is None:  # not a word about an attack that the real library does not allow
            raise LocalError(f"seed {found.seed} breaks {found.invariant}, but only with doubles: a bug of theirs")


@contextmanager
def _progress(out: Output, effort: Effort) -> "Iterator[Any]":
    """A line on standard error while a person looks."""
    from rich.console import Console

    console = Console(stderr=True, quiet=out.quiet, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.print(f"fuzzing {effort.what} with {effort.engine}, seed {effort.seed}", soft_wrap=True)
        yield lambda: None
        return
    shown = 0.0

    def show() -> None:
        nonlocal shown
        if time.monotonic() - shown >= PROGRESS_S:
            shown = time.monotonic()
            status.update(f"seed {effort.seed}: {effort.line()}")

    with console.status(f"seed {effort.seed}: the first examples") as status:
        yield show


def _write(found: "Counterexample", file: Path | None) -> Path:
    """Into a new file; a name that is taken gets a number."""
    from mpc.fuzz.replay import write

    stem = f"counterexample-{found.invariant.replace(', ', '-').replace(' ', '-')}-{found.events[:8]}"
    names = [file] if file else [Path(f"{stem}.json"), *(Path(f"{stem}-{i}.json") for i in range(2, 100))]
    text = write(found)
    for name in names:
        try:
            with name.open("x", encoding="utf-8") as new:
                new.write(text)
        except FileExistsError:
            continue
        return name
    raise LocalError(f"{names[-1]} exists already; name a new file with --out")


def _show(out: Output, effort: Effort, scenario: Path | None, written: Path | None) -> None:
    from mpc.fuzz import coverage
    from mpc.fuzz.story import tell

    what = effort.what
    if effort.found is not None:
        out.verdict("broken", f"{effort.found.invariant}: {effort.found.why}", BAD)
        out.line()
        for line in list(tell(effort.found))[1:]:
            out.line(line)
        out.line()
        out.line(f"play it again: mpc fuzz --replay {written}")
    elif effort.interrupted:
        out.verdict("interrupted", f"{what}: nothing broken so far", CAUTION)
    else:
        out.verdict("held", f"{what}: every invariant, in every example", GOOD)
    each = effort.examples / effort.seconds if effort.seconds else 0.0
    out.line()
    out.facts(
        [
            ("engine", f"{effort.engine}, seed {effort.seed}"),
            ("examples", f"{effort.examples:,} in {effort.seconds:.1f} s, {each:.1f}/s; {effort.moves:,} steps"),
            *([("results are judged by", effort.oracle)] if effort.oracle else []),
        ]
    )
    out.line()
    for line in coverage.lines(effort.coverage):
        out.line(line)
    found = effort.found
    out.document(
        {
            "status": "broken" if found else "interrupted" if effort.interrupted else "held",
            "scenario": str(scenario) if scenario else None,
            "engine": effort.engine,
            "seed": effort.seed,
            "examples": effort.examples,
            "steps": effort.moves,
            "seconds": round(effort.seconds, 3),
            "examples_per_s": round(each, 2),
            "oracle": effort.oracle,
            "coverage": coverage.as_json(effort.coverage),
            "counterexample": _described(found, written) if found else None,
        }
    )


def _described(found: "Counterexample", written: Path | None) -> dict[str, Any]:
    from mpc.fuzz.story import accepted, meaning, tell

    return {
        "invariant": found.invariant,
        "why": found.why,
        "meaning": "\n".join(meaning(found.invariant)),
        "accepted": accepted(found),
        "moves": [list(move) for move in found.moves],
        "story": list(tell(found)),
        "events": found.events,
        "file": str(written) if written else None,
    }


def _play_again(out: Output, file: Path) -> int:
    from mpc.fuzz.replay import play, read
    from mpc.fuzz.story import tell

    seed, setting, moves, expected = read(file)
    found = play(seed, setting, moves)
    same = found is not None and found.events == expected.events
    if found is None:
        out.verdict("held", f"{file}: no invariant breaks any more; it was {expected.invariant}", GOOD)
    else:
        out.verdict("broken", f"{found.invariant}: {found.why}", BAD)
        out.line()
        for line in list(tell(found))[1:]:
            out.line(line)
        out.line()
        out.line("Every event is as it was." if same else "Not every event is as it was: the code has changed since.")
    out.document(
        {
            "status": "broken" if found else "held",
            "same_events": same,
            "expected": {"invariant": expected.invariant, "why": expected.why},
            "counterexample": _described(found, file) if found else None,
        }
    )
    sys.stdout.flush()
    return 1 if found else 0
