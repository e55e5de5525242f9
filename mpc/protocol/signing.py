"""Signed messages: a strict COSE_Sign1 of one screen, Ed25519 only.

Source: RFC 9052 section 4.2 and 4.4 (COSE_Sign1, Sig_structure), RFC 9596 (`typ`), RFC 8032 (Ed25519).
The envelope is untagged: [protected, {}, payload, signature], protected = {1: -8, 4: signer's key, 16: kind}.
"""

from dataclasses import dataclass, field

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mpc.protocol.encoding import MESSAGE_BYTES_MAX, decode, digest, encode
from mpc.protocol.errors import EncodingError, SignatureError

ALGORITHM, KEY_ID, KIND = 1, 4, 16  # COSE header parameters
EDDSA = -8
PROTECTED_BYTES_MAX = 128
ENVELOPE_BYTES_MAX = MESSAGE_BYTES_MAX + 256
_DOMAIN = b"enclave-mpc/1 message"  # external_aad: a signature made for another system is none here


class SigningKey:
    """An Ed25519 private key; never printed."""

    def __init__(self, seed: bytes) -> None:
        """Make the key of a 32-byte seed."""
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"SigningKey({self.public.hex()[:8]}…)"

    def sign(self, kind: str, payload: bytes) -> bytes:
        """The envelope of `payload`, of at most ENVELOPE_BYTES_MAX bytes."""
        protected = encode_protected(self.public, kind)
        signature = self._key.sign(_to_be_signed(protected, payload))
        return encode([protected, {}, payload, signature])


@dataclass(frozen=True)
class Signed:
    """What a verified envelope says: digests name the payload, never the envelope."""

    kind: str
    signer: bytes  # Ed25519 public key, 32 bytes
    payload: bytes = field(repr=False)

    @property
    def digest(self) -> bytes:
        """Names the message: who said what, whatever form the signature has."""
        return digest("enclave-mpc/1 said", encode([self.kind, self.signer, self.payload]))


def encode_protected(key: bytes, kind: str) -> bytes:
    return encode_header({ALGORITHM: EDDSA, KEY_ID: key, KIND: kind})


def encode_header(header: dict[int, object]) -> bytes:
    """Deterministic CBOR; COSE headers have integer keys, the only ones in this protocol."""
    return cbor2.dumps(header, canonical=True)


def open_signed(envelope: bytes) -> Signed:
    """Verify an envelope.

    Raises:  EncodingError: not the one form of an envelope. SignatureError: not signed by the key that it names.
    """
    try:
        protected, unprotected, payload, signature = decode(envelope, ENVELOPE_BYTES_MAX)
        header = cbor2.loads(protected[:PROTECTED_BYTES_MAX], max_depth=1)
        key, kind = header[KEY_ID], header[KIND]
        verifier = Ed25519PublicKey.from_public_bytes(key)
        one_form = (
            isinstance(kind, str)
            and unprotected == {}
            and type(payload) is bytes
            and protected == encode_protected(key, kind)
        )
    except Exception as error:
        raise EncodingError(f"not a signed message ({type(error).__name__})") from None
    if not one_form:
        raise EncodingError("not the one form of a signed message")
    try:
        verifier.verify(signature, _to_be_signed(protected, payload))
    except (InvalidSignature, TypeError):
        raise SignatureError(f"signature of {kind[:32]!a}", expected=f"one by key {key.hex()[:16]}…") from None
    return Signed(kind, key, payload)


def _to_be_signed(protected: bytes, payload: bytes) -> bytes:
    return encode(["Signature1", protected, _DOMAIN, payload])
