"""Attacks with several enclaves, with documents, and on a party's word, played in the world; none may succeed."""

from dataclasses import replace

import pytest

from enclave_runtime import enclave as runtime
from enclave_runtime.nsm import Nsm
from mpc.coordinator.mailbox import Post
from mpc.fuzz.actors import Put
from mpc.fuzz.facts import Computing, Released, Spoke
from mpc.fuzz.infrastructure import EnclaveActor
from mpc.fuzz.invariants import check
from mpc.fuzz.moves import come_with_other_data, other_root
from mpc.fuzz.participants import PartyActor
from mpc.fuzz.world import OTHER_PCRS, PCRS, START_MS, Setting, World
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.protocol.encoding import decode
from mpc.protocol.messages import (
    Abort,
    Attestation,
    Consent,
    Seal,
    roster_digest,
    sign,
)
from mpc.protocol.rounds import Round
from mpc.protocol.signing import open_signed
from mpc.transport import Ended, EpochOpened, Said
from parties.party import Consented, Sealed

TWO = Setting(parties=2, corrupt=frozenset({"party-1"}))


def rest_of(world: World, enclave: EnclaveActor) -> None:
    """What lies on the wire to an enclave arrives."""
    while world.wires[enclave.name]:
        world.deliver(enclave.name)


def sealed_epochs(party: PartyActor) -> list[int]:
    return [memory.epoch for memory in party.ledger if isinstance(memory, Sealed)]


def attested(world: World, number: int = 0) -> EnclaveActor:
    """The enclave of that number, as soon as it has shown itself."""
    world.until(lambda: len(world.enclaves) > number and world.enclaves[number].binding)
    return world.enclaves[number]


def hand(world: World, name: str, *entries: Said | EpochOpened | Ended) -> None:
    """The coordinator shows these entries to somebody, who then goes on with its own work."""
    world.wires[name].clear()
    for entry in entries:
        world.actors[name].receive(entry)
        world.actors[name].work()
    check(world)


# Several enclaves.


def test_rewind_a_partner_cannot_enter_other_data_in_a_second_epoch() -> None:
    """The host keeps epoch 1's enclave alive, says that it died, and the partner comes with other data."""
    world = World(11, TWO)
    honest, partner = world.parties["party-0"], world.parties["party-1"]
    attested(world)
    partner.silent = True  # has not sealed yet
    world.until(lambda: sealed_epochs(honest) == [1])
    world.lost(1)
    world.until(lambda: len(world.enclaves) == 2)
    partner.silent = False
    come_with_other_data(world.parties["party-1"])
    world.until(lambda: honest.ending)
    assert sealed_epochs(honest) == [1]
    assert honest.ending is not None
    assert "input is not the one" in honest.ending.why
    (abort,) = [fact.message for fact in world.of(Spoke) if fact.name == "party-0" and isinstance(fact.message, Abort)]
    assert abort.reason == "commitments"
    assert world.enclaves[0].alive
    assert not world.of(Computing)


def test_rewind_is_refused_also_by_a_party_that_has_crashed_since() -> None:
    world = World(11, TWO)
    honest = world.parties["party-0"]
    world.until(lambda: sealed_epochs(honest) == [1])
    world.lost(1)
    world.until(lambda: len(world.enclaves) == 2)
    honest.kill()
    come_with_other_data(world.parties["party-1"])
    honest.start()
    world.until(lambda: honest.ending)
    assert sealed_epochs(honest) == [1]


def test_two_epochs_with_the_same_inputs_may_both_release_the_same() -> None:
    world = World(12, TWO)
    world.until(lambda: all(sealed_epochs(party) == [1] for party in world.parties.values()))
    first = world.enclaves[0]
    held = [replace(item) for item in world.wires["coordinator"]]  # the host will pipe them to the first one later
    world.lost(1)
    world.rest()
    for envelope in world.said("seal"):
        first.receive(runtime.Message(envelope))
    for item in held:
        if isinstance(item, Put):
            first.receive(runtime.Chunk(item.stream, item.index, item.box))
    check(world)
    assert {fact.enclave.name for fact in world.of(Released)} == {"enclave-0", "enclave-1"}


