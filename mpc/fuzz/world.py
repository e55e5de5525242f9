"""One session in memory: the real machines, a network and a host that an adversary owns, virtual time, one seed.

`fair()` lets an honest coordinator deliver everything until the session ends. `step(move)` is one move of the
adversary (mpc.fuzz.moves); the same seed, setting and moves give the same events. After each step the invariants
(mpc.fuzz.invariants) judge by what really happened. Signatures, sealing, documents and their appraisal are the real
ones; HPKE draws its own entropy, so ciphertexts differ between two replays, and nothing else does.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any, TypeVar, cast

from enclave_runtime import enclave as runtime
from mpc.attestation import AppraisalPolicy, Measurement, contract_pcr, verify
from mpc.coordinator.mailbox import EnclaveLost, Post
from mpc.fuzz.actors import FORWARDED, Actor, Item, Keys, Put, SeededCryptography
from mpc.fuzz.facts import Broken, Fact, Seen, Spoke, opened
from mpc.fuzz.infrastructure import CoordinatorActor, EnclaveActor
from mpc.fuzz.jobs import CONSENT_MS as CONSENT_MS
from mpc.fuzz.jobs import OTHER_PCRS as OTHER_PCRS
from mpc.fuzz.jobs import PCRS as PCRS
from mpc.fuzz.jobs import RELEASE_MS as RELEASE_MS
from mpc.fuzz.jobs import SEAL_MS as SEAL_MS
from mpc.fuzz.jobs import START_MS as START_MS
from mpc.fuzz.participants import ApproverActor, PartyActor
from mpc.fuzz.setting import PACE, SETTLE
from mpc.fuzz.setting import Move as Move
from mpc.fuzz.setting import Setting as Setting
from mpc.host.simulated_root import SimulatedRoot
from mpc.protocol.contract import Contract
from mpc.protocol.errors import PolicyError
from mpc.protocol.messages import KINDS, sign
from mpc.protocol.sealing import OpeningKey, cut, padded_bytes
from mpc.protocol.signing import SigningKey
from mpc.transport import Entry, EpochOpened, Said
from parties.party import Committed, Memory, Sealed

F = TypeVar("F")
CRASH = "a verdict, never a crash"
STEPS_MAX = 20_000  # of a fair run: far more than any needs


class World:
    """All actors of one session, the wires between them, and what really happened."""

    def __init__(self, seed: int, setting: Setting | None = None, *, another: bool = False) -> None:
        """`another`: a second session of the same people, with the same keys and another contract."""
        self.seed, self.random = seed, Random(f"{seed} another" if another else seed)
        self.entropy = f"{seed} another" if another else f"{seed}"  # what its processes draw from
        self._another: World | None = None
        self.setting = setting or Setting()
        self.job = self.setting.job
        self.now_ms = START_MS
        self.compute_ms = 0  # how long the joint program takes
        self.root, self.pcrs = simulated_root(), PCRS
        self.policy = AppraisalPolicy((Measurement("world", PCRS),), frozenset({self.root.fingerprint}))
        self.wires: defaultdict[str, list[Item]] = defaultdict(list)
        self.story: list[str] = []
        self.moves: list[tuple[Move, int]] = []  # what the adversary did, and how long the story was before
        self.coverage: Counter[tuple[int, str, str]] = Counter()  # round, message, move
        self.stepped = 0  # moves of the adversary, and fair ones
        self._playing = ""
        self.facts: list[Fact] = []
        self._by_kind: defaultdict[type, list[Any]] = defaultdict(list)
        self.checked = 0  # facts that the invariants have seen
        self._draw_keys()
        self.contract = self._draw_contract()
        self.proposal = sign(self.author, self.contract)
        self._record_nothing()
        self.enclaves: list[EnclaveActor] = []
        self.coordinator: CoordinatorActor = CoordinatorActor(self, self.proposal)
        takes_part = {*self.contract.parties, *self.contract.recipients, *self.contract.receipt_recipients}
        self.parties = {name: self._draw_party(name) for name in self.keys if name in takes_part}
        approvers = [ApproverActor(self, self.keys[name]) for name in self.contract.approvals.approvers]
        self.approvers = {approver.name: approver for approver in approvers}
        self.launch(1)

    def _draw_keys(self) -> None:
        draw = SeededCryptography(f"{self.seed} keys")
        self.keys = {name: Keys.draw(name, draw) for name in self.job.names(self.setting)}
        self.author = SigningKey(draw.random(32))
        self.stranger = SigningKey(draw.random(32))  # the adversary's own keys
        self.strangers_opening = OpeningKey(draw.random(32))

    def _draw_contract(self) -> Contract:
        people = [keys.participant for keys in self.keys.values()]
        random = SeededCryptography(f"{self.entropy} contract").random(32)
        return self.job.contract(self.setting, people, self.author.public, self.root.fingerprint, random)

    def another(self) -> "World":
        """A second session, to which every owner said yes: a fresh contract over the same data of the honest, with
        other data of their partners. All went well there."""
        if self._another is None:
            self._another = World(self.seed, self.setting, another=True)
            for name, party in self._another.parties.items():
                if party.honest:
                    party.tables = dict(self.parties[name].tables)
                    party.spooled = party.spool()
            self._another.fair()
            self.stepped += self._another.stepped
        return self._another

    def _draw_party(self, name: str) -> PartyActor:
        return PartyActor(self, self.keys[name], self.draw_tables(name), honest=self.is_honest(name))

    def draw_tables(self, name: str, form: str = "") -> dict[int, bytes]:
        """New tables for a party; parts of an honest one's are canaries."""
        tables = {}
        for stream in self.contract.tables_of(name):
            long = self.setting.long and stream == 0
            drawn = self.job.table(self.contract, stream, self.random, form, long=long)
            tables[stream] = drawn.data
            self.canaries[name] += drawn.canaries
        return tables

    def is_honest(self, name: str) -> bool:
        return name not in self.setting.corrupt

    def who(self, key: bytes) -> str:
        """Whose signatures these are."""
        enclave = next((e.name for e in self.enclaves if e.binding and e.binding.signing_key == key), "")
        known = {self.author.public: "the author", self.stranger.public: "the adversary"}
        return self.contract.names.get(key) or enclave or known.get(key, "somebody else")

    # What a party's process is given.

    def accepts(self, contract: Contract) -> None:
        """Every party's own policy: this contract and no other."""
        if contract != self.contract:
            raise PolicyError("a contract that this party's policy does not name")

    def appraise(
        self, document: bytes, *, nonce: bytes, user_data: bytes, public_key: bytes, contract: Contract, at: int | None
    ) -> None:
        """The production verifier, under the policy of this world and the contract's own PCR."""
        own = contract_pcr(contract.digest)
        verify(document, self.policy, nonce=nonce, user_data=user_data, public_key=public_key, pcrs=own, at=at)

    # What really happened.

    def _record_nothing(self) -> None:
        self.canaries: defaultdict[str, list[bytes]] = defaultdict(list)  # of each party, all that it ever held
        self.inputs: dict[bytes, dict[int, bytes]] = {}  # commitment → the tables behind it
        self.content_keys: set[bytes] = set()
        self.verified: set[bytes] = set()  # releases whose receipts a stranger accepts
        self.pool: list[bytes] = [self.proposal]  # every envelope that was ever said

    def note(self, *facts: Fact) -> None:
        for fact in facts:
            self.facts.append(fact)
            self._by_kind[type(fact)].append(fact)

    def of(self, kind: type[F]) -> list[F]:
        """All facts of one kind."""
        return cast("list[F]", self._by_kind[kind])

    def tell(self, line: str, *facts: Fact) -> None:
        """A line of the story: the same in every replay."""
        self.story.append(line)
        self.note(*facts)

    def remembered(self, party: PartyActor, memory: Memory) -> None:
        if isinstance(memory, Committed):
            # What a corrupt party committed to is what its chunks hold, up to the length that it said.
            chunks = {stream: b"".join(cut(table)) for stream, table in party.tables.items()}
            self.inputs[memory.commitment] = {
                said.stream: chunks[said.stream][: said.length]
                for said, real in zip(memory.tables, party.spool(), strict=True)
                if said.tree == real.tree and padded_bytes(said.length) == len(chunks[said.stream])
            }
        elif isinstance(memory, Sealed):
            self.content_keys.update(memory.keys)

    # The wires, as an honest coordinator and host use them.

    def post(self, sender: PartyActor | ApproverActor | EnclaveActor, envelope: bytes) -> None:
        """A participant or an enclave says something."""
        self.pool.append(envelope)
        self.note(Seen(envelope))
        signed = opened(envelope)
        if not isinstance(sender, EnclaveActor):
            self.note(Spoke(sender.keys.name, sender.honest, KINDS[signed.kind].decode(signed.payload), signed))
        self.wires["coordinator"].append(Post(envelope))

    def put(self, put: Put) -> None:
        self.note(Seen(put.box))
        self.wires["coordinator"].append(put)

    def lost(self, epoch: int) -> None:
        """The host says that an enclave is gone."""
        self.wires["coordinator"].append(EnclaveLost(epoch))

    def publish(self, entry: Entry) -> None:
        """The coordinator's log has grown; its host follows it."""
        for name in (*self.parties, *self.approvers):
            self.wires[name].append(entry)
        if isinstance(entry, EpochOpened):
            self.launch(entry.epoch)
        elif isinstance(entry, Said) and opened(entry.envelope).kind in FORWARDED:
            for enclave in self.running(self.coordinator.mailbox.session.epoch):
                self.wires[enclave.name].append(runtime.Message(entry.envelope))

    def pipe(self, put: Put) -> None:
        """A chunk has been stored."""
        if put.stream < len(self.contract.tables):
            for enclave in self.running(put.epoch):
                self.wires[enclave.name].append(runtime.Chunk(put.stream, put.index, put.box))

    def running(self, epoch: int) -> list[EnclaveActor]:
        return [enclave for enclave in self.enclaves if enclave.epoch == epoch and enclave.alive]

    def launch(
        self, epoch: int, *, proposal: bytes = b"", pcrs: Mapping[int, bytes] = PCRS, debug: bool = False
    ) -> EnclaveActor:
        """The host starts an enclave and tells it what the coordinator has heard so far."""
        enclave = EnclaveActor(self, len(self.enclaves), epoch, proposal or self.proposal, pcrs, debug=debug)
        self.enclaves.append(enclave)
        wire = self.wires[enclave.name]
        wire.append(runtime.Begin(enclave.proposal, epoch))
        since = max((i for i, entry in enumerate(self.coordinator.log) if isinstance(entry, EpochOpened)), default=0)
        said = [entry.envelope for entry in self.coordinator.log[since:] if isinstance(entry, Said)]
        wire += [runtime.Message(envelope) for envelope in said if opened(envelope).kind in FORWARDED]
        return enclave

    def kill_enclave(self, enclave: EnclaveActor) -> None:
        """It is gone, and an honest host says so."""
        if enclave.alive:
            enclave.kill()
            self.lost(enclave.epoch)

    # Time and order.

    @property
    def actors(self) -> dict[str, Actor]:
        members: Iterable[Actor] = (
            self.coordinator,
            *self.parties.values(),
            *self.approvers.values(),
            *self.enclaves,
        )
        return {actor.name: actor for actor in members}

    def ready(self) -> list[str]:
        """Who has something on its wire."""
        return [name for name, actor in self.actors.items() if self.wires[name] and not actor.silent]

    def deliver(self, name: str, index: int = 0) -> None:
        self.actors[name].receive(self.wires[name].pop(index))

    def advance(self, milliseconds: int) -> None:
        """Time passes, and everybody looks at the clock."""
        self.now_ms += milliseconds
        for actor in self.actors.values():
            if actor.alive:
                actor.tick()

    def step(self, move: Move) -> None:
        """One move of the adversary; raises Broken when an invariant does not hold afterwards."""
        from mpc.fuzz import invariants, moves  # they need this module

        self.stepped += 1
        self.moves.append((move, len(self.story)))
        self._playing = move.name
        try:
            if move.name == PACE:
                self._go_on(move.draw)
            elif move.name == SETTLE:
                self.settle()
            else:
                moves.MOVES[move.name].play(self, Random(move.draw))
                self.touch("")
            invariants.check(self)
        except Broken as broken:
            broken.world = self
            raise
        except Exception as error:  # of a machine: it may refuse, and nothing else
            crashed = Broken(CRASH, f"{type(error).__name__}: {error}")
            crashed.world = self
            raise crashed from error

    def _go_on(self, steps: int) -> None:
        for _ in range(steps):
            if not self.fair_step():
                break

    def touch(self, message: str) -> None:
        """The move that is being played has to do with such a message, in the round that the coordinator is in."""
        self.coverage[self.coordinator.mailbox.session.round.value, message, self._playing] += 1

    def fair_step(self) -> bool:
        """Deliver one thing, in the order of its wire, or go on with a process's own work; False when all wait."""
        from mpc.fuzz import invariants

        ready = self.ready()
        if ready:
            self.deliver(self.random.choice(ready))
        elif not any(actor.work() for actor in self.actors.values()):
            return False
        invariants.check(self)
        self.stepped += 1
        return True

    def fair(self) -> None:
        """Until the session is over for everybody who is alive; whoever died starts again.

        Raises:  Broken when an invariant does not hold, or when the session does not end by its last deadline.
        """
        for _ in range(STEPS_MAX):
            for actor in self.actors.values():
                if not actor.alive and not isinstance(actor, EnclaveActor):
                    actor.start()
            if self.fair_step():
                continue
            if self.over():
                return
            deadlines = self.contract.deadlines
            later = [at for at in (deadlines.consent_ms, deadlines.seal_ms, deadlines.release_ms) if at >= self.now_ms]
            if not later:
                break
            self.advance(later[0] + 1 - self.now_ms)
        raise Broken("termination", f"a fair network, and after {STEPS_MAX} steps or the last deadline no end")

    def until(self, condition: Callable[[], object]) -> None:
        """Fair steps until something has happened; raises Broken when everybody waits before."""
        while not condition():
            if not self.fair_step():
                raise Broken("termination", "everybody waits")

    def rest(self) -> None:
        """Fair steps until everybody waits."""
        while self.fair_step():
            pass

    def settle(self) -> None:
        """Time runs out; whoever is alive must see that by its own clock."""
        from mpc.fuzz import invariants

        skew_ms = max(abs(actor.skew_ms) for actor in self.actors.values())
        self.advance(self.contract.deadlines.release_ms - START_MS + skew_ms + 1)
        invariants.check(self)

    def over(self) -> bool:
        return self.coordinator.mailbox.ended is not None and all(
            party.ending is not None for party in self.parties.values()
        )

    def endings(self) -> dict[str, tuple[bool, str]]:
        """Party → whether it got a release, and why not."""
        ended = {name: party.ending for name, party in self.parties.items()}
        return {name: (ending.released, ending.why) for name, ending in ended.items() if ending}

    def said(self, kind: str) -> list[bytes]:
        """Every envelope of a kind that anybody said, in order."""
        return [envelope for envelope in self.pool if opened(envelope).kind == kind]

    def refused(self, name: str, what: str) -> bool:
        """Whether somebody has refused something with these words."""
        return any(line.startswith(f"{name} refuses") and what in line for line in self.story)

    def held(self) -> Sequence[SigningKey]:
        """The keys that the adversary signs with."""
        return [self.stranger, *(self.keys[name].signing for name in sorted(self.setting.corrupt))]

    def held_opening(self) -> Sequence[OpeningKey]:
        return [self.strangers_opening, *(self.keys[name].opening for name in sorted(self.setting.corrupt))]


@lru_cache(maxsize=1)
def simulated_root() -> SimulatedRoot:
    """One for all worlds: making it is slow, and its key is nobody's secret here."""
    return SimulatedRoot.create(entropy=SeededCryptography("root").random, now_ms=START_MS)
