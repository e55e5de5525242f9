"""The engine: a child process that reads hostile tables and runs the program. It holds no key and reaches nothing.

The parent believes nothing that it says but the bytes of a result, and ends it after one job.
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

from enclave_runtime.programs import CODES, ProgramRefused, open_tables, program, warm
from mpc.protocol.contract import Contract
from mpc.protocol.errors import ContractError

RESULT_BYTES_MAX = 256 << 20  # of all recipients together
FILES_PER_MESSAGE = 200  # the kernel passes at most 253 at once
NOBODY, EMPTY = 65534, "/var/empty"
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38

# Bytes of the contract, tables, which one is meant (-1: all, and the program runs); then the contract, and 8 bytes of
# length for each table.
_JOB = struct.Struct(">IIi")


class Engine:
    """Two processes, forked before there is any secret, in a process of one thread. For one job."""

    def __init__(self) -> None:
        self._all, self._one = _Process(), _Process(lazy=True)

    def compute(self, contract: Contract, tables: Sequence[tuple[int, int]], timeout_s: float) -> dict[str, bytes]:
        """Run the contract's program. Both processes are gone afterwards, whatever came of it.

        Args:    tables: file descriptor of shared memory and bytes in it, in the order of the contract's tables.
        Returns: recipient → result.
        Raises:  ProgramRefused; one that names a table is the word of a process that has seen no other table.
        """
        try:
            return self._all.ask(contract, tables, -1, timeout_s)
        except ProgramRefused as refused:
            index = refused.table_index
            if index is None:
                raise
            # Who has read all tables may be anybody's by now, and accuse anybody: look at the accused one alone.
            self._one.ask(contract, [tables[index]], index, timeout_s)
            raise ProgramRefused("engine") from None
        finally:
            self.close()

    def close(self) -> None:
        """End both, whatever they do; again is nothing."""
        self._all.close()
        self._one.close()


class _Process:
    """The parent's end of one child, which it believes nothing."""

    def __init__(self, *, lazy: bool = False) -> None:
        """`lazy`: it loads nothing before it has a job."""
        self._socket, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            _child(theirs, lazy=lazy)
        theirs.close()

    def ask(
        self, contract: Contract, tables: Sequence[tuple[int, int]], index: int, timeout_s: float
    ) -> dict[str, bytes]:
        """Recipient → result; empty ones when only table `index` is looked at. Raises ProgramRefused."""
        until = time.monotonic() + timeout_s
        encoded, lengths = contract.encode(), [length for _, length in tables]
        try:
            self._socket.settimeout(max(timeout_s, 0.001))
            self._socket.sendall(_JOB.pack(len(encoded), len(tables), index) + encoded)
            self._socket.sendall(struct.pack(f">{len(tables)}Q", *lengths))
            for first in range(0, len(tables), FILES_PER_MESSAGE):
                files = [file for file, _ in tables[first : first + FILES_PER_MESSAGE]]
                socket.send_fds(self._socket, [b"\0"], files)
                _read(self._socket, 1, until)  # taken: the kernel limits how many are under way
            header = _answer(contract)
            code, table, *sizes = header.unpack(_read(self._socket, header.size, until))
            # The child may be anybody's by now: each number is checked before it is used.
            if 0 <= code < len(CODES) and (table == -1 or table in (range(len(tables)) if index < 0 else (index,))):
                raise ProgramRefused(tuple(CODES)[code], None if table == -1 else table)
            if code != -1 or sum(sizes) > RESULT_BYTES_MAX:
                raise ProgramRefused("engine")
            results = zip(contract.recipients, sizes, strict=True)
            return {recipient: bytes(_read(self._socket, size, until)) for recipient, size in results}
        except TimeoutError:
            raise ProgramRefused("time") from None
        except (OSError, EOFError):
            raise ProgramRefused("engine") from None
        finally:
            self.close()

    def close(self) -> None:
        """End the child, whatever it does; again is nothing."""
        self._socket.close()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0


def _answer(contract: Contract) -> struct.Struct:
    """Position in CODES or -1, table or -1, bytes of each recipient's result; then the results."""
    return struct.Struct(f">bi{len(contract.recipients)}Q")


def _read(connection: socket.socket, size: int, until: float | None = None) -> bytearray:
    """Exactly so many bytes. Raises EOFError, TimeoutError."""
    data = bytearray(size)
    place = memoryview(data)
    while place:
        if until is not None:
            connection.settimeout(max(until - time.monotonic(), 0.001))
        count = connection.recv_into(place)
        if count == 0:
            raise EOFError
        place = place[count:]
    return data


def _child(connection: socket.socket, *, lazy: bool) -> NoReturn:
    """One job, one answer, the end. Whatever goes wrong is the end too, without a word."""
    try:
        _lock(connection.fileno())
        if lazy:
            connection.recv(1, socket.MSG_PEEK)
        warm()
        _leave_root()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
        _prctl(PR_SET_DUMPABLE, 0)
        _work(connection)
    finally:
        os._exit(0)


def _work(connection: socket.socket) -> None:
    size, count, index = _JOB.unpack(_read(connection, _JOB.size))
    contract = Contract.decode(bytes(_read(connection, size)))
    lengths = struct.unpack(f">{count}Q", _read(connection, 8 * count))
    buffers: list[mmap.mmap] = []
    while len(buffers) < count:
        for file in socket.recv_fds(connection, 1, FILES_PER_MESSAGE)[1]:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all pages at once
            buffers.append(mmap.mmap(file, lengths[len(buffers)], flags, mmap.PROT_READ))
            os.close(file)
        connection.sendall(b"\0")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    memory = min(contract.enclave.memory_bytes, hard if hard >= 0 else 1 << 62)  # private; tables are the parent's
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        ordered = _run(contract, buffers, index)
    except (ProgramRefused, ContractError) as error:
        refused = error if isinstance(error, ProgramRefused) else ProgramRefused("query")
        table = -1 if refused.table_index is None else refused.table_index
        none = [0] * len(contract.recipients)
        connection.sendall(_answer(contract).pack(tuple(CODES).index(refused.code), table, *none))
        return
    connection.sendall(_answer(contract).pack(-1, -1, *map(len, ordered)))
    for result in ordered:
        connection.sendall(result)


def _run(contract: Contract, buffers: Sequence[mmap.mmap], only: int) -> list[bytes]:
    tables = open_tables(contract, buffers, only)
    if only >= 0:
        return [b""] * len(contract.recipients)
    results = program(contract.program.kind).run(contract, tables)
    if sum(map(len, results.values())) > RESULT_BYTES_MAX:
        raise ProgramRefused("result-size")
    return [results[recipient] for recipient in contract.recipients]


def _lock(kept: int) -> None:
    """No descriptor but one, no writing to files, no core, no new privileges."""
    os.closerange(0, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    nothing = os.memfd_create("nothing")
    for standard in range(3):  # else a table becomes what a library prints into
        os.dup2(nothing, standard)
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    for ignored in (signal.SIGXFSZ, signal.SIGINT):  # to print is no reason to die; the parent decides when
        signal.signal(ignored, signal.SIG_IGN)
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _leave_root() -> None:
    """On Nitro the enclave is root, and /dev/nsm a file: go where there is none, as nobody."""
    if os.getuid() != 0:
        return
    needed = Path("/dev/nsm").exists()
    try:
        Path(EMPTY).mkdir(mode=0o555, parents=True, exist_ok=True)
        os.chroot(EMPTY)
        os.chdir("/")
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    except OSError:  # root without its powers, as in a container
        if needed:
            raise


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
