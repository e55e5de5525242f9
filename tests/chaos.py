"""Chaos: `mpc run`, and processes of it that are killed, stopped, cut off or out of disk, at moments drawn from a seed.

A run ends in the exact result or in words that name who or what stopped it, inside its deadline, and leaves nothing.

    python tests/chaos.py 200            two hundred runs, three at once; FIRST as a second argument is the first seed
    python tests/chaos.py 1 17           the run of seed 17: the same faults, at the same times

A moment is a number of entries in the coordinator's log and a little time after them, so it is about the same one on
any machine; what the processes are doing in it is theirs.
"""

import json
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import isclose
from pathlib import Path

from runs import POLL_S, Done, House, Run, Staff, kill, result, staff

from mpc.receipt import verify_receipt

AT_ONCE = 3
LONG_ROWS = 120_000  # of cora's table: 16 chunks
ENTRIES = 13  # of a session without faults: contract, consents, attestation, seals, results, release, thanks
LATER_S = (0.0, 0.05, 0.4)
STOP_S = (0.05, 3.0)
RELEASE_S, SLACK_S = 24, 30  # deadline of the release; for keys, a restart and tidying on a busy machine
DEADLINES = {"consent": '"12 s"', "seal": '"18 s"', "release": f'"{RELEASE_S} s"'}
PARTIES = ("ada", "bert", "cora")
WHO = ("coordinator", "coordinator", "host", "host", "enclave", "enclave", *PARTIES)
WHAT = ("kill", "kill", "stop", "stop", "freeze", "full disk")
NOTHING_SAID = "the session did not come to an end"

# Connections break under the feet of whoever uses them, three in each process, each after so many frames as it draws; a
# network that never works would end no session. An enclave's channel breaks in the first epoch. What is started again
# after a kill is spared.
CUTS = """
import contextlib, random, socket
from pathlib import Path
from mpc.transport import Connection
from mpc.host import serve

left = {{}}
def cut(sock):
    name = Path("/proc/self/comm").read_text().strip()
    frames = left.setdefault(name, [random.Random(f"{seed} {{name}} {{n}}").randint(1, 25) for n in range(3)])
    if frames:
        frames[0] -= 1
        if not frames[0]:
            frames.pop(0)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

async def send_head(self, *given, send=Connection.send_head):
    cut(self._socket)
    await send(self, *given)

async def receive(self, *, receive=Connection.receive):
    cut(self._socket)
    return await receive(self)

written = []
async def write(self, channel, *given, write=serve.Host._write):
    written.append(self._epoch)
    if self._epoch == 1 and len(written) == {channel}:
        channel.socket.shutdown(socket.SHUT_RDWR)
    await write(self, channel, *given)

Connection.send_head, Connection.receive, serve.Host._write = send_head, receive, write
"""


@dataclass(frozen=True)
class Fault:
    """One thing that happens to one process. `amount`: seconds of a stop, bytes of the largest file on its disk."""

    entries: int  # in the log; 0: as soon as there is the process
    later_s: float
    what: str
    who: str
    amount: float = 0.0

    def __str__(self) -> str:
        amount = {"stop": f" for {self.amount:.2f} s", "full disk": f" beyond {self.amount:.0f} bytes"}
        return f"{self.entries} entries + {self.later_s:.2f} s: {self.what} {self.who}{amount.get(self.what, '')}"


@dataclass(frozen=True)
class Plan:
    """All that follows from a seed."""

    seed: int
    long: bool  # the run has chunks enough to be under way for a while
    cut: bool  # connections break
    channel: int  # an enclave's channel breaks after so many frames; 0: it does not
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int) -> "Plan":
        draw = random.Random(seed)
        cut = draw.random() < 0.3
        return cls(
            seed,
            long=draw.random() < 0.5,
            cut=cut,
            channel=draw.choice((0, 1, 3, 8, 20)) if cut else 0,
            faults=tuple(_draw_fault(draw) for _ in range(draw.choice((1, 1, 2, 3)))),
        )

    @property
    def plant(self) -> str:
        return CUTS.format(seed=self.seed, channel=self.channel) if self.cut else ""

    def __str__(self) -> str:
        cuts = [f"connections break{f', a channel after {self.channel} frames' if self.channel else ''}"] * self.cut
        return "; ".join([f"seed {self.seed}", "16 chunks" if self.long else "3 chunks", *cuts, *map(str, self.faults)])


def _draw_fault(draw: random.Random) -> Fault:
    what, who = draw.choice(WHAT), draw.choice(WHO)
    if what == "full disk" and who == "enclave":  # it has none
        who = "host"
    amount = {"stop": draw.uniform(*STOP_S), "full disk": float(draw.choice((0, 1, 4096, 40_000, 1 << 19)))}
    return Fault(draw.randrange(ENTRIES), draw.uniform(0.0, draw.choice(LATER_S)), what, who, amount.get(what, 0.0))


