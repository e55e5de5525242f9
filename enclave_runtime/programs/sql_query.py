"""What a checked query means: the only thing that runs."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Literal

Value = bool | int | float | str | date | datetime
Function = Literal["rows", "count", "count_distinct", "sum", "avg", "variance", "quantile"]  # the last two: noise
Operator = Literal["=", "<", "<=", ">", ">=", "IN", "BETWEEN", "IS NULL", "IS NOT NULL"]


@dataclass(frozen=True)
class Relation:
    """What stands in FROM: a table of the contract, or all owners' tables of one name, stacked."""

    alias: str
    name: str
    sources: tuple[int, ...]  # indices into the contract's tables


@dataclass(frozen=True)
class Ref:
    """A column, in its owner's spelling."""

    relation: int
    column: str


@dataclass(frozen=True)
class Group:
    ref: Ref
    edges: tuple[float, ...] = ()  # of its buckets; none: the value itself


@dataclass(frozen=True)
class Aggregate:
    function: Function
    ref: Ref | None = None  # none: rows
    fraction: float = 0.0  # of a quantile


@dataclass(frozen=True)
class Output:
    name: str
    item: Group | Aggregate


@dataclass(frozen=True)
class Join:
    """`right` joins `left`, which stands before it, on all pairs of columns."""

    left: int
    right: int
    keys: tuple[tuple[str, str], ...]
    outer: bool


@dataclass(frozen=True)
class Filter:
    """Of a bucketed column the values are positions in `labels`."""

    item: Group
    operator: Operator
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Order:
    output: int
    descending: bool
    nulls_first: bool


@dataclass(frozen=True)
class Query:
    relations: tuple[Relation, ...]
    joins: tuple[Join, ...]  # one for each relation after the first, in order
    filters: tuple[Filter, ...]
    outputs: tuple[Output, ...]
    order: tuple[Order, ...]


def labels(edges: tuple[float, ...]) -> tuple[str, ...]:
    """Names of the buckets, in order: below the first edge, between edges, from the last one on."""
    text = [str(int(edge)) if edge.is_integer() and abs(edge) < 1e15 else repr(edge) for edge in edges]
    between = [f"[{low}, {high})" for low, high in pairwise(text)]
    return (f"< {text[0]}", *between, f">= {text[-1]}")


def _int64(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,19}", text) or not -(2**63) <= int(text) < 2**63:
        raise ValueError(text)
    return int(text)


def _double(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def _timestamp(text: str) -> datetime:
    """UTC where the text names no zone, as the engine holds it: without one."""
    read = datetime.fromisoformat(text)
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).astimezone(UTC).replace(tzinfo=None)


# Type of a column → kind of a literal in the engine's tree → its value; raises ValueError.
READERS: dict[str, dict[str, Callable[[str], Value]]] = {
    "bool": {"BOOLEAN": lambda text: text == "true"},
    "int64": {"INTEGER": _int64},
    "double": {"INTEGER": _double, "NUMERIC": _double},
    "string": {"STRING": str},
    "date": {"STRING": date.fromisoformat},
    "timestamp": {"STRING": _timestamp},
}
