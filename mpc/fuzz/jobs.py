"""What a world computes: who takes part, their data, the program, and an oracle that knows the right answer."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Protocol

from enclave_runtime.enclave import Outcome
from mpc.protocol import contract as terms
from mpc.protocol.contract import Contract, Participant
from mpc.protocol.sealing import CHUNK_BYTES

if TYPE_CHECKING:
    from mpc.fuzz.setting import Setting

START_MS = 1_800_000_000_000
CONSENT_MS, SEAL_MS, RELEASE_MS = 60_000, 120_000, 240_000  # deadlines, from the start, of the built-in job
PCRS = {index: hashlib.sha384(b"agreed image %d" % index).digest() for index in (0, 1, 2)}
OTHER_PCRS = {**PCRS, 2: hashlib.sha384(b"another application").digest()}
NOT_OF_SCHEMA, AGAINST_RULE = "not of its schema", "against a rule"  # forms of a table that a corrupt party may send


@dataclass(frozen=True)
class Drawn:
    """A party's table, and parts of it that may be seen nowhere else."""

    data: bytes
    canaries: tuple[bytes, ...]


class Job(Protocol):
    """What is computed. `run` is what the enclave does, `agrees` must find the answer in another way."""

    def names(self, setting: "Setting", /) -> list[str]:
        """Of everybody in the contract."""

    def owners(self, setting: "Setting", /) -> list[str]:
        """Of those who bring data."""

    def contract(
        self, setting: "Setting", /, participants: Sequence[Participant], author: bytes, root: bytes, random: bytes
    ) -> Contract: ...

    def table(self, contract: Contract, stream: int, random: Random, form: str, *, long: bool) -> Drawn:
        """New data for one table; `form`: nothing, or what is wrong with it."""

    def run(self, contract: Contract, tables: Sequence[bytes]) -> Outcome: ...

    def oracle(self) -> str:
        """How results are judged, in words."""

    def agrees(self, contract: Contract, tables: Sequence[bytes], results: Mapping[str, bytes]) -> bool:
        """Whether these are the results that clear text gives, or those of some of the recipients."""


class Digest:
    """The built-in one: everybody gets a digest of all tables, which is its own oracle."""

    def names(self, setting: "Setting") -> list[str]:
        counts = {"party": setting.parties, "receiver": setting.receivers, "approver": setting.approvers}
        return [f"{role}-{i}" for role, count in counts.items() for i in range(count)]

    def owners(self, setting: "Setting") -> list[str]:
        return [name for name in self.names(setting) if name.startswith("party")]

    def contract(
        self, setting: "Setting", participants: Sequence[Participant], author: bytes, root: bytes, random: bytes
    ) -> Contract:
        names = {role: tuple(n for n in self.names(setting) if n.startswith(role)) for role in ("p", "r", "a")}
        columns = (terms.Column("value", "string"),)
        owned = [(name, "rows") for name in names["p"]] + ([("party-0", "more")] if setting.wide else [])
        return Contract(
            version=1,
            random=random,
            name="world",
            title="A digest of everything",
            author=author,
            participants=tuple(participants),
            tables=tuple(
                terms.Table(table, owner, terms.Rule("exact"), columns, 4 * CHUNK_BYTES) for owner, table in owned
            ),
            program=terms.Program("digest", ""),
            recipients=(*names["p"][:2], *names["r"]),
            receipt_recipients=names["p"][2:3],
            approvals=terms.Approvals(setting.quorum, names["a"]),
            enclave=terms.Enclave(
                image="core",
                measurements=(terms.Measurement("world", *PCRS.values()),),
                root=root,
                simulated=True,
                cpus=1,
                memory_bytes=64 << 20,
            ),
            deadlines=terms.Deadlines(START_MS + CONSENT_MS, START_MS + SEAL_MS, START_MS + RELEASE_MS),
            epochs_max=setting.epochs_max,
        )

    def table(self, contract: Contract, stream: int, random: Random, form: str, *, long: bool) -> Drawn:
        owner = contract.tables[stream].owner
        line = b"CANARY %s %d %016x\n" % (owner.encode(), stream, random.getrandbits(64))
        count = 1 + 2 * CHUNK_BYTES // 33 if long else random.randint(1, 20)
        return Drawn(form.encode() + line * count, (line,))

    def run(self, contract: Contract, tables: Sequence[bytes]) -> Outcome:
        for stream, table in enumerate(tables):
            if table.startswith(NOT_OF_SCHEMA.encode()):
                return Outcome(None, bad_table=stream)
            if table.startswith(AGAINST_RULE.encode()):
                return Outcome(None)
        return Outcome(self._results(contract, tables))

    def agrees(self, contract: Contract, tables: Sequence[bytes], results: Mapping[str, bytes]) -> bool:
        right = self._results(contract, tables)
        return all(right.get(name) == result for name, result in results.items())

    def oracle(self) -> str:
        return "the same digest, made again"

    def _results(self, contract: Contract, tables: Sequence[bytes]) -> dict[str, bytes]:
        state = hashlib.sha384(b"world program")
        for table in tables:
            state.update(len(table).to_bytes(8, "big") + table)
        return {name: state.digest() + name.encode() for name in contract.recipients}
