"""Statistics: what Python's own module says of the rows that count, and what k keeps back."""

import statistics as oracle
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import EXACT, Rows, aggregate, arrow, column, stream, table
from joint_programs import agreed, results, told

from enclave_runtime.programs import ProgramRefused, inputs, statistics
from enclave_runtime.programs.sql_query import labels
from mpc.protocol.contract import Contract, Rule, Use
from mpc.protocol.errors import ContractError

USES: tuple[Use, ...] = ("avg", "variance", "correlation", "group")
EDGES = [18, 40.5, 65]
COST = [-50, 1000]


def claims(
    *rules: Rule, group_by: Any = (), measures: Any = ("count",), recipient: str = "analyst", **more: Any
) -> Contract:
    tables = [
        table(
            "claims",
            f"owner{i}",
            rule,
            column("person", "int64"),
            column("region", "string", "group"),
            column("age", "int64", *USES, buckets=EDGES, clamp=[0, 120]),
            column("cost", "double", *USES, clamp=COST),
            column("days", "int64", "avg", clamp=[0, 2**45]),
            column("note", "string"),
            column("secret", "double", clamp=[0, 1]),
            column("open", "double", *USES),
        )
        for i, rule in enumerate(rules)
    ]
    given = {"table": "claims", "group_by": list(group_by), "measures": list(measures)} | more
    return agreed("statistics", tables, given, recipient)


def row(
    person: int = 0, region: str | None = "n", age: int | None = 30, cost: float | None = 1.0, **more: Any
) -> dict[str, Any]:
    return {"person": person, "region": region, "age": age, "cost": cost, **more}


def test_the_measures_of_all_rows() -> None:
    rows = [row(cost=c, age=a) for c, a in ((0.1, 20), (0.2, 20), (0.7, 45), (12.5, 70), (-3.25, 65))]
    measures = [
        "count",
        "mean(cost)",
        "variance(cost)",
        "correlation(age,cost)",
        "quantile(cost, .25)",
        "histogram(age)",
    ]
    (found,) = told(claims(EXACT, EXACT, measures=measures), rows[:2], rows[2:])
    costs, ages = [r["cost"] for r in rows], [r["age"] for r in rows]
    assert found["count"] == 5
    assert found["mean(cost)"] == pytest.approx(oracle.fmean(costs), rel=1e-12)
    assert found["variance(cost)"] == pytest.approx(oracle.variance(costs), rel=1e-12)
    assert found["correlation(age, cost)"] == pytest.approx(oracle.correlation(ages, costs), rel=1e-12)
    assert found["quantile(cost, 0.25)"] == pytest.approx(
        oracle.quantiles(costs, n=4, method="inclusive")[0], rel=1e-12
    )
    assert [found[f"histogram(age) {label}"] for label in labels(tuple(map(float, EDGES)))] == [0, 2, 1, 2]


def test_values_are_moved_into_the_clamp_first() -> None:
    rows = [row(cost=1e300), row(cost=-1e300), row(cost=None)]
    (found,) = told(claims(EXACT, measures=["count", "mean(cost)", "variance(cost)", "quantile(cost, 1)"]), rows)
    assert found == {"count": 2, "mean(cost)": 475.0, "variance(cost)": 1050.0**2 / 2, "quantile(cost, 1)": 1000.0}


def test_a_row_counts_where_every_measured_column_has_a_value() -> None:
    rows = [row(), row(cost=None), row(age=None), row(cost=3.0)]
    measures = ["count", "mean(cost)", "mean(age)"]
    (found,) = told(claims(EXACT, measures=measures), rows)
    assert found == {"count": 2, "mean(cost)": 2.0, "mean(age)": 30.0}


