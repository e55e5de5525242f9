"""The local backend, attacked: from inside the real sandbox and from outside, launched by root and by a normal user.

One launch for each user is done by `sandbox_launch.py` in a process of its own; the tests read its report. A run as a
normal user tests that user only.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cbor2
import pyseccomp
import pytest

from mpc.host import local, sandbox, seccomp
from mpc.host.simulated_nsm import SimulatedRoot
from mpc.image import build, cache, cpio, eif, standin
from mpc.image.measure import measure
from mpc.protocol.errors import LocalError

HERE = Path(__file__).parent
NOBODY = 65534
ENOSYS, EPERM = 38, 1
ATTACKS = """
    accept4 add_key bind bpf capset chroot clone3 connect execveat fchmodat finit_module fsopen init_module
    io_uring_enter io_uring_setup kexec_file_load kexec_load keyctl linkat listen memfd_secret mkdirat mknodat
    mount mount_setattr move_mount open_by_handle_at open_tree perf_event_open personality pidfd_getfd
    pidfd_open pivot_root process_vm_readv process_vm_writev ptrace renameat2 request_key sched_setaffinity
    seccomp setns setresuid sethostname settimeofday setuid shmget socket symlinkat umount2 unlinkat unshare
    userfaultfd
"""
Report = dict[str, Any]


@pytest.fixture(scope="module", params=["root", "normal user"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the probe saw inside, and its launcher outside."""
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, str(HERE / "sandbox_launch.py")]
    if request.param == "root":
        if os.geteuid() != 0:
            pytest.skip("not root: the launch by root is not tested")
    elif os.geteuid() == 0:
        command = _as_nobody(command, home)
    environment = {
        "PATH": os.environ["PATH"],
        "XDG_CACHE_HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": str(HERE.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(f"this root may not mount, so a normal user cannot be played: {done.stderr}")
    assert done.returncode == 0, done.stderr
    report: Report = json.loads(done.stdout)
    return report


def _as_nobody(command: list[str], home: Path) -> list[str]:
    """The same command as a user without privileges, who is shown what it needs of folders that only root may enter."""
    for folder in (home, *home.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o1 and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o11)
    os.chown(home, NOBODY, NOBODY)
    needed = [Path(sys.base_prefix), Path(sys.prefix), HERE.parent]
    script = ["set -e"]
    for index, path in enumerate(needed):
        closed = next((up for up in reversed(path.parents) if not up.stat().st_mode & 0o1), None)
        if closed is not None:
            kept = f"{home}/kept{index}"
            script += [f"mkdir {kept}", f"mount --bind {path} {kept} || exit 77"]
            script += [f"mount -t tmpfs -o mode=755 none {closed}", f"mkdir -p {path}", f"mount --bind {kept} {path}"]
    script.append(f'exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "$@"')
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script), "sh", *command]


def test_every_other_system_call_is_refused(report: Report) -> None:
    calls = report["inside"]["calls"]
    went_through = {name: number for name, number in calls.items() if number not in (ENOSYS, EPERM)}
    assert not went_through
    assert set(ATTACKS.split()) <= set(calls)


def test_nothing_that_was_tried_inside_succeeded(report: Report) -> None:
    assert report["inside"]["succeeded"] == []


def test_calls_that_are_allowed_for_other_arguments(report: Report) -> None:
    conditional = report["inside"]["by_condition"]
    assert len(conditional) == 10
    assert set(conditional.values()) == {ENOSYS}


def test_nothing_can_be_written(report: Report) -> None:
    assert report["inside"]["written"] == []


def test_another_abi_is_no_way_around(report: Report) -> None:
    assert report["inside"]["other_abi"] in (None, signal.SIGSYS)


def test_descriptors_environment_and_path(report: Report) -> None:
    inside = report["inside"]
    assert inside["descriptors"] == {"0": "null", "1": "null", "2": "null", "3": "socket", "4": "socket"}
    assert inside["environment"] == {}
    assert inside["argv"] == [""]
    assert inside["path"][-1] == "/app"
    assert not [path for path in inside["path"] if "packages" in path or str(HERE.parent) in path]
    assert (inside["pid"], inside["uid"]) == (1, NOBODY)


def test_root_folder_holds_interpreter_library_and_image_only(report: Report) -> None:
    own = {Path(sys.base_prefix).parts[1], "usr", "lib", "lib64"}
    assert {"app", "init.py"} < set(report["inside"]["root"]) <= {"app", "init.py"} | own


def test_no_privileges(report: Report) -> None:
    inside, status = report["inside"], report["status"]
    assert inside["no_new_privileges"] == 1
    assert inside["seccomp"] == 2  # a filter
    assert inside["capabilities"] == []
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert report["shared_namespaces"] == []


