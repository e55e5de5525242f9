"""What the explorer's adversary says itself: with the keys of corrupt participants, and with a stranger's."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from enclave_runtime import enclave as runtime
from enclave_runtime.nsm import Nsm
from mpc.coordinator.mailbox import EnclaveLost
from mpc.fuzz.actors import Put
from mpc.fuzz.facts import opened
from mpc.fuzz.stage import Clock, Item, Named, Restart, Stage, Work
from mpc.fuzz.world import PCRS, START_MS
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.protocol.contract import CONTRACT_BYTES_MAX
from mpc.protocol.encoding import decode
from mpc.protocol.messages import (
    Abort,
    Acknowledgement,
    Attestation,
    Binding,
    Computed,
    Consent,
    Decision,
    Receipt,
    Release,
    Seal,
    SealedResult,
    Wrapped,
    result_streams,
    roster_digest,
    sign,
)
from mpc.protocol.rounds import Session
from mpc.protocol.sealing import (
    ChunkCipher,
    StreamSecret,
    chunk_digest,
    cut,
    input_commitment,
    table_context,
    tree_root,
)
from mpc.protocol.signing import SigningKey
from mpc.transport import Ended, EpochOpened


def other_contract(stage: Stage) -> bytes:
    """A contract of the adversary's own, over the same tables."""
    program = replace(stage.contract.program, text="show everything")
    return sign(stage.stranger, replace(stage.contract, author=stage.stranger.public, program=program))


@dataclass(frozen=True)
class Input:
    """One of the inputs that a corrupt party may come with; it has one table."""

    key: SigningKey
    stream: int
    secret: StreamSecret
    table: bytes
    commitment: bytes


