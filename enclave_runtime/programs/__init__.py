"""The one shape of a joint program, and the table of them.

A program is a module with `check` (static; every party runs it before it consents) and `run` (inside the
enclave, pure: the same inputs give the same bytes).
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from mpc.protocol.contract import Contract
from mpc.protocol.errors import ContractError, MpcError
from mpc.protocol.messages import Reason

if TYPE_CHECKING:
    import pyarrow as pa

# Kind → module. All that there are: what is not in the image or not in this table cannot run.
MODULES = {
    "sql": "enclave_runtime.programs.sql",
    "intersection": "enclave_runtime.programs.intersection",
    "statistics": "enclave_runtime.programs.statistics",
    "regression": "enclave_runtime.programs.regression",
    "auction": "enclave_runtime.programs.auction",
    "wasm": "enclave_runtime.programs.wasm",
}

# All that a failed computation says. Nothing else leaves: the engine's own words quote data.
CODES: dict[Reason, str] = {
    "input": "a table is not Arrow of the contract's schema; its owner must prepare it again",
    "query": "the enclave refuses the query that the parties' own checks should have refused",
    "fan-out": "a join would count rows of an aggregated table more than once: the other table's key is not unique",
    "memory": "the engine needs more memory than the contract's enclave has",
    "time": "the program did not end in time",
    "result-size": "the result is larger than a result may be; group by fewer or coarser columns",
    "engine": "the engine failed; it does not say why, because its words quote data",
}


class ProgramRefused(MpcError):
    """The computation gives no result."""

    def __init__(self, code: Reason, table_index: int | None = None) -> None:
        """`code` is a key of CODES; `table_index`, into the contract's tables, says whose table it is about."""
        super().__init__(CODES[code])
        self.code, self.table_index = code, table_index


@dataclass(frozen=True)
class Disclosure:
    """What a contract would disclose, in words for the people who consent."""

    columns: tuple[tuple[str, str], ...]  # of the result: name, and why it is allowed
    rules: tuple[str, ...]
    recipients: tuple[str, ...]
    warnings: tuple[str, ...]


class JointProgram(Protocol):
    def warm(self) -> None:
        """Load libraries as far as a run needs them; afterwards there are no files."""

    def check(self, contract: Contract) -> Disclosure:
        """Raises ContractError: which rule of which owner forbids what, where in the program, and the remedy."""

    def run(self, contract: Contract, tables: "list[pa.Table]") -> dict[str, bytes]:
        """Args: tables: validated, in the order of the contract's. Returns: recipient → Arrow IPC stream.

        Raises: ProgramRefused.
        """


def warm() -> None:
    """Load what the programs of this image need, while files can still be read."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own reserves a GiB of address space, which is limited
    for module in MODULES.values():
        with suppress(ImportError):  # another variant of the image
            cast(JointProgram, import_module(module)).warm()


def program(kind: str) -> JointProgram:
    """The program of a contract's kind; imports its libraries now. Raises ContractError."""
    if kind not in MODULES:
        raise ContractError("program kind", expected=f"one of {', '.join(sorted(MODULES))}", got=kind)
    try:
        return cast(JointProgram, import_module(MODULES[kind]))
    except ModuleNotFoundError as error:  # an extra; in an enclave, another variant of the image
        what = f"program kind {kind}: {error.name} is not installed here"
        raise ContractError(what, expected=f"pip install 'enclave-mpc[{kind}]'") from None


def open_tables(contract: Contract, buffers: Sequence[object], only: int = -1) -> "list[pa.Table]":
    """See enclave_runtime.programs.inputs, which imports Arrow."""
    from enclave_runtime.programs import inputs

    return inputs.open_tables(contract, buffers, only)
