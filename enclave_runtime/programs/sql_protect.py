"""Run a checked query so that every group shown rests on enough entities of every owner.

All SQL here is generated: identifiers are names of the contract (letters, digits, _ and -), values are parameters.

How a group is judged. A *support* is a set of one owner's rows that a group's values rest on: its rows in the
group; where an aggregated column has nulls, its rows in which that column has a value; and, where the result tells
how many these are, the rows in which it has none. Each support must hold no entity or at least `k`. What is not shown
must, for each support, hold none or at least `k` entities too, or else the smallest group goes as well.

A row of an aggregated relation is in the join at most once, for every other relation must have each key once. That is
judged on all rows of that relation alone, and sums are scaled by the contract alone: neither tells of hidden rows.

Tables: `joined`, the rows of the join; `groups`; `support`, how many entities each group has at least, by support and
owner; `doubtful` and `hidden`, the rows of the groups that may have too few, and of those that are not shown.
"""

from collections.abc import Sequence
from math import ceil, frexp

import pyarrow as pa

from enclave_runtime.programs import ProgramRefused
from enclave_runtime.programs.duck import RESULT_BYTES_MAX, column, connect, register
from enclave_runtime.programs.inputs import TYPES
from enclave_runtime.programs.sql_query import Aggregate, Group, Query, Ref, labels
from mpc.protocol.contract import Column, Contract, Table

ROW, SOURCE = "row number", "source number"  # with a space: no column of a contract is called so
SHOWN = "id NOT IN (SELECT id FROM hidden)"


def run_protected(contract: Contract, query: Query, tables: Sequence[pa.Table]) -> list[pa.Array]:
    """The result's columns, in the order of the query's outputs.

    Raises: ProgramRefused fan-out, result-size; duckdb.Error.
    """
    run = _Run(contract, query, tables)
    with run.connection:
        run.join()
        run.group()
        run.hide()
        return run.shown()


