"""Moves of the network, the coordinator and the host."""

from dataclasses import replace
from random import Random

from enclave_runtime import enclave as runtime
from mpc.coordinator.mailbox import Post
from mpc.fuzz.actors import Actor, Put
from mpc.fuzz.facts import opened
from mpc.fuzz.infrastructure import EnclaveActor
from mpc.fuzz.means import altered, consents, insert, move, pick, say, some, touch
from mpc.fuzz.world import OTHER_PCRS, START_MS, World
from mpc.protocol.encoding import decode, encode
from mpc.protocol.messages import sign
from mpc.transport import Ended, EpochOpened, Said

SKEW_MS = 30_000

# The network.


@move(60)
def deliver(world: World, random: Random) -> None:
    """The next thing on a wire arrives, or a process goes on with its own work."""
    names = [*world.ready(), *(name for name, party in world.parties.items() if party.preparing or party.keeping)]
    if names:
        name = random.choice(names)
        if not world.actors[name].work() and world.wires[name]:
            touch(world, world.wires[name][0])
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
    if place := pick(world, random, "overtakes"):
        world.deliver(*place)


@move(3)
def delay(world: World, random: Random) -> None:
    """Something is held back until all that waits has arrived."""
    if place := pick(world, random, "is held back"):
        wire = world.wires[place[0]]
        wire.append(wire.pop(place[1]))


@move(3)
def drop(world: World, random: Random) -> None:
    """Something never arrives."""
    if place := pick(world, random, "is dropped"):
        name, index = place
        del world.wires[name][index]


@move(4)
def repeat(world: World, random: Random) -> None:
    """Something arrives twice, now or later."""
    if place := pick(world, random, "is repeated"):
        name, index = place
        wire = world.wires[name]
        wire.insert(random.randint(0, len(wire)), wire[index])


@move(6)
def alter(world: World, random: Random) -> None:
    """Something arrives changed: a bit, its length, its number, its position."""
    if place := pick(world, random, "is altered"):
        name, index = place
        world.wires[name][index] = altered(world.wires[name][index], random)


@move(4)
def swap(world: World, random: Random) -> None:
    """Two chunks take each other's places, in a table or between tables."""
    for name in random.sample(world.ready(), len(world.ready())):
        wire = world.wires[name]
        chunks = [(at, item) for at, item in enumerate(wire) if isinstance(item, Put | runtime.Chunk)]
        if len(chunks) > 1:
            (one, first), (two, second) = random.sample(chunks, 2)
            touch(world, first, f"changes places with another chunk, on its way to {name}")
            wire[one] = replace(first, stream=second.stream, index=second.index)
            wire[two] = replace(second, stream=first.stream, index=first.index)
            return


@move(6)
def replay(world: World, random: Random) -> None:
    """Something that was said to anybody, in any epoch, is said to somebody else."""
    say(world, random, random.choice(world.pool))


@move(2)
def replay_session(world: World, random: Random) -> None:
    """Something that the same people said in another session, over the same data, is said in this one."""
    other = world.another()
    if random.random() < 0.7:
        say(world, random, random.choice(other.pool))
        return
    (epoch, stream, index), box = random.choice(list(other.coordinator.kept.items()))
    if enclave := some(random, [e for e in world.enclaves if e.alive]):
        insert(world, random, enclave.name, runtime.Chunk(stream, index, box))
    insert(world, random, world.coordinator.name, Put(epoch, stream, index, box))


@move(4)
def sign_again(world: World, random: Random) -> None:
    """Somebody else's words under a key of the adversary's."""
    said = opened(random.choice(world.pool))
    say(world, random, random.choice(world.held()).sign(said.kind, said.payload))


@move(4)
def splice(world: World, random: Random) -> None:
    """One message with a field of another, under a key of the adversary's."""
    said, other = opened(random.choice(world.pool)), opened(random.choice(world.pool))
    fields, others = decode(said.payload), decode(other.payload)
    if shared := sorted(fields.keys() & others.keys()):
        name = random.choice(shared)
        say(world, random, random.choice(world.held()).sign(said.kind, encode({**fields, name: others[name]})))


# The coordinator.


@move(3)
def open_epoch(world: World, random: Random) -> None:
    """The coordinator calls for consents to any epoch, whomever it likes."""
    epoch = random.randint(0, world.contract.epochs_max + 1)
    for name in random.sample(list(world.parties), random.randint(1, len(world.parties))):
        insert(world, random, name, EpochOpened(epoch))
    world.launch(max(1, min(epoch, world.contract.epochs_max)))


@move(1)
def end_falsely(world: World, random: Random) -> None:
    """The coordinator says that it is over."""
    outcome = random.choice(("released", "aborted", "not heard", "enclave lost"))
    accused = (random.choice(list(world.parties)),)
    insert(world, random, random.choice(list(world.parties)), Ended(outcome, "a lie", accused))


