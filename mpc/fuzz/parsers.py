"""Every decoder: one table says what decodes, what writes it back, what may be raised, and real bytes to begin with.

mpc.fuzz.decoding attacks them all.
"""

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import cbor2
import msgpack
import trio

from enclave_runtime.nsm import RESPONSE_BYTES_MAX, Nsm, NsmError, timestamp_ms
from enclave_runtime.programs import ProgramRefused
from enclave_runtime.programs.inputs import open_table
from mpc import scenario, settings
from mpc.attestation import AppraisalPolicy, Document, unverified_document, verify
from mpc.cli.unverified import unverified_message
from mpc.fuzz import corpus
from mpc.fuzz.corpus import session
from mpc.fuzz.mutations import Mutator, mutate_bytes, mutate_cbor, mutate_toml
from mpc.image import cpio, eif, signature
from mpc.image.eif import ImageError, Kind
from mpc.image.measure import describe
from mpc.protocol import channel, encoding
from mpc.protocol.channel import HEADER, Frame
from mpc.protocol.contract import Participant
from mpc.protocol.encoding import Record
from mpc.protocol.errors import (
    AppraisalError,
    ContractError,
    EncodingError,
    LocalError,
    PeerError,
    SealError,
    SignatureError,
)
from mpc.protocol.messages import KINDS, Binding
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import SECRET_BYTES, StreamSecret
from mpc.protocol.signing import ENVELOPE_BYTES_MAX, Signed, encode_protected, open_signed
from mpc.receipt import verify_receipt
from mpc.transport import Connection, decode_entry, encode_entry, unpack
from parties import identity, policy
from parties.party import Committed, Consented, Finished, Sealed

MIB = 1 << 20


def whole(data: bytes) -> bytes:
    return data


@dataclass(frozen=True)
class Decoder:
    """One row. Adding it is all that it takes for every engine to attack a decoder."""

    decode: Callable[[bytes], Any]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], Sequence[bytes]]
    encode: Callable[[Any], bytes] | None = None  # None: what it gives cannot be written back
    form: Callable[[bytes], bytes] | None = whole  # what of the bytes counts; None: there are many spellings
    mutate: Mutator = mutate_cbor
    memory_bytes: int = 48 * MIB  # of Python, for the largest input; the decoded 200,000 items take 25


# Decoders that are not one function of bytes.


