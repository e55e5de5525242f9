"""Queries under a rule of noise: what is measured, how much noise each number needs, and what people are told.

The unit. Results on two sets of tables that differ in all rows of one *entity* have nearly the same odds: they differ
by a factor of exp(epsilon) at most, but for cases of the probability delta. Tables with the rule are joined with each
other only on their entities, so that every row of the join is of one entity; of each entity `rows` rows of the join
count, which ones depending on this entity's rows alone. Adding or removing an entity then changes at most `change`
counted rows: `rows`, or twice as many where others of its rows may take the place (an outer join, several owners).

Every number is a sum over counted rows of whole numbers up to `most`; noise of Laplace's law with the scale
change * most / (epsilon of that number) hides any entity. All numbers share epsilon equally. Source: Dwork and Roth,
The Algorithmic Foundations of Differential Privacy, 3.3 and 3.5; keys that the query does not name: Rogers 2023.
"""

from dataclasses import dataclass
from math import ceil, exp, frexp, prod
from typing import Literal

from enclave_runtime.programs import Disclosure
from enclave_runtime.programs.common import CLAMP_MAX
from enclave_runtime.programs.sql_query import Aggregate, Group, Query, Ref, Value, labels
from mpc.protocol.contract import Column, Contract, Table
from mpc.protocol.errors import ContractError

IMAGE = "noise"  # the variant with the library in it
CELLS = 64  # of the histogram behind a quantile
NUMBERS_MAX = 200_000  # in a result, over all groups that the query names
BITS = 24  # of a value made whole: the noise is always coarser

Kind = Literal["rows", "count", "distinct", "sum", "centred", "squares", "histogram"]


@dataclass(frozen=True)
class Number:
    """A sum over the rows of a group that gets noise of its own."""

    kind: Kind
    ref: Ref | None = None


@dataclass(frozen=True)
class Plan:
    contract: Contract
    query: Query
    epsilon: float  # the smallest of all owners', and so are the next two
    delta: float
    rows: int
    anchor: int  # the first relation with the rule: its entity is that of a row of the join
    private: tuple[int, ...]  # relations with the rule
    change: int
    domains: tuple[tuple[Value | None, ...], ...] | None  # keys of each group output; None: those that enough have
    numbers: tuple[Number, ...]

    @property
    def entity(self) -> tuple[str, ...]:
        return _rulers(self.contract, self.query, self.anchor)[0].rule.entity

    @property
    def share(self) -> float:
        """Epsilon of one number."""
        return self.epsilon / len(self.numbers)

    def column(self, ref: Ref) -> Column:
        found = self.contract.tables[self.query.relations[ref.relation].sources[0]].column(ref.column)
        assert found is not None
        return found

    def shift(self, number: Number) -> int:
        """Values are multiplied by 2**shift and rounded to whole numbers."""
        if number.kind not in ("sum", "centred", "squares"):
            return 0
        assert number.ref is not None
        low, high = self.column(number.ref).clamp
        size = max(abs(low), abs(high)) if number.kind == "sum" else (high - low) / 2
        return BITS - frexp(size)[1]

    def most(self, number: Number) -> int:
        """What one row adds to the number at most, or takes from it."""
        if number.kind not in ("sum", "centred", "squares"):
            return 1
        assert number.ref is not None
        low, high = self.column(number.ref).clamp
        if number.kind == "sum":
            return ceil(max(abs(low), abs(high)) * 2.0 ** self.shift(number))
        half = ceil((high - low) / 2 * 2.0 ** self.shift(number)) + 1
        return half if number.kind == "centred" else (half * half >> BITS) + 1

    def scale(self, number: Number) -> float:
        """Of the noise; a hair more, so that no rounding makes it too small."""
        return self.change * self.most(number) / self.share * (1 + 2.0**-30)


def is_noise(contract: Contract) -> bool:
    return any(table.rule.kind == "noise" for table in contract.tables)


def needed(aggregate: Aggregate) -> tuple[Number, ...]:
    """What an output is made of."""
    ref = aggregate.ref
    kinds: dict[str, tuple[Kind, ...]] = {
        "rows": ("rows",),
        "count": ("count",),
        "count_distinct": ("distinct",),
        "sum": ("sum",),
        "avg": ("centred", "count"),
        "variance": ("squares", "centred", "count"),
        "quantile": ("histogram",),
    }
    return tuple(Number(kind, ref) for kind in kinds[aggregate.function])


