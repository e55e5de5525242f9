"""Datasets: every format gives the same bytes, what is wrong is named by its place, and nothing grows with the file."""

import gzip
import os
import subprocess
import sys
import zipfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from enclave_runtime.programs.inputs import open_table, schema_of
from mpc.protocol.contract import Column, Rule, Table
from mpc.protocol.errors import LocalError
from parties import results
from parties.datasets import BATCH_BYTES, BATCH_ROWS, Source, spool

RULE = Rule("aggregate", (), 3)
CANARY = "canary-5317"


def table(*columns: tuple[str, Any], bytes_max: int = 1 << 30) -> Table:
    return Table("t", "owner", RULE, tuple(Column(name, kind) for name, kind in columns), bytes_max)


ALL = table(("flag", "bool"), ("n", "int64"), ("x", "double"), ("text", "string"), ("day", "date"), ("at", "timestamp"))
DAY, AT = date(2024, 2, 29), datetime(2024, 2, 29, 12, 30, 0, 5, UTC)
ROWS: dict[str, list[Any]] = {  # 11 rows: bitmaps end inside a byte
    "flag": [True, None, False, True, True, None, True, True, False, None, True],
    "n": [1, 2, None, -(2**63), 2**63 - 1, None, 7, 8, 9, 10, 11],
    "x": [0.5, None, -1.25, 1e300, 3.0, 4.0, None, None, 9.0, 10.0, 11.0],
    "text": ["a", "ünï", None, 'say "no"', "two\nlines", "a,b", "g", None, "i", "j", "k"],
    "day": [DAY, None, DAY, DAY, None, DAY, DAY, DAY, DAY, DAY, DAY],
    "at": [AT, AT, None, AT, AT, AT, AT, AT, AT, None, AT],
}


def arrow(rows: dict[str, list[Any]] = ROWS) -> pa.Table:
    return pa.table(rows, schema=schema_of(ALL))


def as_csv(rows: pa.Table, path: Path) -> None:
    pyarrow.csv.write_csv(rows.set_column(5, "at", rows["at"].cast(pa.string())), path)


def spooled(path: Path, of: Table, null: tuple[str, ...] = ("",)) -> bytes:
    target = path.parent / "spooled.arrow"
    size = spool(Source(str(path), null), of, target)
    data = target.read_bytes()
    assert size == len(data)
    assert target.stat().st_mode & 0o777 == 0o600
    assert not list(path.parent.glob("*.part"))
    return data


