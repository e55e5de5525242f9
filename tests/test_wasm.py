"""Modules in any language: what they may be, what they see, and that nothing but their result leaves."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from joint import EXACT, Rows, aggregate, arrow, column, read, stream, table
from joint_programs import agreed, in_engine, results

from enclave_runtime import programs
from enclave_runtime.programs import ProgramRefused
from mpc import scenario
from mpc.cli.check import draft
from mpc.image import standin, variant
from mpc.protocol.contract import Contract, Rule
from mpc.protocol.errors import ContractError, LocalError
from parties import datasets

wasmtime = pytest.importorskip("wasmtime", reason="the extra wasm is not installed: modules are not tested")

NUMBERS = table("numbers", "a", EXACT, column("n", "int64"))
ROWS: Rows = [{"n": 5}, {"n": None}, {"n": -7}]
SIMILAR = Path(__file__).parents[1] / "scenarios" / "similar-names"

# Gives back the first table; tests put more into it. Arrow ends in 8 bytes, before which lies the last value.
ECHO = """(module {imports} (memory (export "memory") {pages}) (global $size (mut i32) (i32.const 0))
  (func (export "table") (param $index i32) (param $bytes i32) (result i32)
    (if (i32.eqz (local.get $index)) (then (global.set $size (local.get $bytes))))
    (i32.add (i32.const 1024) (i32.mul (local.get $index) (i32.const 8192))))
  (func $put (param $value i64)
    (i64.store (i32.sub (i32.add (global.get $size) (i32.const 1024)) (i32.const 16)) (local.get $value)))
  (func (export "run") {run})
  (func (export "result") (param $recipient i32) (result i64) {result}) {more})"""
SAME = "(i64.or (i64.extend_i32_u (global.get $size)) (i64.shl (i64.const 1024) (i64.const 32)))"


def module(run: str = "", result: str = SAME, imports: str = "", more: str = "", pages: str = "1") -> bytes:
    return bytes(wasmtime.wat2wasm(ECHO.format(run=run, result=result, imports=imports, more=more, pages=pages)))


def contracted(code: bytes, *tables: Any, image: str = "wasm", recipients: Any = (), **given: Any) -> Contract:
    parameters = {
        "module": code,
        "columns": [{"name": "n", "type": "int64"}],
        "fuel": 1_000_000,
        "memory_bytes": 1 << 20,
        "result_bytes": 4096,
    }
    drafted = agreed("wasm", tables or (NUMBERS,), parameters | given, *recipients)
    return replace(drafted, enclave=replace(drafted.enclave, image=image))


def given_back(code: bytes, rows: Rows = ROWS, **given: Any) -> list[Any]:
    return [row["n"] for row in read(results(contracted(code, **given), rows)["analyst"])]


def test_tables_go_in_and_a_result_comes_out() -> None:
    assert given_back(module()) == [5, None, -7]
    assert given_back(module(), []) == []
    assert given_back(module("(call $put (i64.const 12))")) == [5, None, 12]


def test_each_recipient_gets_its_own() -> None:
    """To the second one the module gives no rows: the place where it kept the other table."""
    described = contracted(
        module(result=f"(if (result i64) (local.get 0) (then {SAME}) (else {SAME}))"), recipients=("b", "c")
    )
    found = results(described, ROWS)
    assert found["b"] == found["c"]
    own = "(call $put (i64.extend_i32_u (local.get 0)))" + SAME
    found = results(contracted(module(result=own), recipients=("b", "c")), ROWS)
    assert [read(found[name])[2]["n"] for name in ("b", "c")] == [0, 1]


def test_the_same_inputs_give_the_same_bytes() -> None:
    """Also of a computation with NaN, the bits of which are the machine's own otherwise."""
    nan = "(i64.reinterpret_f64 (f64.sub (f64.const -nan:0x123) (f64.const 1)))"
    described = contracted(module(f"(call $put {nan})"))
    first, second = (results(described, ROWS) for _ in range(2))
    assert first == second
    assert read(first["analyst"])[2]["n"] == 0x7FF8000000000000


def test_the_result_leaves_in_the_form_of_every_result() -> None:
    described = contracted(module())
    assert results(described, ROWS)["analyst"] == stream(arrow(NUMBERS, ROWS))


