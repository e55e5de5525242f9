"""The swarm: doubles behave like the library, many workers add up, and what breaks is short and real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from test_explorer import plant

from mpc.attestation import AppraisalPolicy, Measurement, verify
from mpc.fuzz import swarm as engine
from mpc.fuzz.doubles import doubles
from mpc.fuzz.facts import Accepted, Broken, Released, opened
from mpc.fuzz.moves import MOVES
from mpc.fuzz.setting import Move, Setting
from mpc.fuzz.swarm import Tally, broken_by, minimal, plan, swarm
from mpc.fuzz.world import PCRS, World
from mpc.protocol.errors import AppraisalError, PeerError, SealError, SignatureError
from mpc.protocol.sealing import SECRET_BYTES, WRAPPED_BYTES, Cryptography, OpeningKey
from mpc.protocol.signing import SigningKey, open_signed
from parties.party import Party

TWO = Setting(parties=2, corrupt=frozenset({"party-1"}))


def two(random: Random) -> Setting:
    return TWO


# Doubles.


def test_a_signature_of_the_doubles_is_only_valid_for_its_key_kind_and_payload() -> None:
    real = SigningKey(bytes(32))
    with doubles():
        key, other = SigningKey(bytes(32)), SigningKey(b"\1" * 32)
        envelope = key.sign("consent", b"said")
        assert open_signed(envelope).signer == key.public == real.public
        assert key.sign("consent", b"said") == envelope
        assert len(envelope) == len(real.sign("consent", b"said"))
        assert other.sign("consent", b"said")[-64:] != envelope[-64:]
        for place in range(len(envelope)):
            with pytest.raises(PeerError):
                open_signed(envelope[:place] + bytes([envelope[place] ^ 1]) + envelope[place + 1 :])
        with pytest.raises(SignatureError):
            open_signed(real.sign("consent", b"said")[:-64] + bytes(64))
    with pytest.raises(SignatureError):
        open_signed(envelope)
    with pytest.raises(SignatureError):
        opened(envelope)
    signed = real.sign("consent", b"said")
    with doubles(), pytest.raises(SignatureError):
        open_signed(signed)


def test_a_box_of_the_doubles_opens_with_its_key_and_context_only() -> None:
    secret = bytes(range(SECRET_BYTES))
    with doubles():
        mine, other = OpeningKey(bytes(32)), OpeningKey(b"\1" * 32)
        assert len(mine.public) == 1216
        box = Cryptography().wrap(secret, mine.public, b"context")
        assert len(box) == WRAPPED_BYTES
        assert box != Cryptography().wrap(secret, mine.public, b"context")
        assert mine.unwrap(box, b"context") == secret
        assert secret[:16] not in box
        for key, context, sealed in (
            (other, b"context", box),
            (mine, b"another", box),
            *((mine, b"context", box[:i] + bytes([box[i] ^ 1]) + box[i + 1 :]) for i in (0, 600, 1120, 1191, -1)),
            (mine, b"context", box[:-1]),
        ):
            with pytest.raises(SealError):
                key.unwrap(sealed, context)
        with pytest.raises(SealError):
            Cryptography().wrap(secret, bytes(100), b"")


def test_a_document_of_the_doubles_passes_the_real_verifier_and_no_other_does() -> None:
    with doubles():
        world = World(1, TWO)
        world.until(lambda: world.said("attestation"))
        shown = world.enclaves[0].attestation
        assert shown is not None
        document = shown.document
        policy = AppraisalPolicy((Measurement("world", PCRS),), frozenset({world.root.fingerprint}))
        assert verify(document, policy, at=world.now_ms).pcrs[0] == PCRS[0]
        strangers = AppraisalPolicy((Measurement("world", PCRS),), frozenset({bytes(32)}))
        with pytest.raises(AppraisalError):
            verify(document, strangers, at=world.now_ms)
        for place in range(0, len(document), 37):
            with pytest.raises(AppraisalError):
                verify(document[:place] + bytes([document[place] ^ 1]) + document[place + 1 :], policy, at=world.now_ms)
    with pytest.raises(AppraisalError):
        verify(document, policy, at=world.now_ms)


@pytest.mark.parametrize("seed", [1, 5, 9, 12])
def test_a_run_has_the_same_events_with_doubles_and_without(seed: int) -> None:
    setting, moves = plan(seed)
    stories = []
    for _ in range(2):
        world = World(seed, setting)
        for move in moves:
            world.step(move)
        stories.append(world.story)
        if not stories[1:]:
            with doubles():
                doubled = World(seed, setting)
                for move in moves:
                    doubled.step(move)
    assert doubled.story == stories[0] == stories[1]


def test_a_fair_session_releases_with_doubles() -> None:
    with doubles():
        world = World(7, Setting(parties=3, approvers=2, quorum=2, wide=True))
        world.fair()
        assert len(world.of(Released)) == 1
        assert {one.name for one in world.of(Accepted)} == set(world.parties)


# The swarm.


def test_workers_add_up_and_cover_many_moves() -> None:
    seen: list[int] = []
    tally = swarm(60, runs=40, seed=3, workers=2, progress=lambda so_far: seen.append(so_far.runs))
    assert (tally.runs, tally.workers, tally.counterexample) == (40, 2, None)
    assert seen[-1] == 40
    assert tally.steps > 40 * engine.MOVES_PER_RUN
    assert {move for _, _, move in tally.coverage} >= set(MOVES) - {"deliver"}
    assert tally.steps_per_s > tally.steps_per_s_per_core > 0
    again = swarm(60, runs=40, seed=3, workers=1)
    assert (again.steps, again.coverage) == (tally.steps, tally.coverage)


def test_each_run_switches_a_random_subset_of_moves_off() -> None:
    kinds = [{move.name for move in plan(seed)[1]} for seed in range(40)]
    assert min(map(len, kinds)) < 8
    assert max(map(len, kinds)) > 20
    only = {move.name for seed in range(20) for move in plan(seed, kinds=("drop",))[1]}
    assert only == {"deliver", "hurry", "drop", "pace", "settle"}


def test_time_is_a_bound() -> None:
    tally = swarm(0.0, workers=1)
    assert tally.runs == 1


def test_what_breaks_is_found_made_short_and_breaks_with_the_real_library(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "parties.party:Party._attested", "sealed = self._sealed.get(after.epoch)", "sealed = None")
    tally = swarm(120, runs=2000, workers=2, settings=two)
    found = tally.counterexample
    assert found is not None
    assert found.real
    assert found.invariant == "one_function"
    assert len(found.moves) < found.found_moves
    broken = broken_by(found.seed, found.setting, found.moves)
    assert isinstance(broken, Broken)
    assert broken.why == found.why
    for left_out in range(len(found.moves)):
        fewer = found.moves[:left_out] + found.moves[left_out + 1 :]
        with doubles():
            other = broken_by(found.seed, found.setting, fewer)
        assert other is None or other.invariant != found.invariant


def test_a_crash_of_a_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: Party, event: object, now_ms: int) -> list[object]:
        raise ZeroDivisionError

    monkeypatch.setattr(Party, "handle", crash)
    found = swarm(60, runs=50, workers=1).counterexample
    assert found is not None
    assert "never a crash" in found.invariant
    assert len(found.moves) == 1


def test_delta_debugging_leaves_nothing_that_can_be_left_out() -> None:
    moves = tuple(Move("m", number) for number in range(50))
    assert minimal(moves, lambda some: {7, 23, 41} <= {move.draw for move in some}) == (moves[7], moves[23], moves[41])
    assert minimal(moves, lambda some: len(some) >= 1) == moves[-1:] or len(minimal(moves, lambda some: True)) == 1


def test_an_interrupt_ends_all_workers() -> None:
    script = "from mpc.fuzz.swarm import swarm\nprint('begun', flush=True)\nswarm(600, workers=2)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    workers = _children(process.pid, 2)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert b"KeyboardInterrupt" in err
    assert not [pid for pid in workers if _is_running(pid)]


def _children(parent: int, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        if len(children) >= count:
            return children
    raise AssertionError("no workers")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_rates() -> None:
    tally = Tally(2, steps=100, seconds=4.0)
    assert tally.steps_per_s == 25
    assert Tally(1).steps_per_s == 0
