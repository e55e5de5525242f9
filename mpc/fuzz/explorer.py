"""The explorer: every state that a bounded adversary can bring two parties and their enclaves into, breadth first.

The network is a bag: whatever anybody ever said may reach anybody, in any order, never, or any number of times. So
dropping, delaying, repeating, reordering and replaying, between epochs and enclaves too, are not moves but how it is.

Why the search is complete for its adversary, though each machine is run only once for a situation and an event:

* An actor does what its own state, the event and the time decide; nothing else (the machines are pure, and their
  shells keep all that they have in the actor). So what it does is looked up when the same comes again.
* Fresh values have names instead of bytes (mpc.fuzz.stage), so equal situations are equal, and are explored once.
* A state is: the situation of each actor, the time, and the set of all that was said and done. Sets only grow.
* The invariants judge by the set of what was said and done (every set is judged once), by what one actor just did
  (where it does it), and by an enclave's memory (likewise). Together that is every state.

When the frontier is empty, every reachable state was visited: a proof by exhaustion, for this adversary and this
number of actors, under the doubles of mpc.fuzz.doubles. It says nothing about more parties or more enclaves.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mpc.fuzz import actors, invariants
from mpc.fuzz.actors import Actor, Put, word
from mpc.fuzz.adversaries import OTHER_CONTRACT, Adversary
from mpc.fuzz.doubles import doubles
from mpc.fuzz.facts import Accepted, Broken, Computing, EnclaveSpoke, Fact, Released, Spoke
from mpc.fuzz.forger import Forger
from mpc.fuzz.infrastructure import CoordinatorActor, EnclaveActor
from mpc.fuzz.participants import PartyActor
from mpc.fuzz.refusals import Fired, recorded
from mpc.fuzz.stage import CRASHES_MAX, Item, Named, Restart, Stage, apply, fork, situation
from mpc.fuzz.world import CRASH

State = tuple[int, ...]  # time, the situation of each actor, and the set of what was said and done, as bits
Step = tuple[int, int, int]  # actor, item, and after how many actions it crashed (-1: it did not)
LASTING = (Spoke, EnclaveSpoke, Computing, Released, Accepted)  # facts that are judged with later ones
PROGRESS_S = 0.5
ACTIONS_MAX = 8  # of one step; no machine does so many


@dataclass(frozen=True)
class Found:
    """An invariant that does not hold, and the shortest way there, in words."""

    invariant: str
    why: str
    story: tuple[str, ...]


@dataclass
class Exploration:
    """What was visited of one adversary's states."""

    adversary: Adversary
    states: int = 0
    transitions: int = 0
    depth: int = 0
    frontier: int = 0  # states that were found and not gone on from
    situations: dict[str, int] = field(default_factory=dict)  # of each actor
    asked: int = 0  # how often a machine ran: once for a situation, a time and an event
    judged: int = 0  # sets of what was said and done
    ended: int = 0  # states in which nothing can change any more
    seconds: float = 0.0
    fired: Fired = field(default_factory=Fired)
    found: Found | None = None
    interrupted: bool = False  # by Ctrl-C

    @property
    def exhausted(self) -> bool:
        return not (self.frontier or self.found or self.interrupted)

    @property
    def transitions_per_s(self) -> float:
        return self.transitions / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Bounds:
    depth: int | None = None
    states: int | None = None
    seconds: float | None = None


def explore(
    adversary: Adversary, bounds: Bounds = Bounds(), progress: Callable[[Exploration], None] | None = None
) -> Exploration:
    """Visit its states, breadth first, until none is left, a bound is reached, or an invariant does not hold.

    Ctrl-C is a bound, too: what was visited so far is in the result, and whoever called asks whether to go on.
    """
    seen = Exploration(adversary)
    started = time.monotonic()
    with doubles(), naming(), recorded() as seen.fired:
        search = Search(adversary)
        try:
            search.run(seen, bounds, started, progress)
        except Broken as broken:
            seen.found = Found(broken.invariant, broken.why, tuple(search.story()))
        except KeyboardInterrupt:
            seen.interrupted = True
    seen.situations = {name: len(search.actors[i]) for i, name in enumerate(search.names)}
    seen.judged, seen.asked = len(search.judged), search.asked
    seen.seconds = time.monotonic() - started
    return seen


