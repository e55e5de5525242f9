"""Linear and logistic regression over stacked tables, with ridge; from sums over rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, ldexp, log, sqrt
from typing import Annotated, Literal

import pyarrow as pa

from enclave_runtime.programs import Disclosure, common
from enclave_runtime.programs.common import Stack, example, exponent, guarded, read
from enclave_runtime.programs.duck import encode
from enclave_runtime.programs.regression_fit import (
    Fit,
    Matrix,
    Moments,
    dot,
    independent,
    invert,
    linear,
    sandwich,
    standardized,
)
from enclave_runtime.programs.stacked import Rows
from mpc.protocol.contract import Column, Contract
from mpc.protocol.encoding import Limit, Name, Record
from mpc.protocol.errors import ContractError

TYPES = ("int64", "double", "bool")
STEPS_MAX = 30  # of Newton's method, which needs a dozen where there is a finite answer
NEAR = 1e-6  # gain in likelihood of a step so small that rounding could make it look like a loss
PIVOT = 1e-12  # as a part of the curvature in one direction, what the others may leave of it
CONVERGED = 1e-18  # what is left to gain, as a part of the likelihood
DIGITS = 12  # of a logistic fit: the last ones of an exponential depend on the processor
_SUM_BITS = 56  # of a term made whole; 2**60 of them are below 2**127


@dataclass(frozen=True)
class Parameters(Record):
    table: Name = field(metadata=example('"patients"'))
    model: Literal["linear", "logistic"] = field(metadata=example('"linear", or "logistic"'))
    target: Name = field(metadata=example('"days_in_hospital"'))
    features: Annotated[tuple[Name, ...], Limit(1, 32)] = field(metadata=example('["age", "smoker"]'))
    ridge: float = field(metadata=example("0.0, or the weight of the squares of the coefficients"))


@dataclass(frozen=True)
class Plan:
    stack: Stack
    columns: tuple[Column, ...]  # features, then the target
    logistic: bool
    ridge: float


def warm() -> None:
    """Nothing that sql does not load."""


def check(contract: Contract) -> Disclosure:
    """Raises ContractError."""
    plan = _plan(contract)
    stack, (*features, target) = plan.stack, plan.columns
    kind = "logistic" if plan.logistic else "linear"
    penalty = f", with {plan.ridge:g} times the squares of the coefficients added" if plan.ridge else ""
    on = ", ".join(common.shown(stack, column) for column in features)
    allowed = common.allowing(stack, "regression")
    columns = [
        ("term", "(intercept), each feature, (r_squared), (rows)"),
        (
            "value",
            f"coefficients of the {kind} regression of {common.shown(stack, target)} on {on}{penalty}: {allowed}",
        ),
        ("standard_error", "of each coefficient"),
    ]
    rules = [f"only rows count in which {', '.join(column.name for column in plan.columns)} all have a value"]
    for table in stack.tables:
        if table.rule.kind == "exact":
            rules.append(common.exactly(table))
            continue
        k, whose = table.rule.k, " and ".join(table.rule.entity) or "row"
        rule = f"no {whose} may pull a fit of these rows alone by more than 1/{k} (its leverage)"
        if target.type == "bool":
            rule += f", and {target.name} is true, and false, for none or at least {k}"
        rules.append(f"{table.name} of {table.owner}: {rule}; otherwise nothing is shown: every value is null")
    return Disclosure(tuple(columns), tuple(rules), contract.recipients, tuple(common.warnings(contract, stack.tables)))


def run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    """Returns: recipient → a row for each term, the same for all. Raises ProgramRefused."""
    return guarded(contract, lambda: dict.fromkeys(contract.recipients, _run(_plan(contract), tables)))


def _plan(contract: Contract) -> Plan:
    given = read(contract, Parameters)
    stack = common.stack(contract, "program.parameters.table", given.table)
    places = [f"program.parameters.features[{i}]" for i in range(len(given.features))]
    columns = []
    logistic = given.model == "logistic"
    for place, name in zip([*places, "program.parameters.target"], [*given.features, given.target], strict=True):
        column = stack.column(place, name, TYPES, "regression")
        stack.clamped(place, column)
        if column in columns:
            raise ContractError(place, expected="each column once, the target not among the features", got=name)
        columns.append(column)
    if logistic and columns[-1].type != "bool":
        raise ContractError(
            f"program.parameters.target: {stack.name}.{given.target}",
            expected='a column of bool for model = "logistic", or model = "linear"',
            got=columns[-1].type,
        )
    if not 0 <= given.ridge <= common.CLAMP_MAX:
        raise ContractError("program.parameters.ridge", expected=f"0.0 to {common.CLAMP_MAX:g}", got=given.ridge)
    return Plan(stack, tuple(columns), logistic, given.ridge)


def _run(plan: Plan, tables: Sequence[pa.Table]) -> bytes:
    rows = Rows(plan.stack, tables, [(column, "w") for column in plan.columns], kept=True)
    owners = _moments(rows, plan)
    fit = None
    if owners and _protected(rows, plan, owners):
        first, *others = owners.values()
        moments = sum(others, start=first)
        fit = _logistic(rows, plan, moments) if plan.logistic else linear(moments, plan.ridge)
        count: int | None = moments.n
    if fit is None or not all(isfinite(v) for v in (*fit.values, *fit.errors) if v is not None):
        fit, count = Fit((None,) * len(plan.columns), (None,) * len(plan.columns), None), None
    names = ["(intercept)", *(column.name for column in plan.columns[:-1]), "(r_squared)", "(rows)"]
    values = [*fit.values, fit.r_squared, None if count is None else float(count)]
    digits = (lambda v: None if v is None else float(f"{v:.{DIGITS}g}")) if plan.logistic else (lambda v: v)
    columns = [[digits(v) for v in values], [*(digits(v) for v in fit.errors), None, None]]
    return encode(
        ["term", "value", "standard_error"], [pa.array(names), *(pa.array(column, pa.float64()) for column in columns)]
    )


def _moments(rows: Rows, plan: Plan) -> dict[int, Moments]:
    """Of each owner that has rows: the contract's table → its sums."""
    count = len(plan.columns)
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    wanted = [f"sum(w{i})" for i in range(count)] + [f"sum(w{i}::HUGEINT * w{j})" for i, j in pairs]
    query = f"SELECT source, count(*), {', '.join(wanted)} FROM counted GROUP BY source ORDER BY source"
    exponents = tuple(exponent(column) for column in plan.columns)
    found = {}
    for source, n, *sums in rows.execute(query).fetchall():
        both = dict(zip(pairs, sums[count:], strict=True))
        products = tuple(tuple(both[max(i, j), min(i, j)] for j in range(count)) for i in range(count))
        found[source] = Moments(n, tuple(sums[:count]), products, exponents)
    return found


