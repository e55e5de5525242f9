"""Scenario files: what a person writes, what it becomes, and what a person reads when it is wrong."""

from pathlib import Path

import pytest

from mpc import scenario
from mpc.protocol.contract import SEALING_KEY_BYTES, Contract, Measurement, Participant
from mpc.protocol.errors import LocalError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT.parent / "shared" / "scenario-example.toml"

SMALL = """
[scenario]
name = "small"

[deadlines]
consent = "90 s"
seal = "2.5 min"
release = "1 h"

[party.a.table.pay]
source = "a.csv"
bytes_max = "2 kB"

[party.a.table.pay.rule]
kind = "aggregate"
entity = "person"
k = 3

[party.a.table.pay.columns]
person = { type = "string" }
amount = { type = "double", use = ["avg"], clamp = [0, 10] }

[party.b.table.pay]
like = "a"
source = "package:somebody/data.csv"

[party.reader]

[program]
kind = "sql"
query = "SELECT avg(amount) FROM pay"

[recipients]
result = ["reader"]
"""
MEASUREMENT = Measurement("sql", b"\1" * 48, b"\2" * 48, b"\3" * 48)


def loaded(folder: Path, text: str) -> scenario.Scenario:
    (folder / "scenario.toml").write_text(text)
    return scenario.load(folder)


def people(*names: str) -> list[Participant]:
    return [Participant(name, name.encode().ljust(32), bytes(SEALING_KEY_BYTES)) for name in names]


def contract(of: scenario.Scenario, participants: list[Participant]) -> Contract:
    return scenario.contract(
        of,
        participants=participants,
        author=bytes(32),
        measurements=[MEASUREMENT],
        root=b"\4" * 32,
        simulated=True,
        now_ms=1_000_000,
        random=b"\5" * 32,
    )


def test_a_scenario_becomes_a_contract(tmp_path: Path) -> None:
    made = contract(loaded(tmp_path, SMALL), people("reader", "b", "a"))
    assert [p.name for p in made.participants] == ["a", "b", "reader"]
    assert made.parties == ("a", "b")
    assert made.recipients == ("reader",)
    assert made.receipt_recipients == ("a", "b", "reader")
    assert made.program.text == "SELECT avg(amount) FROM pay"
    deadlines = made.deadlines
    assert (deadlines.consent_ms, deadlines.seal_ms, deadlines.release_ms) == (1_090_000, 1_150_000, 4_600_000)
    assert (made.enclave.measurements, made.enclave.simulated, made.enclave.memory_bytes) == (
        (MEASUREMENT,),
        True,
        2 << 30,
    )
    first, second = made.tables
    assert (first.rule.k, first.rule.entity, first.bytes_max) == (3, ("person",), 2000)
    assert first.columns[1].clamp == (0.0, 10.0)
    assert (second.owner, second.columns, second.rule, second.bytes_max) == ("b", first.columns, first.rule, 2000)
    assert Contract.decode(made.encode()) == made


def test_sources_are_beside_the_file_wherever_it_is_read_from(tmp_path: Path) -> None:
    party = loaded(tmp_path, SMALL).party
    assert party["a"].table["pay"].source == str(tmp_path / "a.csv")
    assert party["b"].table["pay"].source == "package:somebody/data.csv"


def test_participants_are_the_parties(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="participants"):
        contract(loaded(tmp_path, SMALL), people("a", "b"))