class Forger:
    """All that the adversary adds to what machines say. The same words always give the same bytes."""

    def __init__(self, stage: Stage, moves: Collection[str], *, inputs: int, rogue: bool) -> None:
        """`inputs`: that a corrupt party may come with. `rogue`: an enclave for another contract takes part."""
        self.stage, self.moves, self.rogue = stage, moves, rogue
        self.epochs = range(1, stage.contract.epochs_max + 1)
        self.keys = [stage.keys[name].signing for name in sorted(stage.setting.corrupt)]
        self.random = Named("adversary")
        self._made: dict[object, list[Item]] = {}
        self.each = inputs
        self.inputs = [
            self._input(name, tables)
            for name in sorted(stage.setting.corrupt & set(stage.contract.parties))
            for tables in [stage.parties[name].tables, *(stage.draw_tables(name) for _ in range(inputs - 1))]
        ]

        self.own = tuple(self._own())

    def _input(self, name: str, tables: dict[int, bytes]) -> Input:
        contract, key = self.stage.contract, self.stage.keys[name].signing
        ((stream, table),) = tables.items()
        secret = StreamSecret(self.random.random(32), self.random.random(32), len(table))
        tree = tree_root([chunk_digest(chunk) for chunk in cut(table)])
        described = [(contract.tables[stream].name, len(table), tree)]
        commitment = input_commitment(secret.salt, contract.digest, key.public, described)
        self.stage.inputs[commitment] = tables
        return Input(key, stream, secret, table, commitment)

    def constants(self) -> list[Item]:
        """What may happen from the start on."""
        stage, epochs = self.stage, self.epochs
        begun = [0, *epochs, epochs.stop] if "forge" in self.moves else epochs
        items: list[Item] = [stage.proposal, Work(), *(runtime.Begin(stage.proposal, epoch) for epoch in begun)]
        if self.rogue:
            items.append(runtime.Begin(other_contract(stage), 1))
        if "epochs" in self.moves:
            items += [EpochOpened(epoch) for epoch in (0, *epochs, epochs.stop)]
            items += [EnclaveLost(epoch) for epoch in epochs]
        if "ends" in self.moves:
            items += [Ended("aborted", "a lie", ("party-0",)), Ended("released")]
        if "time" in self.moves:
            items.append(Clock())
        if "crash" in self.moves or "coordinator" in self.moves:
            items.append(Restart())
        if "forge" in self.moves:
            items += [runtime.Outcome(None), *self._words()]
        return [*items, *self.own]

    def _own(self) -> Iterator[bytes | Put]:
        """Consents and chunks of the corrupt parties' inputs."""
        for one in self.inputs:
            for index, chunk in enumerate(cut(one.table)):
                yield Put(1, one.stream, index, ChunkCipher(one.secret).seal(chunk, index))
            for epoch in self.epochs:
                said = Consent(self.stage.contract.digest, epoch, bytes(32), one.commitment)
                yield sign(one.key, said)

    def _words(self) -> list[bytes]:
        """Nonsense, aborts that blame or are of another session, and a contract that is none of ours."""
        contract = self.stage.contract.digest
        stranger = self.stage.stranger
        made = [stranger.sign("nonsense", b""), other_contract(self.stage)]
        made.append(stranger.sign("contract", bytes(CONTRACT_BYTES_MAX + 1)))
        for key in self.keys:
            made += [key.sign("nonsense", b""), key.sign("abort", b"")]
            made += [sign(key, Abort(contract, 1, "withdrawn", "party-0")), sign(key, Abort(bytes(48), 1, "withdrawn"))]
        return made

    def made_of(self, said: Sequence[bytes | Put]) -> list[Item]:
        """More that may arrive, once this was said."""
        everything = (self.stage.proposal, *self.own, *said)
        made = [more for item in everything for more in self._once(item, self._of)]
        if "forge" in self.moves:
            envelopes = [item for item in everything if isinstance(item, bytes)]
            consents = tuple(envelope for envelope in envelopes if opened(envelope).kind == "consent")
            made += self._once(consents, self._of_consents)
        return made

    def _once(self, thing: object, make: Callable[..., Iterable[Item]]) -> list[Item]:
        if thing not in self._made:
            self._made[thing] = list(make(thing))
        return self._made[thing]

    def _of(self, item: bytes | Put) -> Iterable[Item]:
        if isinstance(item, Put):
            if "alter" in self.moves:
                yield replace(item, box=item.box[:-1])
                yield replace(item, box=item.box[:-1] + bytes([item.box[-1] ^ 1]))
                yield replace(item, index=item.index + 7)
            if "forge" in self.moves:
                yield replace(item, epoch=item.epoch + 1)
            return
        signed = opened(item)
        if "alter" in self.moves:
            yield item[:-1] + bytes([item[-1] ^ 1])
            yield item[:-1]
        if signed.kind == "attestation":
            yield from self._seals(Attestation.decode(signed.payload), signed.signer)
        if "forge" not in self.moves:
            return
        yield self.stage.stranger.sign(signed.kind, signed.payload)
        for key in self.keys:
            yield key.sign(signed.kind, signed.payload)
            if signed.kind == "computed":
                yield sign(key, Decision(Computed.decode(signed.payload).binding, bytes(48)))  # to something else
            elif signed.kind == "release":
                receipt = Release.decode(signed.payload).receipt
                yield sign(key, Acknowledgement(receipt.binding, receipt.digest))
                yield sign(key, Acknowledgement(receipt.binding, bytes(48)))

    def _seals(self, said: Attestation, signer: bytes) -> Iterable[bytes]:
        """To an enclave: each input; and, forging, a wrong stream, no chunks, what does not open, or is too long."""
        binding = Binding(said.contract, said.epoch, roster_digest(said.roster), said.sealing_key, signer).digest
        for one in self.inputs:
            table = self.stage.contract.tables[one.stream].name
            context = table_context(binding, one.key.public, table)
            good, closed, long = (
                self.random.wrap(secret.encode(), said.sealing_key, info)
                for secret, info in (
                    (one.secret, context),
                    (one.secret, b""),
                    (replace(one.secret, length=1 << 40), context),
                )
            )
            streams = [(one.stream, good, 1)]
            if "forge" in self.moves:
                streams += [(one.stream + 7, good, 1), (one.stream, good, 0)]
                if signer != self.stage.stranger.public:  # who opens nothing
                    streams += [(one.stream, closed, 1), (one.stream, long, 1)]
            yield from (sign(one.key, Seal(binding, (Wrapped(*stream),))) for stream in streams)

    def _of_consents(self, consents: tuple[bytes, ...]) -> Iterable[Item]:
        """The stranger as an enclave of every roster: its word whole, with a consent twice, and with what is none."""
        by_party: dict[tuple[int, bytes], list[bytes]] = {}
        for envelope in dict.fromkeys(consents):
            signed = opened(envelope)
            by_party.setdefault((decode(signed.payload)["epoch"], signed.signer), []).append(envelope)
        signers = [self.stage.keys[name].signing.public for name in self.stage.contract.parties]
        for epoch in self.epochs:
            for roster in product(*(by_party.get((epoch, signer), []) for signer in signers)):
                yield from (
                    one for one in self._once(("roster", roster, epoch), self._attested) if isinstance(one, bytes)
                )

    def _attested(self, named: tuple[str, tuple[bytes, ...], int]) -> Iterable[bytes]:
        _, roster, epoch = named
        stage, signer, opening = self.stage, self.stage.stranger, self.stage.strangers_opening.public
        binding = Binding(stage.contract.digest, epoch, roster_digest(roster), opening, signer.public)
        machine = SimulatedNsm(stage.root, PCRS, clock_ms=lambda: START_MS, entropy=self.random.random, debug=True)
        nsm = Nsm(machine.handle)
        nsm.extend_pcr(runtime.CONTRACT_PCR, stage.contract.digest)
        nsm.lock_pcr(runtime.CONTRACT_PCR)
        document = nsm.attest(user_data=binding.digest, nonce=binding.roster, public_key=signer.public)
        whole, *others = (
            sign(signer, Attestation(stage.contract.digest, epoch, one, opening, document))
            for one in (roster, (*roster, roster[0]), (*roster, stage.proposal))
        )
        yield from (whole, *others)
        firsts = {one.commitment for one in self.inputs[:: self.each]}
        if len(firsts) == len(roster) and firsts == {
            decode(opened(consent).payload)["commitment"] for consent in roster
        }:
            yield from self._session(whole, Attestation.decode(opened(whole).payload), binding)

    def _session(self, attestation: bytes, said: Attestation, binding: Binding) -> Iterable[bytes]:
        """The stranger goes on, with all parties corrupt: what it says as an enclave until the end."""
        signer = self.stage.stranger
        seals = [seal for seal in self._seals(said, signer.public)]
        computed = sign(signer, Computed(binding.digest, bytes(48)))
        yield from (*seals, computed)
        first = {
            opened(seal).signer: seal for seal in reversed(seals) if Seal.decode(opened(seal).payload).streams[0].chunks
        }
        session = Session.propose(self.stage.proposal, said.epoch).hear_all([attestation, *first.values(), computed])
        wrapped = Seal.decode(opened(seals[0]).payload).streams[0]
        results = tuple(
            SealedResult(name, bytes(48), replace(wrapped, stream=stream))
            for name, stream in result_streams(self.stage.contract).items()
        )
        for history, sealed in ((session.history(), results), (session.history(), results[:1]), ((), results)):
            receipt = Receipt(binding.digest, history, sealed)
            yield sign(signer, Release(receipt, said.document))
            for key in self.keys:
                yield sign(key, Acknowledgement(binding.digest, receipt.digest))
                yield sign(key, Acknowledgement(binding.digest, bytes(48)))
