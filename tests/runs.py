"""`mpc run` in processes of its own, as people start it: watched from outside, disturbed, and what it leaves behind.

A *play* is a test that runs beside others: most of a run is waiting, and there are many. See `play` and `played`.
"""

import ctypes
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import duckdb

from mpc.protocol.contract import Contract
from mpc.protocol.errors import PeerError
from mpc.protocol.messages import Release
from mpc.protocol.signing import Signed, open_signed
from mpc.transport import Ended, EpochOpened, decode_entry, unpack

ROOT = Path(__file__).parents[1]
SCENARIOS = ROOT / "scenarios"
POLL_S = 0.005
WAIT_S = 120  # what a step may take on a machine that is very busy
PLAYS_AT_ONCE = 3
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)  # one document, or it raises


class House:
    """One cache and one simulated root for all runs of a test session, and folders for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.left_images = 0  # unpacked images that a killed host could not remove; the next launch does
        self._count = 0
        self._runs: set[int] = set()
        os.environ.pop("MPC_DEBUG", None)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whatever a run leaves becomes our child

    def environment(self, temporary: Path) -> dict[str, str]:
        own = {"XDG_CACHE_HOME": str(self.folder / "cache"), "XDG_STATE_HOME": str(self.folder / "state")}
        return {**os.environ, **own, "TMPDIR": str(temporary), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}

    def new_folder(self) -> Path:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder

    def run(
        self, scenario: Path, *options: str, plant: str = "", out: Path | None = None, command: str = "run"
    ) -> "Run":
        run = Run(self, scenario, options, plant, out, command)
        self._runs.add(run.process.pid)
        return run

    def mpc(self, *arguments: object) -> Done:
        """Another command line, whole."""
        line = [sys.executable, "-m", "mpc.cli.main", *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, env=self.environment(self.folder))
        return Done(done.returncode, done.stdout, done.stderr)

    def image(self, path: Path) -> None:
        """A copy of the image of this installation."""
        built = self.mpc("image", "build", "--json").json["image"]
        shutil.copyfile(built, path)

    def orphans(self) -> list[str]:
        """Processes of runs that have ended."""
        found = []
        for pid in children(os.getpid()):
            if pid not in self._runs and (word := _state(pid)):
                if word[0] == "Z":
                    with suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
                elif "mpc-" in word or "bwrap" in word or "python" in word:
                    found.append(word)
        return found

    def close(self) -> None:
        until(lambda: not self.orphans(), "orphans are gone", seconds=10)
        cache = self.folder / "cache"
        assert len(list(cache.glob("enclave-mpc/running/*"))) <= self.left_images
        shutil.rmtree(cache, ignore_errors=True)  # images are large
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Run:
    """One `mpc run`. `plant`: Python that runs in its process before anything else, to make a fault."""

    def __init__(
        self, house: House, scenario: Path, options: tuple[str, ...], plant: str, out: Path | None, command: str
    ) -> None:
        self.house, self.scenario = house, scenario
        self.work = house.new_folder()
        self.temporary = self.work / "tmp"
        self.temporary.mkdir()
        self.folder = out or self.work / "run"
        self.marker = f"MPC_TEST_RUN={self.work}"
        name, value = self.marker.split("=")
        program = f"import sys\n{plant}\nfrom mpc.cli.main import main\nmain()"
        where = [] if out is Path() else ["--out", str(self.folder)]
        with (self.work / "out").open("wb") as stdout, (self.work / "err").open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, command, str(scenario), *where, *options],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self.work,
                env={**house.environment(self.temporary), name: value},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in self.processes():
                kill(pid, signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    # Watching.

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """The condition's first true value; fails when the run ends before."""

        def look() -> Any:
            ended = self.process.poll() is not None
            found = condition()
            if not found and ended:
                raise AssertionError(f"the run ended before this: {what}\n{self._said('out')}\n{self._said('err')}")
            return found

        return until(look, what)

    def wait(self) -> Done:
        """For its end; then nothing of it is left but its folder."""
        status = self.process.wait(WAIT_S)
        until(lambda: not self.processes(), f"no process of the run is left, of {self.processes()}", seconds=5)
        assert not list(self.temporary.iterdir())
        if self.folder.parent == self.work:  # its own: in another run's folder that run may still be at work
            assert not list(self.folder.glob("**/spool"))
        return Done(status, self._said("out"), self._said("err"))

    def _said(self, which: str) -> str:
        return (self.work / which).read_text()

    def processes(self) -> dict[int, str]:
        """pid → what it is, of the processes of this run that live and have this run's environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if self.marker.encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = _state(int(entry.name))
        return found

    def look_for(self, name: str) -> int:
        """The pid of a piece at this moment, or of the first process in the enclave; 0 when there is none."""
        if name == "enclave":
            host = self.look_for("host")
            launchers = [pid for pid in children(host) if _comm(pid) == "bwrap"] if host else []
            return next((pid for launcher in launchers for pid in children(launcher) if _comm(pid) != "bwrap"), 0)
        return next((pid for pid in children(self.process.pid) if _comm(pid) == f"mpc-{name}"[:15]), 0)

    def piece(self, name: str) -> int:
        """The pid of a piece that runs: a party's name, `coordinator` or `host`."""
        return int(self.until(lambda: self.look_for(name), f"process of {name}"))

    def enclave(self) -> int:
        """The pid of the first process in the enclave, as this machine sees it."""
        return int(self.until(lambda: self.look_for("enclave"), "an enclave"))

    def log(self) -> list[Any]:
        """The coordinator's log, as it lies on the disk."""
        path = self.folder / "coordinator" / "log.sqlite"
        if not path.exists():
            return []
        try:
            database = sqlite3.connect(path)
            try:
                rows = database.execute("SELECT entry FROM log ORDER BY number").fetchall()
            finally:
                database.close()
        except sqlite3.Error:  # not made yet
            return []
        return [decode_entry(unpack(entry)) for (entry,) in rows]

    def said(self) -> list[tuple[str, str]]:
        """(kind, who) of what was said; an epoch's beginning and the end stand between."""
        found: list[tuple[str, str]] = []
        for entry in self.log():
            if isinstance(entry, EpochOpened):
                found.append(("epoch", str(entry.epoch)))
            elif isinstance(entry, Ended):
                found.append(("ended", entry.outcome))
            else:
                signed = open_signed(entry.envelope)
                found.append((signed.kind, self._names(signed).get(signed.signer, "")))
        return found

    def _names(self, signed: Signed) -> dict[bytes, str]:
        try:
            contract = open_signed((self.folder / "contract.cbor").read_bytes())
        except (OSError, PeerError):
            return {}
        return Contract.decode(contract.payload).names

    def until_said(self, kind: str, who: str = "", times: int = 1) -> None:
        def look() -> bool:
            return sum(k == kind and who in ("", w) for k, w in self.said()) >= times

        self.until(look, f"{kind} {who}")

    def chunks(self) -> list[Path]:
        """Sealed chunks that the coordinator has."""
        return [path for path in (self.folder / "coordinator").glob("chunks/*/*/*/*") if path.name.isdigit()]

    def sealed(self) -> bool:
        """Whether anything was ever sealed, as the coordinator's folder tells."""
        return bool(self.chunks()) or any(kind == "seal" for kind, _ in self.said())

    def receipt(self, name: str) -> Release:
        return Release.decode(open_signed((self.folder / name / "receipt.cbor").read_bytes()).payload)


