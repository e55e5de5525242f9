"""The `local` backend: an enclave is a process in a sandbox on this machine, and its NSM is simulated.

Isolation is real, attestation is not: the root of trust is a key of this machine. `limitations` says the rest.
"""

import fcntl
import os
import pwd
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mpc.host import launched, sandbox, seccomp
from mpc.host.simulated_nsm import SimulatedNsm, SimulatedRoot
from mpc.image import cache, cpio, eif, standin
from mpc.image.eif import Image, ImageError, Kind, Section
from mpc.image.measure import Measurements
from mpc.protocol.errors import LocalError

_END_S = 10  # until the kernel has taken a killed enclave's memory back
_COPY_BYTES = 1 << 24  # at a time
_AGAIN = "build one here (mpc image build), or run it on the backend that it is for"


class Launched(launched.Launched):
    """A running enclave. Its processes and its unpacked image go when it is terminated."""

    def __init__(self, keeper: "_Keeper", process: sandbox.Process, undo: ExitStack) -> None:
        super().__init__(keeper.channel, keeper.measured.result(), undo)
        self.pid, self._keeper = process.pid, keeper

    def describe(self) -> dict[str, Any]:
        """As nitro-cli does; the flag is ours."""
        return {
            "EnclaveID": self._keeper.module_id,
            "ProcessID": self.pid,
            "NumberOfCPUs": len(self._keeper.limits.cpus),
            "MemoryMiB": self._keeper.limits.memory_bytes >> 20,
            "State": "RUNNING" if self._keeper.is_alive() else "TERMINATED",
            "Flags": "SIMULATED",
            "Measurements": {"HashAlgorithm": "Sha384 { ... }", **self.measurements.shown()},
        }


def launch(path: Path, *, cpus: int, memory_bytes: int, root: SimulatedRoot) -> Launched:
    """Measure, unpack and start an image; its NSM signs under `root`. Returns when its application starts.

    Args: cpus: at most; a machine with fewer gives what it has. memory_bytes: private memory of each process of the
        enclave, and each of its tables in shared memory.
    Raises: ImageError when the file is no image for this backend; LocalError when this machine lacks something;
        EnclaveLost when it died while it was starting.
    """
    with eif.opened(path) as image, ThreadPoolExecutor(2) as pool, ExitStack() as undo:
        ramdisks = _check(image)
        measured = pool.submit(cache.measured, image)
        bpf = pool.submit(seccomp.program)
        folder = undo.enter_context(_private_folder())
        for ramdisk in ramdisks:
            _unpack(image, ramdisk, folder)
        limits = sandbox.Limits(sorted(os.sched_getaffinity(0))[:cpus], memory_bytes)
        keeper = _Keeper(folder, bpf.result(), limits, measured, root)
        undo.callback(keeper.end)
        keeper.start()
        process = keeper.started.result()
        measured.result()
        process.wait_ready()
        return Launched(keeper, process, undo.pop_all())


class _Keeper(threading.Thread):
    """Starts the sandbox, is its NSM, and waits for it: bubblewrap dies with the thread that started it."""

    def __init__(
        self, folder: Path, bpf: bytes, limits: sandbox.Limits, measured: "Future[Measurements]", root: SimulatedRoot
    ) -> None:
        super().__init__(name="enclave", daemon=True)
        self.measured, self.limits, self.module_id = measured, limits, ""
        self.started: Future[sandbox.Process] = Future()
        self.channel, self._its_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._nsm, self._its_nsm = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._folder, self._bpf, self._root = folder, bpf, root

    def run(self) -> None:
        with self._nsm:
            try:
                with self._its_channel as channel, self._its_nsm as nsm:
                    process = sandbox.start(self._folder, channel, nsm, self._bpf, self.limits)
            except BaseException as error:
                self.started.set_exception(error)
                return
            self.started.set_result(process)
            try:
                simulated = SimulatedNsm(self._root, self.measured.result().pcrs)
                self.module_id = simulated.module_id
                simulated.serve(self._nsm)
            except LocalError:  # `launch` raises it
                process.kill()
            os.waitpid(process.launcher, 0)

    def end(self) -> None:
        self.channel.close()
        if self.ident is None or self.started.exception() is not None:
            return
        process = self.started.result()
        process.kill()
        self.join(_END_S)
        process.close()


