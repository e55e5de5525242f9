"""The processes of parties, recipients and approvers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpc.fuzz.actors import Actor, Keys, Put, open_result
from mpc.fuzz.facts import (
    Accepted,
    Ending,
    Ticked,
    opened,
)
from mpc.protocol.errors import PeerError, PolicyError, SealError
from mpc.protocol.messages import (
    Attestation,
    Computed,
    Decision,
    sign,
)
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import (
    ChunkCipher,
    chunk_digest,
    cut,
    tree_root,
)
from mpc.transport import Entry, EpochOpened, Said
from parties import party as member
from parties.party import Memory, Party, Spooled

if TYPE_CHECKING:
    from mpc.fuzz.world import World


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
            *(self.keys.signing, self.cryptography, session, self.world.accepts, self.world.appraise, memories),
            affords=self.affords,
        )
        self.wire[:] = self.world.coordinator.log
        self.ending = None
        self.preparing = self.knows_contract = False
        self.keeping: member.Keep | None = None

    def affords(self, spends: tuple[member.Debit, ...]) -> None:
        """Its budget for noise is enough for every epoch of the contract, and for no more."""
        sealed = sum(isinstance(memory, member.Sealed) for memory in self.ledger)
        if spends and sealed >= self.world.contract.epochs_max:
            raise PolicyError("the budget for noise is spent")

    def receive(self, item: Entry) -> None:
        if not self.honest and isinstance(item, Said) and self._is_mine(item.envelope):
            return  # a corrupt party does not hold its own word against itself
        self.handle(member.Heard(item))

    def _is_mine(self, envelope: bytes) -> bool:
        try:
            return opened(envelope).signer == self.keys.signing.public
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


class ApproverActor(Actor):
    """An approver's process: it appraises the enclave, and decides once for each that has computed."""

    def __init__(self, world: "World", keys: Keys) -> None:
        also = keys.name in world.parties  # the same person, at another desk
        super().__init__(world, f"{keys.name} as approver" if also else keys.name)
        self.keys, self.honest = keys, world.is_honest(keys.name)
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