@pytest.mark.parametrize(
    ("code", "given"),
    [
        ({"run": "unreachable"}, {}),
        ({"run": "(drop (i32.div_u (i32.const 1) (i32.const 0)))"}, {}),
        ({"run": "(drop (i32.load (i32.const 65536)))"}, {}),
        ({"run": "(loop br 0)"}, {}),
        ({"run": "(call $again)", "more": "(func $again (call $again))"}, {"fuel": 10**9}),
        ({"run": "(call $put (i64.const 1))"}, {"columns": [{"name": "n", "type": "double"}]}),
        ({"run": "(call $put (i64.const 1))"}, {"columns": [{"name": "m", "type": "int64"}]}),
        ({"run": "(i64.store (i32.const 1024) (i64.const 7))"}, {}),
        ({"result": "(i64.const 0)"}, {}),
        ({"result": "(i64.const 0x0000ffff_00000100)"}, {}),
        ({"result": "(i64.const 0xffffffff_00000001)"}, {}),
        ({"run": "call 0", "imports": '(import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))'}, {}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_whatever_goes_wrong_has_one_code(code: Any, given: Any) -> None:
    if "proc_exit" in str(code):
        code = code | {"run": "(call 0 (i32.const 0))"}
    with pytest.raises(ProgramRefused) as refused:
        results(contracted(module(**code), **given), ROWS)
    assert (refused.value.code, refused.value.__cause__) == ("engine", None)


def test_a_table_that_finds_no_place() -> None:
    with pytest.raises(ProgramRefused, match="engine"):
        results(contracted(module()), [{"n": i} for i in range(10_000)])


def test_limits_of_result_and_memory() -> None:
    with pytest.raises(ProgramRefused) as refused:
        results(contracted(module(), result_bytes=100), ROWS)
    assert refused.value.code == "result-size"
    grown = "(call $put (i64.extend_i32_s (memory.grow (i32.const {}))))"
    assert given_back(module(grown.format(15)))[2] == 1  # pages before
    assert given_back(module(grown.format(16)))[2] == -1  # no more than the contract says


def test_there_is_no_clock_chance_or_environment() -> None:
    """Arguments and environment are empty, random bytes zeros, and the clock says that there is none."""
    wasi = "wasi_snapshot_preview1"
    two, three = "(param i32 i32) (result i32)", "(param i32 i64 i32) (result i32)"
    imports = "".join(
        f'(import "{wasi}" "{name}" (func ${name} {kind}))'
        for name, kind in (("random_get", two), ("environ_sizes_get", two), ("clock_time_get", three))
    )
    dirty = "(i64.store (i32.const 8) (i64.const -1)) (i64.store (i32.const 16) (i64.const -1))"
    place = "(i32.const 8) (i32.const {})"
    for call, value in (
        (f"(call $random_get {place.format(8)})", 0),
        (f"(call $environ_sizes_get {place.format(12)})", 0),
        ("(call $clock_time_get (i32.const 0) (i64.const 1) (i32.const 24))", -1),
    ):
        code = module(f"{dirty} (drop {call}) (call $put (i64.load (i32.const 8)))", imports=imports)
        assert given_back(code)[2] == value
    code = module(
        "(call $put (i64.extend_i32_u (call $clock_time_get (i32.const 0) (i64.const 1) (i32.const 24))))",
        imports=imports,
    )
    assert given_back(code)[2] == 52  # ENOSYS


@pytest.mark.parametrize(
    ("code", "given", "says"),
    [
        (b"(module)", {}, "module: expected the binary form of WebAssembly"),
        (b"\0asm\1\0\0\0\xff\xff", {}, "module: .*expected WebAssembly"),
        ({"imports": '(import "env" "now" (func (result i64)))'}, {}, "it imports 'env.now': expected nothing, or of"),
        ({"imports": '(import "wasi_snapshot_preview1" "path_unlink_file" (func))'}, {}, "path_unlink_file"),
        ({"imports": '(import "wasi_snapshot_preview1" "fd_write" (func))'}, {}, "the type of import"),
        ({"imports": '(import "wasi_snapshot_preview1" "fd_write" (global i32))'}, {}, "it imports"),
        (b"\0asm\1\0\0\0", {}, "module: memory: expected exported"),
        ({"pages": "17"}, {}, "memory: expected exported, and at first at most 1048576 bytes"),
        ({"pages": "1 2 shared"}, {}, "module: "),
        ({}, {"memory_bytes": 1 << 32}, "memory_bytes: expected at most 1728 MiB"),
        ({}, {"columns": [{"name": "n", "type": "int64"}] * 2}, "columns: expected each name once"),
        ({}, {"columns": [{"name": "n", "type": "list"}]}, "program.parameters.type: expected one of"),
        ({}, {"fuel": 0}, "fuel: expected 1 to"),
        ({}, {"image": "sql"}, 'enclave.image: expected "?wasm'),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_refused_before_consent(code: Any, given: Any, says: str) -> None:
    code = code if isinstance(code, bytes) else module(**code)
    with pytest.raises(ContractError, match=says):
        programs.program("wasm").check(contracted(code, **given))


def test_missing_and_wrong_exports() -> None:
    text = '(module (memory (export "memory") 1) (func (export "run")) (func (export "table")))'
    with pytest.raises(ContractError, match=r"module: table: expected exported, a function from \(i32, i32\) to"):
        programs.program("wasm").check(contracted(bytes(wasmtime.wat2wasm(text))))
    more = text.replace('(func (export "run"))', "").replace(
        '(func (export "table"))', '(func (export "table") (param i32 i32) (result i32) (i32.const 0))'
    )
    described = contracted(bytes(wasmtime.wat2wasm(more)))
    with pytest.raises(ContractError, match="module: run: expected"):
        programs.program("wasm").check(described)


@pytest.mark.parametrize("rule", [aggregate(5), Rule("noise", (), 0, 1.0, 0.0, 1)])
def test_every_rule_must_be_exact(rule: Rule) -> None:
    owned = (NUMBERS, table("numbers", "b", rule, column("n", "int64")))
    with pytest.raises(ContractError, match=r"b's rule for numbers is .*rule of kind"):
        programs.program("wasm").check(contracted(module(), *owned))


def test_the_contract_s_digest_covers_every_byte_of_the_module() -> None:
    code = module()
    other = code[:-1] + bytes([code[-1] ^ 1])
    digests = {contracted(one).program.digest for one in (code, other)}
    assert len(digests) == 2


def test_without_the_library_people_read_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    monkeypatch.delitem(sys.modules, "enclave_runtime.programs.wasm", raising=False)
    with pytest.raises(ContractError, match=r"wasmtime is not installed here: .*enclave-mpc\[wasm\]"):
        programs.program("wasm")


def test_people_read_which_module_it_is() -> None:
    told = programs.program("wasm").check(contracted(module(), NUMBERS, recipients=("a", "z")))
    assert "SHA-256" in told.rules[0]
    assert told.columns[0][0] == "n"
    assert told.warnings == ()  # the one owner learns of its own rows only
    owned = (NUMBERS, table("numbers", "b", EXACT, column("n", "int64")))
    told = programs.program("wasm").check(contracted(module(), *owned, recipients=("a",)))
    assert "rows that it forges" in told.warnings[0]


# the scenario


def _distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(before + (letter != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def test_the_scenario_counts_what_another_program_counts(tmp_path: Path) -> None:
    given = scenario.load(SIMILAR)
    described = draft(given)
    sealed = []
    for stream_index, owner, name in ((0, "bank", "customers"), (1, "authority", "listed")):
        written = given.party[owner].table[name]
        target = tmp_path / owner
        datasets.spool(datasets.Source(location=written.source), described.tables[stream_index], target)
        sealed.append(target.read_bytes())
    names = {}
    for owner in ("bank", "authority"):
        with (SIMILAR / "data" / f"{owner}.csv").open(encoding="utf-8", newline="") as file:
            names[owner] = [row["name"].lower() for row in csv.DictReader(file)]
    nearest = [
        min(_distance(name, other) for other in names["authority"] if abs(len(name) - len(other)) < 3)
        for name in names["bank"][:300]
        if any(abs(len(name) - len(other)) < 3 for other in names["authority"])
    ]
    opened = programs.open_tables(described, sealed)
    program = programs.program("wasm")
    program.check(described)
    first = program.run(described, [opened[0].slice(0, 300), opened[1]])
    assert [row["customers"] for row in read(first["bank"])] == [nearest.count(i) for i in range(3)]
    # And in the enclave's own process, with all rows.
    assert in_engine(described, sealed) == program.run(described, opened)


def test_a_module_s_file(tmp_path: Path) -> None:
    text = (SIMILAR / "scenario.toml").read_text()
    (tmp_path / "scenario.toml").write_text(text)
    given = scenario.load(tmp_path)
    with pytest.raises(LocalError, match=r"program.module: .*screen.wasm: cannot be read"):
        _ = given.program.terms
    (tmp_path / "screen.wasm").write_bytes(bytes(scenario.MODULE_BYTES_MAX + 1))
    with pytest.raises(LocalError, match=r"program.module: .*expected at most"):
        _ = given.program.terms
    (tmp_path / "scenario.toml").write_text(text.replace("[program.parameters]", '[program.parameters]\nmodule = "x"'))
    with pytest.raises(LocalError, match=r"parameters\.module"):
        _ = scenario.load(tmp_path).program.terms


def test_the_image_has_what_modules_need(tmp_path: Path) -> None:
    for file in variant.files("wasm"):
        (tmp_path / file.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.name).symlink_to(file.path)
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import enclave_runtime.programs as p; p.warm();"
        "import wasmtime; from enclave_runtime.programs import wasm;"
        "wasmtime.Module(wasm._engine(65536), wasm.MAGIC);"
        "print([m.__file__ for m in sys.modules.values() if 'packages' in (getattr(m, '__file__', '') or '')])"
    )
    command = [str(standin.interpreter().executable), "-I", "-S", "-B", "-c", code]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
