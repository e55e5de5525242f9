"""A party's shell: it feeds its machine with the coordinator's log and does what the machine says."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from mpc.protocol.contract import Contract
from mpc.protocol.errors import AppraisalError, LocalError, PeerError, SealError
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
from mpc.transport import Connection, EpochOpened, Link, Refused, one_fault
from parties.identity import Identity
from parties.ledger import Ledger
from parties.party import (
    Action,
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
    no_budget,
)

TICK_S = 0.5
GRACE_S = 1
RESULT, RECEIPT = "result.arrow", "receipt.cbor"  # as they came; on the disk before they are acknowledged
FLUSH_S = 5  # how long a last word may take to reach the coordinator
WINDOW = 4  # chunks under way at once: what an upload holds in memory
REPORTED = 8  # chunks between two words about an upload

Report = Callable[[dict[str, Any]], None]
"""Called with what a person wants to see; never with data."""
Spool = Callable[[Contract, int, Path], int]
"""Write the canonical form of one table (by its stream) to a path and give its length; raises LocalError."""


Affords = Callable[..., None]
"""affords(debits, spent=): raises PolicyError; `spent` says what the ledger counts of a dataset."""


@dataclass(frozen=True)
class Ending:
    released: bool
    why: str
    receipt: Path | None = None
    result: bytes | None = None  # Arrow IPC stream


class _Gone(Exception):
    """The epoch of an upload is over."""


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
        affords: Affords | None = None,
    ) -> None:
        """`folder`: the party's own; its ledger and spooled tables lie there.  `session`: the contract's digest.

        `affords`: see parties.policy; none: nothing may be spent.
        """
        self._identity, self._folder, self._name = identity, folder, session
        self._link = Link(address, session, lambda: report({"waiting": "the coordinator does not answer"}))
        self._spool, self._report = spool, report
        self._ledger = Ledger(folder)
        within = no_budget if affords is None else partial(affords, spent=self._ledger.spent)
        memories = self._ledger.read(session)
        self._party = Party(identity.signing, Cryptography(), session, accepts, appraise, memories, within)
        self._events, self._inbox = trio.open_memory_channel[Event](1000)
        self._outbox, self._letters = trio.open_memory_channel[tuple[int, bytes]](1000)
        self._caught_up = trio.Event()
        self._leaves: dict[int, list[bytes]] = {}
        self._begun: set[tuple[int, int]] = set()  # uploads, by epoch and stream: what may have been sent before
        self._sent = self._posted = 0
        self._epochs = 1  # that were called
        self._more_posted = trio.Event()

    async def run(self) -> Ending:
        """Until the session is over for this party; raises LocalError when it cannot go on."""
        try:
            async with one_fault() as nursery:
                nursery.start_soon(self._read_log)
                nursery.start_soon(self._tick)
                nursery.start_soon(self._post, nursery)
                ending = await self._work(nursery)
                with trio.move_on_after(FLUSH_S):
                    await self._everything_posted(self._sent)
                nursery.cancel_scope.cancel()
        finally:
            self._ledger.close()
        return ending

    async def _work(self, nursery: trio.Nursery) -> Ending:
        async for event in self._inbox:
            self._epochs += isinstance(event, Heard) and isinstance(event.entry, EpochOpened)
            for action in self._handle(event):
                if isinstance(action, Remember):
                    self._ledger.write(action.memory)
                elif isinstance(action, Send):
                    self._sent += 1
                    await self._outbox.send((self._epochs, action.envelope))
                elif isinstance(action, Prepare):
                    nursery.start_soon(self._prepare, action.contract)
                elif isinstance(action, Upload):
                    nursery.start_soon(self._upload, action, self._sent, self._epochs)
                elif isinstance(action, Keep):
                    nursery.start_soon(self._keep, action)
                elif isinstance(action, Finish):
                    return self._ending(action)
        raise AssertionError("the inbox does not close")

    def _handle(self, event: Event) -> list[Action]:
        now_ms = time.time_ns() // 1_000_000
        try:
            return self._party.handle(event, now_ms)
        except AppraisalError as error:  # the coordinator takes one attestation an epoch: no better one will come
            why = f"the enclave is not the one that was agreed on: {error}"
            return self._party.handle(Withdraw("appraisal", why), now_ms)
        except PeerError as error:
            self._report({"refused": str(error)})
            return []

    def _ending(self, action: Finish) -> Ending:
        """With what lies in the folder: another life of this process may have put it there."""
        result, receipt = self._folder / RESULT, self._folder / RECEIPT
        if not action.released:
            return Ending(False, action.why)
        return Ending(
            True,
            action.why,
            receipt if receipt.exists() else None,
            result.read_bytes() if result.exists() else None,
        )

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

    async def _post(self, nursery: trio.Nursery) -> None:
        async for epochs, envelope in self._letters:
            try:
                await self._link.ask({"op": "post", "envelope": envelope})
            except Refused as error:
                nursery.start_soon(self._refused, epochs, f"the coordinator refuses this party's message: {error}")
            self._posted += 1
            self._more_posted.set()
            self._more_posted = trio.Event()

    async def _refused(self, epochs: int, why: str) -> None:
        """What was said or sent when so many epochs had been called: if it or the session is over, the log tells."""
        await trio.sleep(GRACE_S)
        if epochs == self._epochs:
            await self._events.send(Withdraw("withdrawn", why))

    async def _everything_posted(self, count: int) -> None:
        """Until the coordinator has the first `count` messages."""
        while self._posted < count:
            await self._more_posted.wait()

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

        def leaf(index: int) -> bytes:
            with path.open("rb") as file:
                file.seek(index * CHUNK_BYTES)
                return chunk_digest(pad(file.read(CHUNK_BYTES), length, index))

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the slowest step, and it releases the interpreter's lock
            leaves = self._leaves[stream] = list(pool.map(leaf, range(chunk_count(length))))
        return Spooled(stream, length, tree_root(leaves))

    async def _upload(self, action: Upload, after: int, epochs: int) -> None:
        """`after`: the messages, the seal among them, that the coordinator must have first."""
        await self._everything_posted(after)
        try:
            await self._link.talk(partial(self._upload_rest, action))
        except _Gone:
            return
        except Refused as error:
            await self._refused(epochs, f"the coordinator refuses this party's input: {error}")
        except LocalError as error:
            await self._events.send(Withdraw("withdrawn", str(error)))

    async def _upload_rest(self, action: Upload, connection: Connection) -> None:
        """From the first chunk that the coordinator does not have."""
        place = self._link.about({"epoch": action.epoch, "stream": action.stream})
        count, cipher = chunk_count(action.secret.length), ChunkCipher(action.secret)
        first = (await connection.ask({"op": "have", **place})).get("have")
        if not isinstance(first, int) or not 0 <= first <= count:
            raise Refused("an answer that makes no sense")
        again = action.again or (action.epoch, action.stream) in self._begun
        self._begun.add((action.epoch, action.stream))
        window = trio.Semaphore(WINDOW)

        async def acknowledge() -> None:
            for index in range(first, count):
                answer = await connection.receive()
                if "gone" in answer:
                    raise _Gone
                if "refused" in answer:
                    raise Refused(str(answer["refused"])[:500])
                window.release()
                if index + 1 == count or index % REPORTED == 0:
                    size = min(action.secret.length, (index + 1) * CHUNK_BYTES)
                    self._report({"sealed": size, "of": action.secret.length, "stream": action.stream})

        async with one_fault() as nursery:
            nursery.start_soon(acknowledge)
            with self._path(action.stream).open("rb") as file:
                file.seek(first * CHUNK_BYTES)
                for index in range(first, count):
                    await window.acquire()
                    chunk = pad(file.read(CHUNK_BYTES), action.secret.length, index)
                    # The same position under the same key must never carry anything else.
                    if again and chunk_digest(chunk) != self._leaves[action.stream][index]:
                        raise LocalError("the tables in this party's folder have changed since they were sealed")
                    await connection.send({"op": "put", **place, "index": index}, cipher.seal(chunk, index))

    async def _keep(self, action: Keep) -> None:
        contract = action.session.contract
        try:
            if action.mine is not None:
                fetch = partial(self._fetch, action.session, action.mine)
                _write(self._folder / RESULT, await self._link.talk(fetch))
            if self._identity.name in (*contract.recipients, *contract.receipt_recipients):
                _write(self._folder / RECEIPT, action.release)
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
            if "box" not in answer:
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


def _write(path: Path, data: bytes) -> None:
    """Whole, and on the disk when this returns. Raises OSError."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def drop_spool(folder: Path) -> None:
    """After the session: the canonical copies are not needed any more."""
    for path in (folder / "spool").glob("*.arrow"):
        path.unlink()
