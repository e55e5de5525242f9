"""Receipts made by hand, with every key at hand: any lie can be told in them, and properly signed.

The real machines' receipts come from mpc.fuzz.world; here the one that everybody would have to collude for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha384
from typing import Any

import cbor2

from mpc.attestation import AppraisalPolicy, Measurement
from mpc.host.simulated_nsm import SimulatedNsm
from mpc.host.simulated_root import SimulatedRoot
from mpc.protocol import contract as terms
from mpc.protocol.contract import Contract
from mpc.protocol.messages import (
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
    roster_digest,
    sign,
)
from mpc.protocol.sealing import WRAPPED_BYTES, OpeningKey
from mpc.protocol.signing import SigningKey, open_signed

NOW_MS = 1_790_000_000_000  # 2026-09-21T14:13:20Z
PCRS = {index: sha384(b"image %d" % index).digest() for index in (0, 1, 2)}
NAMES = ("north", "south", "auditor")


def seed(label: str) -> bytes:
    return sha384(label.encode()).digest()[:32]


KEYS = {name: SigningKey(seed(name)) for name in (*NAMES, "author", "enclave", "stranger")}


@cache
def root(label: str = "root") -> SimulatedRoot:
    return SimulatedRoot.create(entropy=lambda size: sha384(label.encode()).digest() * 2, now_ms=NOW_MS - 86_400_000)


@cache
def participants() -> tuple[terms.Participant, ...]:
    return tuple(terms.Participant(name, KEYS[name].public, OpeningKey(seed(name)).public) for name in NAMES)


def contract(**changes: Any) -> Contract:
    """Two owners, both recipients; one auditor who must approve."""
    columns = (terms.Column("id", "int64"), terms.Column("pay", "double", ("avg",), clamp=(0.0, 9.0)))
    fields: dict[str, Any] = {
        "version": 1,
        "random": seed("contract"),
        "name": "wages",
        "title": "Who is paid what?",
        "author": KEYS["author"].public,
        "participants": participants(),
        "tables": tuple(
            terms.Table("wages", owner, terms.Rule("aggregate", ("id",), 10), columns, 3 << 20)
            for owner in ("north", "south")
        ),
        "program": terms.Program("sql", "SELECT avg(pay)\nFROM wages"),
        "recipients": ("north", "south"),
        "receipt_recipients": ("north", "auditor"),
        "approvals": terms.Approvals(1, ("auditor",)),
        "enclave": terms.Enclave(
            "sql", (terms.Measurement("agreed", *PCRS.values()),), root().fingerprint, True, 1, 64 << 20
        ),
        "deadlines": terms.Deadlines(NOW_MS + 60_000, NOW_MS + 120_000, NOW_MS + 240_000),
        "epochs_max": 3,
    }
    return Contract(**{**fields, **changes})


def policy(pcrs: dict[int, bytes] = PCRS, of: str = "root") -> AppraisalPolicy:
    return AppraisalPolicy((Measurement("mine", pcrs),), frozenset({root(of).fingerprint}))


class Machine:
    """An enclave's security module."""

    def __init__(self, extended: bytes | None, pcrs: dict[int, bytes] = PCRS, of: str = "root", debug: bool = False):
        self.now_ms = NOW_MS
        entropy = iter(range(1 << 20))
        self.nsm = SimulatedNsm(
            root(of),
            pcrs,
            clock_ms=lambda: self.now_ms,
            entropy=lambda size: (sha384(b"%d" % next(entropy)).digest() * 6)[:size],
            debug=debug,
        )
        if extended is not None:
            self.ask({"ExtendPCR": {"index": 16, "data": extended}})
            self.ask({"LockPCR": {"index": 16}})

    def ask(self, request: Any) -> Any:
        return cbor2.loads(self.nsm.handle(cbor2.dumps(request)))

    def attest(self, nonce: bytes, user_data: bytes, public_key: bytes, now_ms: int) -> bytes:
        self.now_ms = now_ms
        claims = {"nonce": nonce, "user_data": user_data, "public_key": public_key}
        document: bytes = self.ask({"Attestation": claims})["Attestation"]["document"]
        return document


