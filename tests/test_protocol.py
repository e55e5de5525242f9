"""What is signed: one form of each message, everything else refused with a verdict, and nothing that prints."""

import struct
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycose.algorithms import EdDSA
from pycose.headers import KID, Algorithm
from pycose.keys import OKPKey
from pycose.keys.curves import Ed25519
from pycose.messages import Sign1Message

from enclave_runtime import enclave as runtime
from mpc.fuzz.world import Setting, World
from mpc.protocol.contract import CONTRACT_BYTES_MAX, SEALING_KEY_BYTES
from mpc.protocol.encoding import MESSAGE_BYTES_MAX, Bytes32, Count, Limit, Name, Record, decode, digest, encode
from mpc.protocol.errors import EncodingError, LocalError, OrderError, PeerError, SignatureError
from mpc.protocol.messages import (
    KINDS,
    Abort,
    Attestation,
    Computed,
    Consent,
    Decision,
    Reason,
    Receipt,
    Release,
    Seal,
    SealedResult,
    Wrapped,
    sign,
)
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import (
    WRAPPED_BYTES,
    ChunkCipher,
    OpeningKey,
    StreamSecret,
)
from mpc.protocol.signing import ENVELOPE_BYTES_MAX, SigningKey, encode_protected, open_signed
from parties.party import Committed, Consented, Finished, Sealed, Upload

DOMAIN = b"enclave-mpc/1 message"
KEY = SigningKey(bytes(32))


@cache
def world() -> World:
    """A session with everything in it, released."""
    made = World(1, Setting(parties=2, receivers=1, approvers=2, quorum=1))
    made.fair()
    return made


def spoken() -> dict[str, bytes]:
    """An envelope of every kind."""
    envelopes = {open_signed(envelope).kind: envelope for envelope in world().pool}
    envelopes["abort"] = sign(world().author, Abort(world().contract.digest, 1, "withdrawn"))
    return envelopes


# Encoding.


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_has_one_encoding(kind: str) -> None:
    signed = open_signed(spoken()[kind])
    message = KINDS[kind].decode(signed.payload)
    assert message.encode() == signed.payload
    assert KINDS[kind].decode(message.encode()) == message


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_all_there_and_no_others(kind: str) -> None:
    plain = decode(open_signed(spoken()[kind]).payload)
    for changed in ({**plain, "more": 1}, dict(list(plain.items())[1:]), {**plain, next(iter(plain)): [1.5]}):
        with pytest.raises(PeerError, match=KINDS[kind].__name__):
            KINDS[kind].decode(encode(changed))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("a2616101616102", "a key twice"),
        ("a1616101ff", "a byte too many"),
        ("a16161", "a byte too few"),
        ("a161611805", "a longer form of 5"),
        ("a1616119ffff00", "a byte too many after a number"),
        ("a178016101", "a longer form of a length"),
        ("bf616101ff", "an indefinite map"),
        ("9f01ff", "an indefinite list"),
        ("5f4101ff", "an indefinite string"),
        ("a2616201616101", "keys out of order"),
        ("a26261610161620a", "a shorter key behind a longer one"),
        ("c001", "a tag"),
        ("d8641a00000001", "a date"),
        ("c249010000000000000000", "a big number"),
        ("d8235f", "a regular expression"),
        ("d9010281 01".replace(" ", ""), "a set"),
        ("f7", "undefined"),
        ("e0", "a simple value"),
        ("fb3ff0000000000000", "a longer form of 1.0"),
        ("fa3f800000", "a long form of 1.0"),
        ("f97e01", "another not-a-number"),
        ("a10101", "a key that is a number"),
        ("a1410101", "a key that is bytes"),
        ("a1810101", "a key that is a list"),
        ("62c328", "text that is no UTF-8"),
        ("81" * 17 + "01", "more depth than anything needs"),
        ("1bffffffffffffffff" + "00", "a number and a byte"),
        ("9bffffffffffffffff", "a list without its items"),
        ("5bffffffffffffffff", "a string without its bytes"),
        ("bb7fffffffffffffff", "a map without its items"),
        ("", "nothing"),
    ],
    ids=lambda value: value if " " in value else None,
)
def test_other_forms_are_refused(data: str, what: str) -> None:
    with pytest.raises(EncodingError):
        decode(bytes.fromhex(data))


