"""A counterexample: what a run follows from, and what broke. As a file it plays again exactly on any machine."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mpc.files import read_bounded
from mpc.fuzz.facts import Broken
from mpc.fuzz.jobs import Job
from mpc.fuzz.means import MOVES
from mpc.fuzz.moves import verifying_once
from mpc.fuzz.setting import DIGEST, PACE, SETTLE, Move, Setting
from mpc.fuzz.world import World
from mpc.protocol.errors import LocalError
from mpc.settings import Settings, about, build

VERSION = 1
MOVES_MAX, DRAW_MAX = 10_000, 2**32 - 1
FILE_BYTES_MAX = 4 << 20  # a scenario of many tables is in it


@dataclass(frozen=True)
class Counterexample:
    """The shortest run that an engine found to break an invariant."""

    seed: int
    setting: Setting
    moves: tuple[Move, ...]
    invariant: str
    why: str
    world: World

    @classmethod
    def of(cls, broken: Broken) -> "Counterexample":
        world = broken.world
        assert world is not None, "only World.step says in which world"
        moves = tuple(move for move, _ in world.moves)
        return cls(world.seed, world.setting, moves, broken.invariant, broken.why, world)

    @property
    def events(self) -> str:
        """A digest of all that happened: the same wherever it is played again."""
        return hashlib.sha256("\n".join(self.world.story).encode()).hexdigest()


def play(seed: int, setting: Setting, moves: Sequence[Move]) -> Counterexample | None:
    """Play moves in a new world; None when every invariant holds."""
    with verifying_once():
        try:
            world = World(seed, setting)
            for move in moves:
                world.step(move)
        except Broken as broken:
            return Counterexample.of(broken)
    return None


# The file.


class People(Settings, frozen=True, kw_only=True):
    """Setting, as a file says it."""

    parties: Annotated[int, about("Parties of the built-in job.", ge=1, le=100)] = 3
    receivers: Annotated[int, about("Who only receive.", ge=0, le=100)] = 0
    approvers: Annotated[int, about("Approvers.", ge=0, le=100)] = 0
    quorum: Annotated[int, about("Approvals that release.", ge=0, le=100)] = 0
    epochs_max: Annotated[int, about("Enclaves, one after another died.", ge=1, le=100)] = 3
    corrupt: tuple[str, ...] = ()
    long: bool = False
    wide: bool = False


class Expected(Settings, frozen=True, kw_only=True):
    """What happened when it was found."""

    invariant: str
    why: str
    events: str


class File(Settings, frozen=True, kw_only=True):
    """A replay file, JSON."""

    version: Literal[1]
    seed: int
    setting: People
    scenario: str | None = None  # the text of the scenario file, without its sources
    moves: Annotated[tuple[tuple[str, Annotated[int, msgspec.Meta(ge=0, le=DRAW_MAX)]], ...], about("Name and draw.")]
    expected: Expected


def write(found: Counterexample) -> str:
    """The text of a replay file."""
    from mpc.fuzz.scenario_job import ScenarioJob

    setting, job = found.setting, found.setting.job
    people = {name: getattr(setting, name) for name in People.__struct_fields__ if name != "corrupt"}
    plain = {
        "version": VERSION,
        "seed": found.seed,
        "setting": {**people, "corrupt": sorted(setting.corrupt)},
        **({"scenario": job.text()} if isinstance(job, ScenarioJob) else {}),
        "moves": [list(move) for move in found.moves],
        "expected": {"invariant": found.invariant, "why": found.why, "events": found.events},
    }
    return json.dumps(plain, indent=1) + "\n"


def read(path: Path) -> tuple[int, Setting, tuple[Move, ...], Expected]:
    """Raises LocalError naming the file and the place."""
    try:
        plain = json.loads(read_bounded(path, FILE_BYTES_MAX), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise LocalError(f"{path}: is no replay file of `mpc fuzz` (not JSON: {error})") from None
    if not isinstance(plain, dict):
        raise LocalError(f"{path}: is no replay file of `mpc fuzz`", expected="a JSON object")
    if plain.get("version") != VERSION:
        raise LocalError(
            f"{path}: version: this mpc plays replay files of version {VERSION}", got=str(plain.get("version"))[:20]
        )
    file = build(
        {key: value for key, value in plain.items() if key != "scenario" or value is not None}, File, str(path)
    )
    return file.seed, _setting(file, path), _moves(file, path), file.expected


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _setting(file: File, path: Path) -> Setting:
    people = file.setting
    if people.quorum > people.approvers:
        raise LocalError(f"{path}: setting.quorum", expected=f"at most {people.approvers}", got=people.quorum)
    job: Job = DIGEST
    if file.scenario is not None:
        from mpc.fuzz.scenario_job import ScenarioJob

        job = ScenarioJob.of_text(file.scenario, str(path))
    given = {name: getattr(people, name) for name in People.__struct_fields__ if name != "corrupt"}
    setting = Setting(**given, corrupt=frozenset(people.corrupt), job=job)
    if unknown := sorted(setting.corrupt - set(job.names(setting))):
        raise LocalError(f"{path}: setting.corrupt: {unknown[0]} is nobody there")
    return setting


def _moves(file: File, path: Path) -> tuple[Move, ...]:
    if len(file.moves) > MOVES_MAX:
        raise LocalError(f"{path}: moves", expected=f"at most {MOVES_MAX}", got=len(file.moves))
    for index, (name, _) in enumerate(file.moves):
        if name not in MOVES and name not in (PACE, SETTLE):
            raise LocalError(f"{path}: moves[{index}]: this mpc has no move {name!a}")
    return tuple(Move(name, draw) for name, draw in file.moves)
