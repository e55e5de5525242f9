"""The contract: who, which data, which program, which rules, who gets what, which enclave, until when.

One document with one digest. Its author signs it, every party consents to its digest, and the enclave's
attestation names it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from mpc.protocol.encoding import Bytes32, Digest, Limit, Millis, Name, Record, Text, digest
from mpc.protocol.errors import ContractError

CONTRACT_BYTES_MAX = 3 << 20  # of 1,000 parties it is 2 MiB: their sealing keys
EPSILON_MAX, DELTA_MAX = 20.0, 1e-3  # beyond these nobody should call it noise
SEALING_KEY_BYTES = 1216  # ML-KEM-768 (1184) ‖ X25519 (32)

VerifyingKey = Bytes32  # Ed25519, raw
SealingKey = Annotated[bytes, Limit(SEALING_KEY_BYTES, SEALING_KEY_BYTES)]
Type = Literal["bool", "int64", "double", "string", "date", "timestamp"]
Use = Literal[
    "join",
    "group",
    "filter",
    "count",
    "count_distinct",
    "sum",
    "avg",
    "variance",
    "quantile",
    "correlation",
    "regression",
]
Names = Annotated[tuple[Name, ...], Limit(0, 1000)]


@dataclass(frozen=True)
class Column(Record):
    """A column and the only ways in which its owner lets a query use it."""

    name: Name
    type: Type
    use: Annotated[tuple[Use, ...], Limit(0, 11)] = ()
    buckets: Annotated[tuple[float, ...], Limit(0, 64)] = ()  # ascending edges; grouped and filtered only by bucket()
    clamp: Annotated[tuple[float, ...], Limit(0, 2)] = ()  # (low, high) of a value before it is added to others

    def validate(self) -> None:
        if list(self.buckets) != sorted(set(self.buckets)) or len(self.buckets) == 1:
            raise ContractError(f"column {self.name}: buckets", expected="two or more ascending edges")
        if self.clamp and (len(self.clamp) != 2 or self.clamp[0] >= self.clamp[1]):
            raise ContractError(f"column {self.name}: clamp", expected="[low, high] with low < high")
        numeric = {"sum", "avg", "variance", "quantile", "correlation"} & set(self.use)
        if self.type not in ("int64", "double") and (self.buckets or self.clamp or numeric):
            what = ", ".join(["buckets", "clamp", *sorted(numeric)])
            raise ContractError(f"column {self.name}: {what}", expected="a number", got=self.type)


@dataclass(frozen=True)
class Rule(Record):
    """What may leave of one table, as its owner decided."""

    kind: Literal["aggregate", "exact", "noise"]
    entity: Annotated[tuple[Name, ...], Limit(0, 8)] = ()  # columns that name one entity; none: each row is one
    k: Annotated[int, Limit(0, 1_000_000)] = 0  # aggregate: distinct entities of this owner behind every group
    # noise: the result is (epsilon, delta) differentially private for one entity, of which `rows` rows count.
    epsilon: float = 0.0
    delta: float = 0.0
    rows: Annotated[int, Limit(0, 1_000_000)] = 0

    def validate(self) -> None:
        if (self.kind == "aggregate") != (self.k > 0):
            raise ContractError("rule: k", expected="at least 1 for an aggregate rule, and 0 for another one")
        if self.kind != "noise":
            if self.epsilon or self.delta or self.rows:
                raise ContractError("rule: epsilon, delta and rows", expected="0, unless its kind is noise")
        elif not 1e-6 <= self.epsilon <= EPSILON_MAX or not 0 <= self.delta <= DELTA_MAX or not self.rows:
            expected = f"epsilon above 0, at most {EPSILON_MAX:g}; delta at most {DELTA_MAX:g}; at least 1 row"
            raise ContractError("rule: noise", expected=expected)
        elif not self.entity and self.rows > 1:
            raise ContractError("rule: rows", expected="1, where no column names the entity and each row is one")


@dataclass(frozen=True)
class Table(Record):
    """One owner's table. Tables of one name (several owners) have one shape and are stacked."""

    name: Name
    owner: Name
    rule: Rule
    columns: Annotated[tuple[Column, ...], Limit(1, 256)]
    bytes_max: Annotated[int, Limit(1, 1 << 40)]  # of its Arrow form

    def validate(self) -> None:
        names = [column.name for column in self.columns]
        if len(set(map(str.lower, names))) != len(names):
            raise ContractError(f"table {self.name}: a column is named twice")
        if missing := set(self.rule.entity) - set(names):
            raise ContractError(f"table {self.name}: entity column not in the table", got=sorted(missing))

    def column(self, name: str) -> Column | None:
        """The column of that name, letter case ignored as in SQL, or None."""
        return next((column for column in self.columns if column.name.lower() == name.lower()), None)


