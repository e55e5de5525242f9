"""The explorer: it visits all that there is, every row and refusal fires, and what is planted is found."""

import importlib
import inspect
import json
import textwrap
from functools import cache
from random import Random

import pytest

from mpc.cli.main import execute
from mpc.fuzz.adversaries import ADVERSARIES
from mpc.fuzz.doubles import doubles
from mpc.fuzz.explorer import Bounds, Exploration, Search, explore, naming
from mpc.fuzz.infrastructure import EnclaveActor
from mpc.fuzz.refusals import UNREACHABLE, Fired, Refusal, all_refusals, all_rows
from mpc.fuzz.stage import fork, situation
from mpc.fuzz.world import CRASH
from mpc.protocol import rounds
from mpc.protocol.messages import Computed

BY_NAME = {adversary.name: adversary for adversary in ADVERSARIES}
EXHAUSTED = sorted(set(BY_NAME) - {"all"})  # that one takes a minute
CHANGES = "self._session = after\n    if heard.name == Role.ENCLAVE.value:"
FORGETS = "isinstance(memory, Consented) or self._learn(memory)"
ROUNDS, PARTY, ENCLAVE = "mpc.protocol.rounds:Session", "parties.party:Party", "enclave_runtime.enclave:Enclave"


@cache
def explored(name: str) -> Exploration:
    """Once for all tests; without a fault."""
    return explore(BY_NAME[name])


@pytest.mark.parametrize("name", EXHAUSTED)
def test_every_state_is_visited_and_every_invariant_holds(name: str) -> None:
    seen = explored(name)
    assert seen.found is None
    assert seen.exhausted
    assert seen.frontier == 0
    assert seen.states > 100
    assert seen.transitions > seen.states
    assert seen.judged >= (1 if name == "mailbox" else 10)
    assert not BY_NAME[name].fair or seen.ended


def test_every_row_and_every_refusal_fires() -> None:
    """What never fires is either not reachable, and says why, or a defect of the explorer."""
    fired = Fired()
    for name in EXHAUSTED:
        fired.add(explored(name).fired)
    assert fired.rows == all_rows()
    assert all_refusals() - fired.refusals == set(UNREACHABLE)
    assert len(all_refusals()) > 30


def test_a_bound_is_a_bound_and_the_result_says_so() -> None:
    for bounds in (Bounds(depth=5), Bounds(states=500), Bounds(seconds=0.0)):
        seen = explore(BY_NAME["all"], bounds)
        assert not seen.exhausted
        assert seen.frontier
        assert seen.found is None
    assert explore(BY_NAME["order"], Bounds(depth=5)).depth == 5


def test_an_interrupted_search_says_how_far_it_came() -> None:
    def interrupt(seen: Exploration) -> None:
        raise KeyboardInterrupt

    seen = explore(BY_NAME["all"], progress=interrupt)
    assert seen.interrupted
    assert not seen.exhausted
    assert seen.states > 100
    assert seen.frontier


def test_the_same_search_finds_the_same_states() -> None:
    one, other = explored("late"), explore(BY_NAME["late"])
    assert (one.states, one.transitions, one.depth) == (other.states, other.transitions, other.depth)
    assert one.situations == other.situations


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_what_was_looked_up_is_what_a_machine_does_that_lived_through_all_of_it(name: str) -> None:
    """Were anything that matters missing from a situation, actors on another way to it would go on otherwise."""
    random = Random(name)
    with doubles(), naming():
        search = Search(BY_NAME[name])
        search.run(Exploration(BY_NAME[name]), Bounds(states=1000), 0.0, None)
        for _ in range(6):
            state, alive = search.first, [fork(actors[0]) for actors in search.actors]
            while steps := list(search.after(state)):
                after, (index, item, crash) = random.choice(steps)
                if index >= 0:
                    search.stage.now_ms = BY_NAME[name].times_ms[state[0]]
                    actor, thing = alive[index], search.items[item]
                    assert thing is not None
                    search.stage.collect()
                    actor.crash_in = None if crash < 0 else crash
                    assert search.happens(actor, thing)
                    actor.crash_in = None
                    if not actor.alive and not isinstance(actor, EnclaveActor):
                        search.crashed(actor)
                    assert search.collect(actor) | state[-1] == after[-1]
                    assert situation(actor) == situation(search.actors[index][after[index + 1]])
                state = after


# Faults.


def plant(monkeypatch: pytest.MonkeyPatch, where: str, line: str, instead: str) -> None:
    """Put another line into a function of the product: `module:function` or `module:Class.method`."""
    module_name, _, path = where.partition(":")
    owner = importlib.import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(line) == 1, f"{where} has {source.count(line)} times: {line}"
    made: dict[str, object] = {}
    exec(compile(source.replace(line, instead), where, "exec"), function.__globals__, made)
    monkeypatch.setattr(owner, name, made[name])