class _Run:
    def __init__(self, contract: Contract, query: Query, tables: Sequence[pa.Table]) -> None:
        self.contract, self.query, self.tables = contract, query, tables
        self.groups = {i: o.item for i, o in enumerate(query.outputs) if isinstance(o.item, Group)}
        self.aggregates = {i: o.item for i, o in enumerate(query.outputs) if isinstance(o.item, Aggregate)}
        self.refs = sorted(
            {a.ref for a in self.aggregates.values() if a.ref}, key=lambda ref: (ref.relation, ref.column)
        )
        summed = {a.ref for a in self.aggregates.values() if a.ref and a.function in ("sum", "avg")}
        self.scales = {ref: self._scale(ref) for ref in self.refs if ref in summed}
        self.aggregated = self._aggregated()
        self.supports = self._supports()
        # Where doubles are added up as such, their order shows in the last bits of the sum.
        self.connection = connect(contract, 1 if None in self.scales.values() else contract.enclave.cpus)
        self.execute = self.connection.execute

    def _aggregated(self) -> list[int]:
        """Relations of which a row counts once at most: those with aggregated columns; and the first of FROM, where
        there are none, or where count(*) also counts rows that have no partner."""
        found = {ref.relation for ref in self.refs}
        counts_rows = any(aggregate.ref is None for aggregate in self.aggregates.values())
        if not found or (counts_rows and any(join.outer for join in self.query.joins)):
            found.add(0)
        return sorted(found)

    def _supports(self) -> list[tuple[int, str]]:
        """Relation, and the SQL of the entity that a joined row adds to it, or null."""
        outer = {join.right: join.left for join in self.query.joins if join.outer}
        supports = [(relation, f"entity{relation}") for relation in range(len(self.query.relations))]
        for i, ref in enumerate(self.refs):
            own, has_nulls = ref.relation, self._has_nulls(ref)
            if has_nulls:
                supports.append((own, f"CASE WHEN value{i} IS NOT NULL THEN entity{own} END"))
            if self._tells_count(ref) and (has_nulls or own in outer):
                # Of an outer join also the rows that have no partner.
                without = {own, 0, outer[own]} if own in outer else {own}
                supports += [(at, f"CASE WHEN value{i} IS NULL THEN entity{at} END") for at in sorted(without)]
        limited = [any(self._table(source).rule.k for source in r.sources) for r in self.query.relations]
        return [(relation, entity) for relation, entity in supports if limited[relation]]

    def _tells_count(self, ref: Ref) -> bool:
        """Whether the result tells in how many rows the column has a value."""
        used = {aggregate.function for aggregate in self.aggregates.values() if aggregate.ref == ref}
        return bool(used & {"count", "count_distinct"}) or {"sum", "avg"} <= used

    def _has_nulls(self, ref: Ref) -> bool:
        return any(self.tables[source][ref.column].null_count for source in self._sources(ref.relation))

    def _scale(self, ref: Ref) -> float | None:
        """What a column of doubles is multiplied by to be added up as whole numbers below 2**62, the sum of which
        does not depend on their order; a power of two, by the clamp. None: it has no clamp. Of integers 1."""
        described = self._described(ref)
        if described.type == "int64":
            return 1.0
        if not described.clamp:
            return None
        exponent = 62 - frexp(max(abs(edge) for edge in described.clamp))[1]
        return 2.0 ** min(exponent, 1000)  # the largest double is below 2**1024

    # joined

    def join(self) -> None:
        """Raises ProgramRefused fan-out."""
        values = [f"{_column(item.ref, 'bucket' if item.edges else 'key')} AS g{i}" for i, item in self.groups.items()]
        for i, ref in enumerate(self.refs):
            values.append(f"{_column(ref, 'value')} AS value{i}")
            values += [f"{_column(ref, 'whole')} AS whole{i}"] if ref in self.scales else []
        for relation in range(len(self.query.relations)):
            values.append(f"r{relation}.entity AS entity{relation}")
            values += [f"r{relation}.source AS source{relation}"] if self._stacked(relation) else []
        rows = f"({self._relation(0)}) AS r0"
        for join in self.query.joins:
            pairs = [
                f"{_column(Ref(join.left, left), 'value')} = {_column(Ref(join.right, right), 'value')}"
                for left, right in join.keys
            ]
            kind = "LEFT JOIN" if join.outer else "JOIN"
            rows += f" {kind} ({self._relation(join.right)}) AS r{join.right} ON {' AND '.join(pairs)}"
        for relation, keys in sorted(self._unique()):
            by, different = [f'"{key}"' for key in keys], "1"
            present = " AND ".join(f"{name} IS NOT NULL" for name in by)
            if self._described(Ref(relation, keys[0])).type == "int64":  # 64 neighbours at a time
                different = f"bit_count(bit_or(1::UBIGINT << ({by[0]} & 63)))"
                by[0] += " >> 6"
            if self.execute(
                f"SELECT 1 FROM t{relation} WHERE {present} GROUP BY {', '.join(by)} "
                f"HAVING count(*) > {different} LIMIT 1"
            ).fetchall():
                raise ProgramRefused("fan-out")
        conditions, parameters = self._conditions()
        self.execute(
            f"CREATE TEMP TABLE joined AS SELECT {', '.join(values)} FROM {rows} WHERE {conditions}", parameters
        )

    def _unique(self) -> set[tuple[int, tuple[str, ...]]]:
        """Relations and their keys, no two rows of which may be equal: those of every step of the tree of joins that
        leads away from an aggregated relation. Whether any row has a partner must not matter."""
        steps = [(join.left, join.right, tuple(right for _, right in join.keys)) for join in self.query.joins]
        steps += [(join.right, join.left, tuple(left for left, _ in join.keys)) for join in self.query.joins]
        found = set()
        for start in self.aggregated:
            reached = [start]
            for here in reached:  # grows
                for left, right, keys in steps:
                    if left == here and right not in reached:
                        reached.append(right)
                        found.add((right, keys))
        return found

    def _relation(self, relation: int) -> str:
        """Rows of all owners: whose they are, a hash of the entity, their number, and the columns in all forms. The
        engine computes what is used. Distinct hashes are never more than distinct entities."""
        sources = self._sources(relation)
        rows = pa.concat_tables([self.tables[source] for source in sources])
        values = []
        if self._stacked(relation):
            owners = [pa.repeat(pa.scalar(source, pa.int32()), self.tables[source].num_rows) for source in sources]
            rows = rows.append_column(SOURCE, pa.chunked_array(owners))
            values.append(f'"{SOURCE}" AS source')
        # The same for all owners who name any.
        entity = next((table.rule.entity for table in map(self._table, sources) if table.rule.k), ()) or (ROW,)
        hashed = ", ".join(f'"{name}"' for name in entity)
        values.append(f"hash({hashed}) AS entity")
        if entity == (ROW,):
            rows = rows.append_column(ROW, pa.arange(0, rows.num_rows))
        for described in self._table(sources[0]).columns:
            forms = _forms(described, self.scales.get(Ref(relation, described.name)))
            values += [f'{sql} AS "{form} {described.name}"' for form, sql in forms.items()]
        register(self.connection, f"t{relation}", rows)
        return f"SELECT {', '.join(values)} FROM t{relation}"

    def _conditions(self) -> tuple[str, list[object]]:
        conditions, parameters = ["true"], list[object]()
        for condition in self.query.filters:
            holes = ", ".join("?" for _ in condition.values)
            right = {"IN": f"({holes})", "BETWEEN": "? AND ?"}.get(condition.operator, holes)
            value = _column(condition.item.ref, "bucket" if condition.item.edges else "value")
            conditions.append(f"{value} {condition.operator} {right}")
            parameters += condition.values
        return " AND ".join(conditions), parameters

    # groups, support

    def group(self) -> None:
        """Groups have an id in the order of their values; a group that rests on no row of an owner has no support
        of that owner."""
        values = [f"g{i}" for i in self.groups]
        for i, aggregate in self.aggregates.items():
            values.append(f"{self._aggregate(aggregate)} AS a{i}")
            if aggregate.ref and aggregate.function == "avg":
                values.append(f"count(value{self.refs.index(aggregate.ref)}) AS d{i}")
        order = ", ".join([*(f"g{i}" for i in self.groups), "1"])
        self.execute(
            f"CREATE TEMP TABLE groups AS SELECT row_number() OVER (ORDER BY {order}) AS id, * FROM "
            f"(SELECT {', '.join(values or ['1'])} FROM joined GROUP BY ALL HAVING count(*) > 0)"
        )
        owners = [f"({source}, {table.rule.k})" for source, table in enumerate(self.contract.tables) if table.rule.k]
        self.execute(f"CREATE TEMP TABLE owners AS FROM (VALUES {', '.join(owners)}) AS owners(source, k)")
        # 64 bits, with at most as many ones as there are entities: where there are k, no need to count.
        by = [f"g{i}" for i in self.groups]
        by += [f"source{relation}" for relation in range(len(self.query.relations)) if self._stacked(relation)]
        bits = [f"bit_or(1::UBIGINT << ({entity} & 63)) AS bits{i}" for i, (_, entity) in enumerate(self.supports)]
        sketches = f"(SELECT {', '.join([*by, *bits, '1'])} FROM joined GROUP BY ALL)"
        self.execute(f"CREATE TEMP TABLE sketches AS {self._rows('true', sketches)}")
        counts = [f"bit_count(bit_or(bits{i}))" for i in range(len(self.supports))]
        self.execute(f"CREATE TEMP TABLE support AS {self._counted('sketches', counts)}")

    def _aggregate(self, aggregate: Aggregate) -> str:
        if aggregate.ref is None:
            return "count(*)"
        i = self.refs.index(aggregate.ref)
        if aggregate.function in ("sum", "avg"):
            return f"sum(whole{i})"
        return f"count({'DISTINCT ' if aggregate.function == 'count_distinct' else ''}value{i})"

    def _rows(self, condition: str, rows: str = "joined") -> str:
        """Rows of the groups for which a condition holds, with the group's id."""
        same = " AND ".join(["true", *(f"rows.g{i} IS NOT DISTINCT FROM groups.g{i}" for i in self.groups)])
        return f"SELECT id, rows.* FROM {rows} AS rows JOIN (FROM groups WHERE {condition}) AS groups ON {same}"

    def _counted(self, rows: str, counts: Sequence[str] = (), group: str = "id") -> str:
        """How many entities there are in `rows`, by support, owner and group; and how many that owner wants."""
        counts = counts or [f"count(DISTINCT {entity})" for _, entity in self.supports]
        each = ["SELECT 0 AS support, 0 AS source, 0 AS id, 0 AS entities WHERE false"]
        for i, (relation, _) in enumerate(self.supports):
            source = f"source{relation}" if self._stacked(relation) else f"{self._sources(relation)[0]}"
            each.append(f"SELECT {i}, {source}, {group}, {counts[i]} FROM {rows} GROUP BY ALL")
        return f"SELECT * FROM ({' UNION ALL '.join(each)}) JOIN owners USING (source) WHERE entities > 0"

    # hidden

    def hide(self) -> None:
        """Groups with too little support; then, while the rest has too little, the smallest group that is shown."""
        few = "id IN (SELECT id FROM {} WHERE entities < k)"
        self.execute(f"CREATE TEMP TABLE doubtful AS {self._rows(few.format('support'))}")
        exact = f"({self._counted('doubtful')})"
        self.execute(f"CREATE TEMP TABLE hidden AS SELECT * FROM doubtful WHERE {few.format(exact)}")
        # Every turn adds a group with at least k entities of that support, which so comes up only once.
        while short := self._short():
            smallest = self.execute(
                f"SELECT id FROM ({self._counted(f'({self._rows(SHOWN)})')}) "
                f"WHERE support = {short[0]} AND source = {short[1]} ORDER BY entities, id LIMIT 1"
            ).fetchall()
            self.execute(f"INSERT INTO hidden {self._rows(f'id = {smallest[0][0]}')}")

    def _short(self) -> tuple[int, int] | None:
        """A support, and an owner of whom the hidden groups hold too few entities of it, while others are shown."""
        found = self.execute(
            f"SELECT support, source FROM ({self._counted('hidden', group='0')}) WHERE entities < k AND "
            f"(support, source) IN (SELECT (support, source) FROM support WHERE {SHOWN}) ORDER BY ALL LIMIT 1"
        ).fetchall()
        return found[0] if found else None

    # the result

    def shown(self) -> list[pa.Array]:
        """The groups that are not hidden, in an order that leaves no ties. Raises ProgramRefused result-size."""
        columns = range(len(self.query.outputs))
        order = [
            f"x{order.output} {'DESC' if order.descending else 'ASC'} NULLS {'FIRST' if order.nulls_first else 'LAST'}"
            for order in self.query.order
        ]
        order += [f"x{i} ASC NULLS LAST" for i in columns]
        found: pa.Table = self.connection.sql(
            f"SELECT {', '.join(f'{self._output(i)} AS x{i}' for i in columns)} FROM groups "
            f"WHERE {SHOWN} ORDER BY {', '.join(order)}"
        ).to_arrow_table()
        if found.nbytes > RESULT_BYTES_MAX:
            raise ProgramRefused("result-size")
        return [self._column(i, found.column(i)) for i in columns]

    def _output(self, i: int) -> str:
        aggregate = self.aggregates.get(i)
        if aggregate is None:
            return f"g{i}"
        if aggregate.ref not in self.scales or aggregate.function not in ("sum", "avg"):
            return f"a{i}"
        if aggregate.function == "sum" and self._described(aggregate.ref).type == "int64":
            return f"CAST(a{i} AS BIGINT)"
        total = f"CAST(a{i} AS DOUBLE) / {self.scales[aggregate.ref] or 1.0:.17e}"
        return f"{total} / d{i}" if aggregate.function == "avg" else total

    def _column(self, i: int, values: pa.ChunkedArray) -> pa.Array:
        item = self.query.outputs[i].item
        if isinstance(item, Aggregate):
            double = item.function == "avg" or (
                item.ref is not None and item.function == "sum" and self._described(item.ref).type == "double"
            )
            return column(values, TYPES["double" if double else "int64"])
        if not item.edges:
            return column(values, TYPES[self._described(item.ref).type])
        names = labels(item.edges)
        return pa.array([None if v is None else names[v] for v in values.to_pylist()], TYPES["string"])

    def _table(self, source: int) -> Table:
        return self.contract.tables[source]

    def _sources(self, relation: int) -> tuple[int, ...]:
        return self.query.relations[relation].sources

    def _stacked(self, relation: int) -> bool:
        return len(self._sources(relation)) > 1

    def _described(self, ref: Ref) -> Column:
        """Its first owner's; type, and buckets and clamp where they are used, are the same for all owners."""
        described = self._table(self._sources(ref.relation)[0]).column(ref.column)
        assert described is not None
        return described


