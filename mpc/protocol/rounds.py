"""The rounds as one table: who may say what, how often, and which round follows. No other file decides order.

`Session` is a value: `hear` gives the session after a message, or raises and leaves everything as it was.
Every role looks at a session through it, and a receipt is checked by hearing its history again.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from operator import itemgetter
from typing import Self, TypeVar, cast

from mpc.protocol.contract import CONTRACT_BYTES_MAX, Contract
from mpc.protocol.encoding import Record
from mpc.protocol.errors import EncodingError, OrderError, PeerError
from mpc.protocol.messages import (
    KINDS,
    Abort,
    Acknowledgement,
    Attestation,
    Binding,
    Computed,
    Consent,
    Decision,
    Release,
    Seal,
    result_streams,
    roster_digest,
)
from mpc.protocol.sealing import chunk_count
from mpc.protocol.signing import Signed, open_signed

AnyRecord = TypeVar("AnyRecord", bound=Record)


class Round(Enum):
    PROPOSE = 0
    CONSENT = 1
    ATTEST = 2
    SEAL = 3
    COMPUTE = 4
    APPROVE = 5
    RELEASE = 6
    CLOSE = 7


class Role(Enum):
    AUTHOR = "author"
    PARTY = "party"
    ENCLAVE = "enclave"
    APPROVER = "approver"
    RECIPIENT = "recipient"


class Times(Enum):
    ONE = "one of them, once"
    EACH = "each of them, once"
    QUORUM = "the contract's quorum of them, once each"


@dataclass(frozen=True)
class Rule:
    speaker: Role
    times: Times
    then: Round


RULES: Mapping[Round, Mapping[type[Record], Rule]] = {
    Round.PROPOSE: {Contract: Rule(Role.AUTHOR, Times.ONE, Round.CONSENT)},
    Round.CONSENT: {Consent: Rule(Role.PARTY, Times.EACH, Round.ATTEST)},
    Round.ATTEST: {Attestation: Rule(Role.ENCLAVE, Times.ONE, Round.SEAL)},
    Round.SEAL: {Seal: Rule(Role.PARTY, Times.EACH, Round.COMPUTE)},
    Round.COMPUTE: {Computed: Rule(Role.ENCLAVE, Times.ONE, Round.APPROVE)},
    Round.APPROVE: {Decision: Rule(Role.APPROVER, Times.QUORUM, Round.RELEASE)},
    Round.RELEASE: {Release: Rule(Role.ENCLAVE, Times.ONE, Round.CLOSE)},
    Round.CLOSE: {Acknowledgement: Rule(Role.RECIPIENT, Times.EACH, Round.CLOSE)},
}
ANY_ROUND = {Abort: "anybody in the session, once, until the release; only the enclave may blame"}


@dataclass(frozen=True)
class Heard:
    """A message that the session accepted: what, from whom, and whether it is new."""

    message: Record
    signed: Signed
    envelope: bytes = field(repr=False)
    name: str  # of the speaker in the contract; "enclave" or "author" for those
    new: bool = True


@dataclass(frozen=True)
class Session:
    """One contract in one epoch, as far as it has been heard."""

    contract: Contract
    epoch: int
    round: Round = Round.CONSENT
    binding: Binding | None = None
    said: Mapping[tuple[type[Record], bytes], Heard] = field(default_factory=dict, repr=False)  # by kind and key

    @classmethod
    def propose(cls, envelope: bytes, epoch: int = 1) -> Self:
        """Begin an epoch of the contract in `envelope`; raises PeerError when its author did not sign it."""
        signed = open_signed(envelope)
        if len(signed.payload) > CONTRACT_BYTES_MAX:  # else its release might be longer than a message
            raise OrderError("contract", expected=f"at most {CONTRACT_BYTES_MAX} bytes", got=len(signed.payload))
        contract = _kind(signed).decode(signed.payload)
        if not isinstance(contract, Contract) or signed.signer != contract.author:
            raise OrderError("proposal", expected="a contract signed by its author", got=signed.kind)
        if not 1 <= epoch <= contract.epochs_max:
            raise OrderError("epoch", expected=f"1 to {contract.epochs_max}", got=epoch)
        heard = Heard(contract, signed, envelope, Role.AUTHOR.value)
        first = RULES[Round.PROPOSE][Contract].then
        return cls(contract, epoch, first, None, {(Contract, signed.signer): heard})

    def hear(self, envelope: bytes) -> tuple[Self, Heard]:
        """The session after a message.

        Raises:  EncodingError, SignatureError, OrderError naming the speaker; the session is unchanged.
        """
        signed = open_signed(envelope)
        kind = _kind(signed)
        name = self._speaker(kind, signed.signer)  # first: a stranger's payload is not even decoded
        try:
            message = kind.decode(signed.payload)
            earlier = self.said.get((kind, signed.signer))
            if earlier is not None:
                if earlier.signed.digest != signed.digest:
                    raise OrderError(f"a second, different {signed.kind}")
                return self, replace(earlier, new=False)
            after = self._catch_up(message) if isinstance(message, Attestation) else self
            after._check_round(kind, signed)
            after = after._check_names(message, signed, name)
        except PeerError as error:
            error.peer = error.peer or name
            raise
        heard = Heard(message, signed, envelope, name)
        after = replace(after, said={**after.said, (kind, signed.signer): heard})
        return after._advance(kind), heard

    def hear_all(self, envelopes: Iterable[bytes]) -> Self:
        """The session after several messages."""
        session = self
        for envelope in envelopes:
            session, _ = session.hear(envelope)
        return session

    def messages(self, kind: type[Record]) -> dict[str, bytes]:
        """Speaker's name → envelope, of all messages of one kind, ordered by signer."""
        return {heard.name: heard.envelope for heard in self._heard(kind)}

    def content(self, kind: type[AnyRecord]) -> dict[str, AnyRecord]:
        """Speaker's name → message, of all messages of one kind, ordered by signer."""
        return {heard.name: cast(AnyRecord, heard.message) for heard in self._heard(kind)}

    def _heard(self, kind: type[Record]) -> list[Heard]:
        return [self.said[said] for said in sorted((key for key in self.said if key[0] is kind), key=itemgetter(1))]

    @property
    def deadline_ms(self) -> int:
        """Until when this round may go on. Consents to a later epoch come when an enclave was lost while sealing."""
        deadlines = self.contract.deadlines
        if self.round in (Round.CONSENT, Round.ATTEST) and self.epoch == 1:
            return deadlines.consent_ms
        return deadlines.seal_ms if self.round.value <= Round.SEAL.value else deadlines.release_ms

    def history(self) -> tuple[bytes, ...]:
        """What a receipt holds of this session: everything but the consents, which the attestation carries."""
        return tuple(heard.envelope for heard in self._history())

    def _history(self) -> list[Heard]:
        kinds = (Contract, Attestation, Seal, Computed, Decision)
        return [heard for kind in kinds for heard in self._heard(kind)]

    def missing(self) -> tuple[str, ...]:
        """Whose message this round waits for, by name."""
        ((kind, rule),) = RULES[self.round].items()
        heard = self.messages(kind)
        if rule.times is Times.ONE:
            return () if heard else (rule.speaker.value,)
        return tuple(name for name in self._speakers(rule.speaker) if name not in heard)

    def _speakers(self, role: Role) -> tuple[str, ...]:
        contract = self.contract
        return {
            Role.AUTHOR: ("author",),
            Role.ENCLAVE: ("enclave",),
            Role.PARTY: contract.parties,
            Role.APPROVER: contract.approvals.approvers,
            Role.RECIPIENT: tuple(dict.fromkeys((*contract.recipients, *contract.receipt_recipients))),
        }[role]

    def _speaker(self, kind: type[Record], key: bytes) -> str:
        """The speaker's name: from the verified key, never from a field."""
        rule = next((rules[kind] for rules in RULES.values() if kind in rules), None)
        enclave = self.binding is not None and key == self.binding.signing_key
        name = self.contract.names.get(key)
        if kind is Contract or (kind is Abort and key == self.contract.author):
            if key == self.contract.author:
                return "author"
        elif kind is Abort:
            if enclave or name is not None:
                return "enclave" if enclave else str(name)
        elif rule is not None and rule.speaker is Role.ENCLAVE:
            if enclave or (self.binding is None and name is None):
                return "enclave"  # its key is its own until a document vouches for it
        elif rule is not None and name is not None and name in self._speakers(rule.speaker):
            return name
        raise OrderError(f"{kind.__name__} from a key that may not say it", got=f"key {key.hex()[:16]}…", peer=name)

    def _catch_up(self, attestation: Attestation) -> Self:
        """An attestation carries the consents, and nothing else; hear those that are new."""
        if any(open_signed(envelope).kind != "consent" for envelope in attestation.roster):
            raise OrderError("roster", expected="consents")
        return self.hear_all(attestation.roster)

    def _check_round(self, kind: type[Record], signed: Signed) -> None:
        allowed = self.round is not Round.CLOSE if kind is Abort else kind in RULES[self.round]
        if not allowed:
            raise OrderError(f"{signed.kind} in round {self.round.name.lower()}")

    def _check_names(self, message: Record, signed: Signed, name: str) -> Self:
        """Every message names the session or the enclave that it is for."""
        if isinstance(message, Consent | Attestation | Abort):
            _same("contract", self.contract.digest, message.contract)
            _same("epoch", self.epoch, message.epoch)
        if isinstance(message, Attestation):
            return self._bind(message, signed)
        if isinstance(message, Seal | Computed | Decision | Release | Acknowledgement):
            assert self.binding is not None
            named = message.receipt.binding if isinstance(message, Release) else message.binding
            _same("binding", self.binding.digest, named)
        if isinstance(message, Abort) and message.blamed is not None and name != Role.ENCLAVE.value:
            raise OrderError("blame", expected="the enclave's word: nobody else's proves anything")
        if isinstance(message, Seal):
            self._check_seal(message, name)
        if isinstance(message, Decision):
            self._check_decision(message)
        if isinstance(message, Release):
            self._check_release(message)
        if isinstance(message, Acknowledgement):
            _same("receipt", self.content(Release)[Role.ENCLAVE.value].receipt.digest, message.receipt)
        return self

    def binding_of(self, sealing_key: bytes, signing_key: bytes) -> Binding:
        """The binding of an enclave with these keys to this contract, epoch and set of consents."""
        roster = roster_digest(tuple(self.messages(Consent).values()))
        return Binding(self.contract.digest, self.epoch, roster, sealing_key, signing_key)

    def _bind(self, attestation: Attestation, signed: Signed) -> Self:
        binding = self.binding_of(attestation.sealing_key, signed.signer)
        _same("roster", binding.roster, roster_digest(attestation.roster))
        return replace(self, binding=binding)

    def _check_seal(self, seal: Seal, name: str) -> None:
        tables = self.contract.tables_of(name)
        _same("sealed tables", tables, tuple(key.stream for key in seal.streams))
        for key in seal.streams:
            most = chunk_count(self.contract.tables[key.stream].bytes_max)
            if not 1 <= key.chunks <= most:
                raise OrderError("chunks of a table", expected=f"1 to {most}", got=key.chunks)

    def _check_decision(self, decision: Decision) -> None:
        _same("summary", self.content(Computed)[Role.ENCLAVE.value].summary, decision.summary)

    def _check_release(self, release: Release) -> None:
        said = [open_signed(envelope).digest for envelope in release.receipt.history]
        _same("history in the receipt", [heard.signed.digest for heard in self._history()], said)
        streams = [(result.recipient, result.key.stream) for result in release.receipt.results]
        _same("results in the receipt", list(result_streams(self.contract).items()), streams)

    def _advance(self, kind: type[Record]) -> Self:
        """To the next round when this one has all that it needs; a quorum of nobody is complete at once."""
        rule = RULES[self.round].get(kind)
        if rule is None:
            return self
        heard = len(self.messages(kind))
        needed = {Times.ONE: 1, Times.EACH: len(self._speakers(rule.speaker))}
        if heard < needed.get(rule.times, self.contract.approvals.quorum):
            return self
        if rule.then is Round.APPROVE and self.contract.approvals.quorum == 0:
            return replace(self, round=RULES[Round.APPROVE][Decision].then)
        return replace(self, round=rule.then)


def _kind(signed: Signed) -> type[Record]:
    if signed.kind not in KINDS:
        raise EncodingError("kind of message", expected=", ".join(KINDS), got=ascii(signed.kind)[:32])
    return KINDS[signed.kind]


def _same(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise OrderError(f"{what} differs", expected=_brief(expected), got=_brief(got))


def _brief(value: object) -> object:
    return value.hex()[:16] if isinstance(value, bytes) else value if isinstance(value, int) else None
