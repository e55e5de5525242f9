"""The Hypothesis engine: rules are the adversary's moves, and shrinking gives the shortest attack.

Machines are driven synchronously, with doubles of the cryptographic library (mpc.fuzz.doubles). An example is a world
and some moves, each after a number of fair steps; when an invariant breaks, Hypothesis looks for a smaller example
that breaks one too. `shortest` plays the smallest again with the real library.
"""

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import hypothesis.errors
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as draw
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from mpc.fuzz.doubles import doubles, forget
from mpc.fuzz.facts import Broken
from mpc.fuzz.jobs import Job
from mpc.fuzz.means import MOVES
from mpc.fuzz.moves import REST
from mpc.fuzz.replay import Counterexample, play
from mpc.fuzz.setting import DIGEST, PACE, Move, Setting
from mpc.fuzz.swarm import minimal
from mpc.fuzz.world import World

MOVES_OF_AN_EXAMPLE = 20  # with fair steps between them; a session has about a hundred
PACE_MAX = 20
DRAW_MAX = 2**16 - 1  # of a move's details: enough for them, and quick to shrink


class TimeIsUp(BaseException):
    """What `watch` raises to end a search; Hypothesis lets it through."""


Watch = Callable[[World], None]  # is told of each example that has ended


class Search:
    """One search for a counterexample."""

    def __init__(
        self,
        watch: Watch,
        *,
        job: Job = DIGEST,
        setting: Setting | None = None,
        names: Collection[str] = (),
        moves: int = MOVES_OF_AN_EXAMPLE,
    ) -> None:
        """`setting`: the people of every example; without it each draws its own. `names`: kinds of moves, or all."""
        self._watch, self._moves = watch, moves
        self._given = draw.just(setting) if setting else people() if job is DIGEST else _corrupt(job)
        self._names = [name for name in MOVES if not names or name in names]
        self._found: list[Counterexample] = []

    @property
    def best(self) -> Counterexample | None:
        """The shortest attack so far."""
        return min(reversed(self._found), key=lambda found: len(found.moves), default=None)

    def shortest(self) -> Counterexample | None:
        """`best` without any move that it can do without, played with the real library; None when it needs doubles.

        Hypothesis shortens for as long as it is let; this is quick, and comes afterwards.
        """
        best = self.best
        if best is None:
            return None
        seed, setting, invariant = best.seed, best.setting, best.invariant
        with doubles():
            moves = minimal(best.moves, lambda fewer: _breaks(play(seed, setting, fewer), invariant))
        found = play(seed, setting, moves)
        return found if _breaks(found, invariant) else None

    def run(self, *, examples: int, seed: int) -> Counterexample | None:
        """Play examples until an invariant breaks, and then smaller ones that break it too.

        Raises:  what `watch` raises, which ends the search; `best` has what was found by then.
        """
        how = settings(
            max_examples=examples,
            stateful_step_count=self._moves,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        with doubles(), suppress(Broken, hypothesis.errors.Flaky):
            run_state_machine_as_test(hypothesis.seed(seed)(self._machine()), settings=how)
        return self.best

    def _machine(self) -> type[RuleBasedStateMachine]:
        """A state machine with a rule for each kind of move."""
        watch, found = self._watch, self._found

        class Adversary(RuleBasedStateMachine):
            world: World

            @initialize(seed=draw.integers(0, DRAW_MAX), setting=self._given)
            def begin(self, seed: int, setting: Setting) -> None:
                self.world = World(seed, setting)

            def play(self, *moves: Move) -> None:
                try:
                    for move in moves:
                        self.world.step(move)
                except Broken as broken:
                    found.append(Counterexample.of(broken))
                    watch(self.world)
                    raise

            def teardown(self) -> None:
                if hasattr(self, "world") and not (found and found[-1].world is self.world):
                    self.play(*REST)
                    watch(self.world)
                forget()

        return type("Adversary", (Adversary,), {name: _rule(name) for name in self._names})


def _breaks(found: Counterexample | None, invariant: str) -> bool:
    return found is not None and found.invariant == invariant


def _rule(name: str) -> Any:
    """A move after some fair steps, which lead the session on."""

    def play(self: Any, after: int, draw: int) -> None:
        self.play(*([Move(PACE, after)] if after else []), Move(name, draw))

    play.__name__ = name
    return rule(after=draw.integers(0, PACE_MAX), draw=draw.integers(0, DRAW_MAX))(play)


def people() -> Any:
    """Settings of the built-in job with at least one honest party; smaller ones are simpler."""

    @draw.composite
    def some(choose: Callable[[Any], Any]) -> Setting:
        parties, approvers = choose(draw.integers(1, 4)), choose(draw.sampled_from((0, 0, 1, 3)))
        names = [*(f"party-{i}" for i in range(1, parties)), *(f"approver-{i}" for i in range(approvers))]
        return Setting(
            parties=parties,
            receivers=choose(draw.integers(0, 1)),
            approvers=approvers,
            quorum=choose(draw.integers(0, approvers)),
            epochs_max=choose(draw.integers(1, 4)),
            corrupt=frozenset(choose(draw.sets(draw.sampled_from(names)))) if names else frozenset(),
            long=choose(draw.integers(0, 9)) == 9,
            wide=choose(draw.integers(0, 4)) == 4,
        )

    return some()


def _corrupt(job: Job) -> Any:
    """Any but one of the owners of data are the adversary's."""
    owners, names = job.owners(Setting()), job.names(Setting())

    @draw.composite
    def some(choose: Callable[[Any], Any]) -> Setting:
        honest = choose(draw.sampled_from(owners))
        others = [name for name in names if name != honest]
        corrupt = choose(draw.sets(draw.sampled_from(others))) if others else ()
        return Setting(corrupt=frozenset(corrupt), job=job)

    return some()
