"""`mpc explore`: visit every state into which a bounded adversary can bring a small session."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mpc.cli.output import BAD, CAUTION, FAINT, GOOD, Output, examples, with_output

if TYPE_CHECKING:
    from mpc.fuzz.adversaries import Adversary
    from mpc.fuzz.explorer import Exploration
    from mpc.fuzz.refusals import Fired


@click.command(
    epilog=examples(
        "mpc explore                            every adversary of the list, to the end",
        "mpc explore split rewind               two of them",
        "mpc explore --moves crash,time         one of your own: two parties, one enclave",
        "mpc explore all --states 100000 --json",
    )
)
@click.argument("adversaries", nargs=-1, metavar="[ADVERSARY]...")
@click.option("--moves", metavar="MOVE,…", help="Instead of the list: one adversary with these moves.")
@click.option("--depth", type=click.IntRange(0), metavar="N", help="At most N steps from the start.  [all]")
@click.option("--states", type=click.IntRange(1), metavar="N", help="At most N states of each adversary.  [all]")
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), metavar="M", help="At most so long for each.  [no limit]"
)
@with_output
def explore(
    out: Output,
    adversaries: tuple[str, ...],
    moves: str | None,
    depth: int | None,
    states: int | None,
    minutes: float | None,
) -> int:
    """Visit, breadth first, every state into which bounded adversaries can bring two parties and an enclave.

    The real machines run. All that was ever said may reach anybody, in any order, never, or many times. In each state
    ten invariants are checked; where no state is left to visit, that is a proof for this adversary. Every row of the
    rounds table and every refusal must be seen to fire. An unknown ADVERSARY or MOVE prints those that there are.

    Exit status: 0 all held; 1 an invariant does not hold, or, when every adversary of the list was visited to its end,
    a row or a refusal never fired; 2 usage; 130 interrupted.
    """
    from mpc.fuzz.explorer import Bounds
    from mpc.fuzz.explorer import explore as visit
    from mpc.fuzz.refusals import Fired

    chosen = _chosen(adversaries, moves)
    bounds = Bounds(depth, states, minutes and 60 * minutes)
    explored: list[Exploration] = []
    fired = Fired()
    with _progress(out) as show:
        for adversary in chosen:
            explored.append(visit(adversary, bounds, show))
            fired.add(explored[-1].fired)
            _show_one(out, explored[-1])
            if explored[-1].interrupted:
                break
    interrupted = explored[-1].interrupted
    whole = not adversaries and moves is None and all(one.exhausted for one in explored)
    broken = any(one.found for one in explored)
    idle = whole and bool(fired.rows_missing or fired.refusals_missing)
    _show_fired(out, fired, whole)
    words = {130: "interrupted", 1: "broken" if broken else "idle", 0: "held"}
    status = 130 if interrupted else 1 if broken or idle else 0
    out.document(
        {
            "status": words[status],
            "adversaries": [_plain(one) for one in explored],
            "complete": whole,
            "rows": sorted(fired.rows),
            "rows_never_fired": sorted(fired.rows_missing),
            "refusals": sorted(map(str, fired.refusals)),
            "refusals_never_fired": sorted(map(str, fired.refusals_missing)),
        }
    )
    return status


def _chosen(names: tuple[str, ...], moves: str | None) -> "tuple[Adversary, ...]":
    from mpc.fuzz.adversaries import ADVERSARIES, AGREED, MOVES, TWO, Adversary

    if moves is not None:
        wanted = frozenset(part.strip() for part in moves.split(",") if part.strip())
        if names:
            raise click.UsageError("name adversaries, or give --moves, and not both")
        if unknown := sorted(wanted - set(MOVES)):
            about = "\n".join(f"  {move}: {what}" for move, what in MOVES.items())
            raise click.UsageError(f"--moves: {unknown[0]!r} is none of these:\n{about}\n")
        epochs = 2 if "epochs" in wanted else 1
        enclaves = tuple((epoch, AGREED) for epoch in range(1, epochs + 1))
        return (Adversary("yours", "the moves that you chose", replace(TWO, epochs_max=epochs), enclaves, wanted),)
    known = {adversary.name: adversary for adversary in ADVERSARIES}
    if missing := [name for name in names if name not in known]:
        about = "\n".join(f"  {name}: {adversary.about}" for name, adversary in known.items())
        raise click.UsageError(f"{missing[0]!r} is no adversary; there are:\n{about}\n")
    return tuple(known[name] for name in names) or ADVERSARIES


def _show_one(out: Output, one: "Exploration") -> None:
    adversary = one.adversary
    if one.found is not None:
        out.verdict("broken", f"{adversary.name}: {one.found.invariant}: {one.found.why}", BAD)
        out.line("\nThe shortest way there:")
        out.points(one.found.story)
        out.line()
    elif one.exhausted:
        out.verdict("held", f"{adversary.name}: {adversary.about}; in every state that there is", GOOD)
    else:
        bound = "interrupted" if one.interrupted else "a bound was reached"
        out.verdict("held so far", f"{adversary.name}: {adversary.about}; {bound}", CAUTION)
    ending = f"; from all of them it ends in a result: {one.ended} ends" if adversary.fair and one.exhausted else ""
    left = "frontier empty" if one.exhausted else f"{one.frontier:,} states not gone on from"
    rate = f"{one.transitions_per_s:,.0f}/s"
    out.facts(
        [
            ("adversary", adversary.bound),
            ("states", f"{one.states:,}, depth {one.depth}, {left}{ending}"),
            ("transitions", f"{one.transitions:,} in {one.seconds:.1f} s, {rate}; machines ran {one.asked:,} times"),
        ]
    )
    out.line()


def _show_fired(out: Output, fired: "Fired", whole: bool) -> None:
    from mpc.fuzz.refusals import UNREACHABLE, all_refusals, all_rows

    reachable = len(all_refusals()) - len(UNREACHABLE)
    out.line(f"{len(fired.rows)} of {len(all_rows())} rows of the rounds table fired, and", "bold")
    out.line(f"{len(fired.refusals)} of {reachable} refusals that can be reached.", "bold")
    if whole:
        missing = [*(f"row {row}" for row in fired.rows_missing), *map(str, fired.refusals_missing)]
        out.points((f"{what} never fired" for what in sorted(missing)), "✗", BAD)
    out.points((f"{what}: out of reach, {why}" for what, why in UNREACHABLE.items()), style=FAINT)


def _plain(one: "Exploration") -> dict[str, Any]:
    found = one.found
    return {
        "name": one.adversary.name,
        "bound": one.adversary.bound,
        "states": one.states,
        "transitions": one.transitions,
        "depth": one.depth,
        "frontier": one.frontier,
        "exhausted": one.exhausted,
        "machine_runs": one.asked,
        "situations": one.situations,
        "seconds": round(one.seconds, 3),
        "transitions_per_s": round(one.transitions_per_s),
        "broken": found and {"invariant": found.invariant, "why": found.why, "story": list(found.story)},
    }


@contextmanager
def _progress(out: Output) -> "Iterator[Any]":
    """A line on standard error while a person looks."""
    from rich.console import Console

    console = Console(stderr=True, quiet=out.quiet, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        yield None
        return
    began = time.monotonic()
    with console.status("") as status:

        def show(one: "Exploration") -> None:
            left = f"{one.states:,} states, {one.frontier:,} to go on from, depth {one.depth}"
            status.update(f"{one.adversary.name}: {left}, {time.monotonic() - began:.0f} s")

        yield show