def test_what_is_not_defined_is_null() -> None:
    measures = ["mean(cost)", "variance(cost)", "correlation(age, cost)"]
    assert told(claims(EXACT, measures=measures), [row()]) == [
        {"mean(cost)": 1.0, "variance(cost)": None, "correlation(age, cost)": None}
    ]
    same = [row(cost=0.1, age=i) for i in range(3)]
    (found,) = told(claims(EXACT, measures=measures), same)
    assert (found["variance(cost)"], found["correlation(age, cost)"]) == (0.0, None)
    assert told(claims(EXACT, measures=measures), []) == []


def test_whole_numbers_are_added_exactly() -> None:
    days = [2**45 - 8 * i for i in range(3)]  # beyond 2**43, in steps of four
    (found,) = told(claims(EXACT, measures=["mean(days)"]), [row(days=d) for d in days])
    assert found["mean(days)"] == float(Fraction(sum(days), 3))
    line = [row(age=i, cost=0.5 * i) for i in range(50)]
    (found,) = told(claims(EXACT, measures=["correlation(age, cost)", "variance(age)"]), line)
    assert found == {"correlation(age, cost)": 1.0, "variance(age)": float(oracle.variance(map(Fraction, range(50))))}


def test_rows_in_another_order_on_more_threads_give_the_same_bytes() -> None:
    rows = [row(i % 90, "nsew"[i % 4], i * 7919 % 100, (i * 104729 % 1000) / 7) for i in range(5000)]
    rules = (aggregate(5, "person"), aggregate(5, "person"))
    measures = ["mean(cost)", "variance(cost)", "correlation(age, cost)", "histogram(age)"]
    one = claims(*rules, group_by=["region"], measures=measures)
    two = replace(one, enclave=replace(one.enclave, cpus=2))
    assert results(one, rows[:3000], rows[3000:]) == results(two, rows[2999::-1], rows[:2999:-1])


# k


def test_a_group_with_fewer_than_k_entities_of_an_owner_is_left_out() -> None:
    described = claims(aggregate(3, "person"), aggregate(3, "person"), group_by=["region"], measures=["count"])
    first = [row(i, "n") for i in range(9)] + [row(1, "s")] * 5 + [row(i, "e") for i in range(3)]
    second = [row(i, region) for region in "nse" for i in range(4)] + [row(i, "w") for i in range(2)]
    # s: one entity of owner0. w: two of owner1. What is left out, s and w, holds six rows and four entities of owner1,
    # but of owner0 just one: so the smallest of its groups, e, goes too.
    assert told(described, first, second) == [{"region": "n", "count": 13}]


def test_a_group_of_k_entities_is_shown_and_of_one_less_is_not() -> None:
    described = claims(aggregate(4, "person"), group_by=["region"], measures=["mean(cost)"])
    shown = [row(i, "n") for i in range(4)] + [row(i, "s") for i in range(4)]
    assert [r["region"] for r in told(described, shown)] == ["n", "s"]
    assert told(described, shown[:-1]) == []  # n would be what s and the whole differ by
    assert [r["region"] for r in told(described, [*shown, *(row(i, "e") for i in range(9))][1:])] == ["e"]


def test_rows_of_one_entity_are_one() -> None:
    many = [row(7) for _ in range(100)]
    assert told(claims(aggregate(2, "person"), measures=["count"]), many) == []
    assert told(claims(aggregate(2), measures=["count"]), many) == [{"count": 100}]


def test_rows_without_a_value_do_not_hide_others() -> None:
    """One with a cost among many without: its cost would be the mean."""
    described = claims(aggregate(3, "person"), measures=["mean(cost)", "mean(age)"])
    rows = [row(i, cost=None) for i in range(20)]
    assert told(described, [*rows, row(99, cost=5.0)]) == []
    assert told(described, [*rows, *(row(i, cost=5.0) for i in range(3))]) == [{"mean(cost)": 5.0, "mean(age)": 30.0}]


