"""A counterexample as a story: who said what to whom, which step accepted it, what broke, and why that matters."""

import inspect
from collections.abc import Iterator

from mpc.fuzz import invariants
from mpc.fuzz.means import MOVES
from mpc.fuzz.replay import Counterexample
from mpc.fuzz.setting import DIGEST, PACE, SETTLE, Move
from mpc.fuzz.world import CRASH, START_MS

LINES_OF_A_MOVE = 12  # the last ones are told; before them all went as it always does
OTHER = {
    "first check, then change": "A machine refused an event and was not afterwards as it was before.\n\n"
    "Lost otherwise: a refused message has an effect all the same, and nobody can say which.",
    CRASH: "What another participant sends is refused with a reason; no machine fails over it.\n\n"
    "Lost otherwise: one message ends somebody's process, and nobody is told why.",
}


def tell(found: Counterexample) -> Iterator[str]:
    """Lines of plain text."""
    world, setting = found.world, found.setting
    honest = [name for name in world.keys if name not in setting.corrupt]
    yield f"BROKEN: {found.invariant}: {found.why}"
    yield ""
    yield f"Seed {found.seed}. Honest: {', '.join(honest) or 'nobody'}."
    corrupt = ", ".join(sorted(setting.corrupt)) or "nobody"
    yield f"The adversary: coordinator, network, host, the contract's author, and of the participants: {corrupt}."
    if setting.job is not DIGEST:
        yield f"The contract is that of the scenario {world.contract.name}, with data that fit its tables."
    yield ""
    ends = [start for _, start in world.moves[1:]] + [len(world.story)]
    for number, ((move, start), end) in enumerate(zip(world.moves, ends, strict=True), 1):
        yield f"{number}. {words(move)}"
        lines = world.story[start:end]
        if len(lines) > LINES_OF_A_MOVE:
            yield f"     ({len(lines) - LINES_OF_A_MOVE} events before)"
        yield from (f"     {line}" for line in lines[-LINES_OF_A_MOVE:])
    yield ""
    yield f"After {(world.now_ms - START_MS) / 1000:g} s of the session, and this event:"
    yield f"     {accepted(found)}"
    yield f"it no longer holds: {found.why}."
    yield ""
    yield from meaning(found.invariant)


def accepted(found: Counterexample) -> str:
    """The last thing that a machine did instead of refusing it: the step to look at."""
    told = [line for line in found.world.story if " hears " in line]
    return told[-1] if told else (found.world.story or ["the beginning"])[-1]


def words(move: Move) -> str:
    """What a move is, as its docstring says it."""
    if move.name == PACE:
        return f"{PACE}: all goes well for {move.draw} steps."
    if move.name == SETTLE:
        return f"{SETTLE}: time runs out."
    about = (MOVES[move.name].play.__doc__ or "").strip()
    return f"{move.name}: {' '.join(about.split())}"


def meaning(invariant: str) -> Iterator[str]:
    """What the invariant says, and what is lost without it."""
    judge = next((one for one in invariants.INVARIANTS if one.__name__ == invariant), None)
    about = inspect.getdoc(judge) if judge is not None else OTHER.get(invariant)
    for paragraph in (about or "").split("\n\n"):
        yield " ".join(paragraph.split())
