"""`mpc fuzz`: what it prints, writes and returns; a user's own scenario, its generated data and its oracle."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest

from bench.faults import FAULTS
from bench.planting import Fault, Line, planted
from enclave_runtime import programs
from enclave_runtime.programs.duck import encode
from mpc import scenario as scenarios
from mpc.cli.main import execute
from mpc.fuzz.doubles import doubles
from mpc.fuzz.facts import Broken, Computing, Released
from mpc.fuzz.invariants import INVARIANTS
from mpc.fuzz.jobs import AGAINST_RULE, NOT_OF_SCHEMA
from mpc.fuzz.oracle import agrees
from mpc.fuzz.scenario_job import ScenarioJob
from mpc.fuzz.setting import Move, Setting
from mpc.fuzz.world import World
from mpc.protocol.errors import LocalError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(folder.parent.name for folder in (ROOT / "scenarios").glob("*/scenario.toml"))
UNCHECKED = next(fault for fault in FAULTS if fault.what == "a party does not appraise")
EXACT = '''
[scenario]
name = "exact"
[party.one.table.visits]
rule = { kind = "exact" }
columns = { who = { type = "string" }, seen = { type = "timestamp" }, cost = { type = "double" } }
[party.two.table.people]
rule = { kind = "exact" }
columns = { who = { type = "string" }, born = { type = "date" }, member = { type = "bool" }, n = { type = "int64" } }
[party.judge]
[program]
kind = "sql"
query = """
SELECT member, count(*) AS visits, sum(cost) AS cost, max(seen) AS latest
FROM visits v, people p WHERE v.seen IS NOT NULL GROUP BY member ORDER BY member
"""
[recipients]
result = ["two"]
[approvals]
quorum = 1
approvers = ["judge", "one"]
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "scenario.toml"
    file.write_text(EXACT)
    return file


def fuzz(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = execute(["fuzz", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


# The command.


def test_held(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = fuzz(capsys, "--examples", "5", "--seed", "3")
    assert status == 0
    assert out.startswith("held  the built-in session")
    assert "hypothesis, seed 3" in out
    assert "never tried" in out
    assert max(map(len, out.splitlines())) < 400


@pytest.mark.parametrize("engine", ["hypothesis", "swarm"])
def test_a_counterexample_is_told_written_and_played_again(
    engine: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with planted(UNCHECKED):
        status, out, _ = fuzz(capsys, "--engine", engine, "--seed", "1", "--examples", "2000", "--minutes", "1")
        assert status == 1
        assert out.startswith("broken  appraisal: party-")
        assert "Lost otherwise: the party hands its data to code that it has never seen." in out
        (file,) = tmp_path.iterdir()
        assert f"mpc fuzz --replay {file.name}" in out
        status, out, _ = fuzz(capsys, "--replay", file.name)
        assert status == 1
        assert "Every event is as it was." in out
        status, out, _ = fuzz(capsys, "--replay", file.name, "--json")
        assert (status, json.loads(out)["same_events"]) == (1, True)
    status, out, _ = fuzz(capsys, "--replay", file.name)
    assert status == 0
    assert "no invariant breaks any more; it was appraisal" in out


def test_json_is_one_document(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = fuzz(capsys, str(own), "--examples", "3", "--seed", "1", "--json")
    said = json.loads(out)
    assert (status, said["status"], said["seed"], said["counterexample"]) == (0, "held", 1, None)
    assert said["examples"] >= 3
    assert said["steps"] > said["examples"]
    assert said["coverage"]["tried"] > 0
    assert said["oracle"] == "a second implementation of the query"
    assert "held" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replay", "x.json", "--seed", "1"], "give no scenario and no other option"),
        (["--replay", "missing.json"], "missing.json: cannot be read"),
        (["nowhere"], "no such scenario"),
        (["--examples", "0"], "0 is not in the range"),
        (["--minutes", "0"], "is not in the range"),
        (["--engine", "magic"], "'magic' is not one of"),
        (["--out", __file__], "exists already"),
    ],
)
def test_misuse(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = fuzz(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_a_scenario_that_its_owners_rules_forbid_cannot_be_fuzzed(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write_text(EXACT.replace("max(seen)", "random()"))
    status, _, err = fuzz(capsys, str(own))
    assert status == 2
    assert "mpc check" in err
    assert "random" in err


@pytest.mark.parametrize("engine", ["hypothesis", "swarm"])
def test_ctrl_c_prints_what_was_covered(engine: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("mpc")), "fuzz", "--seed", "1", "--engine", engine, "--minutes", "5"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"fuzzing the built-in session with {engine}, seed 1\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 130, out + err
    assert out.startswith("interrupted")
    assert "never tried" in out
    assert list(tmp_path.iterdir()) == []


# A scenario of one's own.


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_scenario_can_be_fuzzed_and_releases(name: str) -> None:
    job = ScenarioJob(scenarios.load(ROOT / "scenarios" / name))
    again = ScenarioJob.of_text(job.text(), "again")
    assert again.text() == job.text()
    assert str(ROOT) not in job.text() or job.given.program.kind == "wasm"  # a module is named by its path
    with doubles():
        worlds = [World(seed, Setting(job=one)) for seed, one in ((1, job), (1, again))]
        for world in worlds:
            world.fair()
    first, second = worlds
    assert first.contract == second.contract
    assert first.story == second.story
    (released,) = first.of(Released)
    assert set(released.results) == set(job.given.recipients.result)


def test_a_party_may_approve_too_and_everybody_has_a_part(own: Path) -> None:
    job = ScenarioJob(scenarios.load(own))
    with doubles():
        world = World(2, Setting(job=job))
        world.fair()
    assert list(world.approvers) == ["judge as approver", "one as approver"]
    assert len(world.contract.parties) == 2
    assert all(released for released, _ in world.endings().values())
    assert world.of(Computing)[0].tables == tuple(t for p in ("one", "two") for t in world.parties[p].tables.values())


def test_tables_fit_their_schemas_or_do_not_as_asked() -> None:
    job = ScenarioJob(scenarios.load(ROOT / "scenarios" / "salaries"))
    contract = World(1, Setting(job=job)).contract

    def outcomes(form: str) -> set[str]:
        found = set()
        for seed in range(8):
            random = Random(seed)
            tables = [job.table(contract, i, random, form if i == 1 else "", long=False).data for i in range(5)]
            outcome = job.run(contract, tables)
            found.add("released" if outcome.results else f"{outcome.refusal} {outcome.bad_table}")
        return found

    assert outcomes("") == {"released"}
    assert outcomes(NOT_OF_SCHEMA) == {"input 1"}
    assert outcomes(AGAINST_RULE) == {"released"}  # the rule of this program does not mind


def test_no_row_is_a_canary_by_chance_and_all_owners_have_some() -> None:
    job = ScenarioJob(scenarios.load(ROOT / "scenarios" / "flights"))
    world = World(1, Setting(job=job))
    for name, party in world.parties.items():
        assert world.canaries[name]
        for canary in world.canaries[name]:
            assert any(canary in table for table in party.tables.values())
            assert len(set(canary)) >= 12


# The oracle.


def contract_and_tables(job: ScenarioJob, seed: int = 1) -> tuple[Any, list[bytes]]:
    contract = World(seed, Setting(job=job)).contract
    random = Random(seed)
    return contract, [
        job.table(contract, stream, random, "", long=False).data for stream in range(len(contract.tables))
    ]


def changed(result: bytes, change: str) -> bytes:
    table = pa.ipc.open_stream(result).read_all()
    rows, names = table.to_pylist(), table.column_names
    if change == "one row less":
        rows = rows[1:]
    elif change == "one row twice":
        rows = [rows[0], *rows]
    else:
        number = next(name for name in reversed(names) if isinstance(rows[0][name], int | float))
        rows[0][number] += 1 if change == "a number" else rows[0][number] * 1e-6 + 1
    columns = [pa.array([row[name] for row in rows], table.schema.field(name).type) for name in names]
    return encode(names, columns)


@pytest.mark.parametrize("name", ["salaries", "own"])
@pytest.mark.parametrize("change", ["", "one row less", "one row twice", "a number"])
def test_the_oracle_agrees_with_the_right_result_only(name: str, change: str, own: Path) -> None:
    job = ScenarioJob(scenarios.load(own if name == "own" else ROOT / "scenarios" / name))
    contract, tables = contract_and_tables(job)
    results = dict(job.run(contract, tables).results or {})
    assert results
    if change == "one row less" and name == "salaries":
        pytest.skip("its rules may hide rows; only that none too small is shown can be said")
    if change:
        results = {who: changed(result, change) for who, result in results.items()}
    assert agrees(contract, programs.open_tables(contract, tables), results) == (not change)


def test_a_fault_in_the_users_program_is_found_as_a_wrong_number() -> None:
    """Averages that forget the clamp: valid receipts, and another answer than clear text gives."""
    fault = Fault(
        "averages forget the clamp",
        "integrity",
        (Line("enclave_runtime.programs.sql_protect:_forms", "if described.clamp:", "if False:"),),
        Setting(),
    )
    job = ScenarioJob(scenarios.load(ROOT / "scenarios" / "salaries"))
    with planted(fault), doubles(), pytest.raises(Broken, match="integrity: enclave-0 released something else"):
        World(1, Setting(job=job)).step(Move("pace", 400))
    sound = ScenarioJob(job.given)  # what was computed with the fault is remembered
    with doubles():
        World(1, Setting(job=sound)).step(Move("pace", 400))
    assert len(INVARIANTS) == 10


def test_programs_of_other_kinds_must_give_the_same_again() -> None:
    job = ScenarioJob(scenarios.load(ROOT / "scenarios" / "overlap"))
    assert "there is no second implementation of intersection" in job.oracle()
    contract, tables = contract_and_tables(job)
    results = dict(job.run(contract, tables).results or {})
    opened = programs.open_tables(contract, tables)
    assert agrees(contract, opened, results)
    name = next(iter(results))
    assert not agrees(contract, opened, {name: results[name] + b"\0"})


def test_a_scenario_in_a_replay_file_must_be_one() -> None:
    with pytest.raises(LocalError, match="file: scenario"):
        ScenarioJob.of_text("[[", "file")
    with pytest.raises(LocalError, match="file: scenario"):
        ScenarioJob.of_text("[scenario]\n", "file")
