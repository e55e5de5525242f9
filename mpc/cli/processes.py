"""Child processes of `mpc run`: forked before there is anything secret, ended with their parent."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from mpc.cli.pieces import run_piece

LINE_BYTES_MAX = 1 << 20


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
            data = await stream.receive_some(65536)
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
            self._reap(os.WNOHANG)
        return self.status or 0

    def end(self) -> None:
        """Stop it, for certain."""
        if self.status is None:
            self._kill(signal.SIGKILL)
            self._reap(0)
        self.sock.close()

    def _kill(self, number: int) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid == self.pid:
            self.status = status


def describe_status(status: int) -> str:
    """A waitpid status in words."""
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)} ({signal.Signals(os.WTERMSIG(status)).name})"
    return f"exit status {os.waitstatus_to_exitcode(status)}"


def fork(name: str, piece: str, log: Path, arguments: dict[str, Any]) -> Child:
    """A piece forked from this process, which must hold no secret and run no thread."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _become(theirs, log)
            status = run_piece(piece, theirs, arguments)
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
    with log.open("ab") as out:
        command = [sys.executable, "-m", "mpc.cli.pieces", piece, json.dumps(arguments), str(theirs.fileno())]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    theirs.close()
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
