"""Child processes of `mpc run`: forked before there is anything secret, ended with their parent."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from mpc.cli.pieces import run_piece

LINE_BYTES_MAX = 1 << 20
TIDY_S = 2.0  # for a host to remove what it unpacked


@dataclass
class Child:
    """One piece, as its parent sees it."""

    name: str
    piece: str
    arguments: dict[str, Any]
    pid: int
    sock: socket.socket
    status: int | None = None  # as of waitpid, once it has ended

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """What it reports, until it closes its end."""
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self.sock))
        buffer = b""
        while True:
            try:
                data = await stream.receive_some(65536)
            except trio.BrokenResourceError:
                continue  # it ended without reading our last word; what it said itself still comes
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            if len(buffer) > LINE_BYTES_MAX:
                return
            for line in lines:
                yield json.loads(line)

    def tell(self, answer: dict[str, Any]) -> None:
        """One line to it; nothing when it is gone."""
        try:
            self.sock.send(json.dumps(answer).encode() + b"\n")
        except OSError:
            return

    async def ended(self) -> int:
        """Wait for its end and give its status, as of waitpid."""
        if self.status is None:
            file = os.pidfd_open(self.pid)
            try:
                await trio.lowlevel.wait_readable(file)
            finally:
                os.close(file)
            self._reap()
        return self.status or 0

    def kill(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float) -> None:
        """For its end, at most so long; then it is killed."""
        if self.status is None:
            file = os.pidfd_open(self.pid)
            try:
                if not select.select([file], [], [], max(seconds, 0))[0]:
                    self.kill(signal.SIGKILL)
            finally:
                os.close(file)
            self._reap()
        self.sock.close()

    def _reap(self) -> None:
        _, self.status = os.waitpid(self.pid, 0)


def end(children: Iterable[Child]) -> None:
    """Stop them all, for certain."""
    children = list(children)
    until = time.monotonic() + TIDY_S
    for child in children:
        child.kill(signal.SIGTERM if child.piece == "host" else signal.SIGKILL)
    for child in children:
        child.wait(until - time.monotonic())


def describe_status(status: int) -> str:
    """A waitpid status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit status {os.waitstatus_to_exitcode(status)}"


def fork(name: str, piece: str, log: Path, arguments: dict[str, Any]) -> Child:
    """A piece forked from this process, which must hold no secret and run no thread."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _become(theirs, log)
            status = run_piece(piece, theirs, arguments, parent)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    theirs.close()
    return Child(name, piece, arguments, pid, ours)


def start(name: str, piece: str, log: Path, arguments: dict[str, Any]) -> Child:
    """The same piece in a new interpreter, for a restart."""
    ours, theirs = socket.socketpair()
    with log.open("ab") as out, theirs:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mpc.cli.pieces",
                piece,
                json.dumps(arguments),
                f"{theirs.fileno()}",
                f"{os.getpid()}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return Child(name, piece, arguments, process.pid, ours)


def _become(own: socket.socket, log: Path) -> None:
    """In a forked child: a session of its own, its own log, none of the parent's descriptors."""
    os.setsid()
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    for file in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if file > 2 and file != own.fileno():
            with contextlib.suppress(OSError):
                os.close(file)
