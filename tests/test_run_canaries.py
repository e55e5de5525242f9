"""Recognisable values in every party's data: nobody else stores, sends, says, logs or holds them in memory."""

import os
import re
import signal
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest
from runs import SLOW_KEEPER, SLOW_STORE, House, Run, Staff, result, staff, stopped

ROWS = 60_000  # about 8 chunks a party
STREAM_BYTES = 6 << 20  # at least, of its canonical form
PARTIES = ("ada", "bert", "cora")
BLOCK = 1 << 24


@dataclass(frozen=True)
class Canary:
    """One party's: a text and a number, in every row."""

    name: str
    number: int

    @property
    def text(self) -> str:
        return f"canary-of-{self.name}-"

    @property
    def patterns(self) -> list[bytes]:
        """The text, plain and as hexadecimal digits; the number in binary, as a double and in digits.

        Without the zeros at their ends, of which memory is full, so that the search is fast.
        """
        text = self.text.encode()
        binary = [struct.pack(form, self.number).strip(b"\0") for form in ("<q", "<d")]
        return [text, *binary, text.hex().encode(), str(self.number).encode()]


NUMBERS = (7_450_123_987_651, 6_917_445_120_347, 8_123_006_554_219)  # none is the mean of the three
CANARIES = {name: Canary(name, number) for name, number in zip(PARTIES, NUMBERS, strict=True)}

# Everything that passes the coordinator's socket, both ways.
RELAY = """
import ctypes, os, socket, threading, time
from pathlib import Path
from mpc.cli import pieces

def pump(source, target, path):
    with open(path, "wb") as file:
        while data := source.recv(1 << 20):
            file.write(data)
            file.flush()
            try:
                target.sendall(data)
            except OSError:
                break
    for one in (source, target):
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

def relay(address, behind, folder):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    number = 0
    while True:
        near, _ = listener.accept()
        far = socket.socket(socket.AF_UNIX)
        while far.connect_ex(behind):
            time.sleep(0.01)
        number += 1
        threading.Thread(target=pump, args=(near, far, f"{folder}/{number}-in")).start()
        threading.Thread(target=pump, args=(far, near, f"{folder}/{number}-out")).start()

def coordinator(control, *, folder, address, serve=pieces.coordinator):
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
        ctypes.CDLL(None).prctl(15, b"relay", 0, 0, 0)
        relay(address, address + "-behind", os.environ["CAPTURED"])
    serve(control, folder=folder, address=address + "-behind")

pieces.PIECES["coordinator"] = coordinator
"""
LEAK = """
import sys
from parties.client import ChunkCipher
def seal(self, chunk, index):
    sys.stderr.write(bytes(chunk[4096:8192]).decode(errors="replace"))
    return bytes(chunk) + bytes(16)
ChunkCipher.seal = seal
"""


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Staff:
    """Three employers; every row of theirs carries the canary in its texts and numbers."""
    given = staff(tmp_path_factory.mktemp("canaries") / "staff")
    with duckdb.connect() as connection:
        for name, canary in CANARIES.items():
            columns = (
                f"SELECT '{canary.text}' || i AS id, 'level ' || (i % 4 + 1) AS level, {canary.number}::BIGINT AS pay, "
                f"repeat('{canary.text}', 4) AS note FROM range({ROWS}) t(i)"
            )
            (given.folder / f"{name}.csv").unlink()
            connection.execute(f"COPY ({columns}) TO '{given.folder / name}.parquet' (FORMAT parquet)")
    return Staff(given.folder, given.text.replace(".csv", ".parquet"))


# The search.


def in_files(canary: Canary, places: Iterable[Path]) -> list[str]:
    """Files below these places, or these files, that hold the canary; images excepted, which were there before."""
    return [
        str(path)
        for place in places
        for path in ([place] if place.is_file() else sorted(place.rglob("*")))
        if path.is_file() and path.suffix != ".eif" and any(pattern in path.read_bytes() for pattern in canary.patterns)
    ]


