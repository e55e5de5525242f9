"""A party's own policy: what it agrees to, written by itself. A contract may ask for less, never for more."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mpc import attestation
from mpc.protocol.contract import Contract, Measurement, Participant
from mpc.protocol.encoding import Record
from mpc.protocol.errors import AppraisalError, ContractError, LocalError, PolicyError, SealError
from mpc.protocol.sealing import SECRET_BYTES, Cryptography
from mpc.scenario import Approvals, Recipients, Scenario, contract_table
from mpc.scenario import Table as OwnTable
from mpc.settings import Duration, Named, Settings, about, quantity, read, write
from parties.ledger import exact
from parties.party import Debit

_EPOCH = datetime.fromtimestamp(0, UTC)
CLOCK_SLACK_MS = 60_000  # between this clock and the author's

Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}$", title="64 hex digits")]
Hex48 = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{96}$", title="96 hex digits")]

Moment = Annotated[datetime, Meta(tz=True)]


class Image(Settings, frozen=True, kw_only=True):
    """An accepted enclave image; several blocks accept any of them."""

    label: Annotated[str, about("What it is.", "sql, 0.1.0")]
    pcr0: Annotated[Hex48, about("The whole image.")] = msgspec.field(name="PCR0")
    pcr1: Annotated[Hex48, about("Kernel and bootstrap.")] = msgspec.field(name="PCR1")
    pcr2: Annotated[Hex48, about("The application.")] = msgspec.field(name="PCR2")
    pcr8: Annotated[Hex48 | None, about("The signer's certificate; only in addition.")] = msgspec.field(
        name="PCR8", default=None
    )
    expires: Annotated[Moment | None, about("Accepted before that time; none: for ever.")] = None

    def __post_init__(self) -> None:
        _ = self.accepted  # refuses PCRs of zero

    @property
    def accepted(self) -> attestation.Measurement:
        pcrs = {index: bytes.fromhex(pcr) for index, pcr in enumerate((self.pcr0, self.pcr1, self.pcr2))}
        pcrs |= {8: bytes.fromhex(self.pcr8)} if self.pcr8 else {}
        expires_ms = None if self.expires is None else (self.expires - _EPOCH) // timedelta(milliseconds=1)
        return attestation.Measurement(self.label, pcrs, expires_ms)


class Root(Settings, frozen=True, kw_only=True):
    """An accepted attestation root."""

    fingerprint: Annotated[str, about("SHA-256 of the certificate in hex, or a known name.", "aws-nitro-enclaves-g1")]
    simulated: Annotated[bool, about("A machine's own root, which proves nothing to others.", False)] = False
    scenario: Annotated[str, about("Of a simulated root: the one contract, by name, that may use it.", "flights")] = ""

    def __post_init__(self) -> None:
        attestation.root_fingerprint(self.fingerprint)
        if self.simulated != bool(self.scenario):
            raise LocalError(
                "scenario", expected="the contract's name for a simulated root, and nothing for a real one"
            )


class Known(Settings, frozen=True, kw_only=True):
    """Somebody that may take part, this party too; keys as they came over another channel than the contract."""

    key: Annotated[Hex32, about("Ed25519 key.")]
    sealing_key: Annotated[Hex48, about("SHA-384 of the key that results are sealed to.")]


class Programs(Settings, frozen=True, kw_only=True):
    """What may be computed."""

    kinds: Annotated[tuple[str, ...], about("Families of joint programs.", ("sql",))]
    exact: Annotated[tuple[str, ...], about("Texts that an exact rule accepts, word for word.", ("SELECT …",))] = ()
    digests: Annotated[
        tuple[Hex48, ...], about("The same for programs with parameters, by digest; `mpc check` prints it.")
    ] = ()


class Limits(Settings, frozen=True, kw_only=True):
    """How often, and for how long."""

    epochs: Annotated[int, about("Enclaves that may be started, one after another died.", 3, ge=1, le=100)] = 3
    release: Annotated[Duration, about("From the proposal to the last release.", "30 min")] = Duration(1_800_000)


class Budget(Settings, frozen=True, kw_only=True):
    """What all contracts together may spend of a table with a rule of noise, for ever; the ledger counts."""

    epsilon: Annotated[float, about("Sum of all epsilons.", 3.0, gt=0)]
    delta: Annotated[float, about("Sum of all deltas.", 1e-6, ge=0)] = 0.0


class Policy(Settings, frozen=True, kw_only=True):
    """A whole policy.toml."""

    party: Annotated[Named, about("This party's name in contracts.", "airlines")]
    measurement: tuple[Image, ...]
    root: tuple[Root, ...]
    participant: dict[Named, Known]
    table: dict[Named, OwnTable] = msgspec.field(default_factory=dict)
    budget: dict[Named, Budget] = msgspec.field(default_factory=dict)  # by the table's name
    program: Programs
    recipients: Recipients
    approvals: Approvals = Approvals()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.measurement or not self.root:
            raise LocalError(
                "measurement, root", expected="at least one of each: an empty policy would accept anything"
            )
        if self.party not in self.participant:
            raise LocalError(f"participant.{self.party}", expected="this party's own keys among the participants")
        for name, table in self.table.items():
            contract_table(self.party, name, table)


def load(path: Path) -> Policy:
    """Raises LocalError naming the file and the place. Relative sources are beside the file."""
    policy = read(path, Policy)
    tables = {
        name: msgspec.structs.replace(table, source=str(path.parent.absolute() / table.source))
        if table.source and not table.source.startswith("package:")
        else table
        for name, table in policy.table.items()
    }
    return msgspec.structs.replace(policy, table=tables)


def dump(policy: Policy) -> str:
    """As TOML that `load` reads as the same policy."""
    return write(policy)


def from_scenario(
    scenario: Scenario,
    party: str,
    *,
    participants: Sequence[Participant],
    measurements: Sequence[Measurement],
    root: bytes,
    simulated: bool,
) -> Policy:
    """The policy of a party that agrees to this scenario, as its file says it.

    Args:   measurements: what the party computed itself. root: SHA-256 of the root certificate.
    """
    image = (Image(label=m.label, pcr0=m.pcr0.hex(), pcr1=m.pcr1.hex(), pcr2=m.pcr2.hex()) for m in measurements)
    name = scenario.scenario.name if simulated else ""
    program = scenario.program.terms
    by_text = {"exact": (program.text,)} if not program.parameters else {"digests": (program.digest.hex(),)}
    return Policy(
        party=party,
        measurement=tuple(image),
        root=(Root(fingerprint=root.hex(), simulated=simulated, scenario=name),),
        participant={one.name: known(one) for one in participants},
        table=scenario.party[party].table,
        budget={
            name: Budget(epsilon=table.rule.epsilon * scenario.epochs, delta=table.rule.delta * scenario.epochs)
            for name, table in scenario.party[party].table.items()
            if table.rule and table.rule.kind == "noise"
        },
        program=Programs(kinds=(program.kind,), **by_text),
        recipients=Recipients(result=scenario.recipients.result, receipt=scenario.receipt_recipients),
        approvals=scenario.approvals,
        limits=Limits(epochs=scenario.epochs, release=scenario.deadlines.release),
    )


def known(participant: Participant) -> Known:
    """How a policy names that participant's keys."""
    return Known(key=participant.key.hex(), sealing_key=hashlib.sha384(participant.sealing_key).hexdigest())