def written(rows: pa.Table, folder: Path) -> dict[str, Path]:
    """The same rows in every format, in batches, types and column orders that differ."""
    paths = {kind: folder / f"t.{kind}" for kind in ("csv", "csv.gz", "zip", "parquet", "arrow", "arrows", "feather")}
    extra = rows.append_column("unasked", pa.array([CANARY] * len(rows)))
    as_csv(extra, paths["csv"])
    paths["csv.gz"].write_bytes(gzip.compress(paths["csv"].read_bytes()))
    with zipfile.ZipFile(paths["zip"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(paths["csv"], "inner/t.csv")
        archive.writestr("__MACOSX/t.csv", "x")
    pq.write_table(extra.select(extra.column_names[::-1]), paths["parquet"], row_group_size=max(1, len(rows) // 3))
    coded = rows.set_column(3, "text", rows["text"].dictionary_encode())
    coded = coded.set_column(1, "n", rows["n"].cast(pa.decimal128(20, 0)))
    coded = coded.set_column(5, "at", rows["at"].cast(pa.timestamp("ns", "Asia/Tokyo")))
    with pa.ipc.new_file(paths["arrow"], coded.schema) as file:
        file.write_table(coded)
    with pa.ipc.new_stream(paths["arrows"], extra.schema) as stream:
        stream.write_table(extra, max_chunksize=max(1, len(rows) // 4))
    wide = rows.set_column(3, "text", rows["text"].cast(pa.large_string()))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(paths["feather"], wide.schema, options=options) as file:
        file.write_table(wide)
    return paths


def test_every_format_gives_the_same_bytes_and_the_enclave_reads_them(tmp_path: Path) -> None:
    data = {kind: spooled(path, ALL) for kind, path in written(arrow(), tmp_path).items()}
    assert len(set(data.values())) == 1, {kind: len(value) for kind, value in data.items()}
    opened = open_table(data["csv"], ALL)
    assert opened.to_pydict() == ROWS
    assert CANARY.encode() not in data["csv"]


def test_batches_follow_from_the_rows_alone(tmp_path: Path) -> None:
    count = 2 * BATCH_ROWS + 77
    numbers = pa.array(range(count))
    big = pa.table(
        {
            "flag": pc.equal(pc.bit_wise_and(numbers, 3), 0),
            "n": numbers,
            "x": pc.if_else(pc.equal(pc.bit_wise_and(numbers, 7), 0), None, pc.divide(numbers.cast(pa.float64()), 4)),
            "text": pc.binary_join_element_wise("row", numbers.cast(pa.string()), "-"),
            "day": pa.array([DAY] * count),
            "at": pa.array([AT] * count, pa.timestamp("us", "UTC")),
        }
    )
    paths = written(big, tmp_path)
    data = {kind: spooled(paths[kind], ALL) for kind in ("csv", "parquet", "arrow", "arrows")}
    assert len(set(data.values())) == 1, {kind: len(value) for kind, value in data.items()}
    opened = open_table(data["csv"], ALL)
    assert [len(batch) for batch in opened.to_batches()] == [BATCH_ROWS, BATCH_ROWS, 77]
    assert opened.equals(big)


def test_long_texts_make_smaller_batches(tmp_path: Path) -> None:
    of = table(("n", "int64"), ("text", "string"))
    rows = pa.table({"n": list(range(40)), "text": [chr(97 + n % 26) * 600_000 for n in range(40)]})
    pyarrow.csv.write_csv(rows, tmp_path / "t.csv")
    pq.write_table(rows, tmp_path / "t.parquet", row_group_size=7)
    data = spooled(tmp_path / "t.csv", of)
    assert data == spooled(tmp_path / "t.parquet", of)
    opened = open_table(data, of)
    assert opened.equals(rows)
    assert 8 * 600_000 < BATCH_BYTES < 16 * 600_000
    assert [len(batch) for batch in opened.to_batches()] == [8] * 5


def test_what_lies_under_a_null_does_not_travel(tmp_path: Path) -> None:
    bits, hidden = pa.py_buffer(b"\xfd"), pa.py_buffer(b"".join(n.to_bytes(8, "little") for n in (1, 5317531753, 3)))
    texts = pa.array(["a", CANARY, "c"]).buffers()
    rows = pa.record_batch(
        [
            pa.Array.from_buffers(pa.int64(), 3, [bits, hidden]),
            pa.Array.from_buffers(pa.string(), 3, [bits, *texts[1:]]),
            pa.Array.from_buffers(pa.bool_(), 3, [bits, pa.py_buffer(b"\xff")]),
        ],
        names=["n", "text", "flag"],
    )
    with pa.ipc.new_file(tmp_path / "t.arrow", rows.schema) as file:
        file.write_batch(rows)
    (tmp_path / "t.csv").write_text("n,text,flag\n1,a,true\n,,\n3,c,true\n")
    of = table(("n", "int64"), ("text", "string"), ("flag", "bool"))
    data = spooled(tmp_path / "t.arrow", of)
    assert data == spooled(tmp_path / "t.csv", of)
    assert CANARY.encode() not in data
    assert (5317531753).to_bytes(8, "little") not in data


@pytest.mark.parametrize(
    ("kind", "null", "given", "read"),
    [
        ("timestamp", ("",), "2024-02-29T12:30:00.000005Z", AT),
        ("timestamp", ("",), "2024-02-29 13:30:00.000005+01:00", AT),
        ("timestamp", ("",), "2024-02-29 12:30:00.000005", AT),
        ("timestamp", ("NA",), "NA\n2024-02-29T12:30:00.000005Z", None),
        ("timestamp", ("",), "2024-02-29", datetime(2024, 2, 29, tzinfo=UTC)),
        ("date", ("",), "2024-02-29", DAY),
        ("double", ("NA", "-"), "-", None),
        ("double", ("",), "7", 7.0),
        ("string", ("NA",), '""', ""),
        ("string", ("",), '"two\nlines"', "two\nlines"),
        ("bool", ("",), "TRUE", True),
    ],
)
def test_values_of_a_csv(tmp_path: Path, kind: Any, null: tuple[str, ...], given: str, read: object) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfother,v\r\nx," + given.replace("\n2", "\r\nx,2").encode() + b"\r\n")
    opened = open_table(spooled(tmp_path / "t.csv", table(("v", kind)), null), table(("v", kind)))
    assert opened["v"][0].as_py() == read


def big_csv(bad: str) -> bytes:
    lines = [f"{n},{n}.5,name {n}" for n in range(40_000)]
    lines[30_000] = bad
    return ("n,x,text\n" + "\n".join(lines) + "\n").encode()


TWO = "n,x,text\n1,1.5,a\n2,2.5,b\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"", "t.csv: is empty"),
        ("t.csv", b"n,x,text\n", "t.csv: holds no rows"),
        ("t.csv", b"\xef\xbb\xbf", "t.csv: is empty"),
        ("t.csv", TWO.replace("2,2.5", f"{CANARY},2.5"), r"row 2 \(line 3\), column n: expected a whole number"),
        ("t.csv", big_csv(f"1,{CANARY},a"), r"row 30001 \(line 30002\), column x: expected a finite number"),
        ("t.csv", TWO.replace("a\n", '"a\n\nb"\n').replace("2.5", CANARY), r"row 2 \(line 5\), column x"),
        ("t.csv", TWO.replace("1.5", "nan"), r"row 1 \(line 2\), column x: expected a finite number"),
        ("t.csv", TWO.replace("1.5", ""), None),
        (
            "t.csv",
            TWO.replace("2,2.5,b", f"2,{CANARY}"),
            r"row 2 \(line 3\): expected 3 values, as in the header, got 2",
        ),
        ("t.csv", TWO.replace("2,2.5,b", f'2,2.5,"{CANARY}\n3,3.5,c'), "line 3: a quote is not closed"),
        ("t.csv", big_csv(f'1,1.5,"{CANARY}'), "line 30002: a quote is not closed"),
        ("t.csv", TWO.replace("b", "x" * 3_000_000), "a record is longer than 1 MiB"),
        (
            "t.csv",
            TWO.encode() + b"3,3.5,\xff" + CANARY.encode(),
            r"row 3 \(line 4\), column text: expected UTF-8 text",
        ),
        ("t.csv", TWO.encode("utf-16"), "t.csv: expected text, got none of CSV, Parquet and Arrow"),
        ("t.csv", TWO.replace("text", "texts"), r"t.csv: has no column text \(did you mean texts\?\)"),
        ("t.csv", TWO.replace("x,text", "text,text"), "has no column x"),
        ("t.csv", TWO.replace("n,x,text", "n,x,text,x"), "has 2 columns named x"),
        ("t.parquet", TWO, "t.parquet: expected Parquet, got text"),
        ("t.arrow", TWO, "t.arrow: expected an Arrow file, got text"),
        ("t.csv", b"PAR1" + bytes(100), "t.csv: expected text, got Parquet"),
        ("t.parquet", b"PAR1" + os.urandom(100), "t.parquet: is damaged or not Parquet"),
        ("t.arrow", b"ARROW1\0\0" + os.urandom(100), "t.arrow: is damaged or not an Arrow file"),
        ("t.csv.gz", gzip.compress(TWO.encode())[:-12], "t.csv.gz: is damaged"),
        ("t.csv.gz", gzip.compress(os.urandom(5000)), "t.csv.gz: expected UTF-8 text in it"),
        ("t.zip", b"PK\x03\x04" + bytes(100), "t.zip: is damaged"),
        ("t.data", os.urandom(500) + b"\0", "t.data: expected CSV, Parquet or Arrow"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(tmp_path: Path, name: str, content: str | bytes, says: str | None) -> None:
    file, target = tmp_path / name, tmp_path / "target"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    target.write_text("as it was")
    of = table(("n", "int64"), ("x", "double"), ("text", "string"))
    if says is None:
        spool(Source(str(file)), of, target)
        return
    with pytest.raises(LocalError, match=says) as refused:
        spool(Source(str(file)), of, target)
    assert str(refused.value).startswith(str(file))
    assert CANARY not in repr(refused.value)
    assert refused.value.__cause__ is None
    assert target.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "target"])


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ([1, 2, 2**63], "int64", "row 3, column v: expected a whole number"),
        ([1.0, 2.0, 2.5], "int64", "row 3, column v: expected a whole number"),
        ([0.0, float("inf")], "double", "row 2, column v: expected a finite number"),
        ([5, 2**60 + 1], "double", "row 2, column v: expected a finite number"),
        ([datetime(2024, 1, 1), datetime(2024, 1, 1, 5)], "date", "row 2, column v: expected a date"),
        (pa.array([1000, 1001], pa.timestamp("ns")), "timestamp", "row 2, column v: expected a time"),
        ([[1], [2]], "int64", "column v: expected a whole number .*, got a column of list"),
        (["1", "2"], "int64", "column v: expected a whole number .*, got a column of string"),
        ([1, 2], "string", "column v: expected UTF-8 text .*, got a column of int64"),
        ([b"a"], "string", "got a column of binary"),
    ],
)
def test_values_that_do_not_fit_the_contract(tmp_path: Path, values: Any, kind: Any, says: str) -> None:
    array = values if isinstance(values, pa.Array) else pa.array(values, pa.uint64() if 2**63 in values else None)
    pq.write_table(pa.table({"v": array}), tmp_path / "t.parquet")
    with pytest.raises(LocalError, match=says):
        spooled(tmp_path / "t.parquet", table(("v", kind)))


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([1.0, None], "int64", [1, None]),
        ([1, None], "double", [1.0, None]),
        ([None, None], "string", [None, None]),
        ([datetime(2024, 2, 29)], "date", [DAY]),
        ([AT.replace(tzinfo=None)], "timestamp", [AT]),
    ],
)
def test_values_that_fit_without_loss(tmp_path: Path, values: Any, kind: Any, read: Any) -> None:
    pq.write_table(pa.table({"v": values}), tmp_path / "t.parquet")
    opened = open_table(spooled(tmp_path / "t.parquet", table(("v", kind))), table(("v", kind)))
    assert opened["v"].to_pylist() == read


def test_forged_offsets_in_an_arrow_file_are_refused(tmp_path: Path) -> None:
    batch = pa.record_batch({"v": ["0123456789"] * 3})
    with pa.ipc.new_stream(tmp_path / "t.arrows", batch.schema) as stream:
        stream.write_batch(batch)
    honest = (tmp_path / "t.arrows").read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 10, 20, 30))
    assert honest.count(offsets) == 1
    (tmp_path / "t.arrows").write_bytes(honest.replace(offsets, offsets[:8] + b"\0\0\0\x10" + offsets[12:]))
    with pytest.raises(LocalError, match="is damaged"):
        spooled(tmp_path / "t.arrows", table(("v", "string")))


