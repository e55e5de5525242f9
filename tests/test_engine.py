"""The engine: a real child process, what it computes, what it cannot reach, and how it ends."""

import fcntl
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from joint import EXACT, aggregate, arrow, column, contract, read, stream, table

from enclave_runtime import engine as engine_module
from enclave_runtime.engine import EMPTY, NOBODY, Engine
from enclave_runtime.programs import CODES, ProgramRefused
from mpc.protocol.contract import Contract, Table

# The enclave forks from a process of one thread; what a test runner has is its own affair.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

VALUES = table("values", "alice", EXACT, column("v", "int64"))
FOREVER = (
    "SELECT count(*) AS n FROM values a, values b, values c, values d, values e WHERE hash(a.v, b.v, c.v, d.v, e.v) = 1"
)


@contextmanager
def files(*tables: bytes) -> Iterator[list[tuple[int, int]]]:
    """Shared memory with each table at its start, and more behind it, as in an enclave."""
    opened = []
    try:
        for data in tables:
            file = os.memfd_create("table")
            os.write(file, data + b"canary" * 100)
            opened.append((file, len(data)))
        yield opened
    finally:
        for file, _ in opened:
            os.close(file)


def numbers(count: int, described: Table = VALUES) -> bytes:
    return stream(arrow(described, [{"v": i} for i in range(count)]))


def refusal(agreed: Contract, *tables: bytes, seconds: float = 60) -> tuple[str, int | None]:
    with files(*tables) as opened, pytest.raises(ProgramRefused) as refused:
        Engine().compute(agreed, opened, seconds)
    return refused.value.code, refused.value.table_index


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def wait_until(condition: Callable[[], bool]) -> None:
    """For what only /proc can tell; fails after 30 s."""
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("never became true")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_computes_for_every_recipient_and_leaves_no_process() -> None:
    before = children()
    agreed = contract([VALUES], "SELECT sum(v) AS s FROM values", recipients=("one", "two"))
    engine = Engine()
    assert len(children() - before) == 2
    with files(numbers(10)) as opened:
        results = engine.compute(agreed, opened, 60)
    assert {name: read(result) for name, result in results.items()} == {"one": [{"s": 45}], "two": [{"s": 45}]}
    assert children() == before
    engine.close()  # again is nothing


