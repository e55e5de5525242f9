"""The enclave's state machine: no clock, no socket, no file. Its time is its security module's.

It holds keys from the attestation on, inputs until it has computed, results until they are released.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from enclave_runtime.nsm import timestamp_ms
from mpc.protocol.contract import Contract
from mpc.protocol.encoding import Record, digest
from mpc.protocol.errors import LocalError, OrderError, SealError
from mpc.protocol.messages import (
    Abort,
    Attestation,
    Computed,
    Consent,
    Reason,
    Receipt,
    Release,
    Seal,
    SealedResult,
    Wrapped,
    result_streams,
    sign,
)
from mpc.protocol.rounds import Role, Round, Session
from mpc.protocol.sealing import (
    CHUNK_BYTES,
    TAG_BYTES,
    ChunkCipher,
    Cryptography,
    OpeningKey,
    StreamSecret,
    chunk_bytes,
    chunk_count,
    cut,
    derive,
    input_commitment,
    padded_bytes,
    result_commitment,
    result_context,
    table_context,
    tree_root,
)
from mpc.protocol.signing import SigningKey

CONTRACT_PCR = 16  # extended with the contract's digest and locked: a key service can gate on it


class SecurityModule(Protocol):
    """What the machine needs of the NSM: see enclave_runtime.nsm."""

    def random(self) -> bytes: ...
    def extend_pcr(self, index: int, data: bytes) -> bytes: ...
    def lock_pcr(self, index: int) -> None: ...
    def attest(self, *, user_data: bytes | None, nonce: bytes | None, public_key: bytes | None) -> bytes: ...


class Memory(Protocol):
    """Where opened tables lie; the program's process reads them there."""

    def allocate(self, stream: int, size: int) -> memoryview: ...
    def digest(self, chunk: memoryview) -> Callable[[], bytes]:
        """Begin to hash a chunk; what comes back waits for the digest. Hashing takes longer than all else."""

    def erase(self) -> None: ...


@dataclass(frozen=True)
class Begin:
    """The host starts an epoch of a contract."""

    contract: bytes = field(repr=False)
    epoch: int


@dataclass(frozen=True)
class Message:
    envelope: bytes = field(repr=False)


@dataclass(frozen=True)
class Chunk:
    stream: int
    index: int
    box: bytes | memoryview = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """What the program gave: a result per recipient; or None, why, and the table that broke its schema, if one did."""

    results: Mapping[str, bytes] | None = field(repr=False)
    refusal: Reason = "engine"
    bad_table: int | None = None


Event = Begin | Message | Chunk | Outcome


@dataclass(frozen=True)
class Send:
    envelope: bytes = field(repr=False)


@dataclass(frozen=True)
class SendChunk:
    stream: int
    index: int
    box: bytes = field(repr=False)


@dataclass(frozen=True)
class Compute:
    """Run the contract's program over the tables in memory; `lengths` in bytes, by table."""

    contract: Contract
    lengths: tuple[int, ...]
    seconds: float  # until the contract's deadline for release


@dataclass(frozen=True)
class Close:
    """Exit; everything is erased."""


Action = Send | SendChunk | Compute | Close


@dataclass(repr=False)
class _Input:
    """One table on its way in."""

    secret: StreamSecret
    cipher: ChunkCipher
    buffer: memoryview
    leaves: dict[int, Callable[[], bytes]] = field(default_factory=dict)  # digests of chunks that have been opened


