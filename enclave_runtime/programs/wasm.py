"""A module in any language, compiled to WebAssembly: every owner agrees to it by its bytes, which the contract holds.

It is a function of the tables alone: no clock, chance, thread, file or message, and one answer to every computation
with numbers. What it exports is in docs/PROGRAMS.md. It can read nothing but its own memory.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
import wasmtime

from enclave_runtime.programs import Disclosure, ProgramRefused
from enclave_runtime.programs.common import MEMORY_BYTES_MIN, example, guarded, read
from enclave_runtime.programs.duck import RESULT_BYTES_MAX, encode
from enclave_runtime.programs.duck import column as rebuilt
from enclave_runtime.programs.inputs import TYPES, open_table
from mpc.protocol.contract import Column, Contract, Rule, Table, Type
from mpc.protocol.encoding import Limit, Name, Record
from mpc.protocol.errors import ContractError

IMAGE = "wasm"  # the variant with the library in it
MAGIC = b"\0asm\1\0\0\0"  # version 1 of the binary form: the library would read text, too
STACK_BYTES = 1 << 20
TABLE_ELEMENTS = 100_000  # functions that are called through a pointer

WASI, BADF, NOSYS = "wasi_snapshot_preview1", 8, 52
# What compilers' libraries import, and what it answers: there is no environment, clock or file. Source: WASI 0.1.
ANSWERS = {name: 0 for name in ("args_get", "args_sizes_get", "environ_get", "environ_sizes_get", "sched_yield")}
ANSWERS |= {name: NOSYS for name in ("clock_res_get", "clock_time_get", "poll_oneoff")}
ANSWERS |= {f"fd_{name}": BADF for name in ("close", "fdstat_get", "prestat_get", "prestat_dir_name")}
ANSWERS |= {f"fd_{name}": BADF for name in ("read", "seek", "write", "filestat_get", "fdstat_set_flags")}
ANSWERS |= {"path_open": BADF, "random_get": 0, "proc_exit": 0}
EXPORTS = {
    "table": (("i32", "i32"), ("i32",)),
    "run": ((), ()),
    "result": (("i32",), ("i64",)),
    "_initialize": ((), ()),  # may be missing
}


@dataclass(frozen=True)
class Output(Record):
    name: Name
    type: Type


@dataclass(frozen=True)
class Parameters(Record):
    module: Annotated[bytes, Limit(len(MAGIC), 3 << 19)] = field(repr=False, metadata=example('"screen.wasm"'))
    columns: Annotated[tuple[Output, ...], Limit(1, 256)] = field(
        metadata=example('[{ name = "distance", type = "int64" }]')
    )
    fuel: Annotated[int, Limit(1, 10**13)] = field(metadata=example("1_000_000_000"))  # about one an instruction
    memory_bytes: Annotated[int, Limit(1 << 16, 1 << 32)] = field(metadata=example("67_108_864"))
    result_bytes: Annotated[int, Limit(1, RESULT_BYTES_MAX)] = field(metadata=example("1_048_576"))  # of one recipient


def warm() -> None:
    """To import the library is all that reads files."""


def check(contract: Contract) -> Disclosure:
    """Raises ContractError."""
    given = _read(contract)
    try:
        module = wasmtime.Module(_engine(given.memory_bytes), given.module)
    except wasmtime.WasmtimeError as error:
        raise ContractError(f"module: {str(error).splitlines()[0][:200]}", expected="WebAssembly 1.0") from None
    _check_imports(module)
    _check_exports(module, given)
    agreed = "what the module computes from all tables, whatever it is: every owner agreed to it by its digest"
    digest = hashlib.sha256(given.module).hexdigest()
    rules = (
        f"exact: the module with the SHA-256 {digest} and no other runs, and all that it gives leaves; read its "
        f"source, and build it yourself: the digest must be the same",
        f"it may use {given.memory_bytes >> 10} KiB of memory, {given.fuel:,} units of fuel (about one an "
        f"instruction) and {given.result_bytes} bytes for a recipient's result; beyond that nothing leaves",
        "it sees the tables and nothing else: no clock, chance, file, network, or message to anybody",
        f"each of {', '.join(contract.recipients)} gets a result of its own, which may differ",
    )
    columns = tuple((output.name, agreed) for output in given.columns)
    return Disclosure(columns, rules, contract.recipients, tuple(_warnings(contract)))


def run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    """Returns: recipient → the table that the module gives for it. Raises ProgramRefused: traps all say the same."""
    return guarded(contract, lambda: _run(contract, _read(contract), tables))


def _read(contract: Contract) -> Parameters:
    if contract.enclave.image != IMAGE:
        raise ContractError(
            "enclave.image", expected=f'"{IMAGE}": no other can run modules', got=contract.enclave.image
        )
    given = read(contract, Parameters)
    for table in contract.tables:
        if table.rule.kind != "exact":
            raise ContractError(
                f"{table.owner}'s rule for {table.name} is {table.rule.kind}, and nobody can tell what a module makes "
                f"of rows",
                expected="a rule of kind exact of every owner",
            )
    if given.module[: len(MAGIC)] != MAGIC:
        raise ContractError("module", expected="the binary form of WebAssembly 1.0 (wat2wasm turns text into it)")
    if len({output.name.lower() for output in given.columns}) != len(given.columns):
        raise ContractError("program.parameters.columns", expected="each name once")
    if given.memory_bytes + MEMORY_BYTES_MIN > contract.enclave.memory_bytes:
        most = (contract.enclave.memory_bytes - MEMORY_BYTES_MIN) >> 20
        raise ContractError(
            "program.parameters.memory_bytes", expected=f"at most {most} MiB, or more memory for the enclave"
        )
    return given


def _check_imports(module: wasmtime.Module) -> None:
    for wanted in module.imports:
        kind, name = wanted.type, f"{wanted.module}.{wanted.name}"
        if wanted.module != WASI or wanted.name not in ANSWERS or not isinstance(kind, wasmtime.FuncType):
            raise ContractError(
                f"module: it imports {name[:80]!r}", expected=f"nothing, or of {WASI} {', '.join(sorted(ANSWERS))}"
            )
        if [str(result) for result in kind.results] != ([] if wanted.name == "proc_exit" else ["i32"]):
            raise ContractError(f"module: the type of import {name}", expected="WASI's")


def _check_exports(module: wasmtime.Module, given: Parameters) -> None:
    exports: dict[str | None, Any] = {export.name: export.type for export in module.exports}
    memory = exports.get("memory")
    if not isinstance(memory, wasmtime.MemoryType) or memory.limits.min << 16 > given.memory_bytes:
        raise ContractError("module: memory", expected=f"exported, and at first at most {given.memory_bytes} bytes")
    for name, (arguments, results) in EXPORTS.items():
        kind = exports.get(name)
        if kind is None and name == "_initialize":
            continue
        expected = f"exported, a function from ({', '.join(arguments)}) to ({', '.join(results)})"
        if not isinstance(kind, wasmtime.FuncType):
            raise ContractError(f"module: {name}", expected=expected)
        if (tuple(map(str, kind.params)), tuple(map(str, kind.results))) != (arguments, results):
            raise ContractError(f"module: {name}", expected=expected, got="another type")


def _warnings(contract: Contract) -> list[str]:
    told = []
    for recipient in contract.recipients:
        others = dict.fromkeys(table.owner for table in contract.tables if table.owner != recipient)
        if recipient in contract.parties and others:
            told.append(
                f"{recipient} contributes rows and receives a result: unless the module's text shows that it cannot, "
                f"rows that it forges may read single rows of {', '.join(others)} out of it"
            )
    return told


def _engine(memory_bytes: int) -> wasmtime.Engine:
    config = wasmtime.Config()
    # The same answer on every machine: one form of NaN; nothing with threads or with results that are the machine's.
    config.cranelift_nan_canonicalization = True
    config.consume_fuel = True
    config.max_wasm_stack = STACK_BYTES
    for proposal in ("threads", "relaxed_simd", "memory64", "multi_memory", "tail_call", "exceptions", "gc"):
        setattr(config, f"wasm_{proposal}", False)
    config.wasm_function_references = False
    config.wasm_component_model = False
    # No thread, no signal handler, no descriptor; memory that is checked at each access instead of guarded by pages.
    config.parallel_compilation = False
    config.signals_based_traps = False
    config.memory_init_cow = False
    config.memory_guard_size = 0
    config.memory_reservation = memory_bytes
    return wasmtime.Engine(config)


def _store(engine: wasmtime.Engine, memory_bytes: int, fuel: int) -> wasmtime.Store:
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=memory_bytes, table_elements=TABLE_ELEMENTS, instances=1, tables=8, memories=1)
    store.set_fuel(fuel)
    return store


def _run(contract: Contract, given: Parameters, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    engine = _engine(given.memory_bytes)
    module = wasmtime.Module(engine, given.module)
    store = _store(engine, given.memory_bytes, given.fuel)
    instance = wasmtime.Instance(store, module, [_stub(store, wanted) for wanted in module.imports])
    exports: Any = instance.exports(store)
    if "_initialize" in exports:
        exports["_initialize"](store)
    for index, table in enumerate(tables):
        stream = _stream(table)
        place = exports["table"](store, index, len(stream)) & 0xFFFFFFFF
        _inside(exports["memory"], store, place, len(stream))
        exports["memory"].write(store, stream, place)
    exports["run"](store)
    results = {}
    for index, recipient in enumerate(contract.recipients):
        place, size = divmod(exports["result"](store, index) & 0xFFFFFFFF_FFFFFFFF, 1 << 32)
        if size > given.result_bytes:
            raise ProgramRefused("result-size")
        _inside(exports["memory"], store, place, size)
        results[recipient] = _checked(given, bytes(exports["memory"].read(store, place, place + size)))
    return results


def _stream(table: pa.Table) -> bytearray:
    """One schema, one batch, nothing compressed: the plainest form of the Arrow stream."""
    batch = pa.record_batch([column.combine_chunks() for column in table.columns], schema=table.schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_batch(batch)
    return bytearray(sink.getvalue())


def _inside(memory: wasmtime.Memory, store: wasmtime.Store | wasmtime.Caller, place: int, size: int) -> None:
    if place + size > memory.data_len(store):
        raise ProgramRefused("engine")


def _checked(given: Parameters, stream: bytes) -> bytes:
    """A result is a table of the columns that the contract names; it leaves in our own form of it."""
    columns = tuple(Column(output.name, output.type) for output in given.columns)
    try:
        opened = open_table(stream, Table("result", "module", Rule("exact"), columns, given.result_bytes))
    except ProgramRefused:  # it would blame a party's table
        raise ProgramRefused("engine") from None
    kinds = [TYPES[output.type] for output in given.columns]
    return encode(
        opened.column_names, [rebuilt(values, kind) for values, kind in zip(opened.columns, kinds, strict=True)]
    )


def _stub(store: wasmtime.Store, wanted: wasmtime.ImportType) -> wasmtime.Func:
    """What ANSWERS says; random bytes are zeros, and to exit is a trap."""
    assert isinstance(wanted.type, wasmtime.FuncType)
    assert wanted.name is not None
    name, answer = wanted.name, ANSWERS[wanted.name]

    def called(caller: wasmtime.Caller, *arguments: int) -> int | None:
        if name == "proc_exit":
            raise ProgramRefused("engine")
        places = []
        if name == "random_get":
            places = [(arguments[0], arguments[1])]
        elif name.endswith("_sizes_get"):
            places = [(argument, 4) for argument in arguments[:2]]
        memory: Any = caller["memory"] if places else None
        for place, size in places:
            start, length = place & 0xFFFFFFFF, size & 0xFFFFFFFF
            _inside(memory, caller, start, length)
            memory.write(caller, bytearray(length), start)
        return answer

    return wasmtime.Func(store, wanted.type, called, access_caller=True)
