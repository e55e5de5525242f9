"""Mean, variance, correlation, quantiles and histograms over stacked tables, in groups.

Sums are of whole numbers (see common.exponent), so they are exact and no order of rows shows in them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt, ldexp
from typing import Annotated, Any

import pyarrow as pa

from enclave_runtime.programs import Disclosure, ProgramRefused, common
from enclave_runtime.programs.common import FINE_BITS, Stack, example, exponent, guarded, read
from enclave_runtime.programs.duck import RESULT_BYTES_MAX, encode
from enclave_runtime.programs.duck import column as rebuilt
from enclave_runtime.programs.inputs import TYPES
from enclave_runtime.programs.sql_query import labels
from enclave_runtime.programs.stacked import Rows
from mpc.protocol.contract import Column, Contract, Use
from mpc.protocol.encoding import Limit, Name, Record, Text
from mpc.protocol.errors import ContractError

NUMBERS = ("int64", "double")
GROUPS_MAX = 100_000  # shown: their sums are Python's numbers for a while


@dataclass(frozen=True)
class Function:
    use: Use  # what an aggregate rule must list
    form: str  # in which it needs the column, see Rows
    words: str


FUNCTIONS = {
    "mean": Function("avg", "f", "mean"),
    "variance": Function("variance", "w", "variance (of a sample, so divided by n - 1)"),
    "correlation": Function("correlation", "w", "Pearson's correlation"),
    "histogram": Function("group", "b", "number of rows in each of the owner's buckets"),
    "quantile": Function("group", "x", "quantile, interpolated between neighbours"),  # under no aggregate rule
}


@dataclass(frozen=True)
class Parameters(Record):
    table: Name = field(metadata=example('"claims"'))
    group_by: Annotated[tuple[Name, ...], Limit(0, 8)] = field(
        metadata=example('["region"], or [] for all rows together')
    )
    measures: Annotated[tuple[Text, ...], Limit(1, 64)] = field(
        metadata=example('["count", "mean(cost)", "correlation(age, cost)", "quantile(cost, 0.5)", "histogram(age)"]')
    )


@dataclass(frozen=True)
class Measure:
    name: str
    function: str
    columns: tuple[int, ...] = ()  # positions among the measured columns
    quantile: float = 0.0


@dataclass(frozen=True)
class Plan:
    stack: Stack
    groups: tuple[Column, ...]
    columns: tuple[Column, ...]  # measured
    measures: tuple[Measure, ...]


def warm() -> None:
    """Nothing that sql does not load."""


def check(contract: Contract) -> Disclosure:
    """Raises ContractError."""
    plan = _plan(contract)
    stack = plan.stack
    told = []
    for column in plan.groups:
        buckets = f", in buckets {', '.join(map(repr, labels(column.buckets)))}" if column.buckets else ""
        told.append((column.name, f"groups by {stack.name}.{column.name}{buckets}: {common.allowing(stack, 'group')}"))
    for measure in plan.measures:
        if measure.function == "count":
            told.append((measure.name, "number of rows that count"))
            continue
        function = FUNCTIONS[measure.function]
        columns = [plan.columns[i] for i in measure.columns]
        of = " and ".join(common.shown(stack, column, function.form != "b") for column in columns)
        told.append((measure.name, f"{function.words} of {of}: {common.allowing(stack, function.use)}"))
    names = ", ".join(column.name for column in plan.columns)
    rules = (
        [f"only rows count in which {names} {'all have' if len(plan.columns) > 1 else 'has'} a value"] if names else []
    )
    for table in stack.tables:
        if table.rule.kind == "exact":
            rules.append(common.exactly(table))
            continue
        rules.append(
            f"{table.name} of {table.owner}: every group, and every bucket of a histogram in it, rests on none or at "
            f"least {table.rule.k} {common.counted(table)} of it; others are left out, and further ones until what is "
            f"left out holds none or at least {table.rule.k}"
        )
        if any(measure.function == "correlation" for measure in plan.measures):
            whose = " and ".join(table.rule.entity) or "row"
            rules.append(
                f"{table.name} of {table.owner}: no correlation where a {whose} would pull a line through this owner's "
                f"rows of the group by more than 1/{table.rule.k} (its leverage)"
            )
    warnings = common.warnings(contract, stack.tables)
    for table in stack.limited:
        if table.rule.k < 10 and any(measure.function in ("variance", "correlation") for measure in plan.measures):
            warnings.append(
                f"{table.name} of {table.owner}: mean and variance of {table.rule.k} values can often be solved for "
                f"them; a larger k prevents that"
            )
    return Disclosure(tuple(told), tuple(rules), contract.recipients, tuple(warnings))


def run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    """Returns: recipient → a row for each group that shows, the same for all. Raises ProgramRefused."""
    return guarded(contract, lambda: dict.fromkeys(contract.recipients, _run(_plan(contract), tables)))


def _plan(contract: Contract) -> Plan:
    given = read(contract, Parameters)
    stack = common.stack(contract, "program.parameters.table", given.table)
    groups = []
    for i, name in enumerate(given.group_by):
        place = f"program.parameters.group_by[{i}]"
        groups.append(stack.column(place, name, TYPES, "group"))
        stack.same(place, groups[-1], "buckets")
        if groups[-1] in groups[:-1]:
            raise ContractError(place, expected="each column once", got=name)
    columns: dict[str, Column] = {}
    measures: list[Measure] = []
    for i, text in enumerate(given.measures):
        place = f"program.parameters.measures[{i}]"
        measures.append(_measure(stack, place, text, columns))
        taken = [measure.name for measure in measures[:-1]] + [column.name for column in groups]
        if measures[-1].name in taken:
            raise ContractError(place, expected="each measure once, and none called like a group", got=text[:80])
    _solvable(stack, measures)
    return Plan(stack, tuple(groups), tuple(columns.values()), tuple(measures))


def _measure(stack: Stack, place: str, text: str, columns: dict[str, Column]) -> Measure:
    """Adds what it measures to `columns`. Raises ContractError."""
    if text == "count":
        return Measure(text, text)
    plain = re.fullmatch(r"(mean|variance|histogram)\(([\w-]+)\)|(correlation)\(([\w-]+), *([\w-]+)\)", text, re.ASCII)
    part = re.fullmatch(r"(quantile)\(([\w-]+), *([01]|0?\.[0-9]{1,6})\)", text, re.ASCII)
    if plain is None and part is None:
        expected = "count, mean(column), variance(column), correlation(column, column), histogram(column), or "
        raise ContractError(place, expected=f"{expected}quantile(column, 0.5)", got=repr(text[:80]))
    if part is not None and stack.limited:
        raise ContractError(
            f"{place}: {stack.limited[0].owner}'s rule for {stack.name} is aggregate, and a quantile is one row's",
            expected="histogram(column), or a rule of kind exact of every owner",
        )
    function, *names = [word for word in (part or plain).groups() if word is not None]  # type: ignore[union-attr]
    quantile = float(names.pop()) if part is not None else 0.0
    for name in names:
        column = stack.column(place, name, NUMBERS, FUNCTIONS[function].use)
        if function == "histogram":
            stack.same(place, column, "buckets")
            if not column.buckets:
                expected = "buckets = [ascending edges] of all owners"
                raise ContractError(f"{place}: {stack.name}.{name} has no buckets", expected=expected)
        else:
            stack.clamped(place, column)
        columns.setdefault(name, column)
    if len(set(names)) != len(names):
        raise ContractError(place, expected="two different columns", got=text[:80])
    order = list(columns)
    shown = ", ".join([*names, *([f"{quantile:g}"] if part is not None else [])])
    return Measure(f"{function}({shown})", function, tuple(order.index(name) for name in names), quantile)


def _solvable(stack: Stack, measures: Sequence[Measure]) -> None:
    """Numbers told of a group are equations for its values: there must be more of these."""
    told = [measure for measure in measures if measure.function in ("mean", "variance", "correlation")]
    columns = {i for measure in told for i in measure.columns}
    for table in stack.limited:
        if told and table.rule.k > 1 and table.rule.k * len(columns) <= len(told):
            raise ContractError(
                f"program.parameters.measures: {len(told)} numbers about {len(columns)} columns of a group of "
                f"{table.rule.k} can be solved for the values of {table.owner}",
                expected=f"fewer measures, or k of at least {len(told) // len(columns) + 1}",
            )


def _run(plan: Plan, tables: Sequence[pa.Table]) -> bytes:
    forms: dict[int, set[str]] = {i: set() for i in range(len(plan.columns))}
    for measure in plan.measures:
        for i in measure.columns:
            forms[i].add(FUNCTIONS[measure.function].form)
    rows = Rows(plan.stack, tables, [(column, forms[i]) for i, column in enumerate(plan.columns)], plan.groups)
    rows.hide("0", "id")
    rows.execute(
        "CREATE TEMP TABLE shown AS SELECT id FROM groups SEMI JOIN counted USING (id) "
        "WHERE id NOT IN (SELECT p FROM hidden)"
    )
    ((count,),) = rows.execute("SELECT count(*) FROM shown").fetchall()
    cells = sum(len(plan.columns[m.columns[0]].buckets) + 1 if m.function == "histogram" else 1 for m in plan.measures)
    if count > GROUPS_MAX or count * cells * 8 > RESULT_BYTES_MAX:
        raise ProgramRefused("result-size")
    values = _keys(rows, plan)
    ids, sums = _sums(rows, plan)
    correlated = {i for measure in plan.measures if measure.function == "correlation" for i in measure.columns}
    pulled = {i: _pulled(rows, plan, i) for i in sorted(correlated)}
    for measure in plan.measures:
        if measure.function == "histogram":
            values |= _histogram(rows, plan, measure, ids)
        else:
            kind = TYPES["int64" if measure.function == "count" else "double"]
            shown = [
                not any(measure.function == "correlation" and group in pulled[i] for i in measure.columns)
                for group in ids
            ]
            found = [_value(plan, measure, row) if show else None for show, row in zip(shown, sums, strict=True)]
            values[measure.name] = pa.array(found, kind)
    return encode(list(values), list(values.values()))


def _keys(rows: Rows, plan: Plan) -> dict[str, pa.Array]:
    found: pa.Table = rows.connection.sql(
        "SELECT groups.* FROM groups SEMI JOIN shown USING (id) ORDER BY id"
    ).to_arrow_table()
    keys = {}
    for i, column in enumerate(plan.groups):
        values = found[f"g{i}"]
        if column.buckets:
            names = labels(column.buckets)
            keys[column.name] = pa.array([None if v is None else names[v] for v in values.to_pylist()], TYPES["string"])
        else:
            keys[column.name] = rebuilt(values, TYPES[column.type])
    return keys


def _sums(rows: Rows, plan: Plan) -> tuple[list[int], list[dict[str, Any]]]:
    """Ids of the groups shown, and of each what its measures are made of."""
    wanted = {"n": "count(*)"}
    for measure in plan.measures:
        at = measure.columns
        if measure.function == "quantile":
            wanted[f"q{at[0]}_{measure.quantile:g}"] = f"quantile_cont(x{at[0]}::DOUBLE, {measure.quantile:g})"
        elif measure.function == "mean":
            wanted[f"f{at[0]}"] = f"sum(f{at[0]})"
        elif measure.function in ("variance", "correlation"):
            wanted |= {f"s{i}": f"sum(w{i})" for i in at}
            pairs = [(i, j) for i in at for j in at if i <= j]
            wanted |= {f"p{i}_{j}": f"sum(w{i}::HUGEINT * w{j})" for i, j in pairs}
    query = f"SELECT id, {', '.join(wanted.values())} FROM counted SEMI JOIN shown USING (id) GROUP BY id ORDER BY id"
    found = rows.execute(query).fetchall()
    return [row[0] for row in found], [dict(zip(wanted, row[1:], strict=True)) for row in found]


def _value(plan: Plan, measure: Measure, sums: dict[str, Any]) -> int | float | None:
    """From whole numbers, each division rounded once; None where it is not defined."""
    n: int = sums["n"]
    if measure.function == "count":
        return n
    if measure.function == "quantile":
        quantile: float = sums[f"q{measure.columns[0]}_{measure.quantile:g}"]
        return quantile
    shifts = [exponent(plan.columns[i]) for i in measure.columns]
    if measure.function == "mean":
        i = measure.columns[0]
        return ldexp(sums[f"f{i}"] / n, -exponent(plan.columns[i], FINE_BITS))
    spread = {
        (i, j): n * sums[f"p{i}_{j}"] - sums[f"s{i}"] * sums[f"s{j}"]
        for i in measure.columns
        for j in measure.columns
        if i <= j
    }
    if measure.function == "variance":
        i = measure.columns[0]
        return ldexp(spread[i, i] / (n * (n - 1)), -2 * shifts[0]) if n > 1 else None
    i, j = sorted(measure.columns)
    both = spread[i, i] * spread[j, j]
    return (spread[i, j] << 64) / isqrt(both << 128) if both else None


def _pulled(rows: Rows, plan: Plan, i: int) -> set[int]:
    """Groups shown in which an entity pulls a line through its owner's rows there by more than 1/k (its leverage).

    A correlation is a line's slope: of a column that is 1 for one entity, it would tell the other column's value.
    """
    query = f"SELECT id, source, k, count(*), sum(w{i}), sum(w{i}::HUGEINT * w{i}) FROM counted"
    found = rows.execute(f"{query} SEMI JOIN shown USING (id) JOIN owners USING (source) GROUP BY ALL").fetchall()
    lines = [
        {"id": id_, "source": source, "n": n, "mean": s / n, "spread": (n * p - s * s) / n, "most": (1 + 1e-6) / k}
        for id_, source, k, n, s, p in found
    ]
    if not lines:
        return set()
    rows.connection.register("lines", pa.Table.from_pylist(lines))
    part = f"1 / n + CASE WHEN spread > 0 THEN (w{i} - mean) * (w{i} - mean) / spread ELSE 0 END"
    whole = f"CAST(({part}) * {2**40} AS BIGINT)"  # whose sums do not depend on their order
    condition = f"WHERE {whole} > most * {2**40}"
    if plan.stack.entity:
        condition = f"GROUP BY id, source, most, entity HAVING sum({whole}) > most * {2**40}"
    query = f"SELECT DISTINCT id FROM counted JOIN lines USING (id, source) {condition}"
    return {id_ for (id_,) in rows.execute(query).fetchall()}


def _histogram(rows: Rows, plan: Plan, measure: Measure, ids: Sequence[int]) -> dict[str, pa.Array]:
    """A column for each bucket; what does not show is null."""
    i = measure.columns[0]
    rows.hide("id", f"b{i}")
    hidden = set(rows.execute("FROM hidden").fetchall())
    query = f"SELECT id, b{i}, count(*) FROM counted SEMI JOIN shown USING (id) GROUP BY ALL"
    counts = {(group, bucket): count for group, bucket, count in rows.execute(query).fetchall()}
    found = {}
    for bucket, label in enumerate(labels(plan.columns[i].buckets)):
        cells = ((group, bucket) for group in ids)
        values = [None if cell in hidden else counts.get(cell, 0) for cell in cells]
        found[f"{measure.name} {label}"] = pa.array(values, TYPES["int64"])
    return found
