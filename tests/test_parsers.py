"""Every decoder, attacked; and every signed message, read by us and by pycose."""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import cbor2
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pycose.algorithms import EdDSA
from pycose.headers import KID, Algorithm
from pycose.keys import OKPKey
from pycose.keys.curves import Ed25519
from pycose.messages import Sign1Message

from mpc.fuzz import decoding
from mpc.fuzz.corpus import session, signed_again
from mpc.fuzz.decoding import Fault, guarded, hold, hostile, mutated
from mpc.fuzz.moves import attack
from mpc.fuzz.mutations import head, mutate_cbor, read_cbor, walk, write_cbor
from mpc.fuzz.parsers import PARSERS, Decoder
from mpc.protocol.encoding import encode
from mpc.protocol.errors import EncodingError, PeerError
from mpc.protocol.messages import KINDS
from mpc.protocol.signing import EDDSA, Signed, encode_header, open_signed

EXAMPLES = 100
SLOW = {"EIF signature": 25, "scenario": 40, "party policy": 40, "receipt": 40, "transport connection": 50}
# They all begin with the same reader of CBOR: one of them stands for all.
ALIKE = {"plain CBOR", "binding", "participant", "envelope", "proposal", "receipt", *KINDS} - {"contract"}
ONE_OF_A_KIND = [name for name in PARSERS if name not in ALIKE and not name.startswith("ledger")]
DOMAIN = b"enclave-mpc/1 message"


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_real_is_accepted(name: str) -> None:
    seeds = PARSERS[name].seeds()
    assert seeds
    for seed in seeds:
        with guarded(name, seed):
            assert hold(name, seed)


@pytest.mark.parametrize("name", PARSERS)
def test_no_mutation_breaks_a_decoder(name: str) -> None:
    @settings(
        max_examples=SLOW.get(name, EXAMPLES),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False))
    def attack_it(random: Random) -> None:
        data = mutated(name, random)
        with guarded(name, data):
            hold(name, data)

    attack_it()


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_no_promise_of_too_much_breaks_a_decoder(name: str) -> None:
    for data in hostile():
        with guarded(name, data):
            hold(name, data)


def test_every_kind_of_message_is_in_the_corpus() -> None:
    assert {open_signed(envelope).kind for envelope in session().envelopes} == set(KINDS)


def test_cbor_is_written_back_as_it_was_read() -> None:
    for data in (*session().envelopes, *session().documents, b"\xbf\x61a\x5f\x41b\xff\xff", b"\x18\x01"):
        assert write_cbor(read_cbor(data)) == data


# The harness itself can fail.


def _leaks(data: bytes) -> Any:
    return cbor2.loads(data)["no such key"]


def _hangs(data: bytes) -> Any:
    while True:
        pass


FAULTS: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    "lax": ("a second form is accepted", lambda data: cbor2.loads(data)),
    "leaks": ("KeyError escapes", _leaks),
    "greedy": ("takes 1", lambda data: len(bytes(100 << 20))),
    "hangs": ("Hang escapes", _hangs),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_decoder_that_is_wrong_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, decode = FAULTS[name]
    monkeypatch.setattr(decoding, "CPU_S_MAX", 0.2)
    good = PARSERS["consent"]
    planted = Decoder(decode, (cbor2.CBORDecodeError, EncodingError), good.seeds, encode)
    monkeypatch.setitem(PARSERS, name, planted if name == "lax" else replace(planted, encode=None))
    random = Random(1)

    def search() -> None:
        for _ in range(200):
            data = mutated(name, random)
            with guarded(name, data):
                hold(name, data)

    with pytest.raises(Fault, match=words):
        search()


def test_a_library_that_panics_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panics(data: bytes) -> Any:
        raise Panic

    monkeypatch.setitem(PARSERS, "panics", replace(PARSERS["consent"], decode=panics))
    with pytest.raises(Fault, match="Panic escapes"):
        hold("panics", b"")


# pycose, which others will read our messages with.


def theirs(envelope: bytes) -> Signed | None:
    """What pycose reads in an envelope of ours and finds well signed by the key that it names; None otherwise."""
    try:
        message: Any = Sign1Message.from_cose_obj(list(cbor2.loads(envelope)), True)
        message.external_aad = DOMAIN
        message.key = OKPKey(crv=Ed25519, x=message.get_attr(KID))
        assert message.get_attr(Algorithm) == EdDSA
        return Signed(message.phdr[16], message.get_attr(KID), message.payload) if message.verify_signature() else None
    except Exception:
        return None


def ours(envelope: bytes) -> Signed | None:
    try:
        return open_signed(envelope)
    except PeerError:
        return None


def test_pycose_reads_every_message_of_fair_and_attacked_sessions_as_we_do() -> None:
    said = {*session().envelopes, *(envelope for seed in range(6) for envelope in attack(seed).pool)}
    assert len(said) > 60
    for envelope in said:
        signed = ours(envelope)
        assert signed == theirs(envelope)
        assert signed is not None


def test_pycose_accepts_every_altered_message_that_we_accept() -> None:
    random, accepted, refused = Random(5), 0, 0
    for number in range(200):
        envelope = random.choice(session().envelopes)
        change = signed_again if number % 4 == 0 else mutate_cbor
        altered = change(envelope, random, session().envelopes)
        signed = ours(altered)
        if signed is not None:
            assert theirs(altered) == signed
            accepted += 1
        else:
            refused += 1
    assert min(accepted, refused) > 20


def _parts() -> list[Any]:
    parts: list[Any] = cbor2.loads(session().of("consent")[0])
    return parts


def _signed_with(protected: bytes, unprotected: object = None, payload: bytes = b"x") -> bytes:
    """Well signed, whatever the header says."""
    key = session().world.author
    signature = key._key.sign(encode(["Signature1", protected, DOMAIN, payload]))
    return encode_header([protected, unprotected or {}, payload, signature])  # type: ignore[arg-type]


KEY_ID = session().world.author.public
HEADER = {1: EDDSA, 4: KEY_ID, 16: "consent"}
# What pycose accepts, and we do not: the same message in another form, or with more in it.
LAX = {
    "bytes after it": lambda: session().of("consent")[0] + b"\0",
    "a longer head": lambda: _long_head(session().of("consent")[0]),
    "indefinite length": lambda: b"\x9f" + session().of("consent")[0][1:] + b"\xff",
    "a fifth part": lambda: encode([*_parts(), 0]),
    "an unprotected header": lambda: encode_header([_parts()[0], {99: 1}, *_parts()[2:]]),  # type: ignore[arg-type]
    "header in another order": lambda: _signed_with(cbor2.dumps(dict(reversed(HEADER.items())))),
    "one header more": lambda: _signed_with(encode_header({**HEADER, 99: 1})),
    "the key outside": lambda: _signed_with(encode_header({1: EDDSA, 16: "consent"}), {4: KEY_ID}),
    "the algorithm outside": lambda: _signed_with(encode_header({4: KEY_ID, 16: "consent"}), {1: EDDSA}),
}


def _long_head(envelope: bytes) -> bytes:
    root = read_cbor(envelope)
    item = next(item for item in walk(root) if item.major == 2 and len(item.body) < 256)
    item.head = head(2, len(item.body), 4)
    return write_cbor(root)


@pytest.mark.parametrize("name", LAX)
def test_what_pycose_accepts_and_we_do_not(name: str) -> None:
    envelope = LAX[name]()
    assert theirs(envelope) is not None
    assert ours(envelope) is None
