"""Moves of corrupt participants, and of whoever pretends to be one or to be the enclave."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import get_args

from enclave_runtime import enclave as runtime
from enclave_runtime.nsm import Nsm
from mpc.fuzz.facts import opened
from mpc.fuzz.jobs import AGAINST_RULE, NOT_OF_SCHEMA
from mpc.fuzz.means import (
    begin_again,
    come_with_other_data,
    consents,
    corrupt_party,
    epoch_of,
    insert,
    move,
    other_root,
    say,
    some,
    touch,
)
from mpc.fuzz.world import OTHER_PCRS, PCRS, World
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.protocol.encoding import decode
from mpc.protocol.messages import Abort, Attestation, Binding, Consent, Decision, Reason, Seal, Wrapped, sign
from mpc.protocol.messages import roster_digest as digest_of_roster
from mpc.protocol.sealing import WRAPPED_BYTES, Cryptography, StreamSecret, chunk_count, table_context
from mpc.transport import Said

ENVELOPES_MAX, STREAMS_MAX = 4000, 1000  # what a message may carry at most


@move(3)
def change_input(world: World, random: Random) -> None:
    """A corrupt party forgets what it committed to and comes with other data, or with data that it may not send."""
    if corrupt := corrupt_party(world, random):
        form = random.choice(("", "", NOT_OF_SCHEMA, AGAINST_RULE))
        world.tell(f"the adversary: {corrupt.name} comes with other data {form}".rstrip())
        come_with_other_data(corrupt, form)


@move(2)
def lie_about_input(world: World, random: Random) -> None:
    """A corrupt party commits to a digest or a length that its data do not have."""
    if corrupt := corrupt_party(world, random):
        world.tell(f"the adversary: {corrupt.name} lies about its data")
        begin_again(corrupt)
        lies = [replace(table, tree=random.randbytes(48)) for table in corrupt.spooled]
        if random.random() < 0.5:
            lies = [replace(table, length=random.choice((0, table.length + 1, 1 << 33))) for table in corrupt.spooled]
        corrupt.spooled = tuple(lies)


@move(3)
def lie_in_seal(world: World, random: Random) -> None:
    """A corrupt party seals to an enclave what it did not commit to."""
    corrupt, enclave = corrupt_party(world, random), some(random, [e for e in world.enclaves if e.binding])
    if corrupt is None or enclave is None or not corrupt.tables:
        return
    binding, streams = enclave.binding, []
    assert binding is not None
    for stream, table in corrupt.tables.items():
        secret = StreamSecret(random.randbytes(32), random.randbytes(32), len(table) + random.choice((0, 1, 1 << 40)))
        context = table_context(binding.digest, corrupt.keys.signing.public, world.contract.tables[stream].name)
        wrapped = Cryptography().wrap(secret.encode(), binding.sealing_key, random.choice((context, b"")))
        streams.append(Wrapped(stream, wrapped, random.choice((chunk_count(len(table)), 1, 3))))
    say(world, random, sign(corrupt.keys.signing, Seal(binding.digest, tuple(streams))))


@move(2)
def forge_consent(world: World, random: Random) -> None:
    """A consent by a key of the adversary's, perhaps a second one."""
    epoch = epoch_of(world, random)
    said = Consent(world.contract.digest, epoch, random.randbytes(32), random.randbytes(48))
    say(world, random, sign(random.choice(world.held()), said))


@move(2)
def forge_abort(world: World, random: Random) -> None:
    """An abort by a key of the adversary's, and perhaps it blames somebody."""
    blamed = random.choice((None, *world.keys))
    reason: Reason = random.choice(get_args(Reason))
    said = Abort(world.contract.digest, epoch_of(world, random), reason, blamed)
    say(world, random, sign(random.choice(world.held()), said))


@move(3)
def forge_decision(world: World, random: Random) -> None:
    """An approval of what some enclave computed, by a key of the adversary's; often straight to the enclave."""
    computed = [opened(envelope) for envelope in world.said("computed")]
    if said := some(random, computed):
        fields = decode(said.payload)
        decision = Decision(fields["binding"], random.choice((fields["summary"], random.randbytes(48))))
        forged, alive = sign(random.choice(world.held()), decision), [e.name for e in world.enclaves if e.alive]
        if alive and random.random() < 0.5:
            insert(world, random, random.choice(alive), runtime.Message(forged))
        else:
            say(world, random, forged)


@move(2)
def repeat_approval(world: World, random: Random) -> None:
    """One approval arrives at an enclave several times, and once more for something else."""
    decision, enclave = some(random, world.said("decision")), some(random, [e for e in world.enclaves if e.alive])
    if decision is None or enclave is None:
        return
    for _ in range(3):
        insert(world, random, enclave.name, runtime.Message(decision))
    fields = decode(opened(decision).payload)
    other = Decision(fields["binding"], random.randbytes(48))
    insert(world, random, enclave.name, runtime.Message(sign(random.choice(world.held()), other)))


@move(0.2)  # slow
def largest(world: World, random: Random) -> None:
    """The largest message that the limits allow, under a key of the adversary's."""
    epoch, key = epoch_of(world, random), random.choice(world.held())
    if random.random() < 0.5 and (binding := some(random, [e.binding for e in world.enclaves if e.binding])):
        wrapped = tuple(Wrapped(stream, bytes(WRAPPED_BYTES), 1) for stream in range(STREAMS_MAX))
        say(world, random, sign(key, Seal(binding.digest, wrapped)))
    elif found := consents(world, epoch):
        roster = tuple((found * ENVELOPES_MAX)[:ENVELOPES_MAX])
        shown = Attestation(world.contract.digest, epoch, roster, world.strangers_opening.public, bytes(1 << 15))
        say(world, random, sign(world.stranger, shown))


@move(4)
def forge_attestation(world: World, random: Random) -> None:
    """The adversary shows itself as the enclave: its own keys, and the best document that it can get."""
    epoch = epoch_of(world, random)
    signer = world.stranger  # no participant: those may not speak for an enclave
    heard = consents(world, epoch)
    roster = digest_of_roster(heard)
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
    said = sign(
        signer, Attestation(world.contract.digest, epoch, tuple(heard), world.strangers_opening.public, document)
    )
    world.tell(f"the adversary: shows itself as the enclave of epoch {epoch}, its document: {source}")
    say(world, random, said)
    for name in random.sample(list(world.parties), random.randint(0, len(world.parties))):
        world.wires[name].insert(0, Said(said))
        touch(world, Said(said), f"is handed to {name}")