def accepts(policy: Policy, contract: Contract, party: str, now_ms: int) -> None:
    """Check a contract before consent. `now_ms`: Unix time.

    Raises: PolicyError: the place in the contract, what the policy expects and what stands there.
    """
    _same("party", policy.party, party)
    _check_participants(policy, contract)
    _check_tables(policy, contract)
    _check_program(policy, contract)
    _subset("recipients", contract.recipients, policy.recipients.result)
    receipts = policy.recipients.receipt
    _subset("receipt_recipients", contract.receipt_recipients, policy.participant if receipts is None else receipts)
    _subset("approvals.approvers", contract.approvals.approvers, policy.approvals.approvers)
    if contract.approvals.quorum < policy.approvals.quorum:
        raise _refused("approvals.quorum", f"at least {policy.approvals.quorum}", contract.approvals.quorum)
    _check_enclave(policy, contract, now_ms)
    if contract.epochs_max > policy.limits.epochs:
        raise _refused("epochs_max", f"at most {policy.limits.epochs}", contract.epochs_max)
    if contract.deadlines.release_ms <= now_ms:
        raise _refused("deadlines.release_ms", "a time to come", "one that has passed")
    if contract.deadlines.release_ms > now_ms + policy.limits.release + CLOCK_SLACK_MS:
        left = quantity(Duration(max(1000, (contract.deadlines.release_ms - now_ms) // 1000 * 1000)))
        raise _refused(
            "deadlines.release_ms", f"at most {quantity(policy.limits.release)} from now", f"{left} from now"
        )


def affords(policy: Policy, spends: Iterable[Debit], spent: Callable[[str], tuple[Decimal, Decimal]]) -> None:
    """Check what would be spent against what is left. `spent`: of a table, epsilon and delta; see Ledger.spent.

    Raises: PolicyError: which table's budget, how much of it is left, and how much is asked for.
    """
    for debit in spends:
        budget = policy.budget.get(debit.dataset)
        if budget is None:
            expected = f"[budget.{debit.dataset}] in policy.toml, for all contracts together"
            raise PolicyError(f"budget of {debit.dataset}: there is none", expected=expected)
        limits = exact([budget.epsilon]), exact([budget.delta])
        for word, limit, gone, asked in zip(
            ("epsilon", "delta"), limits, spent(debit.dataset), (debit.epsilon, debit.delta), strict=True
        ):
            if gone + exact([asked]) > limit:
                left = max(limit - gone, Decimal(0))
                raise PolicyError(f"budget of {debit.dataset}: {word}", expected=f"at most {left} left", got=asked)


def appraise(
    policy: Policy,
    document: bytes,
    *,
    nonce: bytes,
    user_data: bytes,
    public_key: bytes,
    contract: Contract,
    at: int | None,
) -> None:
    """Appraise an attestation document for a contract that was accepted: by this policy and the contract at once.

    Args:   at: Unix time in ms of the appraisal; None: the document's own time, its freshness being the nonce's.
    Raises: AppraisalError with the number of the failed step.
    """
    try:
        both = _appraisal(policy, contract)
    except PolicyError as error:
        raise AppraisalError(error.what, expected=error.expected, got=error.got) from None
    pcrs = attestation.contract_pcr(contract.digest)
    attestation.verify(document, both, nonce=nonce, user_data=user_data, public_key=public_key, pcrs=pcrs, at=at)


def _appraisal(policy: Policy, contract: Contract) -> attestation.AppraisalPolicy:
    """Only what both accept, and of roots only those that fit the contract's name."""
    roots = [
        attestation.root_fingerprint(root.fingerprint)
        for root in policy.root
        if root.simulated == contract.enclave.simulated and root.scenario in ("", contract.name)
    ]
    if contract.enclave.root not in roots:
        words = "a SIMULATED root" if contract.enclave.simulated else "a root"
        mine = [f"{r.fingerprint}{f' (simulated, for {r.scenario})' if r.simulated else ''}" for r in policy.root]
        raise _refused("enclave.root", " | ".join(mine), f"{words}, {contract.enclave.root.hex()}, of {contract.name}")
    accepted = attestation.AppraisalPolicy(tuple(image.accepted for image in policy.measurement), frozenset(roots))
    theirs = (
        attestation.Measurement(one.label, {0: one.pcr0, 1: one.pcr1, 2: one.pcr2})
        for one in contract.enclave.measurements
    )
    return accepted.narrow(theirs, [contract.enclave.root])


def _check_participants(policy: Policy, contract: Contract) -> None:
    """Everybody with a part is known here under exactly these keys, this party included."""
    if policy.table and policy.party not in contract.parties:
        raise _refused("tables", f"a table of {policy.party}", "none")
    for one in contract.participants:
        mine = policy.participant.get(one.name)
        if mine is None:
            raise _refused("participants", " | ".join(policy.participant), one.name)
        _same(f"participants.{one.name}.key", mine.key.lower(), one.key.hex())
        _same(f"participants.{one.name}.sealing_key (SHA-384)", mine.sealing_key.lower(), known(one).sealing_key)
        if one.name in contract.recipients:
            _check_sealing_key(one)


def _check_sealing_key(recipient: Participant) -> None:
    """The enclave would find out only after it has computed."""
    try:
        Cryptography().wrap(bytes(SECRET_BYTES), recipient.sealing_key, b"")
    except SealError as error:
        raise _refused(f"participants.{recipient.name}.sealing_key", error.expected, "another value") from None


def _check_tables(policy: Policy, contract: Contract) -> None:
    for table in (contract.tables[index] for index in contract.tables_of(policy.party)):
        if table.name not in policy.table:
            raise _refused("tables", " | ".join(policy.table) or "none", table.name)
        mine = contract_table(policy.party, table.name, policy.table[table.name])
        _same_record(f"tables.{table.name}", mine, table)


def _check_program(policy: Policy, contract: Contract) -> None:
    from enclave_runtime import programs

    if contract.program.kind not in policy.program.kinds:
        raise _refused("program.kind", " | ".join(policy.program.kinds), contract.program.kind)
    rules = (contract.tables[index].rule for index in contract.tables_of(policy.party))
    by_text = not contract.program.parameters and contract.program.text in policy.program.exact
    by_digest = contract.program.digest.hex() in map(str.lower, policy.program.digests)
    if any(rule.kind == "exact" for rule in rules) and not by_text and not by_digest:
        raise _refused("program.text", "a text that the policy lists word for word, or its digest", "another one")
    try:
        programs.program(contract.program.kind).check(contract)
    except ContractError as error:
        raise PolicyError(f"contract: program: {error.what}", expected=error.expected, got=error.got) from None


def _check_enclave(policy: Policy, contract: Contract, now_ms: int) -> None:
    """Each measurement of the contract is accepted here: a contract narrows a policy and never widens it."""
    mine = [image.accepted for image in policy.measurement]
    for one in contract.enclave.measurements:
        theirs = {0: one.pcr0, 1: one.pcr1, 2: one.pcr2}
        same = [
            own for own in mine if own.and_also(attestation.Measurement(one.label or "unnamed", theirs)) is not None
        ]
        path = f"enclave.measurements.{one.label}"
        if not same:
            raise _refused(path, " | ".join(f"{own.label}: {_shown(own.pcrs)}" for own in mine), _shown(theirs))
        if all(own.expires_ms is not None and own.expires_ms <= now_ms for own in same):
            raise _refused(path, "a measurement that has not expired", same[0].label)
    _appraisal(policy, contract)


def _shown(pcrs: Mapping[int, bytes]) -> str:
    return ", ".join(f"PCR{index} {value.hex()[:16]}…" for index, value in sorted(pcrs.items()))


def _refused(path: str, expected: object, got: object) -> PolicyError:
    return PolicyError(f"contract: {path}", expected=expected, got=got)


def _same(path: str, mine: object, theirs: object) -> None:
    if mine != theirs:
        raise _refused(path, mine, theirs)


def _subset(path: str, theirs: Iterable[str], mine: Iterable[str]) -> None:
    if more := sorted(set(theirs) - set(mine)):
        raise _refused(path, f"only {' | '.join(mine) or 'nobody'}", " | ".join(more))


def _same_record(path: str, mine: Record, theirs: Record) -> None:
    """Field by field, so that the error names the first that differs."""
    for field in fields(mine):  # type: ignore[arg-type]  # every Record is a dataclass
        own, other, place = getattr(mine, field.name), getattr(theirs, field.name), f"{path}.{field.name}"
        if isinstance(own, Record):
            _same_record(place, own, other)
        elif own != other and field.name == "columns":
            _same_columns(place, own, other)
        else:
            _same(place, own, other)


def _same_columns(path: str, mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    _same(path, [column.name for column in mine], [column.name for column in theirs])
    for own, other in zip(mine, theirs, strict=True):
        _same_record(f"{path}.{own.name}", own, other)
