"""Which moves were tried on which messages in which rounds, and what never was."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mpc.fuzz.means import MOVES
from mpc.protocol.messages import KINDS
from mpc.protocol.rounds import RULES, Round

Coverage = Counter[tuple[int, str, str]]
"""Number of the round, kind of message, move → how often. A move that touches no message has the kind ""."""

LETTERS = dict(zip((*KINDS, "chunk"), "PCASMDRWXK", strict=True))  # contract, consent, attestation, …
ROUNDS = tuple(place for place in RULES if place is not Round.PROPOSE)  # a session begins with a proposal
NEVER, ALONE = "·", "+"


def lines(coverage: Coverage) -> Iterator[str]:
    """A table: moves down, rounds across, a letter for each message; and what it adds up to."""
    width = len(LETTERS)
    left = max(map(len, MOVES)) + 2
    yield "move".ljust(left) + " ".join(f"{place.value} {place.name.lower()}".ljust(width) for place in ROUNDS)
    for name in ordered():
        touches = any(move == name and message in LETTERS for _, message, move in coverage)
        cells = []
        for place in ROUNDS:
            letters = (letter if coverage[place.value, message, name] else NEVER for message, letter in LETTERS.items())
            alone = ALONE if coverage[place.value, "", name] else NEVER
            cells.append("".join(letters) if touches else alone)
        yield name.ljust(left) + " ".join(cell.ljust(width) for cell in cells).rstrip()
    yield ""
    named = [f"{letter} {message}" for message, letter in LETTERS.items()]
    yield f"{ALONE} tried, touches no message   {NEVER} never tried   {'   '.join(named[:4])}"
    yield "   ".join(named[4:])
    tried, whole = count(coverage)
    yield f"tried {tried:,} of {whole:,} (round, message, move); not all of these can come up"
    if idle := never(coverage):
        yield f"moves never tried: {', '.join(idle)}"


def ordered() -> list[str]:
    """Moves: those of network, coordinator and host first."""
    return sorted(MOVES, key=lambda name: MOVES[name].play.__module__ != "mpc.fuzz.outside")


def count(coverage: Coverage) -> tuple[int, int]:
    """How many (round, message, move) were tried, and how many there are."""
    rounds = {place.value for place in ROUNDS}
    tried = sum(1 for place, message, _ in coverage if message in LETTERS and place in rounds)
    return tried, len(ROUNDS) * len(LETTERS) * len(MOVES)


def never(coverage: Coverage) -> list[str]:
    played = {move for _, _, move in coverage}
    return [name for name in MOVES if name not in played]


def as_json(coverage: Coverage) -> dict[str, Any]:
    """Move → message → numbers of rounds; a message that was tried in no round is not there."""
    tried: dict[str, dict[str, list[int]]] = {name: {} for name in MOVES}
    for place, message, move in sorted(coverage):
        if move in tried:
            tried[move].setdefault(message or "none", []).append(place)
    done, whole = count(coverage)
    return {"tried": done, "of": whole, "moves": tried, "never": never(coverage)}