def test_split_view_no_enclave_computes_with_half_of_the_parties() -> None:
    world = World(13, Setting(parties=2))
    left, right = attested(world), world.launch(1)
    rest_of(world, right)
    for envelope in world.said("consent"):
        right.receive(runtime.Message(envelope))
    assert right.binding is not None
    assert right.binding != left.binding
    shown = {opened.signer: envelope for envelope in world.said("attestation") if (opened := open_signed(envelope))}
    world.wires["coordinator"].clear()
    log = [Said(world.proposal), *(Said(envelope) for envelope in world.said("consent"))]
    for name, enclave in (("party-0", left), ("party-1", right)):
        assert enclave.binding is not None
        world.parties[name].kill()
        world.parties[name].start()
        hand(world, name, *log, Said(shown[enclave.binding.signing_key]))
        assert sealed_epochs(world.parties[name]) == [1]
    for enclave in (left, right):
        for envelope in world.said("seal"):
            enclave.receive(runtime.Message(envelope))
        for item in [item for item in world.wires["coordinator"] if isinstance(item, Put)]:
            enclave.receive(runtime.Chunk(item.stream, item.index, item.box))
        assert world.refused(enclave.name, "binding differs")
    check(world)
    assert not world.of(Computing)


@pytest.mark.parametrize("crash", [False, True])
def test_a_second_binding_in_one_epoch_is_refused(crash: bool) -> None:
    world = World(14, TWO)
    honest = world.parties["party-0"]
    world.until(lambda: sealed_epochs(honest) == [1])
    other = world.launch(1)
    for envelope in world.said("consent"):
        other.receive(runtime.Message(envelope))
    second = world.said("attestation")[-1]
    log = list(world.coordinator.log)
    if crash:
        honest.kill()
        honest.start()
        hand(world, honest.name, *(entry for entry in log if open_signed(entry.envelope).kind == "contract"))  # type: ignore[union-attr]
    hand(world, honest.name, Said(second))
    assert sealed_epochs(honest) == [1]
    seals = {Seal.decode(open_signed(envelope).payload).binding for envelope in world.said("seal")}
    assert world.enclaves[0].binding is not None
    assert seals == {world.enclaves[0].binding.digest}


# Documents.


@pytest.mark.parametrize("trick", ["other code", "debug", "other root", "stolen", "of the epoch before", "old clock"])
def test_no_other_document_makes_a_party_seal(trick: str) -> None:
    world = World(15, TWO)
    genuine = attested(world)
    world.wires["coordinator"].clear()
    (envelope,) = world.said("attestation")
    consents = world.said("consent")
    assert genuine.binding is not None
    binding = replace(genuine.binding, sealing_key=world.strangers_opening.public, signing_key=world.stranger.public)
    fields = {"user_data": binding.digest, "nonce": roster_digest(consents), "public_key": binding.signing_key}

    def document(pcrs: dict[int, bytes] = PCRS, **how: object) -> bytes:
        machine = SimulatedNsm(how.pop("root", world.root), pcrs, **{"clock_ms": lambda: world.now_ms, **how})  # type: ignore[arg-type]
        nsm = Nsm(machine.handle)
        nsm.extend_pcr(runtime.CONTRACT_PCR, world.contract.digest)
        nsm.lock_pcr(runtime.CONTRACT_PCR)
        return nsm.attest(**fields)

    if trick == "of the epoch before":
        world.kill_enclave(genuine)
        world.until(lambda: isinstance(one := world.parties["party-0"].ledger[-1], Consented) and one.epoch == 2)
        forged = envelope
    else:
        made = {
            "other code": lambda: document(OTHER_PCRS),
            "debug": lambda: document(debug=True),
            "other root": lambda: document(root=other_root()),
            "stolen": lambda: decode(open_signed(envelope).payload)["document"],
            "old clock": lambda: document(OTHER_PCRS, clock_ms=lambda: START_MS - 3_600_000),
        }[trick]()
        shown = Attestation(world.contract.digest, 1, tuple(consents), binding.sealing_key, made)
        forged = sign(world.stranger, shown)
    hand(world, "party-0", *map(Said, consents), Said(forged))
    assert 1 not in sealed_epochs(world.parties["party-0"])
    assert world.refused("party-0", "attestation") or world.endings()["party-0"][0] is False


