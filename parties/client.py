"""A party's shell: it feeds its machine with the coordinator's log and does what the machine says."""

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from mpc.protocol.contract import Contract
from mpc.protocol.errors import LocalError, PeerError, SealError
from mpc.protocol.messages import SealedResult
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import (
    CHUNK_BYTES,
    TAG_BYTES,
    ChunkCipher,
    Cryptography,
    StreamSecret,
    chunk_bytes,
    chunk_count,
    chunk_digest,
    pad,
    result_commitment,
    result_context,
    tree_root,
)
from mpc.transport import Connection, Link, Refused, one_fault
from parties.identity import Identity
from parties.ledger import Ledger
from parties.party import (
    Event,
    Finish,
    Heard,
    Keep,
    Kept,
    Party,
    Prepare,
    Prepared,
    Remember,
    Send,
    Spooled,
    Tick,
    Upload,
    Withdraw,
)

TICK_S = 0.5
FLUSH_S = 5  # how long a last word may take to reach the coordinator
WINDOW = 4  # chunks under way at once: what an upload holds in memory

Report = Callable[[dict[str, Any]], None]
"""Called with what a person wants to see; never with data."""
Spool = Callable[[Contract, int, Path], int]
"""Write the canonical form of one table (by its stream) to a path and give its length; raises LocalError."""


@dataclass(frozen=True)
class Ending:
    released: bool
    why: str
    receipt: Path | None = None
    result: bytes | None = None  # Arrow IPC stream


