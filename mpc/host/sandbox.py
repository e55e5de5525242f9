"""One process in bubblewrap: two sockets, an interpreter, a C library, the unpacked image, and nothing else.

The kernel's part is all here: namespaces, mounts, system calls, limits. See docs/decisions/sandbox.md.
"""

import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from mpc.host.launched import EnclaveLost
from mpc.image import standin
from mpc.protocol.errors import LocalError

INSTALL = "install bubblewrap (Debian, Ubuntu: sudo apt install bubblewrap; Fedora: sudo dnf install bubblewrap)"
START_S = 60  # until the application has been imported, on a machine that is very busy
KILLED = "the enclave was killed while it was starting"
LINE_CHARACTERS_MAX = 300  # of the console, in an error
_PIPE_BYTES = 1 << 16
PROCESSES_MAX, DESCRIPTORS_MAX = 512, 4096
_ENCLAVE_UID = "65534"  # inside; outside it is who launches
_CHANNEL, _NSM, _SECCOMP, _GO, _STATUS = 3, 4, 5, 6, 7
# Before this release the number of processes was counted over all of a user's, not in each user namespace.
_COUNTS_PER_NAMESPACE = (5, 14)


@dataclass(frozen=True)
class Limits:
    cpus: list[int]  # numbers of those that it may use
    memory_bytes: int  # private memory of each process, and each file in shared memory


@dataclass(frozen=True)
class Process:
    """A started sandbox; `close` gives its descriptors back."""

    pid: int  # of the enclave's first process, as the host sees it
    launcher: int  # pid of bubblewrap: our child, to be waited for
    enclave: int  # pidfd of `pid`; killing that takes the whole PID namespace with it
    ready: int  # pipe: one byte when the application starts
    console: int  # pipe: what was said until then

    def wait_ready(self) -> None:
        """Raises LocalError, with the console's words, when the application does not start; EnclaveLost without any."""
        if not select.select([self.ready], [], [], START_S)[0]:
            raise LocalError(f"the enclave did not start within {START_S} s{_console(self.console)}")
        if not os.read(self.ready, 1):
            if said := _console(self.console):
                raise LocalError(f"the enclave did not start{said}")
            raise EnclaveLost(KILLED)  # code that lacks something says what

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.enclave, signal.SIGKILL)

    def close(self) -> None:
        for descriptor in (self.enclave, self.ready, self.console):
            os.close(descriptor)


