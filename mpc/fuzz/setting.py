"""Who is in a world, who of them is corrupt, and one move of the adversary: what a run follows from."""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from mpc.fuzz.jobs import Digest, Job

DIGEST = Digest()


@dataclass(frozen=True)
class Setting:
    """Who is in the session, and who of them is corrupt. A job of one's own has its own parties and approvals."""

    parties: int = 3
    receivers: int = 0  # own nothing, and get the result
    approvers: int = 0
    quorum: int = 0
    epochs_max: int = 3
    corrupt: frozenset[str] = frozenset()
    long: bool = False  # the first party's first table takes three chunks
    wide: bool = False  # the first party has two tables
    job: Job = DIGEST

    @classmethod
    def draw(cls, random: Random, job: Job = DIGEST) -> "Setting":
        """Any setting with at least one honest party."""
        if job is not DIGEST:
            honest = random.choice(job.owners(cls()))
            others = [name for name in job.names(cls()) if name != honest]
            return cls(corrupt=frozenset(random.sample(others, random.randint(0, len(others)))), job=job)
        parties, approvers = random.randint(1, 4), random.choice((0, 0, 1, 3))
        names = [*(f"party-{i}" for i in range(1, parties)), *(f"approver-{i}" for i in range(approvers))]
        return cls(
            parties=parties,
            receivers=random.choice((0, 0, 1)),
            approvers=approvers,
            quorum=random.randint(0, approvers),
            epochs_max=random.randint(1, 4),
            corrupt=frozenset(random.sample(names, random.randint(0, len(names)))),
            long=random.random() < 0.1,
            wide=random.random() < 0.2,
        )


class Move(NamedTuple):
    """One move of the adversary: its name in mpc.fuzz.moves.MOVES, and the seed of its details (PACE: how many)."""

    name: str
    draw: int


PACE = "pace"  # so many fair steps; the only move whose draw is a number
SETTLE = "settle"  # time runs out
