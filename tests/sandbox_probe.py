"""The application of the test image: tries, inside the sandbox, what no enclave may do, and reports by the channel."""

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

CHANNEL_FD, NSM_FD = 3, 4
PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_CAPBSET_READ, PR_GET_NO_NEW_PRIVS = 4, 21, 23, 39
CAPABILITIES = 41
CLONE_FLAGS = {
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
TOLD = json.loads(Path("/app/enclave_runtime/told.json").read_text())
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def main() -> None:
    channel, nsm = socket.socket(fileno=CHANNEL_FD), socket.socket(fileno=NSM_FD)
    open_at_start = _descriptors()
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    report = {
        "descriptors": open_at_start,
        "environment": dict(os.environ),
        "argv": sys.argv,
        "path": sys.path,
        "root": sorted(path.name for path in Path("/").iterdir()),
        "pid": os.getpid(),
        "uid": os.getuid(),
        "cpus": len(os.sched_getaffinity(0)),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_CORE", "RLIMIT_NOFILE")},
        "no_new_privileges": LIBC.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
        "seccomp": LIBC.prctl(PR_GET_SECCOMP, 0, 0, 0, 0),
        "capabilities": [n for n in range(CAPABILITIES) if LIBC.prctl(PR_CAPBSET_READ, n, 0, 0, 0)],
        "calls": {name: _call(number) for name, number in TOLD["refused_calls"].items()},
        "succeeded": _attempts(),
        "by_condition": _conditional(),
        "written": _writable("/"),
        "other_abi": _in_child(lambda: LIBC.syscall(TOLD["other_abi_getpid"])) if TOLD["other_abi_getpid"] else None,
        "memory": _too_much(TOLD["memory_bytes"]),
        "processes": _many_processes(TOLD["processes"]),
        "document": _ask(
            nsm,
            bytes.fromhex("a16b4174746573746174696f6ea369757365725f64617461f6656e6f6e6365f66a7075626c69635f6b6579f6"),
        ),
        "canary": TOLD["canary"] * 2,  # somewhere in this process's memory, to be looked for from outside
    }
    channel.sendall(json.dumps(report).encode() + b"\n")
    print("an error that quotes data")  # the console is closed: it must not arrive
    os.write(2, b"an error that quotes data")
    while True:  # it does not end by itself
        signal.pause()


def _call(number: int) -> int:
    """errno of a call with arguments that no call likes; 0 when it went through."""
    ctypes.set_errno(0)
    bad = ctypes.c_long(-1)
    return ctypes.get_errno() if LIBC.syscall(number, bad, bad, bad, bad, bad, bad) == -1 else 0


def _attempts() -> list[str]:
    """Of all that must fail, what did not."""
    tries: dict[str, Callable[[], object]] = {
        f"socket of family {family}, type {kind}": partial(socket.socket, family, kind)
        for family in range(46)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW)
    }
    tries |= {f"read {path}": partial(os.stat, path) for path in TOLD["host_paths"]}
    tries |= {f"import {name}": partial(__import__, name) for name in TOLD["host_modules"]}
    tries |= {
        "listen on the channel": lambda: socket.socket(fileno=os.dup(CHANNEL_FD)).listen(),
        "reach a host's abstract socket": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(
            b"x", f"\0{TOLD['abstract']}"
        ),
        "connect": lambda: socket.socketpair()[0].connect("/run/x"),
        "another program": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
        "another program, from a child": lambda: _need(_in_child(lambda: os.execv(sys.executable, ["x"])) == 0),
        "a higher limit": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)),
        "other CPUs": lambda: os.sched_setaffinity(0, range(64)),
        "a signal to the host": lambda: os.kill(TOLD["host_pid"], 0),
        "trace a child": lambda: _raw("ptrace", 16, _child(), 0, 0),  # PTRACE_ATTACH
        "become root": lambda: os.setuid(0),
    }
    return [name for name, attempt in tries.items() if not _fails(attempt)]


def _conditional() -> dict[str, int]:
    """errno of calls that are allowed with other arguments: these must not even reach the kernel."""
    calls = {
        "socketpair of AF_INET": partial(_raw, "socketpair", socket.AF_INET, socket.SOCK_STREAM, 0, 0),
        "the limits of another process": partial(_raw, "prlimit64", _child(), 7, 0, 0),
        "a terminal's input": partial(_raw, "ioctl", 0, 0x5412, 0),  # TIOCSTI
    } | {
        f"clone of a new {name} namespace": partial(_raw, "clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
        for name, flag in CLONE_FLAGS.items()
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = 0
        except OSError as error:
            found[name] = error.errno or 0
    return found


def _fails(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, ValueError, ImportError):
        return True
    return False


def _raw(name: str, *arguments: int) -> None:
    if LIBC.syscall(TOLD["numbers"][name], *map(ctypes.c_long, arguments)) == -1:
        raise OSError(ctypes.get_errno(), name)


def _child() -> int:
    """One that does nothing, until the namespace ends."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    return pid


def _need(held: bool) -> None:
    if not held:
        raise OSError(errno.EPERM, "it did not")


def _writable(top: str) -> list[str]:
    """Every folder and, of each, one file, in which something could be made, opened for writing, or changed."""
    found = []
    for folder, _, files in os.walk(top):
        new = f"{folder}/new"
        attempts: list[tuple[str, Callable[[], object]]] = [
            (folder, partial(os.open, new, os.O_CREAT | os.O_WRONLY)),
            (folder, partial(os.open, folder, os.O_TMPFILE | os.O_WRONLY)),
            (folder, partial(os.mkdir, new)),
            (folder, partial(os.symlink, "x", new)),
            (folder, partial(os.chmod, folder, 0o777)),
        ]
        for path in (f"{folder}/{name}" for name in files[:1]):
            attempts.append((path, partial(os.open, path, os.O_WRONLY)))
            attempts += [(path, partial(change, path)) for change in (os.unlink, os.utime)]
            attempts.append((path, partial(os.truncate, path, 0)))
        found += [path for path, attempt in attempts if not _fails(attempt)]
    return found


def _descriptors() -> dict[int, str]:
    found = {}
    for number in range(256):
        try:
            mode = os.fstat(number).st_mode
        except OSError:
            continue
        null = stat.S_ISCHR(mode) and os.fstat(number).st_rdev == os.makedev(1, 3)
        found[number] = "null" if null else "socket" if stat.S_ISSOCK(mode) else "other"
    return found


def _in_child(what: Callable[[], object]) -> int:
    """The signal that killed a child which does that, or its exit status negated."""
    pid = os.fork()
    if pid == 0:
        try:
            what()
        except OSError:
            os._exit(7)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.waitstatus_to_exitcode(status)


def _too_much(limit: int) -> dict[str, bool]:
    """Whether more private memory, or a larger table, than the limit is refused."""
    table = os.memfd_create("table")
    try:
        private = _fails(lambda: mmap.mmap(-1, limit, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return {"private": private, "table": _fails(lambda: os.ftruncate(table, limit + 1))}
    finally:
        os.close(table)


def _many_processes(limit: int) -> int:
    """How many children can live at once, up to one more than the limit."""
    children: list[int] = []
    try:
        while len(children) <= limit:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except OSError:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)


def _ask(nsm: socket.socket, request: bytes) -> str:
    nsm.send(request)
    return nsm.recv(0x3000).hex()
