"""What moves are made of: their register, and how the adversary takes from wires and puts onto them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any

from enclave_runtime import enclave as runtime
from mpc.coordinator.mailbox import EnclaveLost, Post
from mpc.fuzz.actors import Item, Put, SeededCryptography, word
from mpc.fuzz.facts import opened
from mpc.fuzz.participants import PartyActor
from mpc.fuzz.world import START_MS, World
from mpc.host.simulated_root import SimulatedRoot
from mpc.protocol.encoding import decode
from mpc.protocol.errors import MpcError
from mpc.transport import EpochOpened, Said

Play = Callable[[World, Random], None]


@dataclass(frozen=True)
class Kind:
    """A kind of move, and how often it is drawn."""

    play: Play
    weight: float


MOVES: dict[str, Kind] = {}


def move(weight: float) -> Callable[[Play], Play]:
    """Register a move under its function's name; that is all it takes for every engine to play it."""

    def register(play: Play) -> Play:
        MOVES[play.__name__] = Kind(play, weight)
        return play

    return register


def some(random: Random, choices: list[Any]) -> Any:
    return random.choice(choices) if choices else None


# The wires.


def pick(world: World, random: Random, what: str) -> tuple[str, int] | None:
    """Somebody, and something on the wire to it; `what` happens to it."""
    name = some(random, world.ready())
    if name is None:
        return None
    index = random.randrange(len(world.wires[name]))
    touch(world, world.wires[name][index], f"{what}, on its way to {name}")
    return name, index


def touch(world: World, item: Item, what: str = "") -> None:
    """For coverage, and for the story when something happens to it."""
    world.touch(message(item))
    if what:
        world.tell(f"the adversary: {said(world, item)} {what}")


def insert(world: World, random: Random, name: str, item: Item) -> None:
    """First or last on the wire to somebody."""
    wire = world.wires[name]
    wire.insert(random.choice((0, len(wire))), item)
    touch(world, item, f"is handed to {name}")


def say(world: World, random: Random, envelope: bytes) -> None:
    """Hand an envelope to anybody as what it takes: to the coordinator, to one of the others, or to all of a kind."""
    members, enclaves = [*world.parties, *world.approvers], [e.name for e in world.enclaves if e.alive]
    kind = random.choice(("coordinator", "members", "enclaves"))
    if kind == "coordinator":
        insert(world, random, world.coordinator.name, Post(envelope))
    names = {"members": members, "enclaves": enclaves}.get(kind, [])
    for name in names if random.random() < 0.5 else names and [random.choice(names)]:
        insert(world, random, name, Said(envelope) if kind == "members" else runtime.Message(envelope))


def message(item: Item) -> str:
    """The kind of message on a wire: a kind of the protocol, `chunk`, or `order` of the coordinator or host."""
    if isinstance(item, Put | runtime.Chunk):
        return "chunk"
    envelope = getattr(item, "envelope", None)
    if isinstance(item, runtime.Begin):
        envelope = item.contract
    if envelope is None:
        return "order"
    try:
        return opened(envelope).kind
    except MpcError:
        return "altered"


def said(world: World, item: Item) -> str:
    """What lies on a wire, and whose it is, in words."""
    envelope = getattr(item, "envelope", None)
    if envelope is None:
        number = f" {item.index} of stream {item.stream}" if isinstance(item, Put | runtime.Chunk) else ""
        number = f" {item.epoch}" if isinstance(item, EpochOpened | EnclaveLost) else number
        return f"{word(item)}{number}"
    try:
        return f"{opened(envelope).kind} of {world.who(opened(envelope).signer)}"
    except MpcError:
        return "an altered message"


# What there is to work with.


def epoch_of(world: World, random: Random) -> int:
    """Mostly the one that the coordinator is in."""
    other = random.randint(1, world.contract.epochs_max)
    return random.choice((other, *[world.coordinator.mailbox.session.epoch] * 3))


def corrupt_party(world: World, random: Random) -> PartyActor | None:
    party: PartyActor | None = some(random, [party for party in world.parties.values() if not party.honest])
    return party


def come_with_other_data(party: PartyActor, form: str = "") -> None:
    """A corrupt party takes other tables and forgets that it ever had any."""
    party.tables = party.world.draw_tables(party.name, form)
    begin_again(party)


def begin_again(party: PartyActor) -> None:
    party.kill()
    party.ledger.clear()
    party.spooled = party.spool()
    party.start()


def consents(world: World, epoch: int) -> list[bytes]:
    """The first consent of every party that has said one to this epoch."""
    found: dict[bytes, bytes] = {}
    for envelope in world.said("consent"):
        if decode(opened(envelope).payload)["epoch"] == epoch:
            found.setdefault(opened(envelope).signer, envelope)
    return list(found.values())


def altered(item: Item, random: Random) -> Item:
    if isinstance(item, Said | Post | runtime.Message):
        return replace(item, envelope=mutated(item.envelope, random))
    if isinstance(item, Put | runtime.Chunk) and random.random() < 0.5:
        return replace(item, box=mutated(bytes(item.box), random))
    if isinstance(item, Put | runtime.Chunk):
        other = random.choice(("stream", "index"))
        return replace(item, **{other: max(0, getattr(item, other) + random.choice((-1, 1)))})
    if isinstance(item, EpochOpened | EnclaveLost | runtime.Begin):
        return replace(item, epoch=item.epoch + random.choice((-1, 1)))
    return item


def mutated(data: bytes, random: Random) -> bytes:
    """One bit flipped, or the end cut off, or a byte too many."""
    kind = random.choice(("flip", "flip", "cut", "longer"))
    if kind == "flip" and data:
        index = random.randrange(len(data))
        return data[:index] + bytes([data[index] ^ 1 << random.randrange(8)]) + data[index + 1 :]
    return data[: random.randrange(len(data) + 1)] if kind == "cut" else data + b"\0"


@lru_cache(maxsize=1)
def other_root() -> SimulatedRoot:
    return SimulatedRoot.create(entropy=SeededCryptography("another root").random, now_ms=START_MS)
