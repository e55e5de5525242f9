"""What programs with parameters share: reading them, finding what they name, and what people are told."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import frexp
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from enclave_runtime.programs import ProgramRefused
from mpc.protocol.contract import Column, Contract, Table, Use
from mpc.protocol.encoding import Record, decode
from mpc.protocol.errors import ContractError, EncodingError

MEMORY_BYTES_MIN = 320 << 20  # of the engine's process with a small table
CLAMP_MAX = 1e30
WHOLE_BITS = 47  # of a value made whole: 2**32 products of two of them are below 2**126
FINE_BITS = 62  # of a value that is added up and not multiplied

Parameters = TypeVar("Parameters", bound=Record)
_WORDS = {"int": "a whole number", "float": "a number with a point", "str": "text", "tuple": "a list"}
_WORDS |= {"bool": "true or false", "list": "a list", "dict": "a table", "NoneType": "nothing"}


def example(text: str) -> dict[str, str]:
    """Metadata of a field of parameters: what a person may write there, as TOML."""
    return {"example": text}


def read(contract: Contract, kind: type[Parameters]) -> Parameters:
    """The contract's parameters as the program's own record, each field of which has an `example`.

    Raises: ContractError: `program.parameters.FIELD`, what is wrong with it, and what would be right.
    """
    if contract.program.text:
        raise ContractError("program.query", expected=f"none: {contract.program.kind} has parameters")
    if contract.enclave.memory_bytes < MEMORY_BYTES_MIN:
        expected, got = (f"{size >> 20} MiB" for size in (MEMORY_BYTES_MIN, contract.enclave.memory_bytes))
        raise ContractError("enclave memory", expected=f"at least {expected}", got=got)
    for table in contract.tables:
        if table.rule.kind not in ("aggregate", "exact"):  # nothing here knows how to keep another rule
            what = f"{table.owner}'s rule for {table.name} is {table.rule.kind}"
            expected = "a rule of kind aggregate or exact"
            raise ContractError(f"{what}, which {contract.program.kind} cannot keep", expected=expected)
    examples = {field.name: f"{field.name} = {field.metadata['example']}" for field in fields(kind)}  # type: ignore[arg-type]
    try:
        plain = decode(contract.program.parameters) if contract.program.parameters else {}
        given = plain.keys() if isinstance(plain, dict) else set()
        if unknown := sorted(given - examples.keys()):
            known = ", ".join(examples)
            raise ContractError(f"program.parameters: {unknown[0][:40]!r} is none of this program's", expected=known)
        for name in examples:
            if name not in given:
                raise ContractError(f"program.parameters.{name}: is missing", expected=f"for example {examples[name]}")
        return kind.decode(contract.program.parameters)
    except EncodingError as error:
        place = error.what.partition(".")[2]  # the record's own name before it
        if not place:
            raise ContractError(f"program.parameters: {error}") from None
        wanted, found = (_WORDS.get(str(word), word) for word in (error.expected, error.got))
        shown = examples.get(place.partition("[")[0])  # none of what lies deeper
        wanted = f"{wanted}; for example {shown}" if shown else wanted
        raise ContractError(f"program.parameters.{place}", expected=wanted, got=found) from None


def guarded(contract: Contract, compute: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """What a run's failures become. Raises ProgramRefused and nothing else: an engine's own words quote data."""
    pa.set_cpu_count(contract.enclave.cpus)
    try:
        return compute()
    except ProgramRefused:
        raise
    except ContractError:
        raise ProgramRefused("query") from None
    except (MemoryError, duckdb.OutOfMemoryException):
        raise ProgramRefused("memory") from None
    except Exception:
        raise ProgramRefused("engine") from None


@dataclass(frozen=True)
class Stack:
    """All owners' tables of one name, one under the other."""

    contract: Contract
    sources: tuple[int, ...]  # indices into the contract's tables

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        return tuple(self.contract.tables[source] for source in self.sources)

    @cached_property
    def limited(self) -> tuple[Table, ...]:
        """Of owners whose rule is aggregate."""
        return tuple(table for table in self.tables if table.rule.kind == "aggregate")

    @property
    def name(self) -> str:
        return self.tables[0].name

    @property
    def owners(self) -> str:
        return ", ".join(table.owner for table in self.tables)

    @property
    def entity(self) -> tuple[str, ...]:
        """Columns that name one entity; none: each row is one."""
        return self.limited[0].rule.entity if self.limited else ()

    def column(self, place: str, name: str, types: Iterable[str], use: Use | None = None) -> Column:
        """Args: place: in the parameters. use: what an aggregate rule must list. Raises ContractError."""
        column = next((column for column in self.tables[0].columns if column.name == name), None)
        if column is None:
            names = ", ".join(column.name for column in self.tables[0].columns)
            raise ContractError(f"{place}: table {self.name} has no column {name[:40]!r}", expected=f"one of {names}")
        if column.type not in types:
            raise ContractError(f"{place}: {self.name}.{name}", expected=f"a column of {_or(types)}", got=column.type)
        for table in self.limited if use else ():
            allowed = next(column.use for column in table.columns if column.name == name)
            if use not in allowed:
                listed = ", ".join(allowed) or "nothing"
                raise ContractError(
                    f"{place}: {table.owner} does not allow {use} of {self.name}.{name}",
                    expected=f"a use that the owner lists ({listed}), or another column",
                )
        return column

    def same(self, place: str, column: Column, field: str) -> None:
        """Raises ContractError unless all owners describe that of the column alike."""
        told = {getattr(other, field) for table in self.tables for other in table.columns if other.name == column.name}
        if len(told) > 1:
            raise ContractError(
                f"{place}: {field} of {self.name}.{column.name}", expected=f"the same for all owners ({self.owners})"
            )

    def clamped(self, place: str, column: Column) -> None:
        """Raises ContractError unless values of the column can be added up exactly: its range is in the contract."""
        if column.type == "bool":
            return
        self.same(place, column, "clamp")
        what = f"{place}: {self.name}.{column.name}"
        if not column.clamp:
            raise ContractError(
                f"{what} has no clamp",
                expected="clamp = [low, high] of all owners: values are moved into it, and added up without rounding",
            )
        if max(map(abs, column.clamp)) > CLAMP_MAX:
            raise ContractError(f"{what}: clamp", expected=f"within ±{CLAMP_MAX:g}")
        if column.type == "int64" and not all(edge.is_integer() for edge in column.clamp):
            raise ContractError(f"{what}: clamp", expected="whole numbers, as the column's are")


