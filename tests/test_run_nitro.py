"""`mpc run` of a scenario with `backend = "nitro"`, whole, against a stand-in for nitro-cli.

The enclave is a process that runs the application from the image's ramdisk, under the system calls that our /init
allows, with a Unix socket in the place of vsock and a simulated NSM, whose root the scenario names.
"""

import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from nitro_instance import Instance
from runs import House, Plays, Run, Staff, kill, result, staff

from mpc.attestation.roots import AWS_NITRO_ROOT_G1
from mpc.host.simulated_root import SimulatedRoot
from mpc.image.measure import measure
from mpc.protocol.contract import Contract
from mpc.protocol.signing import open_signed
from parties import policy

plays = Plays()
TESTS = Path(__file__).parent


@dataclass
class Site:
    """What the plays share: a scenario, and an image with a kernel of sorts."""

    staff: Staff
    image: Path


SITE: list[Site] = []


@pytest.fixture(scope="module", autouse=True)
def _site(tmp_path_factory: pytest.TempPathFactory, house: House) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("nitro")
    for name in ("kernel", "ramdisk"):
        (folder / name).write_bytes(name.encode() * 16)
    built = house.mpc(
        *("image", "build", "--backend", "nitro", "--kernel", folder / "kernel", "--cmdline", "reboot=k"),
        *("--ramdisk", folder / "ramdisk", "-o", folder / "image.eif"),
    )
    assert built.status == 0, built.err
    given = staff(folder / "staff")
    enclave = '[enclave]\nbackend = "nitro"\nroot = "aws-nitro-enclaves-g1"\ncpus = 2\nmemory = "1500 MiB"'
    SITE[:] = [Site(Staff(given.folder, given.text.replace("[enclave]", enclave)), folder / "image.eif")]
    yield
    for large in (folder, *house.folder.glob("*/memory-*")):
        shutil.rmtree(large)


def start(house: House, *options: str, root: bytes | None = None, **pool: object) -> tuple[Run, Instance]:
    """`mpc run` on an instance; `root`: that of the scenario, by default the machine's simulated one."""
    instance = Instance(house.new_folder())
    instance.has(**{"memory_mib": 4096, "enclave": "computes", **pool})
    own = root or SimulatedRoot.load_or_create(house.folder / "state" / "enclave-mpc").fingerprint
    scenario = SITE[0].staff.file(f"{own.hex()[:8]}.toml", root=f'"{own.hex()}"')
    plant = f"""
import os, sys
sys.path.append({str(TESTS)!r})
os.environ["NITRO_STANDIN"] = {str(instance.folder)!r}
os.environ["PATH"] = {str(instance.folder / "bin")!r} + ":" + os.environ["PATH"]
from pathlib import Path
from nitro_instance import UnixVsock
from mpc.host import nitro
nitro.DEVICE, nitro.LOOK_S = Path({str(instance.device)!r}), 0.1
nitro.listen = lambda: UnixVsock(Path({str(instance.folder / "vsock")!r}))
"""
    return house.run(scenario, "--image", str(SITE[0].image), *options, plant=plant), instance


@plays
def a_result_is_released(house: House) -> None:
    """Under the scenario's root; strangers on the channel's port, before the enclave, change nothing."""
    run, instance = start(house, enclave="computes after strangers")
    with run:
        done = run.wait()
    assert done.status == 0, done.err
    assert result(run, "ada") == result(run, "bert")
    assert [row[0] for row in result(run, "ada")] == [row[0] for row in SITE[0].staff.expected]
    (call,) = instance.calls("run-enclave")
    given = dict(zip(call[1::2], call[2::2], strict=True))
    assert (given["--cpu-count"], given["--memory"], given["--eif-path"]) == ("2", "1500", str(SITE[0].image))
    assert "--debug-mode" not in call
    measured = measure(SITE[0].image)
    contract = Contract.decode(open_signed((run.folder / "contract.cbor").read_bytes()).payload)
    (one,) = contract.enclave.measurements
    assert (one.pcr0, one.pcr1, one.pcr2) == (measured.pcr0, measured.pcr1, measured.pcr2)
    for name in ("ada", "bert", "cora"):
        (accepted,) = policy.load(run.folder / name / "policy.toml").measurement
        assert accepted.accepted.pcrs == measured.pcrs
    verified = house.mpc("verify", run.folder / "ada" / "receipt.cbor")
    assert verified.status == 0, verified
    assert "SIMULATED" in verified.out
    assert "SIMULATED" in done.out


