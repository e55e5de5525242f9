"""The engines' common parts: moves, coverage, Hypothesis' search, replay files, stories, and docs/FUZZING.md."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.faults import FAULTS, TWO
from bench.planting import hunt, planted
from mpc.fuzz import coverage, inside, invariants, outside
from mpc.fuzz.doubles import doubles
from mpc.fuzz.facts import Broken, Released, opened
from mpc.fuzz.moves import MOVES, attack, verifying_once
from mpc.fuzz.replay import Counterexample, play, read, write
from mpc.fuzz.setting import PACE, SETTLE, Move, Setting
from mpc.fuzz.stateful import Search, TimeIsUp
from mpc.fuzz.story import tell
from mpc.fuzz.world import World
from mpc.protocol.errors import LocalError
from mpc.protocol.messages import KINDS

ROOT = Path(__file__).parents[1]
REWIND = next(fault for fault in FAULTS if fault.what == "the commitments of an earlier epoch are forgotten")
OWN = {name for name, kind in MOVES.items() if kind.play.__module__ in (inside.__name__, outside.__name__)}


# Moves.


def test_each_move_does_something_somewhere() -> None:
    """Alone, in sessions with everybody in them, at some moment."""
    crowd = Setting(
        parties=3, receivers=1, approvers=2, quorum=2, wide=True, corrupt=frozenset({"party-1", "approver-0"})
    )
    idle = set(OWN)
    with doubles():
        for seed in range(12):
            for name in sorted(idle):
                world = World(seed, crowd)
                world.compute_ms = 1
                for _ in range(8 * seed):
                    world.fair_step()
                before = outline(world)
                try:
                    world.step(Move(name, seed))
                except Broken as broken:
                    pytest.fail(f"{name}: {broken}")
                if outline(world) != before:
                    idle.discard(name)
    assert not idle


def outline(world: World) -> Any:
    wires = {name: list(wire) for name, wire in world.wires.items()}
    actors = {a.name: (a.alive, a.silent, a.skew_ms, a.crash_in) for a in world.actors.values()}
    return wires, actors, len(world.facts), len(world.story), world.now_ms, world.compute_ms


def test_moves_say_what_they_are_and_are_drawn() -> None:
    assert len(OWN) >= 37
    for kind in MOVES.values():
        assert kind.weight > 0
        assert (kind.play.__doc__ or "").strip().endswith(".")


def test_another_session_of_the_same_people_is_honest_and_other() -> None:
    world = World(3, TWO)
    other = world.another()
    assert other.of(Released)
    assert other.contract.digest != world.contract.digest
    assert other.keys["party-0"].signing.public == world.keys["party-0"].signing.public
    assert other.parties["party-0"].tables == world.parties["party-0"].tables
    assert other.parties["party-1"].tables != world.parties["party-1"].tables
    world.fair()
    consents = {one for each in (world, other) for one in each.said("consent")}
    assert len(consents) == 4


def test_the_adversary_signs_with_no_key_of_an_honest_participant() -> None:
    for seed in range(12):
        world = attack(seed, 25, setting=TWO)
        said = {fact.signed.digest for fact in world.facts if hasattr(fact, "signed")}
        with verifying_once():
            pools = [e for e in world.pool if e not in world.another().pool]
        honest = world.keys["party-0"].signing.public
        assert {opened(e).digest for e in pools if opened(e).signer == honest} <= said


# Coverage.


def test_coverage_counts_round_message_and_move_and_shows_what_was_never_tried() -> None:
    world = World(1, TWO)
    world.step(Move(PACE, 6))
    world.step(Move("drop", 1))
    ((place, message, name),) = [key for key in world.coverage if key[2] == "drop" and key[1]]
    assert (place, name) == (1, "drop")
    table = list(coverage.lines(world.coverage))
    row = next(line for line in table if line.startswith("drop "))
    assert coverage.LETTERS[message] in row
    assert coverage.NEVER in row
    assert any(line.startswith("moves never tried: ") and "kill" in line for line in table)
    plain = coverage.as_json(world.coverage)
    assert plain["moves"]["drop"][message] == [1]
    assert "drop" not in plain["never"]
    assert max(map(len, table[:-1])) <= 100


def test_every_message_has_a_letter() -> None:
    assert set(coverage.LETTERS) == {*KINDS, "chunk"}
    assert len(set(coverage.LETTERS.values())) == len(coverage.LETTERS)


def test_together_the_runs_try_every_move_and_every_message() -> None:
    tried: Counter[tuple[int, str, str]] = Counter()
    with doubles():
        for seed in range(60):
            tried += attack(seed).coverage
    assert coverage.never(tried) == []
    assert {message for _, message, _ in tried} >= set(coverage.LETTERS)
    assert {place for place, _, _ in tried} == {place.value for place in coverage.ROUNDS}


# Hypothesis.


def test_hypothesis_shrinks_to_a_short_attack_and_its_story_says_why_it_matters() -> None:
    count = 0

    def watch(_: World) -> None:
        nonlocal count
        count += 1
        if count > 300:
            raise TimeIsUp

    search = Search(watch, setting=REWIND.setting, names=REWIND.kinds)
    with planted(REWIND):
        with suppress(TimeIsUp):
            search.run(examples=400, seed=1)
        found = search.shortest()
    assert found is not None
    assert found.invariant == "one_function"
    kinds = [move.name for move in found.moves if move.name not in (PACE, SETTLE)]
    assert len(kinds) <= 4
    story = "\n".join(tell(found))
    assert "BROKEN: one_function: party-0 sealed the same input to meet two others" in story
    assert "party-0 hears attestation of enclave-1 and does remember Sealed, seal, upload" in story
    assert "Lost otherwise: by asking again with other partner data" in story
    assert "Honest: party-0" in story


def test_the_same_seed_searches_the_same_worlds() -> None:
    def stories() -> list[str]:
        told: list[str] = []
        Search(lambda world: told.extend(world.story)).run(examples=4, seed=9)
        return told

    assert stories() == stories()


def test_a_search_ends_when_its_watch_says_so() -> None:
    def watch(_: World) -> None:
        raise TimeIsUp

    search = Search(watch)
    with pytest.raises(TimeIsUp):
        search.run(examples=10_000, seed=1)
    assert search.best is None


# Replay files.


@pytest.fixture(scope="module")
def counterexample() -> Counterexample:
    with planted(REWIND):
        found = hunt(REWIND)
        assert found is not None
        again = play(found.seed, REWIND.setting, found.moves)
    assert again is not None
    return again


def test_a_replay_file_holds_all_that_a_run_follows_from(counterexample: Counterexample, tmp_path: Path) -> None:
    file = tmp_path / "counterexample.json"
    file.write_text(write(counterexample))
    seed, setting, moves, expected = read(file)
    assert (seed, setting, moves) == (counterexample.seed, counterexample.setting, counterexample.moves)
    with planted(REWIND):
        again = play(seed, setting, moves)
    assert again is not None
    assert (again.invariant, again.why, again.events) == (expected.invariant, expected.why, expected.events)
    assert b"CANARY" not in file.read_bytes()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_events_are_the_same_in_another_process(hash_seed: str) -> None:
    code = (
        "from mpc.fuzz.moves import attack; import hashlib; from mpc.fuzz.doubles import doubles\n"
        "print(hashlib.sha256('|'.join(line for s in range(6) for line in attack(s).story).encode()).hexdigest())"
    )
    mine = "|".join(line for seed in range(6) for line in attack(seed).story)
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(mine.encode()).hexdigest(), done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version: this mpc plays replay files of version 1: got 2"),
        ({"more": 1}, "more: unknown key"),
        ({"seed": "1"}, "seed"),
        ({"moves": [["deliver", -1]]}, "moves"),
        ({"moves": [["dance", 1]]}, "moves[0]: this mpc has no move 'dance'"),
        ({"moves": [["deliver", 1]] * 10_001}, "moves"),
        ({"setting": {"corrupt": ["nobody"]}}, "nobody is nobody there"),
        ({"setting": {"quorum": 2}}, "setting.quorum"),
        ({"scenario": "x"}, "scenario"),
        ({"expected": {}}, "expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_files_are_refused_with_the_place(
    change: dict[str, Any], words: str, counterexample: Counterexample, tmp_path: Path
) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**json.loads(write(counterexample)), **change}))
    with pytest.raises(LocalError, match=re.escape(words)):
        read(file)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"version": 1, "version": 1}', '"version"', "\udcff"])
def test_what_is_no_replay_file_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LocalError, match=r"r\.json"):
        read(file)


def test_a_machine_that_crashes_is_a_counterexample() -> None:
    world = World(1, TWO)
    world.step(Move(PACE, 10))
    world.parties["party-0"].machine = None  # type: ignore[assignment]
    with pytest.raises(Broken, match="a verdict, never a crash: AttributeError") as broken:
        world.step(Move(PACE, 40))
    found = Counterexample.of(broken.value)
    assert "no machine fails over it" in "\n".join(tell(found))
    assert play(found.seed, found.setting, found.moves) is None


def test_settings_are_drawn_with_somebody_honest() -> None:
    for seed in range(50):
        setting = Setting.draw(Random(seed))
        assert "party-0" not in setting.corrupt
        assert replace(setting) == setting


# The document.


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/FUZZING.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_documents_move_and_invariant_work() -> None:
    of_move, of_invariant = blocks()
    for block in (of_move, of_invariant):
        assert len(block.splitlines()) <= 26
    judges, known = invariants.INVARIANTS, dict(MOVES)
    space: dict[str, Any] = {}
    try:
        exec(of_move, space)
        exec(of_invariant, space)
        assert invariants.INVARIANTS[-1] is space["one_seal"]
        worlds = [attack(seed, names=("stutter", "kill", "call_dead")) for seed in range(10)]
        assert (
            sum(count for world in worlds for (_, _, name), count in world.coverage.items() if name == "stutter") > 10
        )
        assert any("is said three times" in line for world in worlds for line in world.story)
        fault = next(fault for fault in FAULTS if fault.what == "a party seals twice in an epoch")
        with planted(fault):
            invariants.INVARIANTS = (space["one_seal"],)
            found = hunt(replace(fault, setting=replace(TWO, epochs_max=1), kinds=("restart", "kill")))
        assert found is not None
        assert found.invariant == "one_seal"
    finally:
        invariants.INVARIANTS = judges
        for name in MOVES.keys() - known:
            del MOVES[name]
