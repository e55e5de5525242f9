"""How many keys all parties have in common, or which; each party's table is a set of its own."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from enclave_runtime.programs import Disclosure, ProgramRefused
from enclave_runtime.programs.common import Stack, counted, exactly, example, guarded, read, warnings
from enclave_runtime.programs.duck import RESULT_BYTES_MAX, connect, encode, register
from enclave_runtime.programs.duck import column as rebuilt
from enclave_runtime.programs.inputs import TYPES
from mpc.protocol.contract import Contract, Names
from mpc.protocol.encoding import Limit, Record, Text
from mpc.protocol.errors import ContractError

TABLES_MAX = 256  # the engine limits how deep a query may be
KEY_TYPES = ("string", "int64", "date")
# The characters with the property White_Space of Unicode. Source: PropList.txt, Unicode 15.1.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@dataclass(frozen=True)
class Parameters(Record):
    keys: Annotated[tuple[Text, ...], Limit(1, TABLES_MAX)] = field(
        metadata=example('["customers.email", "subscribers.mail"]')
    )
    normalize: Annotated[tuple[Literal["nfc", "trim", "casefold"], ...], Limit(0, 3)] = field(
        metadata=example('["nfc", "trim", "casefold"], or [] to compare as it is')
    )
    members_to: Names = field(metadata=example("[], or recipients that get the keys themselves"))


@dataclass(frozen=True)
class _Plan:
    keys: tuple[str, ...]  # the key's column in each of the contract's tables, in their order
    kind: str  # the keys' type
    normalize: tuple[str, ...]
    members_to: tuple[str, ...]


def warm() -> None:
    """What normalises."""
    normalized(pa.chunked_array([["A ", "\u00c4"]], TYPES["string"]), ("nfc", "trim", "casefold"))


def check(contract: Contract) -> Disclosure:
    """Raises ContractError."""
    plan = _plan(contract)
    steps = {"nfc": "Unicode NFC", "trim": "no white space around", "casefold": "letter case folded"}
    how = ", ".join(words for step, words in steps.items() if step in plan.normalize) or "as they are"
    size = "number of distinct keys that every party has: " + "; ".join(
        f"{table.owner} {'allows join' if table.rule.kind == 'aggregate' else 'agreed to the program'}"
        for table in contract.tables
    )
    columns, others = [], [name for name in contract.recipients if name not in plan.members_to]
    if others:
        columns = [("size", f"{size}. For {', '.join(others)}")]
        columns.append(("suppressed", "whether the size is not shown, because too few are behind it"))
    if plan.members_to:
        columns.append(("key", f"each key that every party has. Only for {', '.join(plan.members_to)}"))
    rules = [f"keys are compared exactly, {how}; a missing key matches nothing, a key counts once however often it is"]
    for table in contract.tables:
        if table.rule.kind == "exact":
            rules.append(exactly(table))
            continue
        if table.rule.k == 1:
            rules.append(f"{table.name} of {table.owner}: every size is shown (k = 1)")
            continue
        few = f"1 to {table.rule.k - 1} keys" + (f", or so many {counted(table)}" if table.rule.entity else "")
        rules.append(
            f"{table.name} of {table.owner}: a size that rests on {few} is not shown; the recipient reads no number, "
            f"and that it is suppressed"
        )
    told = warnings(contract, contract.tables)
    for name in others:
        if name in contract.parties and any(table.rule.k for table in contract.tables if table.owner != name):
            told.append(f"a size of 0, or of all its keys, tells {name} of each of its keys whether the others have it")
    return Disclosure(tuple(columns), tuple(rules), contract.recipients, tuple(told))


def run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    """Returns: recipient → the size, or the keys in the order of their bytes. Raises ProgramRefused."""
    return guarded(contract, lambda: _run(contract, _plan(contract), tables))


def _plan(contract: Contract) -> _Plan:
    given = read(contract, Parameters)
    found: dict[str, str] = {}
    kinds = set()
    for index, text in enumerate(given.keys):
        place = f"program.parameters.keys[{index}]"
        name, _, key = text.partition(".")
        sources = tuple(i for i, table in enumerate(contract.tables) if table.name == name)
        if not sources or name in found:
            names = ", ".join(sorted({table.name for table in contract.tables}))
            raise ContractError(place, expected=f"table.column of each table once ({names})", got=repr(text[:80]))
        column = Stack(contract, sources).column(place, key, KEY_TYPES, "join")
        found[name] = column.name
        kinds.add(column.type)
    if missing := sorted({table.name for table in contract.tables} - found.keys()):
        raise ContractError(
            "program.parameters.keys", expected=f"a key of table {missing[0]} too: every party's counts"
        )
    if len(contract.tables) > TABLES_MAX:
        raise ContractError("tables", expected=f"at most {TABLES_MAX}", got=len(contract.tables))
    if len(contract.parties) < 2:
        raise ContractError("tables", expected="tables of at least two parties: one alone has no intersection")
    if len(kinds) > 1:
        raise ContractError("program.parameters.keys", expected="columns of one type", got=", ".join(sorted(kinds)))
    if given.normalize and kinds != {"string"}:
        raise ContractError("program.parameters.normalize", expected=f"[]: keys are of type {kinds.pop()}")
    if strangers := sorted(set(given.members_to) - set(contract.recipients)):
        expected = f"recipients of the result ({', '.join(contract.recipients)})"
        raise ContractError("program.parameters.members_to", expected=expected, got=strangers[0])
    limited = next((table for table in contract.tables if table.rule.kind == "aggregate"), None)
    if given.members_to and limited:
        raise ContractError(
            f"program.parameters.members_to: {limited.owner}'s rule for {limited.name} is aggregate, and single keys "
            f"would leave",
            expected="members_to = [], or a rule of kind exact of every owner",
        )
    keys = tuple(found[table.name] for table in contract.tables)
    return _Plan(keys, kinds.pop(), given.normalize, given.members_to)


def _run(contract: Contract, plan: _Plan, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    connection = connect(contract, contract.enclave.cpus)
    for i, (described, table) in enumerate(zip(contract.tables, tables, strict=True)):
        values = [normalized(table[plan.keys[i]], plan.normalize)]
        values += [table[name] for name in described.rule.entity]
        names = ["key", *(f"entity {j}" for j in range(len(described.rule.entity)))]
        register(connection, f"t{i}", pa.table(values, names=names))
    # Where each row or each key is an entity there are as many of these as keys, or more.
    doubtful = [i for i, t in enumerate(contract.tables) if t.rule.k and t.rule.entity not in ((), (plan.keys[i],))]
    first, *others = sorted(range(len(tables)), key=lambda i: tables[i].num_rows)
    members = f"SELECT DISTINCT key FROM t{first}" + "".join(f" SEMI JOIN t{i} USING (key)" for i in others)
    if doubtful or plan.members_to:
        connection.execute(f"CREATE TEMP TABLE members AS {members}")
        members = "FROM members"
    ((size,),) = connection.execute(f"SELECT count(*) FROM ({members})").fetchall()
    limits = [table.rule.k for table in contract.tables]
    suppressed = 0 < size < max(limits) or any(0 < _entities(connection, contract, i) < limits[i] for i in doubtful)
    columns = [pa.array([None if suppressed else size], pa.int64()), pa.array([suppressed], pa.bool_())]
    results = dict.fromkeys(contract.recipients, encode(["size", "suppressed"], columns))
    if plan.members_to:  # every rule is exact
        keys: pa.Table = connection.sql("FROM members ORDER BY key").to_arrow_table()
        if keys.nbytes > RESULT_BYTES_MAX:
            raise ProgramRefused("result-size")
        results |= dict.fromkeys(plan.members_to, encode(["key"], [rebuilt(keys["key"], TYPES[plan.kind])]))
    return results


def _entities(connection: duckdb.DuckDBPyConnection, contract: Contract, i: int) -> int:
    """How many of that table have a key that all parties have; exact below k."""
    hashed = ", ".join(f'"entity {j}"' for j in range(len(contract.tables[i].rule.entity)))
    rows = f"(SELECT hash({hashed}) AS entity FROM t{i} SEMI JOIN members USING (key))"
    # 64 bits, with at most as many ones as entities: where there are k, no need to count.
    for count in ("coalesce(bit_count(bit_or(1::UBIGINT << (entity & 63))), 0)", "count(DISTINCT entity)"):
        ((found,),) = connection.execute(f"SELECT {count} FROM {rows}").fetchall()
        if found >= contract.tables[i].rule.k:
            break
    return int(found)


def normalized(values: pa.ChunkedArray, steps: Sequence[str]) -> pa.ChunkedArray:
    """Strings by the steps named, in this order: nfc, trim, casefold, and nfc again, which folding may undo."""
    if not steps:
        return values
    return pa.chunked_array([_normalized(chunk, steps) for chunk in values.chunks], values.type)


def _normalized(values: pa.Array, steps: Sequence[str]) -> pa.Array:
    """ASCII by Arrow at once, everything else one by one."""
    plain = values
    if "trim" in steps:
        plain = pc.ascii_trim(plain, SPACES[:6])
    if "casefold" in steps:
        plain = pc.ascii_lower(plain)
    other = pc.fill_null(pc.invert(pc.string_is_ascii(values)), False)
    if not pc.any(other).as_py():
        return plain
    texts = [_normal(text, steps) for text in values.filter(other).to_pylist()]
    return pc.replace_with_mask(plain, other, pa.array(texts, values.type))


def _normal(text: str, steps: Sequence[str]) -> str:
    if "nfc" in steps:
        text = unicodedata.normalize("NFC", text)
    if "trim" in steps:
        text = text.strip(SPACES)
    if "casefold" in steps:
        text = text.casefold()
        text = unicodedata.normalize("NFC", text) if "nfc" in steps else text
    return text
