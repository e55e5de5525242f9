"""Run a query under a rule of noise: count and add up in DuckDB, noise from OpenDP. See sql_noise for what and why.

OpenDP draws from the enclave's kernel (getrandom), as the enclave does for its own keys; nobody can seed it.
Its own privacy maps are asked before each draw whether the noise is enough. What leaves has its noise already: names,
order and error bars are made of such numbers alone. All SQL is generated, as in sql_protect.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime
from itertools import accumulate, product
from math import ceil, log, log1p
from typing import Any

import pyarrow as pa
from opendp.domains import atom_domain, map_domain, vector_domain
from opendp.measurements import make_laplace, make_laplace_threshold
from opendp.metrics import absolute_distance, l01inf_distance, l1_distance
from opendp.mod import enable_features

from enclave_runtime.programs import ProgramRefused
from enclave_runtime.programs.duck import connect, register
from enclave_runtime.programs.inputs import TYPES
from enclave_runtime.programs.sql_noise import BITS, CELLS, Number, Plan, needed, result_names
from enclave_runtime.programs.sql_query import Aggregate, Group, Ref, Value, labels

ROW, SOURCE = "row number", "source number"  # with a space: no column of a contract is called so
MISS = 0.05  # how often an error bar may be wrong
DAY, SECOND = date(1970, 1, 1), datetime(1970, 1, 1)  # the engine's own times carry no zone

Key = tuple[Value | None, ...]
Numbers = dict[Number, list[int]]  # a histogram has CELLS of them, everything else one

enable_features("contrib")


def warm() -> None:
    """Build both mechanisms once."""
    laplace([0], 1, 1.0, 2.0)
    threshold([0], 1, 1.0, 0.5, 2.0)


def run_noise(plan: Plan, tables: Sequence[pa.Table]) -> tuple[list[str], list[pa.Array]]:
    """Names and columns of the result. Raises ProgramRefused, duckdb.Error."""
    noised = _noised(plan, measured(plan, tables))
    rows = [_row(plan, key, numbers) for key, numbers in noised]
    positions, place = [], 0
    for output in plan.query.outputs:
        positions.append(place)
        place += 3 if isinstance(output.item, Aggregate) else 1
    for order in reversed(plan.query.order):
        at = positions[order.output]
        absent, there = ([row for row in rows if (row[at] is None) == none] for none in (True, False))
        there.sort(key=lambda row: row[at], reverse=order.descending)
        rows = [*absent, *there] if order.nulls_first else [*there, *absent]
    columns: list[pa.Array] = []
    for output, at in zip(plan.query.outputs, positions, strict=True):
        columns.append(_column(plan, output.item, [row[at] for row in rows]))
        if isinstance(output.item, Aggregate):
            columns += [pa.array([row[at + i] for row in rows], pa.float64()) for i in (1, 2)]
    return result_names(plan.query), columns


# noise


def laplace(values: Sequence[int], distance: int, epsilon: float, scale: float) -> list[int]:
    """Whole numbers with noise of the discrete Laplace law. Raises ProgramRefused where OpenDP finds it too little."""
    mechanism: Any = make_laplace(vector_domain(atom_domain(T="i64")), l1_distance(T="i64"), scale=scale)
    if mechanism.map(distance) > epsilon:
        raise ProgramRefused("engine")
    return list(mechanism(list(values)))


def threshold(counts: Sequence[int], distance: int, epsilon: float, delta: float, scale: float) -> dict[int, int]:
    """Position → count with noise, of those that stay above a threshold which one entity alone seldom reaches."""
    domain = map_domain(atom_domain(T="i64"), atom_domain(T="i64"))
    metric = l01inf_distance(absolute_distance(T="i64"))
    least = ceil(distance + scale * log(max(distance / delta, 1.0)))
    for _ in range(100):
        mechanism: Any = make_laplace_threshold(domain, metric, scale=scale, threshold=least)
        spent, missed = mechanism.map((distance, distance, distance))
        if spent <= epsilon and missed <= delta:
            return dict(mechanism(dict(enumerate(counts))))
        least += ceil(scale)
    raise ProgramRefused("engine")


def _noised(plan: Plan, exact: dict[Key, Numbers]) -> list[tuple[Key, Numbers]]:
    """Groups that show, in an order that depends on their keys alone, and their numbers with noise."""
    noised: Numbers = {}
    numbers = list(plan.numbers)
    if plan.domains is not None:
        nothing = {number: [0] * _width(number) for number in numbers}
        keys = list(product(*(tuple(map(number_of, domain)) for domain in plan.domains)))
        groups = [exact.get(key, nothing) for key in keys]
    else:
        rows = numbers.pop(0)
        found = sorted(exact, key=lambda key: [(value is None, 0 if value is None else value) for value in key])
        counts = [exact[key][rows][0] for key in found]
        shown = threshold(counts, plan.change, plan.share, plan.delta, plan.scale(rows))
        keys, groups = [found[i] for i in sorted(shown)], [exact[found[i]] for i in sorted(shown)]
        noised[rows] = [shown[i] for i in sorted(shown)]
    for number in numbers:
        whole = [value for group in groups for value in group[number]]
        noised[number] = laplace(whole, plan.change * plan.most(number), plan.share, plan.scale(number))
    widths = {number: _width(number) for number in plan.numbers}
    return [
        (key, {number: noised[number][i * width : (i + 1) * width] for number, width in widths.items()})
        for i, key in enumerate(keys)
    ]


def _width(number: Number) -> int:
    return CELLS if number.kind == "histogram" else 1


# exact numbers, which never leave this part


def measured(plan: Plan, tables: Sequence[pa.Table]) -> dict[Key, Numbers]:
    """Of each group that there is."""
    connection = connect(plan.contract, plan.contract.enclave.cpus)
    query = plan.query
    for relation in range(len(query.relations)):
        register(connection, f"t{relation}", _stacked(plan, relation, tables))
    groups = [output.item for output in query.outputs if isinstance(output.item, Group)]
    refs = sorted({n.ref for n in plan.numbers if n.ref}, key=lambda ref: (ref.relation, ref.column))
    by = [f'"group {i}"' for i in range(len(groups))]  # with a space, as above
    content = [*by, *(_value(ref, refs) for ref in refs)]
    values = [*(_group(plan, group) for group in groups), *map(_name, refs)]
    values = [f"{value} AS {name}" for value, name in zip(values, content, strict=True)]
    joins = " ".join(
        f"{'LEFT JOIN' if join.outer else 'JOIN'} t{join.right} ON "
        + " AND ".join(f"{_name(Ref(join.left, a))} = {_name(Ref(join.right, b))}" for a, b in join.keys)
        for join in query.joins
    )
    conditions, parameters = _conditions(plan)
    entity = plan.entity or (ROW,)
    owners = (SOURCE,) if len(plan.private) == 1 else ()
    units = ", ".join(_name(Ref(plan.anchor, name)) for name in (*entity, *owners))
    order = f"hash({', '.join(content)}), {', '.join(content)}" if content else "1"
    connection.execute(
        f"CREATE TEMP TABLE counted AS SELECT {', '.join([*values, '1 AS one'])} FROM t0 {joins} WHERE {conditions} "
        f"QUALIFY row_number() OVER (PARTITION BY {units} ORDER BY {order}) <= {plan.rows}",
        parameters,
    )
    single = [number for number in plan.numbers if number.kind != "histogram"]
    sums = ", ".join([*by, *(_sum(plan, number, refs) for number in single), "1"])
    found: dict[Key, Numbers] = {}
    for row in connection.execute(f"SELECT {sums} FROM counted GROUP BY ALL HAVING count(*) > 0").fetchall():
        sums_of = zip(single, row[len(by) : -1], strict=True)
        found[row[: len(by)]] = {number: [int(value)] for number, value in sums_of}
    for number in set(plan.numbers) - set(single):
        for group in found.values():
            group[number] = [0] * CELLS
        cells = ", ".join([*by, f"{_cell(plan, number, refs)} AS cell", "count(*)"])
        for *given, cell, count in connection.execute(f"SELECT {cells} FROM counted GROUP BY ALL").fetchall():
            if cell is not None:
                found[tuple(given)][number][int(cell)] = int(count)
    connection.close()
    return found


def _stacked(plan: Plan, relation: int, tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of all owners, whose they are and their number; times as numbers, which have no special values."""
    sources = plan.query.relations[relation].sources
    rows = pa.concat_tables([tables[source] for source in sources])
    columns = [
        values.cast(pa.int32() if pa.types.is_date32(values.type) else pa.int64())
        if pa.types.is_temporal(values.type)
        else values
        for values in rows.columns
    ]
    owners = pa.chunked_array(
        [pa.repeat(pa.scalar(source, pa.int32()), tables[source].num_rows) for source in sources], pa.int32()
    )
    numbers = pa.arange(0, rows.num_rows)
    return pa.table([*columns, owners, numbers], names=[*rows.column_names, SOURCE, ROW])


