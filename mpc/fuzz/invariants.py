"""The ten invariants of the design, each a function that raises Broken; all are checked after every step.

They judge by facts (mpc.fuzz.facts) that the world's actors recorded, and by the state of enclaves; never by what a
machine says of itself. Each is given the facts since the last check.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from enclave_runtime.nsm import Nsm
from mpc.fuzz.facts import (
    Accepted,
    Broken,
    Computing,
    EnclaveSpoke,
    Ending,
    Fact,
    Released,
    ResultLeft,
    Seen,
    Shown,
    Spoke,
    Ticked,
    opened,
)
from mpc.fuzz.infrastructure import EnclaveActor, TableMemory
from mpc.protocol.encoding import Record
from mpc.protocol.errors import PeerError, SealError
from mpc.protocol.messages import Abort, Computed, Consent, Decision, Receipt, Seal
from mpc.protocol.sealing import (
    ChunkCipher,
    Cryptography,
    OpeningKey,
    StreamSecret,
    result_context,
    table_context,
)
from mpc.protocol.signing import Signed, SigningKey
from mpc.receipt import verify_receipt

if TYPE_CHECKING:
    from mpc.fuzz.world import World

Facts = Sequence[Fact]
T = TypeVar("T")


def check(world: "World") -> None:
    """All ten, over what happened since the last time."""
    news = world.facts[world.checked :]
    world.checked = len(world.facts)
    for invariant in INVARIANTS:
        invariant(world, news)


def confidentiality(world: "World", news: Facts) -> None:
    """No byte of a party's input, beyond the released result, appears outside party and enclave.

    Lost otherwise: the one thing that everybody is here for; somebody reads rows that nobody may show.
    """
    canaries = [canary for name in world.parties if world.is_honest(name) for canary in world.canaries[name]]
    texts = [canary.decode().strip() for canary in canaries if canary.isascii()]
    for fact in news:
        if isinstance(fact, Seen):
            _hold(not any(canary in bytes(fact.data) for canary in canaries), confidentiality, "a row on the wire")
        elif isinstance(fact, Shown):
            _hold(not any(text in fact.text for text in texts), confidentiality, "a row in a text")
        elif isinstance(fact, Spoke) and fact.honest and isinstance(fact.message, Seal):
            for key in fact.message.streams:
                table = world.contract.tables[key.stream].name
                context = table_context(fact.message.binding, fact.signed.signer, table)
                _hold(not _opens(world, key.secret, context), confidentiality, f"the adversary opens {fact.name}'s key")
        elif isinstance(fact, Released) and fact.enclave.genuine:
            _check_results_are_sealed(world, fact)


def _check_results_are_sealed(world: "World", released: Released) -> None:
    binding = released.enclave.binding
    assert binding is not None
    for sealed in released.receipt.results:
        if world.is_honest(sealed.recipient):
            context = result_context(binding.digest, binding.signing_key, sealed.recipient)
            why = f"the adversary opens the result of {sealed.recipient}"
            _hold(not _opens(world, sealed.key.secret, context), confidentiality, why)


def consent(world: "World", news: Facts) -> None:
    """Nothing is computed that all parties of the roster did not sign.

    Lost otherwise: somebody's data serve a purpose, or meet partners, to which they never agreed.
    """
    for fact in _of(news, Computing):
        if not fact.enclave.accepted_code:
            continue
        binding = fact.enclave.binding
        assert binding is not None
        signed = _roster(fact.enclave)
        _hold(set(signed) == set(fact.contract.parties), consent, "a party of the contract is not in the roster")
        for name, (message, said) in signed.items():
            agreed = (message.contract, message.epoch) == (fact.contract.digest, fact.enclave.epoch)
            _hold(agreed, consent, f"{name} consented to something else")
            if world.is_honest(name) and said.signer == world.keys[name].signing.public:
                _hold(said.digest in _said(world, name, Consent), consent, f"{name} never said this consent")
                sealed = [seal.binding for seal, _ in _spoken(world, name, Seal)]
                _hold(binding.digest in sealed, consent, f"{name} did not seal to this enclave")


def appraisal(world: "World", news: Facts) -> None:
    """Nothing is sealed to a binding whose document the party's own policy did not accept.

    Lost otherwise: the party hands its data to code that it has never seen.
    """
    for fact in _of(news, Spoke):
        if not (fact.honest and isinstance(fact.message, Seal)):
            continue
        enclave = next((e for e in world.enclaves if e.binding and e.binding.digest == fact.message.binding), None)
        _hold(enclave is not None, appraisal, f"{fact.name} sealed to a binding that no enclave has")
        assert enclave is not None
        _hold(enclave.genuine, appraisal, f"{fact.name} sealed to {enclave.name}, which is not the agreed enclave")
        mine = _roster(enclave)[fact.name][1].digest
        _hold(mine in _said(world, fact.name, Consent), appraisal, f"{fact.name} sealed to a roster without its word")


def integrity(world: "World", news: Facts) -> None:
    """A released result equals the clear-text oracle on exactly the committed inputs.

    Lost otherwise: a wrong number with a valid receipt.
    """
    for released in _of(news, Released):
        if released.enclave.genuine:
            complete = set(released.results) == set(world.contract.recipients)
            right = complete and _right(world, released.enclave, released.results)
            _hold(right, integrity, f"{released.enclave.name} released something else")
    for accepted in _of(news, Accepted):
        if accepted.honest:
            binding = accepted.session.binding
            enclave = next((e for e in world.enclaves if e.genuine and e.binding == binding), None)
            _hold(enclave is not None, integrity, f"{accepted.name} accepted a release of no agreed enclave")
            assert enclave is not None
            due = accepted.name in world.contract.recipients
            got = {} if accepted.result is None else {accepted.name: accepted.result}
            right = bool(got) == due and _right(world, enclave, got)
            _hold(right, integrity, f"{accepted.name} got something else")
            try:
                if accepted.release not in world.verified:
                    verify_receipt(accepted.release, world.policy)
                    world.verified.add(accepted.release)
            except PeerError as error:
                raise Broken("integrity", f"{accepted.name}'s receipt does not verify: {error.what}") from error


def one_function(world: "World", news: Facts) -> None:
    """An honest party's input meets at most one vector of the others' inputs, and an approval serves one release.

    Lost otherwise: by asking again with other partner data, the others subtract one answer from the other.
    """
    if not any(isinstance(fact, Spoke | Computing | Released) for fact in news):
        return
    for name in filter(world.is_honest, world.parties):
        kinds: tuple[type[Consent | Seal], ...] = (Consent, Seal)
        for kind in kinds:
            per_epoch = defaultdict(set)
            for message, said in _spoken(world, name, kind):
                per_epoch[_epoch_of(world, message)].add(said)
            _hold(all(len(said) == 1 for said in per_epoch.values()), one_function, f"{name} said two {kind.__name__}s")
        bindings = {seal.binding for seal, _ in _spoken(world, name, Seal)}
        met = {_commitments(e) for e in world.enclaves if e.binding and e.binding.digest in bindings}
        _hold(len(met) <= 1, one_function, f"{name} sealed the same input to meet two others")
    computed = {fact.tables for fact in world.of(Computing) if fact.enclave.genuine}
    _hold(len(computed) <= 1, one_function, "two functions of one party's input were computed")
    served = defaultdict(set)
    for released in world.of(Released):
        for decision in _decisions(released.receipt):
            if released.enclave.genuine:
                served[decision.digest].add(released.receipt.digest)
    _hold(all(len(releases) == 1 for releases in served.values()), one_function, "one approval, two releases")


def agreement(world: "World", news: Facts) -> None:
    """All receipts of one session show the same commitments, and their results are equal.

    Lost otherwise: two partners hold valid receipts for different answers, and both are right.
    """
    if not _of(news, Released):
        return
    released = [fact for fact in world.of(Released) if fact.enclave.genuine]
    _hold(len({_commitments(fact.enclave) for fact in released}) <= 1, agreement, "receipts with other commitments")
    _hold(len({tuple(sorted(fact.results.items())) for fact in released}) <= 1, agreement, "two different results")


def release(world: "World", news: Facts) -> None:
    """No result leaves before the contract's approvals are complete, by distinct keys of the right role, in time.

    Lost otherwise: whoever runs the enclave decides alone what leaves it.
    """
    released = _of(news, Released)
    for left in _of(news, ResultLeft):
        if left.enclave.genuine:
            _hold(left.with_release, release, f"a result left {left.enclave.name} without a release")
    for fact in released:
        if not fact.enclave.genuine:
            continue
        contract = world.contract
        _hold(fact.now_ms <= contract.deadlines.release_ms, release, "after the contract's deadline")
        approvals = {(d.signer, d.digest) for d in _decisions(fact.receipt)}
        approvers = {contract.participant(name).key: name for name in contract.approvals.approvers}
        distinct = {signer for signer, _ in approvals if signer in approvers}
        _hold(len(distinct) >= contract.approvals.quorum, release, f"{len(distinct)} approvers of {len(approvers)}")
        spoken = [spoke.message for spoke in world.of(EnclaveSpoke) if spoke.enclave is fact.enclave]
        summaries = {message.summary for message in spoken if isinstance(message, Computed)}
        for decision in _decisions(fact.receipt):
            said = Decision.decode(decision.payload)
            bound = fact.enclave.binding is not None and said.binding == fact.enclave.binding.digest
            _hold(bound and {said.summary} == summaries, release, "an approval of something else was counted")
            name = approvers.get(decision.signer, "")
            if world.is_honest(name):
                _hold(decision.digest in _said(world, name, Decision), release, f"{name} never approved")


def termination(world: "World", news: Facts) -> None:
    """Every live participant ends by its deadline and knows why; with a fair network it ends in a result (`fair`).

    Lost otherwise: a person waits for ever, or is told nothing.
    """
    last = world.contract.deadlines.release_ms
    for ticked in _of(news, Ticked):
        party = world.parties.get(ticked.name)
        if party is not None and party.alive and party.knows_contract and ticked.now_ms > last:
            _hold(party.ending is not None, termination, f"{ticked.name} waits on after the last deadline")
        if ticked.name == world.coordinator.name and ticked.now_ms > last:
            _hold(world.coordinator.mailbox.ended is not None, termination, "the coordinator waits on")
    for ending in _of(news, Ending):
        _hold(bool(ending.why.strip()), termination, f"{ending.name} does not know why it ended")


def blame(world: "World", news: Facts) -> None:
    """An abort with proof never names an honest participant, and "not heard" accuses nobody.

    Lost otherwise: an honest organisation answers for what others did.
    """
    for spoke in _of(news, EnclaveSpoke):
        if spoke.enclave.genuine and isinstance(spoke.message, Abort) and spoke.message.blamed is not None:
            _hold(not world.is_honest(spoke.message.blamed), blame, f"{spoke.enclave.name} blames an honest party")
    for ending in _of(news, Ending):
        if ending.honest:
            _, accused, name = ending.why.partition("proven against ")
            _hold(not (accused and world.is_honest(name)), blame, f"{ending.name} holds a proof against {name}")


def erasure(world: "World", _: Facts) -> None:
    """After compute no input and no content key, after close no key at all, is left in the enclave's state.

    Lost otherwise: who takes the enclave's memory later has everything that it ever saw.
    """
    for enclave in world.enclaves:
        if not enclave.touched or not (enclave.computed or enclave.closed):
            continue
        enclave.touched = False
        _hold(not enclave.memory.tables, erasure, f"{enclave.name} still has tables in its memory")
        kinds: tuple[type, ...] = (memoryview, OpeningKey)
        if enclave.closed:
            kinds += (SigningKey, StreamSecret, ChunkCipher)
        for thing in _reachable(enclave.machine):
            _hold(not isinstance(thing, kinds), erasure, f"{enclave.name} still holds a {type(thing).__name__}")
            if isinstance(thing, bytes) and len(thing) == 32:
                _hold(thing not in world.content_keys, erasure, f"{enclave.name} still holds a content key")
            elif isinstance(thing, bytes | bytearray) and bytes(thing) not in enclave.outcomes:
                rows = any(canary in thing for canaries in world.canaries.values() for canary in canaries)
                _hold(not rows, erasure, f"{enclave.name} still holds rows")


Invariant = Callable[["World", Facts], None]
INVARIANTS: tuple[Invariant, ...] = (
    confidentiality,
    consent,
    appraisal,
    integrity,
    one_function,
    agreement,
    release,
    termination,
    blame,
    erasure,
)


def _hold(holds: bool, invariant: Callable[..., None], why: str) -> None:
    if not holds:
        raise Broken(invariant.__name__, why)


def _of(facts: Facts, kind: type[T]) -> list[T]:
    return [fact for fact in facts if isinstance(fact, kind)]


def _spoken(world: "World", name: str, kind: type[T]) -> list[tuple[T, bytes]]:
    """What a participant's own machine said, of one kind, each with its digest."""
    spoken = [fact for fact in world.of(Spoke) if fact.name == name]
    return [(fact.message, fact.signed.digest) for fact in spoken if isinstance(fact.message, kind)]


