"""Arrow that a party sealed: what is read, and every forgery that is not."""

import mmap
import random
import struct

import pyarrow as pa
import pytest
from joint import EXACT, arrow, column, contract, stream, table

from enclave_runtime.programs import ProgramRefused
from enclave_runtime.programs.inputs import open_table, open_tables, schema_of
from mpc.protocol.contract import Table

CANARY = b"canary-of-a-neighbour"
ALL_TYPES = table(
    "all",
    "alice",
    EXACT,
    column("flag", "bool"),
    column("number", "int64"),
    column("real", "double"),
    column("text", "string"),
    column("day", "date"),
    column("at", "timestamp"),
)
TEXTS = table("texts", "alice", EXACT, column("text", "string"))
REALS = table("reals", "alice", EXACT, column("real", "double"))
ROWS = arrow(
    ALL_TYPES,
    [
        {"flag": True, "number": -(2**63), "real": 0.5, "text": "ä", "day": 0, "at": 10**15},
        {"flag": None, "number": None, "real": None, "text": None, "day": None, "at": None},
        {"flag": False, "number": 7, "real": -1e308, "text": "", "day": -1, "at": -1},
    ],
)


def refused(data: object, described: Table = ALL_TYPES) -> str:
    with pytest.raises(ProgramRefused) as refusal:
        open_table(data, described)
    return refusal.value.code


def test_reads_every_type_without_a_copy() -> None:
    data = stream(ROWS)
    before = pa.total_allocated_bytes()
    opened = open_table(data, ALL_TYPES)
    assert opened.equals(ROWS)
    assert pa.total_allocated_bytes() == before


def test_reads_no_rows_and_many_batches() -> None:
    assert open_table(stream(ROWS.slice(0, 0)), ALL_TYPES).num_rows == 0
    assert open_table(stream(pa.concat_tables([ROWS] * 3)), ALL_TYPES).num_rows == 9


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_refuses_compression(codec: str) -> None:
    assert refused(stream(ROWS, compression=codec)) == "input"


@pytest.mark.parametrize(
    "changed",
    [
        ROWS.select(["number", "flag", "real", "text", "day", "at"]),
        ROWS.drop_columns(["at"]),
        ROWS.append_column("more", pa.nulls(3, pa.int64())),
        ROWS.rename_columns(["flag", "Number", "real", "text", "day", "at"]),
        ROWS.set_column(1, "number", ROWS["number"].cast(pa.int32(), safe=False)),
        ROWS.set_column(3, "text", ROWS["text"].cast(pa.large_string())),
        ROWS.set_column(3, "text", ROWS["text"].dictionary_encode()),
        ROWS.set_column(5, "at", ROWS["at"].cast(pa.timestamp("us"))),
        ROWS.set_column(5, "at", ROWS["at"].cast(pa.timestamp("ms", "UTC"), safe=False)),
        ROWS.replace_schema_metadata({"ARROW:extension:name": "x"}),
        ROWS.cast(pa.schema([ROWS.schema.field(0).with_metadata({"a": "b"}), *list(ROWS.schema)[1:]])),
        ROWS.slice(0, 1).cast(pa.schema([field.with_nullable(False) for field in ROWS.schema])),
    ],
    ids=["order", "missing", "more", "name", "int32", "large", "dict", "zone", "unit", "metadata", "field", "null"],
)
def test_refuses_another_schema(changed: pa.Table) -> None:
    assert refused(stream(changed)) == "input"


def test_refuses_custom_metadata_of_a_batch() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, ROWS.schema) as writer:
        writer.write_batch(ROWS.to_batches()[0], custom_metadata={"a": "b"})
    assert refused(sink.getvalue()) == "input"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_numbers_that_are_not_finite(value: float) -> None:
    assert refused(stream(arrow(REALS, [{"real": 1.0}, {"real": value}])), REALS) == "input"


