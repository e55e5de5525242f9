"""Regression: what R says of well-known data, what brute force says of any, and what k keeps back."""

import math
import random
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import EXACT, Rows, aggregate, column, table
from joint_programs import agreed, results, told

from enclave_runtime.programs import ProgramRefused, regression
from enclave_runtime.programs.regression_fit import Moments, linear
from mpc.protocol.contract import Contract, Rule
from mpc.protocol.errors import ContractError

# The data set mtcars of R: miles per gallon, horsepower, weight in 1000 lbs, manual gearbox.
# Source: Henderson and Velleman, Building multiple regression models interactively, 1981.
CARS = """21.0 110 2.620 1|21.0 110 2.875 1|22.8 93 2.320 1|21.4 110 3.215 0|18.7 175 3.440 0|18.1 105 3.460 0
14.3 245 3.570 0|24.4 62 3.190 0|22.8 95 3.150 0|19.2 123 3.440 0|17.8 123 3.440 0|16.4 180 4.070 0|17.3 180 3.730 0
15.2 180 3.780 0|10.4 205 5.250 0|10.4 215 5.424 0|14.7 230 5.345 0|32.4 66 2.200 1|30.4 52 1.615 1|33.9 65 1.835 1
21.5 97 2.465 0|15.5 150 3.520 0|15.2 150 3.435 0|13.3 245 3.840 0|19.2 175 3.845 0|27.3 66 1.935 1|26.0 91 2.140 1
30.4 113 1.513 1|15.8 264 3.170 1|19.7 175 2.770 1|15.0 335 3.570 1|21.4 109 2.780 1"""


def cars() -> Rows:
    lines = [line.split() for line in CARS.replace("\n", "|").split("|")]
    return [{"mpg": float(a), "hp": int(b), "wt": float(c), "am": d == "1"} for a, b, c, d in lines]


def driven(
    *rules: Rule, target: str = "mpg", features: Any = ("wt", "hp"), model: str = "linear", **more: Any
) -> Contract:
    tables = [
        table(
            "cars",
            f"owner{i}",
            rule,
            column("mpg", "double", "regression", clamp=[0, 50]),
            column("hp", "int64", "regression", clamp=[0, 500]),
            column("wt", "double", "regression", clamp=[0, 10]),
            column("am", "bool", "regression"),
            column("name", "string", "regression"),
            column("hidden", "double", clamp=[0, 1]),
            column("open", "double", "regression"),
        )
        for i, rule in enumerate(rules)
    ]
    options = {name: more.pop(name) for name in ("cpus",) if name in more}
    given = {"table": "cars", "model": model, "target": target, "features": list(features), "ridge": 0.0} | more
    return agreed("regression", tables, given, **options)


def fit(described: Contract, *rows: Rows) -> dict[str, tuple[float | None, float | None]]:
    return {row["term"]: (row["value"], row["standard_error"]) for row in told(described, *rows)}


def test_linear_as_r_fits_it() -> None:
    found = fit(driven(EXACT, EXACT), cars()[:20], cars()[20:])
    assert found["(intercept)"] == pytest.approx((37.22727, 1.59879), rel=1e-5)
    assert found["wt"] == pytest.approx((-3.87783, 0.63273), rel=1e-5)
    assert found["hp"] == pytest.approx((-0.03177, 0.00903), rel=1e-3)
    assert found["(r_squared)"][0] == pytest.approx(0.8268, abs=5e-5)
    assert found["(rows)"] == (32.0, None)


def test_logistic_as_r_fits_it() -> None:
    found = fit(driven(EXACT, target="am", features=["wt"], model="logistic"), cars())
    assert found["(intercept)"] == pytest.approx((12.040, 4.510), abs=5e-4)
    assert found["wt"] == pytest.approx((-4.024, 1.436), abs=1e-3)  # R stops earlier
    assert found["(r_squared)"][0] == pytest.approx(1 - 19.176 / 43.230, abs=5e-5)  # by the two deviances