def test_a_bucket_with_fewer_than_k_entities_is_null_and_so_is_what_would_tell_it() -> None:
    described = claims(aggregate(3, "person"), group_by=["region"], measures=["count", "histogram(age)"])
    ages = [10] * 9 + [20] * 2 + [50] * 4
    (found,) = told(described, [row(i, age=a) for i, a in enumerate(ages)])
    # 20 to 40 hides, and 41 to 64, the next smallest: else the group's count would tell.
    assert list(found.values()) == ["n", 15, 9, None, None, 0]
    (found,) = told(described, [row(i, age=a) for i, a in enumerate([*ages, 70])])
    assert list(found.values()) == ["n", 16, 9, None, 4, None]  # two and one are enough for each other


@pytest.mark.parametrize("entity", [(), ("person",)])
def test_a_correlation_that_tells_of_one_entity_is_null(entity: tuple[str, ...]) -> None:
    """A column that is 1 for fewer than k: with means and variances its correlation tells the other's value there."""
    described = claims(aggregate(5, *entity), aggregate(5, *entity), measures=["correlation(age, cost)"])
    many = [row(i, age=i % 2, cost=float(i % 7)) for i in range(60)]
    for flagged, shown in ((1, False), (4, False), (5, True), (0, True)):
        other = [row(i, age=int(i < flagged), cost=float(i % 7)) for i in range(60)]
        (found,) = told(described, many, other)
        assert (found["correlation(age, cost)"] is not None) == shown, flagged
    one = [row(i if i >= 5 else 0, age=int(i < 5), cost=float(i % 7)) for i in range(60)]  # five rows of one person
    assert (told(described, many, one)[0]["correlation(age, cost)"] is None) == bool(entity)


def test_what_is_hidden_does_not_show() -> None:
    """Whatever the rows of a group that is left out hold, no byte of the result changes."""
    measures = ["count", "mean(cost)", "variance(cost)", "correlation(age, cost)", "histogram(age)"]
    described = claims(aggregate(5, "person"), group_by=["region"], measures=measures)
    shown = [row(i, "n", i % 90, float(i)) for i in range(80)]
    hidden = [
        [row(i, "s", age, cost, note="canary") for i in range(100, 104)] for age, cost in ((1, 1.0), (90, -999.0))
    ]
    rest = [row(i, "e", 5, 5.0) for i in range(200, 206)]  # goes with the four
    first, second = (results(described, [*shown, *few, *rest]) for few in hidden)
    assert first == second
    assert [one["region"] for one in told(described, [*shown, *hidden[0], *rest])] == ["n"]
    assert b"canary" not in first["analyst"]


def test_the_largest_values_do_not_overflow() -> None:
    wide = claims(EXACT, measures=["mean(cost)", "variance(cost)", "correlation(age, cost)"])
    columns = tuple(replace(c, clamp=(-1e30, 1e30)) if c.name == "cost" else c for c in wide.tables[0].columns)
    wide = replace(wide, tables=(replace(wide.tables[0], columns=columns),))
    (found,) = told(wide, [row(cost=1e308 * (-1) ** i, age=i % 2) for i in range(1000)])
    assert found["mean(cost)"] == 0
    assert found["variance(cost)"] == pytest.approx(1e60 * 1000 / 999, rel=1e-9)
    assert found["correlation(age, cost)"] == pytest.approx(-1)


def test_an_owner_without_rows_in_a_group_does_not_hide_it() -> None:
    described = claims(aggregate(2), aggregate(2), group_by=["region"], measures=["count"])
    assert told(described, [row(region="n")] * 3, [row(region=None)] * 4) == [
        {"region": "n", "count": 3},
        {"region": None, "count": 4},
    ]


def test_a_grouped_column_with_buckets_is_shown_in_these() -> None:
    described = claims(aggregate(1), group_by=["age"], measures=["count"])
    assert told(described, [row(age=17), row(age=41), row(age=42), row(age=None)]) == [
        {"age": "< 18", "count": 1},
        {"age": "[40.5, 65)", "count": 2},
        {"age": None, "count": 1},
    ]


