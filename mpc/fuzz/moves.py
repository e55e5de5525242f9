"""All of the adversary's moves, drawn by seed. It owns network, coordinator, host and the corrupt participants.

A move is a function of the world and a source of randomness, with a docstring and a weight (mpc.fuzz.means.move);
writing one is all that it takes for every engine to play it. What a move finds nothing to do with, it leaves.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from mpc.fuzz import inside, outside
from mpc.fuzz.facts import opened
from mpc.fuzz.means import MOVES as MOVES
from mpc.fuzz.means import come_with_other_data as come_with_other_data
from mpc.fuzz.means import move as move
from mpc.fuzz.means import other_root as other_root
from mpc.fuzz.setting import PACE, SETTLE, Move, Setting
from mpc.fuzz.world import World
from mpc.protocol import messages, rounds
from mpc.protocol.signing import open_signed
from parties import party

MODULES = (outside, inside)  # importing them registers their moves
ALWAYS = ("deliver", "hurry")
REST = (Move(PACE, 400), Move(SETTLE, 0))  # the adversary rests, then time runs out


def choose(random: Random, names: Collection[str] = ()) -> Move:
    """A move of these kinds, or of all."""
    kinds = {name: kind for name, kind in MOVES.items() if not names or name in names}
    (name,) = random.choices(list(kinds), [kind.weight for kind in kinds.values()])
    return Move(name, random.getrandbits(32))


def attack(seed: int, steps: int = 40, setting: Setting | None = None, names: Collection[str] = ()) -> World:
    """A whole run against one seed: moves of a random subset of kinds, then the adversary rests, then time runs out.

    Args:    names: kinds of moves; without them each run draws a subset.
    Raises:  Broken when an invariant does not hold; it carries the world, and that its moves.
    """
    random = Random(seed)
    with verifying_once():
        world = World(seed, setting or Setting.draw(random))
        kinds = {*ALWAYS, *(names or random.sample(sorted(MOVES), random.randint(1, len(MOVES))))}
        for _ in range(steps):
            world.step(choose(random, kinds))
        for move in REST:
            world.step(move)
    return world


@contextmanager
def verifying_once() -> Iterator[None]:
    """The machines verify the same envelope once and not again: what is valid stays so, and it saves half the time."""
    modules: tuple[Any, ...] = (rounds, messages, party)
    for module in modules:
        module.open_signed = opened
    try:
        yield
    finally:
        for module in modules:
            module.open_signed = open_signed