class Client:
    """One party in one session."""

    def __init__(
        self,
        *,
        identity: Identity,
        folder: Path,
        address: str,
        session: bytes,
        accepts: Callable[[Contract], None],
        appraise: Callable[..., None],
        spool: Spool,
        report: Report,
    ) -> None:
        """`folder`: the party's own; its ledger and spooled tables lie there.  `session`: the contract's digest."""
        self._identity, self._folder, self._name = identity, folder, session
        self._link = Link(address, session, lambda: report({"waiting": "the coordinator does not answer"}))
        self._spool, self._report = spool, report
        self._ledger = Ledger(folder)
        self._party = Party(identity.signing, Cryptography(), session, accepts, appraise, self._ledger.read(session))
        self._events, self._inbox = trio.open_memory_channel[Event](1000)
        self._outbox, self._letters = trio.open_memory_channel[bytes](1000)
        self._caught_up = trio.Event()
        self._leaves: dict[int, list[bytes]] = {}
        self._receipt: Path | None = None
        self._result: bytes | None = None
        self._posted = 0
        self._sent = 0

    async def run(self) -> Ending:
        """Until the session is over for this party; raises LocalError when it cannot go on."""
        try:
            async with one_fault() as nursery:
                nursery.start_soon(self._read_log)
                nursery.start_soon(self._tick)
                nursery.start_soon(self._post)
                ending = await self._work(nursery)
                with trio.move_on_after(FLUSH_S):
                    while self._posted < self._sent:
                        await trio.sleep(0.005)
                nursery.cancel_scope.cancel()
        finally:
            self._ledger.close()
        return ending

    async def _work(self, nursery: trio.Nursery) -> Ending:
        async for event in self._inbox:
            try:
                actions = self._party.handle(event, time.time_ns() // 1_000_000)
            except PeerError as error:
                self._report({"refused": str(error)})
                continue
            for action in actions:
                if isinstance(action, Remember):
                    self._ledger.write(action.memory)
                elif isinstance(action, Send):
                    self._sent += 1
                    await self._outbox.send(action.envelope)
                elif isinstance(action, Prepare):
                    nursery.start_soon(self._prepare, action.contract)
                elif isinstance(action, Upload):
                    nursery.start_soon(self._upload, action)
                elif isinstance(action, Keep):
                    nursery.start_soon(self._keep, action)
                elif isinstance(action, Finish):
                    return Ending(action.released, action.why, self._receipt, self._result)
        raise AssertionError("the inbox does not close")

    async def _read_log(self) -> None:
        async with aclosing(self._link.entries()) as entries:
            async for entry, caught_up in entries:
                await self._events.send(Heard(entry))
                if caught_up:
                    self._caught_up.set()

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            await self._events.send(Tick())

    async def _post(self) -> None:
        async for envelope in self._letters:
            try:
                await self._link.ask({"op": "post", "envelope": envelope})
            except Refused as error:  # the machine will see the session's end in the log, or its deadline
                self._report({"refused": f"by the coordinator: {error}"})
            self._posted += 1

    # What the machine asks for.

    def _path(self, stream: int) -> Path:
        return self._folder / "spool" / f"{self._name.hex()[:16]}-{stream}.arrow"

    async def _prepare(self, contract: Contract) -> None:
        try:
            tables = [
                await trio.to_thread.run_sync(self._spool_one, contract, stream, abandon_on_cancel=True)
                for stream in contract.tables_of(self._identity.name)
            ]
        except LocalError as error:
            await self._events.send(Withdraw("withdrawn", str(error)))
            return
        await self._caught_up.wait()
        self._report({"prepared": sum(table.length for table in tables)})
        await self._events.send(Prepared(tuple(tables)))

    def _spool_one(self, contract: Contract, stream: int) -> Spooled:
        path = self._path(stream)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_suffix(".part")
            part.unlink(missing_ok=True)
            self._spool(contract, stream, part)
            part.replace(path)
        length = path.stat().st_size
        with path.open("rb") as file:
            chunks = (pad(file.read(CHUNK_BYTES), length, index) for index in range(chunk_count(length)))
            leaves = self._leaves[stream] = [chunk_digest(chunk) for chunk in chunks]
        return Spooled(stream, length, tree_root(leaves))

    async def _upload(self, action: Upload) -> None:
        try:
            await self._link.talk(partial(self._upload_rest, action))
        except Refused as error:
            await self._events.send(Withdraw("withdrawn", f"the coordinator refuses this party's input: {error}"))
        except LocalError as error:
            await self._events.send(Withdraw("withdrawn", str(error)))

    async def _upload_rest(self, action: Upload, connection: Connection) -> None:
        """From the first chunk that the coordinator does not have."""
        place = self._link.about({"epoch": action.epoch, "stream": action.stream})
        first = int((await connection.ask({"op": "have", **place}))["have"])
        count, cipher = chunk_count(action.secret.length), ChunkCipher(action.secret)
        window = trio.Semaphore(WINDOW)

        async def acknowledge() -> None:
            for index in range(first, count):
                answer = await connection.receive()
                if "refused" in answer:
                    raise Refused(str(answer["refused"])[:500])
                window.release()
                size = min(action.secret.length, (index + 1) * CHUNK_BYTES)
                self._report({"sealed": size, "of": action.secret.length, "stream": action.stream})

        async with one_fault() as nursery:
            nursery.start_soon(acknowledge)
            for index in range(first, count):
                await window.acquire()
                box = await trio.to_thread.run_sync(self._seal_chunk, action, cipher, index)
                await connection.send({"op": "put", **place, "index": index, "box": box})

    def _seal_chunk(self, action: Upload, cipher: ChunkCipher, index: int) -> bytes:
        length = action.secret.length
        with self._path(action.stream).open("rb") as file:
            file.seek(index * CHUNK_BYTES)
            chunk = pad(file.read(CHUNK_BYTES), length, index)
        # The same position under the same key must never carry anything else.
        if action.again and chunk_digest(chunk) != self._leaves[action.stream][index]:
            raise LocalError("the tables in this party's folder have changed since they were sealed")
        return cipher.seal(chunk, index)

    async def _keep(self, action: Keep) -> None:
        contract = action.session.contract
        try:
            if action.mine is not None:
                fetch = partial(self._fetch, action.session, action.mine)
                self._result = await self._link.talk(fetch)
            if self._identity.name in (*contract.recipients, *contract.receipt_recipients):
                self._receipt = self._folder / "receipt.cbor"
                self._receipt.write_bytes(action.release)
        except (SealError, OSError) as error:
            await self._events.send(Withdraw("withdrawn", f"the result cannot be kept: {error}"))
            return
        await self._events.send(Kept())

    async def _fetch(self, session: Session, mine: SealedResult, connection: Connection) -> bytes:
        """Raises SealError when what comes is not what the receipt names."""
        binding = session.binding
        assert binding is not None
        context = result_context(binding.digest, binding.signing_key, mine.recipient)
        secret = StreamSecret.decode(self._identity.opening.unwrap(mine.key.secret, context))
        if mine.key.chunks != chunk_count(secret.length):
            raise SealError("length of the result")
        place = self._link.about({"epoch": session.epoch, "stream": mine.key.stream})
        await connection.send({"op": "get", **place, "count": mine.key.chunks})
        cipher, result = ChunkCipher(secret), bytearray()
        for index in range(mine.key.chunks):
            answer = await connection.receive()
            if not isinstance(answer.get("box"), bytes):
                raise SealError("the coordinator no longer has the result")
            chunk = bytearray(chunk_bytes(secret.length, index))
            if len(answer["box"]) != len(chunk) + TAG_BYTES:
                raise SealError("size of a chunk of the result")
            cipher.open_into(answer["box"], index, memoryview(chunk))
            result += chunk
        opened = bytes(result[: secret.length])
        if (
            result_commitment(secret.salt, session.contract.digest, self._identity.signing.public, opened)
            != mine.commitment
        ):
            raise SealError("the result is not the one that the receipt names")
        return opened


def drop_spool(folder: Path) -> None:
    """After the session: the canonical copies are not needed any more."""
    for path in (folder / "spool").glob("*.arrow"):
        path.unlink()