ROWS = st.lists(
    st.tuples(
        st.integers(0, 6), st.sampled_from("abc"), st.none() | st.integers(0, 80), st.none() | st.floats(-60, 1100)
    ),
    max_size=25,
)


def entities(rows: Rows) -> int:
    return len({one["person"] for one in rows})


@settings(max_examples=80, deadline=None)
@given(parts=st.tuples(ROWS, ROWS), ks=st.tuples(st.integers(2, 4), st.integers(2, 4)))
def test_what_shows_is_right_and_rests_on_k(parts: Any, ks: tuple[int, int]) -> None:
    measures = ["count", "mean(cost)", "variance(cost)", "histogram(age)"]
    described = claims(
        *(aggregate(k, "person") for k in (ks[0] + 1, ks[1] + 1)), group_by=["region"], measures=measures
    )
    limits = [k + 1 for k in ks]
    given_rows = [[row(*one) for one in part] for part in parts]
    found = {one["region"]: one for one in told(described, *given_rows)}
    groups: dict[str, list[Rows]] = defaultdict(lambda: [[], []])
    for i, part in enumerate(given_rows):
        for one in part:
            if one["age"] is not None and one["cost"] is not None:
                groups[one["region"]][i] = [*groups[one["region"]][i], one]
    hidden = [groups[region] for region in groups if region not in found]
    for i, k in enumerate(limits):
        assert all(entities(groups[region][i]) in (0, *range(k, 99)) for region in found)
        together = [one for group in hidden for one in group[i]]
        assert entities(together) in (0, *range(k, 99)) or not any(groups[region][i] for region in found)
    if not any(0 < entities(group[i]) < k for group in groups.values() for i, k in enumerate(limits)):
        assert not hidden
    for region, shown in found.items():
        rows = [one for part in groups[region] for one in part]
        costs = [min(max(one["cost"], COST[0]), COST[1]) for one in rows]
        assert shown["count"] == len(rows)
        assert shown["mean(cost)"] == pytest.approx(oracle.fmean(costs), abs=1e-9)
        assert shown["variance(cost)"] == pytest.approx(oracle.variance(costs), rel=1e-9, abs=1e-9)
        check_histogram(shown, groups[region], limits)


def check_histogram(shown: dict[str, Any], parts: list[Rows], limits: list[int]) -> None:
    bounds = [-1, 17, 40, 64, 999]
    cells = [[[r for r in part if low < r["age"] <= high] for part in parts] for low, high in pairwise(bounds)]
    counts = [shown[f"histogram(age) {label}"] for label in labels(tuple(map(float, EDGES)))]
    for count, cell in zip(counts, cells, strict=True):
        assert count in (None, sum(map(len, cell)))
        if count is not None:
            assert all(entities(part) in (0, *range(k, 99)) for part, k in zip(cell, limits, strict=True))
    for i, k in enumerate(limits):
        left_out = [one for count, cell in zip(counts, cells, strict=True) if count is None for one in cell[i]]
        others = [one for count, cell in zip(counts, cells, strict=True) if count is not None for one in cell[i]]
        assert entities(left_out) in (0, *range(k, 99)) or not others


# what check refuses

