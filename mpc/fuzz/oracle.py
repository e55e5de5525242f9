"""What a scenario's result must be, for SQL found without the code that the enclave runs.

Exact rules: the agreed text, in a DuckDB of its own. Aggregate rules: the query as it was understood
(enclave_runtime.programs.sql_check), row by row in plain Python; a group is shown only if it rests on no entity or at
least k of each owner, and where all groups do so none is missing. Order of rows is not judged. Of the other kinds of
programs there is no second implementation: they must give the same bytes again on the committed tables. Of noise only
the form of the result is judged here, its law is not.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import duckdb
import pyarrow as pa

from enclave_runtime import programs
from enclave_runtime.programs.sql_check import read_query
from enclave_runtime.programs.sql_query import Aggregate, Filter, Group, Query, Ref, labels
from mpc.protocol.contract import Contract

Row = dict[str, Any]
Joined = tuple["_Part | None", ...]  # a row of each relation, in the query's order
TOLERANCE = 1e-9


class _Part:
    """A row and whose it is."""

    def __init__(self, source: int, row: Row) -> None:
        self.source, self.row = source, row


def described(contract: Contract) -> str:
    """How results are judged, in words."""
    if _noisy(contract):
        return "their form alone: the law of noise is not judged here"
    if contract.program.kind == "sql":
        return "a second implementation of the query"
    return f"the program, run again: there is no second implementation of {contract.program.kind}"


def _noisy(contract: Contract) -> bool:
    return any(table.rule.kind == "noise" for table in contract.tables)


def agrees(contract: Contract, tables: Sequence[pa.Table], results: Mapping[str, bytes]) -> bool:
    """Whether these are the results of these tables, for the recipients that are named."""
    if _noisy(contract):
        return all(pa.ipc.open_stream(result).read_all().column_names for result in results.values())
    if contract.program.kind == "sql":
        return all(_agrees(contract, tables, result) for result in dict.fromkeys(results.values()))
    again = programs.program(contract.program.kind).run(contract, list(tables))
    return all(again.get(name) == result for name, result in results.items())


def _agrees(contract: Contract, tables: Sequence[pa.Table], result: bytes) -> bool:
    shown = [tuple(map(_plain, row.values())) for row in pa.ipc.open_stream(result).read_all().to_pylist()]
    if all(table.rule.kind == "exact" for table in contract.tables):
        return _same(shown, _clear_text(contract, tables))
    query = read_query(contract)
    groups = _groups(query, tables)
    right = {key: _line(contract, query, key, members) for key, members in groups.items()}
    keys = [tuple(row[i] for i in _positions(query)) for row in shown]
    if len(set(keys)) != len(keys) or not set(keys) <= set(right):
        return False
    enough = {key for key, members in groups.items() if _enough(contract, query, members)}
    complete = len(enough) < len(groups) or len(keys) == len(groups)
    return complete and set(keys) <= enough and _same(shown, [right[key] for key in keys])


def _clear_text(contract: Contract, tables: Sequence[pa.Table]) -> list[tuple[Any, ...]]:
    stacks = defaultdict(list)
    for described, table in zip(contract.tables, tables, strict=True):
        stacks[described.name].append(table)
    with duckdb.connect(":memory:", config={"threads": "1"}) as connection:
        for name, stacked in stacks.items():
            rows = pa.concat_tables(stacked)
            # Times are UTC, and carry no zone there.
            columns = [c.cast(pa.timestamp("us")) if pa.types.is_timestamp(c.type) else c for c in rows.columns]
            connection.register(name, pa.table(columns, names=rows.column_names))
        found = connection.execute(contract.program.text).fetchall()
    return [tuple(map(_plain, row)) for row in found]


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    return float(value) if not isinstance(value, str | bool | int) and hasattr(value, "as_tuple") else value  # Decimal


def _same(shown: Iterable[tuple[Any, ...]], right: Iterable[tuple[Any, ...]]) -> bool:
    """The same rows, in any order, but for the last digits of numbers."""
    one, other = (sorted(rows, key=lambda row: [_rounded(value) for value in row]) for rows in (shown, right))
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(_close, a, b)) for a, b in zip(one, other, strict=True)
    )


def _rounded(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        numbers = one is not None and other is not None
        return numbers and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)


def _positions(query: Query) -> list[int]:
    return [i for i, output in enumerate(query.outputs) if isinstance(output.item, Group)]


def _groups(query: Query, tables: Sequence[pa.Table]) -> dict[tuple[Any, ...], list[Joined]]:
    parts = [
        [
            _Part(source, {name.lower(): _plain(value) for name, value in row.items()})
            for source in relation.sources
            for row in tables[source].to_pylist()
        ]
        for relation in query.relations
    ]
    joined: list[Joined] = [(part,) for part in parts[0]]
    for join in query.joins:
        partners = defaultdict(list)
        for part in parts[join.right]:
            partners[tuple(part.row[right.lower()] for _, right in join.keys)].append(part)
        longer: list[Joined] = []
        for row in joined:
            left = row[join.left]
            key = tuple(left.row[name.lower()] if left else None for name, _ in join.keys)
            found: list[_Part | None] = [] if None in key else [*partners[key]]
            longer += [(*row, part) for part in found or ([None] if join.outer else [])]
        joined = longer
    groups: dict[tuple[Any, ...], list[Joined]] = defaultdict(list)
    items = [output.item for output in query.outputs if isinstance(output.item, Group)]
    for row in joined:
        if all(_passes(condition, row) for condition in query.filters):
            groups[tuple(_group(item, row) for item in items)].append(row)
    return groups


def _value(ref: Ref, row: Joined) -> Any:
    part = row[ref.relation]
    return part.row[ref.column.lower()] if part else None


def _bucket(item: Group, row: Joined) -> int | None:
    value = _value(item.ref, row)
    return None if value is None else sum(value >= edge for edge in item.edges)


def _group(item: Group, row: Joined) -> Any:
    if not item.edges:
        return _value(item.ref, row)
    number = _bucket(item, row)
    return None if number is None else labels(item.edges)[number]


def _passes(condition: Filter, row: Joined) -> bool:
    value = _bucket(condition.item, row) if condition.item.edges else _value(condition.item.ref, row)
    given, operator = condition.values, condition.operator
    if operator in ("IS NULL", "IS NOT NULL"):
        return (value is None) == (operator == "IS NULL")
    if value is None:
        return False
    first: Any = given[0]
    last: Any = given[-1]
    compare: dict[str, Callable[[], Any]] = {
        "=": lambda: value == first,
        "<": lambda: value < first,
        "<=": lambda: value <= first,
        ">": lambda: value > first,
        ">=": lambda: value >= first,
        "IN": lambda: value in given,
        "BETWEEN": lambda: first <= value <= last,
    }
    return bool(compare[operator]())


def _line(contract: Contract, query: Query, key: tuple[Any, ...], members: list[Joined]) -> tuple[Any, ...]:
    groups = iter(key)
    return tuple(
        next(groups) if isinstance(output.item, Group) else _aggregate(contract, query, output.item, members)
        for output in query.outputs
    )


def _aggregate(contract: Contract, query: Query, item: Aggregate, members: list[Joined]) -> Any:
    if item.ref is None:
        return len(members)
    values = [value for row in members if (value := _value(item.ref, row)) is not None]
    if item.function in ("count", "count_distinct"):
        return len(values) if item.function == "count" else len(set(values))
    described = contract.tables[query.relations[item.ref.relation].sources[0]].column(item.ref.column)
    if described is not None and described.clamp:
        low, high = described.clamp
        values = [type(value)(min(max(value, low), high)) for value in values]
    if not values:
        return None
    if item.function == "avg":
        return math.fsum(values) / len(values)
    return sum(values) if isinstance(values[0], int) else math.fsum(values)


def _enough(contract: Contract, query: Query, members: list[Joined]) -> bool:
    """Whether each owner with a rule has no entity behind this group, or at least k."""
    for at, relation in enumerate(query.relations):
        names = next((contract.tables[s].rule.entity for s in relation.sources if contract.tables[s].rule.k), ())
        entities = defaultdict(set)
        for row in members:
            if part := row[at]:
                entities[part.source].add(tuple(part.row[name.lower()] for name in names) if names else id(part))
        if any(0 < len(found) < contract.tables[source].rule.k for source, found in entities.items()):
            return False
    return True
