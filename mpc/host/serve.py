"""The host's shell: one enclave an epoch, and bytes between it and the coordinator."""

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import trio

from mpc.host.launched import EnclaveLost, Launched
from mpc.protocol.channel import HEADER, Frame, begin_frame, chunk_head, frame, parse_chunk, parse_header
from mpc.protocol.errors import LocalError
from mpc.protocol.messages import Seal
from mpc.protocol.sealing import Buffer
from mpc.protocol.signing import open_signed
from mpc.transport import Connection, Ended, EpochOpened, Link, Refused, one_fault

PUMPS_MAX = 4  # tables under way at once: what the host holds in memory
FORWARDED = ("consent", "seal", "decision", "abort")

Report = Callable[[dict[str, Any]], None]


class Host:
    """One session's enclaves, one after the other."""

    def __init__(self, address: str, session: bytes, launch: Callable[[], Launched], report: Report) -> None:
        self._link = Link(address, session, lambda: report({"waiting": "the coordinator does not answer"}))
        self._launch, self._report = launch, report
        self._pumps = trio.CapacityLimiter(PUMPS_MAX)
        self._contract = b""
        self._epoch = 1
        self._log: list[bytes] = []  # envelopes of this epoch
        self._more = trio.Event()
        self._released = False

    async def run(self) -> None:
        """Until the session ends; raises LocalError when no enclave can be launched."""
        async with one_fault() as nursery, aclosing(self._link.entries()) as log:
            life: trio.CancelScope | None = None
            async for entry, caught_up in log:
                if isinstance(entry, Ended):
                    nursery.cancel_scope.cancel()
                elif isinstance(entry, EpochOpened):
                    self._epoch, self._log = entry.epoch, []
                    if life is not None:
                        life.cancel()
                    life = None
                elif not self._contract:
                    self._contract = entry.envelope
                else:
                    self._log.append(entry.envelope)
                    self._more.set()
                    self._more = trio.Event()
                if caught_up and life is None:
                    life = trio.CancelScope()
                    nursery.start_soon(self._live, life, self._epoch, list(self._log))

    async def _live(self, scope: trio.CancelScope, epoch: int, before: list[bytes]) -> None:
        """One enclave, from launch to its end."""
        with scope:
            if any(open_signed(envelope).kind == "attestation" for envelope in before):
                await self._tell({"op": "lost", "epoch": epoch})  # it belonged to a host that is gone
                return
            try:
                launched = await trio.to_thread.run_sync(self._launch)
            except EnclaveLost as lost:
                self._report({"event": str(lost)})
                await self._tell({"op": "lost", "epoch": epoch})
                return
            try:
                self._report({"enclave": epoch})
                channel = trio.SocketStream(trio.socket.from_stdlib_socket(launched.channel))
                async with trio.open_nursery() as nursery:
                    lock = trio.Lock()
                    nursery.start_soon(self._feed, nursery, channel, lock, epoch)
                    await self._listen(channel, epoch)
                    nursery.cancel_scope.cancel()
            finally:
                try:
                    launched.terminate()
                except LocalError as error:  # no reason to keep a result from its recipients
                    self._report({"event": str(error)})
            if not self._released:  # the next one needs the memory of this one
                await self._tell({"op": "lost", "epoch": epoch})

    async def _feed(self, nursery: trio.Nursery, channel: trio.SocketStream, lock: trio.Lock, epoch: int) -> None:
        await self._write(channel, lock, begin_frame(epoch, self._contract))
        sent = 0
        while True:
            while sent < len(self._log):
                envelope = self._log[sent]
                sent += 1
                signed = open_signed(envelope)
                if signed.kind in FORWARDED:
                    await self._write(channel, lock, frame(Frame.MESSAGE, envelope))
                if signed.kind == "seal":
                    for key in Seal.decode(signed.payload).streams:
                        nursery.start_soon(self._pump, channel, lock, epoch, key.stream, key.chunks)
            await self._more.wait()

    async def _pump(self, channel: trio.SocketStream, lock: trio.Lock, epoch: int, stream: int, count: int) -> None:
        """Chunks of one table, from the coordinator into the enclave."""

        async def conversation(connection: Connection) -> None:
            await connection.send(self._link.about({"op": "get", "epoch": epoch, "stream": stream, "count": count}))
            for index in range(count):
                answer = await connection.receive()
                if "box" not in answer:
                    return
                await self._write(channel, lock, chunk_head(stream, index, len(answer["box"])), answer["box"])

        async with self._pumps:
            await self._link.talk(conversation)

    async def _listen(self, channel: trio.SocketStream, epoch: int) -> None:
        """What the enclave says, until it closes or dies."""
        while True:
            header = await _read(channel, HEADER.size)
            if header is None:
                return
            kind, length = parse_header(header)
            body = await _read(channel, length)
            if body is None:
                return
            if kind is Frame.REFUSED:
                self._report({"refused": "by the enclave: " + body.decode(errors="replace")})
            elif kind is Frame.CHUNK:
                stream, index, box = parse_chunk(body)
                await self._tell({"op": "put", "epoch": epoch, "stream": stream, "index": index}, box)
            elif kind is Frame.MESSAGE:
                said = open_signed(body).kind
                self._released = self._released or said in ("release", "abort")
                await self._tell({"op": "post", "envelope": body})

    async def _write(self, channel: trio.SocketStream, lock: trio.Lock, *parts: Buffer) -> None:
        async with lock:
            try:
                for part in parts:
                    await channel.send_all(part)
            except trio.BrokenResourceError:
                await trio.sleep_forever()  # the enclave is gone: `_listen` sees it too, and ends this

    async def _tell(self, request: dict[str, Any], box: Buffer = b"") -> None:
        try:
            await self._link.ask(request, box)
        except Refused as error:
            self._report({"refused": f"by the coordinator: {error}"})


async def _read(channel: trio.SocketStream, count: int) -> bytes | None:
    """Exactly `count` bytes, or None when the enclave is gone."""
    data = bytearray()
    while len(data) < count:
        try:
            part = await channel.receive_some(count - len(data))
        except trio.BrokenResourceError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)