class Enclave:
    """One life: one contract, one epoch, one set of keys."""

    def __init__(self, nsm: SecurityModule, cryptography: Cryptography, memory: Memory) -> None:
        self._nsm, self._cryptography, self._memory = nsm, cryptography, memory
        self._session: Session | None = None
        self._signing: SigningKey | None = None
        self._opening: OpeningKey | None = None
        self._inputs: dict[int, _Input] = {}
        self._results: list[tuple[SealedResult, StreamSecret, bytes]] = []
        self._computing = self._closed = False

    def handle(self, event: Event) -> list[Action]:
        """What to do about an event.

        Raises:  PeerError: the event is refused, and nothing has changed.
        """
        if self._closed:
            raise LocalError("the enclave has closed")
        if isinstance(event, Begin):
            return self._begin(event)
        if self._session is None:
            raise OrderError("before the contract", got=type(event).__name__)
        if isinstance(event, Message):
            return self._hear(self._session, event.envelope)
        if isinstance(event, Chunk):
            return self._open(self._session, event)
        return self._outcome(self._session, event)

    def _begin(self, event: Begin) -> list[Action]:
        if self._session is not None:
            raise OrderError("a second contract")
        self._session = Session.propose(event.contract, event.epoch)
        return []

    def _hear(self, session: Session, envelope: bytes) -> list[Action]:
        after, heard = session.hear(envelope)
        if not heard.new:
            return []
        if heard.name == Role.ENCLAVE.value:
            raise OrderError(f"{heard.signed.kind} that this enclave did not say")
        if isinstance(heard.message, Abort):
            return self._close()
        if isinstance(heard.message, Seal):
            try:
                self._inputs.update(self._unwrap(session, heard.message, heard.signed.signer))
            except SealError:  # its signature covers what does not open, or opens to what its owner may not send
                return self._abort("input", blamed=heard.name)
            except (OSError, MemoryError):  # the contract allows more than this enclave has
                return self._abort("memory")
        self._session = after
        if after.round is Round.ATTEST:
            return self._attest(after)
        if after.round is Round.RELEASE:
            return self._release(after)
        return self._compute_when_ready(after)

    def _attest(self, session: Session) -> list[Action]:
        if self._now() > session.deadline_ms:
            return self._close()
        self._nsm.extend_pcr(CONTRACT_PCR, session.contract.digest)
        self._nsm.lock_pcr(CONTRACT_PCR)
        roster = tuple(session.messages(Consent).values())
        # Two sources of entropy, and the roster, so that no epoch can have another's keys.
        entropy = self._nsm.random() + self._cryptography.random(64) + b"".join(roster)
        signing = self._signing = SigningKey(derive(entropy, "enclave signing key", 32))
        opening = self._opening = OpeningKey(derive(entropy, "enclave opening key", 32))
        binding = session.binding_of(opening.public, signing.public)
        document = self._nsm.attest(user_data=binding.digest, nonce=binding.roster, public_key=signing.public)
        return [self._say(Attestation(session.contract.digest, session.epoch, roster, opening.public, document))]

    def _unwrap(self, session: Session, seal: Seal, owner: bytes) -> dict[int, _Input]:
        assert session.binding is not None
        assert self._opening is not None
        secrets = {}
        for key in seal.streams:
            table = session.contract.tables[key.stream]
            secret = StreamSecret.decode(
                self._opening.unwrap(key.secret, table_context(session.binding.digest, owner, table.name))
            )
            if secret.length > table.bytes_max or key.chunks != chunk_count(secret.length):
                raise SealError(f"length of table {table.name}", expected=f"at most {table.bytes_max} bytes")
            secrets[key.stream] = secret
        return {
            stream: _Input(s, ChunkCipher(s), self._memory.allocate(stream, padded_bytes(s.length)))
            for stream, s in secrets.items()
        }

    def _open(self, session: Session, chunk: Chunk) -> list[Action]:
        table = self._inputs.get(chunk.stream)
        if table is None:
            raise OrderError("a chunk that nobody waits for", got=f"stream {chunk.stream}")
        if chunk.index in table.leaves:
            return []
        count = chunk_count(table.secret.length)
        if not 0 <= chunk.index < count:
            raise OrderError("chunk", expected=f"below {count}", got=chunk.index)
        size = chunk_bytes(table.secret.length, chunk.index)
        if len(chunk.box) != size + TAG_BYTES:
            raise SealError("size of a chunk", expected=size + TAG_BYTES, got=len(chunk.box))
        place = table.buffer[chunk.index * CHUNK_BYTES :][:size]
        table.cipher.open_into(chunk.box, chunk.index, place)
        table.leaves[chunk.index] = self._memory.digest(place)
        return self._compute_when_ready(session)

    def _compute_when_ready(self, session: Session) -> list[Action]:
        complete = all(len(table.leaves) == chunk_count(table.secret.length) for table in self._inputs.values())
        if session.round is not Round.COMPUTE or self._computing or not complete:
            return []
        contract = session.contract
        for name, consent in session.content(Consent).items():
            if self._commitment(contract, name) != consent.commitment:
                return self._abort("input", blamed=name)
        now = self._now()
        if now > contract.deadlines.seal_ms:
            return self._abort("late")
        self._computing = True
        lengths = tuple(self._inputs[stream].secret.length for stream in range(len(contract.tables)))
        return [Compute(contract, lengths, (contract.deadlines.release_ms - now) / 1000)]

    def _commitment(self, contract: Contract, owner: str) -> bytes | None:
        streams = {stream: self._inputs[stream] for stream in contract.tables_of(owner)}
        salts = {table.secret.salt for table in streams.values()}
        if len(salts) != 1:
            return None
        tables = [
            (
                contract.tables[stream].name,
                table.secret.length,
                tree_root([table.leaves[i]() for i in sorted(table.leaves)]),
            )
            for stream, table in streams.items()
        ]
        return input_commitment(salts.pop(), contract.digest, contract.participant(owner).key, tables)

    def _outcome(self, session: Session, outcome: Outcome) -> list[Action]:
        if not self._computing:
            raise OrderError("an outcome that nobody waits for")
        self._opening = None  # it would open the content keys again
        self._inputs.clear()
        self._memory.erase()
        if outcome.bad_table is not None:
            return self._abort("input", blamed=session.contract.tables[outcome.bad_table].owner)
        if outcome.results is None:
            return self._abort(outcome.refusal)
        for recipient, stream in result_streams(session.contract).items():
            result = outcome.results[recipient]
            secret = StreamSecret(self._cryptography.random(32), self._cryptography.random(32), len(result))
            try:
                self._results.append((self._seal_key(session, recipient, stream, secret, result), secret, result))
            except SealError:  # the contract's key for this recipient is none
                return self._abort("engine")
        salt = self._cryptography.random(32)
        summary = digest("enclave-mpc/1 summary", salt, *(sealed.commitment for sealed, _, _ in self._results))
        assert session.binding is not None
        said = self._say(Computed(session.binding.digest, summary))
        assert self._session is not None
        return [said, *(self._release(self._session) if self._session.round is Round.RELEASE else [])]

    def _seal_key(
        self, session: Session, recipient: str, stream: int, secret: StreamSecret, result: bytes
    ) -> SealedResult:
        assert session.binding is not None
        participant = session.contract.participant(recipient)
        context = result_context(session.binding.digest, session.binding.signing_key, recipient)
        wrapped = self._cryptography.wrap(secret.encode(), participant.sealing_key, context)
        commitment = result_commitment(secret.salt, session.contract.digest, participant.key, result)
        return SealedResult(recipient, commitment, Wrapped(stream, wrapped, chunk_count(secret.length)))

    def _release(self, session: Session) -> list[Action]:
        assert session.binding is not None
        binding = session.binding
        receipt = Receipt(binding.digest, session.history(), tuple(sealed for sealed, _, _ in self._results))
        document = self._nsm.attest(nonce=binding.digest, user_data=receipt.digest, public_key=binding.signing_key)
        if timestamp_ms(document) > session.deadline_ms:
            return self._abort("late")
        chunks = [
            SendChunk(sealed.key.stream, index, ChunkCipher(secret).seal(chunk, index))
            for sealed, secret, result in self._results
            for index, chunk in enumerate(cut(result))
        ]
        return [*chunks, self._say(Release(receipt, document)), *self._close()]

    def _abort(self, reason: Reason, blamed: str | None = None) -> list[Action]:
        assert self._session is not None
        said = self._say(Abort(self._session.contract.digest, self._session.epoch, reason, blamed))
        return [said, *self._close()]

    def _close(self) -> list[Action]:
        self._memory.erase()
        self._inputs.clear()
        self._results.clear()
        self._signing = self._opening = None
        self._closed = True
        return [Close()]

    def _say(self, message: Record) -> Send:
        """Sign, and hear oneself say it: what the table forbids to others it forbids to the enclave."""
        assert self._signing is not None
        assert self._session is not None
        envelope = sign(self._signing, message)
        self._session, _ = self._session.hear(envelope)
        return Send(envelope)

    def _now(self) -> int:
        """Unix milliseconds, from a document made for nothing else."""
        nonce = self._cryptography.random(32)
        return timestamp_ms(self._nsm.attest(user_data=None, nonce=nonce, public_key=None))
