"""A measured figure, its goal, and how both are shown."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    what: str
    value: float
    unit: str  # s, x (a ratio), MB/s (10^6 bytes), MiB, ms, lines, files
    most: float | None = None  # the goal, where there is one

    @property
    def met(self) -> bool:
        return self.most is None or self.value <= self.most

    def as_json(self) -> dict[str, Any]:
        goal = {} if self.most is None else {"goal_at_most": self.most, "met": self.met}
        return {"what": self.what, "value": self.value, "unit": self.unit, **goal}


@dataclass(frozen=True)
class Report:
    """One measurement."""

    title: str
    figures: Sequence[Figure]
    notes: Sequence[str] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "figures": [figure.as_json() for figure in self.figures], "notes": [*self.notes]}

    def lines(self) -> Iterable[str]:
        yield self.title
        for figure in self.figures:
            goal = f"goal at most {shown(figure.most)}" if figure.most is not None else ""
            verdict = "" if figure.most is None else "met" if figure.met else "MISSED"
            yield f"  {figure.what:<66} {shown(figure.value):>9} {figure.unit:<5} {goal:<20} {verdict}".rstrip()
        yield from (f"  {note}" for note in self.notes)


def shown(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def ratio(rounds: Sequence[dict[str, float]], over: str, under: str) -> float:
    """The median of each round's ratio: what disturbs a round disturbs both."""
    return median(one[over] / one[under] for one in rounds)
