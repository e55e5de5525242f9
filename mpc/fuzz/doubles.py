"""Cheap doubles of the cryptographic library, for runs of millions of steps. Not one line of ours is doubled.

They stand where our code calls `cryptography`: all of `mpc.protocol.signing`, `mpc.protocol.sealing`, the verifier and
the simulated security module still runs, with every encoding, length, context and check around a primitive.

Why a counterexample under doubles is one, and what they miss:

* **Ed25519.** A signature is a keyed hash of the signer's public key and the message, under a secret of this module
  that no machine and no move of the adversary can ask for. So there is exactly one valid signature of a message by a
  key, only an object that holds the private key makes it, and any changed bit is refused: what unforgeability promises,
  and no forgery is ever valid. Public keys are the real ones, so that whatever is ordered by key is ordered alike.
* **HPKE.** A box is a number that was never used before, the secret under a hash stream of public key, `info` and that
  number, and a tag: it opens with the private half of that key and the same `info`, or not at all, and shows nothing.
  Every 1,216 bytes are a public key; the real library refuses some, which only our own contracts could contain.
* **The certificate of one enclave's security module**, and its P-384 key. The authorities above it are real and are
  checked by the real verifier; the leaf is a record of who was issued which name for how long under which bundle.
* Kept real: SHA-384, HKDF, AES-256-GCM (cheap enough), CBOR, X.509 of roots and authorities.

Pure functions are remembered besides: what bytes decode to, the encoding and digest of an immutable record, the parts
of a type hint, and that an envelope is valid. What breaks only with a real primitive (its timing, its parser) is for
other tests; `mpc.fuzz.swarm` plays every counterexample again with the real library.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import count
from types import SimpleNamespace
from typing import Any, cast, get_args, get_origin

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from mpc.attestation import chain
from mpc.fuzz.facts import opened
from mpc.fuzz.moves import verifying_once
from mpc.host import simulated_nsm
from mpc.host.simulated_root import Issued, Template
from mpc.protocol import encoding, messages, sealing, signing
from mpc.protocol.encoding import Record

_SECRET = b"known to this module only"
_ENCAPSULATION_BYTES, _TAG_BYTES = 1120, 16
_LEAF = b"double of a certificate\0"
RECORDS_REMEMBERED = 4096


def _hash(size: int, *parts: bytes) -> bytes:
    state = hashlib.shake_256(_SECRET)
    for part in parts:
        state.update(len(part).to_bytes(4, "big") + part)
    return state.digest(size)


class _Ed25519:
    """Both halves of a key; `public` alone verifies."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    @classmethod
    def from_private_bytes(cls, seed: bytes) -> "_Ed25519":
        return cls(_public_of(seed))

    @classmethod
    def from_public_bytes(cls, public: bytes) -> "_Ed25519":
        if type(public) is not bytes or len(public) != 32:
            raise ValueError("An Ed25519 public key is 32 bytes long")
        return cls(public)

    def public_key(self) -> "_Ed25519":
        return self

    def public_bytes_raw(self) -> bytes:
        return self._public

    def sign(self, message: bytes) -> bytes:
        return _hash(64, b"Ed25519", self._public, message)

    def verify(self, signature: bytes, message: bytes) -> None:
        if type(signature) is not bytes:
            raise TypeError("signature")
        if signature != self.sign(message):
            raise InvalidSignature


