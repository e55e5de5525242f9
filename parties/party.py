"""A party's state machine: no clock, no socket, no file.

What it must not forget is said as `Remember` before the message that depends on it; made again of what it
remembered, it goes on where it was. It looks at the session with its own policy and trusts nobody's word.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated

from mpc.protocol.contract import Contract
from mpc.protocol.encoding import Blob, Bytes32, Count, Digest, Limit, Name, Record
from mpc.protocol.errors import MpcError, OrderError, PeerError, PolicyError
from mpc.protocol.messages import (
    Abort,
    Acknowledgement,
    Attestation,
    Consent,
    Epoch,
    Reason,
    Release,
    Seal,
    SealedResult,
    Wrapped,
    sign,
)
from mpc.protocol.rounds import Round, Session
from mpc.protocol.sealing import Cryptography, StreamSecret, chunk_count, input_commitment, table_context
from mpc.protocol.signing import Signed, SigningKey, open_signed
from mpc.transport import Ended, Entry, EpochOpened, Said

# What a party remembers. Each names its contract, so that one ledger serves many.


@dataclass(frozen=True)
class Spooled(Record):
    """One table's canonical form, kept until the session ends."""

    stream: Count
    length: Count
    tree: Digest


@dataclass(frozen=True)
class Committed(Record):
    """This party's input to this contract, for all epochs."""

    contract: Digest
    salt: Bytes32 = field(repr=False)
    tables: Annotated[tuple[Spooled, ...], Limit(1, 1000)]
    commitment: Digest


@dataclass(frozen=True)
class Consented(Record):
    contract: Digest
    epoch: Epoch
    envelope: Blob = field(repr=False)


@dataclass(frozen=True)
class Pin(Record):
    """What another party had committed to when this party first sealed."""

    party: Name
    commitment: Digest


@dataclass(frozen=True)
class Debit(Record):
    """What of a dataset's budget one enclave that has it may spend."""

    dataset: Name
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Sealed(Record):
    """This party has sealed its input to one enclave: that counts as released and spent, for ever."""

    contract: Digest
    epoch: Epoch
    attestation: Blob = field(repr=False)
    seal: Blob = field(repr=False)
    keys: Annotated[tuple[Bytes32, ...], Limit(1, 1000)] = field(repr=False)  # content keys, by table
    pins: Annotated[tuple[Pin, ...], Limit(1, 1000)]
    debits: Annotated[tuple[Debit, ...], Limit(0, 1000)]


@dataclass(frozen=True)
class Finished(Record):
    """Nothing more is signed for this contract: the last word stands here, and may be sent again."""

    contract: Digest
    released: bool
    why: Annotated[str, Limit(0, 2000)]
    last: Blob = field(repr=False)  # acknowledgement, abort, or nothing


Memory = Committed | Consented | Sealed | Finished


# What happens to a party.


@dataclass(frozen=True)
class Heard:
    """The coordinator's log goes on."""

    entry: Entry


@dataclass(frozen=True)
class Prepared:
    """The party's tables lie ready in its own folder, in the contract's order."""

    tables: tuple[Spooled, ...]


@dataclass(frozen=True)
class Withdraw:
    """The party's owner stops, or cannot go on."""

    reason: Reason
    why: str


@dataclass(frozen=True)
class Kept:
    """The release is stored in the party's folder."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Heard | Prepared | Withdraw | Kept | Tick


# What a party does.


@dataclass(frozen=True)
class Prepare:
    """Read the party's tables, check them against the contract, and answer with Prepared."""

    contract: Contract


@dataclass(frozen=True)
class Remember:
    """Write this down, through to the disk, before the next action."""

    memory: Memory


@dataclass(frozen=True)
class Send:
    envelope: bytes = field(repr=False)


@dataclass(frozen=True)
class Upload:
    """Seal and send the chunks of one table."""

    epoch: int
    stream: int
    secret: StreamSecret = field(repr=False)
    again: bool  # perhaps sent before: encrypt a chunk only if it is the same chunk


@dataclass(frozen=True)
class Keep:
    """Store the release; `mine` is this party's result, to be fetched and opened, if it is a recipient."""

    session: Session
    release: bytes = field(repr=False)
    mine: SealedResult | None


@dataclass(frozen=True)
class Finish:
    """It is over."""

    released: bool
    why: str


Action = Prepare | Remember | Send | Upload | Keep | Finish

DEFERRED_BYTES_MAX = 16 << 20  # a session of 1,000 parties says 5 MiB before anything is sealed

Appraise = Callable[..., None]
"""appraise(document, nonce=, user_data=, public_key=, contract=, at=): raises AppraisalError; see parties.policy."""


