"""Processes of a run are killed, stopped, starved or interrupted: it goes on, or ends in words, and leaves nothing."""

import random
import resource
import signal
import time
from concurrent.futures import Future
from math import isclose

import pytest
from runs import (
    POLL_S,
    SLOW_KEEPER,
    SLOW_READER,
    SLOW_STORE,
    Done,
    House,
    Plays,
    Run,
    Staff,
    gone,
    kill,
    result,
    staff,
    stopped,
    until,
)

from mpc.protocol.messages import Attestation
from mpc.protocol.signing import open_signed

plays = Plays()
LARGE_ROWS = 300_000  # about 40 chunks
INPUT_CHUNKS = 3  # of the large table: sealing is under way
DELAYS = [random.Random(20).uniform(0, 1.5) for _ in range(6)]  # seconds after the run has begun


@pytest.fixture(scope="module", autouse=True)
def _scenarios(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("staff")
    SCENARIOS["small"] = staff(folder / "small")
    SCENARIOS["large"] = staff(folder / "large", LARGE_ROWS)


SCENARIOS: dict[str, Staff] = {}


def small(house: House, plant: str = "", **changes: str) -> Run:
    return _run(house, SCENARIOS["small"], plant, changes)


def large(house: House, plant: str = "", **changes: str) -> Run:
    return _run(house, SCENARIOS["large"], plant, changes)


def _run(house: House, given: Staff, plant: str, changes: dict[str, str]) -> Run:
    name = "-".join(["scenario", *changes, *changes.values()]).replace(" ", "").replace('"', "")
    return house.run(given.file(f"{name}.toml", **changes), plant=plant)


def prepared(run: Run, name: str) -> None:
    """That party knows the contract, and reads its table."""
    run.until((run.folder / name / "policy.toml").exists, f"{name} knows the contract")


def sealing(run: Run) -> None:
    """The large table is on its way."""
    run.until(lambda: len(run.chunks()) >= 2 + INPUT_CHUNKS, "chunks of the large table")


def assert_refused(run: Run, done: Done, *words: str) -> None:
    """It ended before anything was sealed, for this reason."""
    assert done.status == 1, done.err
    assert done.err.splitlines()[-2].startswith("mpc: refused: ")
    assert "No data was sent." in done.err
    assert all(word in done.err for word in words), done.err
    assert not run.sealed()
    assert not list(run.folder.glob("*/re*"))


def assert_aborted(run: Run, done: Done, *words: str) -> None:
    """It ended after something was sealed; what was is deleted."""
    assert done.status == 1, done.err
    assert done.err.splitlines()[-2].startswith("mpc: aborted: ")
    assert all(word in done.err for word in words), done.err
    assert "was started again" not in done.err  # nothing else fell over
    assert run.sealed()
    assert not list(run.folder.glob("*/re*"))


def assert_released(run: Run, given: Staff, done: Done, epoch: int = 1) -> None:
    """Every recipient has the exact result, and a receipt of that epoch that verifies."""
    assert done.status == 0, done.err
    for name in ("ada", "bert"):
        rows = result(run, name)
        assert [(level, people) for level, _, people in rows] == [
            (level, people) for level, _, people in given.expected
        ]
        assert all(isclose(row[1], own[1], rel_tol=1e-12) for row, own in zip(rows, given.expected, strict=True))
    assert {attested_epoch(run, name) for name in ("ada", "bert", "cora")} == {epoch}
    verified = run.house.mpc("verify", run.folder / "cora" / "receipt.cbor", "--json")
    assert (verified.status, verified.json["status"]) == (0, "accepted"), verified


def attested_epoch(run: Run, name: str) -> int:
    """Of the one attestation in that party's receipt."""
    kinds = [open_signed(envelope) for envelope in run.receipt(name).receipt.history]
    (attestation,) = (Attestation.decode(one.payload) for one in kinds if one.kind == "attestation")
    return attestation.epoch


# Parties.


@plays
def a_party_dies_before_it_starts(house: House) -> None:
    with small(house) as run:
        kill(run.piece("bert"))
        assert_refused(run, run.wait(), "bert: its process ended (killed by SIGKILL)")


@plays
def a_party_dies_before_it_consents(house: House) -> None:
    with small(house, SLOW_READER) as run:
        prepared(run, "bert")
        kill(run.piece("bert"))
        done = run.wait()
        assert ("consent", "bert") not in run.said()
        assert_refused(run, done, "bert: its process ended (killed by SIGKILL)")


@plays
def a_party_dies_after_it_consented(house: House) -> None:
    with small(house, SLOW_READER) as run:
        prepared(run, "ada")
        with stopped(run.piece("ada")):
            run.until_said("consent", "bert")
            kill(run.piece("bert"))
        assert_refused(run, run.wait(), "bert: its process ended (killed by SIGKILL)")


@plays
def a_party_dies_in_the_middle_of_sealing(house: House) -> None:
    with large(house, SLOW_STORE) as run:
        sealing(run)
        kill(run.piece("cora"))
        done = run.wait()
        assert ("computed", "") not in run.said()
        assert_aborted(run, done, "cora: its process ended (killed by SIGKILL)")
        assert not run.chunks()


@plays
def a_party_never_comes(house: House) -> None:
    with small(house, SLOW_READER, consent='"4 s"') as run:
        prepared(run, "bert")
        with stopped(run.piece("bert")):
            done = run.wait()
        assert_refused(run, done, "bert: not heard in round consent, whose deadline is 4 s (deadlines.consent)")


@plays
def a_party_falls_silent_in_the_middle_of_sealing(house: House) -> None:
    with large(house, SLOW_STORE, consent='"5 s"', seal='"6 s"') as run:
        sealing(run)
        with stopped(run.piece("cora")):
            done = run.wait()
        assert_aborted(run, done, "cora: its input had not arrived whole", "6 s (deadlines.seal)")


# The enclave and its host.


@plays
def the_enclave_is_killed_before_and_after_inputs(house: House) -> None:
    with large(house, SLOW_READER + SLOW_STORE) as run:
        prepared(run, "bert")
        bert, cora = run.piece("bert"), run.piece("cora")
        with stopped(bert):
            run.until_said("consent", "cora")
            kill(cora, signal.SIGSTOP)
        run.until_said("attestation")
        with stopped(bert):
            first = run.enclave()
            kill(first)
            run.until_said("epoch")
            kill(cora, signal.SIGCONT)
            run.until_said("consent", "cora", times=2)
            second = run.until(lambda: (pid := run.enclave()) != first and pid, "another enclave")
        run.until_said("attestation", times=2)
        with stopped(second):
            run.until_said("seal", "cora")
            run.until(lambda: len(run.chunks()) > 2 * INPUT_CHUNKS, "chunks")
            kill(second)
        done = run.wait()
        assert_released(run, SCENARIOS["large"], done, epoch=3)
        assert "the enclave was lost; epoch 2 begins, with new consents" in done.err
        assert [kind for kind, _ in run.said()].count("consent") == 9


@plays
def the_enclave_is_killed_more_often_than_the_contract_allows(house: House) -> None:
    with large(house, SLOW_STORE, epochs="2") as run:
        for times in (1, 2):
            run.until_said("attestation", times=times)
            kill(run.enclave())
        done = run.wait()
        assert done.status == 1
        assert "the enclave was lost, 2 times, the contract's limit" in done.err
        assert run.said()[-1] == ("ended", "enclave lost")


@plays
def the_host_is_killed(house: House) -> None:
    with large(house, SLOW_STORE) as run:
        sealing(run)
        enclave = run.enclave()
        house.left_images += 1
        kill(run.piece("host"))
        until(lambda: gone(enclave), "the enclave dies with its host")
        done = run.wait()
        assert "the host ended (killed by SIGKILL) and was started again" in done.err
        assert_released(run, SCENARIOS["large"], done, epoch=2)


# Kills every enclave whose number is among those chosen, once it has been started and before it can answer.
KILL_STARTING = """
import os, signal
from mpc.host import sandbox

def start(*given, count=[], started=sandbox.start):
    process = started(*given)
    count.append(process)
    if len(count) in CHOSEN:
        process.kill()
    return process

sandbox.start = start
"""


@plays
def the_first_enclave_is_killed_while_it_starts(house: House) -> None:
    """Before there is a session, and so an epoch to lose it in."""
    with small(house, KILL_STARTING.replace("CHOSEN", "(1, 2)")) as run:
        done = run.wait()
        assert done.err.count("the enclave was killed while it was starting") == 2
        assert "the enclave was lost; epoch 3 begins, with new consents" in done.err
        assert_released(run, SCENARIOS["small"], done, epoch=3)


@plays
def every_enclave_is_killed_while_it_starts(house: House) -> None:
    with small(house, KILL_STARTING.replace("CHOSEN", "range(9)"), epochs="2") as run:
        done = run.wait()
        assert_refused(run, done, "the enclave was lost, 2 times, the contract's limit")
        assert done.err.count("the enclave was killed while it was starting") == 2


@plays
def an_enclave_that_says_what_it_lacks_is_not_tried_again(house: House) -> None:
    with small(house, "from mpc.host import sandbox; sandbox.DESCRIPTORS_MAX = 6") as run:
        done = run.wait()
        assert done.status == 2
        assert "the enclave did not start: " in done.err


# The coordinator.


@plays
def the_coordinator_is_killed_three_times(house: House) -> None:
    with large(house, SLOW_READER) as run:
        prepared(run, "ada")
        kill(run.piece("coordinator"))
        run.until_said("attestation")
        with stopped(run.piece("host")):  # so that the enclave waits
            kill(run.piece("coordinator"))
            sealing(run)
            killed = run.piece("coordinator")
            kill(killed)
            run.until(lambda: run.piece("coordinator") != killed, "another coordinator")
        done = run.wait()
        assert done.err.count("the coordinator ended (killed by SIGKILL) and was started again") == 3
        assert_released(run, SCENARIOS["large"], done)


@plays
def the_coordinator_is_killed_again_and_again(house: House) -> None:
    with small(house, SLOW_READER) as run:
        killed: set[int] = set()

        def look() -> bool:
            if run.process.poll() is None and (pid := run.piece("coordinator")) not in killed:
                killed.add(pid)
                kill(pid)
            return len(killed) == 4

        run.until(look, "four coordinators")
        assert_refused(run, run.wait(), "the coordinator ended again and again (killed by SIGKILL)")


@plays
def the_coordinators_disk_is_full_for_chunks(house: House) -> None:
    with large(house, SLOW_READER) as run:
        prepared(run, "cora")
        resource.prlimit(run.piece("coordinator"), resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
        done = run.wait()
        assert_aborted(run, done, "cora: the coordinator refuses this party's input", "free space there")


@plays
def the_coordinators_disk_is_full_for_its_log(house: House) -> None:
    with small(house, SLOW_READER, consent='"5 s"') as run:
        prepared(run, "bert")
        resource.prlimit(run.piece("coordinator"), resource.RLIMIT_FSIZE, (1, 1))
        assert_refused(run, run.wait(), "the coordinator cannot write its log")


# The person, and the parent.


@plays.each(
    **{f"SIGINT after {delay:.2f} s": (signal.SIGINT, "", delay) for delay in DELAYS},
    **{
        f"SIGINT at {kind}": (signal.SIGINT, kind, 0.0)
        for kind in ("contract", "consent", "attestation", "seal", "release")
    },
    **{"SIGTERM at consent": (signal.SIGTERM, "consent", 0.0), "SIGHUP at seal": (signal.SIGHUP, "seal", 0.0)},
)
def a_stop(house: House, number: signal.Signals, kind: str, delay: float) -> None:
    with small(house, SLOW_KEEPER if kind else "") as run:
        if kind:
            run.until_said(kind)
        else:
            run.until(run.folder.exists, "it has begun")
            time.sleep(delay)  # any moment will do
        run.process.send_signal(number)
        done = run.wait()
        if not kind and run.folder.exists():  # it was through
            assert result(run, "bert") == result(run, "ada")
            assert done.status in (0, 130, -number)
            return
        assert_interrupted(run, done)


@plays
def an_impatient_person(house: House) -> None:
    """What tidies up is not interrupted in its turn."""
    with small(house, SLOW_KEEPER) as run:
        run.until_said("seal")
        for _ in range(20):
            run.process.send_signal(signal.SIGINT)
            time.sleep(POLL_S)
        assert_interrupted(run, run.wait())


def assert_interrupted(run: Run, done: Done) -> None:
    assert done.status == 130, done
    assert done.err.endswith("Interrupted. Every process is stopped, and nothing is left behind.\n")
    assert not done.out
    assert not run.folder.exists()


@plays
def the_parent_is_killed(house: House) -> None:
    with small(house, SLOW_READER) as run:
        prepared(run, "ada")
        enclave = run.enclave()
        house.left_images += 1
        kill(run.process.pid)
        run.process.wait()
        until(lambda: not run.processes(), "its processes die with it", seconds=10)
        until(lambda: gone(enclave), "the enclave, too", seconds=10)


@pytest.mark.parametrize("play", plays.found)
def test_a_fault(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()
