"""It must bite: one-line faults planted in the product, and the invariant that finds each. None is idle."""

import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from enclave_runtime import enclave as runtime
from mpc.fuzz import invariants
from mpc.fuzz.facts import Broken
from mpc.fuzz.moves import attack, come_with_other_data
from mpc.fuzz.world import RELEASE_MS, Setting, World
from mpc.protocol.messages import Computed, Decision, sign
from mpc.protocol.signing import open_signed

Hunt = Callable[[], None]


def plant(monkeypatch: pytest.MonkeyPatch, where: str, line: str, instead: str) -> None:
    """Put another line into a function of the product: `module:function` or `module:Class.method`."""
    module_name, _, path = where.partition(":")
    owner = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"{where} has {source.count(line)} times: {line}"
    made: dict[str, object] = {}
    exec(compile(source.replace(line, instead), where, "exec"), function.__globals__, made)
    monkeypatch.setattr(owner, name, made[name])


def seeds(setting: Setting | None = None, most: int = 120) -> Hunt:
    """Adversaries by seed, until one of them breaks something."""

    def hunt() -> None:
        for seed in range(most):
            attack(seed, setting=setting)

    return hunt


def other_data_in_every_epoch() -> None:
    """A partner changes its input, and the host completes both enclaves."""
    world = World(1, Setting(parties=2, corrupt=frozenset({"party-1"})))
    world.until(lambda: world.said("attestation"))
    world.enclaves[0].silent = True
    world.rest()
    world.lost(1)
    world.until(lambda: len(world.enclaves) == 2)
    come_with_other_data(world.parties["party-1"])
    world.rest()
    world.enclaves[0].silent = False
    world.rest()


def approvals_by(*names: str, summary: bytes = b"") -> None:
    """Those say yes, and the host brings it to the enclave; nobody else says anything."""
    world = World(1, APPROVED)
    for approver in world.approvers.values():
        approver.silent = True
    world.rest()
    said = Computed.decode(open_signed(world.said("computed")[0]).payload)
    for name in names:
        yes = Decision(said.binding, summary or said.summary)
        world.enclaves[0].receive(runtime.Message(sign(world.keys[name].signing, yes)))
    invariants.check(world)


def approvals_by_others() -> None:
    approvals_by("approver-0", "party-1")


def approvals_of_something_else() -> None:
    approvals_by("approver-0", "approver-1", summary=bytes(48))


def the_program_takes_too_long() -> None:
    """It ends after the contract's last deadline."""
    world = World(1, Setting(parties=1))
    world.compute_ms = RELEASE_MS + 1
    world.rest()


def a_seal_that_nobody_heard() -> None:
    """A party dies right after its seal has left, and the seal gets lost."""
    world = World(1, Setting(parties=2))
    world.until(lambda: world.said("seal"))
    for party in world.parties.values():
        party.kill()
    world.wires["coordinator"].clear()
    for party in world.parties.values():
        party.start()
    world.rest()


def chunks_change_places() -> None:
    """The host hands over the right chunks at each other's places."""
    world = World(1, Setting(parties=1, long=True))
    world.until(lambda: world.said("attestation"))
    world.enclaves[0].silent = True
    world.rest()
    wire = world.wires["enclave-0"]
    for place, item in enumerate(wire):
        if isinstance(item, runtime.Chunk) and item.index < 2:
            wire[place] = replace(item, index=1 - item.index)
    world.enclaves[0].silent = False
    world.rest()


def a_chunk_of_the_wrong_size() -> None:
    """The second chunk of a table comes cut off."""
    world = World(1, Setting(parties=1, long=True))
    world.until(lambda: [item for item in world.wires["enclave-0"] if isinstance(item, runtime.Chunk)])
    first = next(item for item in world.wires["enclave-0"] if isinstance(item, runtime.Chunk))
    while world.wires["enclave-0"]:
        world.deliver("enclave-0")
    world.enclaves[0].receive(runtime.Chunk(first.stream, 1 - first.index, b"short"))
    invariants.check(world)


@dataclass(frozen=True)
class Fault:
    """What is planted, which invariant must find it, and how it is hunted.

    Where one check stands behind another, `also` takes away the second.
    """

    what: str
    where: str
    line: str
    instead: str
    finds: str
    hunt: Hunt
    also: tuple[str, str, str] | None = None


PARTY, ROUNDS, ENCLAVE = "parties.party:Party", "mpc.protocol.rounds:Session", "enclave_runtime.enclave:Enclave"
TWO = Setting(parties=2, corrupt=frozenset({"party-1"}))
THREE = Setting(parties=3, corrupt=frozenset({"party-1"}))
APPROVED = Setting(parties=2, approvers=3, quorum=2, corrupt=frozenset({"party-1", "approver-0"}))

