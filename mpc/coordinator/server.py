"""The coordinator's shell: sockets, store and clock around mailboxes."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import trio

from mpc.coordinator.mailbox import EnclaveLost, Event, Mailbox, Post, Stored, Tick
from mpc.coordinator.store import Store
from mpc.protocol.errors import EncodingError, LocalError, MpcError
from mpc.protocol.rounds import Session
from mpc.transport import BROKEN, Connection, Entry, Said, encode_entry

CONNECTIONS_MAX = 4096
SESSIONS_MAX = 2048
TICK_S = 0.25


class Live:
    """One session: its machine, its log, and who waits for more."""

    def __init__(self, store: Store, log: list[Entry]) -> None:
        self.store, self.log = store, log
        self.mailbox = self._recall()
        self._changed, self._said = trio.Event(), trio.Event()  # anything; the log

    @property
    def name(self) -> bytes:
        return self.mailbox.session.contract.digest

    def _recall(self) -> Mailbox:
        """The machine, made of what is on the disk."""
        mailbox = Mailbox(self.log)
        epoch = mailbox.session.epoch
        for stream, index in self.store.chunks(mailbox.session.contract.digest, epoch):
            mailbox.handle(Stored(epoch, stream, index), now_ms())
        return mailbox

    def handle(self, event: Event) -> None:
        entries = self.mailbox.handle(event, now_ms())
        if entries:
            try:
                self.store.append(self.name, len(self.log), entries)
            except LocalError:
                self.mailbox = self._recall()  # what is not written was not heard
                raise
            self.log += entries
        if entries and self.mailbox.ended is not None:
            self.store.delete_chunks(self.name)
        if entries:
            self._said.set()
            self._said = trio.Event()
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()

    async def said(self) -> None:
        await self._said.wait()


class Server:
    """Serves one store."""

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder)
        logs = {session: self._store.read(session) for session in self._store.sessions()}
        self._sessions = {session: Live(self._store, log) for session, log in logs.items()}

    async def serve(self, address: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with await _listen(address) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            limit = trio.CapacityLimiter(CONNECTIONS_MAX)
            task_status.started()
            await trio.serve_listeners(partial(self._connection, limit), [listener])

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            for live in [live for live in self._sessions.values() if live.mailbox.ended is None]:
                try:
                    live.handle(Tick())
                except LocalError:
                    continue  # the disk is full; the next tick tries again

    async def _connection(self, limit: trio.CapacityLimiter, stream: trio.SocketStream) -> None:
        async with limit:
            connection = Connection(stream)
            try:
                while (frame := await connection.next()) is not None:
                    try:
                        await self._answer(connection, frame)
                    except MpcError as error:
                        await connection.send({"refused": str(error)})
            except (EncodingError, *BROKEN):
                pass  # nothing to say to what does not speak our frames, or has gone; nor of chunks that are deleted
            finally:
                await connection.aclose()

    async def _answer(self, connection: Connection, frame: dict[str, Any]) -> None:
        match frame:
            case {"op": "propose", "envelope": bytes(envelope)}:
                self._propose(envelope)
                await connection.send({"ok": True})
            case {"op": "post", "session": bytes(session), "envelope": bytes(envelope)}:
                self._live(session).handle(Post(envelope))
                await connection.send({"ok": True})
            case {"op": "put", "session": bytes(s), "epoch": int(e), "stream": int(n), "index": int(i), "box": box}:
                await connection.send(self._put(self._live(s), e, n, i, box))
            case {"op": "have", "session": bytes(s), "epoch": int(e), "stream": int(n)}:
                present = {index for stream, index in self._store.chunks(s, e) if stream == n}
                await connection.send({"have": next(i for i in range(len(present) + 1) if i not in present)})
            case {"op": "lost", "session": bytes(session), "epoch": int(epoch)}:
                self._live(session).handle(EnclaveLost(epoch))
                await connection.send({"ok": True})
            case {"op": "log", "session": bytes(session)}:
                await self._send_log(connection, self._live(session))
            case {"op": "get", "session": bytes(s), "epoch": int(e), "stream": int(n), "count": int(count)}:
                await self._send_chunks(connection, self._live(s), e, n, count)
            case _:
                raise EncodingError("request", got=str(frame.get("op"))[:20])

    def _live(self, session: bytes) -> Live:
        if session not in self._sessions:
            raise LocalError("this coordinator has no such session")
        return self._sessions[session]

    def _propose(self, envelope: bytes) -> None:
        name = Session.propose(envelope).contract.digest
        if name in self._sessions:
            return
        if sum(live.mailbox.ended is None for live in self._sessions.values()) >= SESSIONS_MAX:
            raise LocalError("this coordinator takes no more sessions", expected=f"at most {SESSIONS_MAX}")
        log: list[Entry] = [Said(envelope)]
        self._store.append(name, 0, log)
        self._sessions[name] = Live(self._store, log)

    def _put(self, live: Live, epoch: int, stream: int, index: int, box: memoryview) -> dict[str, Any]:
        if live.mailbox.session.epoch > epoch or live.mailbox.ended is not None:
            return {"gone": True}
        live.mailbox.check_chunk(epoch, stream, index)
        if live.mailbox.has_chunk(epoch, stream, index):
            return {"ok": True}  # the first one stays
        self._store.put_chunk(live.name, epoch, stream, index, box)
        live.handle(Stored(epoch, stream, index))
        return {"ok": True}

    async def _send_log(self, connection: Connection, live: Live) -> None:
        """The whole log, then what comes, until the other end goes."""
        await connection.send({"entries": len(live.log)})
        sent = 0
        while True:
            while sent < len(live.log):
                await connection.send(encode_entry(live.log[sent]))
                sent += 1
            await live.said()

    async def _send_chunks(self, connection: Connection, live: Live, epoch: int, stream: int, count: int) -> None:
        """Chunks 0 to `count` - 1 as they come; ends early when the epoch or the session does."""
        for index in range(count):
            while live.mailbox.ended is not None or not live.mailbox.has_chunk(epoch, stream, index):
                if live.mailbox.ended is not None or live.mailbox.session.epoch != epoch:  # its chunks are deleted
                    await connection.send({"gone": True})
                    return
                await live.changed()
            await connection.send_file({"index": index}, self._store.chunk(live.name, epoch, stream, index))


async def _listen(address: str) -> trio.SocketListener:
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    Path(address).unlink(missing_ok=True)  # left by a coordinator that was killed
    await sock.bind(address)
    Path(address).chmod(0o600)
    sock.listen(128)
    return trio.SocketListener(sock)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
