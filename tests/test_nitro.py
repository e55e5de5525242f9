"""The nitro backend against a stand-in for nitro-cli, its /init in a process of its own, and the bootstrap ramdisk.

What only AWS's hardware can show is not shown here; docs/NITRO.md has the list.
"""

import ctypes
import errno
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_nsm import Driver, World

from enclave_runtime import __main__ as shell
from enclave_runtime.nsm import device
from mpc.host import backends, nitro, seccomp
from mpc.host.serve import Launched
from mpc.image import bootstrap, build, nitro_init, standin
from mpc.image.eif import ImageError
from mpc.image.measure import measure
from mpc.protocol.channel import HEADER, Frame, begin_frame, parse_header
from mpc.protocol.errors import LocalError

STANDIN = Path(__file__).with_name("standin_nitro_cli.py")


class UnixVsock:
    """The parent instance's listening socket: a Unix one, whose peers are named as in vsock."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen(64)
        self.hung_up_on: list[int] = []

    def accept(self) -> tuple[socket.socket, tuple[int, int]]:
        connection, name = self._sock.accept()
        cid, port = name.decode().rsplit("-", 2)[1:]
        return connection, (int(cid), int(port))

    def settimeout(self, seconds: float) -> None:
        self._sock.settimeout(seconds)

    def close(self) -> None:
        self._sock.close()


class Instance:
    """A parent instance with a stand-in for nitro-cli."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device, self.listeners = folder, folder / "nitro_enclaves", 0
        self.device.touch()
        for name in ("running", "log"):
            (folder / name).mkdir()
        self.has()

    def has(self, *, cpus: int = 4, memory_mib: int = 1024, enclave: str = "connects", device: str = "works") -> None:
        pool = {"cpus": cpus, "memory_mib": memory_mib, "enclave": enclave, "device": device}
        (self.folder / "pool.json").write_text(json.dumps(pool))

    def listen(self) -> nitro.Listener:
        return UnixVsock(self.folder / "vsock")

    def calls(self, command: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call[0] == command]

    def running(self) -> list[str]:
        listed = subprocess.run(["nitro-cli", "describe-enclaves"], capture_output=True, check=True)
        return [info["EnclaveID"] for info in json.loads(listed.stdout)]

    def launch(self, image: Path, **options: Any) -> nitro.Launched:
        options = {"cpus": 2, "memory_bytes": 64 << 20, **options}
        return nitro.launch(image, device=self.device, listen=self.listen, **options)


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    program = tmp_path / "bin" / "nitro-cli"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{STANDIN.read_text()}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("NITRO_STANDIN", str(tmp_path))
    return Instance(tmp_path)


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        os.sched_yield()


def image_of(folder: Path, application: bytes = b"pass\n") -> Path:
    (folder / "kernel").write_bytes(b"a kernel")
    (folder / "bootstrap").write_bytes(b"a ramdisk, padded to a multiple of 4 bytes..")
    boot = build.Boot.nitro(folder / "kernel", "reboot=k panic=30", folder / "bootstrap", standin.architecture())
    build.write_image({"hello.py": application}, folder / "image.eif", boot, title="test")
    return folder / "image.eif"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return image_of(tmp_path)


# Launching


def test_it_is_what_the_host_wants(instance: Instance, image: Path) -> None:
    launched: Launched = instance.launch(image)
    launched.terminate()


