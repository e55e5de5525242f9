"""A party's dataset: its own file, read in constant memory into the one Arrow form that is committed to and sealed.

Errors name the file, the row, the line and the column, and never a value: they may end up in a log.
pyarrow is imported where it is needed: a party that owns no table does without.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpc.protocol.contract import Table
from mpc.protocol.errors import LocalError
from mpc.settings import nearest
from parties import csvfile
from parties.csvfile import Misfit

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1 << 16  # part of the Arrow form: the same rows give the same bytes, whatever file they came from
BATCH_BYTES = 8 << 20  # likewise; of a batch's values, so that long texts do not take memory
SUFFIXES = {".csv": "csv", ".txt": "csv", ".gz": "gzip", ".zip": "zip", ".parquet": "parquet", ".pq": "parquet"}
SUFFIXES |= {".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".arrows": "arrow stream"}
HOLDS = {"csv": "text", "arrow": "an Arrow file", "arrow stream": "an Arrow stream", "parquet": "Parquet"}
HOLDS |= {"gzip": "gzip data", "zip": "a zip archive", "": "none of CSV, Parquet and Arrow"}

WORDS = {"bool": "true or false (bool)", "int64": "a whole number (int64)", "double": "a finite number (double)"}
WORDS |= {"string": "UTF-8 text (string)", "date": "a date like 2026-03-31 (date)"}
WORDS |= {"timestamp": "a time like 2026-03-31T09:00:00Z, to the microsecond (timestamp)"}


@dataclass(frozen=True)
class Source:
    """Where a table comes from: a path, or `package:NAME/path`, a file of an installed Python distribution."""

    location: str
    null: tuple[str, ...] = ("",)  # spellings of a missing value in a CSV


def spool(source: Source, table: Table, target: Path, progress: Callable[[int], None] | None = None) -> int:
    """Write the table's canonical form, an uncompressed Arrow IPC stream, to `target` (mode 600).

    Args:    progress: called with the bytes written so far.
    Returns: the size of `target` in bytes, at most `table.bytes_max`.
    Raises:  LocalError; then `target` is as it was.
    """
    import pyarrow as pa

    from enclave_runtime.programs.inputs import schema_of

    file = locate(source.location)
    part = target.with_name(f"{target.name}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        with pa.OSFile(str(part), "wb") as sink:
            rows = 0
            with pa.ipc.new_stream(sink, schema_of(table)) as writer:
                for batch in _even(_typed(file, source, table)):
                    writer.write_batch(_canonical(batch))
                    rows += batch.num_rows
                    _check_size(sink.tell(), table, file)
                    if progress is not None:
                        progress(sink.tell())
            size = int(sink.tell())
        if rows == 0:
            raise LocalError(f"{file}: holds no rows")
        _check_size(size, table, file)
        part.replace(target)  # no fsync: after a power failure the commitment no longer fits, and nothing is sealed
    except OSError as error:
        raise LocalError(f"{target}: cannot be written ({os.strerror(error.errno or 0)})") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return size


def locate(location: str) -> Path:
    """The file behind a source. Raises LocalError."""
    if not location:
        raise LocalError("no source: write `source = …` in the table's section, or name the file")
    file = _in_package(location.removeprefix("package:")) if location.startswith("package:") else Path(location)
    if not file.exists():
        raise LocalError(f"{file}: no such file")
    if not file.is_file():
        raise LocalError(f"{file}: is not a file")
    return file


def _in_package(location: str) -> Path:
    """Found in the distribution's list of files; nothing of it is imported or run."""
    name, _, inner = location.partition("/")
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        remedy = f"python -m pip install --no-deps {name}"
        raise LocalError(f"package:{location}: {name} is not installed here; {remedy}") from None
    for file in distribution.files or ():
        if str(file) in (location, inner):  # the folder in a package often has the distribution's name
            return Path(str(distribution.locate_file(file)))
    raise LocalError(f"package:{location}: {name} {distribution.version} has no such file")


def _typed(file: Path, source: Source, table: Table) -> "Iterator[pa.RecordBatch]":
    """Batches of at most BATCH_ROWS rows, with the contract's columns and types."""
    import pyarrow as pa

    from enclave_runtime.programs.inputs import schema_of

    kind, wanted, rows = _kind(file), schema_of(table), 0
    try:
        for batch in _read(file, kind, source.null, table, wanted):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                piece = batch.slice(start, BATCH_ROWS)
                columns = [_column(piece.column(field.name), field, rows) for field in wanted]
                yield pa.RecordBatch.from_arrays(columns, schema=wanted)
                rows += piece.num_rows
    except Misfit as misfit:
        line = csvfile.line_of(file, kind, misfit.row) if kind in csvfile.KINDS else ""
        words = next(WORDS[column.type] for column in table.columns if column.name == misfit.column)
        raise LocalError(f"{file}: row {misfit.row}{line}, column {misfit.column}", expected=words) from None


