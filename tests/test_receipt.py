"""A receipt is accepted whole, and refused for each thing in it that is not as it was, by the step that says so."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from hashlib import sha384
from random import Random
from typing import Any

import pytest
from receipt_maker import KEYS, NOW_MS, PCRS, Machine, Story, contract, policy, resigned, root, seed

from mpc.attestation import AppraisalPolicy
from mpc.fuzz.world import Setting, World
from mpc.protocol import contract as terms
from mpc.protocol.errors import AppraisalError, MpcError, PeerError, SignatureError
from mpc.protocol.messages import KINDS, Abort, Consent, Release, sign
from mpc.protocol.signing import open_signed
from mpc.receipt import Account, utc, verify_receipt

OTHER = sha384(b"other").digest()


def refused(envelope: bytes, step: str, mine: AppraisalPolicy | None = None) -> PeerError:
    """It is refused at that step."""
    with pytest.raises(PeerError) as caught:
        verify_receipt(envelope, mine)
    assert str(caught.value.step).split(",")[0] == step, caught.value
    return caught.value


@pytest.fixture(scope="module")
def whole() -> bytes:
    return Story().release()


def test_a_whole_receipt_is_accepted_and_told(whole: bytes) -> None:
    account = verify_receipt(whole, policy())
    agreed = contract()
    assert (account.name, account.contract, account.title) == ("wages", agreed.digest, "Who is paid what?")
    assert [party.name for party in account.parties] == ["north", "south"]
    assert [party.commitment for party in account.parties] == [sha384(n).digest() for n in (b"north", b"south")]
    assert (account.attested_ms, account.released_ms) == (NOW_MS + 10_000, NOW_MS + 50_000)
    assert (account.measurement, dict(account.pcrs), account.root) == ("mine", PCRS, root().fingerprint)
    assert [(t.owner, t.rule, t.k, t.entity, t.chunks) for t in account.tables] == [
        ("north", "aggregate", 10, ("id",), 2),
        ("south", "aggregate", 10, ("id",), 2),
    ]
    assert [(result.recipient, result.chunks) for result in account.results] == [("north", 1), ("south", 1)]
    assert account.approved_by == ("auditor",)
    assert account.simulated
    assert account.own_policy
    assert any("auditor approved" in sentence for sentence in account.proves)


def test_what_it_does_not_prove_depends_on_root_and_policy(whole: bytes) -> None:
    alone = verify_receipt(whole, None)
    assert not alone.own_policy
    assert alone.measurement == "agreed"
    assert any("the contract's signers agreed to" in sentence for sentence in alone.does_not_prove)
    assert alone.does_not_prove[0].startswith("SIMULATED")
    assert not any("signers agreed to" in sentence for sentence in verify_receipt(whole, policy()).does_not_prove)
    honest = contract().enclave
    unmarked = Story(contract(enclave=replace(honest, simulated=False))).release()
    assert "AWS vouches" in verify_receipt(unmarked, None).does_not_prove[0]


@pytest.mark.parametrize("setting", [Setting(parties=1), Setting(parties=3, approvers=3, quorum=2, wide=True)])
def test_the_machines_own_receipts_are_accepted(setting: Setting) -> None:
    world = World(7, setting)
    world.fair()
    (envelope,) = {envelope for envelope in world.pool if open_signed(envelope).kind == "release"}
    account = verify_receipt(envelope, world.policy)
    assert account.contract == world.contract.digest
    assert len(account.tables) == len(world.contract.tables)
    assert len(account.approved_by) == setting.quorum


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_any_flipped_bit_is_refused(whole: bytes) -> None:
    random = Random(1)
    for _ in range(150):
        with pytest.raises(PeerError) as caught:
            verify_receipt(flipped(whole, random.randrange(len(whole))), None)
        assert caught.value.step == "R1"


@pytest.mark.parametrize(
    "broken",
    [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole + b"\0",
        lambda whole: b"\xd2" + whole,  # tagged
        lambda whole: b"\xff" * 100,
        lambda whole: sign(KEYS["author"], contract()),
        lambda whole: sign(KEYS["enclave"], Abort(OTHER, 1, "late")),
        lambda whole: KEYS["enclave"].sign("release", open_signed(whole).payload[:-1]),
        lambda whole: KEYS["enclave"].sign("release", b"\x80"),
        lambda whole: KEYS["enclave"].sign("rel\x1bease", b"\xa0"),
    ],
)
def test_what_is_no_receipt_is_refused_first(whole: bytes, broken: Callable[[bytes], bytes]) -> None:
    refused(broken(whole), "R1")


def altered(value: Any, hint: str = "") -> Iterator[Any]:
    """Other values of the same type, one for each field in it, however deep; bytes and texts get a change each."""
    if is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            for other in altered(getattr(value, each.name), each.name):
                yield lambda same=value, name=each.name, new=other: replace(same, **{name: new()})
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            for other in altered(item, hint):
                yield lambda i=index, new=other: (*value[:i], new(), *value[i + 1 :])
        if value:
            yield lambda: value[:-1]
            yield lambda: (*value, value[-1])
    elif isinstance(value, bytes) and hint in ("history", "roster"):
        signed = open_signed(value)
        who = next(name for name, key in KEYS.items() if key.public == signed.signer)
        for other in altered(KINDS[signed.kind].decode(signed.payload)):
            yield lambda new=other: sign(KEYS[who], new())
    elif isinstance(value, bytes):
        yield lambda: flipped(value, len(value) // 2) if value else b"\1"
    elif isinstance(value, bool):
        yield lambda: not value
    elif isinstance(value, int):
        yield lambda: value + 1
    elif isinstance(value, float):
        yield lambda: value + 0.5
    elif isinstance(value, str):
        yield lambda: value + "x"


def test_every_field_altered_is_refused_even_when_all_signers_collude(whole: bytes) -> None:
    """Every message is signed anew by its own signer, and the release by the enclave: the documents still object."""
    release = Release.decode(open_signed(whole).payload)
    tried = 0
    for other in altered(release):
        try:
            envelope = sign(KEYS["enclave"], other())
        except MpcError:
            continue  # no such message can be written
        tried += 1
        with pytest.raises(PeerError) as caught:
            verify_receipt(envelope, None)
        assert str(caught.value.step).startswith("R")
    assert tried > 80


def without(index: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda told: told[:index] + told[index + 1 :]


def swapped(one: int, other: int) -> Callable[[list[bytes]], list[bytes]]:
    def swap(told: list[bytes]) -> list[bytes]:
        told[one], told[other] = told[other], told[one]
        return told

    return swap


ELSEWHERE = Story(contract(random=seed("another session")))
BEFORE = Story(epoch=2)
HISTORIES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "no contract": (without(0), "R2"),
    "no attestation": (without(1), "R2"),
    "no seal of the first": (without(2), "R3"),
    "no seal of the second": (without(3), "R3"),
    "no computed": (without(4), "R3"),
    "no decision": (without(5), "R3"),
    "nothing": (lambda told: [], "R2"),
    "contract only": (lambda told: told[:1], "R2"),
    "seals exchanged": (swapped(2, 3), "R4"),
    "computed before a seal": (swapped(3, 4), "R3"),
    "decision before computed": (swapped(4, 5), "R3"),
    "attestation after a seal": (swapped(1, 2), "R2"),
    "a seal twice": (lambda told: [*told[:3], told[2], *told[3:]], "R4"),
    "an abort in it": (lambda told: [*told, sign(KEYS["north"], Abort(contract().digest, 1, "withdrawn"))], "R4"),
    "an abort of a stranger": (lambda told: [*told, sign(KEYS["stranger"], Abort(contract().digest, 1, "late"))], "R3"),
    "a consent beside the roster": (lambda told: [*told[:2], Story().consent("north"), *told[2:]], "R4"),
    "contract of another session": (lambda told: [ELSEWHERE.history()[0][0], *told[1:]], "R3"),
    "attestation of another session": (lambda told: [told[0], ELSEWHERE.history()[0][1], *told[2:]], "R3"),
    "seal of another session": (lambda told: [*told[:2], ELSEWHERE.history()[0][2], *told[3:]], "R3"),
    "computed of another session": (lambda told: [*told[:4], ELSEWHERE.history()[0][4], told[5]], "R3"),
    "decision of another session": (lambda told: [*told[:5], ELSEWHERE.history()[0][5]], "R3"),
    "attestation of another epoch": (lambda told: [told[0], BEFORE.history()[0][1], *told[2:]], "R3"),
    "seal of another epoch": (lambda told: [*told[:2], BEFORE.history()[0][2], *told[3:]], "R3"),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_a_history_that_is_not_the_sessions_own_is_refused(name: str) -> None:
    change, step = HISTORIES[name]
    refused(Story(change={"history": change}).release(), step)


SIGNERS = {
    "contract": "R2",
    "consent north": "R3",
    "consent south": "R3",
    "attestation": "R3",
    "seal north": "R3",
    "computed": "R3",
    "decision": "R3",
    "release": "R4",
}


@pytest.mark.parametrize("part", SIGNERS)
def test_what_another_signed_is_refused(part: str) -> None:
    refused(Story(signers={part: "stranger"}).release(), SIGNERS[part])


@pytest.mark.parametrize(
    ("part", "change", "step"),
    [
        ("contract envelope", lambda envelope: flipped(envelope, 2000), "R2"),
        ("seal north envelope", lambda envelope: flipped(envelope, len(envelope) - 5), "R3"),
        ("consent north", lambda said: replace(said, contract=OTHER), "R3"),
        ("consent north", lambda said: replace(said, epoch=2), "R3"),
        ("attestation", lambda said: replace(said, epoch=9), "R2"),
        ("attestation", lambda said: replace(said, epoch=2), "R3"),
        ("roster", lambda roster: roster[:1], "R3"),
        ("roster", lambda roster: [*roster, roster[0]], "R3"),
        ("seal north", lambda said: replace(said, binding=OTHER), "R3"),
        ("seal north", lambda said: replace(said, streams=(replace(said.streams[0], stream=1),)), "R3"),
        ("seal north", lambda said: replace(said, streams=(replace(said.streams[0], chunks=4),)), "R3"),
        ("computed", lambda said: replace(said, binding=OTHER), "R3"),
        ("decision", lambda said: replace(said, summary=OTHER), "R3"),
        ("receipt", lambda receipt: replace(receipt, binding=OTHER), "R4"),
        ("results", lambda results: results[:1], "R4"),
        ("results", lambda results: [replace(results[0], recipient="auditor"), results[1]], "R4"),
        ("results", lambda results: [results[0], replace(results[1], key=replace(results[1].key, stream=2))], "R4"),
        ("first claims", lambda claims: {**claims, "nonce": OTHER}, "R6"),
        ("first claims", lambda claims: {**claims, "user_data": OTHER}, "R6"),
        ("first claims", lambda claims: {**claims, "public_key": KEYS["stranger"].public}, "R6"),
        ("first document", lambda document: flipped(document, len(document) - 1), "R6"),
        ("first document", lambda document: document[:-1], "R6"),
        ("second claims", lambda claims: {**claims, "nonce": OTHER}, "R7"),
        ("second claims", lambda claims: {**claims, "user_data": OTHER}, "R7"),
        ("second claims", lambda claims: {**claims, "public_key": KEYS["stranger"].public}, "R7"),
        ("second document", lambda document: flipped(document, len(document) - 1), "R7"),
    ],
)
def test_one_fault_is_refused_by_its_own_step(part: str, change: Callable[[Any], Any], step: str) -> None:
    refused(Story(change={part: change}).release(), step)


def test_results_for_one_recipient_twice_are_refused() -> None:
    """A second result of a recipient, of the same stream, would be one that nobody accounts for."""
    refused(Story(change={"results": lambda results: [*results, results[1]]}).release(), "R4")


def test_the_first_document_in_the_seconds_place_is_refused() -> None:
    first: list[bytes] = []
    keep = {"first document": lambda document: first.append(document) or document}
    refused(Story(change={**keep, "second document": lambda _: first[0]}).release(), "R7")


def test_documents_of_other_code_root_contract_or_in_debug_mode_are_refused() -> None:
    digest, other = contract().digest, {**PCRS, 2: OTHER}
    for machine, document_step in (
        (Machine(digest, other), 23),
        (Machine(digest, of="another root"), 14),
        (Machine(digest, debug=True), 22),
        (Machine(OTHER), 27),
        (Machine(None), 27),
    ):
        error = refused(Story(machine=machine).release(), "R6")
        assert isinstance(error, AppraisalError)
        assert error.step == f"R6, document step {document_step}"
        assert refused(Story(second_machine=machine).release(), "R7").step == f"R7, document step {document_step}"


def test_the_second_document_of_another_enclave_is_refused() -> None:
    digest = contract().digest
    again = Machine(digest)
    again.nsm.module_id += "0"  # the same image, contract and root, in another life
    refused(Story(second_machine=again).release(), "R8")
    more = Machine(digest)
    more.ask({"LockPCR": {"index": 17}})
    refused(Story(second_machine=more).release(), "R8")


def test_the_order_of_the_documents_and_the_deadline_hold() -> None:
    verify_receipt(Story(second_ms=NOW_MS + 240_000).release(), None)
    refused(Story(second_ms=NOW_MS + 240_001).release(), "R9")
    refused(Story(first_ms=NOW_MS + 20_000, second_ms=NOW_MS + 19_999).release(), "R9")


def test_a_policy_narrows_what_the_contract_names(whole: bytes) -> None:
    refused(whole, "R5", policy({**PCRS, 0: OTHER}))
    refused(whole, "R5", policy(of="another root"))
    refused(whole, "R6", policy({**PCRS, 8: OTHER}))  # more than the contract asks for, and not in the document
    two = terms.Measurement("second", *(sha384(b"second %d" % index).digest() for index in range(3)))
    enclave = contract().enclave
    either = contract(enclave=replace(enclave, measurements=(two, *enclave.measurements)))
    assert verify_receipt(Story(either).release(), policy()).measurement == "mine"
    refused(Story(either).release(), "R6", policy({0: two.pcr0, 1: two.pcr1, 2: two.pcr2}))


def test_nothing_in_a_contract_makes_the_account_fail() -> None:
    """Times of the far future, no title, a measurement without a label."""
    enclave = contract().enclave
    strange = contract(
        title="",
        deadlines=terms.Deadlines(NOW_MS + 60_000, NOW_MS + 120_000, 2**53 - 1),
        enclave=replace(enclave, measurements=(replace(enclave.measurements[0], label=""),)),
    )
    account = verify_receipt(Story(strange).release(), None)
    assert isinstance(account, Account)
    assert account.measurement == "unnamed"
    assert utc(account.deadline_ms).endswith("CE")


def test_an_error_names_the_speaker(whole: bytes) -> None:
    error = refused(Story(change={"seal north": lambda said: replace(said, binding=OTHER)}).release(), "R3")
    assert error.peer == "north"
    with pytest.raises(SignatureError):
        verify_receipt(flipped(whole, len(whole) - 1), None)


def test_a_consent_that_was_exchanged_afterwards_is_refused() -> None:
    """The party signs another commitment for the same session, and the enclave's attestation is signed anew."""

    def exchange(envelope: bytes) -> bytes:
        said = open_signed(envelope)
        roster = list(KINDS[said.kind].decode(said.payload).roster)  # type: ignore[attr-defined]
        consent = Consent.decode(open_signed(roster[0]).payload)
        who = "north" if open_signed(roster[0]).signer == KEYS["north"].public else "south"
        roster[0] = sign(KEYS[who], replace(consent, commitment=OTHER))
        return resigned(envelope, "enclave", roster=tuple(roster))

    refused(Story(change={"attestation envelope": exchange}).release(), "R3")