@pytest.mark.parametrize(
    ("where", "line", "instead", "adversary", "invariant"),
    [
        (f"{PARTY}.__init__", "self._learn(memory)", FORGETS, "crash", "one_function"),
        (f"{PARTY}._attested", "actions = self._remember(sealed)", "pass", "crash", "one_function"),
        (
            f"{PARTY}._attested",
            "if any(pins != earlier.pins for earlier in self._sealed.values()):",
            "if False:",
            "rewind",
            "one_function",
        ),
        (f"{PARTY}._tick", "if now_ms <= (", "if True or (", "late", "termination"),
        (
            "mpc.attestation.verify:_accepted_measurement",
            "    reasons = []",
            "    return policy.measurements[0]",
            "rogue",
            "appraisal",
        ),
        (
            f"{ROUNDS}._advance",
            "self.contract.approvals.quorum):",
            "self.contract.approvals.quorum - 1):",
            "approve",
            "release",
        ),
        (
            f"{ROUNDS}._advance",
            "len(self._speakers(rule.speaker))",
            "max(1, len(self._speakers(rule.speaker)) - 1)",
            "order",
            CRASH,
        ),
        (f"{ROUNDS}._check_decision", "_same(", "(lambda *_: None)(", "approve", "release"),
        (
            f"{ENCLAVE}._compute_when_ready",
            "if self._commitment(contract, name) != consent.commitment:",
            "if False:",
            "forge",
            "integrity",
        ),
        (f"{ENCLAVE}._compute_when_ready", "blamed=name", "blamed=contract.parties[0]", "forge", "blame"),
        (f"{ENCLAVE}._close", "self._signing = self._opening = None", "pass", "order", "erasure"),
        (f"{ENCLAVE}._hear", "if heard.name == Role.ENCLAVE.value:", CHANGES, "split", "first check, then change"),
        (f"{ENCLAVE}._open", "if chunk.index in table.leaves:", "if table.leaves[chunk.index]:", "order", CRASH),
    ],
)
def test_a_planted_fault_is_found(
    where: str, line: str, instead: str, adversary: str, invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, where, line, instead)
    found = explore(BY_NAME[adversary], Bounds(states=30_000)).found
    assert found is not None
    assert found.invariant == invariant
    assert found.story


def test_a_row_that_is_missing_keeps_the_session_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {place: rows if Computed not in rows else {} for place, rows in rounds.RULES.items()}
    monkeypatch.setattr(rounds, "RULES", missing)
    seen = explore(BY_NAME["order"])
    assert seen.found is not None
    assert "computed" in seen.fired.rows_missing


@pytest.mark.parametrize(
    ("where", "line", "instead", "adversary", "refusal"),
    [
        (
            f"{PARTY}._attested",
            "if sealed is not None and open_signed(",
            "if False and open_signed(",
            "split",
            Refusal("party", "_attested", "a second enclave in one epoch"),
        ),
        (
            f"{ROUNDS}._check_round",
            "if not allowed:",
            "if False:",
            "late",
            Refusal("rounds", "_check_round", "… in round …"),
        ),
    ],
)
def test_a_check_that_is_gone_never_fires(
    where: str, line: str, instead: str, adversary: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another check stands behind it, so that no invariant breaks."""
    assert refusal in explored(adversary).fired.refusals
    plant(monkeypatch, where, line, instead)
    seen = explore(BY_NAME[adversary], Bounds(states=20_000))
    assert refusal in seen.fired.refusals_missing


def test_the_story_is_the_shortest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, f"{PARTY}.__init__", "self._learn(memory)", FORGETS)
    found = explore(BY_NAME["crash"]).found
    assert found is not None
    assert len(found.story) == 3
    consents, dies, consents_again = found.story
    assert "remember Committed, remember Consented, consent" in consents
    assert dies == "party-0: restart"
    assert "does remember Consented, consent" in consents_again


# The command.


def test_the_command_says_what_was_proven(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["explore", "late"]) == 0
    said = capsys.readouterr().out
    assert "held" in said
    assert "frontier empty" in said
    assert "the clock passes each deadline" in said


def test_the_command_says_where_it_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["explore", "--moves", "crash,time,epochs", "--depth", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (one,) = said["adversaries"]
    assert (said["status"], said["complete"], one["exhausted"], one["depth"]) == ("held", False, False, 4)
    assert one["frontier"] > 0
    assert "two parties" not in one["bound"]
    assert set(one["situations"]) == {"party-0", "party-1", "enclave-0", "enclave-1"}


def test_the_command_fails_when_an_invariant_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, f"{PARTY}._tick", "if now_ms <= (", "if True or (")
    assert execute(["explore", "late", "--json"]) == 1
    out = capsys.readouterr()
    said = json.loads(out.out)
    assert said["status"] == "broken"
    assert said["adversaries"][0]["broken"]["invariant"] == "termination"
    assert "The shortest way there" in out.err


@pytest.mark.parametrize("arguments", [["nobody"], ["--moves", "fly"], ["late", "--moves", "time"], ["--states", "0"]])
def test_wrong_arguments_are_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["explore", *arguments]) == 2
    assert "mpc explore --help" in capsys.readouterr().err
