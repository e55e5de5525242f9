"""Sealing of tables and results: HPKE wraps a content key, the data go in chunks of AES-256-GCM.

One suite, no negotiation: ML-KEM-768+X25519, HKDF-SHA384, AES-256-GCM.
Source: RFC 9180 (HPKE base mode); STREAM, Hoang et al. 2015 (counter nonce, last-chunk flag); docs/PROTOCOL.md.

Lengths: a stream is cut into chunks of 1 MiB; the last one is padded with zeros to a power of two of at
least 4 KiB. That is the one rule, and all that a length shows.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpc.protocol.encoding import DIGEST_BYTES, digest, encode
from mpc.protocol.errors import SealError

CHUNK_BYTES = 1 << 20
CHUNK_BYTES_MIN = 1 << 12
TAG_BYTES = 16
BOX_BYTES_MAX = CHUNK_BYTES + TAG_BYTES
SALT_BYTES = 32
SECRET_BYTES = 32 + SALT_BYTES + 8  # content key ‖ salt ‖ length of the stream
WRAPPED_BYTES = 1120 + SECRET_BYTES + TAG_BYTES  # encapsulation ‖ sealed secret
_MLKEM_PUBLIC_BYTES = 1184
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA384, AEAD.AES_256_GCM)
_CHUNK_LABEL = b"enclave-mpc/1 chunk\0"

Buffer = bytes | bytearray | memoryview


def derive(secret: bytes, purpose: str, size: int) -> bytes:
    """HKDF-SHA384 (RFC 5869) with the purpose as info."""
    return HKDF(hashes.SHA384(), size, None, b"enclave-mpc/1 " + purpose.encode()).derive(secret)


class Cryptography:
    """What draws entropy, as an object that a machine is given: a replay gives another one."""

    def random(self, size: int) -> bytes:
        return os.urandom(size)

    def wrap(self, secret: bytes, sealing_key: bytes, context: bytes) -> bytes:
        """HPKE seal of SECRET_BYTES to a hybrid public key (1216 bytes); WRAPPED_BYTES come back.

        Raises:  SealError: that is no public key.
        """
        try:
            key = MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(sealing_key[:_MLKEM_PUBLIC_BYTES]),
                X25519PublicKey.from_public_bytes(sealing_key[_MLKEM_PUBLIC_BYTES:]),
            )
            return _SUITE.encrypt(secret, key, info=context)
        except ValueError:
            raise SealError("sealing key", expected="ML-KEM-768 ‖ X25519") from None


class OpeningKey:
    """The private half of a sealing key, made of a 32-byte seed; never printed."""

    def __init__(self, seed: bytes) -> None:
        mlkem = MLKEM768PrivateKey.from_seed_bytes(derive(seed, "ML-KEM-768", 64))
        x25519 = X25519PrivateKey.from_private_bytes(derive(seed, "X25519", 32))
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """Raises SealError when the key, the context or the bytes are wrong."""
        try:
            return _SUITE.decrypt(wrapped, self._key, info=context)
        except (InvalidTag, ValueError):
            raise SealError("a wrapped key does not open") from None


def table_context(binding: bytes, signer: bytes, table: str) -> bytes:
    """HPKE info of one table: label, binding digest (48), its owner's key (32), its name."""
    return encode(["enclave-mpc/1 table", binding, signer, table])


def result_context(binding: bytes, signer: bytes, recipient: str) -> bytes:
    """HPKE info of one result: label, binding digest (48), the enclave's key (32), the recipient's name."""
    return encode(["enclave-mpc/1 result", binding, signer, recipient])


@dataclass(frozen=True, repr=False)
class StreamSecret:
    """What is wrapped for the receiver of a stream: content key, salt of the commitment, length in bytes."""

    key: bytes
    salt: bytes
    length: int

    def encode(self) -> bytes:
        return self.key + self.salt + self.length.to_bytes(8, "big")

    @classmethod
    def decode(cls, data: bytes) -> "StreamSecret":
        if len(data) != SECRET_BYTES:
            raise SealError("wrapped secret", expected=f"{SECRET_BYTES} bytes", got=len(data))
        return cls(data[:32], data[32:64], int.from_bytes(data[64:], "big"))