@dataclass(frozen=True)
class Participant(Record):
    """Somebody with keys: a party, a recipient, an approver, or several of these."""

    name: Name
    key: VerifyingKey
    sealing_key: SealingKey


@dataclass(frozen=True)
class Program(Record):
    """What is computed; which of the two says it is the kind's own matter (enclave_runtime.programs)."""

    kind: Name
    text: Text = ""  # sql: the query
    parameters: Annotated[bytes, Limit(0, 2 << 20)] = b""  # the encoding of the kind's own record

    @property
    def digest(self) -> bytes:
        """What an owner agrees to when its rule is exact."""
        return digest("enclave-mpc/1 program", self.encode())


@dataclass(frozen=True)
class Approvals(Record):
    """`quorum` of `approvers` release; 0 releases at once."""

    quorum: Annotated[int, Limit(0, 1000)] = 0
    approvers: Names = ()

    def validate(self) -> None:
        if self.quorum > len(set(self.approvers)) or len(set(self.approvers)) != len(self.approvers):
            raise ContractError("approvals", expected="a quorum of distinct approvers")


@dataclass(frozen=True)
class Measurement(Record):
    """One accepted enclave image: its PCR0, PCR1 and PCR2."""

    label: Text
    pcr0: Digest
    pcr1: Digest
    pcr2: Digest

    def validate(self) -> None:
        if bytes(48) in (self.pcr0, self.pcr1, self.pcr2):
            raise ContractError("measurement", expected="PCRs that are not zero (zero is debug mode)")


@dataclass(frozen=True)
class Enclave(Record):
    """Which enclave may hold the inputs."""

    image: Name  # variant
    measurements: Annotated[tuple[Measurement, ...], Limit(1, 64)]
    root: Bytes32  # SHA-256 of the root certificate (DER)
    simulated: bool  # the root is nobody's but that machine's
    cpus: Annotated[int, Limit(1, 256)]
    memory_bytes: Annotated[int, Limit(64 << 20, 1 << 42)]


@dataclass(frozen=True)
class Deadlines(Record):
    """Absolute times; nothing of that round is accepted, computed or released afterwards."""

    consent_ms: Millis
    seal_ms: Millis
    release_ms: Millis

    def validate(self) -> None:
        if not self.consent_ms < self.seal_ms < self.release_ms:
            raise ContractError("deadlines", expected="consent before seal before release")


@dataclass(frozen=True)
class Contract(Record):
    version: Literal[1]
    random: Bytes32  # two contracts of the same text are two sessions
    name: Name
    title: Text
    author: VerifyingKey
    participants: Annotated[tuple[Participant, ...], Limit(1, 1000)]
    tables: Annotated[tuple[Table, ...], Limit(1, 1000)]
    program: Program
    recipients: Names  # of the result
    receipt_recipients: Names
    approvals: Approvals
    enclave: Enclave
    deadlines: Deadlines
    epochs_max: Annotated[int, Limit(1, 100)]

    def validate(self) -> None:
        names = ["author", "enclave", *(participant.name for participant in self.participants)]  # two speak besides
        keys = [participant.key for participant in self.participants]
        if len(set(names)) != len(names) or len(set(keys)) != len(keys):
            raise ContractError("participants", expected="each name and each key once, none called author or enclave")
        owned = [(table.owner, table.name) for table in self.tables]
        if len(set(owned)) != len(owned):
            raise ContractError("tables", expected="each table of an owner once")
        used = {*self.parties, *self.recipients, *self.receipt_recipients, *self.approvals.approvers}
        if unknown := used - set(names):
            raise ContractError("names without a participant", got=sorted(unknown))
        if not self.recipients or len(set(self.recipients)) != len(self.recipients):
            raise ContractError("recipients", expected="at least one, each once")
        for table in self.tables:
            first = next(other for other in self.tables if other.name == table.name)
            if [(c.name, c.type) for c in table.columns] != [(c.name, c.type) for c in first.columns]:
                raise ContractError(
                    f"table {table.name} of {table.owner}", expected=f"the columns that {first.owner} has"
                )

    @cached_property
    def digest(self) -> bytes:
        """Names the session."""
        return digest("enclave-mpc/1 contract digest", self.encode())

    @cached_property
    def parties(self) -> tuple[str, ...]:
        """Owners of tables, in the order of the tables: those whose consent and input are needed."""
        return tuple(dict.fromkeys(table.owner for table in self.tables))

    @cached_property
    def names(self) -> dict[bytes, str]:
        """Verified key → the participant's name."""
        return {participant.key: participant.name for participant in self.participants}

    def participant(self, name: str) -> Participant:
        return next(participant for participant in self.participants if participant.name == name)

    def tables_of(self, owner: str) -> tuple[int, ...]:
        """Indices into `tables`."""
        return tuple(index for index, table in enumerate(self.tables) if table.owner == owner)