def test_limits(report: Report) -> None:
    inside = report["inside"]
    assert inside["limits"]["RLIMIT_CORE"] == [0, 0]
    assert inside["cpus"] == report["described"]["NumberOfCPUs"] == 1
    assert inside["memory"] == {"private": True, "table": True}
    assert (inside["processes"] < sandbox.PROCESSES_MAX) == report["counts_processes"]


def test_documents_carry_what_the_host_measured(report: Report) -> None:
    response = cbor2.loads(bytes.fromhex(report["inside"]["document"]))
    payload = cbor2.loads(cbor2.loads(response["Attestation"]["document"])[2])
    measured = report["described"]["Measurements"]
    assert [payload["pcrs"][index].hex() for index in (0, 1, 2)] == [measured[f"PCR{index}"] for index in (0, 1, 2)]
    assert payload["module_id"] == report["described"]["EnclaveID"]


def test_who_reads_its_memory_is_said(report: Report) -> None:
    """The launcher's own user does, through the user namespace or as root; nobody else, in no way."""
    limitations = " ".join(report["limitations"])
    assert "SIMULATED" in limitations
    assert "Root on this machine sees" in limitations
    ways = {way for way, worked in report["readable_by_launcher"].items() if worked}
    assert ways >= {"ptrace", "process_vm_readv", "pidfd_getfd"}  # what is said is true, and the test would notice
    if report["readable_by_others"] is None:
        assert "can read the enclave's memory" in limitations
    else:
        assert "can read the enclave's memory" not in limitations
        assert not any(report["readable_by_others"].values())


def test_terminate_leaves_nothing(report: Report) -> None:
    assert report["unpacked"] == 1
    assert not report["alive_after"]
    assert report["children_after"] == []
    assert report["left_after"] == []
    assert (report["described"]["State"], report["state_after"]) == ("RUNNING", "TERMINATED")


def test_a_killed_launcher_takes_its_enclave_along(report: Report) -> None:
    assert report["dies_with_launcher"]
    assert (report["left_by_killed"], report["left_after_next"]) == (1, 0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRoot:
    return SimulatedRoot.load_or_create(tmp_path_factory.mktemp("root"))


def _image(path: Path, main: str, boot: build.Boot | None = None) -> Path:
    files = {"enclave_runtime/__init__.py": b"", "enclave_runtime/__main__.py": main.encode()}
    build.write_image(files, path, boot or build.Boot.local(), title="test")
    return path


ECHO = """
import socket
def main():
    channel = socket.socket(fileno=3)
    while data := channel.recv(100):
        channel.sendall(data)
"""


@pytest.fixture
def echo(home: Path) -> Path:
    return _image(home / "echo.eif", ECHO)


def _start(path: Path, root: SimulatedRoot) -> local.Launched:
    return local.launch(path, cpus=1, memory_bytes=256 << 20, root=root)


def _unpacked() -> list[Path]:
    return list((cache.folder() / "running").iterdir())


def test_the_channel_carries_both_ways_and_ends_with_the_enclave(echo: Path, root: SimulatedRoot) -> None:
    with _start(echo, root) as launched:
        assert launched.channel.getblocking()
        launched.channel.sendall(b"there and back")
        assert launched.channel.recv(100) == b"there and back"
        assert launched.measurements == measure(echo)
        os.kill(launched.pid, signal.SIGKILL)
        assert launched.channel.recv(100) == b""
    assert _unpacked() == []


def test_two_enclaves_at_once(echo: Path, root: SimulatedRoot) -> None:
    with _start(echo, root) as one, _start(echo, root) as other:
        assert one.describe()["EnclaveID"] != other.describe()["EnclaveID"]
        one.terminate()
        other.channel.sendall(b"still here")
        assert other.channel.recv(100) == b"still here"


def test_an_application_that_does_not_start_says_why(home: Path, root: SimulatedRoot) -> None:
    with pytest.raises(LocalError, match=r"the enclave did not start: .*No module named 'absent'"):
        _start(_image(home / "x.eif", "import absent"), root)
    assert _unpacked() == []


def test_an_enclave_that_fails_ends(home: Path, root: SimulatedRoot) -> None:
    main = "import socket\ndef main():\n    socket.socket(fileno=3).recv(1)\n    raise ValueError('a row')"
    with _start(_image(home / "x.eif", main), root) as launched:
        launched.channel.sendall(b"x")
        assert launched.channel.recv(100) == b""


def test_without_bubblewrap_the_remedy_is_one_line(
    echo: Path, root: SimulatedRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LocalError, match="apt install bubblewrap"):
        _start(echo, root)
    assert _unpacked() == []


def test_bubblewraps_own_words(home: Path, echo: Path, root: SimulatedRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = home / "bin" / "bwrap"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'bwrap: no namespaces here' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent))
    with pytest.raises(LocalError, match="cannot make the sandbox: bwrap: no namespaces here"):
        _start(echo, root)


