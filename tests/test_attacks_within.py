"""Attacks by inputs, clocks, approvals and crafted messages, played in the world; none may succeed."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from enclave_runtime import enclave as runtime
from mpc.coordinator.mailbox import Post
from mpc.fuzz.actors import Put
from mpc.fuzz.facts import Computing, EnclaveSpoke, Released
from mpc.fuzz.infrastructure import EnclaveActor
from mpc.fuzz.invariants import check
from mpc.fuzz.jobs import AGAINST_RULE, NOT_OF_SCHEMA
from mpc.fuzz.participants import PartyActor
from mpc.fuzz.world import CONSENT_MS, RELEASE_MS, SEAL_MS, START_MS, Setting, World
from mpc.protocol.encoding import decode
from mpc.protocol.errors import PeerError
from mpc.protocol.messages import (
    Abort,
    Acknowledgement,
    Attestation,
    Decision,
    Release,
    Seal,
    Wrapped,
    sign,
)
from mpc.protocol.rounds import Round, Session
from mpc.protocol.sealing import ChunkCipher, StreamSecret, chunk_count, cut, table_context
from mpc.protocol.signing import open_signed
from mpc.transport import Ended, EpochOpened, Said
from parties.party import Heard, Sealed

TWO = Setting(parties=2, corrupt=frozenset({"party-1"}))


def attested(world: World, number: int = 0) -> EnclaveActor:
    """The enclave of that number, as soon as it has shown itself."""
    world.until(lambda: len(world.enclaves) > number and world.enclaves[number].binding)
    return world.enclaves[number]


def sealed_epochs(party: PartyActor) -> list[int]:
    return [memory.epoch for memory in party.ledger if isinstance(memory, Sealed)]


def hand(world: World, name: str, *entries: Said | EpochOpened | Ended) -> None:
    """The coordinator shows these entries to somebody, who then goes on with its own work."""
    world.wires[name].clear()
    for entry in entries:
        world.actors[name].receive(entry)
        world.actors[name].work()
    check(world)


# Inputs.


def seal_something(world: World, lie: str) -> None:
    """The corrupt party seals, in its own name, what it did not commit to."""
    partner, enclave = world.parties["party-1"], world.enclaves[0]
    committed = next(memory for memory in partner.ledger if hasattr(memory, "salt"))
    assert enclave.binding is not None
    ((stream, table),) = partner.tables.items()
    table = b"something else" if lie == "other data" else table
    salt = bytes(32) if lie == "other salt" else committed.salt
    length = len(table) + {"longer": 1 << 42, "one byte longer": 1}.get(lie, 0)
    secret = StreamSecret(bytes(32), salt, length)
    context = table_context(enclave.binding.digest, world.keys["party-1"].signing.public, "rows")
    wrapped = world.parties["party-0"].cryptography.wrap(
        secret.encode(), enclave.binding.sealing_key, b"" if lie == "other context" else context
    )
    count = 2 if lie == "more chunks" else chunk_count(len(table))
    seal = Seal(enclave.binding.digest, (Wrapped(stream, wrapped, count),))
    world.post(partner, sign(partner.keys.signing, seal))
    for index, chunk in enumerate(cut(table)):
        world.put(Put(1, stream, index, ChunkCipher(secret).seal(chunk, index)))


@pytest.mark.parametrize(
    "lie", ["other data", "other salt", "one byte longer", "longer", "more chunks", "other context"]
)
def test_an_input_that_contradicts_its_owners_word_is_blamed_with_proof(lie: str) -> None:
    world = World(22, TWO)
    attested(world)
    partner = world.parties["party-1"]
    partner.kill()
    seal_something(world, lie)
    world.until(lambda: world.parties["party-0"].ending)
    (abort,) = [fact.message for fact in world.of(EnclaveSpoke) if isinstance(fact.message, Abort)]
    assert (abort.reason, abort.blamed) == ("input", "party-1")
    assert "proven against party-1" in world.endings()["party-0"][1]
    assert not world.of(Computing)


@pytest.mark.parametrize(("form", "blamed"), [(NOT_OF_SCHEMA, "party-1"), (AGAINST_RULE, None)])
def test_the_programs_verdict_ends_the_session(form: str, blamed: str | None) -> None:
    world = World(23, TWO)
    partner = world.parties["party-1"]
    partner.tables = world.draw_tables("party-1", form)
    partner.spooled = partner.spool()
    world.fair()
    (abort,) = [fact.message for fact in world.of(EnclaveSpoke) if isinstance(fact.message, Abort)]
    assert abort.blamed == blamed
    assert not world.of(Released)


def test_nobody_but_the_enclave_can_blame() -> None:
    world = World(24, TWO)
    attested(world)
    for key in (world.keys["party-1"].signing, world.stranger):
        abort = Abort(world.contract.digest, 1, "input", "party-0")
        hand(world, "party-0", Said(sign(key, abort)))
    assert world.parties["party-0"].ending is None
    assert world.refused("party-0", "blame")


Chunks = list[runtime.Chunk]


def _swapped(chunks: Chunks) -> Chunks:
    """Two chunks of one table change places."""
    first, second = sorted((chunk for chunk in chunks if chunk.stream == 0 and chunk.index < 2), key=lambda c: c.index)
    return [replace(first, index=1), replace(second, index=0)]


def _flipped(chunks: Chunks) -> Chunks:
    box = bytes(chunks[0].box)
    return [replace(chunks[0], box=bytes([box[0] ^ 1]) + box[1:])]


@pytest.mark.parametrize(
    "change",
    [
        _swapped,
        _flipped,
        lambda chunks: [replace(chunks[0], box=chunks[0].box[:-1])],
        lambda chunks: [replace(chunks[0], box=bytes(chunks[0].box) + b"\0")],
        lambda chunks: [replace(chunks[0], index=3)],
        lambda chunks: [replace(chunks[0], stream=2)],
        lambda chunks: [replace(next(c for c in chunks if c.stream == 1), stream=2)],
        lambda chunks: [replace(next(c for c in chunks if c.stream == 2), stream=1)],
    ],
    ids=["swapped", "flipped", "truncated", "longer", "beyond the end", "other table", "other owner", "other owner 2"],
)
def test_a_chunk_that_was_touched_does_not_open(change: Callable[[Chunks], Chunks]) -> None:
    world = World(25, Setting(parties=2, wide=True, long=True))
    enclave = attested(world)
    enclave.silent = True
    world.rest()
    enclave.silent = False
    wire = world.wires[enclave.name]
    chunks = [item for item in wire if isinstance(item, runtime.Chunk)]
    wire[:] = [item for item in wire if not isinstance(item, runtime.Chunk)]
    world.rest()
    before = len(world.story)
    for chunk in change(chunks):
        enclave.receive(chunk)
    assert len(world.story) > before
    assert all("refuses chunk" in line for line in world.story[before:])
    for chunk in reversed(chunks):  # the right ones, in any order, still complete the inputs
        enclave.receive(chunk)
    world.fair()
    assert {got for got, _ in world.endings().values()} == {True}


# Time. The enclave's clock is its security module's.


def test_an_enclave_that_was_parked_until_after_consent_shows_nothing() -> None:
    world = World(26, Setting(parties=2))
    world.until(lambda: len(world.said("consent")) == 2)
    world.now_ms = START_MS + CONSENT_MS + 1
    for envelope in world.said("consent"):
        world.enclaves[0].receive(runtime.Begin(world.proposal, 1)) if not world.enclaves[0].touched else None
        world.enclaves[0].receive(runtime.Message(envelope))
    assert world.said("attestation") == []
    assert world.enclaves[0].closed


def test_a_parked_enclave_that_gets_its_last_input_late_computes_nothing() -> None:
    world = World(27, Setting(parties=2))
    enclave = attested(world)
    world.until(lambda: len(world.said("seal")) == 2)
    world.now_ms = START_MS + SEAL_MS + 1
    world.rest()
    (abort,) = [fact.message for fact in world.of(EnclaveSpoke) if isinstance(fact.message, Abort)]
    assert (abort.reason, abort.blamed) == ("late", None)
    assert enclave.closed
    assert not world.of(Computing)


@pytest.mark.parametrize("quorum", [0, 1])
def test_nothing_is_released_after_the_deadline(quorum: int) -> None:
    world = World(28, Setting(parties=2, approvers=quorum, quorum=quorum))
    if quorum:
        world.until(lambda: world.said("decision"))
        world.now_ms = START_MS + RELEASE_MS + 1
    else:
        world.compute_ms = RELEASE_MS + 1
    world.rest()
    reasons = [fact.message.reason for fact in world.of(EnclaveSpoke) if isinstance(fact.message, Abort)]
    assert reasons == ["late"]
    assert not world.of(Released)


@pytest.mark.parametrize(
    ("skew_ms", "happens"), [(-120_000, "is from the future"), (400_000, "too old|deadline for sealing|not heard")]
)
def test_a_party_whose_clock_is_wrong_seals_nothing(skew_ms: int, happens: str) -> None:
    world = World(29, Setting(parties=2))
    party = world.parties["party-0"]
    world.until(lambda: len(world.said("consent")) == 2)
    party.skew_ms = skew_ms
    world.rest()
    world.settle()
    assert sealed_epochs(party) == []
    why = world.endings()["party-0"][1] if party.ending else ""
    assert re.search(happens, "\n".join([*world.story, why])), why


def test_everybody_ends_when_the_coordinator_falls_silent() -> None:
    for steps in range(0, 70, 7):
        world = World(30, Setting(parties=2, receivers=1, approvers=1, quorum=1))
        for _ in range(steps):
            world.fair_step()
        for name in world.wires:
            world.wires[name].clear()
        world.settle()
        for name, party in world.parties.items():
            assert party.ending is not None or not party.knows_contract, (steps, name)


# Approvals.


@pytest.mark.parametrize(
    "who", ["party", "stranger", "the same approver twice", "of another summary", "of another enclave"]
)
def test_only_the_quorum_of_distinct_approvers_releases(who: str) -> None:
    world = World(31, Setting(parties=2, approvers=3, quorum=2, corrupt=frozenset({"approver-0", "party-1"})))
    for approver in world.approvers.values():
        approver.silent = True
    world.until(lambda: world.said("computed"))
    world.rest()
    computed = decode(open_signed(world.said("computed")[0]).payload)
    yes = Decision(computed["binding"], computed["summary"])
    key, enclave = world.keys["approver-0"].signing, world.enclaves[0]
    enclave.receive(runtime.Message(sign(key, yes)))
    forged = {
        "party": sign(world.keys["party-1"].signing, yes),
        "stranger": sign(world.stranger, yes),
        "the same approver twice": sign(key, yes),
        "of another summary": sign(world.keys["approver-1"].signing, replace(yes, summary=bytes(48))),
        "of another enclave": sign(world.keys["approver-1"].signing, replace(yes, binding=bytes(48))),
    }[who]
    enclave.receive(runtime.Message(forged))
    check(world)
    assert not world.of(Released)
    enclave.receive(runtime.Message(sign(world.keys["approver-1"].signing, yes)))
    assert world.of(Released)


def test_one_no_of_an_approver_ends_the_session() -> None:
    world = World(32, Setting(parties=2, approvers=3, quorum=1))
    for approver in world.approvers.values():
        approver.silent = True
    world.until(lambda: world.said("computed"))
    no = Abort(world.contract.digest, 1, "rejected")
    world.post(world.approvers["approver-2"], sign(world.keys["approver-2"].signing, no))
    world.fair()
    assert world.endings()["party-0"][1].startswith("approver-2 ended the session: rejected")
    assert not world.of(Released)
    assert world.enclaves[0].closed


# Messages that are made to hurt.


def test_an_enclave_refuses_the_word_of_another_enclave() -> None:
    """Else a host could bind it to keys that it does not have."""
    world = World(33, Setting(parties=2))
    world.until(lambda: len(world.said("consent")) == 2)
    consents = tuple(world.said("consent"))
    foreign = Attestation(world.contract.digest, 1, consents, world.strangers_opening.public, b"document")
    victim = world.launch(1)
    world.wires[victim.name].clear()
    victim.receive(runtime.Begin(world.proposal, 1))
    victim.receive(runtime.Message(sign(world.stranger, foreign)))
    assert world.refused(victim.name, "did not say")
    for envelope in consents:
        victim.receive(runtime.Message(envelope))
    assert victim.binding is not None


def test_attestations_within_attestations_are_refused_not_recursed_into() -> None:
    world = World(34, Setting(parties=2))
    session = Session.propose(world.proposal)
    nested = sign(world.stranger, Attestation(world.contract.digest, 1, (), bytes(1216), b"d"))
    for _ in range(350):
        shown = Attestation(world.contract.digest, 1, (nested,), bytes(1216), b"d")
        nested = sign(world.stranger, shown)
    with pytest.raises(PeerError, match="roster: expected consents"):
        session.hear(nested)


def test_an_acknowledgement_names_the_receipt_that_was_released() -> None:
    world = World(35, TWO)
    world.until(lambda: world.coordinator.mailbox.session.round is Round.CLOSE)
    release = Release.decode(open_signed(world.said("release")[0]).payload)
    wrong = Acknowledgement(release.receipt.binding, bytes(48))
    world.wires["coordinator"].insert(0, Post(sign(world.keys["party-1"].signing, wrong)))
    world.fair_step()
    world.fair()
    assert world.refused("coordinator", "receipt differs")


def test_a_party_that_sees_its_own_forgotten_abort_stops() -> None:
    world = World(36, Setting(parties=2))
    attested(world)
    party = world.parties["party-0"]
    abort = Abort(world.contract.digest, 1, "withdrawn")
    hand(world, "party-0", Said(sign(party.keys.signing, abort)))
    assert party.ending is not None
    assert sealed_epochs(party) == []


def test_a_log_may_begin_with_anything() -> None:
    world = World(37, Setting(parties=1))
    party = world.parties["party-0"]
    for entry in (EpochOpened(1), Ended("released"), Said(b""), Said(sign(world.stranger, world.contract))):
        with pytest.raises(PeerError):
            party.machine.handle(Heard(entry), world.now_ms)
    world.fair()
    assert world.endings()["party-0"] == (True, "released")