# A party's word.


def test_a_lost_ledger_signs_nothing_more() -> None:
    world = World(16, Setting(parties=2))
    party = world.parties["party-0"]
    world.until(lambda: sealed_epochs(party) == [1])
    world.until(lambda: len(world.said("seal")) == 2 and not world.ready())
    spoken = len(world.of(Spoke))
    party.kill()
    party.ledger.clear()
    party.start()
    world.fair()
    assert party.ending is not None
    assert "ledger is lost" in party.ending.why
    assert "party-0" not in [fact.name for fact in world.of(Spoke)[spoken:]]


def test_a_ledger_restored_from_an_old_copy_signs_nothing_more() -> None:
    world = World(17, Setting(parties=2))
    party = world.parties["party-0"]
    world.until(lambda: party.ledger)
    copy = list(party.ledger)
    world.until(lambda: sealed_epochs(party) == [1] and world.said("seal"))
    world.kill_enclave(world.enclaves[0])
    world.until(lambda: len(party.ledger) > len(copy) + 2 and not world.ready())
    party.kill()
    party.ledger[:] = copy
    party.start()
    world.until(lambda: party.ending)
    assert party.ending is not None
    assert "old copy" in party.ending.why


def test_a_party_consents_to_no_epoch_below_one_it_consented_to() -> None:
    world = World(18, Setting(parties=2))
    attested(world)
    world.kill_enclave(world.enclaves[0])
    party = world.parties["party-0"]
    world.until(lambda: [one.epoch for one in party.ledger if isinstance(one, Consented)] == [1, 2])
    stale, consents, sealed = world.said("attestation")[0], len(world.said("consent")), sealed_epochs(party)
    for restart in (False, True):
        if restart:
            party.kill()
            party.start()
            hand(world, "party-0", Said(world.proposal))
        hand(world, "party-0", EpochOpened(1), Said(stale))
    fresh = [one for one in world.said("consent")[consents:] if decode(open_signed(one).payload)["epoch"] == 1]
    assert not fresh
    assert sealed_epochs(party) == sealed
    assert world.refused("party-0", "epoch")


def test_a_party_serves_only_the_contract_that_it_was_invited_to() -> None:
    """Else its memory of another contract would be missing, and its promises there forgotten."""
    world = World(19, Setting(parties=2))
    other = replace(world.contract, random=bytes(32))
    world.parties["party-0"].kill()
    world.parties["party-0"].start()
    hand(world, "party-0", Said(sign(world.author, other)))
    assert world.refused("party-0", "contract")
    assert world.parties["party-0"].ledger == []


def test_nothing_is_signed_after_a_release() -> None:
    world = World(20, Setting(parties=2))
    party = world.parties["party-0"]
    world.until(lambda: party.keeping)
    hand(world, "party-0", EpochOpened(2), Ended("aborted", "a lie"))
    world.fair()
    assert party.ending is not None
    assert party.ending.released
    spoken = [type(fact.message) for fact in world.of(Spoke) if fact.name == "party-0"]
    assert spoken.count(Consent) == 1


def test_a_session_that_has_released_cannot_be_aborted() -> None:
    world = World(21, TWO)
    world.until(lambda: world.coordinator.mailbox.session.round is Round.CLOSE)
    abort = Abort(world.contract.digest, 1, "withdrawn")
    world.wires["coordinator"].insert(0, Post(sign(world.keys["party-1"].signing, abort)))
    world.fair()
    assert world.refused("coordinator", "abort in round close")
    assert world.endings()["party-0"] == (True, "released")
