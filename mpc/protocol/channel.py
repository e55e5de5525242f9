"""The enclave's one channel: frames of kind (1 byte), length (4 bytes, big-endian) and body."""

import struct
from enum import IntEnum

from mpc.protocol.errors import EncodingError
from mpc.protocol.sealing import BOX_BYTES_MAX
from mpc.protocol.signing import ENVELOPE_BYTES_MAX


class Frame(IntEnum):
    BEGIN = 1  # epoch (4), envelope of the contract; host → enclave
    MESSAGE = 2  # envelope; both ways
    CHUNK = 3  # stream (4), index (4), box; both ways
    REFUSED = 4  # text without data: why the last frame was refused; enclave → host


HEADER = struct.Struct(">BI")
_EPOCH = struct.Struct(">I")
_POSITION = struct.Struct(">II")
BODY_BYTES_MAX = max(ENVELOPE_BYTES_MAX + _EPOCH.size, BOX_BYTES_MAX + _POSITION.size)


def frame(kind: Frame, body: bytes) -> bytes:
    return HEADER.pack(kind, len(body)) + body


def begin_frame(epoch: int, contract: bytes) -> bytes:
    return frame(Frame.BEGIN, _EPOCH.pack(epoch) + contract)


def chunk_head(stream: int, index: int, box_bytes: int) -> bytes:
    """All of a chunk's frame but the box, which follows as it is."""
    return HEADER.pack(Frame.CHUNK, _POSITION.size + box_bytes) + _POSITION.pack(stream, index)


def parse_header(header: bytes | memoryview) -> tuple[Frame, int]:
    """Kind and length of the body that follows; raises EncodingError before any memory is taken for it."""
    kind, length = HEADER.unpack(header)
    if kind not in Frame.__members__.values() or length > BODY_BYTES_MAX:
        raise EncodingError("frame", expected=f"a known kind, at most {BODY_BYTES_MAX} bytes", got=(kind, length))
    return Frame(kind), length


def parse_begin(body: bytes | memoryview) -> tuple[int, bytes]:
    """Epoch and the contract's envelope."""
    return int(_unpack(_EPOCH, body)[0]), bytes(body[_EPOCH.size :])


def parse_chunk(body: bytes | memoryview) -> tuple[int, int, memoryview]:
    """Stream, index and box (a view into `body`)."""
    stream, index = _unpack(_POSITION, body)
    return stream, index, memoryview(body)[_POSITION.size :]


def _unpack(form: struct.Struct, body: bytes | memoryview) -> tuple[int, ...]:
    if len(body) < form.size:
        raise EncodingError("frame body", expected=f"at least {form.size} bytes", got=len(body))
    return form.unpack_from(body)