# protection


def _protected(rows: Rows, plan: Plan, owners: dict[int, Moments]) -> bool:
    """Whether all of every limited owner's entities are hidden among enough others of it."""
    target = len(plan.columns) - 1
    if plan.columns[target].type == "bool":
        rows.hide("0", f"w{target}")
        if rows.execute("FROM hidden LIMIT 1").fetchall():
            return False
    limits = {source: plan.stack.contract.tables[source].rule.k for source in owners}
    return all(_leverage(rows, plan, s, m) <= (1 + 1e-6) / limits[s] for s, m in owners.items() if limits[s])


def _leverage(rows: Rows, plan: Plan, source: int, moments: Moments) -> float:
    """The largest part that one entity has in the fit of its owner's rows alone: of its rows together.

    A column that is 1 for m rows and 0 for the rest gives each of these 1/m or more. Source: Hoaglin and Welsch 1978.
    """
    features = len(plan.columns) - 1
    kept, inverse = independent(moments, features)
    _, scales = standardized(moments, features)
    values = [
        f"(w{i} - {_literal(moments.sums[i] / moments.n)}) / {_literal(ldexp(scales[i], moments.exponents[i]))} AS z{i}"
        for i in kept
    ]
    terms = []  # one for each row of the matrix: the engine limits how deep a sum may be
    for a, i in enumerate(kept):
        terms.append(f"z{i} * ({' + '.join(f'{_literal(inverse[a][b])} * z{j}' for b, j in enumerate(kept))})")
    leverage = f"CAST(({' + '.join([_literal(1 / moments.n), *terms])}) * {2**40} AS BIGINT)"
    ((most,),) = rows.execute(f"""
        SELECT max(leverage) FROM (
            SELECT {"sum" if plan.stack.entity else "max"}({leverage}) AS leverage
            FROM (SELECT {", ".join(["entity", *values])} FROM counted WHERE source = {source})
            GROUP BY {"entity" if plan.stack.entity else "()"})
    """).fetchall()
    return float(most / 2**40)


# logistic


