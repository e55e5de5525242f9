"""The shells of the world: each holds a real machine, performs its actions on the world's wires, and may be killed.

What a real process keeps on its disk outlives `kill`; nothing else does.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, is_dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from enclave_runtime import enclave as runtime
from enclave_runtime.enclave import Enclave
from enclave_runtime.nsm import Nsm
from mpc.coordinator import mailbox as post_office
from mpc.coordinator.mailbox import EnclaveLost, Mailbox, Post, Stored
from mpc.fuzz.facts import (
    Accepted,
    Broken,
    Computing,
    EnclaveSpoke,
    Ending,
    Released,
    ResultLeft,
    Seen,
    Shown,
    Spoke,
    Ticked,
)
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.protocol.contract import Contract, Participant
from mpc.protocol.errors import LocalError, MpcError, PeerError, SealError
from mpc.protocol.messages import (
    KINDS,
    Attestation,
    Binding,
    Computed,
    Decision,
    Receipt,
    Release,
    SealedResult,
    roster_digest,
    sign,
)
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import (
    TAG_BYTES,
    ChunkCipher,
    Cryptography,
    OpeningKey,
    StreamSecret,
    chunk_bytes,
    chunk_count,
    chunk_digest,
    cut,
    result_commitment,
    result_context,
    tree_root,
)
from mpc.protocol.signing import SigningKey, open_signed
from mpc.transport import Ended, Entry, EpochOpened, Said
from parties import party as member
from parties.party import Memory, Party, Spooled

if TYPE_CHECKING:
    from mpc.fuzz.world import World

FORWARDED = ("consent", "seal", "decision", "abort")  # what a host hands to its enclave


class SeededCryptography(Cryptography):
    """Entropy from a seed. HPKE draws its own, so ciphertexts differ between replays; no event does."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def random(self, size: int) -> bytes:
        return self._random.randbytes(size)


@dataclass(frozen=True)
class Keys:
    """A participant's keys, public and private."""

    name: str
    signing: SigningKey = field(repr=False)
    opening: OpeningKey = field(repr=False)

    @classmethod
    def draw(cls, name: str, cryptography: Cryptography) -> "Keys":
        return cls(name, SigningKey(cryptography.random(32)), OpeningKey(cryptography.random(32)))

    @property
    def participant(self) -> Participant:
        return Participant(self.name, self.signing.public, self.opening.public)


@dataclass(frozen=True)
class Put:
    """A sealed chunk on its way to the coordinator."""

    epoch: int
    stream: int
    index: int
    box: bytes = field(repr=False)


Item = Entry | Post | Put | EnclaveLost | runtime.Begin | runtime.Message | runtime.Chunk


def program(tables: Sequence[bytes], recipients: Sequence[str]) -> dict[str, bytes]:
    """The joint program of this world and its own oracle: a digest of all tables, one for each recipient."""
    state = hashlib.sha384(b"world program")
    for table in tables:
        state.update(len(table).to_bytes(8, "big") + table)
    return {name: state.digest() + name.encode() for name in recipients}


class Actor:
    """A shell: one machine, one wire to it, and what is asked of its own process."""

    honest = True

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.alive = False
        self.silent = False  # the adversary no longer delivers to it, and it no longer moves
        self.skew_ms = 0
        self.crash_in: int | None = None  # dies before it performs so many more actions
        self.cryptography = SeededCryptography(f"{world.seed} {name}")

    @property
    def wire(self) -> list[Item]:
        return self.world.wires[self.name]

    def now_ms(self) -> int:
        return self.world.now_ms + self.skew_ms

    def start(self) -> None:
        self.alive = True

    def kill(self) -> None:
        """Memory is lost, disk is not."""
        self.alive = False
        self.crash_in = None

    def receive(self, item: Any) -> None:
        raise NotImplementedError

    def work(self) -> bool:
        """Go on with what its own process has to do; False when there is nothing, or it must wait."""
        return False

    def tick(self) -> None:
        """Look at the clock."""

    def ask(self, machine: object, event: object, call: Callable[[], list[Any]]) -> list[Any]:
        """What a machine answers; nothing when it refuses, and then it must be as it was."""
        before = _state(machine)
        try:
            actions = call()
        except PeerError as error:
            self.world.tell(f"{self.name} refuses {_word(event)}: {type(error).__name__}: {error.what}", Shown(str(error)))
            if _state(machine) != before:
                raise Broken("first check, then change", f"{self.name} refused {_word(event)} and changed") from error
            return []
        words = ", ".join(map(_word, actions)) or "nothing"
        self.world.tell(f"{self.name} hears {_word(event)} and does {words}", Shown(repr((event, actions))))
        return actions

    def crashes(self) -> bool:
        """Whether it dies here, between two actions."""
        if self.crash_in is None:
            return False
        self.crash_in -= 1
        if self.crash_in >= 0:
            return False
        self.world.tell(f"{self.name} is killed between two actions")
        self.kill()
        return True


