"""CSV files, also inside .gz or .zip, as Arrow batches: RFC 4180 with a header line, commas, UTF-8.

Errors name the record and the line, never a value.
"""

import codecs
import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from mpc.protocol.errors import LocalError

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("csv", "gzip", "zip")
HEAD_BYTES = 1 << 18  # read to see the header and the first records
BLOCK_BYTES = 1 << 20  # parsed at a time; no record may be longer
_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)


@dataclass
class Misfit(Exception):
    """A value that is not of its column's type; rows count from 1."""

    row: int
    column: str


class _Counting(io.RawIOBase):
    """A stream that counts quotes: an odd number means that one swallowed the records after it."""

    def __init__(self, inner: IO[bytes]) -> None:
        self.inner, self.quotes = inner, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.inner.read(size)
        self.quotes += data.count(b'"')
        return data


def is_text(head: bytes) -> bool:
    """Whether a file that begins so may be text: no control characters. Encoding shows where it matters."""
    return re.search(rb"[\x00-\x08\x0e-\x1f]", head) is None


def header(file: Path, kind: str) -> list[str]:
    """The names in the first record. Raises LocalError."""
    records = _head(file, kind)
    if not records:
        raise LocalError(f"{file}: is empty")
    return records[0]


def read(file: Path, kind: str, null: Sequence[str], types: "dict[str, pa.DataType]") -> "Iterator[pa.RecordBatch]":
    """Those columns as batches of about 1 MiB of text; timestamps whose column has no zone come without one.

    Raises: Misfit: a value is not of its column's type. LocalError: the file is damaged or not a CSV.
    """
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    records = _head(file, kind)
    with _opened(file, kind) as raw:
        stream = _Counting(raw)
        try:
            batches = arrow_csv.open_csv(
                stream,
                arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),  # threads lose the row of an error
                arrow_csv.ParseOptions(newlines_in_values=True),
                arrow_csv.ConvertOptions(
                    column_types=_read_as(records, null, types),
                    include_columns=list(types),
                    null_values=list(null),
                    strings_can_be_null=True,
                ),
            )
            yield from batches
        except pa.ArrowInvalid as error:
            raise _explained(str(error), file, kind, records[0]) from None
        except _DAMAGE as error:
            raise _damaged(file, error) from None
        if stream.quotes % 2:
            raise LocalError(f"{file}{_unclosed(file, kind)}: a quote is not closed")


def line_of(file: Path, kind: str, row: int) -> str:
    """` (line N)`, where the data row begins; nothing when it cannot be found."""
    try:
        with _opened(file, kind) as raw:
            reader, line = csv.reader(_lines(raw)), 1
            for record in reader:
                if record and row == 0:
                    return f" (line {line})"
                row, line = row - bool(record), reader.line_num + 1
    except (csv.Error, LocalError, *_DAMAGE):
        pass
    return ""


def _lines(raw: IO[bytes]) -> Iterator[str]:
    return codecs.iterdecode(raw, "utf-8-sig", "replace")


def _opened(file: Path, kind: str) -> IO[bytes]:
    try:
        if kind == "csv":
            return file.open("rb")
        if kind == "gzip":
            return cast(IO[bytes], gzip.open(file))
        archive = zipfile.ZipFile(file)
        names = [i.filename for i in archive.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX/")]
        if len(names) != 1:
            raise LocalError(f"{file}", expected="an archive of one CSV file", got=f"{len(names)} files")
        return archive.open(names[0])
    except _DAMAGE as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> LocalError:
    if isinstance(error, PermissionError):
        return LocalError(f"{file}: may not be read; mend its permissions")
    return LocalError(f"{file}: is damaged, or packed in a way that is not understood ({type(error).__name__})")


def _head(file: Path, kind: str) -> list[list[str]]:
    """The first records that are not empty, header included; the last one may be cut."""
    try:
        with _opened(file, kind) as raw:
            head = raw.read(HEAD_BYTES)
    except _DAMAGE as error:
        raise _damaged(file, error) from None
    if not is_text(head):
        raise LocalError(f"{file}", expected="UTF-8 text in it" if kind != "csv" else "UTF-8 text", got="other bytes")
    records = csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"), newline=""))
    seen: list[list[str]] = []
    with suppress(csv.Error):  # a field that is too long for this parser, which only looks ahead
        seen.extend(record for record in records if record)
    return seen


def _read_as(
    records: list[list[str]], null: Sequence[str], types: "dict[str, pa.DataType]"
) -> "dict[str, pa.DataType]":
    """Timestamps take a zone where the column's first value has one: Arrow reads one way or the other."""
    import pyarrow as pa

    read_as = dict(types)
    for name, kind in types.items():
        if pa.types.is_timestamp(kind):
            place = records[0].index(name)
            values = (record[place] for record in records[1:] if len(record) > place)
            first = next((value for value in values if value not in null), "")
            if not re.search(r":.*(Z|[+-]\d\d(:?\d\d)?)$", first.strip()):
                read_as[name] = pa.timestamp(kind.unit)
    return read_as


def _explained(message: str, file: Path, kind: str, names: list[str]) -> Exception:
    """Arrow's message quotes values; its numbers are all that is taken over. Its rows count the header."""
    if value := re.match(r"In CSV column #(\d+): Row #(\d+): ", message):
        return Misfit(int(value[2]) - 1, names[int(value[1])])
    if shape := re.match(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+)", message):
        row = int(shape[1]) - 1
        where = f"{file}: row {row}{line_of(file, kind, row)}"
        return LocalError(where, expected=f"{shape[2]} values, as in the header", got=shape[3])
    if "straddl" in message:
        return LocalError(f"{file}{_unclosed(file, kind)}: a record is longer than 1 MiB; is a quote left open?")
    return LocalError(f"{file}: is not CSV")


def _unclosed(file: Path, kind: str) -> str:
    """`, line N`: the record whose quotes do not match; nothing when it cannot be found."""
    with _opened(file, kind) as raw:
        reader, line = csv.reader(_lines(raw), strict=True), 1
        try:
            for _ in reader:
                line = reader.line_num + 1
        except csv.Error:
            return f", line {line}"
    return ""