def test_the_contracts_limit_holds_while_reading(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("n\n" + "1\n" * 100_000)
    with pytest.raises(LocalError, match=r"t.csv: is too big: expected at most 5000 bytes of Arrow"):
        spooled(tmp_path / "t.csv", table(("n", "int64"), bytes_max=5000))
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_progress_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("n\n" + "1\n" * (BATCH_ROWS + 1))
    told: list[int] = []
    size = spool(Source(str(tmp_path / "t.csv")), table(("n", "int64")), tmp_path / "target", told.append)
    assert len(told) == 2
    assert told == sorted(told)
    assert 0 < told[0] < told[1] <= size


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    of = table(("n", "int64"))
    for location, says in {
        str(tmp_path / "none.csv"): "none.csv: no such file",
        str(tmp_path): "is not a file",
        "": "no source",
        "package:no-such-package-5317/data.csv": "is not installed here; python -m pip install",
        "package:pytest/no-such-file.csv": "pytest .* has no such file",
        "package:pytest/../secret.csv": "has no such file",
    }.items():
        with pytest.raises(LocalError, match=says):
            spool(Source(location), of, tmp_path / "target")
    (tmp_path / "t.csv").write_text("n\n1\n")
    with pytest.raises(LocalError, match="target: cannot be written"):
        spool(Source(str(tmp_path / "t.csv")), of, tmp_path / "no folder" / "target")
    if os.geteuid() != 0:  # root may read everything
        (tmp_path / "t.csv").chmod(0)
        with pytest.raises(LocalError, match="cannot be read"):
            spool(Source(str(tmp_path / "t.csv")), of, tmp_path / "target")


def test_an_archive_of_several_files_is_ambiguous(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("a.csv", "n\n1\n")
        archive.writestr("b.csv", "n\n2\n")
    with pytest.raises(LocalError, match="expected an archive of one CSV file, got 2 files"):
        spooled(tmp_path / "t.zip", table(("n", "int64")))


def test_a_packages_file_is_read_and_its_code_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "site" / "quails", tmp_path / "site" / "quails-1.0.dist-info"
    (package / "data").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "data" / "q.csv").write_text("n\n1\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quails\nVersion: 1.0\n")
    (info / "RECORD").write_text("quails/__init__.py,,\nquails/data/q.csv,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for location in ("package:quails/data/q.csv", "package:quails/quails/data/q.csv"):
        assert spool(Source(location), table(("n", "int64")), tmp_path / "target") > 0
    assert "quails" not in sys.modules


PEAK = """
import re, sys
from pathlib import Path
from mpc.protocol.contract import Column, Rule, Table
from parties.datasets import Source, spool
names = "abcdef"
table = Table("t", "o", Rule("aggregate", (), 3), tuple(Column(n, "double") for n in names), 1 << 40)
print(spool(Source(sys.argv[1]), table, Path(sys.argv[2])))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])  # ru_maxrss would be the parent's
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows = pa.table({name: pc.random(1_000_000) for name in "abcdef"})
    path = tmp_path / "t.parquet"
    with pq.ParquetWriter(path, rows.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(6):
            writer.write_table(rows, row_group_size=1_000_000)  # 46 MiB each
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "target")]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    size, peak_kib = map(int, ran.stdout.split())
    assert size > 250 << 20
    assert peak_kib < 300 << 10


def test_results_are_written_once(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    rows = pa.table({"level": ["a", None, "b"], "mean": [1.5, 2.0, None]})
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    result, folder = sink.getvalue().to_pybytes(), tmp_path / "new" / "results"
    paths = results.write(result, folder, "acme")
    assert paths == {"csv": folder / "acme.csv", "parquet": folder / "acme.parquet"}
    assert paths["csv"].read_text() == '"level","mean"\n"a",1.5\n,2\n"b",\n'
    assert pq.read_table(paths["parquet"]).equals(rows)
    assert sorted(path.name for path in folder.iterdir()) == ["acme.csv", "acme.parquet"]
    paths["csv"].unlink()
    paths["parquet"].write_text("somebody's")
    with pytest.raises(LocalError, match=r"acme.parquet: exists already, and nothing was overwritten"):
        results.write(result, folder, "acme")
    assert [path.name for path in folder.iterdir()] == ["acme.parquet"]
    assert paths["parquet"].read_text() == "somebody's"
    with pytest.raises(LocalError, match="name of a result"):
        results.write(result, folder, "../acme")
    with pytest.raises(LocalError, match="not an Arrow stream"):
        results.write(result[:-40], folder, "other")