class PartyActor(Actor):
    """A party's process. On its disk: keys, ledger, and its tables in canonical form."""

    def __init__(self, world: "World", keys: Keys, tables: Mapping[int, bytes], *, honest: bool) -> None:
        super().__init__(world, keys.name)
        self.keys, self.tables, self.honest = keys, dict(tables), honest
        self.ledger: list[Memory] = []
        self.ending: member.Finish | None = None
        self.spooled = self.spool()
        self.start()

    def spool(self) -> tuple[Spooled, ...]:
        """Its tables as its shell describes them; a corrupt one may lie."""
        return tuple(
            Spooled(stream, len(table), tree_root([chunk_digest(chunk) for chunk in cut(table)]))
            for stream, table in self.tables.items()
        )

    def start(self) -> None:
        """Made of its ledger; the coordinator sends it the log from the start."""
        super().start()
        session = self.world.contract.digest
        memories = [memory for memory in self.ledger if memory.contract == session]
        self.machine = Party(
            self.keys.signing, self.cryptography, session, self.world.accepts, self.world.appraise, memories
        )
        self.wire[:] = self.world.coordinator.log
        self.ending = None
        self.preparing = self.knows_contract = False
        self.keeping: member.Keep | None = None

    def receive(self, item: Entry) -> None:
        if not self.honest and isinstance(item, Said) and self._is_mine(item.envelope):
            return  # a corrupt party does not hold its own word against itself
        self.handle(member.Heard(item))

    def _is_mine(self, envelope: bytes) -> bool:
        try:
            return open_signed(envelope).signer == self.keys.signing.public
        except PeerError:
            return False

    def tick(self) -> None:
        self.world.note(Ticked(self.name, self.now_ms()))
        self.handle(member.Tick())

    def handle(self, event: member.Event) -> None:
        if self.ending is not None or not self.alive:
            return
        actions = self.ask(self.machine, event, lambda: self.machine.handle(event, self.now_ms()))
        for action in actions:
            if self.crashes():
                return
            self._perform(action)

    def _perform(self, action: member.Action) -> None:
        if isinstance(action, member.Remember):
            self.ledger.append(action.memory)
            self.world.remembered(self, action.memory)
        elif isinstance(action, member.Send):
            self.world.post(self, action.envelope)
        elif isinstance(action, member.Upload):
            self._upload(action)
        elif isinstance(action, member.Prepare):
            self.preparing = self.knows_contract = True
        elif isinstance(action, member.Keep):
            self.keeping = action
        else:
            self.ending = action
            self.world.note(Ending(self.name, self.honest, action.released, action.why))

    def _upload(self, action: member.Upload) -> None:
        cipher = ChunkCipher(action.secret)
        for index, chunk in enumerate(cut(self.tables[action.stream])):
            self.world.put(Put(action.epoch, action.stream, index, cipher.seal(chunk, index)))

    def work(self) -> bool:
        if self.ending is not None or not self.alive:
            return False
        if self.preparing:
            self.preparing = False
            self.handle(member.Prepared(self.spooled))
            return True
        if self.keeping is None:
            return False
        try:
            result = self._fetch(self.keeping)
        except LookupError:
            return False  # the coordinator does not have it all yet
        except SealError as error:
            self.keeping = None
            self.handle(member.Withdraw("withdrawn", f"the result cannot be kept: {error}"))
            return True
        self.world.note(Accepted(self.name, self.honest, self.keeping.session, self.keeping.release, result))
        self.keeping = None
        self.handle(member.Kept())
        return True

    def _fetch(self, keep: member.Keep) -> bytes | None:
        if keep.mine is None:
            return None
        epoch, key, binding = keep.session.epoch, keep.mine.key, keep.session.binding
        boxes = [self.world.coordinator.chunks[epoch, key.stream, index] for index in range(key.chunks)]
        assert binding is not None
        return open_result(keep.session.contract, binding, keep.mine, self.keys, boxes)


