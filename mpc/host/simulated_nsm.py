"""A simulated Nitro Security Module: real ES384 documents in AWS's format, under a root that only this machine has.

It answers the seven requests as the real one does, limits and errors too, and proves nothing about the machine.

Source: aws-nitro-enclaves-nsm-api (src/api/mod.rs, nsm-test/src/bin/nsm-check.rs, docs/attestation_process.md),
QEMU hw/virtio/virtio-nsm.c, and AWS's own documents of 2021 to 2026 for what those do not say.
"""

import hashlib
import io
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from mpc.host.simulated_root import (
    HOUR_S,
    KEY_SEED_BYTES,
    REGION,
    Entropy,
    Issued,
    SimulatedRoot,
    Template,
    issue,
    key_usage,
    member_name,
    private_key,
)
from mpc.protocol.errors import LocalError

__all__ = ["SimulatedNsm", "SimulatedRoot", "encode_payload", "identity_pcr", "leaf_template", "sign1"]

REQUEST_BYTES_MAX = 0x1000
PCR_BYTES = 48
PCR_COUNT = 32
BOOT_PCR_COUNT = 16  # these are locked when the enclave starts
RANDOM_BYTES = 256
LEAF_LIFE_S, LEAF_BACKDATED_S = 3 * HOUR_S, 3
LEAF_TURN_S = LEAF_LIFE_S - 600  # its last document must still be checked while it is valid
PROTECTED = bytes.fromhex("a1013822")  # {1: -35}: ES384
_DEPTH_MAX = 4  # of a request; the deepest has 2

Clock = Callable[[], int]  # ms since 1970 UTC