def test_a_message_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(EncodingError, match="size"):
        decode(encode(bytes(MESSAGE_BYTES_MAX)))
    bomb = b"\x9a" + struct.pack(">I", 3 << 20) + b"\x80" * (3 << 20)
    with pytest.raises(EncodingError, match="items"):
        decode(bomb)


@dataclass(frozen=True)
class Sample(Record):
    name: Name
    number: Annotated[int, Limit(1, 9)]
    share: float
    flag: bool
    key: Bytes32 | None = None
    items: Annotated[tuple[Count, ...], Limit(0, 2)] = ()


GOOD = {"name": "a", "number": 1, "share": 0.5, "flag": True, "key": None, "items": []}


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "1a"},
        {"name": "a" * 65},
        {"name": "a\n"},
        {"name": b"a"},
        {"number": 0},
        {"number": 10},
        {"number": True},
        {"number": 1.0},
        {"share": 1},
        {"share": float("inf")},
        {"share": float("nan")},
        {"flag": 1},
        {"key": b""},
        {"key": bytes(33)},
        {"items": [1, 2, 3]},
        {"items": [-1]},
        {"items": [2**53]},
        {"items": None},
        {"items": {"a": 1}},
    ],
    ids=str,
)
def test_values_have_their_type_and_limits(wrong: dict[str, object]) -> None:
    assert Sample.decode(encode(GOOD)) == Sample("a", 1, 0.5, True)
    with pytest.raises(EncodingError, match="Sample"):
        Sample.decode(encode({**GOOD, **wrong}))