class EnclaveActor(Actor):
    """One enclave and its security module; who starts it decides which code it is."""

    def __init__(
        self, world: "World", number: int, epoch: int, proposal: bytes, pcrs: Mapping[int, bytes], *, debug: bool
    ) -> None:
        super().__init__(world, f"enclave-{number}")
        self.epoch, self.proposal = epoch, proposal
        self.accepted_code = dict(pcrs) == dict(world.pcrs) and not debug
        nsm = SimulatedNsm(
            world.root, pcrs, clock_ms=lambda: world.now_ms, entropy=self.cryptography.random, debug=debug
        )
        self.nsm = Nsm(nsm.handle)
        self.memory = TableMemory()
        self.machine = Enclave(self.nsm, self.cryptography, self.memory)
        self.binding: Binding | None = None
        self.attestation: Attestation | None = None
        self.boxes: dict[tuple[int, int], bytes] = {}
        self.last_word = False  # said a release or an abort
        self.computed = False  # has got the program's outcome
        self.closed = False
        self.touched = False  # since the last look into its memory
        self.contract = Contract.decode(open_signed(proposal).payload)
        self.start()

    @property
    def genuine(self) -> bool:
        """The code that the parties agreed to, for the contract that they agreed to."""
        return self.accepted_code and self.proposal == self.world.proposal

    def kill(self) -> None:
        super().kill()
        self.wire.clear()

    def receive(self, item: runtime.Event) -> None:
        self.touched = True
        if self.alive:
            try:
                actions = self.ask(self.machine, item, lambda: self.machine.handle(item))
            except LocalError as error:  # its shell would end
                self.world.tell(f"{self.name} dies: {error.what}", Shown(str(error)))
                self.kill()
                return
            for action in actions:
                if self.crashes():
                    return
                self._perform(action)

    def _perform(self, action: runtime.Action) -> None:
        if isinstance(action, runtime.Send):
            self._speak(action.envelope)
        elif isinstance(action, runtime.SendChunk):
            self.world.note(ResultLeft(self))
            self.boxes[action.stream, action.index] = action.box
            self.world.put(Put(self.epoch, action.stream, action.index, action.box))
        elif isinstance(action, runtime.Compute):
            outcome = self._compute(action)
            self.computed = True
            self.receive(outcome)
        else:
            self.closed = True
            self.kill()
            if not self.last_word:
                self.world.lost(self.epoch)

    def _speak(self, envelope: bytes) -> None:
        signed = open_signed(envelope)
        message = KINDS[signed.kind].decode(signed.payload)
        if isinstance(message, Attestation):
            roster = roster_digest(message.roster)
            self.binding = Binding(message.contract, message.epoch, roster, message.sealing_key, signed.signer)
            self.attestation = message
        self.last_word = self.last_word or signed.kind in ("release", "abort")
        self.world.note(EnclaveSpoke(self, message, signed, self.now_ms()))
        if isinstance(message, Release):
            self._released(message.receipt)
        self.world.post(self, envelope)

    def _released(self, receipt: Receipt) -> None:
        binding = self.binding
        assert binding is not None
        results = {}
        for sealed in receipt.results:
            boxes = [self.boxes[sealed.key.stream, index] for index in range(sealed.key.chunks)]
            keys = self.world.keys.get(sealed.recipient)
            if keys is not None:
                results[sealed.recipient] = open_result(self.contract, binding, sealed, keys, boxes)
        self.world.note(Released(self, receipt, results, self.now_ms()))

    def _compute(self, action: runtime.Compute) -> runtime.Outcome:
        """The program, as the engine's process would run it."""
        tables = tuple(bytes(self.memory.tables[i][:length]) for i, length in enumerate(action.lengths))
        self.world.note(Computing(self, action.contract, tables))
        self.world.now_ms += self.world.compute_ms
        for stream, table in enumerate(tables):
            if table.startswith(b"NOT OF ITS SCHEMA"):
                return runtime.Outcome(None, stream)
            if table.startswith(b"AGAINST A RULE"):
                return runtime.Outcome(None)
        return runtime.Outcome(program(tables, action.contract.recipients))


class TableMemory:
    """Where an enclave's opened tables lie."""

    def __init__(self) -> None:
        self.tables: dict[int, bytearray] = {}

    def allocate(self, stream: int, size: int) -> memoryview:
        self.tables[stream] = bytearray(size)
        return memoryview(self.tables[stream])

    def erase(self) -> None:
        self.tables.clear()


