"""Arrow that a party sealed is hostile: checked whole before anything reads it."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from enclave_runtime.programs import ProgramRefused
from mpc.protocol.contract import Contract, Table

TYPES = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "double": pa.float64(),  # finite or null
    "string": pa.string(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def schema_of(table: Table) -> pa.Schema:
    """The Arrow schema that a sealed table has: flat, nullable, without metadata."""
    return pa.schema([(column.name, TYPES[column.type]) for column in table.columns])


def open_tables(contract: Contract, buffers: Sequence[object], only: int = -1) -> list[pa.Table]:
    """`buffers` (anything with the buffer protocol) in the order of the contract's tables, or of table `only`; read
    in place.

    Raises: ProgramRefused input, or memory, with the index of the first table that is wrong.
    """
    opened, indices = [], range(len(contract.tables)) if only < 0 else (only,)
    for index, buffer in zip(indices, buffers, strict=True):
        table = contract.tables[index]
        try:
            opened.append(open_table(buffer, table))
        except ProgramRefused as refused:
            raise ProgramRefused(refused.code, index) from None
    return opened


def open_table(buffer: object, table: Table) -> pa.Table:
    """One table from an Arrow IPC stream, without a copy. Raises ProgramRefused input, or memory."""
    try:
        return _open(pa.py_buffer(buffer), schema_of(table), table.bytes_max)
    except MemoryError:
        raise ProgramRefused("memory") from None
    except Exception:  # whatever Arrow has to say about bytes that somebody forged
        raise ProgramRefused("input") from None


def _open(data: pa.Buffer, schema: pa.Schema, bytes_max: int) -> pa.Table:
    source = pa.BufferReader(data)
    options = pa.ipc.IpcReadOptions(use_threads=False, ensure_alignment=pa.ipc.Alignment.DataTypeSpecific)
    reader = pa.ipc.open_stream(source, options=options)
    # Metadata or a flag in the schema could change how a library reads the data.
    if data.size > bytes_max or not reader.schema.equals(schema, check_metadata=True):
        raise ProgramRefused("input")
    opened = pa.Table.from_batches(_batches(reader, data), schema)
    if source.tell() != data.size:
        raise ProgramRefused("input")
    opened.validate(full=True)  # offsets inside their buffers, UTF-8, null counts
    for column in opened.columns:
        if column.type == TYPES["double"] and pc.all(pc.is_finite(column)).as_py() is False:
            raise ProgramRefused("input")
    return opened


def _batches(reader: Any, data: pa.Buffer) -> Iterator[pa.RecordBatch]:
    for batch, metadata in reader.iter_batches_with_custom_metadata():
        buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
        for buffer in buffers:
            # Elsewhere lies what was decompressed, byte-swapped or realigned, which no honest writer needs.
            inside = data.address <= buffer.address and buffer.address + buffer.size <= data.address + data.size
            if buffer.size and not inside:
                raise ProgramRefused("input")
        if metadata is not None:
            raise ProgramRefused("input")
        yield batch