def stack(contract: Contract, place: str, name: str) -> Stack:
    """Raises ContractError: no such table, or owners who count different entities."""
    sources = tuple(i for i, table in enumerate(contract.tables) if table.name == name)
    if not sources:
        names = ", ".join(sorted({table.name for table in contract.tables}))
        raise ContractError(f"{place}: no table {name[:40]!r} in the contract", expected=f"one of {names}")
    found = Stack(contract, sources)
    if len({table.rule.entity for table in found.limited}) > 1:
        raise ContractError(
            f"{place}: the entity of table {name}", expected=f"the same columns for all owners ({found.owners})"
        )
    return found


def exponent(column: Column, bits: int = WHOLE_BITS) -> int:
    """A value of a column with a clamp is a whole number below 2**bits times 2**-exponent; exactly, if it is one."""
    if column.type == "bool":
        return 0
    most = 0 if column.type == "int64" else 100
    return min(bits - frexp(max(map(abs, column.clamp)))[1], most)


def whole(column: Column, bits: int = WHOLE_BITS) -> str:
    """SQL of that whole number."""
    name = f'"{column.name}"'
    if column.type == "bool":
        return f"CAST({name} AS BIGINT)"
    shift = exponent(column, bits)
    if column.type == "int64" and shift == 0:
        return moved(column)
    return f"CAST({moved(column)} * {2.0**shift:.17e}::DOUBLE AS BIGINT)"


def moved(column: Column) -> str:
    """SQL of a value, moved into the clamp."""
    name, integer = f'"{column.name}"', column.type == "int64"
    low, high = (str(int(edge)) if integer else f"{edge:.17e}::DOUBLE" for edge in column.clamp)
    zero = "0" if integer else "0::DOUBLE"  # which has two signs, one of which would show by chance
    return (
        f"CASE WHEN {name} < {low} THEN {low} WHEN {name} > {high} THEN {high} "
        f"WHEN {name} = 0 THEN {zero} ELSE {name} END"
    )


# what mpc check prints


def counted(table: Table) -> str:
    """What a rule counts."""
    return f"distinct {', '.join(table.rule.entity)}" if table.rule.entity else "rows"


def shown(stacked: Stack, column: Column, clamped: bool = True) -> str:
    """A column, and how far its values are moved."""
    moved = " (moved into {:g} to {:g})".format(*column.clamp) if column.clamp and clamped else ""
    return f"{stacked.name}.{column.name}{moved}"


def allowing(stacked: Stack, use: str) -> str:
    return ", ".join(
        f"{table.owner} {f'allows {use}' if table.rule.kind == 'aggregate' else 'agreed to the program'}"
        for table in stacked.tables
    )


def warnings(contract: Contract, used: Sequence[Table]) -> list[str]:
    """What no group size prevents, what is not limited, and what is sealed for nothing."""
    limited = [table for table in used if table.rule.kind == "aggregate"]
    told = []
    for recipient in contract.recipients:
        others = dict.fromkeys(table.owner for table in limited if table.owner != recipient)
        if recipient in contract.parties and others:
            told.append(
                f"{recipient} contributes rows and receives the result: with rows that it forges it could read "
                f"single rows of {', '.join(others)} out of the result; no group size prevents that"
            )
    for table in limited:
        if not table.rule.entity:
            told.append(f"{table.name} of {table.owner}: each row counts as one entity, whoever it is about")
        if table.rule.k == 1:
            told.append(f"{table.name} of {table.owner}: what rests on one entity is shown (k = 1)")
    idle = [table for table in contract.tables if table not in used]
    told += [
        f"{table.name} of {table.owner} is sealed to the enclave, but the program does not use it" for table in idle
    ]
    return told


def exactly(table: Table) -> str:
    return f"{table.name} of {table.owner}: the program is agreed by its parameters, nothing else is limited"


def _or(words: Iterable[Any]) -> str:
    return " or ".join(words)