@contextmanager
def as_file(data: bytes) -> Iterator[Path]:
    """A file in memory that only its owner may read."""
    file = os.memfd_create("parsers")
    try:
        os.fchmod(file, 0o600)
        os.write(file, data)
        yield Path(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def _envelope(data: bytes) -> tuple[Signed, bytes]:
    signed = open_signed(data)
    return signed, encoding.decode(data, ENVELOPE_BYTES_MAX)[3]


def _write_envelope(value: tuple[Signed, bytes]) -> bytes:
    signed, by = value
    return encoding.encode([encode_protected(signed.signer, signed.kind), {}, signed.payload, by])


def _channel_frame(data: bytes) -> tuple[Frame, Any]:
    if len(data) < HEADER.size:
        raise EncodingError("the channel ended")
    kind, length = channel.parse_header(data[: HEADER.size])
    body = data[HEADER.size :]
    if len(body) != length:
        raise EncodingError("the channel ended")
    read = {Frame.BEGIN: channel.parse_begin, Frame.CHUNK: channel.parse_chunk}.get(kind)
    return kind, body if read is None else read(body)


def _write_channel_frame(value: tuple[Frame, Any]) -> bytes:
    kind, body = value
    if kind is Frame.BEGIN:
        return channel.begin_frame(*body)
    if kind is Frame.CHUNK:
        stream, index, box = body
        return channel.chunk_head(stream, index, len(box)) + bytes(box)
    return channel.frame(kind, body)


def _sorted_frame(frame: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(dict(sorted(frame.items())))
    return packed


def _transport_frames(data: bytes) -> list[dict[str, Any]]:
    """What a connection gives until its other end closes."""

    async def receive() -> list[dict[str, Any]]:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            theirs.setblocking(False)
            theirs.send(data[: 1 << 17])
        found = []
        connection = Connection(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            while (frame := await connection.next()) is not None:
                found.append(frame | ({"box": bytes(frame["box"])} if "box" in frame else {}))
        finally:
            await connection.aclose()
        return found

    return trio.run(receive)


def _write_transport_frames(frames: list[dict[str, Any]]) -> bytes:
    out = b""
    for frame in frames:
        box = frame.get("box", b"")
        body = msgpack.packb({key: value for key, value in frame.items() if key != "box"})
        out += struct.pack(">II", len(body), len(box)) + body + box
    return out


def _document(data: bytes) -> tuple[bool, Document]:
    return data.startswith(b"\xd2"), unverified_document(data)


def _write_document(value: tuple[bool, Document]) -> bytes:
    tagged, document = value
    parts = [bytes.fromhex("a1013822"), {}, document.payload, document.signature]
    return b"\xd2" * tagged + cbor2.dumps(parts)


def _evidence(data: bytes) -> object:
    return verify(corpus.attested(data), session().world.policy, nonce=b"n" * 16)


def _image(data: bytes) -> tuple[eif.Image, list[tuple[Kind, list[eif.Buffer]]]]:
    with as_file(data) as path, eif.opened(path) as image:
        json.dumps(describe(path))  # checks CRC and signature, and reads the metadata
        return image, [(section.kind, [image.read(section)]) for section in image.sections]


def _write_image(value: tuple[eif.Image, list[tuple[Kind, list[eif.Buffer]]]]) -> bytes:
    image, sections = value
    with as_file(b"") as path:
        eif.write(path, image.architecture, sections)
        return path.read_bytes()


def _read_of_image(data: bytes) -> bytes:
    """Without default memory and processors, which nothing reads, and the CRC, which is of them too."""
    return data[:8] + bytes(16) + data[24 : eif.HEADER.size - 4] + bytes(4) + data[eif.HEADER.size :]


def _mutate_image(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Mostly with a CRC that fits."""
    out, end = mutate_bytes(data, random, others), eif.HEADER.size
    if random.random() < 0.1:
        return out
    return out[: end - 4] + zlib.crc32(out[end:], zlib.crc32(out[: end - 4])).to_bytes(4, "big") + out[end:]


def _ramdisk(data: bytes) -> dict[str, bytes]:
    found = list(cpio.entries(lambda offset, size: data[offset : offset + size], len(data)))
    return {entry.name: data[entry.offset : entry.offset + entry.size] for entry in found if not entry.folder}


def _settings(read: Callable[[Path], Any], data: bytes) -> Any:
    with as_file(data) as path:
        return read(path)


def _write_settings(value: Any) -> bytes:
    return settings.write(value).encode()


def _replay(path: Path) -> object:
    from mpc.fuzz import replay

    return replay.read(path)


def _nsm_reply(data: bytes) -> list[object]:
    """By all that may wait for one."""
    client, understood = Nsm(lambda _: data), []
    asks: tuple[Callable[[], object], ...] = (
        *(client.describe, client.random, partial(client.describe_pcr, 0), partial(client.extend_pcr, 0, b"")),
        *(partial(client.lock_pcr, 0), partial(client.lock_pcrs, 0), partial(timestamp_ms, data)),
        partial(client.attest, user_data=None, nonce=None, public_key=None),
    )
    for ask in asks:
        try:
            understood.append(ask())
        except NsmError:
            continue
    if not understood:
        raise NsmError("InvalidResponse")
    return understood


def _nsm_request(data: bytes) -> None:
    reply = corpus.nsm().handle(data)
    if len(reply) > RESPONSE_BYTES_MAX:
        raise AssertionError("a longer reply than the NSM has")
    cbor2.loads(reply)


def _record(cls: type[Record], seeds: Callable[[], Sequence[bytes]]) -> Decoder:
    return Decoder(cls.decode, (EncodingError, ContractError), seeds, lambda record: record.encode())


def _memories(cls: type[Record]) -> Callable[[], Sequence[bytes]]:
    """What a party's ledger remembers."""
    return lambda: [
        memory.encode()
        for party in session().world.parties.values()
        for memory in party.ledger
        if isinstance(memory, cls)
    ]


def _participants() -> Sequence[bytes]:
    return [one.encode() for one in session().world.contract.participants]


def _bindings() -> Sequence[bytes]:
    return [enclave.binding.encode() for enclave in session().world.enclaves if enclave.binding]


def _framed() -> Sequence[bytes]:
    frames = [unpack(request) for request in corpus.requests()]
    return [_write_transport_frames(frames), *(_write_transport_frames([{**f, "box": bytes(64)}]) for f in frames)]


PARSERS: dict[str, Decoder] = {
    "plain CBOR": Decoder(encoding.decode, (EncodingError,), lambda: session().envelopes, encoding.encode),
    **{kind: _record(cls, partial(lambda kind: session().payloads(kind), kind)) for kind, cls in KINDS.items()},
    "binding": _record(Binding, _bindings),
    "participant": _record(Participant, _participants),
    **{f"ledger: {cls.__name__}": _record(cls, _memories(cls)) for cls in (Committed, Consented, Sealed, Finished)},
    "envelope": Decoder(_envelope, (EncodingError, SignatureError), lambda: session().envelopes, _write_envelope),
    "envelope, unverified": Decoder(
        unverified_message, (EncodingError, ContractError), lambda: session().envelopes, memory_bytes=64 * MIB
    ),
    "proposal": Decoder(Session.propose, (PeerError,), lambda: session().of("contract"), mutate=corpus.signed_again),
    "receipt": Decoder(
        lambda data: verify_receipt(data, session().world.policy),
        (PeerError,),
        lambda: session().of("release"),
        mutate=corpus.signed_again,
    ),
    "channel frame": Decoder(
        _channel_frame, (EncodingError,), corpus.channel_frames, _write_channel_frame, mutate=mutate_bytes
    ),
    "transport frame": Decoder(
        unpack, (EncodingError,), corpus.requests, msgpack.packb, form=None, mutate=mutate_bytes
    ),
    "transport connection": Decoder(
        _transport_frames,
        (EncodingError, trio.BrokenResourceError),
        _framed,
        _write_transport_frames,
        form=None,
        mutate=mutate_bytes,
    ),
    "log entry": Decoder(
        lambda data: decode_entry(unpack(data)),
        (EncodingError,),
        corpus.log_entries,
        lambda entry: _sorted_frame(encode_entry(entry)),
        form=lambda data: _sorted_frame(unpack(data)),
        mutate=mutate_bytes,
    ),
    "stream secret": Decoder(
        StreamSecret.decode,
        (SealError,),
        lambda: [bytes(range(SECRET_BYTES))],
        StreamSecret.encode,
        mutate=mutate_bytes,
    ),
    "attestation document": Decoder(_document, (AppraisalError,), lambda: session().documents, _write_document),
    "attestation, signed": Decoder(_evidence, (AppraisalError,), lambda: [corpus.payload()]),
    "EIF": Decoder(_image, (LocalError,), corpus.images, _write_image, form=_read_of_image, mutate=_mutate_image),
    "EIF signature": Decoder(
        lambda data: signature.verify(data, bytes(48)), (ImageError,), lambda: [corpus.signature(bytes(48))]
    ),
    "cpio": Decoder(
        _ramdisk,
        (ImageError,),
        corpus.ramdisks,
        lambda files: b"".join(cpio.pack(files)),
        mutate=mutate_bytes,
    ),
    "scenario": Decoder(
        partial(_settings, scenario.load),
        (LocalError,),
        corpus.scenarios,
        _write_settings,
        form=None,
        mutate=mutate_toml,
    ),
    "party policy": Decoder(
        partial(_settings, policy.load), (LocalError,), corpus.policies, _write_settings, form=None, mutate=mutate_toml
    ),
    "appraisal policy": Decoder(
        lambda data: AppraisalPolicy.from_toml(data.decode(errors="replace")),
        (LocalError,),
        corpus.appraisal_policies,
        mutate=mutate_toml,
    ),
    "replay file": Decoder(partial(_settings, _replay), (LocalError,), lambda: [corpus.REPLAY], mutate=mutate_bytes),
    "identity": Decoder(partial(_settings, partial(identity.load_or_create, "ada")), (LocalError,), corpus.identities),
    "NSM request": Decoder(_nsm_request, (), corpus.nsm_requests),
    "NSM reply": Decoder(_nsm_reply, (NsmError,), corpus.nsm_replies),
    "Arrow table": Decoder(
        lambda data: open_table(data, corpus.TABLE),
        (ProgramRefused,),
        corpus.arrow_tables,
        corpus.stream,
        form=None,
        mutate=mutate_bytes,
    ),
}