def test_a_field_without_a_limit_is_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class Unlimited(Record):
        text: str

    with pytest.raises(LocalError, match="no limit"):
        Unlimited("a")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_do_more_than_be_refused(data: Any) -> None:
    """Whatever comes: either it is the one encoding of something, or it is a PeerError."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    payload = bytearray(open_signed(spoken()[kind]).payload)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(payload) - 1))
        payload[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not payload:
            break
    for cls in (KINDS[kind], data.draw(st.sampled_from(sorted(KINDS.values(), key=str)))):
        try:
            message = cls.decode(bytes(payload))
        except PeerError:
            continue
        assert message.encode() == bytes(payload)


def test_labels_keep_digests_apart() -> None:
    assert digest("a", b"b") != digest("ab", b"") != digest("ab")[:0]
    assert len({digest("a", b"b"), digest("ab", b""), digest("a", b"", b"c"), digest("a\0", b"b")}) == 4
    assert digest("a", b"b", b"c") == digest("a", b"bc")


# Signing.


def forged(
    header: dict[Any, Any] | None = None,
    unprotected: dict[Any, Any] | None = None,
    payload: Any = b"payload",
    domain: bytes = DOMAIN,
    canonical: bool = True,
) -> list[Any]:
    """A COSE_Sign1 with a valid signature over whatever its parts are."""
    protected = cbor2.dumps({1: -8, 4: KEY.public, 16: "consent"} if header is None else header, canonical=canonical)
    signature = KEY._key.sign(cbor2.dumps(["Signature1", protected, domain, payload]))
    return [protected, unprotected or {}, payload, signature]


def test_the_forger_of_this_test_signs_like_us() -> None:
    assert cbor2.dumps(forged()) == KEY.sign("consent", b"payload")


@pytest.mark.parametrize(
    "parts",
    [
        forged({1: -8, 4: SigningKey(bytes([1] * 32)).public, 16: "consent"}),
        forged(domain=b""),
        forged(domain=b"enclave-mpc/2 message"),
        [*forged()[:3], bytes(64)],
        [*forged()[:3], forged()[3][:63]],
        [*forged()[:2], b"another", forged()[3]],
        [encode_protected(KEY.public, "seal"), *forged()[1:]],
    ],
    ids=["key of another", "no domain", "other domain", "zeros", "short", "other payload", "other kind"],
)
def test_a_signature_is_of_this_key_kind_payload_and_domain(parts: list[Any]) -> None:
    with pytest.raises(SignatureError):
        open_signed(cbor2.dumps(parts))


@pytest.mark.parametrize(
    "envelope",
    [
        cbor2.dumps(forged({1: -8, 4: KEY.public, 16: "consent", 5: b"iv"})),
        cbor2.dumps(forged({4: KEY.public, 16: "consent"}, {1: -8})),
        cbor2.dumps(forged({1: -8, 16: "consent"}, {4: KEY.public})),
        cbor2.dumps(forged(unprotected={5: b"iv"})),
        cbor2.dumps(forged(unprotected={"iv": b""})),
        cbor2.dumps(forged({1: -7, 4: KEY.public, 16: "consent"})),
        cbor2.dumps(forged({1: -8, 4: KEY.public, 16: 5})),
        cbor2.dumps(forged({1: -8, 4: KEY.public})),
        cbor2.dumps(forged({1: -8, 4: KEY.public[:31], 16: "consent"})),
        cbor2.dumps(forged({16: "consent", 4: KEY.public, 1: -8}, canonical=False)),
        cbor2.dumps(forged(payload=None)),
        cbor2.dumps(forged(payload="payload")),
        cbor2.dumps([*forged(), b"five"]),
        cbor2.dumps(forged()[:3]),
        cbor2.dumps(cbor2.CBORTag(18, forged())),
        cbor2.dumps(cbor2.CBORTag(61, cbor2.CBORTag(18, forged()))),
        cbor2.dumps(forged()) + b"\0",
        cbor2.dumps(forged())[:-1],
        b"\x9f" + cbor2.dumps(forged())[1:] + b"\xff",
        cbor2.dumps([forged()[0] + b"\0", *forged()[1:]]),
        cbor2.dumps(["text", *forged()[1:]]),
        cbor2.dumps({"a": 1}),
        b"",
        bytes(ENVELOPE_BYTES_MAX + 1),
    ],
    ids=[
        *(
            "extra header",
            "alg unprotected",
            "kid unprotected",
            "unprotected header",
            "text label",
            "ES256",
            "kind is a number",
        ),
        *("no kind", "short key", "order", "no payload", "text payload", "five parts", "three parts", "tag 18"),
        *(
            "tag 61",
            "byte more",
            "byte less",
            "indefinite",
            "byte in header",
            "text header",
            "a map",
            "nothing",
            "huge",
        ),
    ],
)
def test_an_envelope_has_one_form(envelope: bytes) -> None:
    with pytest.raises(EncodingError):
        open_signed(envelope)


@pytest.mark.parametrize("kind", KINDS)
def test_pycose_and_we_read_every_message_alike(kind: str) -> None:
    envelope = spoken()[kind]
    ours = open_signed(envelope)
    theirs: Any = Sign1Message.from_cose_obj(list(cbor2.loads(envelope)), True)
    theirs.external_aad = DOMAIN
    theirs.key = OKPKey(crv=Ed25519, x=ours.signer)
    assert theirs.verify_signature()
    assert theirs.phdr == {Algorithm: EdDSA, KID: ours.signer, 16: ours.kind}
    assert theirs.uhdr == {}
    assert theirs.payload == ours.payload
    theirs.payload += b"\0"
    assert not theirs.verify_signature()


def test_what_pycose_signs_is_what_we_sign() -> None:
    theirs: Any = Sign1Message(
        phdr={Algorithm: EdDSA, KID: KEY.public, 16: "consent"}, uhdr={}, payload=b"payload", external_aad=DOMAIN
    )
    theirs.key = OKPKey(crv=Ed25519, x=KEY.public, d=bytes(32))
    assert theirs.encode(tag=False) == KEY.sign("consent", b"payload")


def test_a_message_is_named_by_speaker_kind_and_payload() -> None:
    other = SigningKey(bytes([7] * 32))
    said = [KEY.sign("seal", b"a"), KEY.sign("seal", b"b"), KEY.sign("consent", b"a"), other.sign("seal", b"a")]
    assert len({open_signed(envelope).digest for envelope in said}) == 4


# Secrets do not print.


CANARY = b"CANARY that nobody may see"


def test_no_message_event_action_or_memory_prints_a_secret() -> None:
    secret = StreamSecret(CANARY.ljust(32), CANARY.ljust(32), 5)
    signed = open_signed(KEY.sign("consent", CANARY))
    printed: list[object] = [
        secret,
        SigningKey(CANARY.ljust(32)),
        OpeningKey(CANARY.ljust(32)),
        ChunkCipher(secret),
        signed,
        runtime.Begin(CANARY, 1),
        runtime.Message(CANARY),
        runtime.Chunk(0, 0, CANARY),
        runtime.Outcome({"a": CANARY}),
        runtime.Send(CANARY),
        runtime.SendChunk(0, 0, CANARY),
        Upload(1, 0, secret, again=False),
        Consented(bytes(48), 1, CANARY),
        Finished(bytes(48), True, "why", CANARY),
        *world().enclaves,
        *world().parties.values(),
        *(memory for party in world().parties.values() for memory in party.ledger),
        world().coordinator.mailbox.session,
    ]
    shown = "\n".join(map(repr, printed))
    assert CANARY.decode() not in shown
    for party in world().parties.values():
        for memory in party.ledger:
            secrets = [memory.salt] if isinstance(memory, Committed) else []
            secrets += memory.keys if isinstance(memory, Sealed) else []
            assert not [secret for secret in secrets if repr(secret)[2:-1] in shown or secret.hex() in shown]


def test_errors_show_sizes_and_types_and_no_values() -> None:
    with pytest.raises(EncodingError) as caught:
        Sample.decode(encode({**GOOD, "name": CANARY.decode()}))
    assert CANARY.decode() not in str(caught.value)
    with pytest.raises(EncodingError) as caught:
        Consent(CANARY, 1, bytes(32), bytes(48))
    assert "CANARY" not in str(caught.value)


def test_every_reason_of_an_abort_is_one_that_can_be_said() -> None:
    for reason in get_args(Reason):
        Abort(bytes(48), 1, reason)
    with pytest.raises(EncodingError, match="reason"):
        Abort(bytes(48), 1, "because")  # type: ignore[arg-type]


def test_the_release_of_the_largest_contract_fits_into_a_message() -> None:
    key, crowd = SigningKey(bytes(32)), 1000
    wrapped = Wrapped(2000, bytes(WRAPPED_BYTES), 1 << 20)
    consent = sign(key, Consent(bytes(48), 100, bytes(32), bytes(48)))
    sealing_key, document = bytes(SEALING_KEY_BYTES), bytes(32768)
    attestation = sign(key, Attestation(bytes(48), 100, (consent,) * crowd, sealing_key, document))
    history = (
        key.sign("contract", bytes(CONTRACT_BYTES_MAX)),
        attestation,
        *[sign(key, Seal(bytes(48), (wrapped,)))] * crowd,
        sign(key, Computed(bytes(48), bytes(48))),
        *[sign(key, Decision(bytes(48), bytes(48)))] * crowd,
    )
    results = (SealedResult("n" * 64, bytes(48), wrapped),) * crowd
    envelope = sign(key, Release(Receipt(bytes(48), history, results), document))
    assert Release.decode(open_signed(envelope).payload).receipt.results == results


def test_a_contract_that_is_too_large_is_refused() -> None:
    key = SigningKey(bytes(32))
    with pytest.raises(OrderError, match="contract"):
        Session.propose(key.sign("contract", bytes(CONTRACT_BYTES_MAX + 1)))
