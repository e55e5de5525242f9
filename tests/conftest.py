"""What tests of real processes share."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from runs import House, Plays


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Runs of `mpc run` with a cache and a simulated root of their own; nothing is left of them afterwards."""
    house = House(tmp_path_factory.mktemp("h"))
    yield house
    house.close()


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, house: House) -> Iterator[dict[str, Future[None]]]:
    """The plays of the module that were asked for, all under way: a few at once."""
    plays: Plays = request.module.plays
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    wanted = [item.callspec.params["play"] for item in items if "play" in getattr(item, "fixturenames", ())]
    with plays.started(wanted, house) as futures:
        yield futures