@dataclass
class Story:
    """A session from proposal to release; each part may be replaced before it is told."""

    contract: Contract = field(default_factory=contract)
    epoch: int = 1
    signers: dict[str, str] = field(default_factory=dict)  # who signs in whose place
    change: dict[str, Callable[[Any], Any]] = field(default_factory=dict)  # part → what becomes of it
    first_ms: int = NOW_MS + 10_000
    second_ms: int = NOW_MS + 50_000
    machine: Machine | None = None
    second_machine: Machine | None = None

    def part(self, name: str, value: Any) -> Any:
        return self.change.get(name, lambda same: same)(value)

    def say(self, who: str, part: str, message: Any) -> bytes:
        """The envelope of a part, or what takes its place."""
        signed = sign(KEYS[self.signers.get(part, who)], self.part(part, message))
        envelope: bytes = self.part(f"{part} envelope", signed)
        return envelope

    def consent(self, name: str) -> bytes:
        said = Consent(self.contract.digest, self.epoch, seed(f"nonce {name}"), sha384(name.encode()).digest())
        return self.say(name, f"consent {name}", said)

    def attestation(self) -> tuple[bytes, Binding]:
        key = OpeningKey(seed("enclave")).public
        roster = tuple(self.part("roster", sorted((self.consent("north"), self.consent("south")), key=_signer)))
        binding = Binding(self.contract.digest, self.epoch, roster_digest(roster), key, KEYS["enclave"].public)
        self.machine = self.machine or Machine(self.contract.digest)
        claims = {"nonce": binding.roster, "user_data": binding.digest, "public_key": binding.signing_key}
        document = self.machine.attest(**self.part("first claims", claims), now_ms=self.first_ms)
        document = self.part("first document", document)
        said = Attestation(self.contract.digest, self.epoch, roster, key, document)
        return self.say("enclave", "attestation", said), binding

    def seal(self, name: str, binding: Binding) -> bytes:
        streams = tuple(Wrapped(index, bytes(WRAPPED_BYTES), 2) for index in self.contract.tables_of(name))
        return self.say(name, f"seal {name}", Seal(binding.digest, streams))

    def history(self) -> tuple[tuple[bytes, ...], Binding]:
        proposal = self.say("author", "contract", self.contract)
        attestation, binding = self.attestation()
        seals = sorted((self.seal("north", binding), self.seal("south", binding)), key=_signer)
        summary = sha384(b"summary").digest()
        computed = self.say("enclave", "computed", Computed(binding.digest, summary))
        decision = self.say("auditor", "decision", Decision(binding.digest, summary))
        told = [proposal, attestation, *seals, computed, decision]
        return tuple(self.part("history", told)), binding

    def release(self) -> bytes:
        history, binding = self.history()
        results = [
            SealedResult(name, sha384(f"result {name}".encode()).digest(), Wrapped(2 + index, bytes(WRAPPED_BYTES), 1))
            for index, name in enumerate(self.contract.recipients)
        ]
        receipt = self.part("receipt", Receipt(binding.digest, history, tuple(self.part("results", results))))
        machine = self.second_machine or self.machine
        assert machine is not None
        claims = {"nonce": binding.digest, "user_data": receipt.digest, "public_key": binding.signing_key}
        document = machine.attest(**self.part("second claims", claims), now_ms=self.second_ms)
        return self.say("enclave", "release", Release(receipt, self.part("second document", document)))


def _signer(envelope: bytes) -> bytes:
    try:
        return open_signed(envelope).signer
    except Exception:  # a part that a test has broken
        return b""


def resigned(envelope: bytes, who: str, **changes: Any) -> bytes:
    """The same message with other fields, properly signed."""
    from mpc.protocol.messages import KINDS

    signed = open_signed(envelope)
    return sign(KEYS[who], replace(KINDS[signed.kind].decode(signed.payload), **changes))  # type: ignore[type-var]
