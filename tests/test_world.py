"""The machines together: fair runs, crashes at every point, and seeded adversaries."""

from collections.abc import Iterator

import pytest

from mpc.fuzz.facts import Accepted, Computing, Released, Seen
from mpc.fuzz.moves import MOVES, attack, verifying_once
from mpc.fuzz.world import RELEASE_MS, START_MS, Setting, World
from mpc.protocol.rounds import Round
from mpc.receipt import verify_receipt
from parties.party import Consented, Sealed

TWO = Setting(parties=2)


@pytest.fixture(autouse=True)
def _verify_once() -> Iterator[None]:
    with verifying_once():
        yield


def released(world: World) -> bool:
    return all(got for got, _ in world.endings().values()) and len(world.endings()) == len(world.parties)


@pytest.mark.parametrize(
    "setting",
    [
        *(Setting(parties=count) for count in range(1, 6)),
        Setting(parties=2, wide=True, long=True, receivers=1),
        Setting(parties=2, approvers=3, quorum=2),
        Setting(parties=1, approvers=1, quorum=0, receivers=2),
    ],
    ids=str,
)
def test_a_fair_session_ends_with_one_result_and_receipts_that_verify(setting: Setting) -> None:
    world = World(7, setting)
    world.fair()
    assert released(world), world.endings()
    assert world.coordinator.mailbox.ended is not None
    assert world.coordinator.mailbox.ended.outcome == "released"
    (fact,) = world.of(Released)
    assert {name: result[:48] for name, result in fact.results.items()} == dict.fromkeys(
        world.contract.recipients, next(iter(fact.results.values()))[:48]
    )
    accepted = {one.name: one for one in world.of(Accepted)}
    assert set(accepted) == set(world.parties)
    for name, one in accepted.items():
        assert one.result == fact.results.get(name)
        account = verify_receipt(one.release, world.policy)
        assert [party.name for party in account.parties] == list(world.contract.parties)
        assert len(account.approved_by) == setting.quorum


def test_the_same_seed_gives_the_same_events() -> None:
    for seed in range(5):
        assert attack(seed).story == attack(seed).story
    assert attack(1).story != attack(2).story


def test_what_a_wire_shows_of_a_table_is_its_padded_size() -> None:
    world = World(3, Setting(parties=1, long=True))
    world.fair()
    boxes = [len(box) - 16 for box in world.coordinator.kept.values()]
    assert {box for box in world.coordinator.kept.values()} <= {bytes(fact.data) for fact in world.of(Seen)}
    assert sorted(boxes) == [4096, 1 << 16, 1 << 20, 1 << 20]  # the result; the last chunk of the table; its others


# Crashes. What is on a disk survives, nothing else.


@pytest.mark.parametrize("name", ["party-0", "receiver-0"])
def test_a_party_that_dies_between_any_two_actions_goes_on(name: str) -> None:
    for actions in range(30):
        world = World(actions, Setting(parties=2, receivers=1, wide=True))
        world.parties[name].crash_in = actions
        world.fair()
        assert released(world), (actions, world.endings())
        if not any("is killed between" in line for line in world.story):
            break
    assert actions > 2
    assert actions < 29


@pytest.mark.parametrize("first", range(4))
def test_anybody_may_die_at_any_moment_and_the_session_goes_on(first: int) -> None:
    """Epochs are enough here for one death; which step it comes at runs over all of them, for each of them."""
    for step in range(first, 48, 4):
        for name in ("party-1", "coordinator", "enclave"):
            world = World(step, TWO)
            for _ in range(step):
                world.fair_step()
            if name == "enclave":
                world.kill_enclave(world.enclaves[0])
            else:
                world.actors[name].kill()
            world.fair()
            assert released(world), (step, name, world.endings())


def test_an_enclave_that_is_lost_too_often_ends_the_session() -> None:
    world = World(1, Setting(parties=2, epochs_max=2))
    for enclave in range(2):
        world.until(lambda: len(world.enclaves) > enclave and world.enclaves[enclave].binding)  # noqa: B023
        world.kill_enclave(world.enclaves[enclave])
    world.fair()
    assert {why for _, why in world.endings().values()} == {
        "the coordinator ended the session: enclave lost, 2 times, the contract's limit"
    }


def test_a_party_that_starts_again_while_approvers_think_still_gets_its_result() -> None:
    """By then the deadlines for consent and seal, and the age at which documents are accepted, are long past."""
    world = World(2, Setting(parties=2, receivers=1, approvers=1, quorum=1))
    approver = world.approvers["approver-0"]
    approver.silent = True
    world.until(lambda: world.coordinator.mailbox.session.round is Round.APPROVE and not world.ready())
    world.now_ms = START_MS + RELEASE_MS - 1000
    for name in world.parties:
        world.parties[name].kill()
        world.parties[name].start()
    while world.fair_step():
        world.advance(1)
    assert not world.endings()
    approver.silent = False
    world.fair()
    assert released(world), world.endings()


def test_a_coordinator_that_starts_again_after_the_release_still_serves_results() -> None:
    world = World(2, TWO)
    world.until(lambda: world.coordinator.mailbox.session.round is Round.CLOSE)
    assert any(stream >= len(world.contract.tables) for _, stream, _ in world.coordinator.chunks)
    world.coordinator.kill()
    world.fair()
    assert released(world), world.endings()


def test_a_recipient_whose_disk_is_full_ends_alone() -> None:
    from parties.party import Withdraw

    world = World(4, TWO)
    party = world.parties["party-1"]
    world.until(lambda: party.keeping)
    party.keeping = None
    party.handle(Withdraw("withdrawn", "the result cannot be kept: no space"))
    assert world.endings()["party-1"] == (False, "the result cannot be kept: no space")
    party.start()  # there is space again, and it is still to be had
    world.fair()
    assert released(world), world.endings()


def test_every_epoch_meets_the_same_commitments_with_new_keys() -> None:
    world = World(5, TWO)
    world.until(lambda: sum(isinstance(memory, Sealed) for memory in world.parties["party-0"].ledger))
    world.kill_enclave(world.enclaves[0])
    world.fair()
    assert released(world)
    memories = world.parties["party-0"].ledger
    sealed = [memory for memory in memories if isinstance(memory, Sealed)]
    assert [memory.epoch for memory in sealed] == [1, 2]
    assert sealed[0].pins == sealed[1].pins
    assert not set(sealed[0].keys) & set(sealed[1].keys)
    assert len({memory.envelope for memory in memories if isinstance(memory, Consented)}) == 2


# Seeded adversaries: an invariant that does not hold raises.


@pytest.mark.parametrize("part", range(8))
def test_no_seeded_adversary_breaks_an_invariant(part: int) -> None:
    reached = 0
    for seed in range(part * 25, part * 25 + 25):
        reached += len(attack(seed).of(Computing))
    assert reached  # not all of them are stopped at the door


def test_every_kind_of_move_is_drawn_and_does_something() -> None:
    assert all(kind.weight > 0 and (kind.play.__doc__ or "").strip() for kind in MOVES.values())
    assert len(MOVES) >= 25