def solve(matrix: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """By elimination, exactly."""
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(j for j in range(i, len(rows)) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.integers(-9, 9)] * 3), min_size=5, max_size=30),
    ridge=st.sampled_from([0.0, 0.5, 20.0]),
)
def test_least_squares_are_least(rows: list[tuple[int, int, int]], ridge: float) -> None:
    full = [(1, *row[:2]) for row in rows]
    products = tuple(tuple(sum(r[i] * r[j] for r in rows) for j in range(3)) for i in range(3))
    found = linear(Moments(len(rows), tuple(sum(r[i] for r in rows) for i in range(3)), products, (0, 0, 0)), ridge)
    normal = [[Fraction(sum(r[i] * r[j] for r in full)) for j in range(3)] for i in range(3)]
    plain = [list(line) for line in normal]
    for i in (1, 2):
        normal[i][i] += Fraction(ridge)
    right = [Fraction(sum(f[i] * r[2] for f, r in zip(full, rows, strict=True))) for i in range(3)]
    if None in found.values:
        with pytest.raises(StopIteration):  # singular without the penalty
            solve(plain, right)
        return
    slopes = solve(normal, right)
    assert found.values == pytest.approx([float(value) for value in slopes], rel=1e-9, abs=1e-9)
    residual = sum(
        (r[2] - sum(a * b for a, b in zip(f, slopes, strict=True))) ** 2 for f, r in zip(full, rows, strict=True)
    )
    units = [[Fraction(i == j) for j in range(3)] for i in range(3)]
    inverse = [solve(normal, unit) for unit in units]
    for i in range(3):
        if ridge == 0 and len(rows) > 3:
            expected = math.sqrt(residual / (len(rows) - 3) * inverse[i][i])
            assert found.errors[i] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    total = sum((r[2] - Fraction(sum(r[2] for r in rows), len(rows))) ** 2 for r in rows)
    assert found.r_squared == (None if not total else pytest.approx(float(1 - residual / total), abs=1e-9))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), ridge=st.sampled_from([0.0, 3.0]))
def test_a_logistic_fit_leaves_no_slope(seed: int, ridge: float) -> None:
    """At the maximum of the likelihood the gradient is zero; the errors are those of the curvature there."""
    chance = random.Random(seed)
    rows = [{"hp": chance.randrange(500), "wt": chance.uniform(0, 10)} for _ in range(80)]
    for row in rows:
        row["am"] = chance.random() < 1 / (1 + math.exp(2 - row["hp"] / 100 - row["wt"] / 10))
    found = fit(driven(EXACT, target="am", features=["hp", "wt"], model="logistic", ridge=ridge), rows)
    slopes = [found[term][0] or 0.0 for term in ("(intercept)", "hp", "wt")]
    full = [(1.0, row["hp"], row["wt"]) for row in rows]
    expected = [1 / (1 + math.exp(-sum(a * b for a, b in zip(slopes, f, strict=True)))) for f in full]
    for i, penalty in enumerate([0.0, ridge, ridge]):
        gradient = sum((row["am"] - p) * f[i] for row, p, f in zip(rows, expected, full, strict=True))
        assert gradient - penalty * slopes[i] == pytest.approx(0, abs=1e-6)
    if ridge == 0:
        weights = [p * (1 - p) for p in expected]
        curvature = [
            [Fraction(sum(w * f[i] * f[j] for w, f in zip(weights, full, strict=True))) for j in range(3)]
            for i in range(3)
        ]
        for i, term in enumerate(("(intercept)", "hp", "wt")):
            variance = solve(curvature, [Fraction(i == j) for j in range(3)])[i]
            assert found[term][1] == pytest.approx(math.sqrt(variance), rel=1e-8)


def test_as_many_features_as_there_may_be() -> None:
    chance = random.Random(3)
    columns = [column(f"x{i}", "double", "regression", clamp=[-9, 9]) for i in range(32)]
    described = table("t", "owner", aggregate(5), *columns, column("y", "bool", "regression"))
    rows = [{c.name: chance.gauss(0, 1) for c in columns} | {"y": chance.random() < 0.4} for _ in range(1500)]
    for model in ("linear", "logistic"):
        given = {"table": "t", "model": model, "target": "y", "features": [c.name for c in columns], "ridge": 0.0}
        found = told(agreed("regression", [described], given), rows)
        assert len(found) == 35
        assert all(row["value"] is not None for row in found)


def nothing(found: dict[str, tuple[float | None, float | None]]) -> bool:
    return all(value is None and error is None for value, error in found.values())


def test_columns_that_others_determine_have_no_coefficient() -> None:
    rows = [{"mpg": float(i % 7), "hp": i, "wt": 0.1 * i, "am": True} for i in range(30)]
    found = fit(driven(EXACT, features=["hp", "wt", "am"]), rows)
    assert found["wt"] == found["am"] == (None, None)
    assert {"hp": found["hp"]} == {"hp": fit(driven(EXACT, features=["hp"]), rows)["hp"]}
    ridged = fit(driven(EXACT, features=["hp", "wt"], ridge=1.0), rows)
    assert ridged["wt"] != (None, None) or ridged["hp"] != (None, None)
    logistic = [{**row, "am": i % 3 == 0} for i, row in enumerate(rows)]
    assert fit(driven(EXACT, features=["hp", "wt"], target="am", model="logistic"), logistic)["wt"] == (None, None)


