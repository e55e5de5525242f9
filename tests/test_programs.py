"""What all programs share: parameters, the table of programs, the scenarios that show them, the page about them."""

import importlib.util
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from joint import EXACT, aggregate, arrow, column, contract, read, stream, table
from joint_programs import agreed, in_engine

from enclave_runtime import programs
from enclave_runtime.programs import ProgramRefused
from mpc.protocol.contract import Program, Rule
from mpc.protocol.errors import ContractError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/PROGRAMS.md").read_text()
KINDS = ("auction", "intersection", "regression", "statistics")
MEMBERS = [table("members", owner, aggregate(3), column("id", "int64")) for owner in ("a", "b")]


def test_the_page_adds_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"^`enclave_runtime/programs/headcount\.py`:\n\n```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert text.count("\n") <= 60
    (tmp_path / "headcount.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(programs.MODULES, "headcount", "headcount")
    described = agreed("headcount", MEMBERS, {"table": "members"})
    told = programs.program("headcount").check(described)
    assert "at least 3 rows" in told.rules[0]
    for counts, expected in (((5, 4), 9), ((5, 0), 5), ((5, 2), None)):
        sealed = [stream(arrow(MEMBERS[0], [{"id": i} for i in range(n)])) for n in counts]
        assert read(in_engine(described, sealed)["analyst"]) == [{"rows": expected}]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_on_the_page(kind: str) -> None:
    record = importlib.import_module(programs.MODULES[kind]).Parameters
    section = PAGE.partition(f"\n## {kind}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^(\w+) = ", section.partition("[program.parameters]")[2], re.M) == list(
        record.__dataclass_fields__
    )


# parameters


def test_parameters_are_read_strictly() -> None:
    given = {"table": "members", "bid": "id", "units": 1, "price": "first", "reserve": 0, "tell": "all"}
    owned = [table("members", owner, EXACT, column("id", "int64")) for owner in ("a", "b")]
    auction = programs.program("auction")
    auction.check(agreed("auction", owned, given))
    for changed, words in (
        ({"units": True}, r"units: expected a whole number; for example units = 1, got true or false"),
        ({"units": 10**30}, r"program\.parameters: CBOR: expected .* no tags$"),
        ({"table": None}, r"table: expected text; for example table = \"bids\", got nothing"),
        ({"table": {}}, r"table: expected text; .*, got a table"),
        ({"table": "x" * 65}, r"table: expected 1 to 64 long"),
        ({"table": "x; y"}, r"table: expected text like "),
        ({"x": 1}, r"program\.parameters: 'x' is none of this program's: expected table, bid, units"),
    ):
        with pytest.raises(ContractError, match=words):
            auction.check(agreed("auction", owned, {**given, **changed}))
    for name in given:
        rest = {other: value for other, value in given.items() if other != name}
        with pytest.raises(
            ContractError, match=rf"program\.parameters\.{name}: is missing: expected for example {name} = "
        ):
            auction.check(agreed("auction", owned, rest))


@pytest.mark.parametrize("kind", KINDS)
def test_forged_parameters_are_refused(kind: str) -> None:
    """As bytes, by whoever writes a contract: any, nested too deep, or not in their one form."""
    drafted = contract(MEMBERS, "")
    program = programs.program(kind)
    chance = random.Random(kind)
    forged = [
        b"",
        b"\xa0",
        b"\x80",
        b"\xf6",
        b"\x81" * 100,
        b"\xbf\xff",
        b"\xa1\x61a\x1b" + b"\xff" * 8,
        b"\xa1\x01\x02",
    ]
    forged += [chance.randbytes(chance.randrange(1, 40)) for _ in range(50)]
    for data in forged:
        described = replace(drafted, program=Program(kind, "", data))
        with pytest.raises(ContractError, match=r"program\.parameters"):
            program.check(described)
        with pytest.raises(ProgramRefused) as refused:
            program.run(described, [])
        assert refused.value.code == "query"
    with pytest.raises(ContractError, match=r"program\.query: expected none"):
        program.check(replace(drafted, program=Program(kind, "SELECT 1")))
    with pytest.raises(ContractError, match=r"enclave memory: expected at least 320 MiB"):
        program.check(contract(MEMBERS, "", kind=kind, memory_bytes=64 << 20))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_that_a_program_cannot_keep_is_refused(kind: str) -> None:
    noisy = [replace(one, rule=Rule("noise", epsilon=1.0, delta=1e-6, rows=1)) for one in MEMBERS]
    with pytest.raises(
        ContractError, match=rf"a's rule for members is noise, which {kind} cannot keep: expected a rule of"
    ):
        programs.program(kind).check(agreed(kind, noisy, {}))


def test_an_engine_s_words_never_leave() -> None:
    described = agreed("statistics", MEMBERS[:1], {"table": "members", "group_by": [], "measures": ["count"]})
    with pytest.raises(ProgramRefused) as refused:
        programs.program("statistics").run(described, [None])
    assert (refused.value.code, refused.value.__cause__) == ("engine", None)


# the scenarios


@pytest.mark.parametrize("script", sorted(ROOT.glob("scenarios/*/make_data.py")), ids=lambda path: path.parent.name)
def test_the_data_of_a_scenario_are_what_its_script_writes(script: Path, tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("make_data", script)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main(tmp_path)
    written, kept = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, script.parent / "data")
    )
    assert written == kept
