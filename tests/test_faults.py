"""It must bite: faults planted in the product (bench/faults.py), and the invariant that finds each. None is idle."""

import pytest

from bench.faults import FAULTS, TWO
from bench.planting import Fault, Line, by_hypothesis, by_swarm, hunt, planted
from mpc.fuzz import invariants
from mpc.fuzz.replay import play


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_the_fault_is_found(fault: Fault) -> None:
    """By an engine, in as many examples as CI has time for; and the product without it withstands the same attack."""
    with planted(fault):
        found = hunt(fault)
        assert found is not None
        assert found.invariant == fault.finds
        again = play(found.seed, fault.setting, found.moves)  # with the real cryptographic library
        assert again is not None
        assert again.invariant == fault.finds
    assert play(found.seed, fault.setting, found.moves) is None


def test_no_invariant_is_idle() -> None:
    assert {invariant.__name__ for invariant in invariants.INVARIANTS} <= {fault.finds for fault in FAULTS}
    assert len(FAULTS) >= 40
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)


def test_both_engines_find_something() -> None:
    assert {fault.engine for fault in FAULTS} == {"swarm", "hypothesis"}


@pytest.mark.parametrize("engine", [by_swarm, by_hypothesis])
def test_nothing_is_found_where_nothing_is_planted(engine: type) -> None:
    engine(TWO, (), 25, 0, [])


def test_a_fault_is_gone_afterwards_and_must_fit_the_source() -> None:
    fault = next(fault for fault in FAULTS if isinstance(fault.planted[0], Line))
    with (
        pytest.raises(AssertionError, match="0 times"),
        planted(Fault("", "", (Line(fault.planted[0].where, "no such", ""),), TWO)),
    ):  # type: ignore[union-attr]
        pass
    before = invariants.INVARIANTS
    with planted(fault):
        assert before != invariants.INVARIANTS
    assert before == invariants.INVARIANTS
    assert hunt(fault, most=5) is None
