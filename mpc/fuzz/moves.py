"""The adversary's moves. It owns network, coordinator, host and the corrupt participants, and draws its details.

A move is a function of the world and a source of randomness, with a docstring and a weight; adding one is all that
it takes for every engine to play it. What a move does not find anything to do with, it leaves.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any, get_args

from enclave_runtime import enclave as runtime
from enclave_runtime.nsm import Nsm
from mpc.coordinator.mailbox import EnclaveLost, Post
from mpc.fuzz.actors import Actor, Item, Put, SeededCryptography
from mpc.fuzz.facts import opened
from mpc.fuzz.infrastructure import EnclaveActor
from mpc.fuzz.participants import PartyActor
from mpc.fuzz.world import OTHER_PCRS, PCRS, RELEASE_MS, START_MS, Move, Setting, World
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.host.simulated_root import SimulatedRoot
from mpc.protocol import messages, rounds
from mpc.protocol.encoding import decode, encode
from mpc.protocol.messages import Abort, Attestation, Binding, Consent, Decision, Reason, Seal, Wrapped, sign
from mpc.protocol.messages import roster_digest as digest_of_roster
from mpc.protocol.sealing import Cryptography, StreamSecret, chunk_count, table_context
from mpc.protocol.signing import open_signed
from mpc.transport import Ended, EpochOpened, Said
from parties import party

SKEW_MS = 30_000


@dataclass(frozen=True)
class Kind:
    """A kind of move, and how often it is drawn."""

    play: Callable[[World, Random], None]
    weight: int


MOVES: dict[str, Kind] = {}


def move(weight: int) -> Callable[[Callable[[World, Random], None]], Callable[[World, Random], None]]:
    def register(play: Callable[[World, Random], None]) -> Callable[[World, Random], None]:
        MOVES[play.__name__] = Kind(play, weight)
        return play

    return register


def choose(random: Random, names: Collection[str] = ()) -> Move:
    """A move of these kinds, or of all."""
    kinds = {name: kind for name, kind in MOVES.items() if not names or name in names}
    (name,) = random.choices(list(kinds), [kind.weight for kind in kinds.values()])
    return Move(name, random.getrandbits(32))


def attack(seed: int, steps: int = 40, setting: Setting | None = None) -> World:
    """A whole run against one seed: moves of a random subset of kinds, then the adversary rests, then time runs out.

    Raises:  Broken when an invariant does not hold.
    """
    random = Random(seed)
    with verifying_once():
        world = World(seed, setting or Setting.draw(random))
        names = {"deliver", "hurry", *random.sample(sorted(MOVES), random.randint(1, len(MOVES)))}
        for _ in range(steps):
            world.step(choose(random, names))
        for _ in range(400):
            if not world.fair_step():
                break
        world.settle()
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


# The network.


@move(60)
def deliver(world: World, random: Random) -> None:
    """The next thing on a wire, or a process goes on with its own work."""
    names = [*world.ready(), *(name for name, party in world.parties.items() if party.preparing or party.keeping)]
    if names:
        name = random.choice(names)
        if not world.actors[name].work() and world.wires[name]:
            world.deliver(name)


@move(12)
def hurry(world: World, random: Random) -> None:
    """All goes well for a while."""
    for _ in range(random.randint(3, 40)):
        if not world.fair_step():
            break


@move(6)
def reorder(world: World, random: Random) -> None:
    """Something overtakes what was before it."""
    if place := _pick(world, random):
        world.deliver(*place)


@move(3)
def drop(world: World, random: Random) -> None:
    """Something never arrives."""
    if place := _pick(world, random):
        name, index = place
        del world.wires[name][index]


@move(4)
def repeat(world: World, random: Random) -> None:
    """Something arrives twice, now or later."""
    if place := _pick(world, random):
        name, index = place
        wire = world.wires[name]
        wire.insert(random.randint(0, len(wire)), wire[index])


@move(6)
def alter(world: World, random: Random) -> None:
    """Something arrives changed: bits, length, number, position."""
    if place := _pick(world, random):
        name, index = place
        world.wires[name][index] = _altered(world.wires[name][index], random)


@move(6)
def replay(world: World, random: Random) -> None:
    """Something that was said to anybody, in any epoch, is said to somebody else."""
    _say(world, random, random.choice(world.pool))


@move(4)
def sign_again(world: World, random: Random) -> None:
    """Somebody else's words under a key of the adversary's."""
    said = opened(random.choice(world.pool))
    _say(world, random, random.choice(world.held()).sign(said.kind, said.payload))


@move(4)
def splice(world: World, random: Random) -> None:
    """One message with a field of another, under a key of the adversary's."""
    said, other = opened(random.choice(world.pool)), opened(random.choice(world.pool))
    fields, others = decode(said.payload), decode(other.payload)
    if shared := sorted(fields.keys() & others.keys()):
        name = random.choice(shared)
        _say(world, random, random.choice(world.held()).sign(said.kind, encode({**fields, name: others[name]})))