FAULTS = [
    Fault(
        "any measurement is accepted",
        "mpc.attestation.verify:_accepted_measurement",
        "    reasons = []",
        "    return policy.measurements[0]",
        "appraisal",
        seeds(TWO),
    ),
    Fault(
        "what a document states is not compared",
        "mpc.attestation.verify:_check_equal",
        "if expected is not None and expected != got:",
        "if False:",
        "appraisal",
        seeds(TWO),
    ),
    Fault(
        "any root is accepted",
        "mpc.attestation.verify:check_chain",
        "not in roots:",
        "not in {*roots, root}:",
        "appraisal",
        seeds(TWO),
    ),
    Fault(
        "the commitments of an earlier epoch are forgotten",
        f"{PARTY}._attested",
        "if any(pins != earlier.pins for earlier in self._sealed.values()):",
        "if False:",
        "one_function",
        seeds(TWO),
    ),
    Fault(
        "the commitments of an earlier epoch are forgotten, and both enclaves release",
        f"{PARTY}._attested",
        "if any(pins != earlier.pins for earlier in self._sealed.values()):",
        "if False:",
        "agreement",
        other_data_in_every_epoch,
    ),
    Fault(
        "a party seals twice in an epoch",
        f"{PARTY}._attested",
        "sealed = self._sealed.get(after.epoch)",
        "sealed = None",
        "one_function",
        seeds(TWO),
    ),
    Fault(
        "a party consents twice in an epoch",
        f"{PARTY}.__init__",
        "self._learn(memory)",
        "isinstance(memory, Consented) or self._learn(memory)",
        "one_function",
        seeds(TWO),
    ),
    Fault(
        "a seal is not written down before it leaves",
        f"{PARTY}._attested",
        "actions = self._remember(sealed)",
        "pass",
        "one_function",
        a_seal_that_nobody_heard,
    ),
    Fault("a party waits for ever", f"{PARTY}._tick", "if now_ms <= (", "if True or (", "termination", seeds(TWO)),
    Fault(
        "anybody may blame",
        f"{ROUNDS}._check_names",
        "if isinstance(message, Abort) and message.blamed is not None and name != Role.ENCLAVE.value:",
        "if False:",
        "blame",
        seeds(THREE),
    ),
    Fault(
        "one approval less is enough",
        f"{ROUNDS}._advance",
        "self.contract.approvals.quorum):",
        "self.contract.approvals.quorum - 1):",
        "release",
        seeds(APPROVED),
    ),
    Fault(
        "anybody in the contract may approve",
        f"{ROUNDS}._speaker",
        "name in self._speakers(rule.speaker)",
        "(name in self._speakers(rule.speaker) or rule.speaker is Role.APPROVER)",
        "release",
        approvals_by_others,
    ),
    Fault(
        "an approval need not be of this summary",
        f"{ROUNDS}._check_decision",
        "_same(",
        "(lambda *_: None)(",
        "release",
        approvals_of_something_else,
    ),
    Fault(
        "one party fewer is enough",
        f"{ROUNDS}._advance",
        "len(self._speakers(rule.speaker))",
        "max(1, len(self._speakers(rule.speaker)) - 1)",
        "consent",
        seeds(THREE),
        (
            f"{ENCLAVE}._compute_when_ready",
            "self._inputs[stream].secret.length for",
            "self._inputs[stream].secret.length if stream in self._inputs else 0 for",
        ),
    ),
    Fault(
        "a message need not be for this enclave",
        f"{ROUNDS}._check_names",
        '_same("binding", self.binding.digest, named)',
        "pass",
        "blame",
        seeds(TWO),
    ),
    Fault(
        "inputs need not be what was committed to",
        f"{ENCLAVE}._compute_when_ready",
        "if self._commitment(contract, name) != consent.commitment:",
        "if False:",
        "integrity",
        seeds(TWO),
    ),
    Fault(
        "the wrong party is blamed",
        f"{ENCLAVE}._compute_when_ready",
        "blamed=name",
        "blamed=contract.parties[0]",
        "blame",
        seeds(TWO),
    ),
    Fault("the opening key is kept", f"{ENCLAVE}._outcome", "self._opening = None", "pass", "erasure", seeds(APPROVED)),
    Fault("content keys are kept", f"{ENCLAVE}._outcome", "self._inputs.clear()", "pass", "erasure", seeds(APPROVED)),
    Fault("tables are kept", f"{ENCLAVE}._outcome", "self._memory.erase()", "pass", "erasure", seeds(APPROVED)),
    Fault(
        "keys are kept after close",
        f"{ENCLAVE}._close",
        "self._signing = self._opening = None",
        "pass",
        "erasure",
        seeds(TWO),
    ),
    Fault(
        "the deadline of the release is not looked at",
        f"{ENCLAVE}._release",
        "if timestamp_ms(document) > session.deadline_ms:",
        "if False:",
        "release",
        the_program_takes_too_long,
    ),
    Fault(
        "results leave before approvals",
        f"{ENCLAVE}._outcome",
        "if self._session.round is Round.RELEASE else []",
        "",
        "first check, then change",
        seeds(APPROVED),
    ),
    Fault(
        "chunks are not encrypted",
        "mpc.protocol.sealing:ChunkCipher.seal",
        "return self._aead.encrypt(nonce, chunk, context)",
        "return bytes(chunk) + bytes(TAG_BYTES)",
        "confidentiality",
        seeds(TWO),
    ),
    Fault(
        "a chunk may stand anywhere",
        "mpc.protocol.sealing:ChunkCipher._position",
        "last = bytes([index == self._last])",
        "last, index = b'0', 0",
        "blame",
        chunks_change_places,
    ),
    Fault(
        "an error quotes what it could not read",
        f"{ENCLAVE}._open",
        "got=len(chunk.box)",
        "got=bytes(table.buffer)",
        "confidentiality",
        a_chunk_of_the_wrong_size,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, fault.where, fault.line, fault.instead)
    if fault.also is not None:
        plant(monkeypatch, *fault.also)
    if fault.finds in {invariant.__name__ for invariant in invariants.INVARIANTS}:
        monkeypatch.setattr(invariants, "INVARIANTS", (getattr(invariants, fault.finds),))
    with pytest.raises(Broken) as found:
        fault.hunt()
    assert found.value.invariant == fault.finds


def test_no_invariant_is_idle() -> None:
    assert {invariant.__name__ for invariant in invariants.INVARIANTS} <= {fault.finds for fault in FAULTS}
