"""The enclave's security module (NSM): one client for `/dev/nsm` and for the simulated one behind a socket.

Source: aws-nitro-enclaves-nsm-api src/api/mod.rs (messages); Linux include/uapi/linux/nsm.h and drivers/misc/nsm.c.
"""

import errno
import fcntl
import io
import os
import socket
import struct
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import cbor2

from mpc.protocol.errors import LocalError

REQUEST_BYTES_MAX = 0x1000
RESPONSE_BYTES_MAX = 0x3000
_DEPTH_MAX = 8  # an attestation document's payload has 3
_IOCTL_RAW = 0xC0200A00  # _IOWR(0x0A, 0, struct nsm_raw)
_RAW = struct.Struct("=4Q")  # struct nsm_raw: address and length of the request, then of the response


class NsmError(LocalError):
    """The NSM refused the request or cannot be reached; `name` is the NSM's own word for it."""

    def __init__(self, name: str, why: str = "") -> None:
        super().__init__(f"NSM: {name} ({why})" if why else f"NSM: {name}")
        self.name = name


class Pcr(NamedTuple):
    lock: bool
    data: bytes  # 48 bytes


class Nsm:
    """The seven requests; each raises NsmError. `call` carries one request there and its response back."""

    def __init__(self, call: Callable[[bytes], bytes]) -> None:
        self._call = call

    def describe(self) -> dict[str, Any]:
        """version_major, version_minor, version_patch, module_id, max_pcrs, locked_pcrs (indices), digest (SHA384)."""
        numbers = dict.fromkeys(("version_major", "version_minor", "version_patch", "max_pcrs"), int)
        return self._ask("DescribeNSM", None, **numbers, module_id=str, locked_pcrs=list, digest=str)

    def describe_pcr(self, index: int) -> Pcr:
        answer = self._ask("DescribePCR", {"index": index}, lock=bool, data=bytes)
        return Pcr(answer["lock"], answer["data"])

    def extend_pcr(self, index: int, data: bytes) -> bytes:
        """The PCR's new value: SHA384(old value ‖ data). ReadOnlyIndex when it is locked."""
        value: bytes = self._ask("ExtendPCR", {"index": index, "data": data}, data=bytes)["data"]
        return value

    def lock_pcr(self, index: int) -> None:
        """Fix the PCR's value and have it in every document from now on. ReadOnlyIndex when it is locked."""
        self._ask("LockPCR", {"index": index})

    def lock_pcrs(self, below: int) -> None:
        """Lock every PCR whose index is less than `below`; those that are locked stay so."""
        self._ask("LockPCRs", {"range": below})

    def random(self) -> bytes:
        """The NSM's own entropy, 256 bytes as far as is known and at least 32."""
        value: bytes = self._ask("GetRandom", None, random=bytes)["random"]
        if len(value) < 32:
            raise NsmError("InvalidResponse", "GetRandom")
        return value

    def attest(self, *, user_data: bytes | None, nonce: bytes | None, public_key: bytes | None) -> bytes:
        """An attestation document: the three values (up to 1024 bytes each), every locked PCR, and the time."""
        arguments = {"user_data": user_data, "nonce": nonce, "public_key": public_key}
        document: bytes = self._ask("Attestation", arguments, document=bytes)["document"]
        return document

    def _ask(self, name: str, arguments: dict[str, Any] | None, **fields: type) -> dict[str, Any]:
        """Send the name, or {name: arguments}; {name: fields}, the name alone or {"Error": its name} comes back."""
        request = cbor2.dumps(name if arguments is None else {name: arguments})
        if len(request) > REQUEST_BYTES_MAX:
            raise NsmError("InputTooLarge", name)
        try:
            response = _decode(self._call(request))
        except OSError as error:  # of the driver, ETIMEDOUT: no answer within two minutes
            refused = "InputTooLarge" if error.errno == errno.EMSGSIZE else "InternalError"
            raise NsmError(refused, f"{name}: {error.strerror}") from None
        if isinstance(response, dict) and response.keys() == {"Error"}:
            raise NsmError(str(response["Error"]), name)
        answer = {} if response == name else response.get(name) if isinstance(response, dict) else None
        if not isinstance(answer, dict) or any(type(answer.get(key)) is not kind for key, kind in fields.items()):
            raise NsmError("InvalidResponse", name)
        return answer


def device(path: str = "/dev/nsm", ioctl: Callable[[int, int, bytearray], object] = fcntl.ioctl) -> Nsm:
    """The NSM of the Nitro enclave that we run in; `path` stays open for the life of the process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def call(request: bytes) -> bytes:
        # The driver cuts, without a word, what does not fit into our buffer: so that is as long as a response can be,
        # and a response that was cut all the same is not whole CBOR.
        sent, received = array("B", request), array("B", bytes(RESPONSE_BYTES_MAX))
        raw = bytearray(_RAW.pack(*sent.buffer_info(), *received.buffer_info()))
        ioctl(descriptor, _IOCTL_RAW, raw)
        return received[: _RAW.unpack(raw)[3]].tobytes()

    return Nsm(call)


def over_socket(sock: socket.socket) -> Nsm:
    """The simulated NSM behind a blocking SOCK_SEQPACKET socket: one packet is one message, whole or not at all."""
    if sock.type != socket.SOCK_SEQPACKET or sock.gettimeout() is not None:
        raise LocalError("NSM socket", expected="a blocking SOCK_SEQPACKET one")

    def call(request: bytes) -> bytes:
        sock.send(request)
        return sock.recv(RESPONSE_BYTES_MAX)  # nothing when the other end is closed, and nothing is not CBOR

    return Nsm(call)


def timestamp_ms(document: bytes) -> int:
    """The time, in ms since 1970 UTC, of a document that our own NSM signed just now: the enclave's only clock.

    Nothing is verified: never ask this of a document that came from anywhere else.
    """
    match _decode(document):
        case [bytes(), dict(), bytes(payload), bytes()]:
            fields = _decode(payload)
            if isinstance(fields, dict) and type(value := fields.get("timestamp")) is int and value > 0:
                return value
    raise NsmError("InvalidResponse", "the document has no time")


def _decode(data: bytes) -> object:
    stream = io.BytesIO(data)
    try:
        value: object = cbor2.CBORDecoder(stream, allow_duplicate_keys=False, max_depth=_DEPTH_MAX).decode()
    except cbor2.CBORDecodeError:
        value = None
    if value is None or stream.tell() != len(data):
        raise NsmError("InvalidResponse", "not one whole CBOR item")
    return value
