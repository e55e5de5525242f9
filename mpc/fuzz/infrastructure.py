"""What the adversary owns and we run: enclaves, each with its security module, and the coordinator."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from enclave_runtime import enclave as runtime
from enclave_runtime.enclave import Enclave
from enclave_runtime.nsm import Nsm
from mpc.coordinator import mailbox as post_office
from mpc.coordinator.mailbox import EnclaveLost, Mailbox, Post, Stored
from mpc.fuzz.actors import Actor, Put, open_result, word
from mpc.fuzz.facts import (
    Computing,
    EnclaveSpoke,
    Ending,
    Released,
    ResultLeft,
    Shown,
    Ticked,
    opened,
)
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.protocol.contract import Contract
from mpc.protocol.errors import LocalError, SealError
from mpc.protocol.messages import (
    KINDS,
    Attestation,
    Binding,
    Receipt,
    Release,
    roster_digest,
)
from mpc.protocol.sealing import chunk_digest
from mpc.transport import Ended, Entry, Said

if TYPE_CHECKING:
    from mpc.fuzz.world import World


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
        self.outcomes: frozenset[bytes] = frozenset()  # results that it may hold until they leave
        self.closed = False
        self._releasing = False
        self.touched = False  # since the last look into its memory
        self.contract = Contract.decode(opened(proposal).payload)
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
            self._releasing = any(isinstance(a, runtime.Send) and word(a) == "release" for a in actions)
            for action in actions:
                if self.crashes():
                    return
                self._perform(action)

    def _perform(self, action: runtime.Action) -> None:
        if isinstance(action, runtime.Send):
            self._speak(action.envelope)
        elif isinstance(action, runtime.SendChunk):
            self.world.note(ResultLeft(self, self._releasing))
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
        signed = opened(envelope)
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
                with suppress(SealError):  # then it has none, and the invariants see that
                    results[sealed.recipient] = open_result(self.contract, binding, sealed, keys, boxes)
        self.world.note(Released(self, receipt, results, self.now_ms()))

    def _compute(self, action: runtime.Compute) -> runtime.Outcome:
        """The program, as the engine's process would run it."""
        tables = tuple(bytes(self.memory.tables.get(i, b"")[:length]) for i, length in enumerate(action.lengths))
        self.world.note(Computing(self, action.contract, tables))
        self.world.now_ms += self.world.compute_ms
        outcome = self.world.job.run(action.contract, tables)
        self.outcomes = frozenset((outcome.results or {}).values())
        return outcome


class TableMemory:
    """Where an enclave's opened tables lie."""

    def __init__(self) -> None:
        self.tables: dict[int, bytearray] = {}

    def allocate(self, stream: int, size: int) -> memoryview:
        self.tables[stream] = bytearray(size)
        return memoryview(self.tables[stream])

    def digest(self, chunk: memoryview) -> Callable[[], bytes]:
        leaf = chunk_digest(chunk)
        return lambda: leaf

    def erase(self) -> None:
        self.tables.clear()


class CoordinatorActor(Actor):
    """The coordinator's process with its host's: log and chunks are on its disk."""

    def __init__(self, world: "World", proposal: bytes) -> None:
        super().__init__(world, "coordinator")
        self.log: list[Entry] = [Said(proposal)]
        self.chunks: dict[tuple[int, int, int], bytes] = {}
        self.kept: dict[tuple[int, int, int], bytes] = {}  # the adversary's copies, which outlive the session
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
            self.chunks[put.epoch, put.stream, put.index] = self.kept[put.epoch, put.stream, put.index] = put.box
            self._handle(Stored(put.epoch, put.stream, put.index))
            self.world.pipe(put)

    def _handle(self, event: post_office.Event) -> None:
        for entry in self.ask(self.mailbox, event, lambda: self.mailbox.handle(event, self.now_ms())):
            self.log.append(entry)
            self.world.publish(entry)
            if isinstance(entry, Ended):
                self.chunks.clear()
                self.world.note(Ending(self.name, True, entry.outcome == "released", f"{entry.outcome} {entry.reason}"))