@lru_cache(maxsize=4096)
def _public_of(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


class _Half:
    """One half of a hybrid key: ML-KEM-768 or X25519."""

    def __init__(self, public: bytes) -> None:
        self.public = public

    def public_key(self) -> "_Half":
        return self

    def public_bytes_raw(self) -> bytes:
        return self.public


def _half(size: int) -> Any:
    def from_private(seed: bytes) -> _Half:
        return _Half(_hash(size, b"half of a key", seed))

    def from_public(public: bytes) -> _Half:
        if len(public) != size:
            raise ValueError("not a public key")
        return _Half(public)

    return SimpleNamespace(from_seed_bytes=from_private, from_private_bytes=from_private, from_public_bytes=from_public)


def _hybrid(mlkem: _Half, x25519: _Half) -> bytes:
    """Stands for either half: who holds a private key's object may open."""
    return mlkem.public + x25519.public


class Hpke:
    """The one suite. `fresh` gives numbers that are never the same: entropy of the encapsulation."""

    def __init__(self) -> None:
        self.fresh: Callable[[], int] = count().__next__

    def encrypt(self, secret: bytes, key: bytes, info: bytes) -> bytes:
        number = self.fresh().to_bytes(32, "big")
        stream = _hash(len(secret), b"stream", key, info, number)
        box = bytes(a ^ b for a, b in zip(secret, stream, strict=True))
        return number.ljust(_ENCAPSULATION_BYTES, b"\0") + box + _hash(_TAG_BYTES, b"tag", key, info, number, box)

    def decrypt(self, wrapped: bytes, key: bytes, info: bytes) -> bytes:
        wrapped = bytes(wrapped)
        number, box, tag = wrapped[:32], wrapped[_ENCAPSULATION_BYTES:-_TAG_BYTES], wrapped[-_TAG_BYTES:]
        padded = wrapped[32:_ENCAPSULATION_BYTES] == bytes(_ENCAPSULATION_BYTES - 32)
        if not padded or tag != _hash(_TAG_BYTES, b"tag", key, info, number, box):
            raise InvalidTag
        return bytes(a ^ b for a, b in zip(box, _hash(len(box), b"stream", key, info, number), strict=True))


HPKE = Hpke()


class _LeafKey:
    """The P-384 key of one security module."""

    def __init__(self, seed: bytes) -> None:
        self.name = _hash(32, b"P-384", seed)

    def public_key(self) -> "_LeafKey":
        return self

    def sign(self, message: bytes, _: object) -> bytes:
        r_s = _hash(94, b"ES384", self.name, message)  # a little less than the order
        return encode_dss_signature(int.from_bytes(r_s[:47], "big"), int.from_bytes(r_s[47:], "big"))

    def verify(self, signature: bytes, message: bytes, algorithm: object) -> None:
        if decode_dss_signature(signature) != decode_dss_signature(self.sign(message, algorithm)):
            raise InvalidSignature


class _Leaves:
    """The certificates that were issued, by their bytes."""

    def __init__(self) -> None:
        self._issued: dict[bytes, tuple[bytes, Any]] = {}  # with what the walk asks of a leaf
        self._read = chain._leaf

    def issue(self, template: Template, key: Any, issuer: Issued | None) -> Issued:
        assert issuer is not None
        der = _LEAF + _hash(32, key.name, issuer.der, template.serial.to_bytes(20, "big"))
        leaf = SimpleNamespace(
            parsed=SimpleNamespace(subject=template.subject),
            key=key,
            not_before_ms=template.not_before_s * 1000,
            not_after_ms=template.not_after_s * 1000,
        )
        self._issued[der] = issuer.der, leaf
        return Issued(template, key, der)

    def read(self, bundle: tuple[bytes, ...], der: bytes) -> Any:
        issuer, leaf = self._issued.get(der, (b"", None))
        if leaf is None or issuer != bundle[-1]:
            return self._read(bundle, der)  # which refuses it
        chain._authorities(bundle)
        return leaf

    def forget(self) -> None:
        self._issued.clear()


LEAVES = _Leaves()


@lru_cache(maxsize=RECORDS_REMEMBERED)
def _decoded(cls: type[Record], data: bytes) -> Record:
    return _decode(cls, data)


_decode: Callable[[type[Record], bytes], Record] = Record.decode.__func__  # type: ignore[attr-defined]


def _once(owner: type, name: str) -> tuple[Any, str, Any]:
    """A pure property of an immutable value, computed once for each."""
    made: Any = vars(owner)[name]
    cached = cached_property(made.fget)
    cached.__set_name__(owner, name)
    return owner, name, cached


def _encoded(record: Record) -> bytes:
    """`Record.encode`, once for each record."""
    known = vars(record)
    if "_encoded" not in known:
        known["_encoded"] = _encode(record)
    encoded: bytes = known["_encoded"]
    return encoded


_encode = Record.encode


def _by_identity(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A pure function of type hints, remembered for each; those of records live as long as the program."""
    known: dict[int, tuple[Any, Any]] = {}

    def remembered(hint: Any) -> Any:
        found = known.get(id(hint))
        if found is None:
            found = known[id(hint)] = hint, function(hint)
        return found[1]

    return remembered


_ORIGIN, _ARGUMENTS = _by_identity(get_origin), _by_identity(get_args)


def forget() -> None:
    """Between two worlds: what was issued in the last one is no longer needed."""
    LEAVES.forget()


@contextmanager
def doubles() -> Iterator[None]:
    """Within this block worlds are cheap. A world that was made in it means nothing outside of it."""
    instead: list[tuple[Any, str, Any]] = [
        (signing, "Ed25519PrivateKey", _Ed25519),
        (signing, "Ed25519PublicKey", _Ed25519),
        (sealing, "MLKEM768PrivateKey", _half(1184)),
        (sealing, "MLKEM768PublicKey", _half(1184)),
        (sealing, "X25519PrivateKey", _half(32)),
        (sealing, "X25519PublicKey", _half(32)),
        (sealing, "MLKEM768X25519PrivateKey", _hybrid),
        (sealing, "MLKEM768X25519PublicKey", _hybrid),
        (sealing, "_SUITE", HPKE),
        (simulated_nsm, "private_key", _LeafKey),
        (simulated_nsm, "issue", LEAVES.issue),
        (chain, "_leaf", LEAVES.read),
        (Record, "decode", classmethod(cast(Any, _decoded))),
        (Record, "encode", _encoded),
        (encoding, "get_origin", _ORIGIN),
        (encoding, "get_args", _ARGUMENTS),
        *(_once(owner, "digest") for owner in (signing.Signed, messages.Binding, messages.Receipt)),
    ]
    real = [(owner, name, vars(owner)[name]) for owner, name, _ in instead]
    with verifying_once():
        _put(instead)
        try:
            yield
        finally:
            _put(real)


def _put(values: list[tuple[Any, str, Any]]) -> None:
    opened.cache_clear()  # what is valid with doubles is not valid without them, nor the other way round
    for owner, name, value in values:
        setattr(owner, name, value)