def _column(ref: Ref, form: str) -> str:
    return f'r{ref.relation}."{form} {ref.column}"'


def _forms(described: Column, scale: float | None) -> dict[str, str]:
    """SQL of a column: its value; as a key of groups; the position of its bucket; clamped and whole, for a sum."""
    name, whole = f'"{described.name}"', described.type == "int64"
    # Zero has two signs, which are equal: one of them would show by chance.
    forms = {
        "value": name,
        "key": name if described.type != "double" else f"CASE WHEN {name} = 0 THEN 0 ELSE {name} END",
    }
    if described.buckets:
        edges = [str(ceil(edge)) if whole else f"{edge:.17e}" for edge in described.buckets]
        cases = " ".join(f"WHEN {name} < {edge} THEN {i}" for i, edge in enumerate(edges))
        forms["bucket"] = f"CASE {cases} WHEN {name} IS NOT NULL THEN {len(edges)} END"
    forms["whole"] = name
    if described.clamp:
        low, high = (str(int(edge)) if whole else f"{edge:.17e}" for edge in described.clamp)
        forms["whole"] = f"CASE WHEN {name} < {low} THEN {low} WHEN {name} > {high} THEN {high} ELSE {name} END"
    if scale is not None and not whole:
        forms["whole"] = f"CAST({forms['whole']} * {scale:.17e} AS BIGINT)"
    return forms