def debits(contract: Contract, party: str) -> tuple[Debit, ...]:
    """What sealing to one enclave spends; whether it computes, and whether its noise was drawn, nobody can tell."""
    tables = (contract.tables[index] for index in contract.tables_of(party))
    return tuple(Debit(t.name, t.rule.epsilon, t.rule.delta) for t in tables if t.rule.kind == "noise")


def no_budget(spends: tuple[Debit, ...]) -> None:
    """Raises PolicyError when anything would be spent."""
    if spends:
        raise PolicyError("this party has no budget for noise", got=", ".join(one.dataset for one in spends))


class Party:
    """One contract, as one of its parties sees it."""

    def __init__(
        self,
        key: SigningKey,
        cryptography: Cryptography,
        contract: bytes,
        accepts: Callable[[Contract], None],
        appraise: Appraise,
        memories: Iterable[Memory] = (),
        affords: Callable[[tuple[Debit, ...]], None] = no_budget,
    ) -> None:
        """`contract`: its digest; `memories`: what was remembered for it, in order.

        `accepts` raises PolicyError; and so does `affords`, with what is left after all that was remembered as sealed.
        """
        self._key, self._cryptography, self._invited = key, cryptography, contract
        self._accepts, self._appraise, self._affords = accepts, appraise, affords
        self._committed: Committed | None = None
        self._consents: dict[int, bytes] = {}
        self._sealed: dict[int, Sealed] = {}
        self._finished: Finished | None = None
        for memory in memories:
            self._learn(memory)
        self._earlier = frozenset(self._consents)  # epochs of an earlier life
        self._proposal = b""
        self._session: Session | None = None
        self._name = ""
        self._epoch_called = 1
        self._deferred: list[Entry] | None = []  # heard before the tables were ready; None afterwards
        self._done = False

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        """What to do about an event at `now_ms` (Unix milliseconds).

        Raises:  PeerError: the event is refused; nothing has changed and nothing was said.
        """
        if self._done:
            return []
        if isinstance(event, Heard):
            return self._hear(event.entry, now_ms)
        if isinstance(event, Prepared):
            return self._prepared(event, now_ms)
        if isinstance(event, Withdraw):
            return self._abort(event.reason, event.why)
        if isinstance(event, Kept):
            return self._kept()
        return self._tick(now_ms)

    # The log.

    def _hear(self, entry: Entry, now_ms: int) -> list[Action]:
        if self._session is None:
            if not isinstance(entry, Said):
                raise OrderError("log", expected="the contract first")
            return self._proposed(entry.envelope)
        if isinstance(entry, EpochOpened):
            return self._open_epoch(self._session, entry.epoch, now_ms)
        if isinstance(entry, Said):
            signed = open_signed(entry.envelope)
            if signed.signer == self._key.public and signed.kind in ("consent", "seal"):
                return self._check_memory(signed)
        if self._deferred is not None and not (isinstance(entry, Ended) and entry.outcome != "released"):
            if sum(len(said.envelope) for said in self._deferred if isinstance(said, Said)) > DEFERRED_BYTES_MAX:
                raise OrderError("messages while this party prepares its tables", expected="fewer")
            self._deferred.append(entry)
            return []
        if isinstance(entry, Ended):
            return self._ended(entry)
        after, heard = self._session.hear(entry.envelope)
        if not heard.new:
            return []
        if isinstance(heard.message, Attestation):
            return self._attested(after, heard.message, entry.envelope, now_ms)
        if isinstance(heard.message, Release):
            return self._released(after, heard.message, entry.envelope)
        self._session = after
        if isinstance(heard.message, Abort):  # its own, too, if it does not remember that
            blamed = f", proven against {heard.message.blamed}" if heard.message.blamed else ""
            return self._finish(False, f"{heard.name} ended the session: {heard.message.reason}{blamed}")
        return []

    def _proposed(self, envelope: bytes) -> list[Action]:
        session = Session.propose(envelope)
        contract = session.contract
        if contract.digest != self._invited:  # what it remembers is of that one only
            raise OrderError("contract", expected=self._invited.hex()[:16], got=contract.digest.hex()[:16])
        name = contract.names.get(self._key.public)
        if name is None:
            return self._give_up("this party's key takes no part in the contract")
        self._session, self._proposal, self._name = session, envelope, name
        if self._consents:  # made again after a crash
            epoch = max(self._consents)
            self._session, _ = Session.propose(envelope, epoch).hear(self._consents[epoch])
        if self._finished is not None:
            self._done = True
            return self._end(self._finished)
        try:
            self._accepts(contract)
        except MpcError as error:
            return self._abort("policy", str(error))
        if self._owns_nothing(contract):
            self._deferred = None
            return []
        return [Prepare(contract)]

    def _prepared(self, event: Prepared, now_ms: int) -> list[Action]:
        session, deferred = self._session, self._deferred
        assert session is not None
        assert deferred is not None
        contract = session.contract
        actions: list[Action] = []
        if self._committed is None:
            salt = self._cryptography.random(32)
            tables = [(contract.tables[table.stream].name, table.length, table.tree) for table in event.tables]
            root = input_commitment(salt, contract.digest, self._key.public, tables)
            actions += self._remember(Committed(contract.digest, salt, event.tables, root))
        elif event.tables != self._committed.tables:
            return self._abort("withdrawn", "the tables in this party's folder are not those it committed to")
        self._deferred = None
        actions += self._consent(session, now_ms)
        for entry in deferred:
            try:
                actions += self._hear(entry, now_ms)
            except PeerError:
                continue  # it was refused, as it would have been when it came
        uploading = self._session is not None and self._session.round in (Round.SEAL, Round.COMPUTE)
        return [action for action in actions if uploading or not isinstance(action, Upload)]

    def _consent(self, session: Session, now_ms: int) -> list[Action]:
        """To the epoch that was called last; the same bytes again when it has consented to it before."""
        contract, committed = session.contract, self._committed
        epoch = max(self._epoch_called, *self._consents, 1)
        before = session if session.epoch == epoch else Session.propose(self._proposal, epoch)
        actions: list[Action] = []
        if epoch not in self._consents:
            assert committed is not None
            if now_ms > before.deadline_ms:
                return self._abort("late", f"the deadline for consent to epoch {epoch} has passed")
            if refusal := self._overspent(contract):
                return refusal
            consent = Consent(contract.digest, epoch, self._cryptography.random(32), committed.commitment)
            actions = self._remember(Consented(contract.digest, epoch, sign(self._key, consent)))
        self._session, _ = before.hear(self._consents[epoch])
        return [*actions, Send(self._consents[epoch])]

    def _open_epoch(self, session: Session, epoch: int, now_ms: int) -> list[Action]:
        if session.round is Round.CLOSE:
            raise OrderError("an epoch after the release")
        if not session.epoch <= epoch <= session.contract.epochs_max:
            raise OrderError("epoch", expected=f"{session.epoch} to {session.contract.epochs_max}", got=epoch)
        self._epoch_called = max(self._epoch_called, epoch)
        if self._deferred is not None or epoch in self._consents:
            return []
        if self._owns_nothing(session.contract):
            self._session = Session.propose(self._proposal, epoch)
            return []
        return self._consent(session, now_ms)

    def _attested(self, after: Session, said: Attestation, envelope: bytes, now_ms: int) -> list[Action]:
        binding, contract = after.binding, after.contract
        assert binding is not None
        mine = after.messages(Consent).get(self._name)
        known = self._consents.get(after.epoch)
        if (mine and open_signed(mine).digest) != (known and open_signed(known).digest):
            raise OrderError("roster", expected="this party's own consent, whole")
        sealed = self._sealed.get(after.epoch)
        again = sealed is not None
        if sealed is not None and open_signed(sealed.attestation).digest != open_signed(envelope).digest:
            raise OrderError("a second enclave in one epoch")
        self._appraise(
            said.document,
            nonce=binding.roster,
            user_data=binding.digest,
            public_key=binding.signing_key,
            contract=contract,
            # The roster, which is its nonce, makes it fresh. Where this life called for it, it is young as well.
            at=None if after.epoch in self._earlier or self._owns_nothing(contract) else now_ms,
        )
        if self._committed is None:  # it only receives
            self._session = after
            return []
        pins = tuple(Pin(name, consent.commitment) for name, consent in after.content(Consent).items())
        if any(pins != earlier.pins for earlier in self._sealed.values()):
            return self._abort("commitments", "another party's input is not the one of the earlier epoch")
        actions: list[Action] = []
        if sealed is None:
            if now_ms > contract.deadlines.seal_ms:
                return self._abort("late", "the deadline for sealing has passed")
            if refusal := self._overspent(contract):  # another contract may have come between
                return refusal
            sealed = self._seal(after, envelope, pins)
            after.hear(sealed.seal)  # a table that is longer than the contract allows is refused here
            actions = self._remember(sealed)
        self._session, _ = after.hear(sealed.seal)
        uploads = [
            Upload(after.epoch, table.stream, StreamSecret(key, self._committed.salt, table.length), again)
            for table, key in zip(self._committed.tables, sealed.keys, strict=True)
        ]
        return [*actions, Send(sealed.seal), *uploads]

    def _seal(self, session: Session, attestation: bytes, pins: tuple[Pin, ...]) -> Sealed:
        assert session.binding is not None
        assert self._committed is not None
        binding, contract = session.binding, session.contract
        keys = tuple(self._cryptography.random(32) for _ in self._committed.tables)
        wrapped = []
        for table, key in zip(self._committed.tables, keys, strict=True):
            context = table_context(binding.digest, self._key.public, contract.tables[table.stream].name)
            secret = StreamSecret(key, self._committed.salt, table.length).encode()
            box = self._cryptography.wrap(secret, binding.sealing_key, context)
            wrapped.append(Wrapped(table.stream, box, chunk_count(table.length)))
        seal = sign(self._key, Seal(binding.digest, tuple(wrapped)))
        spent = debits(contract, self._name)
        return Sealed(contract.digest, session.epoch, attestation, seal, keys, pins, spent)

    def _overspent(self, contract: Contract) -> list[Action]:
        try:
            self._affords(debits(contract, self._name))
        except PolicyError as error:
            return self._abort("policy", str(error))
        return []

    def _released(self, after: Session, release: Release, envelope: bytes) -> list[Action]:
        binding = after.binding
        assert binding is not None
        self._appraise(
            release.document,
            nonce=binding.digest,
            user_data=release.receipt.digest,
            public_key=binding.signing_key,
            contract=after.contract,
            at=None,  # its freshness is the binding's
        )
        self._session = after
        mine = next((result for result in release.receipt.results if result.recipient == self._name), None)
        return [Keep(after, envelope, mine)]

    def _kept(self) -> list[Action]:
        session = self._session
        assert session is not None
        assert session.binding is not None
        (release,) = session.content(Release).values()
        receipt = release.receipt
        if self._name in (*session.contract.recipients, *session.contract.receipt_recipients):
            said = Acknowledgement(session.binding.digest, receipt.digest)
            return self._finish(True, "released", sign(self._key, said))
        return self._finish(True, "released")

    def _owns_nothing(self, contract: Contract) -> bool:
        """It takes part as a recipient or approver, without an input."""
        return self._name not in contract.parties

    # Endings.

    def _ended(self, entry: Ended) -> list[Action]:
        names = f" ({', '.join(entry.names)})" if entry.names else ""
        if self._session is not None and self._session.round is Round.CLOSE:
            return []  # the release itself is being kept
        return self._finish(False, f"the coordinator ended the session: {entry.outcome}, {entry.reason}{names}")

    def _tick(self, now_ms: int) -> list[Action]:
        session = self._session
        if session is None:
            return []
        # Made again, it does not know yet how far the session is; nor need it, who only receives.
        waits = self._owns_nothing(session.contract) or (self._deferred is not None and self._consents)
        if now_ms <= (session.contract.deadlines.release_ms if waits else session.deadline_ms):
            return []
        if session.round is Round.CLOSE:
            return self._give_up("it is released, but the coordinator did not deliver the result")
        who = ", ".join((*session.missing(), "or the coordinator"))
        return self._finish(False, f"not heard in round {session.round.name.lower()}: {who}")

    def _abort(self, reason: Reason, why: str) -> list[Action]:
        session = self._session
        if session is None or session.round is Round.CLOSE:
            return self._give_up(why)
        said = Abort(session.contract.digest, max(session.epoch, self._epoch_called), reason)
        return self._finish(False, why, sign(self._key, said))

    def _give_up(self, why: str) -> list[Action]:
        """End this life without a last word: another one may do better."""
        self._done = True
        return [Finish(False, why)]

    def _finish(self, released: bool, why: str, last: bytes = b"") -> list[Action]:
        assert self._session is not None
        self._done = True
        finished = Finished(self._session.contract.digest, released, why[:2000], last)
        return [Remember(finished), *self._end(finished)]

    def _end(self, finished: Finished) -> list[Action]:
        last: list[Action] = [Send(finished.last)] if finished.last else []
        return [*last, Finish(finished.released, finished.why)]

    # Memory.

    def _remember(self, memory: Memory) -> list[Action]:
        self._learn(memory)
        return [Remember(memory)]

    def _learn(self, memory: Memory) -> None:
        if isinstance(memory, Committed):
            self._committed = memory
        elif isinstance(memory, Consented):
            self._consents[memory.epoch] = memory.envelope
        elif isinstance(memory, Sealed):
            self._sealed[memory.epoch] = memory
        else:
            self._finished = memory

    def _check_memory(self, signed: Signed) -> list[Action]:
        """A message of its own that it does not remember means that the ledger is not the one it wrote."""
        mine = (*self._consents.values(), *(sealed.seal for sealed in self._sealed.values()))
        if signed.digest in {open_signed(envelope).digest for envelope in mine}:
            return []
        why = "this party's ledger is lost or an old copy: it signs nothing more for this contract"
        return self._finish(False, why)