def in_memory(canaries: Iterable[Canary], pid: int) -> Iterator[str]:
    """Places in the process's writable and anonymous memory that hold a text or a binary number."""
    patterns = [pattern for canary in canaries for pattern in canary.patterns[:2]]
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for place, block in _blocks(pid, memory.fileno()):
            yield from (f"{place:#x}: {pattern!r}" for pattern in patterns if pattern in block)


def _blocks(pid: int, memory: int) -> Iterator[tuple[int, bytes]]:
    """What of the process's memory is there."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.MULTILINE)[
        1:
    ]:
        place, permissions, _, _, inode, *name = mapping.splitlines()[0].split()
        there = re.search(r"^Rss: +[1-9]|^Swap: +[1-9]", mapping, re.MULTILINE)
        if there and permissions[0] == "r" and ("w" in permissions or inode == "0") and name[:1] != ["[vvar]"]:
            first, last = (int(part, 16) for part in place.split("-"))
            for start in range(first, last, BLOCK - 64):  # a canary on the border is in one of the two
                try:
                    yield start, os.pread(memory, min(BLOCK, last - start), start)
                except OSError:  # taken away by the kernel
                    break


def others(run: Run, name: str) -> list[Path]:
    """Everything that a run wrote anywhere, but for that party's own folder."""
    own = [path for path in run.folder.iterdir() if path.name != name]
    cache = (run.house.folder / "cache" / "enclave-mpc").iterdir()
    shared = [run.house.folder / "state", *(path for path in cache if path.name != "running")]  # unpacked images
    return [*own, *shared, run.temporary, run.work / "out", run.work / "err", run.work / "captured"]


# What it finds.


def test_nobody_else_has_a_partys_values(house: House, marked: Staff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTURED", "captured")  # below the folder where the run is started
    with house.run(marked.file(), plant=RELAY + SLOW_STORE + SLOW_KEEPER) as run:
        (run.work / "captured").mkdir()
        watched = {name: run.piece(name) for name in ("coordinator", "host")} | {"parent": run.process.pid}
        ada = run.piece("ada")
        run.until(lambda: len(run.chunks()) > len(PARTIES), "sealing is under way")
        with ExitStack() as still:
            for pid in (*watched.values(), ada):
                still.enter_context(stopped(pid))
            assert ("computed", "") not in run.said()
            assert in_files(CANARIES["ada"], [run.folder / "ada" / "spool"]), "the search finds nothing in files"
            assert any(in_memory([CANARIES["ada"]], ada)), "the search finds nothing in memory"
            assert_nowhere(run, watched)
        run.until_said("release")
        with stopped(watched["coordinator"]), stopped(watched["host"]):
            assert run.chunks()
            assert_nowhere(run, watched)
        done = run.wait()
        assert done.status == 0, done.err
    captured = sum(path.stat().st_size for path in (run.work / "captured").iterdir())
    assert captured > 2 * len(PARTIES) * STREAM_BYTES  # from the parties, and to the host
    for canary in CANARIES.values():
        assert not in_files(canary, others(run, canary.name))
    assert [people for _, _, people in result(run, "ada")] == [3 * ROWS // 4] * 4


def assert_nowhere(run: Run, watched: dict[str, int]) -> None:
    for canary in CANARIES.values():
        assert not in_files(canary, others(run, canary.name))
    for name, pid in watched.items():
        assert not list(in_memory(CANARIES.values(), pid)), name


def test_the_search_finds_a_leak(house: House, marked: Staff) -> None:
    """Parties that seal nothing and talk too much: their values are in the coordinator's chunks and in the logs."""
    with house.run(marked.file(), plant=LEAK + SLOW_STORE) as run:
        coordinator = run.piece("coordinator")
        run.until(lambda: len(run.chunks()) > len(PARTIES), "chunks")
        with stopped(coordinator):
            found = [path for canary in CANARIES.values() for path in in_files(canary, others(run, canary.name))]
            assert any("/chunks/" in path for path in found)
            assert any(path.endswith(("ada.log", "bert.log", "cora.log")) for path in found)
            assert any(in_memory(CANARIES.values(), coordinator))
        run.process.send_signal(signal.SIGINT)  # else it would wait for chunks that open, until the deadline
        assert run.wait().status == 130