# Processes.


def until(condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(POLL_S)
    return found


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(entry.name))
    return sorted(found)


def _comm(pid: int) -> str:
    """What it calls itself; nothing when it has ended, though nobody may have waited for it yet."""
    with suppress(OSError):
        return "" if gone(pid) else Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _state(pid: int) -> str:
    """`S mpc-host 123`, or nothing when it is gone."""
    with suppress(OSError):
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        return f"{after.split()[0]} {before.partition('(')[2]} {pid}"
    return ""


def gone(pid: int) -> bool:
    """Ended, and perhaps not yet waited for."""
    return _state(pid)[:1] in ("Z", "")


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still in the block."""
    kill(pid, signal.SIGSTOP)
    until(lambda: _state(pid)[:1] in ("T", "Z", ""), "it stands still")
    try:
        yield
    finally:
        kill(pid, signal.SIGCONT)


# Scenarios.


@dataclass(frozen=True)
class Staff:
    """A scenario of three employers whose tables are stacked: ada and bert are small, cora is as large as wished."""

    folder: Path
    text: str

    @cached_property
    def expected(self) -> list[tuple[str, float, int]]:
        """What plain DuckDB says: level, mean, people."""
        source = " UNION ALL ".join(
            f"SELECT * FROM read_csv('{path}', all_varchar = true)"
            if path.suffix == ".csv"
            else f"SELECT * FROM read_parquet('{path}')"
            for path in sorted(self.folder.glob("*.csv")) + sorted(self.folder.glob("*.parquet"))
        )
        query = f"SELECT level, avg(pay::BIGINT), count(*) FROM ({source}) GROUP BY level ORDER BY level"
        with duckdb.connect() as connection:
            return connection.execute(query).fetchall()

    def file(self, name: str = "scenario.toml", **changes: str) -> Path:
        """A scenario file beside the data; `changes`: what to write after `KEY = `."""
        lines = [
            f"{key} = {changes.pop(key)}" if (key := line.split(" = ")[0].strip()) in changes else line
            for line in self.text.splitlines()
        ]
        assert not changes, f"not in the scenario: {changes}"
        path, part = self.folder / name, self.folder / f"{name}.{threading.get_ident()}"
        part.write_text("\n".join(lines) + "\n")
        return part.replace(path)  # another play may be reading it


# A disk that takes its time, for plants: what happens between two of its answers is under way for sure.
SLOW_READER = """
import time, parties.datasets as module
def slow(*arguments, spool=module.spool, **more):
    time.sleep(0.8)
    return spool(*arguments, **more)
