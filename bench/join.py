"""The joint job at 1 million rows a party against DuckDB alone on the same files, for the same protected answer."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from bench.figures import Figure, Report, median, ratio
from bench.inputs import AGES, CPUS, write_join
from bench.session import Run, build_image, session
from enclave_runtime.programs.sql_query import labels

ROWS = 1_000_000
RATIO_MAX = 2.0

Answer = dict[tuple[Any, ...], tuple[Any, ...]]  # group → its totals


def measure(rounds: int, work: Path, rows: int = ROWS, suffixes: Sequence[str] = ("parquet", "csv")) -> Report:
    """Raises SystemExit when the two answers differ."""
    build_image()
    figures: list[Figure] = []
    for suffix in suffixes:
        scenario = write_join(work, rows, suffix)
        times = [_round(scenario, work, suffix) for _ in range(rounds)]
        figures += _figures(suffix, times)
    notes = (
        "The job runs from the first consent to the release: attest, seal, relay, open, compute, seal the result.",
        "A party reads and prepares its file before it consents: that is in `reading included`, which is all that",
        "happens after the start of the processes, up to results and receipts on the disk.",
        "DuckDB alone reads the files too, has both owners' rows in one process, and is timed without its start.",
    )
    return Report(
        f"Join and group-by: {rows:,} rows a party, 2 parties, {CPUS} threads; median of {rounds}", figures, notes
    )


def _round(scenario: Path, work: Path, suffix: str) -> dict[str, float]:
    with session(scenario, work) as run:
        ours = _answer(run)
    protected_s, theirs = _alone("protected", work, suffix)
    plain_s, _ = _alone("plain", work, suffix)
    compare(ours, theirs)
    prepared = run.summary["timings_s"]["total"] - run.startup_s
    return {"job": run.job_s, "prepared": prepared, "whole": run.wall_s, "protected": protected_s, "plain": plain_s}


def _figures(suffix: str, times: list[dict[str, float]]) -> list[Figure]:
    rows = {
        "job": "mpc: the job",
        "prepared": "mpc: the job, reading included",
        "whole": "mpc: whole command",
        "protected": "DuckDB alone, same protected answer",
        "plain": "DuckDB alone, plain query",
    }
    return [
        *(Figure(f"{suffix}: {what}", median(t[key] for t in times), "s") for key, what in rows.items()),
        Figure(f"{suffix}: job / protected answer", ratio(times, "job", "protected"), "x", RATIO_MAX),
        Figure(f"{suffix}: job, reading included / protected answer", ratio(times, "prepared", "protected"), "x"),
        Figure(f"{suffix}: job / plain query", ratio(times, "job", "plain"), "x"),
    ]


def _alone(what: str, work: Path, suffix: str) -> tuple[float, Answer]:
    command = [sys.executable, "-m", "bench.alone", what, str(work), suffix]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1]).stdout)
    words = labels(tuple(map(float, AGES)))
    return said["seconds"], {(row[0], row[1], words[row[2]]): tuple(row[3:]) for row in said["rows"]}


def _answer(run: Run) -> Answer:
    (files,) = run.summary["results"].values()
    rows = pyarrow.parquet.read_table(files["parquet"]).to_pylist()
    return {tuple(row.values())[:3]: tuple(row.values())[3:] for row in rows}


def compare(ours: Answer, theirs: Answer) -> None:
    """Raises SystemExit unless they are the same; two sums of doubles may differ in their last bits."""
    same = ours.keys() == theirs.keys() and all(
        math.isclose(mine, other, rel_tol=1e-9)
        for group, totals in ours.items()
        for mine, other in zip(totals, theirs[group], strict=True)
    )
    if not same:
        raise SystemExit("the enclave's answer is not the one that DuckDB gives on the clear text")