def test_refuses_more_bytes_than_agreed_bytes_behind_the_end_and_too_few() -> None:
    data = stream(arrow(TEXTS, [{"text": "a"}]))
    exactly = table("texts", "alice", EXACT, column("text", "string"), bytes_max=len(data))
    assert open_table(data, exactly).num_rows == 1
    less = table("texts", "alice", EXACT, column("text", "string"), bytes_max=len(data) - 1)
    assert refused(data, less) == "input"
    assert refused(data + bytes(8), TEXTS) == "input"
    assert refused(data[:-16], TEXTS) == "input"
    assert refused(b"", TEXTS) == "input"
    assert refused(b"ARROW1\0\0" + data, TEXTS) == "input"


def offsets_at(data: bytes, texts: list[str]) -> int:
    """Where the offsets of the only column begin."""
    ends = [sum(len(text) for text in texts[:i]) for i in range(len(texts) + 1)]
    return data.index(struct.pack(f"<{len(ends)}i", *ends))


FORGED = [(0, 1000, 2000, 3000), (0, 1, 2, 1 << 20), (0, 3, 1, 6), (-8, 1, 3, 6), (0, 1, 3, -1), (1 << 30, 1, 3, 6)]


@pytest.mark.parametrize("offsets", FORGED)
def test_forged_offsets_find_nothing_of_a_neighbour(offsets: tuple[int, ...]) -> None:
    """The table lies in one mapping with somebody else's data before and behind it."""
    texts = ["a", "bc", "def"]
    honest = stream(arrow(TEXTS, [{"text": text} for text in texts]))
    at = offsets_at(honest, texts)
    forged = honest[:at] + struct.pack("<4i", *offsets) + honest[at + 16 :]
    page = CANARY * 200
    page = page[: len(page) // 64 * 64]
    mapping = mmap.mmap(-1, 1 << 16)
    mapping.write(page + forged + page)
    assert refused(memoryview(mapping)[len(page) : len(page) + len(forged)], TEXTS) == "input"


def test_forged_lengths_of_buffers_and_rows() -> None:
    texts = ["a", "bc", "def"]
    honest = stream(arrow(TEXTS, [{"text": text} for text in texts]))
    at = offsets_at(honest, texts)
    found = 0
    for position in range(0, at - 8, 8):  # the metadata in front of the body: rows, nulls, places and sizes of buffers
        (word,) = struct.unpack_from("<q", honest, position)
        if word in (3, 16, 6, 0, 64, 8):
            for forged in (1 << 20, -1, 1 << 62):
                changed = honest[:position] + struct.pack("<q", forged) + honest[position + 8 :]
                try:
                    opened = open_table(changed, TEXTS)
                except ProgramRefused:
                    found += 1
                else:  # padding: nothing that is read
                    assert opened.column("text").to_pylist() == texts
    assert found >= 12


def test_refuses_text_that_is_not_utf8() -> None:
    data = stream(arrow(TEXTS, [{"text": "abc"}]))
    assert refused(data.replace(b"abc", b"a\xffc"), TEXTS) == "input"


def test_flipped_bits_are_refused_or_read_as_the_agreed_types() -> None:
    honest = stream(ROWS)
    chance = random.Random(7)
    outcomes = set[str]()
    for _ in range(2000):
        changed = bytearray(honest)
        for _ in range(chance.choice((1, 1, 8))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        try:
            opened = open_table(bytes(changed), ALL_TYPES)
        except ProgramRefused as refusal:
            outcomes.add(refusal.code)
        else:
            assert opened.schema == schema_of(ALL_TYPES)
            opened.validate(full=True)
            outcomes.add("read")
    assert outcomes == {"input", "read"}


def test_says_whose_table_is_wrong() -> None:
    agreed = contract([TEXTS, REALS], "SELECT 1")
    good = stream(arrow(TEXTS, [{"text": "a"}]))
    with pytest.raises(ProgramRefused) as refusal:
        open_tables(agreed, [good, good])
    assert (refusal.value.code, refusal.value.table_index) == ("input", 1)
    assert CANARY.decode() not in str(refusal.value)