def test_few_rows() -> None:
    assert nothing(fit(driven(EXACT), []))
    assert nothing(fit(driven(EXACT), [{"mpg": 1.0, "hp": 1, "wt": None}]))  # a row without a value does not count
    one = fit(driven(EXACT), [{"mpg": 1.5, "hp": 1, "wt": 2.0}])
    assert (one["(intercept)"], one["wt"], one["(rows)"]) == ((1.5, None), (None, None), (1.0, None))
    two = fit(driven(EXACT, features=["hp"]), [{"mpg": 1.0, "hp": 1}, {"mpg": 3.0, "hp": 2}])
    assert (two["hp"], two["(intercept)"]) == ((2.0, None), (-1.0, None))  # no row is left to tell an error by


def test_a_target_that_a_feature_tells_has_no_finite_answer_without_ridge() -> None:
    rows = [{"hp": i, "am": i >= 15} for i in range(30)]
    given = {"target": "am", "features": ["hp"], "model": "logistic"}
    assert nothing(fit(driven(EXACT, **given), rows))
    assert not nothing(fit(driven(EXACT, **given, ridge=1.0), rows))
    assert nothing(fit(driven(EXACT, **given), [{"hp": i, "am": True} for i in range(30)]))


def test_rows_in_another_order_on_more_threads_give_the_same_bytes() -> None:
    chance = random.Random(7)
    rows = [
        {"mpg": chance.uniform(0, 50), "hp": i % 300, "wt": chance.uniform(0, 10), "am": i % 3 == 0}
        for i in range(4000)
    ]
    for more in ({}, {"target": "am", "model": "logistic"}):
        one = driven(aggregate(5), aggregate(5), **more)
        two = replace(one, enclave=replace(one.enclave, cpus=2))
        assert results(one, rows[:3000], rows[3000:]) == results(two, rows[2999::-1], rows[:2999:-1])
        assert not nothing(fit(one, rows[:3000], rows[3000:]))


# k


def steady(count: int = 100) -> list[dict[str, Any]]:
    return [{"mpg": 20 + i % 5, "hp": i % 10, "wt": float(i % 7), "am": False, "name": f"n{i}"} for i in range(count)]


@pytest.mark.parametrize("k", [2, 5, 10])
def test_a_feature_that_singles_out_fewer_than_k_is_refused(k: int) -> None:
    """A column that is 1 for one row: its coefficient would be that row's target, less what the others say."""
    described = driven(aggregate(k), features=["am"])
    for single in (1, k - 1):
        assert nothing(fit(described, [{**row, "am": i < single} for i, row in enumerate(steady())]))
    assert not nothing(fit(described, [{**row, "am": i < k} for i, row in enumerate(steady())]))
    assert nothing(fit(described, [{**row, "am": i >= k - 1} for i, row in enumerate(steady())]))


def test_a_far_value_that_bends_the_fit_to_itself_is_refused() -> None:
    far = [*steady(), {"mpg": 49.0, "hp": 500, "wt": 3.0}]
    assert nothing(fit(driven(aggregate(5), features=["hp"]), far))
    assert not nothing(fit(driven(EXACT, features=["hp"]), far))


def test_two_features_whose_difference_singles_out_are_refused() -> None:
    rows = steady()
    for i, row in enumerate(rows):
        row["am"] = i % 2 == 0
        row["hp"] = int(row["am"]) + (i == 1)
    assert nothing(fit(driven(aggregate(5), features=["am", "hp"]), rows))
    assert not nothing(fit(driven(aggregate(5), features=["am"]), rows))


def test_each_owner_is_judged_by_its_own_rows() -> None:
    """Six of each owner are in the column, twelve together: either owner knows its own six."""
    described = driven(aggregate(10), aggregate(10), features=["am"])
    six = [{**row, "am": i < 6} for i, row in enumerate(steady())]
    ten = [{**row, "am": i < 10} for i, row in enumerate(steady())]
    assert nothing(fit(described, six, six))
    assert nothing(fit(described, ten, six))
    assert not nothing(fit(described, ten, ten))
    assert not nothing(fit(described, ten, steady()))  # none is none
    assert not nothing(fit(described, ten, []))
    assert nothing(fit(described, ten, steady(9)))


