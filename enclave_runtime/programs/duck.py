"""DuckDB without files, network, extensions or settings; and the one form of a result's bytes."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import duckdb
import pyarrow as pa

from enclave_runtime.programs import ProgramRefused
from mpc.protocol.contract import Contract
from mpc.protocol.errors import ContractError

RESULT_BYTES_MAX = 64 << 20  # a result is for people or for a next step, not a dataset
PARSER_BYTES = 256 << 20
TIMESTAMP = pa.timestamp("us", tz="UTC")

_opened: list[duckdb.DuckDBPyConnection] = []  # made before there is a job, and used for one
_LOCKED = (
    "SET python_enable_replacements=false",
    "SET disabled_filesystems='LocalFileSystem'",
    "SET enable_progress_bar=false",
    "SET lock_configuration=true",
)


def warm() -> None:
    """Open the job's database before there is a job."""
    _opened.append(_open())


def connect(contract: Contract, threads: int) -> duckdb.DuckDBPyConnection:
    """A fresh database in memory, for one job, with a part of the enclave's memory: the tables lie outside it."""
    return _locked(_opened.pop() if _opened else _open(), contract.enclave.memory_bytes * 6 // 10, threads)


def _open() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:",
        config={
            "enable_external_access": "false",  # first: later ones would be refused in another order
            "temp_directory": "",
            "max_temp_directory_size": "0B",
            "threads": "1",
            "autoload_known_extensions": "false",
            "autoinstall_known_extensions": "false",
            "allow_community_extensions": "false",
        },
    )


def _locked(connection: duckdb.DuckDBPyConnection, memory_bytes: int, threads: int) -> duckdb.DuckDBPyConnection:
    """Nothing but queries from now on. Source: DuckDB's "Securing DuckDB"."""
    for statement in (f"SET memory_limit='{memory_bytes}B'", f"SET threads={threads}", *_LOCKED):
        connection.execute(statement)
    return connection


def place(text: str, node: dict[str, Any]) -> str:
    """Where a node of the parse tree begins in the query: 'query 3:14', line and column from 1."""
    offset = node.get("query_location", 0)  # in bytes of UTF-8; 2**64-1 says unknown
    before = text.encode()[: offset if offset < 2**32 else 0].decode(errors="ignore")
    return f"query {before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


@cache
def parser() -> duckdb.DuckDBPyConnection:
    """A database that sees queries and no data."""
    return _locked(_open(), PARSER_BYTES, 1)


def parse(contract: Contract) -> dict[str, Any]:
    """The engine's own parse tree of the one SELECT that the query is, default values left out."""
    text = contract.program.text
    serialize = "SELECT json_serialize_sql($1::VARCHAR, skip_null := true, skip_empty := true, skip_default := true)"
    try:
        (row,) = parser().cursor().execute(serialize, [text]).fetchall()
        tree = json.loads(row[0])
    except duckdb.OutOfMemoryException:
        raise
    except (duckdb.Error, ValueError, RecursionError):
        raise ContractError("query: the engine cannot read it", expected="one SELECT") from None
    if tree["error"] and "position" in tree:
        where = place(text, {"query_location": int(tree["position"])})
        raise ContractError(f"{where}: {tree['error_message']}")
    if tree["error"] or len(tree["statements"]) != 1 or set(tree["statements"][0]) != {"node"}:
        raise ContractError("query", expected="exactly one SELECT, without parameters")
    node: dict[str, Any] = tree["statements"][0]["node"]
    return node


def register(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    """A table for the engine to read in place; times are UTC and carry no zone there, so no zone database is needed."""
    columns = [column.cast(pa.timestamp("us")) if column.type == TIMESTAMP else column for column in table.columns]
    connection.register(name, pa.table(columns, names=table.column_names))


def column(values: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    """Rebuilt value by value: the engine leaves its own memory under nulls and behind the last bit.

    Args: kind: of the result; temporal ones only where the values' own are of the same width.
    """
    if not pa.types.is_temporal(kind):
        return pa.array(values.to_pylist(), kind)
    integer = pa.int32() if pa.types.is_date32(kind) else pa.int64()  # Python's own dates end in the year 9999
    whole = values.combine_chunks().view(integer)
    return pa.array(whole.to_pylist(), integer).view(kind)


def encode(names: Sequence[str], columns: Sequence[pa.Array]) -> bytes:
    """Arrow IPC stream of one batch. Raises ProgramRefused result-size."""
    batch = pa.record_batch(list(columns), names=list(names))
    if batch.nbytes > RESULT_BYTES_MAX:
        raise ProgramRefused("result-size")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())
