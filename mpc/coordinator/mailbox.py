"""The coordinator's state machine: what of a session it takes, in which order, and when it calls time."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from mpc.protocol.errors import OrderError
from mpc.protocol.messages import Abort, Seal, result_streams
from mpc.protocol.rounds import Round, Session
from mpc.transport import Ended, Entry, EpochOpened, Said

RESULT_CHUNKS_MAX = 1024  # 1 GiB a recipient


@dataclass(frozen=True)
class Post:
    """Somebody hands in a signed message."""

    envelope: bytes = field(repr=False)


@dataclass(frozen=True)
class Stored:
    """A chunk lies in the store."""

    epoch: int
    stream: int
    index: int


@dataclass(frozen=True)
class EnclaveLost:
    """The host says that the enclave of this epoch is gone."""

    epoch: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Post | Stored | EnclaveLost | Tick


class Mailbox:
    """One session's order. Made of the log, so that a coordinator that was killed goes on."""

    def __init__(self, log: Iterable[Entry]) -> None:
        """`log` begins with the proposal."""
        entries = list(log)
        assert isinstance(entries[0], Said)
        self._proposal = entries[0].envelope
        self.session = Session.propose(self._proposal)
        self._chunks: dict[int, set[int]] = defaultdict(set)  # of this epoch, by stream
        self.ended: Ended | None = None
        for entry in entries[1:]:
            self._take(entry)

    def handle(self, event: Event, now_ms: int) -> list[Entry]:
        """What to append to the log, durably, before anybody is told.

        Raises:  PeerError: refused; nothing has changed.
        """
        if self.ended is not None:
            if isinstance(event, Post):
                raise OrderError("the session has ended", got=self.ended.outcome)
            return []
        if isinstance(event, Post):
            entries = self._post(event.envelope)
        elif isinstance(event, Stored):
            self.check_chunk(event.epoch, event.stream, event.index)
            self._chunks[event.stream].add(event.index)
            entries = []
        elif isinstance(event, EnclaveLost):
            entries = self._lost(event.epoch, now_ms)
        else:
            entries = self._tick(now_ms)
        for entry in entries:
            self._take(entry)
        return entries

    def check_chunk(self, epoch: int, stream: int, index: int) -> None:
        """Raises OrderError unless somebody said that this chunk would come."""
        if epoch != self.session.epoch:
            raise OrderError("epoch of a chunk", expected=self.session.epoch, got=epoch)
        if not 0 <= index < self._announced().get(stream, 0):
            raise OrderError("a chunk that nobody announced", got=f"stream {stream}")

    def has_chunk(self, epoch: int, stream: int, index: int) -> bool:
        return epoch == self.session.epoch and index in self._chunks.get(stream, ())

    def next_deadline_ms(self) -> int:
        """When a Tick is due."""
        if self.session.round is Round.COMPUTE and self._incomplete():
            return self.session.contract.deadlines.seal_ms
        return self.session.deadline_ms

    def _announced(self) -> dict[int, int]:
        """Stream → number of its chunks."""
        announced = {key.stream: key.chunks for seal in self.session.content(Seal).values() for key in seal.streams}
        if self.session.round in (Round.COMPUTE, Round.APPROVE, Round.RELEASE, Round.CLOSE):
            announced |= dict.fromkeys(result_streams(self.session.contract).values(), RESULT_CHUNKS_MAX)
        return announced

    def _incomplete(self) -> tuple[str, ...]:
        """Owners whose chunks are not all here."""
        tables = self.session.contract.tables
        announced = self._announced()
        return tuple(
            dict.fromkeys(
                table.owner
                for stream, table in enumerate(tables)
                if len(self._chunks.get(stream, ())) < announced.get(stream, 1)
            )
        )

    def _post(self, envelope: bytes) -> list[Entry]:
        after, heard = self.session.hear(envelope)
        if not heard.new:
            return []
        entries: list[Entry] = [Said(envelope)]
        if isinstance(heard.message, Abort):
            names = (heard.message.blamed,) if heard.message.blamed else ()
            entries.append(Ended("aborted", f"{heard.name}: {heard.message.reason}", names))
        elif after.round is Round.CLOSE and not after.missing():
            entries.append(Ended("released"))
        return entries

    def _lost(self, epoch: int, now_ms: int) -> list[Entry]:
        session = self.session
        if epoch != session.epoch or session.round is Round.CLOSE:
            return []
        if epoch >= session.contract.epochs_max:
            return [Ended("enclave lost", f"{epoch} times, the contract's limit")]
        if now_ms > session.contract.deadlines.seal_ms:
            return [Ended("enclave lost", "too late to seal to another one")]
        return [EpochOpened(epoch + 1)]

    def _tick(self, now_ms: int) -> list[Entry]:
        if now_ms <= self.next_deadline_ms():
            return []
        if self.session.round is Round.CLOSE:  # released; who has not acknowledged may still read
            return [Ended("released", "not acknowledged by all", self.session.missing())]
        names = (
            self.session.missing() if self.session.round is not Round.COMPUTE else self._incomplete() or ("enclave",)
        )
        return [Ended("not heard", f"round {self.session.round.name.lower()}", names)]

    def _take(self, entry: Entry) -> None:
        if isinstance(entry, Said):
            self.session, _ = self.session.hear(entry.envelope)
        elif isinstance(entry, EpochOpened):
            self.session = Session.propose(self._proposal, entry.epoch)
            self._chunks.clear()
        else:
            self.ended = entry