def test_another_owner_s_far_rows_do_not_hide_the_near_ones() -> None:
    near = [{**row, "hp": i % 10} for i, row in enumerate(steady())]
    far = [{**row, "hp": 50 * (i % 10)} for i, row in enumerate(steady())]
    assert not nothing(fit(driven(aggregate(10), aggregate(10), features=["hp"]), near, far))


def test_rows_of_one_entity_pull_together() -> None:
    described = driven(aggregate(5, "name"), features=["am"])
    rows = [{**row, "am": i < 20, "name": f"n{i}" if i >= 20 else f"n{i % 4}"} for i, row in enumerate(steady())]
    assert nothing(fit(described, rows))
    assert not nothing(fit(described, [{**row, "name": f"n{i}"} for i, row in enumerate(rows)]))


def test_a_target_that_is_true_of_fewer_than_k_is_refused() -> None:
    given = {"target": "am", "features": ["wt"], "model": "logistic", "ridge": 1.0}
    rows = [{**row, "am": i % 33 == 0} for i, row in enumerate(steady())]  # four
    assert nothing(fit(driven(aggregate(5), **given), rows))
    assert not nothing(fit(driven(aggregate(4), **given), rows))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 50)), max_size=40), k=st.integers(2, 4))
def test_no_row_shows_through_a_fit(rows: list[tuple[int, bool, int]], k: int) -> None:
    """Where a fit shows, k or more rows share every value of a feature that tells groups apart."""
    described = driven(aggregate(k), features=["am"])
    given_rows = [{"am": am, "mpg": float(mpg)} for _, am, mpg in rows]
    counts = [sum(row["am"] is value for row in given_rows) for value in (True, False)]
    shown = not nothing(fit(described, given_rows))
    assert shown == (len(rows) >= k and all(count in (0, *range(k, 99)) for count in counts))


AGG = aggregate(5)
REFUSED: list[tuple[Contract, str]] = [
    (driven(AGG, table="car"), r"program\.parameters\.table: no table 'car' in the contract: expected one of cars"),
    (driven(AGG, features=["weight"]), r"features\[0\]: table cars has no column 'weight': expected one of mpg"),
    (
        driven(AGG, features=["name"]),
        r"features\[0\]: cars\.name: expected a column of int64 or double or bool, got string",
    ),
    (driven(AGG, features=["wt", "hidden"]), r"features\[1\]: owner0 does not allow regression of cars\.hidden"),
    (driven(EXACT, features=["open"]), r"features\[0\]: cars\.open has no clamp"),
    (driven(AGG, features=["mpg"]), r"target: expected each column once, the target not among the features, got mpg"),
    (driven(AGG, features=["wt", "wt"]), r"features\[1\]: expected each column once"),
    (driven(AGG, features=[]), r"program\.parameters\.features: expected 1 to 32 long; for example features = "),
    (driven(AGG, model="probit"), r"program\.parameters\.model: expected one of \('linear', 'logistic'\); for example"),
    (driven(AGG, model="logistic"), r"target: cars\.mpg: expected a column of bool for model = .*, got double"),
    (driven(AGG, ridge=1), r"ridge: expected a number with a point; for example ridge = 0\.0.*, got a whole number"),
    (driven(AGG, ridge=-1.0), r"program\.parameters\.ridge: expected 0\.0 to 1e\+30, got -1\.0"),
    (driven(AGG, rigde=1.0), r"program\.parameters: 'rigde' is none of this program's: expected table, model, target"),
]


@pytest.mark.parametrize(("described", "words"), REFUSED)
def test_is_refused(described: Contract, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        regression.check(described)
    with pytest.raises(ProgramRefused) as refused:
        regression.run(described, [])
    assert refused.value.code == "query"


def test_what_people_read() -> None:
    shown = regression.check(
        driven(aggregate(5, "name"), EXACT, target="am", features=["wt"], model="logistic", ridge=2.0)
    )
    text = " ".join([*(f"{name}: {why}" for name, why in shown.columns), *shown.rules, *shown.warnings])
    for words in (
        "coefficients of the logistic regression of cars.am on cars.wt (moved into 0 to 10), with 2 times the squares",
        "owner0 allows regression, owner1 agreed to the program",
        "no name may pull a fit of these rows alone by more than 1/5 (its leverage)",
        "am is true, and false, for none or at least 5",
        "otherwise nothing is shown: every value is null",
    ):
        assert words in text, words