def _logistic(rows: Rows, plan: Plan, moments: Moments) -> Fit | None:
    """Newton's method with halved steps; None: no finite answer, as where a feature tells the target."""
    features = len(plan.columns) - 1
    kept, _ = independent(moments, features)
    # About their means, in units of their ranges: none is beyond 2.
    units = [max(map(abs, c.clamp), default=1.0) for c in plan.columns[:-1]]
    columns = ["1.0::DOUBLE"]
    for i in kept:
        shift = f"(w{i} - {_literal(moments.sums[i] / moments.n)})"
        columns.append(f"{shift} * {_literal(ldexp(1.0 / units[i], -moments.exponents[i]))}")
    values = ", ".join(f"{sql} AS z{a}" for a, sql in enumerate(columns))
    rows.execute(f"CREATE TEMP TABLE points AS SELECT {values}, w{features} AS y FROM counted")
    penalty = [0.0, *(plan.ridge / units[i] ** 2 for i in kept)]
    at = _evaluate(rows, [0.0] * len(columns), penalty)
    null = _null(moments, features)
    for _ in range(STEPS_MAX):
        order, inverse = invert(at.curvature(penalty), [PIVOT * at.hessian[a][a] for a in range(len(columns))])
        if len(order) < len(columns):
            return None
        step = [dot(row, at.gradient) for row in inverse]
        gain = dot(step, at.gradient)
        if gain <= CONVERGED * moments.n:
            best = replace(at, coefficients=[b + s for b, s in zip(at.coefficients, step, strict=True)])
            return _told(best, inverse, moments, kept, units, null)
        at = _climb(rows, at, step, penalty, 1 if gain <= NEAR else 20)
    return None


@dataclass(frozen=True)
class _Point:
    """The penalized log-likelihood at some coefficients, with its first derivatives and the negative of its second,
    these without the penalty."""

    coefficients: list[float]
    likelihood: float
    penalized: float
    gradient: list[float]
    hessian: Matrix

    def curvature(self, penalty: Sequence[float]) -> Matrix:
        return [[v + (penalty[i] if i == j else 0.0) for j, v in enumerate(row)] for i, row in enumerate(self.hessian)]


def _climb(rows: Rows, at: _Point, step: Sequence[float], penalty: Sequence[float], tries: int) -> _Point:
    """The first point, of halved steps, that is not lower, or the last."""
    for halved in range(tries):
        tried = [b + ldexp(s, -halved) for b, s in zip(at.coefficients, step, strict=True)]
        found = _evaluate(rows, tried, penalty)
        if found.penalized >= at.penalized:
            return found
    return found


def _evaluate(rows: Rows, coefficients: list[float], penalty: Sequence[float]) -> _Point:
    """One pass over the rows. Every term is made whole, so that the sum does not depend on their order."""
    count = len(coefficients)
    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    score = " + ".join(f"{_literal(b)} * z{i}" for i, b in enumerate(coefficients))
    terms = ["-ln(1 + exp(CASE WHEN y = 1 THEN -s ELSE s END)) / 1024"]  # s is within 700
    terms += [f"(y - p) * z{i}" for i in range(count)] + [f"p * (1 - p) * z{i} * z{j}" for i, j in pairs]
    sums = ", ".join(f"sum(CAST(({term}) * {2**_SUM_BITS} AS BIGINT))" for term in terms)
    (found,) = rows.execute(f"""
        SELECT {sums} FROM (SELECT *, 1 / (1 + exp(-s)) AS p FROM (
            SELECT *, greatest(-700.0::DOUBLE, least(700.0::DOUBLE, {score})) AS s FROM points))
    """).fetchall()
    likelihood, *rest = [ldexp(float(value), -_SUM_BITS) for value in found]
    likelihood *= 1024
    both = dict(zip(pairs, rest[count:], strict=True))
    hessian = [[both[max(i, j), min(i, j)] for j in range(count)] for i in range(count)]
    gradient = [g - w * b for g, w, b in zip(rest[:count], penalty, coefficients, strict=True)]
    cost = dot([w * b for w, b in zip(penalty, coefficients, strict=True)], coefficients) / 2
    return _Point(coefficients, likelihood, likelihood - cost, gradient, hessian)


def _null(moments: Moments, target: int) -> float:
    """Log-likelihood of the share alone, per McFadden's R²."""
    yes, n = moments.sums[target], moments.n
    return sum(count * log(count / n) for count in (yes, n - yes) if count)


def _told(
    at: _Point, inverse: Matrix, moments: Moments, kept: Sequence[int], units: Sequence[float], null: float
) -> Fit:
    """In the columns' own units, and about zero instead of their means."""
    covariance = sandwich(inverse, at.hessian)
    features = len(moments.sums) - 1
    values = {i: at.coefficients[a + 1] / units[i] for a, i in enumerate(kept)}
    errors = {i: sqrt(max(covariance[a + 1][a + 1], 0.0)) / units[i] for a, i in enumerate(kept)}
    shifts = [1.0, *(-moments.mean(i) / units[i] for i in kept)]
    intercept = dot(at.coefficients, shifts)
    error = sqrt(max(dot(shifts, [dot(row, shifts) for row in covariance]), 0.0))
    return Fit(
        (intercept, *(values.get(i) for i in range(features))),
        (error, *(errors.get(i) for i in range(features))),
        1 - at.likelihood / null if null else None,
    )


def _literal(value: float) -> str:
    return f"({value:.17e}::DOUBLE)"