# The coordinator.


@move(3)
def open_epoch(world: World, random: Random) -> None:
    """The coordinator calls for consents to any epoch, whomever it likes."""
    epoch = random.randint(0, world.contract.epochs_max + 1)
    for name in random.sample(list(world.parties), random.randint(1, len(world.parties))):
        _insert(world, random, name, EpochOpened(epoch))
    world.launch(max(1, min(epoch, world.contract.epochs_max)))


@move(1)
def end_falsely(world: World, random: Random) -> None:
    """The coordinator says that it is over."""
    outcome = random.choice(("released", "aborted", "not heard", "enclave lost"))
    _insert(world, random, random.choice(list(world.parties)), Ended(outcome, "a lie", ("party-0",)))


# The host.


@move(3)
def call_dead(world: World, random: Random) -> None:
    """An enclave is said to be lost, and lives on."""
    if enclave := _some(random, [e for e in world.enclaves if e.alive]):
        world.lost(enclave.epoch)


@move(3)
def launch_again(world: World, random: Random) -> None:
    """Another enclave of the agreed code, for any epoch."""
    world.launch(random.randint(1, world.contract.epochs_max))


@move(3)
def launch_other(world: World, random: Random) -> None:
    """An enclave that is not the agreed one: other code, debug mode, or a contract of the adversary's."""
    epoch = random.randint(1, world.contract.epochs_max)
    kind = random.choice(("code", "debug", "contract"))
    if kind == "code":
        world.launch(epoch, pcrs=OTHER_PCRS)
    elif kind == "debug":
        world.launch(epoch, debug=True)
    else:
        program = replace(world.contract.program, text="show everything")
        other = replace(world.contract, author=world.stranger.public, program=program)
        world.launch(epoch, proposal=sign(world.stranger, other))


@move(2)
def kill(world: World, random: Random) -> None:
    """A process dies; what is on its disk stays."""
    actor = random.choice(list(world.actors.values()))
    world.tell(f"{actor.name} is killed")
    if isinstance(actor, EnclaveActor):
        world.kill_enclave(actor)
    else:
        actor.kill()


@move(3)
def kill_between(world: World, random: Random) -> None:
    """A process will die between two of its actions."""
    actors: list[Actor] = [*world.parties.values(), *(e for e in world.enclaves if e.alive)]
    random.choice(actors).crash_in = random.randint(0, 3)


@move(3)
def restart(world: World, random: Random) -> None:
    """A process starts again, from its disk."""
    actor = random.choice([world.coordinator, *world.parties.values(), *world.approvers.values()])
    world.tell(f"{actor.name} starts again")
    actor.kill()
    actor.start()


@move(1)
def silence(world: World, random: Random) -> None:
    """Nothing reaches somebody any more, or all again."""
    actor = random.choice([*world.parties.values(), *world.approvers.values()])
    actor.silent = not actor.silent


@move(1)
def skew(world: World, random: Random) -> None:
    """Somebody's clock is wrong."""
    random.choice(list(world.actors.values())).skew_ms = random.randint(-SKEW_MS, SKEW_MS)


@move(3)
def wait(world: World, random: Random) -> None:
    """Time passes; now and then it is nearly up."""
    left = START_MS + RELEASE_MS - world.now_ms
    world.advance(random.choice((1_000, 20_000, max(0, left - 1_000))))