def _read(file: Path, kind: str, null: Sequence[str], table: Table, wanted: "pa.Schema") -> "Iterator[pa.RecordBatch]":
    if kind not in csvfile.KINDS:
        return _binary(file, kind, table)
    _check_names(file, csvfile.header(file, kind), table)
    return csvfile.read(file, kind, null, {field.name: field.type for field in wanted})


def _kind(file: Path) -> str:
    """What a file holds, by its first bytes; its name must not say otherwise."""
    try:
        with file.open("rb") as stream:
            head = stream.read(1 << 16)
    except OSError as error:
        raise LocalError(f"{file}: cannot be read ({error.strerror})") from None
    if not head:
        raise LocalError(f"{file}: is empty")
    kind = _sniffed(head)
    named = SUFFIXES.get(file.suffix.lower(), kind)
    if kind == "" or named.split()[0] != kind.split()[0]:
        raise LocalError(f"{file}", expected=f"{HOLDS[named] if named else 'CSV, Parquet or Arrow'}", got=HOLDS[kind])
    return kind


def _sniffed(head: bytes) -> str:
    magic = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow", b"\xff\xff\xff\xff": "arrow stream", b"\x1f\x8b": "gzip"}
    magic[b"PK\x03\x04"] = "zip"
    known = next((kind for start, kind in magic.items() if head.startswith(start)), "")
    return known or ("csv" if csvfile.is_text(head) else "")


def _binary(file: Path, kind: str, table: Table) -> "Iterator[pa.RecordBatch]":
    """Parquet, Arrow file or Arrow stream: only the contract's columns."""
    import pyarrow as pa

    names = [column.name for column in table.columns]
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as reader:
                _check_columns(file, reader.schema_arrow, table)
                batches = reader.iter_batches(batch_size=_parquet_rows(reader.metadata), columns=names)
                yield from map(_valid, batches)
            return
        with pa.OSFile(str(file), "rb") as stream:  # not mapped: its pages would count as this process's memory
            if kind == "arrow stream":
                reader = pa.ipc.open_stream(stream)
                _check_columns(file, reader.schema, table)
                yield from (_valid(batch.select(names)) for batch in reader)
            else:
                held = pa.ipc.open_file(stream).schema
                _check_columns(file, held, table)
                options = pa.ipc.IpcReadOptions(included_fields=[held.get_field_index(name) for name in names])
                reader = pa.ipc.open_file(stream, options=options)
                yield from (_valid(reader.get_batch(i).select(names)) for i in range(reader.num_record_batches))
    except PermissionError:
        raise LocalError(f"{file}: may not be read; mend its permissions") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        raise LocalError(f"{file}: is damaged or not {HOLDS[kind]} ({type(error).__name__})") from None


def _valid(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    batch.validate(full=True)  # forged offsets would read beyond the batch
    return batch


def _parquet_rows(held: Any) -> int:
    """Rows to decode at once: a batch, or fewer where rows are wide."""
    groups = [held.row_group(i) for i in range(held.num_row_groups)]
    row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(row_bytes, 1)))


def _check_columns(file: Path, held: "pa.Schema", table: Table) -> None:
    """Each column once, and of a type that can become the contract's."""
    _check_names(file, held.names, table)
    for column in table.columns:
        found = held.field(column.name).type
        if not _fits(found, column.type):
            raise LocalError(f"{file}: column {column.name}", expected=WORDS[column.type], got=f"a column of {found}")


def _check_names(file: Path, names: Sequence[str], table: Table) -> None:
    for column in table.columns:
        if (count := names.count(column.name)) != 1:
            problem = f"has {count} columns named" if count else "has no column"
            raise LocalError(f"{file}: {problem} {column.name}{'' if count else nearest(column.name, names)}")


def _check_size(size: int, table: Table, file: Path) -> None:
    if size > table.bytes_max:
        limit = f"at most {table.bytes_max} bytes of Arrow, as the contract says (bytes_max)"
        raise LocalError(f"{file}: is too big", expected=limit, got=f"{size} or more")