def test_takes_as_many_tables_as_a_contract_has() -> None:
    count = 1000
    owned = [table("values", f"owner{i}", aggregate(1), column("v", "int64", "sum")) for i in range(count)]
    agreed = contract(owned, "SELECT sum(v) AS s, count(*) AS n FROM values", recipients=("owner0",))
    with files(*[stream(arrow(owned[0], [{"v": i}])) for i in range(count)]) as opened:
        results = Engine().compute(agreed, opened, 60)
    assert read(results["owner0"]) == [{"s": count * (count - 1) // 2, "n": count}]


def test_refusals_come_through_with_the_table_that_is_wrong() -> None:
    other = table("others", "bob", EXACT, column("w", "double"))
    agreed = contract([VALUES, other], "SELECT sum(v) AS s FROM values, others")
    assert refusal(agreed, numbers(3), numbers(3)) == ("input", 1)
    assert refusal(contract([VALUES], "SELECT secret FROM values"), numbers(3)) == ("query", None)
    assert refusal(contract([VALUES], "SELECT 1 AS x", kind="other"), numbers(3)) == ("query", None)


def test_an_endless_program_ends_in_time() -> None:
    before = children()
    assert refusal(contract([VALUES], FOREVER), numbers(1000), seconds=2) == ("time", None)
    assert children() == before


def test_memory_and_results_are_limited() -> None:
    large = "SELECT a.v AS x FROM values a, values b, values c ORDER BY hash(a.v, b.v, c.v)"
    assert refusal(contract([VALUES], large, memory_bytes=1536 << 20), numbers(1000)) == ("memory", None)
    wide = "SELECT a.v AS x, b.v AS y FROM values a, values b"
    assert refusal(contract([VALUES], wide), numbers(3000)) == ("result-size", None)
    many = contract([VALUES], wide, recipients=[f"r{i}" for i in range(40)])
    assert refusal(many, numbers(700)) == ("result-size", None)  # for all of them


def test_a_child_that_dies_is_the_engine_s_failure() -> None:
    before = children()
    engine = Engine()
    for child in children() - before:
        os.kill(child, signal.SIGKILL)
    with files(numbers(3)) as opened, pytest.raises(ProgramRefused) as refused:
        engine.compute(contract([VALUES], "SELECT sum(v) AS s FROM values"), opened, 60)
    assert refused.value.code == "engine"
    assert children() == before


def test_the_child_holds_nothing_and_reaches_nothing() -> None:
    """Looked at from outside, while it computes."""
    before = children()
    secret, other = socket.socketpair()
    high = fcntl.fcntl(secret, fcntl.F_DUPFD, 700)
    engine = Engine()
    os.close(high)
    child = min(children() - before)  # the first of the two, which gets all tables
    agreed = contract([VALUES], FOREVER)

    def compute() -> None:
        with suppress(ProgramRefused):
            engine.compute(agreed, opened, 60)

    with secret, other, files(numbers(1000)) as opened:
        computing = threading.Thread(target=compute)
        computing.start()
        try:
            wait_until(lambda: limits(child)["Max data size"] == str(agreed.enclave.memory_bytes))
            assert limits(child)["Max core file size"] == limits(child)["Max file size"] == "0"
            assert status(child)["NoNewPrivs"] == "1"
            folder = Path(f"/proc/{child}")
            if os.getuid() == 0:
                held = [str(link.readlink()) for link in (folder / "fd").iterdir()]
                sockets = [name for name in held if name.startswith("socket:")]
                assert len(sockets) == 1
                assert sockets != [f"socket:[{os.fstat(secret.fileno()).st_ino}]"]
                assert {name.split(" ")[0] for name in held} - set(sockets) == {"/memfd:nothing", "/memfd:table"}
                assert str((folder / "root").readlink()) == EMPTY
                assert list(Path(EMPTY).iterdir()) == []
                assert status(child)["Uid"].split() == [str(NOBODY)] * 4
                assert int(status(child)["CapEff"], 16) == 0
            else:  # it is not dumpable, so that not even its own user may look
                with pytest.raises(PermissionError):
                    list((folder / "fd").iterdir())
        finally:
            os.kill(child, signal.SIGKILL)
            computing.join()


def limits(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:47].strip() for line in lines}


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "an unknown code": lambda recipients: struct.pack(f">bi{recipients}Q", len(CODES), -1, *[0] * recipients),
    "a table that is not there": lambda recipients: struct.pack(f">bi{recipients}Q", 0, 7, *[0] * recipients),
    "more than memory": lambda recipients: struct.pack(f">bi{recipients}Q", -1, -1, *[1 << 62] * recipients),
    "a little too much": lambda recipients: struct.pack(f">bi{recipients}Q", -1, -1, *[129 << 20] * recipients),
    "less than it says": lambda recipients: struct.pack(f">bi{recipients}Q", -1, -1, *[8] * recipients) + b"12345678",
    "half an answer": lambda recipients: b"\xff\xff",
    "nothing": lambda recipients: b"",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_a_child_that_somebody_took_over(answer: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what it likes; the parent believes no number of it."""

    def taken_over(connection: socket.socket, *, lazy: bool) -> Any:
        try:
            connection.sendall(b"\0" + answer(2))  # as if it had taken the tables
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
        finally:
            os._exit(0)

    monkeypatch.setattr(engine_module, "_child", taken_over)
    agreed = contract([VALUES], "SELECT 1 AS x", recipients=("one", "two"))
    assert refusal(agreed, numbers(3)) == ("engine", None)


@pytest.mark.parametrize("accused", [0, 1])
def test_who_read_all_tables_accuses_nobody_alone(accused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first child is taken over by bob's table and names somebody; the second has seen only that one's table."""
    other = table("others", "bob", EXACT, column("w", "double"))
    agreed = contract([VALUES, other], "SELECT 1 AS x")
    child = engine_module._child

    def taken_over(connection: socket.socket, *, lazy: bool) -> Any:
        if lazy:
            child(connection, lazy=lazy)
        try:
            answer = struct.pack(">biQ", tuple(CODES).index("input"), accused, 0)
            connection.sendall(b"\0" + answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
        finally:
            os._exit(0)

    monkeypatch.setattr(engine_module, "_child", taken_over)
    assert refusal(agreed, numbers(3), b"no Arrow at all") == (("engine", None) if accused == 0 else ("input", 1))