def _name(ref: Ref) -> str:
    return f't{ref.relation}."{ref.column}"'


def _value(ref: Ref, refs: Sequence[Ref]) -> str:
    """Of a row that counts."""
    return f'"value {refs.index(ref)}"'


def _group(plan: Plan, group: Group) -> str:
    name, described = _name(group.ref), plan.column(group.ref)
    if not group.edges:  # zero has two signs, which are equal
        return f"CASE WHEN {name} = 0 THEN 0::DOUBLE ELSE {name} END" if described.type == "double" else name
    edges = [str(ceil(edge)) if described.type == "int64" else f"{edge:.17e}::DOUBLE" for edge in group.edges]
    cases = " ".join(f"WHEN {name} < {edge} THEN {i}" for i, edge in enumerate(edges))
    return f"CASE {cases} WHEN {name} IS NOT NULL THEN {len(edges)} END"


def _conditions(plan: Plan) -> tuple[str, list[object]]:
    conditions, parameters = ["true"], list[object]()
    for condition in plan.query.filters:
        holes = ", ".join("?" for _ in condition.values)
        right = {"IN": f"({holes})", "BETWEEN": "? AND ?"}.get(condition.operator, holes)
        value = _group(plan, condition.item) if condition.item.edges else _name(condition.item.ref)
        conditions.append(f"{value} {condition.operator} {right}")
        parameters += map(number_of, condition.values)
    return " AND ".join(conditions), parameters


