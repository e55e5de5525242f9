"""Rows of stacked tables in the engine, and which groups of them may show.

Rows in which a measured column has no value do not count at all: all that a contract tells then rests on the same
rows, and no two of its numbers differ by a few rows.

All SQL is generated: identifiers are names of the contract (letters, digits, _ and -).
"""

from collections.abc import Callable, Iterable, Sequence
from math import ceil

import pyarrow as pa

from enclave_runtime.programs.common import FINE_BITS, Stack, moved, whole
from enclave_runtime.programs.duck import connect, register
from mpc.protocol.contract import Column

SOURCE = "source number"  # with a space: no column of a contract is called so


class Rows:
    """Table `counted`: `source` (index of the contract's table), `entity` (a hash), `id` (of the group, see `groups`);
    and of the i-th measured column the forms that are asked for: `w{i}` (whole, see common.exponent), `f{i}` (whole in
    finer steps), `x{i}` (moved into its clamp), `b{i}` (position of its bucket).

    Table `groups`: `id`, in the order of the values, and the values `g{i}` (of a column with buckets its position).
    """

    def __init__(
        self,
        stack: Stack,
        tables: Sequence[pa.Table],
        measured: Sequence[tuple[Column, Iterable[str]]],  # with its forms
        grouped: Sequence[Column] = (),
        kept: bool = False,
    ) -> None:
        """`kept`: there will be many passes over the rows, so that a copy in the engine's form pays."""
        self.stack = stack
        self.connection = connect(stack.contract, stack.contract.enclave.cpus)
        self.execute = self.connection.execute
        # Distinct hashes are never more than distinct entities.
        self.count = "count(DISTINCT entity)" if stack.entity else "count(*)"
        names = list(
            dict.fromkeys([column.name for column in (*(c for c, _ in measured), *grouped)] + list(stack.entity))
        )
        parts = []
        for source in stack.sources:
            owner = pa.repeat(pa.scalar(source, pa.int32()), tables[source].num_rows)
            parts.append(tables[source].append_column(SOURCE, owner).select([*names, SOURCE]))
        register(self.connection, "given", pa.concat_tables(parts))
        self.execute("CREATE TEMP TABLE owners (source INT, k BIGINT)")
        for source, table in zip(stack.sources, stack.tables, strict=True):
            if table.rule.k:
                self.execute("INSERT INTO owners VALUES (?, ?)", [source, table.rule.k])
        self._build(measured, grouped, kept)

    def _build(self, measured: Sequence[tuple[Column, Iterable[str]]], grouped: Sequence[Column], kept: bool) -> None:
        hashed = ", ".join(f'"{name}"' for name in self.stack.entity)
        values = [f'"{SOURCE}" AS source', f"hash({hashed}) AS entity" if hashed else "0 AS entity"]
        for i, (column, forms) in enumerate(measured):
            values += [f"{_FORMS[form](column)} AS {form}{i}" for form in sorted(set(forms))]
        keys = [f"{_bucket(c) if c.buckets else _key(c)} AS g{i}" for i, c in enumerate(grouped)]
        known = " AND ".join(["true", *(f'"{column.name}" IS NOT NULL' for column, _ in measured)])
        rows = f"SELECT {', '.join([*values, *keys])} FROM given WHERE {known}"
        names = [f"g{i}" for i in range(len(grouped))]
        if not names:
            self.execute("CREATE TEMP TABLE groups AS SELECT 1 AS id")
            kind = "TABLE" if kept else "VIEW"
            self.execute(f"CREATE TEMP {kind} counted AS SELECT *, 1 AS id FROM ({rows})")
            return
        listed = ", ".join(names)
        same = " AND ".join(f"rows.{name} IS NOT DISTINCT FROM groups.{name}" for name in names)
        self.execute(f"CREATE TEMP VIEW keyed AS {rows}")
        self.execute(
            f"CREATE TEMP TABLE groups AS SELECT row_number() OVER (ORDER BY {listed}) AS id, * "
            f"FROM (SELECT DISTINCT {listed} FROM keyed)"
        )
        self.execute(
            f"CREATE TEMP TABLE counted AS SELECT rows.* EXCLUDE ({listed}), id "
            f"FROM keyed AS rows JOIN groups ON {same}"
        )

    def hide(self, whole: str, part: str) -> None:
        """Make table `hidden` (w, p): of each `whole` the parts that do not show (SQL of integers, from `counted`).

        A part rests on no entity or at least k of each limited owner; and so do, together, the parts of a whole that
        do not show: as long as they do not, the smallest other one goes too.
        """
        self.execute(
            f"CREATE OR REPLACE TEMP VIEW parts AS SELECT {whole} AS w, {part} AS p, source, entity FROM counted"
        )
        entities = self.count
        if self.stack.entity:  # 64 bits, with at most as many ones as entities: where there are k, no need to count
            entities = "bit_count(bit_or(1::UBIGINT << (entity & 63)))"
        self.execute(f"""
            CREATE OR REPLACE TEMP TABLE support AS
            SELECT w, p, source, k, {entities} AS entities FROM parts JOIN owners USING (source) GROUP BY ALL
        """)
        if self.stack.entity:
            self.execute(f"""
                CREATE OR REPLACE TEMP TABLE support AS FROM support WHERE entities >= k UNION ALL
                SELECT w, p, source, k, {self.count} FROM parts
                JOIN (SELECT w, p, source, k FROM support WHERE entities < k) USING (w, p, source) GROUP BY ALL
            """)
        self.execute("CREATE OR REPLACE TEMP TABLE hidden AS SELECT DISTINCT w, p FROM support WHERE entities < k")
        while self._hide_more():  # every turn hides a part with k entities of that owner, who so comes up only once
            pass

    def _hide_more(self) -> bool:
        if not self.execute("FROM hidden LIMIT 1").fetchall():
            return False
        self.execute(f"""
            CREATE OR REPLACE TEMP TABLE short AS SELECT w, min(source) AS source
            FROM (SELECT w, source, {self.count} AS entities FROM parts SEMI JOIN hidden USING (w, p) GROUP BY ALL)
            JOIN owners USING (source) SEMI JOIN (FROM support ANTI JOIN hidden USING (w, p)) USING (w, source)
            WHERE entities < k GROUP BY w
        """)
        self.execute(f"""
            INSERT INTO hidden SELECT w, p FROM
            (SELECT w, p, {self.count} AS entities FROM parts ANTI JOIN hidden USING (w, p)
             SEMI JOIN short USING (w, source) GROUP BY ALL)
            QUALIFY row_number() OVER (PARTITION BY w ORDER BY entities, p) = 1
        """)
        return bool(self.execute("FROM short LIMIT 1").fetchall())


def _key(column: Column) -> str:
    """Zero has two signs, which are equal: one of them would show by chance."""
    return (
        f'CASE WHEN "{column.name}" = 0 THEN 0 ELSE "{column.name}" END'
        if column.type == "double"
        else f'"{column.name}"'
    )


def _bucket(column: Column) -> str:
    name, integer = f'"{column.name}"', column.type == "int64"
    edges = [str(ceil(edge)) if integer else f"{edge:.17e}::DOUBLE" for edge in column.buckets]
    cases = " ".join(f"WHEN {name} < {edge} THEN {i}" for i, edge in enumerate(edges))
    return f"CASE {cases} WHEN {name} IS NOT NULL THEN {len(edges)} END"


_FORMS: dict[str, Callable[[Column], str]] = {
    "w": whole,
    "f": lambda column: whole(column, FINE_BITS),
    "x": moved,
    "b": _bucket,
}