def _fits(found: "pa.DataType", wanted: str) -> bool:
    from pyarrow import types as is_

    if is_.is_dictionary(found):
        return _fits(found.value_type, wanted)
    number = is_.is_integer(found) or is_.is_floating(found) or is_.is_decimal(found)
    text = is_.is_string(found) or is_.is_large_string(found) or is_.is_string_view(found)
    when = is_.is_timestamp(found) or is_.is_date(found)
    fits = {"bool": is_.is_boolean(found), "string": text, "int64": number, "double": number}
    return bool(is_.is_null(found) or fits.get(wanted, when))


def _column(array: "pa.Array", field: "pa.Field", rows: int) -> "pa.Array":
    """The column in its canonical type, nothing rounded. Raises Misfit for its first value that does not fit."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def convert(part: pa.Array) -> pa.Array:
        cast = part.cast(field.type)
        if (
            pa.types.is_date32(field.type)
            and pa.types.is_timestamp(part.type)
            and not cast.cast(part.type).equals(part)
        ):
            raise pa.ArrowInvalid  # Arrow drops the time of day silently
        return cast

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        cast = array if array.type == field.type else convert(array)
    except pa.ArrowInvalid:
        raise Misfit(rows + _first(array, convert) + 1, field.name) from None
    if pa.types.is_floating(field.type):  # a NaN would poison every sum that it is in
        finite = pc.index(pc.is_finite(cast), value=False).as_py()
        if finite >= 0:
            raise Misfit(rows + finite + 1, field.name)
    return cast


def _first(array: "pa.Array", convert: "Callable[[pa.Array], pa.Array]") -> int:
    """Index of the first value that does not convert, by halving; the whole is known not to."""
    import pyarrow as pa

    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            convert(array.slice(low, middle - low))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _even(batches: "Iterator[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    """The same rows in batches whose sizes follow from the rows alone."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    rows = weight = 0
    for batch in batches:
        held.append(batch)
        rows, weight = rows + batch.num_rows, weight + _weight(batch)
        if rows >= BATCH_ROWS or weight > BATCH_BYTES:
            table = pa.Table.from_batches(held)
            while rows >= BATCH_ROWS or weight > BATCH_BYTES:
                count = _cut(table)
                yield from table.slice(0, count).combine_chunks().to_batches()
                table = table.slice(count)
                rows, weight = table.num_rows, _weight(table)
            held = table.to_batches()
    if rows:
        yield from pa.Table.from_batches(held).combine_chunks().to_batches()


def _cut(table: "pa.Table") -> int:
    """Rows of the next batch: the most, halving from BATCH_ROWS, whose values fit into BATCH_BYTES, but one."""
    count = BATCH_ROWS
    while count > 1 and _weight(table.slice(0, count)) > BATCH_BYTES:
        count //= 2
    return min(count, int(table.num_rows))


def _weight(rows: "pa.RecordBatch | pa.Table") -> int:
    """Bytes of values, the same however the rows are chunked."""
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = [column for column in rows.columns if pa.types.is_string(column.type)]
    return int(rows.num_rows * 8 * rows.num_columns + sum(pc.sum(pc.binary_length(t)).as_py() or 0 for t in texts))


def _canonical(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """The same batch with nothing left to chance: exact lengths, and zeros where no value is."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([_clean(column) for column in batch.columns], schema=batch.schema)


def _clean(array: "pa.Array") -> "pa.Array":
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, length, valid = array.type, len(array), None
    if array.null_count:
        valid = _bits(pc.is_valid(array))
        zero = pa.scalar("" if pa.types.is_string(kind) else 0, kind) if kind != pa.bool_() else pa.scalar(False)
        array = pc.fill_null(array, zero)
    if pa.types.is_boolean(kind):
        values = [_bits(array)]
    elif pa.types.is_string(kind):
        array = pa.concat_arrays([array.slice(0, 1), array.slice(1)])  # offsets begin at 0
        _, offsets, text = array.buffers()
        size = pc.sum(pc.binary_length(array)).as_py()
        values = [offsets.slice(0, 4 * (length + 1)), text.slice(0, size) if size else pa.py_buffer(b"")]
    else:
        width = kind.bit_width // 8
        values = [array.buffers()[1].slice(array.offset * width, length * width)]
    return pa.Array.from_buffers(kind, length, [valid, *values])


def _bits(flags: "pa.Array") -> "pa.Buffer":
    """As a bitmap that begins at its first bit and ends in zeros: written anew, not sliced."""
    import pyarrow as pa

    return flags.cast(pa.uint8()).cast(pa.bool_()).buffers()[1].slice(0, (len(flags) + 7) // 8)
