"""A user's own scenario as a job: its people, tables, deadlines, program and rules, on generated data.

The enclave runs the product's own program; an oracle (mpc.fuzz.oracle) judges what it gives. Tables are small, and
what was computed once is remembered.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Any

import msgspec
import pyarrow as pa

from enclave_runtime import programs
from enclave_runtime.enclave import Outcome
from enclave_runtime.programs import ProgramRefused
from enclave_runtime.programs.inputs import TYPES, schema_of
from mpc import scenario as scenarios
from mpc.fuzz.jobs import AGAINST_RULE, NOT_OF_SCHEMA, PCRS, START_MS, Drawn
from mpc.fuzz.oracle import agrees, described
from mpc.fuzz.setting import Setting
from mpc.protocol import contract as terms
from mpc.protocol.contract import Column, Contract, Participant, Table
from mpc.protocol.errors import ContractError, LocalError, MpcError
from mpc.scenario import Scenario
from mpc.settings import build, parse, write

ROWS = 40  # of a table: enough for groups of a dozen entities
SMALL_DOMAIN = 6  # values of a column that is part of a key
CANARIES = 4  # windows of a table that may be seen nowhere
WINDOW_BYTES = 48


class ScenarioJob:
    """One scenario. Not compared by content: a world holds the one that it was made with."""

    def __init__(self, given: Scenario) -> None:
        """Raises LocalError when the owners' own rules forbid the program: then there is nothing to attack."""
        self.given = given
        self._computed: dict[tuple[bytes, ...], Outcome] = {}
        self._judged: dict[tuple[object, ...], bool] = {}
        people = [Participant(name, bytes([i + 1]) * 32, bytes(1216)) for i, name in enumerate(given.party)]
        contract = self._contract = self.contract(Setting(job=self), people, bytes(32), bytes(32), bytes(32))
        try:
            programs.program(contract.program.kind).check(contract)
        except MpcError as error:
            raise LocalError(f"the parties would refuse this scenario (see `mpc check`): {error}") from None

    def text(self) -> str:
        """The scenario file, without the sources of data, which no fuzzer reads."""
        return write(_bare(self.given))

    @classmethod
    def of_text(cls, text: str, source: str) -> "ScenarioJob":
        where = f"{source}: scenario"
        return cls(build(parse(text.encode(), where), Scenario, where))

    def names(self, _: Setting) -> list[str]:
        return list(self.given.party)

    def owners(self, _: Setting) -> list[str]:
        return [name for name, party in self.given.party.items() if party.table]

    def contract(
        self, _: Setting, participants: Sequence[Participant], author: bytes, root: bytes, random: bytes
    ) -> Contract:
        return scenarios.contract(
            self.given,
            participants=participants,
            author=author,
            measurements=[terms.Measurement("world", *PCRS.values())],
            root=root,
            simulated=True,
            now_ms=START_MS,
            random=random,
        )

    def table(self, contract: Contract, stream: int, random: Random, form: str, *, long: bool) -> Drawn:  # noqa: ARG002
        drawn = _Draw(contract, random).table(contract.tables[stream])
        if form == AGAINST_RULE:  # each row twice: a key of its owner is no longer one
            drawn = pa.concat_tables([drawn, drawn])
        if form == NOT_OF_SCHEMA and random.random() < 0.5:
            drawn = drawn.append_column("more", pa.array([0] * drawn.num_rows))
            form = ""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, drawn.schema) as writer:
            writer.write_table(drawn)
        data = bytes(sink.getvalue().to_pybytes())
        if form == NOT_OF_SCHEMA:
            data = random.choice((form.encode() + data, data[: len(data) // 2], data + bytes(8)))
        return Drawn(data, _canaries(data))

    def run(self, contract: Contract, tables: Sequence[bytes]) -> Outcome:
        key = (contract.digest, *tables)
        if key not in self._computed:
            try:
                opened = programs.open_tables(contract, tables)
                self._computed[key] = Outcome(programs.program(contract.program.kind).run(contract, opened))
            except ProgramRefused as refused:
                self._computed[key] = Outcome(None, refused.code, refused.table_index)
            except ContractError:
                self._computed[key] = Outcome(None, "query")
        return self._computed[key]

    def agrees(self, contract: Contract, tables: Sequence[bytes], results: Mapping[str, bytes]) -> bool:
        key = (contract.digest, *tables, *sorted(results.items()))
        if key not in self._judged:
            self._judged[key] = agrees(contract, programs.open_tables(contract, tables), results)
        return self._judged[key]

    def oracle(self) -> str:
        """How results are judged, in words."""
        return described(self._contract)


def _bare(given: Scenario) -> Scenario:
    party = {
        name: msgspec.structs.replace(
            one, table={t: msgspec.structs.replace(table, source="", like="") for t, table in one.table.items()}
        )
        for name, one in given.party.items()
    }
    return msgspec.structs.replace(given, party=party)


def _canaries(data: bytes) -> tuple[bytes, ...]:
    """Windows of the columns' own bytes that are long and mixed enough to stand nowhere else by chance."""
    windows = [data[place : place + WINDOW_BYTES] for place in range(len(data) // 3, len(data) - WINDOW_BYTES, 64)]
    mixed = [window for window in windows if len(set(window)) >= 12]
    return tuple(mixed[:: max(1, len(mixed) // CANARIES)][:CANARIES])


class _Draw:
    """Rows that fit a contract's schemas, that join with each other, and whose groups are large enough to be seen."""

    def __init__(self, contract: Contract, random: Random) -> None:
        self.random = random
        parts = [name for table in contract.tables if len(table.rule.entity) > 1 for name in table.rule.entity]
        self.small = {name.lower() for name in parts}

    def table(self, described: Table) -> pa.Table:
        rows: dict[tuple[int, ...], None] = {}
        entity = [i for i, column in enumerate(described.columns) if column.name in described.rule.entity]
        seen: set[tuple[int, ...]] = set()
        for _ in range(4 * ROWS):
            row = tuple(self._index(described, column) for column in described.columns)
            key = tuple(row[i] for i in entity)
            if len(rows) < ROWS and (not entity or key not in seen):
                seen.add(key)
                rows[row] = None
        columns = [
            pa.array([_value(column, row[i]) for row in rows], TYPES[column.type])
            for i, column in enumerate(described.columns)
        ]
        return pa.table(columns, schema=schema_of(described))

    def _index(self, described: Table, column: Column) -> int:
        """Which value of the column's domain: keys are spread, groups are few and the first of them is large."""
        if column.name.lower() in self.small:
            return self.random.randrange(SMALL_DOMAIN)
        if column.name in described.rule.entity or "join" in column.use:
            return self.random.randrange(ROWS)
        if {"group", "filter"} & set(column.use):
            return 0 if self.random.random() < 0.8 else self.random.randrange(4)
        return self.random.randrange(1000)


@lru_cache(maxsize=4096)
def _value(column: Column, index: int) -> Any:
    """The value of that number in a column's domain: the same in every table, so that keys meet."""
    if column.type == "bool":
        return index % 2 == 0
    if column.type == "string":
        return f"CANARY value {index:04d} of a column"
    if column.type in ("date", "timestamp"):
        return index if column.type == "date" else index * 3_600_000_000
    number = float(index)
    if edges := column.clamp or column.buckets:
        number = edges[0] + (edges[-1] - edges[0]) * ((index * 7) % 23) / 20  # some beyond the last
    return int(number) if column.type == "int64" else number
