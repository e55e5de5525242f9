"""Launches the probe in the local backend, as whoever runs this, and prints what it and we saw as one JSON document."""

import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pyseccomp

from mpc.host import local, sandbox, seccomp
from mpc.host.simulated_nsm import SimulatedRoot
from mpc.image import build, cache

HERE = Path(__file__).parent
CPUS, MEMORY_BYTES = 1, 96 << 20
CANARY = "canary of the enclave's memory, "
CONDITIONAL = {"clone", "ioctl", "prlimit64", "socketpair"}  # allowed for some arguments
HOST_PATHS = ["/etc/passwd", "/etc", "/home", "/proc", "/proc/self", "/sys", "/dev", "/dev/null", "/tmp", "/run", "/var"]
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


def told(work: Path) -> dict[str, Any]:
    """What the probe needs to know to try everything."""
    native = pyseccomp.Arch.NATIVE
    numbers = {}
    for number in range(600):
        try:
            numbers[pyseccomp.resolve_syscall(native, number).decode()] = number
        except ValueError:
            continue
    refused = {name: number for name, number in numbers.items() if name not in {*seccomp.ALLOWED, *CONDITIONAL}}
    return {
        "refused_calls": refused,
        "numbers": numbers,
        "other_abi_getpid": 0x40000000 | 39 if os.uname().machine == "x86_64" else 0,  # x32
        "host_paths": [*HOST_PATHS, str(work), str(HERE), sys.prefix],
        "host_modules": ["trio", "pytest", "mpc", "site", "msgspec"][:3],
        "host_pid": os.getpid(),
        "memory_bytes": MEMORY_BYTES,
        "processes": sandbox.PROCESSES_MAX,
        "canary": CANARY,
    }


def image(work: Path) -> Path:
    """An image whose application is the probe: made by the builder's inner function, which no option reaches."""
    path = work / "probe.eif"
    files = {
        "enclave_runtime/__init__.py": b"",
        "enclave_runtime/__main__.py": (HERE / "sandbox_probe.py").read_bytes(),
        "enclave_runtime/told.json": json.dumps(told(work)).encode(),
    }
    build.write_image(files, path, build.Boot.local(), title="probe")
    return path


def launch(path: Path, work: Path) -> local.Launched:
    """From a thread that ends at once, with a descriptor and a variable that must not get in."""
    found: list[local.Launched] = []
    root = SimulatedRoot.load_or_create(work)
    os.environ["CANARY"] = CANARY
    os.set_inheritable(os.open(path, os.O_RDONLY), True)
    arguments = {"cpus": CPUS, "memory_bytes": MEMORY_BYTES, "root": root}
    thread = threading.Thread(target=lambda: found.append(local.launch(path, **arguments)))
    thread.start()
    thread.join()
    return found[0]


def read_line(channel: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = channel.recv(1 << 16)
        if not part:
            break
        line += part
    return line


def readable(pid: int) -> dict[str, bool]:
    """Whether this process can read that one's memory: the canary through /proc, and by the two calls."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = libc.ptrace.restype = ctypes.c_long
    found = {"proc": False, "process_vm_readv": False, "ptrace": False}
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except OSError:
        lines = []
    for line in lines:
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if "rw" in line and last - first < 1 << 26:
            try:
                found["proc"] = found["proc"] or (CANARY * 2).encode() in os.pread(memory, last - first, first)
            except OSError:
                continue
    if libc.ptrace(0x4206, pid, 0, 0) == 0:  # PTRACE_SEIZE
        found["ptrace"] = True
    place = ctypes.create_string_buffer(8)
    ours, theirs = (ctypes.c_ulong * 2)(ctypes.addressof(place), 8), (ctypes.c_ulong * 2)(0, 8)
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "process_vm_readv")
    libc.syscall(number, pid, ours, 1, theirs, 1, 0)
    found["process_vm_readv"] = ctypes.get_errno() != 1  # EFAULT of address 0, when not EPERM
    return found


def in_other_user(pid: int) -> dict[str, bool]:
    """The same, by a child that is another normal user (only root can make one)."""
    out, into = os.pipe()
    if os.fork() == 0:
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
        os.write(into, json.dumps(readable(pid)).encode())
        os._exit(0)
    return json.loads(os.read(out, 1000))


def main() -> None:
    work = Path(tempfile.mkdtemp())
    path = image(work)
    launched = launch(path, work)
    pid = launched.pid
    report = {
        "inside": json.loads(read_line(launched.channel)),
        "described": launched.describe(),
        "status": dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()),
        "shared_namespaces": [
            kind for kind in NAMESPACES if os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino
        ],
        "readable_by_launcher": readable(pid),
        "readable_by_others": in_other_user(pid) if os.geteuid() == 0 else None,
        "limitations": local.limitations(),
        "counts_processes": sandbox.counts_processes(),
        "unpacked": len(list((cache.folder() / "running").iterdir())),
    }
    launched.terminate()
    launched.terminate()
    report["alive_after"] = Path(f"/proc/{pid}").exists()
    report["children_after"] = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    report["left_after"] = [str(path) for path in (cache.folder() / "running").iterdir()]
    report["state_after"] = launched.describe()["State"]

    # A launcher that is killed: its enclave dies with it, and the next launch removes what it unpacked.
    out, into = os.pipe()
    victim = os.fork()
    if victim == 0:
        second = launch(path, work)
        os.write(into, str(second.pid).encode())
        signal.pause()
    second_pid = int(os.read(out, 100))
    pidfd = os.pidfd_open(second_pid)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    import select

    report["dies_with_launcher"] = bool(select.select([pidfd], [], [], 10)[0])
    report["left_by_killed"] = len(list((cache.folder() / "running").iterdir()))
    launch(path, work).terminate()
    report["left_after_next"] = len(list((cache.folder() / "running").iterdir()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
