"""The nitro backend against a stand-in for nitro-cli; tests/test_nitro_image.py has the enclave's side.

What only AWS's hardware can show is not shown here; docs/NITRO.md has the list.
"""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nitro_instance import Instance, image_of

from mpc.attestation.roots import AWS_NITRO_ROOT_G1, root_fingerprint
from mpc.host import backends, nitro
from mpc.host.launched import EnclaveLost, Launched
from mpc.host.simulated_root import SimulatedRoot
from mpc.image import build
from mpc.image.eif import ImageError
from mpc.image.measure import measure
from mpc.protocol.contract import Measurement
from mpc.protocol.errors import LocalError
from mpc.scenario import NITRO_ROOT, Enclave

NITRO = Enclave(backend="nitro", image="core", cpus=2)


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    found = Instance(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("NITRO_STANDIN", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nitro, "DEVICE", found.device)
    monkeypatch.setattr(nitro, "listen", found.listen)
    return found


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


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


@pytest.mark.parametrize("said", ["{}", "null", '[{"EnclaveName": "mpc-1"}]', "[1]", "[" * 100_000])
def test_a_list_that_is_not_understood_is_no_enclave_that_ended(instance: Instance, image: Path, said: str) -> None:
    instance.has(enclave="outlives its channel")
    launched = instance.launch(image)
    instance.has(describes=said)
    with pytest.raises(LocalError, match="nitro-cli describe-enclaves"):
        launched.terminate()
    instance.has()
    assert instance.running() == [launched.enclave_id]
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
        nitro._accept(Flooded(), {"EnclaveID": "i-0-enc0", "EnclaveCID": 16}, None)


def test_an_application_that_does_not_connect(instance: Instance, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance.has(enclave="never connects")
    monkeypatch.setattr(nitro, "CHANNEL_S", 0.3)
    with pytest.raises(LocalError, match=r"booted, but its application did not connect within 0\.3 s.*debug mode"):
        instance.launch(image)
    assert instance.running() == []


def test_an_enclave_that_dies_before_its_application_connects(
    instance: Instance, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may live, so this is no reason to give up; and nobody waits the whole time for it."""
    instance.has(enclave="dies while it starts")
    monkeypatch.setattr(nitro, "LOOK_S", 0.05)
    with pytest.raises(EnclaveLost, match="ended before its application connected"):
        instance.launch(image)
    assert instance.running() == []


@pytest.mark.parametrize(
    ("cli", "words"),
    [
        ("prints half", "expected JSON with EnclaveID, EnclaveCID, ProcessID"),
        ("prints rubbish", "printed no JSON"),
        ("prints nothing", "printed no JSON"),
        ("dies", r"run-enclave was ended by a signal \(Killed\)"),
    ],
)
def test_a_nitro_cli_that_is_not_understood_leaves_no_enclave(
    instance: Instance, image: Path, cli: str, words: str
) -> None:
    instance.has(cli=cli)
    with pytest.raises(LocalError, match=words):
        instance.launch(image)
    assert len(instance.calls("terminate-enclave")) == 1
    assert instance.running() == []


def test_debug_mode_is_loud_and_has_zero_measurements(
    instance: Instance, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LocalError, match="the console cannot be written there"):
        instance.launch(image, console=tmp_path)
    assert instance.running() == []
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
    for attempt in (nitro.check, lambda: backends.prepare(NITRO, None, tmp_path)):
        with pytest.raises(LocalError, match=r"nitro-cli, which is not here: .*EC2 instance.*install"):
            attempt()


def test_without_the_device(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    nitro.check()
    monkeypatch.setattr(os, "access", lambda path, mode: path != instance.device)
    with pytest.raises(LocalError, match="no permission; join its group"):
        nitro.check()
    instance.device.unlink()
    with pytest.raises(LocalError, match="is missing: launch this instance with enclaves enabled"):
        nitro.check()


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


# From a scenario


def test_the_backend_is_chosen_by_its_name(tmp_path: Path) -> None:
    start = backends.launcher("nitro", tmp_path, cpus=4, memory_bytes=1 << 30, state=tmp_path)
    assert (start.func, start.args) == (nitro.launch, (tmp_path,))  # type: ignore[attr-defined]
    assert start.keywords == {"cpus": 4, "memory_bytes": 1 << 30, "console": None}  # type: ignore[attr-defined]


def test_what_a_nitro_scenario_needs(instance: Instance, image: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"needs an image with a kernel.*--image"):
        backends.prepare(NITRO, None, tmp_path)
    assert backends.needs(Enclave(cpus=3)) == []
    assert len(backends.needs(NITRO)) == 1
    instance.device.unlink()
    words = "\n".join(backends.needs(Enclave(backend="nitro", root="ab" * 32, cpus=3)))
    assert all(part in words for part in ("cannot do that here", "is missing", "an even number", "none that this"))


def test_roots(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS's unless the scenario names another; and one that this machine made itself is called what it is."""
    measured = Measurement("x", *(bytes([index]) * 48 for index in (1, 2, 3)))
    monkeypatch.setattr(backends, "measurement", lambda enclave, image: measured)
    own = SimulatedRoot.load_or_create(tmp_path / "state").fingerprint
    for root, simulated in ((NITRO_ROOT, False), ("ab" * 32, False), (own.hex(), True)):
        found = backends.prepare(Enclave(backend="nitro", root=root), tmp_path, tmp_path / "state")
        assert (found.root, found.simulated) == (root_fingerprint(root), simulated)
    assert backends.prepare(NITRO, tmp_path, tmp_path / "state").root == AWS_NITRO_ROOT_G1
    with pytest.raises(LocalError, match="root: expected"):
        Enclave(backend="nitro", root="mine")
    with pytest.raises(LocalError, match="a local enclave has its machine's own"):
        Enclave(root=own.hex())
