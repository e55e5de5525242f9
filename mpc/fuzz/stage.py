"""What the explorer needs of a world: its actors one by one, copied, compared, and asked what they do about one thing.

Fresh values (keys, nonces, salts) are named by owner, purpose and number, not by when they were drawn, so two paths
that come to the same situation come to the same bytes. The protocol only compares such values, so a run under other
names is the same run; values that are drawn twice still differ, for their numbers do.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, lru_cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from enclave_runtime import enclave as runtime
from enclave_runtime.enclave import Enclave
from enclave_runtime.nsm import Nsm
from mpc.coordinator.mailbox import EnclaveLost, Mailbox, Post
from mpc.fuzz.actors import Actor, Put
from mpc.fuzz.doubles import HPKE
from mpc.fuzz.facts import Fact
from mpc.fuzz.infrastructure import CoordinatorActor, EnclaveActor, TableMemory
from mpc.fuzz.participants import ApproverActor, PartyActor
from mpc.fuzz.world import World
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.host.simulated_root import SimulatedRoot
from mpc.protocol.encoding import Record
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import ChunkCipher, Cryptography, OpeningKey
from mpc.protocol.signing import Signed, SigningKey
from mpc.transport import Ended, Entry, EpochOpened, Said
from parties.party import Party

NOT_KEPT = ("_now",)  # who draws there forgets the value at once: its number may repeat
CRASHES_MAX = 1  # of each party
DEFERRED_MAX = 2  # what may reach a party while it prepares its tables: each thing once, and so many


class Named(Cryptography):
    """Entropy by name: owner, purpose (the function that draws), and how often that has drawn before."""

    def __init__(self, owner: str) -> None:
        self.owner, self.drawn = owner, Counter[str]()
        self.crashes = 0  # of its owner, so far

    def random(self, size: int) -> bytes:
        return self._named(sys._getframe(1).f_code.co_name, size)

    def _named(self, purpose: str, size: int) -> bytes:
        name = f"{self.owner} {purpose} {self.drawn[purpose]}"
        self.drawn[purpose] += purpose not in NOT_KEPT
        return hashlib.shake_256(name.encode()).digest(size)

    def wrap(self, secret: bytes, sealing_key: bytes, context: bytes) -> bytes:
        number = int.from_bytes(self._named("wrap", 32), "big")
        counted, HPKE.fresh = HPKE.fresh, lambda: number
        try:
            return super().wrap(secret, sealing_key, context)
        finally:
            HPKE.fresh = counted


class Stage(World):
    """A world without wires: what its actors say is collected, and nobody hears it by itself."""

    def publish(self, entry: Entry) -> None: ...
    def pipe(self, put: Put) -> None: ...

    def collect(self) -> tuple[list[bytes | Put], list[Fact], list[str]]:
        """What was said, what happened, and the story of it, since the last time."""
        wire = self.wires["coordinator"]
        said = [item.envelope if isinstance(item, Post) else item for item in wire if isinstance(item, Post | Put)]
        told = said, list(self.facts), list(self.story)
        for grown in (wire, self.pool, self.facts, self.story):
            grown.clear()
        self._by_kind.clear()
        self.checked = 0
        return told

    def recall(self, facts: list[Fact]) -> None:
        """Let these be what has happened, and nothing of it judged yet."""
        self.collect()
        self.note(*facts)


# What may happen to an actor, beside messages and chunks.


class Clock(NamedTuple):
    """It looks at the clock."""


class Work(NamedTuple):
    """Its own process goes on: the tables are ready, or the release is stored."""


class Restart(NamedTuple):
    """It is killed, and starts again from its disk."""


Item = bytes | Put | EpochOpened | Ended | EnclaveLost | runtime.Begin | Clock | Work | Restart | runtime.Outcome


def apply(actor: Actor, item: Item) -> bool:
    """Let it happen to an actor; False when it is nothing for this one."""
    if isinstance(item, Clock):
        if isinstance(actor, EnclaveActor | ApproverActor):
            return False
        actor.tick()
    elif isinstance(actor, PartyActor):
        return _to_party(actor, item)
    elif isinstance(actor, EnclaveActor):
        return _to_enclave(actor, item)
    elif isinstance(actor, ApproverActor) and isinstance(item, bytes | EpochOpened):
        actor.receive(Said(item) if isinstance(item, bytes) else item)
    elif isinstance(actor, CoordinatorActor) and isinstance(item, bytes | Put | EnclaveLost):
        actor.receive(Post(item) if isinstance(item, bytes) else item)
    else:
        return False
    return True


def _to_party(actor: PartyActor, item: Item) -> bool:
    if isinstance(item, bytes | EpochOpened | Ended):
        entry = Said(item) if isinstance(item, bytes) else item
        deferred = vars(actor.machine)["_deferred"]
        if actor.preparing and (entry in deferred or len(deferred) >= DEFERRED_MAX):
            return False
        actor.receive(entry)
        return True
    if isinstance(item, Put):
        keeping = actor.keeping
        if keeping is None or keeping.mine is None or item.stream != keeping.mine.key.stream:
            return False
        actor.world.coordinator.chunks = {(keeping.session.epoch, item.stream, item.index): item.box}
        return actor.work()
    if isinstance(item, Work):
        actor.world.coordinator.chunks = {}
        return (actor.preparing or (actor.keeping is not None and actor.keeping.mine is None)) and actor.work()
    return False


def _to_enclave(actor: EnclaveActor, item: Item) -> bool:
    if not actor.alive:
        return False
    if isinstance(item, bytes):
        actor.receive(runtime.Message(item))
    elif isinstance(item, Put) and item.stream < len(actor.contract.tables):
        actor.receive(runtime.Chunk(item.stream, item.index, item.box))
    elif isinstance(item, runtime.Begin):
        if (item.contract, item.epoch) != (
            actor.proposal,
            actor.epoch,
        ) and 1 <= item.epoch <= actor.contract.epochs_max:
            return False  # that is another enclave
        actor.receive(item)
    elif isinstance(item, runtime.Outcome) and not actor.machine._computing:
        actor.receive(item)
    else:
        return False
    return True


# Copies, and when two actors are in the same situation.

CHANGES = (Actor, Party, Enclave, Mailbox, Nsm, SimulatedNsm, TableMemory, Named, runtime._Input)
PLAIN = (type(None), bool, int, float, str, bytes, range, Enum, type)
VOLATILE = {"world", "touched", "log", "_leaf"}
Known = dict[int, Any]


def fork(thing: Any, known: Known | None = None) -> Any:
    """A copy of an actor that lives on by itself; what never changes is shared. TypeError for what it does not know."""
    known = {} if known is None else known
    kind: Any = type(thing)
    how = _copied(kind)
    if how is None:
        return thing
    if id(thing) not in known:
        known[id(thing)] = how(thing, known)
    return known[id(thing)]


@cache
def _copied(kind: type[Any]) -> Callable[[Any, Known], Any] | None:
    """How a copy of such a thing is made; None: it is shared."""
    if issubclass(kind, CHANGES):
        return _copy_object
    if issubclass(kind, dict):
        return _copy_dict
    hows: dict[type, Callable[[Any, Known], Any]] = {
        list: lambda thing, known: [fork(value, known) for value in thing],
        set: lambda thing, _: thing.copy(),
        bytearray: lambda thing, _: thing.copy(),
        memoryview: lambda thing, known: memoryview(fork(thing.obj, known)),  # always the whole
        MethodType: lambda thing, known: MethodType(thing.__func__, fork(thing.__self__, known)),
    }
    immutable = (*PLAIN, World, SimulatedRoot, SigningKey, OpeningKey, ChunkCipher, FunctionType, tuple, frozenset)
    parameters = getattr(kind, "__dataclass_params__", None)
    if kind not in hows and not issubclass(kind, immutable) and not (parameters and parameters.frozen):
        raise TypeError(f"the explorer does not know whether a {kind.__name__} ever changes")
    return hows.get(kind)


def _copy_object(thing: Any, known: Known) -> Any:
    copy = known[id(thing)] = object.__new__(type(thing))
    values = vars(copy)
    for name, value in vars(thing).items():
        values[name] = fork(value, known)
    return copy


def _copy_dict(thing: Any, known: Known) -> Any:
    copy = thing.copy()
    for name, value in thing.items():
        copy[name] = fork(value, known)
    return copy


def situation(thing: Any) -> Any:
    """A value that is equal for actors that will do the same for ever. Order counts in lists, not in maps and sets.

    Left out: the world, whether judges have looked, and the order of a coordinator's log, whose session is compared.
    """
    kind: Any = type(thing)
    how = _compared(kind)
    return thing if how is None else how(thing)


@cache
def _compared(kind: type) -> Callable[[Any], Any] | None:
    """How such a thing is compared; None: as it is."""
    if issubclass(kind, bytes | bytearray | memoryview):
        return lambda thing: bytes(thing) if len(thing) <= 48 else _short(bytes(thing))
    hows: list[tuple[Any, Callable[[Any], Any] | None]] = [
        (PLAIN, None),
        (Session, _session),
        (Record, lambda thing: _short(thing.encode())),
        (Signed, lambda thing: thing.digest),
        ((SigningKey, OpeningKey), lambda thing: _short(thing.public)),
        ((World, SimulatedRoot, ChunkCipher), lambda _: None),  # a cipher follows from the secret beside it
        (FunctionType, lambda thing: tuple(situation(cell.cell_contents) for cell in thing.__closure__ or ())),
        (MethodType, lambda thing: thing.__func__.__qualname__),  # its object is compared where it stands
        (Mapping, lambda thing: frozenset((situation(name), situation(value)) for name, value in thing.items())),
        ((set, frozenset), lambda thing: frozenset(map(situation, thing))),
        ((list, tuple), lambda thing: tuple(map(situation, thing))),
        (CHANGES, _object),
    ]
    for kinds, how in hows:
        if issubclass(kind, kinds):
            return how
    if is_dataclass(kind):
        names = [field.name for field in fields(kind)]
        return lambda thing: (kind.__name__, *(situation(getattr(thing, name)) for name in names))
    raise TypeError(f"the explorer cannot compare a {kind.__name__}")


def _session(thing: Session) -> Any:
    said = frozenset((kind.__name__, heard.signed.digest) for (kind, _), heard in thing.said.items())
    return thing.contract.digest, thing.epoch, thing.round, thing.binding and thing.binding.digest, said


def _object(thing: Any) -> Any:
    return tuple((name, situation(value)) for name, value in vars(thing).items() if name not in VOLATILE)


@lru_cache(maxsize=1 << 14)
def _short(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