AGG = aggregate(5, "person")
REFUSED: list[tuple[Contract, str]] = [
    (
        claims(AGG, table="claim"),
        r"program\.parameters\.table: no table 'claim' in the contract: expected one of claims",
    ),
    (
        claims(AGG, table=7),
        r"program\.parameters\.table: expected text; for example table = \"claims\", got a whole number",
    ),
    (claims(AGG, group_by=["note"]), r"group_by\[0\]: owner0 does not allow group of claims\.note: expected a use"),
    (claims(AGG, group_by=["region", "region"]), r"group_by\[1\]: expected each column once, got region"),
    (claims(AGG, measures=[]), r"program\.parameters\.measures: expected 1 to 64 long; for example measures = "),
    (claims(AGG, measures=["max(cost)"]), r"measures\[0\]: expected count, mean\(column\).*, got 'max\(cost\)'"),
    (claims(AGG, measures=["mean(cost); drop"]), r"measures\[0\]: expected count, mean"),
    (claims(AGG, measures=["quantile(cost, 1.5)"]), r"measures\[0\]: expected count"),
    (
        claims(AGG, measures=["count", "mean(costs)"]),
        r"measures\[1\]: table claims has no column 'costs': expected one of",
    ),
    (claims(AGG, measures=["mean(region)"]), r"claims\.region: expected a column of int64 or double, got string"),
    (
        claims(AGG, measures=["mean(secret)"]),
        r"owner0 does not allow avg of claims\.secret: expected a use.*\(nothing\)",
    ),
    (claims(AGG, measures=["variance(days)"]), r"owner0 does not allow variance of claims\.days"),
    (
        claims(EXACT, measures=["mean(open)"]),
        r"claims\.open has no clamp: expected clamp = \[low, high\] of all owners",
    ),
    (claims(AGG, measures=["histogram(cost)"]), r"claims\.cost has no buckets"),
    (claims(AGG, measures=["correlation(age, age)"]), r"measures\[0\]: expected two different columns"),
    (claims(AGG, measures=["mean(cost)", "mean(cost)"]), r"measures\[1\]: expected each measure once"),
    (
        claims(EXACT, AGG, measures=["quantile(cost, 0.5)"]),
        r"measures\[0\]: owner1's rule for claims is aggregate, and a quantile is one row's: expected histogram",
    ),
    (
        claims(aggregate(2), measures=["mean(cost)", "variance(cost)"]),
        r"2 numbers about 1 columns of a group of 2 can be solved for the values of owner0",
    ),
    (claims(aggregate(2, "person"), aggregate(2)), r"table: the entity of table claims: expected the same columns"),
]


@pytest.mark.parametrize(("described", "words"), REFUSED)
def test_is_refused(described: Contract, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        statistics.check(described)
    with pytest.raises(ProgramRefused) as refused:
        statistics.run(described, [])
    assert refused.value.code == "query"


def test_owners_who_clamp_or_bucket_differently_are_refused() -> None:
    for field, measure in (("clamp", "mean(age)"), ("buckets", "histogram(age)")):
        described = claims(AGG, AGG, measures=[measure])
        columns = tuple(
            replace(c, clamp=(1.0, 2.0), buckets=(1.0, 2.0)) if c.name == "age" else c
            for c in described.tables[1].columns
        )
        other = replace(described, tables=(described.tables[0], replace(described.tables[1], columns=columns)))
        with pytest.raises(ContractError, match=rf"{field} of claims\.age: expected the same for all owners"):
            statistics.check(other)


def test_a_value_that_is_no_number_is_refused_before_it_counts() -> None:
    described = claims(EXACT, measures=["mean(cost)"])
    for value in (float("nan"), float("inf")):
        sealed = stream(arrow(described.tables[0], [row(cost=value)]))
        with pytest.raises(ProgramRefused) as refused:
            inputs.open_tables(described, [sealed])
        assert refused.value.code == "input"


def test_what_people_read() -> None:
    described = claims(
        aggregate(5, "person"),
        EXACT,
        group_by=["age"],
        measures=["count", "mean(cost)", "variance(cost)"],
        recipient="owner1",
    )
    shown = statistics.check(described)
    text = " ".join([*(f"{name}: {why}" for name, why in shown.columns), *shown.rules, *shown.warnings])
    for words in (
        "age: groups by claims.age, in buckets '< 18'",
        "mean(cost): mean of claims.cost (moved into -50 to 1000): owner0 allows avg, owner1 agreed",
        "only rows count in which cost has a value",
        "owner0: every group, and every bucket of a histogram in it, rests on none or at least 5 distinct person",
        "claims of owner1: the program is agreed by its parameters",
        "owner1 contributes rows and receives the result",
        "mean and variance of 5 values can often be solved",
    ):
        assert words in text, words