class Chaos:
    """Plans, played on the runs of one house."""

    def __init__(self, house: House, folder: Path) -> None:
        self.house = house
        self.given = {False: staff(folder / "short"), True: staff(folder / "long", LONG_ROWS)}
        self.outcomes: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()  # a process that is gone cannot be struck
        for given in self.given.values():
            assert given.expected

    def play(self, seed: int) -> str:
        """What the run of that seed came to; raises AssertionError with the plan and how to repeat it."""
        plan = Plan.draw(seed)
        given = self.given[plan.long]
        try:
            outcome = self._play(plan, given)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1].line
            what = f"{type(error).__name__}: {str(error) or place}"
            raise AssertionError(f"{plan}\n{what}\nRepeat it:  python tests/chaos.py 1 {seed}") from error
        self.outcomes[outcome.split(":")[0]] += 1
        return outcome

    def _play(self, plan: Plan, given: Staff) -> str:
        scenario = given.file("chaos.toml", **DEADLINES)
        began = time.monotonic()
        with self.house.run(scenario, "--json", plant=plan.plant) as run:
            due: dict[Fault, float] = {}  # fault → when, of those whose moment has come
            waiting, stopped, entries = set(plan.faults), dict[int, float](), 0
            while run.process.poll() is None:
                now = time.monotonic() - began
                assert now < RELEASE_S + SLACK_S, "it has not ended, long after its last deadline"
                entries = log_entries(run) or entries
                for fault in [fault for fault in waiting if fault.entries <= entries]:
                    due.setdefault(fault, now + fault.later_s)
                for fault in [fault for fault, at in due.items() if fault in waiting and at <= now]:
                    if pid := run.look_for(fault.who):
                        waiting.remove(fault)
                        self.struck[f"{fault.what} {fault.who}"] += 1
                        self._inflict(pid, fault, now, stopped)
                for pid in [pid for pid, until in stopped.items() if until <= now]:
                    kill(pid, signal.SIGCONT)
                    del stopped[pid]
                time.sleep(2 * POLL_S)
            for pid in stopped:
                kill(pid, signal.SIGCONT)
            return judge(run, given, run.wait())

    def _inflict(self, pid: int, fault: Fault, now: float, stopped: dict[int, float]) -> None:
        if fault.who == "host" and fault.what != "full disk":  # its end may come before it has tidied up
            self.house.left_images += 1
        if fault.what == "kill":
            kill(pid)
        elif fault.what in ("stop", "freeze"):
            kill(pid, signal.SIGSTOP)
            if fault.what == "stop":
                stopped[pid] = now + fault.amount
        else:
            limit = int(fault.amount)
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))


def log_entries(run: Run) -> int:
    """How many the coordinator has written; 0 when that cannot be read now.

    Of a copy: a reader of SQLite's own files would lock, and write beside them.
    """
    copy = run.work / "log.sqlite"
    try:
        for end in ("", "-wal"):
            shutil.copyfile(run.folder / "coordinator" / f"log.sqlite{end}", f"{copy}{end}")
        database = sqlite3.connect(copy)
        try:
            return int(database.execute("SELECT count(*) FROM log").fetchone()[0])
        finally:
            database.close()
    except (OSError, sqlite3.Error):  # not made yet, or just being written
        return 0


def judge(run: Run, given: Staff, done: Done) -> str:
    """What it came to, in a few words; raises AssertionError when that is neither a right result nor a named abort."""
    assert done.out, done.err
    said = done.json
    if done.status == 2:  # before anything was sealed: something on this machine, by its name
        assert said["status"] == "error", done
        assert "/" in said["reason"] or "coordinator" in said["reason"], done
        assert not run.folder.exists()
        return f"error: {said['reason']}"
    for name in said["results"]:
        assert _exact(run, name, given), f"{name} has a wrong result"
    for path in said["receipts"].values():
        assert verify_receipt(Path(path).read_bytes(), None).parties
    if said["status"] == "released":
        assert done.status == 0
        assert set(said["results"]) == {"ada", "bert"}
        return "released"
    assert (done.status, said["status"]) in ((1, "refused"), (1, "aborted")), done
    assert said["reason"], "it does not say why"
    assert NOTHING_SAID not in said["reason"], said["reason"]
    assert "Traceback" not in done.err, done.err
    if said["status"] == "refused":
        assert not said["results"]
        assert not run.sealed(), "refused, and yet something was sealed"
    return f"{said['status']}: {said['reason']}"


def _exact(run: Run, name: str, given: Staff) -> bool:
    rows = result(run, name)
    return len(rows) == len(given.expected) and all(
        (row[0], row[2]) == (own[0], own[2]) and isclose(row[1], own[1], rel_tol=1e-12)
        for row, own in zip(rows, given.expected, strict=True)
    )


def main(runs: int, first: int = 1) -> int:
    """Exit status: 0 all ended well, 1 not; what failed is printed with its seed."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mpc-chaos-") as folder:
        house = House(Path(folder) / "house")
        house.folder.mkdir()
        chaos = Chaos(house, Path(folder))
        pool = ThreadPoolExecutor(AT_ONCE)
        playing = {seed: pool.submit(chaos.play, seed) for seed in range(first, first + runs)}
        try:
            for seed, future in playing.items():
                try:
                    print(f"{future.result()[:200]:40}  [{Plan.draw(seed)}]", flush=True)
                except AssertionError as error:
                    failed += 1
                    print(f"FAILED  {error}\n", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: those that run come to their end
        print(json.dumps({"runs": runs, "failed": failed, **chaos.outcomes, "struck": dict(chaos.struck)}))
        house.close()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