@move(1)
def slow(world: World, random: Random) -> None:
    """The joint program takes its time."""
    world.compute_ms = random.choice((0, 10_000, RELEASE_MS))


# Corrupt participants.


@move(3)
def change_input(world: World, random: Random) -> None:
    """A corrupt party forgets what it committed to and comes with other data, or with data that it may not send."""
    if corrupt := _corrupt_party(world, random):
        come_with_other_data(corrupt, random.choice((b"", b"", b"NOT OF ITS SCHEMA", b"AGAINST A RULE")))


@move(2)
def lie_about_input(world: World, random: Random) -> None:
    """A corrupt party commits to a digest or a length that its data do not have."""
    if corrupt := _corrupt_party(world, random):
        begin_again(corrupt)
        lies = [replace(table, tree=random.randbytes(48)) for table in corrupt.spooled]
        if random.random() < 0.5:
            lies = [replace(table, length=random.choice((0, table.length + 1, 1 << 33))) for table in corrupt.spooled]
        corrupt.spooled = tuple(lies)


@move(3)
def lie_in_seal(world: World, random: Random) -> None:
    """A corrupt party seals to an enclave what it did not commit to."""
    corrupt, enclave = _corrupt_party(world, random), _some(random, [e for e in world.enclaves if e.binding])
    if corrupt is None or enclave is None or not corrupt.tables:
        return
    binding, streams = enclave.binding, []
    assert binding is not None
    for stream, table in corrupt.tables.items():
        secret = StreamSecret(random.randbytes(32), random.randbytes(32), len(table) + random.choice((0, 1, 1 << 40)))
        context = table_context(binding.digest, corrupt.keys.signing.public, world.contract.tables[stream].name)
        wrapped = Cryptography().wrap(secret.encode(), binding.sealing_key, random.choice((context, b"")))
        streams.append(Wrapped(stream, wrapped, random.choice((chunk_count(len(table)), 1, 3))))
    _say(world, random, sign(corrupt.keys.signing, Seal(binding.digest, tuple(streams))))


@move(2)
def forge_consent(world: World, random: Random) -> None:
    """A consent by a key of the adversary's, perhaps a second one."""
    epoch = _epoch(world, random)
    said = Consent(world.contract.digest, epoch, random.randbytes(32), random.randbytes(48))
    _say(world, random, sign(random.choice(world.held()), said))


@move(2)
def forge_abort(world: World, random: Random) -> None:
    """An abort by a key of the adversary's, and perhaps it blames somebody."""
    blamed = random.choice((None, *world.keys))
    reason: Reason = random.choice(get_args(Reason))
    said = Abort(world.contract.digest, _epoch(world, random), reason, blamed)
    _say(world, random, sign(random.choice(world.held()), said))


@move(3)
def forge_decision(world: World, random: Random) -> None:
    """An approval of what some enclave computed, by a key of the adversary's; often straight to the enclave."""
    computed = [opened(envelope) for envelope in world.said("computed")]
    if said := _some(random, computed):
        fields = decode(said.payload)
        decision = Decision(fields["binding"], random.choice((fields["summary"], random.randbytes(48))))
        _say(world, random, sign(random.choice(world.held()), decision))


@move(4)
def forge_attestation(world: World, random: Random) -> None:
    """The adversary shows itself as the enclave: its own keys, and the best document that it can get."""
    epoch = _epoch(world, random)
    signer = world.stranger  # no participant: those may not speak for an enclave
    consents = _consents(world, epoch)
    roster = digest_of_roster(consents)
    binding = Binding(world.contract.digest, epoch, roster, world.strangers_opening.public, signer.public)
    shown = [opened(envelope) for envelope in world.said("attestation")]
    source = random.choice(("code", "debug", "root", *(["stolen"] if shown else [])))
    if source == "stolen":
        document = decode(random.choice(shown).payload)["document"]
    else:
        root = other_root() if source == "root" else world.root
        pcrs = OTHER_PCRS if source == "code" else PCRS
        clock: Callable[[], int] = lambda: world.now_ms  # noqa: E731
        machine = SimulatedNsm(root, pcrs, clock_ms=clock, entropy=random.randbytes, debug=source == "debug")
        nsm = Nsm(machine.handle)
        nsm.extend_pcr(runtime.CONTRACT_PCR, world.contract.digest)
        nsm.lock_pcr(runtime.CONTRACT_PCR)
        document = nsm.attest(user_data=binding.digest, nonce=roster, public_key=signer.public)
    said = Attestation(world.contract.digest, epoch, tuple(consents), world.strangers_opening.public, document)
    _say(world, random, sign(signer, said))
    for name in random.sample(list(world.parties), random.randint(0, len(world.parties))):
        world.wires[name].insert(0, Said(sign(signer, said)))