def test_the_channel_carries_both_ways_whatever_the_pieces(instance: Instance, image: Path) -> None:
    data = os.urandom(3_000_017)
    with instance.launch(image) as launched:
        assert launched.channel.type == socket.SOCK_STREAM
        assert launched.channel.gettimeout() is None  # blocking
        sender = threading.Thread(target=launched.channel.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < len(data):
            received += launched.channel.recv(65536)
        sender.join()
    assert received == data


def test_what_was_asked_for_reaches_nitro_cli(instance: Instance, image: Path) -> None:
    with instance.launch(image, cpus=4, memory_bytes=(100 << 20) + 1) as launched:
        told = launched.describe()
    (call,) = instance.calls("run-enclave")
    given = dict(zip(call[1::2], call[2::2], strict=True))
    assert given.pop("--enclave-name").startswith("mpc-")
    assert given == {"--eif-path": str(image), "--cpu-count": "4", "--memory": "101"}  # and no debug mode
    assert (told["NumberOfCPUs"], told["MemoryMiB"], told["State"], told["Flags"]) == (4, 101, "RUNNING", "NONE")
    assert told["EnclaveID"] == launched.enclave_id
    assert told["ProcessID"] == launched.pid
    assert told["Measurements"]["PCR0"] == measure(image).pcr0.hex()
    assert launched.measurements == measure(image)


def test_terminate_ends_it_once_and_for_all(instance: Instance, image: Path) -> None:
    instance.has(enclave="outlives its channel")
    launched = instance.launch(image)
    assert instance.running() == [launched.enclave_id]
    for _ in range(3):
        launched.terminate()
    assert instance.calls("terminate-enclave") == [["terminate-enclave", "--enclave-id", launched.enclave_id]]
    assert instance.running() == []
    assert launched.describe()["State"] == "TERMINATED"
    assert launched.channel.fileno() == -1


def test_an_enclave_that_ended_itself_needs_no_termination(instance: Instance, image: Path) -> None:
    launched = instance.launch(image)
    launched.channel.shutdown(socket.SHUT_WR)
    assert launched.channel.recv(1) == b""
    eventually(lambda: not instance.running())
    launched.terminate()
    assert instance.calls("terminate-enclave") == []


def test_an_enclave_that_does_not_end_is_an_error(instance: Instance, image: Path) -> None:
    instance.has(enclave="does not end")
    launched = instance.launch(image)
    with pytest.raises(LocalError, match=f"still runs.*nitro-cli terminate-enclave --enclave-id {launched.enclave_id}"):
        launched.terminate()
    instance.has()
    subprocess.run(["nitro-cli", "terminate-enclave", "--enclave-id", launched.enclave_id], check=True)


def test_two_enclaves_have_two_channels(instance: Instance, image: Path) -> None:
    with instance.launch(image) as one, instance.launch(image) as other:
        for launched, word in ((one, b"one"), (other, b"other")):
            launched.channel.sendall(word)
            assert launched.channel.recv(100) == word
        assert sorted(instance.running()) == sorted([one.enclave_id, other.enclave_id])


def test_strangers_do_not_get_the_channel(instance: Instance, image: Path) -> None:
    instance.has(enclave="connects after strangers")
    with instance.launch(image) as launched:
        launched.channel.sendall(b"mine")
        assert launched.channel.recv(100) == b"mine"
        name = launched.channel.getpeername().decode()
    assert int(name.rsplit("-", 2)[1]) >= 16


def test_a_flood_of_strangers_is_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flooded:
        def accept(self) -> tuple[socket.socket, tuple[int, int]]:
            return socket.socket(socket.AF_UNIX), (1, 1024)

        def settimeout(self, seconds: float) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(nitro, "CHANNEL_S", 0.1)
    with pytest.raises(LocalError, match="did not connect"):
        nitro._accept(Flooded(), 16, None)


def test_an_application_that_does_not_connect(instance: Instance, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance.has(enclave="never connects")
    monkeypatch.setattr(nitro, "CHANNEL_S", 0.3)
    with pytest.raises(LocalError, match=r"booted, but its application did not connect within 0\.3 s.*debug mode"):
        instance.launch(image)
    assert instance.running() == []


def test_output_that_is_not_understood_leaves_no_enclave(instance: Instance, image: Path) -> None:
    instance.has(enclave="prints nonsense")
    with pytest.raises(LocalError, match="expected JSON with EnclaveID, EnclaveCID, ProcessID"):
        instance.launch(image)
    assert instance.running() == []


def test_debug_mode_is_loud_and_has_zero_measurements(
    instance: Instance, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = tmp_path / "console"
    with instance.launch(image, console=console) as launched:
        assert "No party will accept this enclave" in capsys.readouterr().err
        assert launched.measurements.pcrs == {0: bytes(48), 1: bytes(48), 2: bytes(48)}
        assert launched.describe()["Flags"] == "DEBUG_MODE"
        eventually(lambda: "Linux version" in console.read_text())
    assert console.read_text().startswith("DEBUG MODE")
    assert "--debug-mode" in instance.calls("run-enclave")[0]


# What goes wrong, in a sentence with its remedy


@pytest.mark.parametrize(
    ("has", "asked", "words"),
    [
        ({"cpus": 2}, {"cpus": 4}, r"E22, Insufficient CPUs.*`cpu-count` is 4.*raise cpu_count in .*allocator\.yaml"),
        ({"memory_mib": 32}, {}, r"E27, Insufficient memory available.*`memory` is 64 MB.*raise memory_mib"),
        ({}, {"memory_bytes": 1 << 20}, r"E26, .*minimum memory should be 4 MB \(.*\); give the enclave more memory"),
        (
            {},
            {"cpus": 1},
            r"E29, Ioctl failure \(The enclave cannot start because full CPU cores have not been set\); .*even",
        ),
        ({"device": "broken"}, {}, r"E19, File operation failure\..*/dev/nitro_enclaves.*modprobe nitro_enclaves"),
        ({"enclave": "does not boot"}, {}, r"E36, Enclave boot failure \(Waiting on .* VsockTimeoutError\); the image"),
    ],
)
def test_nitro_clis_errors_are_explained(
    instance: Instance, image: Path, has: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    instance.has(**has)
    with pytest.raises(LocalError, match=words) as refused:
        instance.launch(image, **asked)
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)
    assert "Such error" not in str(refused.value)


def test_errors_without_a_code_or_a_remedy() -> None:
    assert "wasn't expected" in nitro._explain("run-enclave", "error: Found argument '-x' which wasn't expected\n")
    assert "said: nothing" in nitro._explain("run-enclave", "")
    assert nitro._explain("x", "[ E44 ] Console. Such error appears.\n\nFor more").endswith("explain --error-code E44")


def test_without_nitro_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for attempt in (nitro.check, lambda: backends.prepare("nitro", "sql", None, tmp_path)):
        with pytest.raises(LocalError, match=r"nitro-cli, which is not here: .*EC2 instance.*install"):
            attempt()


def test_without_the_device(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    nitro.check(instance.device)
    monkeypatch.setattr(os, "access", lambda path, mode: path != instance.device)
    with pytest.raises(LocalError, match="no permission; join its group"):
        nitro.check(instance.device)
    instance.device.unlink()
    with pytest.raises(LocalError, match="is missing: launch this instance with enclaves enabled"):
        nitro.check(instance.device)


def test_only_an_image_with_a_kernel_is_launched(instance: Instance, tmp_path: Path) -> None:
    local = tmp_path / "local.eif"
    build.write_image({"hello.py": b"pass\n"}, local, build.Boot.local(), title="test")
    (tmp_path / "junk.eif").write_bytes(b"junk" * 1000)
    for path, words in ((local, "for the local backend"), (tmp_path / "junk.eif", "junk.eif")):
        with pytest.raises(ImageError, match=words):
            instance.launch(path)
    assert not (instance.folder / "calls").exists()


# vsock: bound here, connected nowhere


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except (AttributeError, OSError):
        pytest.skip("no vsock here: the listener was not tested")
    number = 0x7E570000 + os.getpid() % 0x10000
    monkeypatch.setattr(nitro, "CHANNEL_PORT", number)
    return number


def test_the_port_is_a_lock(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nitro.listen()
    monkeypatch.setattr(nitro, "PORT_S", 0)
    with pytest.raises(LocalError, match=f"vsock port {port} of this instance: Address already in use"):
        nitro.listen()
    monkeypatch.setattr(nitro, "PORT_S", 10)
    threading.Timer(0.1, first.close).start()
    second = nitro.listen()  # as soon as the first launch is over
    second.settimeout(0.01)
    with pytest.raises(TimeoutError):
        second.accept()
    second.close()


def test_a_vsock_socket_survives_being_made_of_its_descriptor(port: int) -> None:
    made = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    with socket.socket(fileno=made.detach()) as again:  # as enclave_runtime.__main__ does with descriptor 3
        assert (again.family, again.type) == (socket.AF_VSOCK, socket.SOCK_STREAM)


# The enclave's side


def in_a_child(action: Callable[[], object]) -> Any:
    """What `action` gives, as JSON, from a process that may lose its descriptors and its calls."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kept = os.dup2(writer, 200)
            said = json.dumps(action())
        except BaseException as error:
            said = json.dumps(repr(error))
        os.write(kept, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return json.load(file)


def test_the_heartbeat_is_nitro_clis() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        its.sendall(b"\xb7")
        nitro_init.heartbeat(ours)
        assert its.recv(10) == b"\xb7"
        its.sendall(b"\xb8")
        with pytest.raises(ConnectionError):
            nitro_init.heartbeat(ours)


def number_of(call: Callable[[], int]) -> str:
    """`ok`, or the name of the error."""
    ctypes.set_errno(0)
    return "ok" if call() >= 0 else errno.errorcode[ctypes.get_errno()]


def test_calls_that_lead_out_are_refused() -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def tried() -> dict[str, str]:
        nitro_init.allow_calls(platform.machine())
        pair = (ctypes.c_int * 2)()
        pid = os.fork()  # the engine is forked
        if pid == 0:
            os._exit(0 if number_of(lambda: libc.socket(40, 1, 0)) == "ENOSYS" else 1)
        return {
            "vsock": number_of(lambda: libc.socket(40, 1, 0)),
            "internet": number_of(lambda: libc.socket(2, 1, 0)),
            "io_uring": number_of(lambda: libc.syscall(425, 1, 0)),
            "execve": number_of(lambda: libc.execve(b"/bin/true", None, None)),
            "ptrace": number_of(lambda: libc.ptrace(0, 0, 0, 0)),
            "unshare": number_of(lambda: libc.unshare(0)),
            "pair": number_of(lambda: libc.socketpair(1, 1, 0, pair)),
            "memory": number_of(lambda: libc.memfd_create(b"x", 0)),
            "child": str(os.waitpid(pid, 0)[1]),
        }

    refused = dict.fromkeys(("vsock", "internet", "io_uring", "execve", "ptrace", "unshare"), "ENOSYS")
    assert in_a_child(tried) == {**refused, "pair": "ok", "memory": "ok", "child": "0"}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_calls_are_those_of_the_local_sandbox(machine: str) -> None:
    pyseccomp = pytest.importorskip("pyseccomp", exc_type=ImportError)
    architecture = pyseccomp.Arch.X86_64 if machine == "x86_64" else pyseccomp.Arch.AARCH64
    more = "ioctl clone prlimit64 socketpair chroot chdir mkdir mkdirat setgroups setgid setuid"
    names = {*seccomp.ALLOWED, *more.split()} - {"execve"}
    expected = {number for name in names if (number := pyseccomp.resolve_syscall(architecture, name)) >= 0}
    listed = [part.partition("-") for part in nitro_init._ALLOWED[machine].split()]
    allowed = {number for first, _, last in listed for number in range(int(first), int(last or first) + 1)}
    assert expected <= allowed
    assert allowed - expected <= {449, 454, 455}  # futex_waitv, futex_wake and futex_wait: newer than some libseccomps


def test_the_application_gets_the_channel_and_nothing_else() -> None:
    ours, its = socket.socketpair()

    def run() -> None:
        seen: dict[str, Any] = {}

        def application() -> None:
            seen["descriptors"] = sorted(int(path.name) for path in Path("/proc/self/fd").iterdir())
            seen["environment"], seen["arguments"], seen["path"] = dict(os.environ), sys.argv, sys.path[-1]
            seen["console"] = str(Path("/proc/self/fd/2").readlink())
            channel = socket.socket(fileno=3)
            channel.sendall(json.dumps(seen).encode())

        sys.modules["enclave_runtime.__main__"] = SimpleNamespace(main=application)  # type: ignore[assignment]
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        nitro_init.run_application(its)

    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    its.close()
    with ours:
        seen = json.loads(ours.recv(4096))
    assert seen == {
        "descriptors": [0, 1, 2, 3, 4],  # 4 is that of the listing itself
        "environment": {},
        "arguments": [""],
        "path": "/app",
        "console": "/dev/null",
    }


def test_the_shell_asks_the_device_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the driver of test_nsm. Descriptor 4 is no NSM here, and a shell that took it would end without a word."""
    (tmp_path / "nsm").touch()
    nsm = device(str(tmp_path / "nsm"), Driver(World().simulated).ioctl)
    monkeypatch.setattr(shell, "Path", lambda path: SimpleNamespace(exists=lambda: path == "/dev/nsm"))
    monkeypatch.setattr(shell, "device", lambda: nsm)
    monkeypatch.setattr(shell, "Engine", lambda: None)
    ours, its = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            os.dup2(its.detach(), 3)
            shell.main()
        finally:
            os._exit(0)
    its.close()
    with ours:
        ours.sendall(begin_frame(1, b"not a contract"))
        kind, _ = parse_header(ours.recv(HEADER.size, socket.MSG_WAITALL))
    assert kind is Frame.REFUSED
    os.waitpid(child, 0)


# The bootstrap ramdisk


VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root file system of a small distribution, with what should stay out."""
    root = tmp_path / "root"
    files = {
        f"usr/local/bin/{VERSION}": "\x7fELF",
        f"usr/local/lib/{VERSION}/os.py": "pass",
        f"usr/local/lib/{VERSION}/lib-dynload/math.so": "\x7fELF",
        f"usr/local/lib/{VERSION}/test/test_os.py": "no",
        f"usr/local/lib/{VERSION}/site-packages/pip.py": "no",
        f"usr/local/lib/{VERSION}/__pycache__/os.pyc": "no",
        f"usr/local/lib/lib{VERSION}.so.1.0": "\x7fELF",
        "usr/lib/x86_64-linux-gnu/libc.so.6": "\x7fELF",
        "usr/lib/x86_64-linux-gnu/perl/5.36/auto.so": "no",
        "usr/bin/sh": "no",
        "etc/ld.so.cache": "cache",
        "etc/shadow": "no",
        "nsm.ko": "\x7fELF driver",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / f"usr/local/bin/{VERSION}").chmod(0o700)
    (root / "usr/lib64").mkdir()
    (root / "usr/lib64/ld-linux-x86-64.so.2").symlink_to("../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    for link in ("lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    return root


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Name → mode and content, read as the kernel reads them."""
    found, place = {}, 0
    while True:
        assert archive[place : place + 6] == b"070701"
        fields = [int(archive[at : at + 8], 16) for at in range(place + 6, place + 110, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[place + 110 : place + 110 + name_size - 1].decode()
        place += -(-(110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            assert place == len(archive)
            return found
        parent = name.rpartition("/")[0]
        assert not parent or found[parent][0] == 0o40755
        found[name] = mode, archive[place : place + size]
        place += -(-size // 4) * 4


def test_the_ramdisk_holds_what_is_needed_and_nothing_else(root: Path) -> None:
    archive = bootstrap.pack(root, [root / "nsm.ko"])
    assert len(archive) % 4 == 0  # else the kernel does not find the application's ramdisk behind it
    files = {name: entry for name, entry in unpacked(archive).items() if entry[0] != 0o40755}
    first = f"#!/usr/local/bin/{VERSION} -IBS\n".encode() + Path(nitro_init.__file__).read_bytes()
    assert files.pop("dev/urandom") == (0o20666, b"")
    assert b"00000001000000090000000C00000000dev/urandom\0" in archive  # character device 1, 9
    assert files == {
        "init": (0o100755, first),
        "modules/00-nsm.ko": (0o100644, b"\x7fELF driver"),
        "etc/ld.so.cache": (0o100644, b"cache"),
        "lib": (0o120777, b"usr/lib"),
        "lib64": (0o120777, b"usr/lib64"),
        f"usr/local/bin/{VERSION}": (0o100755, b"\x7fELF"),
        f"usr/local/lib/{VERSION}/os.py": (0o100644, b"pass"),
        f"usr/local/lib/{VERSION}/lib-dynload/math.so": (0o100644, b"\x7fELF"),
        f"usr/local/lib/lib{VERSION}.so.1.0": (0o100644, b"\x7fELF"),
        "usr/lib/x86_64-linux-gnu/libc.so.6": (0o100644, b"\x7fELF"),
        "usr/lib64/ld-linux-x86-64.so.2": (0o120777, b"../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"),
    }
    assert {"dev", "modules", "var/empty"} <= unpacked(archive).keys()


def test_the_same_files_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    subprocess.run(["cp", "-r", "--no-preserve=timestamps", str(root), str(again)], check=True)
    assert bootstrap.pack(again, []) == bootstrap.pack(root, [])


def test_what_a_ramdisk_cannot_be_made_of(root: Path, tmp_path: Path) -> None:
    (root / "nsm.ko.xz").write_bytes(b"\xfd7zXZ")
    with pytest.raises(LocalError, match="must be unpacked first"):
        bootstrap.pack(root, [root / "nsm.ko.xz"])
    with pytest.raises(LocalError, match=r"absent\.ko: cannot be read"):
        bootstrap.pack(root, [root / "absent.ko"])
    with pytest.raises(LocalError, match=f"has no {VERSION}"):
        bootstrap.pack(tmp_path, [])


# From a scenario


def test_an_image_with_this_installations_application_is_one_for_a_contract(tmp_path: Path) -> None:
    own = build.build("core", tmp_path / "local.eif")
    image = image_of(tmp_path)
    with pytest.raises(LocalError, match="its application is not this installation's"):
        backends.nitro_measurement(image, "core")
    boot = build.Boot.nitro(tmp_path / "kernel", "reboot=k", tmp_path / "bootstrap", standin.architecture())
    measured = build.build("core", image, boot=boot)
    found = backends.nitro_measurement(image, "core")
    assert (found.pcr0, found.pcr1, found.pcr2) == (measured.pcr0, measured.pcr1, own.pcr2)
    assert found.label.endswith(" nitro")
    assert own.pcr1 != found.pcr1


def test_the_backend_is_chosen_by_its_name(tmp_path: Path) -> None:
    start = backends.launcher("nitro", tmp_path, cpus=4, memory_bytes=1 << 30, state=tmp_path)
    assert (start.func, start.args) == (nitro.launch, (tmp_path,))  # type: ignore[attr-defined]
    assert start.keywords == {"cpus": 4, "memory_bytes": 1 << 30}  # type: ignore[attr-defined]
