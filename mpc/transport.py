"""What parties, host and coordinator say to each other: msgpack frames on a byte stream, and the session's log.

A frame is two lengths (4 bytes each, big-endian), a msgpack map with text keys, and perhaps a chunk. Nothing here is
trusted: messages are signed, chunks are sealed, and the log's own entries are hints that a machine checks.
"""

import os
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import trio

from mpc.protocol.errors import EncodingError, PeerError
from mpc.protocol.sealing import BOX_BYTES_MAX, Buffer
from mpc.protocol.signing import ENVELOPE_BYTES_MAX

FRAME_BYTES_MAX = ENVELOPE_BYTES_MAX + 1024  # the largest thing carried is one envelope
RETRY_S, RETRY_S_MAX = 0.05, 2.0  # between attempts to reach a coordinator
BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel)
SOCKET_BUFFER_BYTES = 4 << 20
NAMES_MAX, FIELDS_MAX = 4096, 16  # the longest list is of participants' names
_LENGTHS = struct.Struct(">II")


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
        case {"said": bytes(envelope), **more} if not more:
            return Said(envelope)
        case {"epoch": int(epoch), **more} if not more:
            return EpochOpened(epoch)
        case {"ended": str(outcome), "reason": str(reason), "names": list(names), **more} if not more:
            if all(isinstance(name, str) for name in names):
                return Ended(outcome, reason, tuple(names))
    raise EncodingError("log entry", got=sorted(map(str, frame))[:4])


class Refused(PeerError):
    """The other end refused a request."""


class Connection:
    """Frames on one stream socket. The caller owns deadlines, and sends from one task at a time.

    A chunk travels behind its frame, as it is: in the frame that comes out it is `box`, a view that is good until
    the next `receive`, so that a gigabyte goes through in one buffer.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream, self._socket = stream, stream.socket
        self._box = bytearray()
        for option in (trio.socket.SO_SNDBUF, trio.socket.SO_RCVBUF):  # room for a chunk: fewer turns
            self._socket.setsockopt(trio.socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)

    async def send(self, frame: dict[str, Any], box: Buffer = b"") -> None:
        await self.send_head(frame, len(box))
        if box:
            await self._stream.send_all(box)

    async def send_file(self, frame: dict[str, Any], path: Path) -> None:
        """A frame with a whole file as its box."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            await self.send_head(frame, size)
            sent = 0
            while sent < size:
                try:
                    sent += os.sendfile(self._socket.fileno(), file.fileno(), sent, size - sent)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                except OSError as error:
                    raise trio.BrokenResourceError(str(error)) from None

    async def send_head(self, frame: dict[str, Any], box_bytes: int) -> None:
        body = msgpack.packb(frame)
        await self._stream.send_all(_LENGTHS.pack(len(body), box_bytes) + body)

    async def receive(self) -> dict[str, Any]:
        """The next frame; raises trio.EndOfChannel at the end, EncodingError for what is no frame."""
        head = bytearray(_LENGTHS.size)
        await self._fill(memoryview(head), at_start=True)
        length, box_bytes = _LENGTHS.unpack(head)
        if length > FRAME_BYTES_MAX or box_bytes > BOX_BYTES_MAX:
            expected = f"at most {FRAME_BYTES_MAX} bytes and a box of {BOX_BYTES_MAX}"
            raise EncodingError("frame", expected=expected, got=(length, box_bytes))
        body = bytearray(length)
        await self._fill(memoryview(body))
        frame = unpack(bytes(body))
        if "box" in frame:
            raise EncodingError("frame", expected="a box behind it, not in it")
        if box_bytes:
            self._box = self._box or bytearray(BOX_BYTES_MAX)
            frame["box"] = memoryview(self._box)[:box_bytes]
            await self._fill(frame["box"])
        return frame

    async def ask(self, frame: dict[str, Any], box: Buffer = b"") -> dict[str, Any]:
        """Send a request and give its answer; raises Refused with the other end's words."""
        await self.send(frame, box)
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

    async def _fill(self, place: memoryview, *, at_start: bool = False) -> None:
        done = 0
        while done < len(place):
            try:
                count = await self._socket.recv_into(place[done:])
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from None
            if count == 0:
                if at_start and done == 0:
                    raise trio.EndOfChannel
                raise trio.BrokenResourceError("the stream ended within a frame")
            done += count


def unpack(body: bytes) -> dict[str, Any]:
    """One msgpack map with text keys; raises EncodingError."""
    try:
        frame = msgpack.unpackb(
            body, strict_map_key=True, ext_hook=_refuse_extension, max_array_len=NAMES_MAX, max_map_len=FIELDS_MAX
        )
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

    async def ask(self, request: dict[str, Any], box: Buffer = b"") -> dict[str, Any]:
        """One request about this session; raises Refused."""
        answer: dict[str, Any] = await self.talk(lambda connection: connection.ask(self.about(request), box))
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