def chunk_count(length: int) -> int:
    """How many chunks a stream of `length` bytes has; an empty one has one."""
    return max(1, -(-length // CHUNK_BYTES))


def chunk_bytes(length: int, index: int) -> int:
    """Padded size of chunk `index` of a stream of `length` bytes."""
    if index < chunk_count(length) - 1:
        return CHUNK_BYTES
    rest = length - index * CHUNK_BYTES
    return max(CHUNK_BYTES_MIN, 1 << (rest - 1).bit_length()) if rest > 1 else CHUNK_BYTES_MIN


def padded_bytes(length: int) -> int:
    """Size of a whole stream with its padding."""
    last = chunk_count(length) - 1
    return last * CHUNK_BYTES + chunk_bytes(length, last)


def pad(data: Buffer, length: int, index: int) -> Buffer:
    """Chunk `index` with its padding; full chunks come back as they are."""
    size = chunk_bytes(length, index)
    return data if len(data) == size else bytes(data) + bytes(size - len(data))


def cut(data: Buffer) -> Iterator[Buffer]:
    """The padded chunks of a stream that is held in memory."""
    view = memoryview(data)
    for index in range(chunk_count(len(view))):
        yield pad(view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES], len(view), index)


def chunk_digest(chunk: Buffer) -> bytes:
    """Leaf of the commitment's tree: one padded chunk."""
    return digest("enclave-mpc/1 leaf", chunk)


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """Node of the commitment's tree: one stream."""
    assert all(len(leaf) == DIGEST_BYTES for leaf in leaves)
    return digest("enclave-mpc/1 node", *leaves)


def input_commitment(salt: bytes, contract: bytes, party: bytes, tables: Sequence[tuple[str, int, bytes]]) -> bytes:
    """Root of a party's input: salt, contract digest, party's key, and (name, length, tree root) of each table."""
    return _root("input", salt, contract, party, tables)


def result_commitment(salt: bytes, contract: bytes, recipient: bytes, result: bytes) -> bytes:
    """Root of one result: salt, contract digest, recipient's key, its length and tree root."""
    tree = tree_root([chunk_digest(chunk) for chunk in cut(result)])
    return _root("result", salt, contract, recipient, [("result", len(result), tree)])


def _root(label: str, salt: bytes, contract: bytes, whose: bytes, streams: Sequence[tuple[str, int, bytes]]) -> bytes:
    return digest(
        f"enclave-mpc/1 {label} commitment", encode([salt, contract, whose, [list(stream) for stream in streams]])
    )


class ChunkCipher:
    """Seals and opens the chunks of one stream under one content key, each position once."""

    def __init__(self, secret: StreamSecret) -> None:
        self._aead = AESGCM(secret.key)
        self._last = chunk_count(secret.length) - 1

    def _position(self, index: int) -> tuple[bytes, bytes]:
        last = bytes([index == self._last])
        return index.to_bytes(11, "big") + last, _CHUNK_LABEL + index.to_bytes(8, "big") + last

    def seal(self, chunk: Buffer, index: int) -> bytes:
        """One padded chunk → ciphertext ‖ tag."""
        nonce, context = self._position(index)
        return self._aead.encrypt(nonce, chunk, context)

    def open_into(self, box: Buffer, index: int, out: memoryview) -> None:
        """Open a chunk into `out`, of exactly its padded size.

        Raises:  SealError: wrong key, wrong position, or altered box (deliberately not told apart).
        """
        nonce, context = self._position(index)
        try:
            self._aead.decrypt_into(nonce, box, context, out)
        except (InvalidTag, ValueError):
            raise SealError("a chunk does not open", got=f"chunk {index}") from None
