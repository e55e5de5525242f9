"""A run's processes from outside, as /proc shows them: peak memory, processor time, the enclave's memory."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INTERVAL_S = 0.01
KIB = 1024
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Seen:
    """One process when it was last looked at."""

    name: str  # mpc, mpc-coordinator, mpc-host, mpc-PARTY, bwrap, enclave, engine
    peak_bytes: int  # VmHWM: resident at once, shared pages included
    cpu_s: float


@dataclass(frozen=True)
class Memory:
    """What one process holds at a moment."""

    private_bytes: int = 0
    files_bytes: int = 0  # mapped libraries
    tables_bytes: int = 0  # shared memory, in which the opened tables lie

    @property
    def bytes(self) -> int:
        return self.private_bytes + self.files_bytes + self.tables_bytes


@dataclass(frozen=True)
class Moment:
    """The enclave's two processes."""

    at: float  # Unix time
    enclave: Memory
    engine: Memory

    @property
    def computing(self) -> bool:
        """The engine has begun to read the tables."""
        return self.engine.tables_bytes > 0

    @property
    def bytes(self) -> int:
        """Of both; what they share counts once."""
        shared = max(self.enclave.files_bytes, self.engine.files_bytes) + self.enclave.tables_bytes
        return self.enclave.private_bytes + self.engine.private_bytes + shared


class Watch(threading.Thread):
    """Looks at a process and all its descendants every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[int, Seen] = {}
        self.moments: list[Moment] = []
        self._over = threading.Event()
        self._root = 0

    def start(self, root: int | None = None) -> None:
        assert root is not None
        self._root = root
        super().start()

    def stop(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(INTERVAL_S):
            self._look()

    def peak_bytes(self, name: str) -> int:
        return max((seen.peak_bytes for seen in self.seen.values() if seen.name == name), default=0)

    def cpu_s(self, name: str) -> float:
        return sum(seen.cpu_s for seen in self.seen.values() if seen.name == name)

    def _look(self) -> None:
        states: dict[str, dict[str, int]] = {}
        todo = [(self._root, "")]
        while todo:
            pid, parent = todo.pop()
            with suppress(OSError, ValueError, IndexError, KeyError):  # it has ended meanwhile
                state = _status(pid)
                name = "mpc" if not parent else _name((Path("/proc") / str(pid) / "comm").read_text().strip(), parent)
                self.seen[pid] = Seen(name, state["VmHWM"], _cpu_s(pid))
                states[name] = state
                todo += [(child, name) for child in _children(pid)]
        if "enclave" in states:
            enclave, engine = (_memory(states.get(name, {})) for name in ("enclave", "engine"))
            self.moments.append(Moment(time.time(), enclave, engine))


def _memory(state: dict[str, int]) -> Memory:
    return Memory(*(state.get(name, 0) for name in ("RssAnon", "RssFile", "RssShmem")))


def _name(name: str, parent: str) -> str:
    if parent in ("enclave", "engine"):
        return "engine"
    return "enclave" if parent == "bwrap" and name != "bwrap" else name


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {field[0].rstrip(":"): int(field[1]) * KIB for field in fields}


def _cpu_s(pid: int) -> float:
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS  # utime, stime


def _children(pid: int) -> list[int]:
    files = (Path("/proc") / str(pid) / "task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]
