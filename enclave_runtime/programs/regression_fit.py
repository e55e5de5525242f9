"""The algebra of regression, on matrices as small as the number of features; pure.

Sums come as whole numbers: of the i-th column `w = value * 2**exponent[i]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ldexp, sqrt

TOLERANCE = 1e-9  # of a column's spread, what others may leave unexplained before it counts as one of them

Matrix = list[list[float]]


@dataclass(frozen=True)
class Moments:
    """Sums over rows, exact: of each column, and of the products of two."""

    n: int
    sums: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]  # symmetric
    exponents: tuple[int, ...]

    def __add__(self, other: "Moments") -> "Moments":
        pairs = zip(self.products, other.products, strict=True)
        return Moments(
            self.n + other.n,
            tuple(a + b for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(tuple(a + b for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs),
            self.exponents,
        )

    def mean(self, i: int) -> float:
        return ldexp(self.sums[i] / self.n, -self.exponents[i])

    def spread(self, i: int, j: int) -> float:
        """Sum of products of the differences from the means; computed exactly and rounded once."""
        exact = self.n * self.products[i][j] - self.sums[i] * self.sums[j]
        return ldexp(exact / self.n, -self.exponents[i] - self.exponents[j])


@dataclass(frozen=True)
class Fit:
    """Intercept first; None: a feature that does not vary, or that those before it determine."""

    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    r_squared: float | None


def invert(matrix: Matrix, least: Sequence[float]) -> tuple[list[int], Matrix]:
    """Which rows are independent of those before, and the inverse of their part of a symmetric matrix.

    Args: least: for each row, the pivot below which it is not. Source: the sweep operator, Goodnight 1979.
    """
    swept = [list(row) for row in matrix]
    size, kept = len(swept), []
    for k in range(size):
        pivot = swept[k][k]
        if pivot <= least[k]:
            continue
        kept.append(k)
        row = [value / pivot for value in swept[k]]
        for i in range(size):
            if i != k:
                factor = swept[i][k]
                swept[i] = [value - factor * r for value, r in zip(swept[i], row, strict=True)]
                swept[i][k] = -factor / pivot
        swept[k] = row
        swept[k][k] = 1 / pivot
    return kept, [[swept[i][j] for j in kept] for i in kept]


def independent(moments: Moments, features: int) -> tuple[list[int], Matrix]:
    """Features that neither are constant nor determined by those before, and the inverse of their correlations."""
    correlations, scales = standardized(moments, features)
    least = [TOLERANCE if scale else 2.0 for scale in scales]  # a correlation matrix has no larger pivot than 1
    return invert(correlations, least)


def standardized(moments: Moments, count: int) -> tuple[Matrix, list[float]]:
    """Correlations of the first columns, and the root of each one's spread."""
    scales = [sqrt(moments.spread(i, i)) for i in range(count)]
    matrix = [
        [moments.spread(i, j) / (scales[i] * scales[j]) if scales[i] and scales[j] else 0.0 for j in range(count)]
        for i in range(count)
    ]
    return matrix, scales


def linear(moments: Moments, ridge: float) -> Fit:
    """Least squares of the last column on the others, plus `ridge` times the squares of their coefficients."""
    features = len(moments.sums) - 1
    correlations, scales = standardized(moments, features + 1)
    kept, _ = independent(moments, features)
    plain = [[correlations[i][j] for j in kept] for i in kept]
    penalized = [list(row) for row in plain]
    for a, i in enumerate(kept):
        penalized[a][a] += ridge / scales[i] ** 2
    _, inverse = invert(penalized, [0.0] * len(kept))
    with_target = [correlations[i][features] for i in kept]
    slopes = [dot(row, with_target) for row in inverse]  # of standardized columns
    explained = 2 * dot(slopes, with_target) - dot(slopes, [dot(row, slopes) for row in plain])
    total, freedom = scales[features] ** 2, moments.n - len(kept) - 1
    noise = max(1 - explained, 0.0) * total / freedom if freedom > 0 else None
    covariance = sandwich(inverse, plain)
    values = {i: slopes[a] * scales[features] / scales[i] for a, i in enumerate(kept)}
    means = {i: moments.mean(i) for i in kept}
    intercept = moments.mean(features) - dot(list(values.values()), list(means.values()))
    errors: dict[int, float | None] = {i: None for i in kept}
    error = None
    if noise is not None:
        errors = {i: sqrt(noise * max(covariance[a][a], 0.0)) / scales[i] for a, i in enumerate(kept)}
        shifts = [means[i] / scales[i] for i in kept]
        around = max(dot(shifts, [dot(row, shifts) for row in covariance]), 0.0)
        error = sqrt(noise * (1 / moments.n + around))
    return Fit(
        (intercept, *(values.get(i) for i in range(features))),
        (error, *(errors.get(i) for i in range(features))),
        min(explained, 1.0) if total else None,
    )


def sandwich(inverse: Matrix, middle: Matrix) -> Matrix:
    """inverse · middle · inverse, which is symmetric."""
    return product(product(inverse, middle), inverse)


def product(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [[dot(row, column) for column in columns] for row in a]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """In this order, so that the same numbers give the same bits."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total
