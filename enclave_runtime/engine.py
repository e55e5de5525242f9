"""The engine: a child process that opens the tables and runs the program. It holds no key and reaches no channel.

Forked before there is any secret, with one socket to its parent; tables come as shared memory.
"""

import ctypes
import mmap
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from enclave_runtime.programs import ProgramRefused, open_tables, preload, program
from mpc.protocol.contract import Contract
from mpc.protocol.encoding import decode, encode

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
RESULT_BYTES_MAX = 1 << 30  # of all recipients together
_LENGTH = struct.Struct(">Q")
_FILES_A_MESSAGE = 200  # the kernel's limit is 253
_NOBODY, _EMPTY = 65534, "/var/empty"


class Engine:
    """One child, one job."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(theirs)
        theirs.close()

    def compute(self, contract: Contract, tables: Sequence[tuple[int, int]], seconds: float) -> dict[str, bytes]:
        """Args: tables: (memory file, length in bytes), in the contract's order. Returns: recipient → result.

        Raises:  ProgramRefused. The child is gone afterwards, whatever came of it.
        """
        try:
            self._socket.settimeout(max(seconds, 0.001))
            _send(self._socket, encode({"contract": contract.encode(), "lengths": [length for _, length in tables]}))
            for start in range(0, len(tables), _FILES_A_MESSAGE):
                socket.send_fds(self._socket, [b"-"], [file for file, _ in tables[start : start + _FILES_A_MESSAGE]])
            until = time.monotonic() + seconds
            answer = decode(bytes(_receive(self._socket, 1 << 20, until)))
            if answer["refused"] is not None:
                raise ProgramRefused(*answer["refused"])
            return {name: bytes(_receive(self._socket, RESULT_BYTES_MAX, until)) for name in contract.recipients}
        except TimeoutError:
            raise ProgramRefused("time") from None
        except (EOFError, OSError):
            raise ProgramRefused("engine") from None
        finally:
            self.close()

    def close(self) -> None:
        """Kill the child; again is nothing."""
        if self._pid:
            self._socket.close()
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(_LENGTH.pack(len(data)))
    sock.sendall(data)


def _receive(sock: socket.socket, most: int, until: float | None = None) -> bytearray:
    """One message. Raises EOFError when the other end is gone or says too much, TimeoutError."""
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size, until))
    if length > most:
        raise EOFError
    return _exactly(sock, length, until)


def _exactly(sock: socket.socket, count: int, until: float | None) -> bytearray:
    data = bytearray(count)
    place = memoryview(data)
    while place:
        if until is not None:
            sock.settimeout(max(until - time.monotonic(), 0.001))
        got = sock.recv_into(place)
        if got == 0:
            raise EOFError
        place = place[got:]
    return data


def _serve(sock: socket.socket) -> NoReturn:
    """The child: one job, one answer, the end. Whatever goes wrong is its end, without a word."""
    try:
        _confine(sock.fileno())
        preload()
        _leave_the_system()
        job = decode(bytes(_receive(sock, 1 << 23)))
        contract = Contract.decode(job["contract"])
        files: list[int] = []
        while len(files) < len(job["lengths"]):
            files += socket.recv_fds(sock, 1, _FILES_A_MESSAGE)[1]
        most = contract.enclave.memory_bytes  # private memory; the tables are the parent's
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        maps = [mmap.mmap(file, 0, prot=mmap.PROT_READ) for file in files]
        try:
            tables = open_tables(contract, [memoryview(m)[:n] for m, n in zip(maps, job["lengths"], strict=True)])
            results = program(contract.program.kind).run(contract, tables)
        except ProgramRefused as refusal:
            _send(sock, encode({"refused": [refusal.code, refusal.table_index]}))
        else:
            if sum(map(len, results.values())) > RESULT_BYTES_MAX:
                _send(sock, encode({"refused": ["result-size", None]}))
            else:
                _send(sock, encode({"refused": None}))
                for name in contract.recipients:
                    _send(sock, results[name])
    finally:
        os._exit(0)


def _confine(own: int) -> None:
    """No descriptor but the one socket; no core, no reader of its memory, no life without the parent."""
    os.closerange(3, own)
    os.closerange(own + 1, os.sysconf("SC_OPEN_MAX"))
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _leave_the_system() -> None:
    """In a machine of its own it is root, and /dev/nsm a file that it could open: leave both behind."""
    if Path("/dev/nsm").exists():
        Path(_EMPTY).mkdir(parents=True, exist_ok=True)
        os.chroot(_EMPTY)
        os.chdir("/")
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