class ApproverActor(Actor):
    """An approver's process: it appraises the enclave, and decides once for each that has computed."""

    def __init__(self, world: "World", keys: Keys, *, honest: bool) -> None:
        super().__init__(world, keys.name)
        self.keys, self.honest = keys, honest
        self.decided: dict[int, bytes] = {}  # on its disk: by epoch
        self.start()

    def start(self) -> None:
        super().start()
        self.session: Session | None = None
        self.wire[:] = self.world.coordinator.log

    def receive(self, item: Entry) -> None:
        if self.alive:
            for envelope in self.ask(None, item, lambda: self._hear(item)):
                self.world.post(self, envelope)

    def _hear(self, entry: Entry) -> list[bytes]:
        if isinstance(entry, EpochOpened):
            later = self.session is not None and entry.epoch > self.session.epoch
            self.session = Session.propose(self.world.proposal, entry.epoch) if later else self.session
        if not isinstance(entry, Said):
            return []
        if self.session is None:
            self.session = Session.propose(entry.envelope)
            return []
        after, heard = self.session.hear(entry.envelope)
        if isinstance(heard.message, Attestation) and heard.new:
            binding = after.binding
            assert binding is not None
            self.world.appraise(
                heard.message.document,
                nonce=binding.roster,
                user_data=binding.digest,
                public_key=binding.signing_key,
                contract=after.contract,
                at=self.now_ms(),
            )
        self.session = after
        if not isinstance(heard.message, Computed) or not heard.new:
            return []
        if after.epoch not in self.decided:
            said = Decision(heard.message.binding, heard.message.summary)
            self.decided[after.epoch] = sign(self.keys.signing, said)
        return [self.decided[after.epoch]]


class CoordinatorActor(Actor):
    """The coordinator's process with its host's: log and chunks are on its disk."""

    def __init__(self, world: "World", proposal: bytes) -> None:
        super().__init__(world, "coordinator")
        self.log: list[Entry] = [Said(proposal)]
        self.chunks: dict[tuple[int, int, int], bytes] = {}
        self.start()

    def start(self) -> None:
        super().start()
        self.mailbox = Mailbox(self.log)
        for epoch, stream, index in list(self.chunks):
            if epoch == self.mailbox.session.epoch:
                self.mailbox.handle(Stored(epoch, stream, index), self.now_ms())

    def receive(self, item: Post | Put | EnclaveLost) -> None:
        if not self.alive:
            return
        if isinstance(item, Put):
            self._store(item)
        else:
            self._handle(item)

    def tick(self) -> None:
        if self.alive:
            self.world.note(Ticked(self.name, self.now_ms()))
            self._handle(post_office.Tick())

    def _store(self, put: Put) -> None:
        def check() -> list[Any]:
            self.mailbox.check_chunk(put.epoch, put.stream, put.index)
            return [put]

        if self.ask(self.mailbox, put, check):
            self.chunks[put.epoch, put.stream, put.index] = put.box
            self._handle(Stored(put.epoch, put.stream, put.index))
            self.world.pipe(put)

    def _handle(self, event: post_office.Event) -> None:
        for entry in self.ask(self.mailbox, event, lambda: self.mailbox.handle(event, self.now_ms())):
            self.log.append(entry)
            self.world.publish(entry)
            if isinstance(entry, Ended):
                self.chunks.clear()
                self.world.note(Ending(self.name, True, entry.outcome == "released", f"{entry.outcome} {entry.reason}"))


def open_result(
    contract: Contract, binding: Binding, sealed: SealedResult, keys: Keys, boxes: Sequence[bytes]
) -> bytes:
    """A recipient's result; raises SealError when it is not the one that the receipt names."""
    context = result_context(binding.digest, binding.signing_key, sealed.recipient)
    secret = StreamSecret.decode(keys.opening.unwrap(sealed.key.secret, context))
    if len(boxes) != chunk_count(secret.length):
        raise SealError("length of the result")
    cipher, opened = ChunkCipher(secret), bytearray()
    for index, box in enumerate(boxes):
        chunk = bytearray(chunk_bytes(secret.length, index))
        if len(box) != len(chunk) + TAG_BYTES:
            raise SealError("size of a chunk of the result")
        cipher.open_into(box, index, memoryview(chunk))
        opened += chunk
    result = bytes(opened[: secret.length])
    if result_commitment(secret.salt, contract.digest, keys.signing.public, result) != sealed.commitment:
        raise SealError("the result is not the one that the receipt names")
    return result


def _word(thing: object) -> str:
    """One word for an event or action, the same in every replay."""
    if isinstance(thing, member.Heard):
        thing = thing.entry
    envelope = thing if isinstance(thing, bytes) else getattr(thing, "envelope", None)
    if envelope is not None:
        try:
            return open_signed(envelope).kind
        except MpcError:
            return "an altered message"
    if isinstance(thing, member.Remember):
        return f"remember {type(thing.memory).__name__}"
    return type(thing).__name__.lower()


def _state(thing: object, depth: int = 5) -> object:
    """A copy of what a machine holds, deep enough to see any change."""
    if isinstance(thing, dict):
        return {key: _state(value, depth - 1) for key, value in thing.items()}
    if isinstance(thing, list | set):
        return copy(thing)
    parameters = getattr(type(thing), "__dataclass_params__", None)
    mutable = isinstance(thing, Party | Enclave | Mailbox) or (is_dataclass(thing) and not parameters.frozen)
    if mutable and depth:
        return {name: _state(value, depth - 1) for name, value in vars(thing).items()}
    return thing