def plan(contract: Contract, query: Query) -> Plan:
    """Raises ContractError: what the rule forbids, and the remedy."""
    if contract.enclave.image != IMAGE:
        raise ContractError("enclave.image", expected=f"{IMAGE}: no other adds noise", got=contract.enclave.image)
    noisy = [table for table in contract.tables if table.rule.kind == "noise"]
    if limited := next((table for table in contract.tables if table.rule.kind == "aggregate"), None):
        raise ContractError(
            f"{limited.owner}'s rule for {limited.name} is aggregate, and {noisy[0].owner}'s for {noisy[0].name} "
            f"noise: groups that show because they have k entities would tell of single rows",
            expected="noise, the stricter one, of both; or exact",
        )
    private = tuple(i for i in range(len(query.relations)) if _rulers(contract, query, i))
    if not private:
        raise ContractError(f"query: it does not use {noisy[0].name}, whose rule is noise", expected="a table less")
    _check_joins(contract, query, private)
    aggregates = [output.item for output in query.outputs if isinstance(output.item, Aggregate)]
    if not aggregates:
        raise ContractError("query", expected="at least one aggregate, such as count(*)")
    delta = min(table.rule.delta for table in noisy)
    domains = _domains(contract, query, delta)
    numbers = {number: None for aggregate in aggregates for number in needed(aggregate)}
    if domains is None:
        numbers = {Number("rows"): None} | numbers
    outer = any(join.outer and join.right in private for join in query.joins)
    several = len(private) > 1 and any(len(query.relations[relation].sources) > 1 for relation in private)
    rows = min(table.rule.rows for table in noisy)
    made = Plan(
        contract=contract,
        query=query,
        epsilon=min(table.rule.epsilon for table in noisy),
        delta=delta,
        rows=rows,
        anchor=private[0],
        private=private,
        change=rows * (2 if outer or several else 1),
        domains=domains,
        numbers=tuple(numbers),
    )
    _check_numbers(made)
    return made


def _rulers(contract: Contract, query: Query, relation: int) -> list[Table]:
    tables = (contract.tables[source] for source in query.relations[relation].sources)
    return [table for table in tables if table.rule.kind == "noise"]


def _check_joins(contract: Contract, query: Query, private: tuple[int, ...]) -> None:
    """Every row of the join is of one entity, and without that entity it would not be there."""
    units = {i: set(_rulers(contract, query, i)[0].rule.entity) for i in private}
    joined = {join.right: join for join in query.joins}
    if private[0] in joined and joined[private[0]].outer:
        raise ContractError(
            f"query: LEFT JOIN {query.relations[private[0]].name}: rows without a partner would tell who is missing",
            expected="JOIN, or the table with the rule of noise first",
        )
    for right in private[1:]:
        join, name = joined[right], query.relations[right].name
        left_keys, right_keys = {a for a, _ in join.keys}, {b for _, b in join.keys}
        same = join.left in units and left_keys == units[join.left] and right_keys == units[right]
        if not same or not units[right] or len(join.keys) != len(right_keys):
            raise ContractError(
                f"query: the join with {name}: both sides may have the rule of noise",
                expected="tables with that rule joined with each other, on all columns of the entity of both",
            )


def _check_numbers(made: Plan) -> None:
    for output in made.query.outputs:
        item = output.item
        if not isinstance(item, Aggregate) or item.ref is None or item.function in ("count", "count_distinct"):
            continue
        clamp = made.column(item.ref).clamp
        if not clamp or max(map(abs, clamp)) > CLAMP_MAX or clamp[1] - clamp[0] < 1 / CLAMP_MAX:
            raise ContractError(
                f"query: {output.name}: {item.ref.column} has no usable clamp",
                expected=f"clamp = [low, high] of every owner, within ±{CLAMP_MAX:g}: noise hides such values",
            )
    names = result_names(made.query)
    if len({name.lower() for name in names}) != len(names) or any(len(name) > 64 for name in names):
        raise ContractError(
            "query: outputs", expected="names that stay different and short with _low and _high behind them"
        )
    each = sum(CELLS if number.kind == "histogram" else 1 for number in made.numbers)
    if made.domains is not None and prod(map(len, made.domains)) * each > NUMBERS_MAX:
        raise ContractError("query: groups times outputs", expected=f"at most {NUMBERS_MAX:,} numbers; group by less")


def _domains(contract: Contract, query: Query, delta: float) -> tuple[tuple[Value | None, ...], ...] | None:
    """All keys that there may be, known without the data; or None, where a threshold finds them."""
    domains = []
    for output in query.outputs:
        if not isinstance(output.item, Group):
            continue
        domain = _domain(contract, query, output.item)
        if domain is None and delta:
            return None
        if domain is None:
            raise ContractError(
                f"query: {output.name}: that a group is there at all would tell of single rows",
                expected=f"{output.name} IN (…) in WHERE, bucket({output.item.ref.column}), or a delta of every owner",
            )
        domains.append(domain)
    return tuple(domains)


