"""Launches the probe in the local backend, as whoever runs this, and prints what it and we saw as one JSON document."""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyseccomp

from mpc.host import local, sandbox, seccomp
from mpc.host.simulated_nsm import SimulatedRoot
from mpc.image import build, cache, standin

HERE = Path(__file__).parent
CPUS, MEMORY_BYTES = 1, 96 << 20
CANARY = "canary of the enclave's memory, "
ABSTRACT = f"a socket of the host, {os.getpid()}"  # which is in its network namespace, not in the file system
CONDITIONAL = {"clone", "ioctl", "prlimit64", "socketpair"}  # allowed for some arguments
HOST_PATHS = [
    "/etc/passwd",
    "/etc",
    "/home",
    "/proc",
    "/proc/self",
    "/sys",
    "/dev",
    "/dev/null",
    "/tmp",
    "/run",
    "/var",
]
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


def told(work: Path) -> dict[str, Any]:
    """What the probe needs to know to try everything."""
    native = pyseccomp.Arch.NATIVE
    found = standin.interpreter().standard_library
    packages = [str(path) for name in standin.HIDDEN if (found / name).is_dir() for path in (found / name).iterdir()]
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
        "host_paths": [*HOST_PATHS, str(work), str(HERE), sys.prefix, *packages],
        "host_modules": ["trio", "pytest", "mpc"],
        "host_pid": os.getpid(),
        "memory_bytes": MEMORY_BYTES,
        "processes": sandbox.PROCESSES_MAX,
        "canary": CANARY,
        "abstract": ABSTRACT,
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
    os.dup2(os.open(path, os.O_RDONLY), 50, inheritable=True)

    def run() -> None:
        found.append(local.launch(path, cpus=CPUS, memory_bytes=MEMORY_BYTES, root=root))

    thread = threading.Thread(target=run)
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


def writable_address(pid: int) -> int:
    """Of some private memory of that process, as far as we may know."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(int(line.split("-")[0], 16) for line in lines if " rw" in line)


def readable(pid: int, address: int) -> dict[str, bool]:
    """How this process can reach into that one: its memory through /proc (the canary) and by two calls, its open
    descriptors, which may be taken over, and its environment."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = libc.ptrace.restype = ctypes.c_long
    found = dict.fromkeys(("proc", "process_vm_readv", "ptrace", "descriptors", "pidfd_getfd", "environ"), False)
    with suppress(OSError):
        found["descriptors"] = bool(list(Path(f"/proc/{pid}/fd").iterdir()))
    with suppress(OSError):
        Path(f"/proc/{pid}/environ").read_bytes()
        found["environ"] = True
    pidfd = os.pidfd_open(pid)
    getfd = ctypes.c_long(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "pidfd_getfd"))
    found["pidfd_getfd"] = libc.syscall(getfd, ctypes.c_long(pidfd), ctypes.c_long(3), ctypes.c_long(0)) >= 0
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
    ours, theirs = (ctypes.c_ulong * 2)(ctypes.addressof(place), 8), (ctypes.c_ulong * 2)(address, 8)
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "process_vm_readv")
    one = ctypes.c_ulong(1)
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(pid), ours, one, theirs, one, ctypes.c_ulong(0)) == 8:
        found["process_vm_readv"] = True
    return found


def by_child(pid: int, address: int, uid: int | None = None) -> dict[str, bool]:
    """`readable`, asked by a child that is perhaps another user, and lets go of what it traces when it ends."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        os.write(into, json.dumps(readable(pid, address)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    answer: dict[str, bool] = json.loads(os.read(out, 1000))
    return answer


def main() -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(f"\0{ABSTRACT}")
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as sender:
        sender.sendto(b"heard", f"\0{ABSTRACT}")  # out here it can be reached
    work = Path(tempfile.mkdtemp())
    path = image(work)
    launched = launch(path, work)
    pid = launched.pid
    inside = json.loads(read_line(launched.channel))
    address = writable_address(pid)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    report = {
        "inside": inside,
        "described": launched.describe(),
        "status": status,
        "shared_namespaces": [
            kind
            for kind in NAMESPACES
            if Path(f"/proc/{pid}/ns/{kind}").stat().st_ino == Path(f"/proc/self/ns/{kind}").stat().st_ino
        ],
        "readable_by_launcher": by_child(pid, address),
        "readable_by_others": by_child(pid, address, uid=12345) if os.geteuid() == 0 else None,
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
        read_line(second.channel)  # it does not end for want of a reader
        os.write(into, str(second.pid).encode())
        signal.pause()
    second_pid = int(os.read(out, 100))
    pidfd = os.pidfd_open(second_pid)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)

    report["dies_with_launcher"] = bool(select.select([pidfd], [], [], 10)[0])
    report["left_by_killed"] = len(list((cache.folder() / "running").iterdir()))
    launch(path, work).terminate()
    report["left_after_next"] = len(list((cache.folder() / "running").iterdir()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
