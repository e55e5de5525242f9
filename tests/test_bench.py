"""What `python -m bench` says: its inputs, its answers, its verdicts."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import duckdb
import pytest

from bench import alone, image, join, sealing
from bench.figures import Figure, Report, ratio, shown
from bench.inputs import K, write_join
from bench.watch import Watch

ROOT = Path(__file__).parents[1]


def by_name(report: Report) -> dict[str, Figure]:
    return {figure.what.strip(): figure for figure in report.figures}


def test_join_gives_what_duckdb_alone_gives(tmp_path: Path) -> None:
    figures = by_name(join.measure(1, tmp_path, rows=4000, suffixes=("parquet",)))  # raises if the answers differ
    job, protected = figures["parquet: mpc: the job"], figures["parquet: DuckDB alone, same protected answer"]
    assert figures["parquet: job / protected answer"].value == pytest.approx(job.value / protected.value)
    assert job.value < figures["parquet: mpc: the job, reading included"].value
    assert not list(tmp_path.glob("run*"))


def test_other_answers_are_refused() -> None:
    one, other = {("north", "food", "< 18"): (1.5, 2)}, {("north", "food", "< 18"): (1.6, 2)}
    join.compare(one, dict(one))
    for answer in (other, {}):
        with pytest.raises(SystemExit, match="not the one"):
            join.compare(one, answer)


def test_alone_hides_small_groups_and_what_would_show_them(tmp_path: Path) -> None:
    write_join(tmp_path, 4000, "parquet")
    joined, customers = alone.clear_text(tmp_path, "parquet")
    with duckdb.connect() as connection:
        everything = {row[:3]: row[3:] for row in alone.plain(connection, joined)}
        shown_rows = {row[:3]: row[3:] for row in alone.protected(connection, joined, customers)}
        assert 0 < len(shown_rows) < len(everything)
        assert all(everything[group] == totals for group, totals in shown_rows.items())
        assert min(totals[-1] for totals in shown_rows.values()) >= K
    twice = f"(FROM {customers} UNION ALL FROM {customers})"
    with duckdb.connect() as connection, pytest.raises(AssertionError):
        alone.protected(connection, joined, twice)


def test_alone_hides_the_smallest_group_with_a_rest_that_is_too_small() -> None:
    customers = "(SELECT range AS customer FROM range(38))"
    region = "CASE WHEN customer < 20 THEN 'large' WHEN customer < 35 THEN 'middle' ELSE 'small' END"
    joined = (
        f"SELECT *, {region} AS region, 'food' AS category, 0 AS age, 1.5 AS amount, customer AS card FROM {customers}"
    )
    with duckdb.connect() as connection:
        assert alone.protected(connection, joined, customers) == [("large", "food", 0, 30, 1.5, 20)]


def test_inputs_follow_from_the_seed(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_join(folder, 1000, "csv")
    for name in ("purchases.csv", "customers.csv", "csv.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sealing_sees_every_process(tmp_path: Path) -> None:
    figures = by_name(sealing.measure(1, tmp_path, table_bytes=8 << 20))
    assert figures["Parquet file to enclave memory"].value > 0
    for who in ("coordinator", "host", "party"):
        assert 10 < figures[f"peak memory, {who}"].value < 1000
    engine = figures["the engine's private memory, peak"].value
    assert figures["the enclave's own process after loading / data"].value > 1
    assert 1 < engine < figures["both processes, peak"].value


def test_watch_counts_a_childs_memory_and_time() -> None:
    code = "data = bytearray(b'x') * (64 << 20)\nfor _ in range(3_000_000): pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdout is not None
        watch = Watch()
        process.stdout.readline()
        watch.start(process.pid)
        deadline = time.monotonic() + 10
        while not watch.cpu_s("mpc") and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        watch.stop()
        process.kill()
    assert 64 << 20 < watch.peak_bytes("mpc") < 200 << 20
    assert 0 < watch.cpu_s("mpc") < 10


def test_image_counts_our_lines_and_others_bytes() -> None:
    figures = by_name(image.measure(1, Path()))
    code = figures["lines of code of ours, without programs"]
    assert 500 < code.value < figures["with comments, docstrings and blank lines"].value < 5000
    assert code.most == image.LINES_MAX
    assert any(name.startswith("duckdb ") for name in figures)


def test_verdicts() -> None:
    missed, met, plain = Figure("a", 2.1, "x", 2.0), Figure("b", 2.0, "x", 2.0), Figure("c", 9.0, "s")
    assert (missed.met, met.met, plain.met) == (False, True, True)
    lines = list(Report("title", [missed, met, plain], ["note"]).lines())
    assert lines[0] == "title"
    assert "MISSED" in lines[1]
    assert lines[2].endswith("met")
    assert "goal" not in lines[3]
    assert lines[4] == "  note"
    assert plain.as_json() == {"what": "c", "value": 9.0, "unit": "s"}
    assert missed.as_json()["met"] is False
    assert ratio([{"a": 2, "b": 1}, {"a": 9, "b": 1}, {"a": 30, "b": 10}], "a", "b") == 3
    assert [shown(value) for value in (1234.5, 2.0, 0.12345)] == ["1,234", "2", "0.123"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bench", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_command() -> None:
    done = run("image", "--json")
    said = json.loads(done.stdout)
    assert list(said["measurements"]) == ["image"]
    assert done.returncode == (0 if said["met"] else 1)
    refused = run("imgae")
    assert refused.returncode == 2
    assert "imgae" in refused.stderr