@move(2)
def propose_again(world: World, random: Random) -> None:
    """A fresh contract on the same data, with the adversary's key for a partner's: to an enclave, and to a party."""
    people = list(world.contract.participants)
    place = random.randrange(len(people))
    people[place] = replace(people[place], key=world.stranger.public, sealing_key=world.strangers_opening.public)
    fresh = replace(world.contract, random=random.randbytes(32), participants=tuple(people))
    proposal = sign(world.author, fresh)
    world.launch(1, proposal=proposal)
    party = random.choice(list(world.parties.values()))
    if random.random() < 0.5:
        party.kill()
        party.start()
    world.wires[party.name].insert(0, Said(proposal))
    touch(world, Said(proposal), f"for other partners is handed to {party.name}")


# The host.


@move(3)
def call_dead(world: World, random: Random) -> None:
    """An enclave is said to be lost, and lives on."""
    if enclave := some(random, [e for e in world.enclaves if e.alive]):
        world.tell(f"the adversary: calls {enclave.name} dead, which is not")
        world.lost(enclave.epoch)


@move(3)
def launch_again(world: World, random: Random) -> None:
    """Another enclave of the agreed code, for any epoch, an older one too."""
    world.launch(random.randint(1, world.contract.epochs_max))


@move(3)
def launch_other(world: World, random: Random) -> None:
    """An enclave that is not the agreed one: other code, debug mode, or a contract of the adversary's."""
    epoch = random.randint(1, world.contract.epochs_max)
    kind = random.choice(("code", "debug", "contract"))
    world.tell(f"the adversary: starts an enclave {'in debug mode' if kind == 'debug' else f'with another {kind}'}")
    if kind == "code":
        world.launch(epoch, pcrs=OTHER_PCRS)
    elif kind == "debug":
        world.launch(epoch, debug=True)
    else:
        program = replace(world.contract.program, text="show everything")
        other = replace(world.contract, author=world.stranger.public, program=program)
        world.launch(epoch, proposal=sign(world.stranger, other))


@move(3)
def split(world: World, random: Random) -> None:
    """A second enclave gets the same consents, and some parties see it first."""
    session = world.coordinator.mailbox.session
    second = world.launch(session.epoch)
    for envelope in consents(world, session.epoch):
        world.wires[second.name].append(runtime.Message(envelope))
    before = len(world.pool)
    while second.alive and world.wires[second.name]:
        world.deliver(second.name)
    for envelope in world.pool[before:]:
        for name in random.sample(list(world.parties), random.randint(0, len(world.parties))):
            world.wires[name].insert(0, Said(envelope))
            touch(world, Said(envelope), f"is handed to {name}")


@move(3)
def feed(world: World, random: Random) -> None:
    """Any enclave that lives gets all seals and chunks that there are, whatever epoch they are for."""
    if enclave := some(random, [e for e in world.enclaves if e.alive]):
        wire = world.wires[enclave.name]
        chunks = [runtime.Chunk(stream, index, box) for (_, stream, index), box in world.coordinator.kept.items()]
        wire += [runtime.Message(envelope) for envelope in world.said("seal")]
        wire += random.sample(chunks, min(len(chunks), 20))
        world.touch("seal")
        world.tell(f"the adversary: hands all seals and {min(len(chunks), 20)} chunks to {enclave.name}")


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
    world.tell(f"{actor.name} is cut off" if actor.silent else f"{actor.name} is reached again")


@move(1)
def skew(world: World, random: Random) -> None:
    """Somebody's clock is wrong."""
    actor = random.choice(list(world.actors.values()))
    actor.skew_ms = random.randint(-SKEW_MS, SKEW_MS)
    world.tell(f"the clock of {actor.name} is wrong by {actor.skew_ms} ms")


@move(3)
def wait(world: World, random: Random) -> None:
    """Time passes; now and then it is nearly up."""
    left = world.contract.deadlines.release_ms - world.now_ms
    passes = random.choice((1_000, 20_000, max(0, left - 1_000)))
    world.tell(f"{passes} ms pass")
    world.advance(passes)


@move(1)
def slow(world: World, random: Random) -> None:
    """The joint program takes its time."""
    world.compute_ms = random.choice((0, 10_000, world.contract.deadlines.release_ms - START_MS + 1))
    world.tell(f"the program will take {world.compute_ms} ms")


@move(2)
def post_stored(world: World, random: Random) -> None:
    """A stored chunk is put again, at any place and in any epoch."""
    if world.coordinator.kept:
        (epoch, stream, index), box = random.choice(list(world.coordinator.kept.items()))
        put = Put(random.choice((epoch, epoch + 1)), stream + random.choice((0, 0, 1)), index, box)
        insert(world, random, world.coordinator.name, put)
        if envelopes := world.said("seal"):
            insert(world, random, world.coordinator.name, Post(random.choice(envelopes)))