@plays
def the_root_is_aws_unless_the_scenario_names_another(house: House) -> None:
    """Nobody seals to an enclave under a root that nobody named, whatever its measurements are."""
    run, _ = start(house, root=AWS_NITRO_ROOT_G1)
    with run:
        done = run.wait()
    assert done.status == 1
    assert "No data was sent." in done.err
    assert "root" in done.err
    (root,) = policy.load(run.folder / "ada" / "policy.toml").root
    assert (bytes.fromhex(root.fingerprint), root.simulated) == (AWS_NITRO_ROOT_G1, False)
    assert not run.sealed()


@plays
def debug_mode_is_loud_and_no_party_accepts_it(house: House) -> None:
    console = house.new_folder() / "console"
    run, instance = start(house, "--console", str(console))
    with run:
        done = run.wait()
    assert done.status == 1
    assert done.err.startswith("DEBUG MODE: this instance reads the enclave's console")
    assert "the enclave runs in debug mode" in done.err
    assert "No data was sent." in done.err
    assert "--debug-mode" in instance.calls("run-enclave")[0]
    assert "Linux version" in console.read_text()
    assert not run.sealed()


@plays
def a_host_that_starts_it_in_debug_mode_by_itself(house: House) -> None:
    run, _ = start(house, debug=True)
    with run:
        done = run.wait()
    assert done.status == 1
    assert "the enclave runs in debug mode" in done.err
    assert "DEBUG MODE" not in done.err
    assert not run.sealed()


@plays
def an_enclave_that_dies_starting_and_one_that_dies_later(house: House) -> None:
    """Each is lost, and the third computes."""
    run, instance = start(house, enclave=["dies while it starts", "computes", "computes"])
    with run:
        run.until_said("attestation")
        (enclave,) = [int(path.name.split("-")[1]) for path in instance.folder.glob("memory-*")]
        kill(enclave)
        done = run.wait()
    assert done.status == 0, done.err
    assert "the enclave ended before its application connected" in done.err
    assert "epoch 2 begins" in done.err
    assert "epoch 3 begins" in done.err
    assert len(instance.calls("run-enclave")) == 3


@plays.each(
    memory=({"memory_mib": 1024}, "E27, Insufficient memory available", "allocator.yaml"),
    device=({"device": "broken"}, "/dev/nitro_enclaves", "modprobe nitro_enclaves"),
    rubbish=({"cli": "prints rubbish"}, "nitro-cli run-enclave printed no JSON", "1.2 or later"),
    killed=({"cli": "dies"}, "nitro-cli run-enclave was ended by a signal (Killed)", ""),
)
def a_nitro_cli_that_fails(house: House, pool: dict[str, object], what: str, remedy: str) -> None:
    run, instance = start(house, **({"enclave": "computes"} | pool))
    with run:
        done = run.wait()
    assert done.status == 2, done.err
    assert what in done.err
    assert remedy in done.err
    assert not run.folder.exists()
    assert not list((instance.folder / "running").iterdir())


@plays
def a_stop_ends_the_enclave(house: House) -> None:
    run, instance = start(house)
    with run:
        run.until_said("attestation")
        run.process.send_signal(signal.SIGINT)
        done = run.wait()  # and nothing of it is left, the enclave included
    assert done.status == 130, done.err
    assert instance.calls("describe-enclaves")  # it was ended, unless it had ended itself


@plays
def without_nitro_cli_or_an_image(house: House) -> None:
    scenario = SITE[0].staff.file("bare.toml")
    with house.run(scenario) as run:
        done = run.wait()
    assert done.status == 2
    assert done.err.startswith("mpc: the nitro backend launches with nitro-cli, which is not here: run it on an EC2")
    assert not run.folder.exists()
    checked = house.mpc("check", scenario)
    assert checked.status == 0
    assert "under the root aws-nitro-enclaves-g1" in checked.out
    assert "`mpc run` cannot do that here: the nitro backend launches with nitro-cli" in " ".join(checked.out.split())


@pytest.mark.parametrize("play", plays.found)
def test_a_run(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()