def number_of(value: Value | None) -> Value | None:
    """Times as numbers."""
    if isinstance(value, datetime):
        return int((value - SECOND).total_seconds()) * 1_000_000 + value.microsecond
    return (value - DAY).days if isinstance(value, date) else value


def _moved(plan: Plan, ref: Ref, value: str) -> str:
    low, high = (f"{edge:.17e}::DOUBLE" for edge in plan.column(ref).clamp)
    return f"CASE WHEN {value} IS NOT NULL THEN greatest({low}, least({high}, CAST({value} AS DOUBLE))) END"


def _sum(plan: Plan, number: Number, refs: Sequence[Ref]) -> str:
    if number.ref is None:
        return "count(*)"
    value = _value(number.ref, refs)
    if number.kind in ("count", "distinct"):
        return f"count({'DISTINCT ' if number.kind == 'distinct' else ''}{value})"
    low, high = plan.column(number.ref).clamp
    middle = 0.0 if number.kind == "sum" else low + (high - low) / 2
    moved, factor = _moved(plan, number.ref, value), 2.0 ** plan.shift(number)
    whole = f"CAST(({moved} - {middle:.17e}::DOUBLE) * {factor:.17e}::DOUBLE AS BIGINT)"
    return f"coalesce(sum({f'({whole} * {whole}) >> {BITS}' if number.kind == 'squares' else whole}), 0)"


def _cell(plan: Plan, number: Number, refs: Sequence[Ref]) -> str:
    """Position of a value's part of the clamp, all being equally wide."""
    assert number.ref is not None
    low, high = plan.column(number.ref).clamp
    moved = _moved(plan, number.ref, _value(number.ref, refs))
    factor = CELLS / (high - low)
    return f"least({CELLS - 1}, CAST(floor(({moved} - {low:.17e}::DOUBLE) * {factor:.17e}::DOUBLE) AS INTEGER))"


# what the numbers with noise say


def _row(plan: Plan, key: Key, numbers: Numbers) -> list[Any]:
    row: list[Any] = []
    keys = iter(key)
    for output in plan.query.outputs:
        row += [next(keys)] if isinstance(output.item, Group) else _estimate(plan, output.item, numbers)
    return row


def _estimate(plan: Plan, aggregate: Aggregate, numbers: Numbers) -> list[Any]:
    """A number and its error bars: where, but for MISS, the one without noise lies."""
    parts = needed(aggregate)
    values: dict[str, int] = {number.kind: numbers[number][0] for number in parts}
    bars: dict[str, int] = {number.kind: bar(plan.scale(number), MISS / len(parts)) for number in parts}
    if aggregate.function == "quantile":
        low, high = plan.column(parts[0].ref).clamp if parts[0].ref else (0.0, 0.0)
        return list(quantile(numbers[parts[0]], aggregate.fraction, low, high, plan.scale(parts[0])))
    if len(parts) == 1:
        (number,) = parts
        value, wide, unit = values[number.kind], bars[number.kind], 2.0 ** -plan.shift(number)
        if number.kind != "sum":
            return [value, float(max(value - wide, 0)), float(max(value + wide, 0))]
        return [value * unit, (value - wide) * unit, (value + wide) * unit]
    assert aggregate.ref is not None
    clamp = plan.column(aggregate.ref).clamp
    unit = 2.0 ** -plan.shift(Number("centred", aggregate.ref))
    if aggregate.function == "avg":
        return list(mean(values, bars, clamp, unit))
    return list(variance(values, bars, clamp, unit))


def bar(scale: float, miss: float) -> int:
    """Noise is larger than this with a probability of at most `miss`."""
    return ceil(scale * log(1 / miss))