module.spool = slow
"""
SLOW_STORE = """
import time
from mpc.coordinator.store import Store
def slow(self, *arguments, put=Store.put_chunk):
    time.sleep(0.03)
    return put(self, *arguments)
Store.put_chunk = slow
"""

# The session waits for bert to store his result.
SLOW_KEEPER = """
import trio
from parties.client import Client
async def keep(self, action, kept=Client._keep):
    await trio.sleep(1.5 if self._identity.name == "bert" else 0)
    await kept(self, action)
Client._keep = keep
"""


def staff(folder: Path, rows: int = 0) -> Staff:
    """`rows`: of cora, in a Parquet file (about 130 bytes each); 0 gives her a CSV file like the others'."""
    folder.mkdir(parents=True)
    parties = ""
    with duckdb.connect() as connection:
        for index, name in enumerate(("ada", "bert", "cora")):
            large = name == "cora" and rows > 0
            count = rows if large else 40
            columns = (
                f"SELECT '{name}-' || i AS id, 'level ' || (i % 4 + 1) AS level, "
                f"(30000 + (i * 7919 + {index}) % 9000)::BIGINT AS pay, repeat('x', 100) AS note "
                f"FROM range({count}) t(i)"
            )
            file = f"{name}.parquet" if large else f"{name}.csv"
            how = "FORMAT parquet" if large else "HEADER"
            connection.execute(f"COPY ({columns}) TO '{folder / file}' ({how})")
            parties += f'[party.{name}.table.staff]\nsource = "{file}"\n'
            parties += (RULES if index == 0 else 'like = "ada"\n') + "\n"
    return Staff(folder, HEAD + parties + PROGRAM)


HEAD = """[scenario]
name = "staff"
title = "Who earns what?"

[enclave]
epochs = 3

[deadlines]
consent = "2 min"
seal = "4 min"
release = "5 min"

"""
RULES = """bytes_max = "256 MiB"

[party.ada.table.staff.rule]
kind = "aggregate"
entity = "id"
k = 5

[party.ada.table.staff.columns]
id = { type = "string" }
level = { type = "string", use = ["group"] }
pay = { type = "int64", use = ["avg", "count"] }
note = { type = "string" }
"""
PROGRAM = """[program]
kind = "sql"
query = "SELECT level, avg(pay) AS mean, count(*) AS people FROM staff GROUP BY level ORDER BY level"

[recipients]
result = ["ada", "bert"]
"""


def result(run: Run, name: str) -> list[tuple[Any, ...]]:
    """The rows that a recipient got."""
    with duckdb.connect() as connection:
        return connection.execute(f"SELECT * FROM '{run.folder / name / 'result.parquet'}'").fetchall()


# Plays.

Play = Callable[..., None]


class Plays:
    """Functions that take a House and run in threads of their own, a few at once."""

    def __init__(self) -> None:
        self.found: dict[str, Play] = {}

    def __call__(self, function: Play) -> Play:
        self.found[function.__name__] = function
        return function

    def each(self, **cases: tuple[Any, ...]) -> Callable[[Play], Play]:
        """The same play with other arguments after the house."""

        def take(function: Play) -> Play:
            for name, arguments in cases.items():
                self.found[f"{function.__name__}: {name}"] = lambda house, given=arguments: function(house, *given)
            return function

        return take

    @contextmanager
    def started(self, wanted: list[str], house: House) -> Iterator[dict[str, Future[None]]]:
        with ThreadPoolExecutor(PLAYS_AT_ONCE) as pool:
            yield {name: pool.submit(self.found[name], house) for name in wanted}