def _check(image: Image) -> list[Section]:
    """Bootstrap and application ramdisk, of an image whose stand-ins describe this very machine."""
    ramdisks = list(image.of(Kind.RAMDISK))
    if image.read(image.of(Kind.CMDLINE)[0]) != standin.CMDLINE or len(ramdisks) != 2:
        raise ImageError(f"{image.path}: not an image for the local backend; {_AGAIN}")
    kernel, bootstrap = standin.sections(cache.description())
    expected = dict(cpio.contents(bootstrap))[standin.INTERPRETER]
    found = image.of(Kind.KERNEL)[0]
    described = found.size == len(kernel) and image.read(found) == kernel
    read = image.reader(ramdisks[0])
    names = []
    for entry in cpio.entries(read, ramdisks[0].size):
        names.append(entry.name)
        if entry.name == standin.INTERPRETER and read(entry.offset, len(expected) + 1)[: entry.size] != expected:
            described = False
    if names != sorted([standin.INIT, standin.INTERPRETER]):
        raise ImageError(f"{image.path}: its bootstrap ramdisk is not one for the local backend; {_AGAIN}")
    if not described:
        raise ImageError(
            f"{image.path}: it was built for another interpreter or C library than this machine's; {_AGAIN}"
        )
    return ramdisks


def _unpack(image: Image, ramdisk: Section, folder: Path) -> None:
    """Write a ramdisk's files below `folder`, by the kernel from file to file. Names are relative and plain."""
    source = image.file.fileno()
    for entry in cpio.entries(image.reader(ramdisk), ramdisk.size):
        path = f"{folder}/{entry.name}"
        if entry.folder:
            os.mkdir(path, 0o755)  # noqa: PTH102 - as below, strings of our own
            continue
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            done = 0
            while done < entry.size:
                count = min(entry.size - done, _COPY_BYTES)
                sent = os.sendfile(target, source, ramdisk.offset + entry.offset + done, count)
                if sent == 0:
                    raise ImageError(f"{image.path}: the file was cut while it was read")
                done += sent
        except OSError as error:
            raise LocalError(f"{path}: cannot be written ({error.strerror})") from None
        finally:
            os.close(target)


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A new folder, removed at the end, or by the next launch if this process is killed before."""
    place = cache.folder() / "running"
    place.mkdir(mode=0o700, exist_ok=True)
    for left in place.iterdir():
        with _held(left) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(dir=place))
        with _held(folder) as held:
            if held and folder.exists():  # else another process took it for one that was left
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds that folder; meanwhile we do. The kernel lets go for a process that dies."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def limitations() -> list[str]:
    """What a local enclave on this machine, launched by this user, is not safe from: a sentence each."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user may have no name
        user = str(os.geteuid())
    found = [
        "SIMULATED: a key of this machine signs the attestation, which so proves nothing about the machine.",
        "Root on this machine sees and changes everything in the enclave.",
    ]
    if os.geteuid() != 0:
        found.append(
            f"Every process of user {user}, who owns the enclave's user namespace, can read the enclave's memory "
            "(when root launches it, only root can)."
        )
    if not sandbox.counts_processes():
        found.append("The number of the enclave's processes is not limited (it is when a normal user launches it).")
    found.append(
        "Memory is limited for each process and each table of the enclave, not for all of them together; "
        "it can use the CPUs that it was given, but does not have them for itself."
    )
    found.append(
        "The interpreter and the C library are this machine's; the image describes them by version and digest."
    )
    return found