def _domain(contract: Contract, query: Query, group: Group) -> tuple[Value | None, ...] | None:
    for condition in query.filters:
        if condition.item == group and condition.operator in ("=", "IN"):
            return tuple(dict.fromkeys(condition.values))
    if group.edges:
        return (*range(len(labels(group.edges))), None)
    described = contract.tables[query.relations[group.ref.relation].sources[0]].column(group.ref.column)
    assert described is not None
    return (False, True, None) if described.type == "bool" else None


def result_names(query: Query) -> list[str]:
    """Every aggregate has its error bars behind it."""
    names = []
    for output in query.outputs:
        names.append(output.name)
        if isinstance(output.item, Aggregate):
            names += [f"{output.name}_low", f"{output.name}_high"]
    return names


# what mpc check prints


def check_noise(contract: Contract, query: Query) -> Disclosure:
    """Raises ContractError."""
    made = plan(contract, query)
    columns = []
    for output in query.outputs:
        columns.append((output.name, _why(made, output.item)))
        if isinstance(output.item, Aggregate):
            words = "where 95 of 100 times the number without noise lies"
            columns.append((f"{output.name}_low, {output.name}_high", words))
    return Disclosure(tuple(columns), tuple(_rules(made)), contract.recipients, tuple(_warnings(made)))


def _why(made: Plan, item: Group | Aggregate) -> str:
    words = {"count_distinct": "number of distinct values", "sum": "sum", "avg": "average", "count": "number of values"}
    words |= {"rows": "number of rows", "variance": "variance"}
    if item.ref is None:
        return f"number of rows, and noise ({_noise(made, Number('rows'))})"
    table = made.contract.tables[made.query.relations[item.ref.relation].sources[0]]
    name = f"{table.name}.{item.ref.column}"
    if isinstance(item, Group):
        if made.domains is None:
            return f"groups by {name}; a group shows if its number of rows, with noise, is far enough from one entity's"
        return f"groups by {name}: all keys that the query or the owner names show, whether there are rows or not"
    what = f"quantile {item.fraction:g}" if item.function == "quantile" else words[item.function]
    clamp = made.column(item.ref).clamp if item.function not in ("count", "count_distinct") else ()
    moved = f", each first moved into {list(clamp)}" if clamp else ""
    noise = "; ".join(f"of its {_noise(made, number)}" for number in needed(item))
    return f"{what} of {name}{moved}, and noise ({noise})"


def _noise(made: Plan, number: Number) -> str:
    size = made.scale(number) * 2.0 ** -made.shift(number)
    if number.kind == "squares":
        size = made.scale(number) * 2.0 ** (BITS - 2 * made.shift(number))
    words = {"rows": "count", "centred": "sum", "squares": "sum of squares", "histogram": "64 counts"}
    return f"{words.get(number.kind, number.kind)}: standard deviation {size * 2**0.5:.3g}"


def _rules(made: Plan) -> list[str]:
    rules = []
    for table in made.contract.tables:
        if table.rule.kind == "exact":
            rules.append(
                f"{table.name} of {table.owner}: the query is agreed by its text, and gets noise for the others"
            )
            continue
        entity = f"each {', '.join(table.rule.entity)}" if table.rule.entity else "each row"
        rules.append(
            f"{table.name} of {table.owner}: noise. Whether {entity} is in it changes the odds of any result by "
            f"at most a factor of exp({made.epsilon:g}) = {exp(made.epsilon):.3g}"
            + (f", but for cases of probability {made.delta:g}" if made.domains is None else "")
            + f"; its owner's ledger is charged epsilon {table.rule.epsilon:g}, delta {table.rule.delta:g} for every "
            f"enclave that gets the table, and gives nothing back"
        )
    rules.append(
        f"the strictest rule holds for all: epsilon {made.epsilon:g}, {made.rows} row(s) of an entity, delta "
        f"{made.delta:g}; {len(made.numbers)} numbers of a group share epsilon, {made.share:.3g} each"
    )
    rules.append(
        f"of an entity with more than {made.rows} row(s) in the join, {made.rows} of them count, chosen by a hash"
    )
    return rules


def _warnings(made: Plan) -> list[str]:
    told = []
    for table in made.contract.tables:
        if table.rule.kind != "noise":
            continue
        if table.rule.epsilon > 3:
            told.append(f"{table.name} of {table.owner}: epsilon {table.rule.epsilon:g} hides little; 1 is usual")
        if not table.rule.entity:
            told.append(f"{table.name} of {table.owner}: each row is hidden, not who has several")
    if made.contract.epochs_max > 1:
        most = made.contract.epochs_max
        told.append(f"epochs: {most} enclaves may get the tables, one after another died, and each is charged for")
    told.append("the error bars are of the noise alone: not of what a clamp, or the limit of rows, leaves out")
    return told