def start(tree: Path, channel: socket.socket, nsm: socket.socket, bpf: bytes, limits: Limits) -> Process:
    """Start bubblewrap, and in it the image that is unpacked in `tree`. It dies with the calling *thread*.

    Raises: LocalError, with bubblewrap's own words, when it cannot make the sandbox; EnclaveLost when it was killed.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise LocalError(f"the local backend needs bubblewrap: {INSTALL}")
    with ExitStack() as ours, ExitStack() as its:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        its.callback(os.close, null)
        filter_ = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        its.callback(os.close, filter_)
        os.write(filter_, bpf)
        os.lseek(filter_, 0, os.SEEK_SET)
        ready, ready_in = _pipe(ours, its)
        console, console_in = _pipe(ours, its)
        status, status_in = _pipe(ours, its)
        go, go_in = os.pipe()
        its.callback(os.close, go)
        ours.callback(os.close, go_in)
        given = {0: null, 1: ready_in, 2: console_in, _CHANNEL: channel.fileno(), _NSM: nsm.fileno()}
        given |= {_SECCOMP: filter_, _GO: go, _STATUS: status_in}
        launcher = _spawn([bwrap, *_arguments(tree)], given)
        its.close()
        try:
            pid = _child(status, console)
            enclave = os.pidfd_open(pid)
            ours.callback(os.close, enclave)
            _limit(pid, limits)
            os.write(go_in, b"\n")
        except BaseException as error:
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            if isinstance(error, ProcessLookupError | BrokenPipeError):
                raise EnclaveLost(KILLED) from None
            raise
        return Process(pid, launcher, os.dup(enclave), os.dup(ready), os.dup(console))


def _pipe(ours: ExitStack, its: ExitStack) -> tuple[int, int]:
    """We read, it writes."""
    out, into = os.pipe()
    ours.callback(os.close, out)
    its.callback(os.close, into)
    return out, into


def _arguments(tree: Path) -> list[str]:
    """What bubblewrap is told. Its root is a tmpfs of mount points and links, made read-only."""
    application, init = f"/{standin.APPLICATION_FOLDER}", f"/{standin.INIT}"
    found = standin.interpreter()
    # A program that is linked to libpython by a path, or through a link, must find it at that name.
    library = ["--setenv", "LD_LIBRARY_PATH", str(found.library.parent)] if found.library else []
    return [
        *("--unshare-all", "--unshare-user", "--disable-userns", "--uid", _ENCLAVE_UID, "--gid", _ENCLAVE_UID),
        *("--hostname", "enclave", "--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL"),
        *("--clearenv", *library, *_mounts(found)),
        *("--ro-bind", f"{tree}{application}", application, "--ro-bind", f"{tree}{init}", init),
        *("--remount-ro", "/", "--chdir", "/"),
        *("--seccomp", str(_SECCOMP), "--block-fd", str(_GO), "--json-status-fd", str(_STATUS)),
        *("--", str(found.executable), "-I", "-B", "-S", init),
    ]


def _mounts(found: standin.Interpreter) -> list[str]:
    """Interpreter and C library, each at its own path, without any installed package."""
    folders = [found.standard_library, *_library_folders(found)]
    files = {found.executable: found.executable} | ({found.library: found.library} if found.library else {})
    files[found.loader.parent.resolve() / found.loader.name] = found.loader.resolve()
    shown = []
    for folder in sorted(folders):
        shown += ["--ro-bind", str(folder), str(folder)]
    for place, source in files.items():
        if not any(place.is_relative_to(folder) for folder in folders):
            shown += ["--ro-bind", str(source), str(place)]
    for name in standin.HIDDEN:
        if (hidden := found.standard_library / name).is_dir():
            shown += ["--tmpfs", str(hidden), "--remount-ro", str(hidden)]
    for link in (Path("/lib"), Path("/lib64")):  # systems with a merged /usr
        if link.is_symlink():
            shown += ["--symlink", str(link.readlink()), str(link)]
    return shown


def _library_folders(found: standin.Interpreter) -> list[Path]:
    """Where the C library is, and what the interpreter's own modules are linked to."""
    folder = found.c_library.parent
    other = Path("/") / folder.relative_to("/usr") if folder.is_relative_to("/usr") else Path(f"/usr{folder}")
    folders = [folder, other] if other.is_dir() and other.resolve() != folder else [folder]
    # An interpreter with a prefix of its own (pyenv's, conda's) brings libraries along.
    own = found.executable.parent.parent / "lib"
    return folders if own in (Path("/lib"), Path("/usr/lib"), Path("/usr/local/lib")) else [own, *folders]


def _spawn(command: list[str], given: Mapping[int, int]) -> int:
    """Start a program with exactly these descriptors (number there → number here) and no environment."""
    copies = {there: fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, 64) for there, here in given.items()}
    try:
        actions: list[tuple[int, ...]] = [(os.POSIX_SPAWN_DUP2, copy, there) for there, copy in copies.items()]
        for entry in Path("/proc/self/fd").iterdir():
            number = int(entry.name)
            with suppress(OSError):  # the one that listed the folder is closed by now
                if number not in given and os.get_inheritable(number):
                    actions.append((os.POSIX_SPAWN_CLOSE, number))
        reset = [signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ]
        return os.posix_spawn(
            command[0], command, {}, file_actions=actions, setpgroup=0, setsigmask=[], setsigdef=reset
        )
    finally:
        for copy in copies.values():
            os.close(copy)


def _child(status: int, console: int) -> int:
    """The pid that bubblewrap tells. It then makes the mounts and waits for us."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([status], [], [], START_S)[0] or not (part := os.read(status, 4096)):
            raise LocalError(f"bubblewrap cannot make the sandbox{_console(console)}")
        line += part
    return int(json.loads(line)["child-pid"])


def _console(console: int) -> str:
    """The last line of what was said: bubblewrap's complaint, or the end of a traceback."""
    if not select.select([console], [], [], 0)[0]:
        return ""
    lines = os.read(console, _PIPE_BYTES).decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:LINE_CHARACTERS_MAX]}" if lines else ""


def _limit(pid: int, limits: Limits) -> None:
    """Set on the waiting process; all that it starts inherits them, and no call that undoes them is allowed."""
    for which, limit in {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: limits.memory_bytes,  # of one process: private and writable, touched or not
        resource.RLIMIT_FSIZE: limits.memory_bytes,  # of one table, in anonymous shared memory
        resource.RLIMIT_NOFILE: DESCRIPTORS_MAX,
        **({resource.RLIMIT_NPROC: PROCESSES_MAX} if counts_processes() else {}),
    }.items():
        resource.prlimit(pid, which, (limit, limit))
    os.sched_setaffinity(pid, limits.cpus)


def counts_processes() -> bool:
    """Whether this kernel holds the enclave to a number of processes: not when root launches it."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return os.geteuid() != 0 and release >= _COUNTS_PER_NAMESPACE