def test_one_changed_byte_does_not_start(echo: Path, root: SimulatedRoot) -> None:
    raw = bytearray(echo.read_bytes())
    raw[raw.index(b"sendall")] ^= 1
    echo.write_bytes(raw)
    with pytest.raises(eif.ImageError, match="CRC"):
        _start(echo, root)
    assert _unpacked() == []


def test_one_changed_byte_with_its_crc_measures_otherwise(echo: Path, root: SimulatedRoot) -> None:
    before = measure(echo)
    changed = _image(echo, ECHO.replace("100", "200"))
    with _start(changed, root) as launched:
        assert launched.measurements.pcr0 != before.pcr0
        assert launched.measurements.pcr1 == before.pcr1
        assert launched.measurements.pcr2 != before.pcr2


def test_an_image_for_another_backend_or_machine_is_refused(home: Path, root: SimulatedRoot) -> None:
    here = build.Boot.local()
    nitro = build.Boot(b"kernel", b"reboot=k", [b"ramdisk"], "x86_64")
    with pytest.raises(eif.ImageError, match="not an image for the local backend"):
        _start(_image(home / "nitro.eif", ECHO, nitro), root)
    described = standin.describe()
    described["interpreter"]["version"] = "CPython 3.99"
    kernel, bootstrap = standin.sections(described)
    with pytest.raises(eif.ImageError, match="another interpreter or C library"):
        _start(_image(home / "a.eif", ECHO, build.Boot(kernel, here.cmdline, bootstrap, here.architecture)), root)
    described = standin.describe()
    described["kernel"]["c_library"] = "glibc 9"
    kernel, bootstrap = standin.sections(described)
    with pytest.raises(eif.ImageError, match="another interpreter or C library"):
        _start(_image(home / "b.eif", ECHO, build.Boot(kernel, here.cmdline, bootstrap, here.architecture)), root)


def test_an_image_whose_first_code_is_hostile_gets_no_more(home: Path, root: SimulatedRoot) -> None:
    """Its own init closes nothing, and refuses itself no program; the launcher's part of the sandbox holds."""
    init = """
import os, socket
found = []
for number in range(256):
    try:
        os.fstat(number)
    except OSError:
        continue
    found.append(number)
os.write(1, b"\\n")
socket.socket(fileno=3).sendall(repr((found, dict(os.environ).keys() - {"LD_LIBRARY_PATH", "PWD"})).encode())
"""
    boot = build.Boot.local()
    interpreter = dict(cpio.contents(boot.bootstrap))[standin.INTERPRETER]
    bootstrap = cpio.pack({standin.INIT: init.encode(), standin.INTERPRETER: interpreter})
    path = _image(home / "x.eif", ECHO, build.Boot(boot.kernel, boot.cmdline, bootstrap, boot.architecture))
    ours = os.open(path, os.O_RDONLY)
    os.dup2(ours, 50, inheritable=True)
    try:
        with _start(path, root) as launched:
            assert launched.channel.recv(1000) == b"([0, 1, 2, 3, 4], set())"
    finally:
        os.close(50)
        os.close(ours)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "app/../../escaped", "app/./escaped", "./escaped"])
def test_an_image_cannot_unpack_outside_its_folder(
    name: str, home: Path, root: SimulatedRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    placeholder = "app/" + "x" * 100
    parts = [bytes(part) for part in build.pack({placeholder.removeprefix("app/"): b"evil"})]
    head = next(part for part in parts if placeholder.encode() in part)
    hostile = head.replace(placeholder.encode(), name.encode() + b"\0" * (len(placeholder) - len(name)))
    hostile = hostile.replace(b"%08X" % (len(placeholder) + 1), b"%08X" % (len(name) + 1), 1)
    cut = 110 + len(name) + 1
    hostile = hostile[:cut] + bytes(-cut % 4)
    boot = build.Boot.local()
    sections: list[tuple[eif.Kind, list[eif.Buffer]]] = [
        (eif.Kind.KERNEL, [boot.kernel]),
        (eif.Kind.CMDLINE, [boot.cmdline]),
        (eif.Kind.RAMDISK, boot.bootstrap),
        (eif.Kind.RAMDISK, [hostile if part is head else part for part in parts]),
    ]
    eif.write(home / "x.eif", boot.architecture, sections)
    with pytest.raises(eif.ImageError, match="name at byte"):
        _start(home / "x.eif", root)
    assert not [path for path in home.rglob("escaped")]
    assert not Path("/escaped").exists()


def test_every_allowed_call_is_known_to_libseccomp() -> None:
    """A misspelt name would be left out without a word."""
    newer = {"futex_wait", "futex_wake"}  # than the oldest libseccomp that we meet
    native = pyseccomp.Arch.NATIVE
    unknown = {name for name in seccomp.ALLOWED if pyseccomp.resolve_syscall(native, name) == -1}
    assert unknown <= newer
    assert len(set(seccomp.ALLOWED)) == len(seccomp.ALLOWED)
