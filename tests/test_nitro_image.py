"""What a Nitro image is made of: its /init in a process of its own, the bootstrap ramdisk, and the command line.

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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from nitro_instance import image_of
from test_image import signer
from test_nsm import Driver, World

from enclave_runtime import __main__ as shell
from enclave_runtime import engine
from enclave_runtime.nsm import device
from mpc.cli import image as commands
from mpc.cli import measure as measuring
from mpc.host import backends, seccomp
from mpc.image import bootstrap, build, eif, nitro_init, standin
from mpc.image.measure import describe
from mpc.protocol.channel import HEADER, Frame, begin_frame, parse_header
from mpc.protocol.errors import LocalError
from mpc.scenario import Enclave

NITRO = Enclave(backend="nitro", image="core", cpus=2)

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


@pytest.mark.skipif(os.getuid() != 0, reason="only root can leave root: not tested for a normal user")
def test_the_engine_can_leave_root_with_these_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Nitro, where /dev/nsm is what it must not reach, and where to stay root is the end of it."""
    monkeypatch.setattr(engine, "EMPTY", str(tmp_path / "empty"))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nsm" or exists(path))

    def left() -> list[object]:
        nitro_init.allow_calls(platform.machine())
        engine._leave_root()
        return [os.getresuid(), os.getresgid(), os.getgroups(), [*map(str, Path("/").iterdir())]]

    assert in_a_child(left) == [[engine.NOBODY] * 3, [engine.NOBODY] * 3, [], []]


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
    os.mkfifo(root / "pipe")  # nobody writes into it
    with pytest.raises(LocalError, match="pipe: is no regular file"):
        bootstrap.pack(root, [root / "pipe"])
    os.mkfifo(root / "usr/local/lib" / VERSION / "pipe.py")
    with pytest.raises(LocalError, match=r"pipe\.py: is no regular file"):
        bootstrap.pack(root, [])


# From a scenario


def test_an_image_with_this_installations_application_is_one_for_a_contract(tmp_path: Path) -> None:
    own = build.build("core", tmp_path / "local.eif")
    image = image_of(tmp_path)
    with pytest.raises(LocalError, match="its application is not this installation's"):
        backends.measurement(NITRO, image)
    boot = build.Boot.nitro(tmp_path / "kernel", "reboot=k", tmp_path / "bootstrap", standin.architecture())
    measured = build.build("core", image, boot=boot)
    found = backends.measurement(NITRO, image)
    assert (found.pcr0, found.pcr1, found.pcr2) == (measured.pcr0, measured.pcr1, own.pcr2)
    assert found.label.endswith(" nitro")
    assert own.pcr1 != found.pcr1


# The command line


def told(command: click.Command, *arguments: object) -> tuple[int, Any]:
    """Its exit status and its JSON document."""
    done = CliRunner().invoke(command, [*map(str, arguments), "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.return_value, json.loads(done.stdout)


def boot_options(folder: Path, **others: str) -> list[object]:
    given = {"kernel": folder / "kernel", "cmdline": "reboot=k", "ramdisk": folder / "bootstrap"} | others
    return ["--backend", "nitro", *(word for name, value in given.items() for word in (f"--{name}", value))]


def test_images_are_built_signed_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_of(tmp_path)  # for its kernel and its ramdisk
    by = signer()
    key = by.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for name, content in (("key", key), ("certificate", by.certificate.public_bytes(Encoding.PEM))):
        (tmp_path / name).write_bytes(content)
    built = []
    for folder in (tmp_path / "one", tmp_path / "another"):
        folder.mkdir()
        more = ["--sign", tmp_path / "key", tmp_path / "certificate", "--arch", "aarch64", "-o", folder / "core.eif"]
        built.append(told(commands.image, "build", "--variant", "core", *boot_options(tmp_path), *more))
    one, another = tmp_path / "one" / "core.eif", tmp_path / "another" / "core.eif"
    assert one.read_bytes() == another.read_bytes()
    with eif.opened(one) as opened:
        assert opened.architecture == "aarch64"
    status, described = told(measuring.measure, one)
    assert (status, described) == (0, describe(one))
    assert described["Measurements"] == {"HashAlgorithm": "Sha384 { ... }", **built[0][1]["Measurements"]}
    assert set(built[0][1]["Measurements"]) == {"PCR0", "PCR1", "PCR2", "PCR8"}
    assert described["IsSigned"]
    local = tmp_path / "local.eif"
    _, plain = told(commands.image, "build", "--variant", "core", "-o", local)
    assert plain["Measurements"]["PCR2"] == described["Measurements"]["PCR2"]
    assert plain["Measurements"]["PCR1"] != described["Measurements"]["PCR1"]


def test_an_image_is_compared_as_far_as_there_is_something_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = image_of(tmp_path)
    image, core = tmp_path / "core.eif", ["--from-source", "--variant", "core"]
    told(commands.image, "build", "--variant", "core", *boot_options(tmp_path), "-o", image)
    (tmp_path / "other").write_bytes(b"another kernel")
    for options, compared, difference in (
        (["--application-only"], "application", None),
        (boot_options(tmp_path), "image", None),
        (boot_options(tmp_path, kernel=str(tmp_path / "other")), "image", "the KERNEL section"),
    ):
        status, found = told(measuring.measure, image, *core, *options)
        assert (found["compared"], found["first_difference"]) == (compared, difference)
        assert status == (0 if difference is None else 1)
    with pytest.raises(LocalError, match="compare the rest with --application-only"):
        told(measuring.measure, image, *core)
    status, found = told(measuring.measure, small, *core, "--application-only")
    assert (status, found["first_difference"].partition("/")[0]) == (1, "app")
