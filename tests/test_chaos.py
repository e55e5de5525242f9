"""Chaos in small: `make chaos` plays more of it. See tests/chaos.py."""

import signal
from concurrent.futures import Future

import pytest
from chaos import Chaos, Plan
from runs import House, Plays, kill

plays = Plays()
SEEDS = range(1, 22)
ALL: dict[str, Chaos] = {}


@pytest.fixture(scope="module", autouse=True)
def _chaos(house: House, tmp_path_factory: pytest.TempPathFactory) -> None:
    ALL["chaos"] = Chaos(house, tmp_path_factory.mktemp("chaos"))


@plays.each(**{f"seed {seed}": (seed,) for seed in SEEDS})
def chaos(house: House, seed: int) -> None:
    ALL["chaos"].play(seed)


@plays
def the_coordinator_stands_still_before_anybody_knows_the_contract(house: House) -> None:
    """Seed 97 found it: nobody but `mpc run` itself had a deadline then."""
    with house.run(ALL["chaos"].given[False].file("frozen.toml", consent='"4 s"'), "--json") as run:
        kill(run.piece("coordinator"), signal.SIGSTOP)
        done = run.wait()
    assert (done.status, done.json["status"]) == (1, "refused")
    assert done.json["reason"] == "the coordinator: not heard, and nobody could consent within 4 s (deadlines.consent)"


@pytest.mark.parametrize("play", plays.found)
def test_chaos_ends_in_the_exact_result_or_a_named_abort(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()


def test_a_seed_is_a_plan() -> None:
    plans = [Plan.draw(seed) for seed in range(200)]
    assert plans == [Plan.draw(seed) for seed in range(200)]
    assert {fault.who for plan in plans for fault in plan.faults} == {
        *("coordinator", "host", "enclave", "ada", "bert", "cora")
    }
    assert {fault.what for plan in plans for fault in plan.faults} == {"kill", "stop", "freeze", "full disk"}
    assert sum(plan.cut for plan in plans) > 40
    assert 60 < sum(plan.long for plan in plans) < 140