def mean(
    values: Mapping[str, int], bars: Mapping[str, int], clamp: Sequence[float], unit: float
) -> tuple[float | None, float, float]:
    """Of `centred` and `count`; null where the count says that there may be nothing."""
    (low, high), count, total = clamp, values["count"], values["centred"]
    middle = low + (high - low) / 2
    if count <= 0:
        return None, low, high
    found = _ratio(total, count, bars["centred"], bars["count"])
    return tuple(  # type: ignore[return-value]
        min(max(middle + part * unit, low), high) if part is not None else edge
        for part, edge in zip((total / count, *found), (low, low, high), strict=True)
    )


def variance(
    values: Mapping[str, int], bars: Mapping[str, int], clamp: Sequence[float], unit: float
) -> tuple[float | None, float, float]:
    """Of the sample: of `squares`, `centred` and `count`."""
    count, most = values["count"], (clamp[1] - clamp[0]) ** 2 / 2  # of two values
    if count <= 1:
        return None, 0.0, most
    squares = 2.0**BITS * unit * unit
    sample = count / (count - 1)
    value = (values["squares"] / count * squares - (values["centred"] / count * unit) ** 2) * sample
    fewest = count - bars["count"]
    if fewest <= 1:
        return min(max(value, 0.0), most), 0.0, most
    first = _ratio(values["squares"], count, bars["squares"], bars["count"])
    second = _ratio(values["centred"], count, bars["centred"], bars["count"])
    assert first[0] is not None
    assert first[1] is not None
    assert second[0] is not None
    assert second[1] is not None
    nearest = 0.0 if second[0] <= 0 <= second[1] else min(abs(second[0]), abs(second[1]))
    farthest = max(abs(second[0]), abs(second[1]))
    low = max(first[0], 0.0) * squares - (farthest * unit) ** 2
    high = first[1] * squares - (nearest * unit) ** 2
    bounds = (value, low, high * fewest / (fewest - 1))
    return tuple(min(max(part, 0.0), most) for part in bounds)  # type: ignore[return-value]


def _ratio(total: int, count: int, wide: int, deep: int) -> tuple[float | None, float | None]:
    """Bounds of a sum divided by a count, each within its bar; None where the count may be nothing."""
    if count - deep <= 0:
        return None, None
    low, high = total - wide, total + wide
    return low / (count - deep if low < 0 else count + deep), high / (count + deep if high < 0 else count - deep)


def quantile(
    cells: Sequence[int], fraction: float, low: float, high: float, scale: float
) -> tuple[float | None, float, float]:
    """From a histogram with noise. The bars hold for all its edges at once."""
    sums = list(accumulate(cells))
    if sums[-1] <= 0:
        return None, low, high
    wide = [_tail(i + 1, len(cells) - i - 1, fraction, scale, MISS / len(cells)) for i in range(len(cells))]
    edges = [low + (high - low) * i / len(cells) for i in range(len(cells) + 1)]
    wanted = fraction * sums[-1]
    place = next((i for i, reached in enumerate(sums) if reached >= wanted), len(cells) - 1)
    before = sums[place - 1] if place else 0
    part = min(max((wanted - before) / max(cells[place], 1), 0.0), 1.0)
    value = edges[place] + part * (edges[place + 1] - edges[place])
    below = _last(edges[i + 1] for i, reached in enumerate(sums) if reached - wanted < -wide[i])
    above = next((edges[i + 1] for i, reached in enumerate(sums) if reached - wanted > wide[i]), high)
    return value, min(low if below is None else below, value), max(above, value)


def _tail(below: int, above: int, fraction: float, scale: float, miss: float) -> float:
    """What the noise of (1 - fraction) times `below` cells, less fraction times `above` cells, seldom exceeds.

    Chernoff's bound with the moments of Laplace's law, 1 / (1 - t²); its discrete form has smaller ones.
    """
    bounds = []
    for step in range(1, 50):
        t = step / 50
        moments = below * log1p(-((t * (1 - fraction)) ** 2)) + above * log1p(-((t * fraction) ** 2))
        bounds.append((log(2 / miss) - moments) / t)
    return scale * min(bounds)


def _last(values: Iterable[float]) -> float | None:
    found = None
    for value in values:
        found = value
    return found


def _column(plan: Plan, item: Group | Aggregate, values: Sequence[Any]) -> pa.Array:
    if isinstance(item, Aggregate):
        whole = item.function in ("rows", "count", "count_distinct")
        return pa.array(values, pa.int64() if whole else pa.float64())
    if item.edges:
        names = labels(item.edges)
        return pa.array([None if value is None else names[value] for value in values], pa.string())
    kind = TYPES[plan.column(item.ref).type]
    if pa.types.is_temporal(kind):
        integer = pa.int32() if pa.types.is_date32(kind) else pa.int64()
        return pa.array(values, integer).view(kind)
    return pa.array(values, kind)