class SimulatedNsm:
    """The security module of one simulated enclave; `handle` is one exchange with it. Not for several threads."""

    def __init__(
        self,
        root: SimulatedRoot,
        pcrs: Mapping[int, bytes],
        *,
        instance_id: str = "i-0123456789abcdef0",
        role_arn: str | None = None,
        clock_ms: Clock = lambda: time.time_ns() // 1_000_000,
        entropy: Entropy = os.urandom,
        debug: bool = False,
    ) -> None:
        """An enclave starts on the parent instance `instance_id`, which has the IAM role `role_arn`.

        Args: pcrs: PCR0, PCR1 and PCR2 of its image, and PCR8 if that is signed; 48 bytes each. debug: the
            enclave was started with a console, so those PCRs are all zero.
        """
        if set(pcrs) not in ({0, 1, 2}, {0, 1, 2, 8}) or {len(pcr) for pcr in pcrs.values()} != {PCR_BYTES}:
            raise LocalError("simulated NSM: PCRs", expected="0, 1, 2 and perhaps 8, each of 48 bytes")
        if not re.fullmatch(r"i-([0-9a-f]{8}|[0-9a-f]{17})", instance_id):
            raise LocalError("simulated NSM: instance id", expected="i- and 8 or 17 hexadecimal digits")
        self._root, self._instance_id, self._clock_ms, self._entropy = root, instance_id, clock_ms, entropy
        self.module_id = f"{instance_id}-enc{clock_ms() % (1 << 48):012x}{entropy(2).hex()}"
        self._pcrs = [bytes(PCR_BYTES)] * PCR_COUNT
        self._locked = set(range(BOOT_PCR_COUNT))
        if not debug:
            for index, value in pcrs.items():
                self._pcrs[index] = value
        if role_arn is not None:
            self._pcrs[3] = identity_pcr(role_arn)
        self._pcrs[4] = identity_pcr(instance_id)
        self._leaf: tuple[Issued, list[bytes]] | None = None

    def handle(self, request: bytes) -> bytes:
        """The encoded response to any bytes whatsoever; never raises."""
        if len(request) > REQUEST_BYTES_MAX:
            return cbor2.dumps({"Error": "InputTooLarge"})
        try:
            return cbor2.dumps(self._answer(_parse(request)))
        except _Refusal as refusal:
            return cbor2.dumps({"Error": refusal.name})

    def serve(self, sock: socket.socket) -> None:
        """Answer the packets of a blocking SOCK_SEQPACKET socket until its other end is closed."""
        self._current_leaf(self._clock_ms() // 1000)  # made before anybody waits for it
        try:
            while request := sock.recv(REQUEST_BYTES_MAX + 1):
                sock.send(self.handle(request))
        except ConnectionError:
            return

    def _answer(self, request: object) -> object:
        match request:
            case "DescribeNSM":
                return {
                    "DescribeNSM": {
                        **dict(version_major=1, version_minor=0, version_patch=0, module_id=self.module_id),
                        **dict(max_pcrs=PCR_COUNT, locked_pcrs=sorted(self._locked), digest="SHA384"),
                    }
                }
            case "GetRandom":
                return {"GetRandom": {"random": self._entropy(RANDOM_BYTES)}}
            case {"DescribePCR": dict(arguments)}:
                index = _number(arguments, "index", PCR_COUNT - 1)
                return {"DescribePCR": {"lock": index in self._locked, "data": self._pcrs[index]}}
            case {"ExtendPCR": dict(arguments)}:
                index, data = _number(arguments, "index", PCR_COUNT - 1), _string(arguments, "data")
                self._refuse_locked(index)
                self._pcrs[index] = hashlib.sha384(self._pcrs[index] + data).digest()
                return {"ExtendPCR": {"data": self._pcrs[index]}}
            case {"LockPCR": dict(arguments)}:
                index = _number(arguments, "index", PCR_COUNT - 1)
                self._refuse_locked(index)
                self._locked.add(index)
                return "LockPCR"
            case {"LockPCRs": dict(arguments)}:
                self._locked.update(range(_number(arguments, "range", PCR_COUNT)))
                return "LockPCRs"
            case {"Attestation": dict(arguments)}:
                names = ("public_key", "user_data", "nonce")  # in the document's order
                given = {name: None if arguments.get(name) is None else _string(arguments, name) for name in names}
                return {"Attestation": {"document": self._attest(given)}}
        raise _Refusal("InvalidOperation")

    def _refuse_locked(self, index: int) -> None:
        if index in self._locked:
            raise _Refusal("ReadOnlyIndex")

    def _attest(self, given: Mapping[str, bytes | None]) -> bytes:
        now_ms = self._clock_ms()
        leaf, cabundle = self._current_leaf(now_ms // 1000)
        fields = {
            "module_id": self.module_id,
            "digest": "SHA384",
            "timestamp": now_ms,
            "pcrs": {index: self._pcrs[index] for index in sorted(self._locked)},
            "certificate": leaf.der,
            "cabundle": cabundle,
            **given,
        }
        return sign1(encode_payload(fields), leaf.key)

    def _current_leaf(self, now_s: int) -> tuple[Issued, list[bytes]]:
        if self._leaf:
            age_s = now_s - self._leaf[0].template.not_before_s
            if 0 <= age_s < LEAF_TURN_S:
                return self._leaf
        chain = self._root.chain(self._instance_id, now_s)
        key = private_key(self._entropy(KEY_SEED_BYTES))
        self._leaf = issue(leaf_template(self.module_id, now_s), key, chain[-1]), [authority.der for authority in chain]
        return self._leaf


class _Refusal(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _parse(request: bytes) -> object:
    """A text, or a map of one entry."""
    stream = io.BytesIO(request)
    try:
        value = cbor2.CBORDecoder(stream, allow_duplicate_keys=False, max_depth=_DEPTH_MAX).decode()
    except Exception:  # the enclave may send anything, and cbor2 builds more than plain values
        raise _Refusal("InvalidOperation") from None
    if stream.tell() != len(request) or (isinstance(value, dict) and len(value) != 1):
        raise _Refusal("InvalidOperation")
    return value


def _number(arguments: Mapping[Any, object], name: str, high: int) -> int:
    """A 16-bit number, at most `high`."""
    value = arguments.get(name)
    if type(value) is not int or not 0 <= value <= 0xFFFF:
        raise _Refusal("InvalidOperation")
    if value > high:
        raise _Refusal("InvalidIndex")
    return value


def _string(arguments: Mapping[Any, object], name: str) -> bytes:
    """Bytes, or text as its UTF-8 bytes. Only the size of the whole request limits them."""
    value = arguments.get(name)
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        raise _Refusal("InvalidOperation")
    return value


def sign1(payload: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """An untagged COSE_Sign1 (RFC 9052 section 4.2) with ES384, r ‖ s, deterministic (RFC 6979)."""
    signed = cbor2.dumps(["Signature1", PROTECTED, b"", payload])
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
    return cbor2.dumps([PROTECTED, {}, payload, r.to_bytes(48, "big") + s.to_bytes(48, "big")])


def encode_payload(fields: Mapping[str, object]) -> bytes:
    """The fields in their order, in a map of indefinite length, as AWS's documents have it since August 2025."""
    return b"\xbf" + b"".join(cbor2.dumps(key) + cbor2.dumps(value) for key, value in fields.items()) + b"\xff"


def leaf_template(module_id: str, now_s: int) -> Template:
    """The certificate of an enclave's key: three hours, and a serial number of enclave id and time."""
    return Template(
        subject=member_name(f"{module_id}.{REGION}.simulated"),
        serial=int(f"{module_id.partition('-enc')[2]}{now_s:016x}", 16),
        not_before_s=now_s - LEAF_BACKDATED_S,
        not_after_s=now_s + LEAF_LIFE_S,
        extensions=(
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (key_usage("digital_signature", "content_commitment"), False),
        ),
    )


def identity_pcr(identity: str) -> bytes:
    """PCR3 of the role's ARN, PCR4 of the instance id: SHA384(0^48 ‖ ASCII)."""
    return hashlib.sha384(bytes(PCR_BYTES) + identity.encode("ascii")).digest()
