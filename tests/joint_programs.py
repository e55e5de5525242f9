"""Contracts of programs with parameters, and their results, for the tests of these programs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from joint import Rows, arrow, contract, read

from enclave_runtime import programs
from enclave_runtime.engine import Engine
from mpc.protocol.contract import Contract, Program, Table
from mpc.protocol.encoding import encode


def agreed(
    kind: str, tables: Sequence[Table], parameters: Mapping[str, Any], *recipients: str, **options: Any
) -> Contract:
    drafted = contract(tables, "", recipients or ("analyst",), **options)
    return replace(drafted, program=Program(kind, "", encode(dict(parameters))))


def results(described: Contract, *rows: Rows | pa.Table) -> dict[str, bytes]:
    """Checked and run; rows of the contract's tables, in order."""
    program = programs.program(described.program.kind)
    program.check(described)
    given = [one if isinstance(one, pa.Table) else arrow(t, one) for t, one in zip(described.tables, rows, strict=True)]
    return program.run(described, given)


def told(described: Contract, *rows: Rows | pa.Table) -> list[dict[str, Any]]:
    """What the first recipient reads."""
    return read(results(described, *rows)[described.recipients[0]])


def in_engine(described: Contract, sealed: Sequence[bytes]) -> dict[str, bytes]:
    """By the enclave's own child process. It inherits what these tests have in memory, and so may have more."""
    roomy = replace(described, enclave=replace(described.enclave, memory_bytes=1 << 36))
    files = []
    try:
        for data in sealed:
            files.append((os.memfd_create("table"), len(data)))
            os.write(files[-1][0], data)
        return Engine().compute(roomy, files, 60)
    finally:
        for file, _ in files:
            os.close(file)