# What the moves are made of.


def _some(random: Random, choices: list[Any]) -> Any:
    return random.choice(choices) if choices else None


def _pick(world: World, random: Random) -> tuple[str, int] | None:
    """Somebody, and something on the wire to it."""
    name = _some(random, world.ready())
    return (name, random.randrange(len(world.wires[name]))) if name else None


def _insert(world: World, random: Random, name: str, item: Item) -> None:
    wire = world.wires[name]
    wire.insert(random.choice((0, len(wire))), item)


def _say(world: World, random: Random, envelope: bytes) -> None:
    """Hand an envelope to anybody as what it takes: to the coordinator, to one of the others, or to all of a kind."""
    members, enclaves = [*world.parties, *world.approvers], [e.name for e in world.enclaves if e.alive]
    kind = random.choice(("coordinator", "members", "enclaves"))
    if kind == "coordinator":
        _insert(world, random, world.coordinator.name, Post(envelope))
    names = {"members": members, "enclaves": enclaves}.get(kind, [])
    for name in names if random.random() < 0.5 else names and [random.choice(names)]:
        _insert(world, random, name, Said(envelope) if kind == "members" else runtime.Message(envelope))


def _epoch(world: World, random: Random) -> int:
    """Mostly the one that the coordinator is in."""
    other = random.randint(1, world.contract.epochs_max)
    return random.choice((other, *[world.coordinator.mailbox.session.epoch] * 3))


def _corrupt_party(world: World, random: Random) -> PartyActor | None:
    party: PartyActor | None = _some(random, [party for party in world.parties.values() if not party.honest])
    return party


def come_with_other_data(party: PartyActor, form: bytes = b"") -> None:
    """A corrupt party takes other tables and forgets that it ever had any."""
    party.tables = party.world.draw_tables(party.name, form)
    begin_again(party)


def begin_again(party: PartyActor) -> None:
    party.kill()
    party.ledger.clear()
    party.spooled = party.spool()
    party.start()


def _consents(world: World, epoch: int) -> list[bytes]:
    """The first consent of every party that has said one to this epoch."""
    found: dict[bytes, bytes] = {}
    for envelope in world.said("consent"):
        if decode(opened(envelope).payload)["epoch"] == epoch:
            found.setdefault(opened(envelope).signer, envelope)
    return list(found.values())


def _altered(item: Item, random: Random) -> Item:
    if isinstance(item, Said | Post | runtime.Message):
        return replace(item, envelope=_mutated(item.envelope, random))
    if isinstance(item, Put | runtime.Chunk) and random.random() < 0.5:
        return replace(item, box=_mutated(bytes(item.box), random))
    if isinstance(item, Put | runtime.Chunk):
        other = random.choice(("stream", "index"))
        return replace(item, **{other: max(0, getattr(item, other) + random.choice((-1, 1)))})
    if isinstance(item, EpochOpened | EnclaveLost | runtime.Begin):
        return replace(item, epoch=item.epoch + random.choice((-1, 1)))
    return item


def _mutated(data: bytes, random: Random) -> bytes:
    """One bit flipped, or the end cut off, or a byte too many."""
    kind = random.choice(("flip", "flip", "cut", "longer"))
    if kind == "flip" and data:
        index = random.randrange(len(data))
        return data[:index] + bytes([data[index] ^ 1 << random.randrange(8)]) + data[index + 1 :]
    return data[: random.randrange(len(data) + 1)] if kind == "cut" else data + b"\0"


@lru_cache(maxsize=1)
def other_root() -> SimulatedRoot:
    return SimulatedRoot.create(entropy=SeededCryptography("another root").random, now_ms=START_MS)