@pytest.mark.parametrize("name", scenario.shipped())
def test_what_is_shipped_loads(name: str) -> None:
    of = scenario.load(ROOT / "scenarios" / name)
    assert contract(of, people(*of.party)).name == name == of.scenario.name


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the design's example of a scenario file is not beside the project")
def test_the_designs_example_loads_once_its_third_party_is_written(tmp_path: Path) -> None:
    text = EXAMPLE.read_text().replace('["airlines", "weather-office", "registry"]', '["airlines"]')
    assert loaded(tmp_path, text).enclave.memory == 2 << 30


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ('kind = "sql"', 'kind = "sql', "line 3[0-9], column 12: Illegal character"),
        ('name = "small"', "name", "line 3, column 5: Expected '='"),
        ("[party.reader]", "[party.a.table.pay]", r"line \d+, .*\[party.a.table.pay\] stands here a second time"),
        ("[party.reader]", "[party.reader]\n[party.A]", "party.A: the same party as a, written differently"),
        ("[party.reader]", "[party.reader]\n[party.idle]", "party.idle: owns no table, receives no result"),
        ("[party.reader]", "[[party.reader]]", r"party.reader: expected a table, \[party.reader\]"),
        ('name = "small"', "", r"scenario.name: is missing: expected a name"),
        ('name = "small"', 'name = "sm all"', r'scenario.name: expected a name: .*, got "sm all"'),
        ('name = "small"', 'name = "small"\ntilte = ""', r"scenario.tilte: unknown key \(did you mean title\?\)"),
        ("[deadlines]", "[deadline]", r"toml: deadline: unknown key \(did you mean deadlines\?\)"),
        ('consent = "90 s"', 'consent = "90"', r'deadlines.consent: expected a duration like "2 min" .*, got "90"'),
        ('consent = "90 s"', 'consent = "0 s"', "deadlines.consent: expected a duration"),
        ('consent = "90 s"', 'consent = "1 h"', "deadlines: consent, seal, release: expected each longer"),
        ('"2 kB"', '"2 KB"', r'party.a.table.pay.bytes_max: expected a size like "2 GiB" .*, got "2 KB"'),
        ('"2 kB"', "2000", r"party.a.table.pay.bytes_max: expected a size .*, got 2000"),
        ("k = 3", "", "party.a.table.pay: rule: k: expected at least 1 for an aggregate rule"),
        ("k = 3", "k = -3", "party.a.table.pay.rule.k: expected a whole number, 0 to 1000000, got -3"),
        ('entity = "person"', 'entity = "persons"', r"rule.entity: persons is not one of .*\(did you mean person\?\)"),
        ('"aggregate"', '"agregate"', r'rule.kind: expected "aggregate" \| "exact" \| "noise", got "agregate"'),
        ('["avg"]', '["avg", "mean"]', r'columns.amount.use\[1\]: expected "join" .*, got "mean"'),
        ('type = "double"', 'type = "float"', 'columns.amount.type: expected .*"double".*, got "float"'),
        ("[0, 10]", "[10, 0]", r"party.a.table.pay: column amount: clamp: expected \[low, high\]"),
        ("[0, 10]", "[0, nan]", r"party.a.table.pay: Column.clamp\[1\]: expected a finite number"),
        ("amount =", '"the amount" =', "party.a.table.pay: Column.name: expected text like"),
        ('like = "a"', 'like = "c"', "party.b.table.pay.like: no party c has a table pay"),
        ('like = "a"', 'like = "b"', "party.b.table.pay.like: the table of b is itself `like` another"),
        ('like = "a"', 'like = "a"\ncolumns = { x = { type = "bool" } }', "entity: person is not one of"),
        ('like = "a"', "", "party.b.table.pay.rule: is missing"),
        ('["reader"]', '["raeder"]', r"recipients.result: raeder is nobody here \(did you mean reader\?\)"),
        ('["reader"]', '["zoe"]', r"recipients.result: zoe is nobody here; write \[party.zoe\]"),
        ('["reader"]', '["reader", "reader"]', "recipients.result: expected each name once"),
        ('["reader"]', "[]", "recipients.result: expected a list: text, 1 or more"),
        ("[recipients]", "[approvals]\nquorum = 1\n[recipients]", "approvals.quorum: expected at most 0"),
        ('query = "SELECT avg(amount) FROM pay"', "", "program.query: is missing"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, right: str, wrong: str, says: str) -> None:
    assert SMALL.count(right) == 1
    with pytest.raises(LocalError, match=says) as refused:
        loaded(tmp_path, SMALL.replace(right, wrong))
    assert str(refused.value).startswith(str(tmp_path / "scenario.toml"))


def test_stacked_tables_have_one_shape(tmp_path: Path) -> None:
    own = '\ncolumns = { person = { type = "string" }, amount = { type = "int64" } }'
    with pytest.raises(
        LocalError, match=r"party.b.table.pay.columns: expected the names and types, in order, that a has"
    ):
        loaded(tmp_path, SMALL.replace('like = "a"', 'like = "a"' + own))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"no such scenario; `mpc init NAME` copies one that is shipped .*flights"):
        scenario.load(tmp_path / "nowhere.toml")
    (tmp_path / "scenario.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(LocalError, match="is not UTF-8 text"):
        scenario.load(tmp_path)


def test_the_reference_is_what_the_types_say() -> None:
    printed = (ROOT / "docs" / "SCENARIO.md").read_text()
    assert printed == scenario.document(), "docs/SCENARIO.md: print it again from mpc.scenario.document()"
    assert "| `k` | a whole number, 0 to 1000000 | `0` |" in printed
    assert "## `[party.NAME.table.NAME.columns.NAME]`" in printed


def test_a_copied_scenario_is_whole_and_never_replaces_a_folder(tmp_path: Path) -> None:
    assert {"flights", "salaries"} <= set(scenario.shipped())
    target = tmp_path / "mine"
    scenario.copy("salaries", target)
    sources = [Path(party.table["salaries"].source) for party in scenario.load(target).party.values()]
    assert len(sources) == 5
    assert all(source.is_file() and source.is_relative_to(target) for source in sources)
    with pytest.raises(LocalError, match="exists already"):
        scenario.copy("flights", target)
    with pytest.raises(LocalError, match="did you mean flights"):
        scenario.copy("flight", tmp_path / "other")
