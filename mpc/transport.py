"""What parties, host and coordinator say to each other: msgpack frames on a byte stream, and the session's log.

A frame is a length (4 bytes, big-endian) and a msgpack map with text keys. Nothing here is trusted: messages
are signed, chunks are sealed, and the log's own entries are hints that a machine checks.
"""

import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgpack
import trio

from mpc.protocol.errors import EncodingError, PeerError
from mpc.protocol.signing import ENVELOPE_BYTES_MAX

FRAME_BYTES_MAX = ENVELOPE_BYTES_MAX + 1024  # the largest thing carried is one envelope; a chunk is 1 MiB
RETRY_S, RETRY_S_MAX = 0.05, 2.0  # between attempts to reach a coordinator
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel)
SOCKET_BUFFER_BYTES = 4 << 20
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Said:
    """A signed message, in the order in which the coordinator took it."""

    envelope: bytes = field(repr=False)


@dataclass(frozen=True)
class EpochOpened:
    """The coordinator calls for consents to a new epoch."""

    epoch: int


@dataclass(frozen=True)
class Ended:
    """The coordinator closes the session: `released`, `aborted`, `not heard` or `enclave lost`."""

    outcome: str
    reason: str = ""
    names: tuple[str, ...] = ()


Entry = Said | EpochOpened | Ended


def encode_entry(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Said):
        return {"said": entry.envelope}
    if isinstance(entry, EpochOpened):
        return {"epoch": entry.epoch}
    return {"ended": entry.outcome, "reason": entry.reason, "names": list(entry.names)}


def decode_entry(frame: dict[str, Any]) -> Entry:
    """Raises EncodingError for anything that `encode_entry` does not write."""
    match frame:
        case {"said": bytes(envelope)}:
            return Said(envelope)
        case {"epoch": int(epoch)}:
            return EpochOpened(epoch)
        case {"ended": str(outcome), "reason": str(reason), "names": list(names)}:
            return Ended(outcome, reason, tuple(str(name) for name in names))
    raise EncodingError("log entry", got=sorted(map(str, frame))[:4])


class Refused(PeerError):
    """The other end refused a request."""


class Connection:
    """Frames on one stream. The caller owns deadlines, and sends from one task at a time."""

    def __init__(self, stream: trio.SocketStream, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._stream, self._most = stream, frame_bytes_max
        self._buffer = bytearray()
        for option in (trio.socket.SO_SNDBUF, trio.socket.SO_RCVBUF):  # room for a chunk: fewer turns
            stream.socket.setsockopt(trio.socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)

    async def send(self, frame: dict[str, Any]) -> None:
        body = msgpack.packb(frame)
        await self._stream.send_all(_LENGTH.pack(len(body)))
        await self._stream.send_all(body)

    async def receive(self) -> dict[str, Any]:
        """The next frame; raises trio.EndOfChannel at the end, EncodingError for what is no frame."""
        (length,) = _LENGTH.unpack(await self._take(_LENGTH.size))
        if length > self._most:
            raise EncodingError("frame", expected=f"at most {self._most} bytes", got=length)
        return unpack(await self._take(length))

    async def ask(self, frame: dict[str, Any]) -> dict[str, Any]:
        """Send a request and give its answer; raises Refused with the other end's words."""
        await self.send(frame)
        answer = await self.receive()
        if "refused" in answer:
            raise Refused(str(answer["refused"])[:500])
        return answer

    async def next(self) -> dict[str, Any] | None:
        """The next frame, or None when the other end has closed between two frames."""
        try:
            return await self.receive()
        except trio.EndOfChannel:
            return None

    async def aclose(self) -> None:
        with trio.move_on_after(1, shield=True):
            await self._stream.aclose()

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = await self._stream.receive_some(max(65536, count - len(self._buffer)))
            if not data:
                if self._buffer:
                    raise EncodingError("stream", expected="a whole frame", got="its beginning")
                raise trio.EndOfChannel
            self._buffer += data
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


def unpack(body: bytes) -> dict[str, Any]:
    """One msgpack map with text keys; raises EncodingError."""
    try:
        frame = msgpack.unpackb(body, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, msgpack.UnpackException) as error:
        raise EncodingError(f"frame is no msgpack ({type(error).__name__})") from None
    if not isinstance(frame, dict) or not all(isinstance(key, str) for key in frame):
        raise EncodingError("frame", expected="a map with text keys", got=type(frame).__name__)
    return frame


def _refuse_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension {code} of {len(data)} bytes")


@asynccontextmanager
async def one_fault() -> AsyncIterator[trio.Nursery]:
    """A nursery that raises the first of its tasks' exceptions by itself, and not in a group."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        fault: BaseException = group
        while isinstance(fault, BaseExceptionGroup):
            fault = fault.exceptions[0]
        raise fault from None


class Link:
    """One participant's way to one session at a coordinator that may be restarting at any moment."""

    def __init__(self, address: str, session: bytes, waiting: Callable[[], None]) -> None:
        """`address`: the coordinator's Unix socket.  `waiting` is called when it does not answer."""
        self._address, self._session, self._waiting = address, session, waiting

    async def entries(self) -> AsyncGenerator[tuple[Entry, bool], None]:
        """The log's entries, each once, for ever; with each, whether all that was there at first has come."""
        heard = 0
        there: int | None = None
        wait = RETRY_S
        while True:
            try:
                connection = Connection(await trio.open_unix_socket(self._address))
                async with aclosing(connection):
                    answer = await connection.ask({"op": "log", "session": self._session})
                    there = int(answer["entries"]) if there is None else there
                    number = 0
                    while (frame := await connection.next()) is not None:
                        number += 1
                        if number > heard:
                            heard = number
                            yield decode_entry(frame), heard >= there
                        wait = RETRY_S
            except BROKEN:
                pass
            self._waiting()
            await trio.sleep(wait)
            wait = min(2 * wait, RETRY_S_MAX)

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request about this session; raises Refused."""
        answer: dict[str, Any] = await self.talk(lambda connection: connection.ask(self.about(request)))
        return answer

    def about(self, request: dict[str, Any]) -> dict[str, Any]:
        return {**request, "session": self._session}

    async def talk(self, conversation: Callable[[Connection], Awaitable[Any]]) -> Any:
        """Have a conversation on a connection of its own; again, from its start, when that breaks."""
        wait = RETRY_S
        while True:
            try:
                connection = Connection(await trio.open_unix_socket(self._address))
                async with aclosing(connection):
                    return await conversation(connection)
            except BROKEN:
                self._waiting()
            await trio.sleep(wait)
            wait = min(2 * wait, RETRY_S_MAX)