def _said(world: "World", name: str, kind: type[Record]) -> set[bytes]:
    return {said for _, said in _spoken(world, name, kind)}


def _opens(world: "World", wrapped: bytes, context: bytes) -> bool:
    for key in world.held_opening():
        try:
            key.unwrap(wrapped, context)
        except SealError:
            continue
        return True
    return False


def _roster(enclave: EnclaveActor) -> dict[str, tuple[Consent, Signed]]:
    """The consents that an enclave was attested with, by their speakers."""
    assert enclave.attestation is not None
    consents = [opened(envelope) for envelope in enclave.attestation.roster]
    return {enclave.contract.names[said.signer]: (Consent.decode(said.payload), said) for said in consents}


def _commitments(enclave: EnclaveActor) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((name, message.commitment) for name, (message, _) in _roster(enclave).items()))


def _right(world: "World", enclave: EnclaveActor, results: Mapping[str, bytes]) -> bool:
    """Whether these are results of the inputs that the roster's commitments stand for."""
    tables: dict[int, bytes] = {}
    for _, commitment in _commitments(enclave):
        tables |= world.inputs.get(commitment, {})
    whole = [tables[stream] for stream in sorted(tables)]
    return len(whole) == len(world.contract.tables) and world.job.agrees(world.contract, whole, results)


def _epoch_of(world: "World", message: Consent | Seal) -> int:
    if isinstance(message, Consent):
        return message.epoch
    return next(e.epoch for e in world.enclaves if e.binding and e.binding.digest == message.binding)


def _decisions(receipt: Receipt) -> list[Signed]:
    return [said for said in map(opened, receipt.history) if said.kind == "decision"]


def _reachable(root: object) -> Iterator[object]:
    """Everything that a machine holds, but for its security module, its entropy and the memory it was given."""
    seen, todo = set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, Nsm | Cryptography | TableMemory | type):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, Mapping):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            todo += thing
        else:
            todo += getattr(thing, "__dict__", {}).values()
            todo += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]  # of functions