class Search:
    """The states of one adversary."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self.stage = Stage(1, adversary.setting)
        rogue = any(kind == OTHER_CONTRACT for _, kind in adversary.enclaves)
        self.forger = Forger(self.stage, adversary.moves, inputs=adversary.inputs, rogue=rogue)
        self.shelf = self.stage.coordinator  # no machine of the search: parties fetch results from it
        first = [fork(actor) for actor in adversary.actors(self.stage)]
        self.names = [actor.name for actor in first]
        self.stage.collect()
        self.bits: dict[Any, int] = {}  # an item or lasting fact → its number
        self.items: list[Item | None] = []  # by number
        self.facts: list[Fact | None] = []
        self.derived: dict[int, int] = {}  # set of what was said → with all that the adversary makes of it
        self.actors: list[list[Actor]] = [[] for _ in first]  # by actor and situation
        self.numbers: list[dict[Any, int]] = [{} for _ in first]
        # by actor, situation and time: items that were tried, and what those that change something lead to
        self.tried: dict[tuple[int, int, int], tuple[int, list[tuple[int, int, int, Step]]]] = {}
        self.lasting = 0  # the bits that are facts
        self.asked = 0
        self.spare: dict[tuple[int, int], Actor] = {}  # copies that nothing has changed
        self.judged: set[int] = set()
        self.constants = self._set(self.forger.constants())
        self.first: State = (0, *(self._situation(i, actor) for i, actor in enumerate(first)), 0)
        self.came: dict[State, tuple[State, Step] | None] = {self.first: None}
        self.at: tuple[State, Step | None] = (self.first, None)

    def run(
        self, seen: Exploration, bounds: Bounds, started: float, progress: Callable[[Exploration], None] | None
    ) -> None:
        frontier: deque[tuple[State, int]] = deque([(self.first, 0)])
        while frontier:
            state, seen.depth = frontier[0]
            seen.states, seen.frontier = len(self.came), len(frontier)
            if bounds.depth is not None and seen.depth >= bounds.depth:
                return
            if bounds.states is not None and seen.states >= bounds.states:
                return
            now = time.monotonic() - started
            if bounds.seconds is not None and now >= bounds.seconds:
                return
            if progress is not None and now >= seen.seconds + PROGRESS_S:
                seen.seconds = now
                progress(seen)
            frontier.popleft()
            changes = 0
            for after, step in self.after(state):
                changes += 1
                if after not in self.came:
                    self.came[after] = (state, step)
                    self.at = (state, step)
                    self._judge(after[-1])
                    frontier.append((after, seen.depth + 1))
            seen.transitions += changes
            if not changes:
                seen.ended += 1
                self.at = (state, None)
                self._check_end(state)
        seen.states, seen.frontier = len(self.came), 0

    # Transitions.

    def after(self, state: State) -> Iterator[tuple[State, Step]]:
        """Every state that differs and is one step away."""
        now, happened = state[0], state[-1]
        if now + 1 < len(self.adversary.times_ms):
            yield (now + 1, *state[1:]), (-1, now + 1, -1)
        known = self.derived.get(happened)
        if known is None:
            known = self.derived[happened] = self._known(happened)
        for actor in range(len(self.names)):
            place = (actor, state[actor + 1], now)
            tried, changing = self.tried.get(place, (0, []))
            if new := known & ~tried:
                self.at = (state, None)
                for item in _numbers(new):
                    for number, out, step in self._effects(actor, state[actor + 1], now, item):
                        if number != state[actor + 1] or out:
                            changing.append((1 << item, number, out, step))
                self.tried[place] = (tried | new, changing)
            for needs, number, out, step in changing:
                if needs & known and (number != state[actor + 1] or out & ~happened):
                    yield (*state[: actor + 1], number, *state[actor + 2 : -1], happened | out), step

    def _effects(self, actor: int, number: int, now: int, item: int) -> list[tuple[int, int, Step]]:
        """What an actor in a situation does about an item: its situation afterwards, and what it says and does."""
        thing = self.items[item]
        if thing is None:
            return []
        self.stage.now_ms = self.adversary.times_ms[now]
        results = []
        for crash in range(-1, ACTIONS_MAX if self._may_crash(self.actors[actor][number]) else 0):
            self.stage.collect()
            self.asked += 1
            copy = self.spare.pop((actor, number), None) or fork(self.actors[actor][number])
            copy.crash_in = None if crash < 0 else crash
            self.at = (self.at[0], (actor, item, crash))
            if not self.happens(copy, thing) or (crash >= 0 and copy.alive):
                break  # it does nothing, or not so many things
            copy.crash_in = None
            if not copy.alive and not isinstance(copy, EnclaveActor):
                self.crashed(copy)
            out = self.collect(copy)
            after = self._situation(actor, copy)
            results.append((after, out, (actor, item, crash)))
            if after == number:
                self.spare[actor, number] = copy  # as it was: good for the next event
        return results

    def happens(self, actor: Actor, thing: Item) -> bool:
        """Let it happen, and restart who died of nothing else; False when it is nothing for this actor."""
        if isinstance(thing, Restart):
            if not (self._may_crash(actor) or isinstance(actor, CoordinatorActor)):
                return False
            actor.kill()
            self.crashed(actor)
            return True
        try:
            happened = apply(actor, thing)
            if isinstance(actor, PartyActor) and actor.preparing and "slow" not in self.adversary.moves:
                actor.work()  # its tables are ready at once
        except Broken:
            raise
        except Exception as error:  # of a machine: it may refuse, and nothing else
            raise Broken(CRASH, f"{type(error).__name__}: {error}") from error
        return happened

    def _may_crash(self, actor: Actor) -> bool:
        if not isinstance(actor, PartyActor) or "crash" not in self.adversary.moves:
            return False
        return isinstance(actor.cryptography, Named) and actor.cryptography.crashes < CRASHES_MAX

    def crashed(self, actor: Actor) -> None:
        """Who has died starts again from its disk."""
        if isinstance(actor, PartyActor) and isinstance(actor.cryptography, Named):
            actor.cryptography.crashes += 1
        actor.start()

    def collect(self, actor: Actor) -> int:
        """Judge what an actor has just done, and give what lasts of it."""
        stage = self.stage
        if isinstance(actor, PartyActor):
            stage.parties[actor.name] = actor
        if isinstance(actor, CoordinatorActor):
            stage.coordinator = actor
        stage.enclaves = [actor] if isinstance(actor, EnclaveActor) else []
        said, facts, _ = stage.collect()
        lasting = [fact for fact in facts if isinstance(fact, LASTING)]
        stage.recall([fact for fact in facts if not isinstance(fact, LASTING)])
        invariants.check(stage)
        stage.collect()
        stage.coordinator = self.shelf
        return self._set(said) | self._set(lasting)

    def _set(self, things: Sequence[Any]) -> int:
        bits = 0
        for thing in things:
            key = _name(thing)
            number = self.bits.setdefault(key, len(self.bits))
            if number == len(self.items):
                lasting = isinstance(thing, LASTING)
                self.items.append(None if lasting else thing)
                self.facts.append(thing if lasting else None)
                self.lasting |= lasting << number
            bits |= 1 << number
        return bits

    def _known(self, happened: int) -> int:
        said = [thing for number in _numbers(happened) if isinstance(thing := self.items[number], bytes | Put)]
        return happened | self.constants | self._set(self.forger.made_of(said))

    def _situation(self, actor: int, it: Actor) -> int:
        number = self.numbers[actor].setdefault(situation(it), len(self.actors[actor]))
        if number == len(self.actors[actor]):
            self.actors[actor].append(it)
        return number

    # Judging.

    def _judge(self, happened: int) -> None:
        """All invariants, for everything that was said and done."""
        happened &= self.lasting
        if happened in self.judged:
            return
        self.judged.add(happened)
        facts = [fact for number in _numbers(happened) if (fact := self.facts[number]) is not None]
        enclaves = {fact.enclave.name: fact.enclave for fact in facts if not isinstance(fact, Spoke | Accepted)}  # type: ignore[union-attr]
        self.stage.enclaves = list(enclaves.values())
        for enclave in self.stage.enclaves:
            enclave.touched = False  # its memory was judged where it changed
        self.stage.recall(
            [
                replace(fact, enclave=enclaves[fact.enclave.name])
                if isinstance(fact, EnclaveSpoke | Computing | Released)
                else fact
                for fact in facts
            ]
        )
        invariants.check(self.stage)

    def _check_end(self, state: State) -> None:
        """Where all is delivered and nobody lies, dies or waits too long, the session has ended in a result."""
        if not self.adversary.fair:
            return
        for index, number in enumerate(state[1:-1]):
            actor = self.actors[index][number]
            if isinstance(actor, PartyActor) and not (actor.ending and actor.ending.released):
                raise Broken("termination", f"all is delivered, and {actor.name} has no result")
        if not any(isinstance(self.facts[number], Released) for number in _numbers(state[-1])):
            raise Broken("termination", "all is delivered, and nothing was released")

    # The way to where something broke.

    def story(self) -> list[str]:
        """What was done at each step of the shortest way there, and what was answered."""
        state, last = self.at
        way = [(state, last)] if last else []
        while (before := self.came[state]) is not None:
            state = before[0]
            way.append(before)
        return [self._told(state, step) for state, step in reversed(way)]

    def _told(self, state: State, step: Step) -> str:
        actor, item, crash = step
        times = self.adversary.times_ms
        if actor < 0:
            return f"time passes: {(times[item] - times[0]) // 1000} s since the start"
        self.stage.collect()
        self.stage.now_ms = times[state[0]]
        copy, thing = fork(self.actors[actor][state[actor + 1]]), self.items[item]
        assert thing is not None
        copy.crash_in = None if crash < 0 else crash
        with suppress(Broken):  # the last step may break its actor
            self.happens(copy, thing)
        _, _, told = self.stage.collect()
        return "; ".join(told) or f"{self.names[actor]}: {word(thing)}"


def _name(thing: Item | Fact) -> object:
    """What makes it the same thing."""
    if isinstance(thing, Spoke):
        return "spoke", thing.name, thing.signed.digest
    if isinstance(thing, EnclaveSpoke):
        return "spoke", thing.enclave.name, thing.signed.digest, thing.now_ms
    if isinstance(thing, Computing):
        return "computing", thing.enclave.name, thing.tables
    if isinstance(thing, Released):
        return "released", thing.enclave.name, thing.receipt.digest, thing.now_ms
    if isinstance(thing, Accepted):
        return "accepted", thing.name, thing.release, thing.result
    return thing if isinstance(thing, bytes) else (type(thing).__name__, thing)


def _numbers(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


@contextmanager
def naming() -> Iterator[None]:
    """Actors that are made in this block draw names (see mpc.fuzz.stage)."""
    module: Any = actors
    real = module.SeededCryptography
    module.SeededCryptography = Named
    try:
        yield
    finally:
        module.SeededCryptography = real
