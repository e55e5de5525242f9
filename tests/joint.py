"""Contracts and tables for the tests of joint programs."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from enclave_runtime.programs.inputs import schema_of
from mpc.protocol.contract import (
    Approvals,
    Column,
    Contract,
    Deadlines,
    Enclave,
    Measurement,
    Participant,
    Program,
    Rule,
    Table,
    Use,
)

Rows = Sequence[dict[str, Any]]


def column(name: str, kind: Any, *use: Use, buckets: Sequence[float] = (), clamp: Sequence[float] = ()) -> Column:
    return Column(name, kind, use, tuple(map(float, buckets)), tuple(map(float, clamp)))


def aggregate(k: int, *entity: str) -> Rule:
    return Rule("aggregate", entity, k)


EXACT = Rule("exact")


def table(name: str, owner: str, rule: Rule, *columns: Column, bytes_max: int = 1 << 26) -> Table:
    return Table(name, owner, rule, columns, bytes_max)


def contract(
    tables: Sequence[Table],
    query: str,
    recipients: Sequence[str] = ("analyst",),
    cpus: int = 1,
    memory_bytes: int = 2 << 30,
    kind: str = "sql",
) -> Contract:
    """Everything that a program does not look at is made up."""
    names = dict.fromkeys([*(described.owner for described in tables), *recipients])
    participants = tuple(Participant(name, i.to_bytes(32), bytes(1216)) for i, name in enumerate(names))
    return Contract(
        version=1,
        random=bytes(32),
        name="test",
        title="A test",
        author=bytes(32),
        participants=participants,
        tables=tuple(tables),
        program=Program(kind, query),
        recipients=tuple(recipients),
        receipt_recipients=(),
        approvals=Approvals(),
        enclave=Enclave(
            "sql", (Measurement("any", b"1" * 48, b"2" * 48, b"3" * 48),), bytes(32), True, cpus, memory_bytes
        ),
        deadlines=Deadlines(1, 2, 3),
        epochs_max=1,
    )


def arrow(described: Table, rows: Rows) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema_of(described))


def stream(rows: pa.Table, **options: Any) -> bytes:
    """Arrow IPC stream, as a party seals it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue().to_pybytes())


def read(result: bytes) -> list[dict[str, Any]]:
    return list(pa.ipc.open_stream(result).read_all().to_pylist())
