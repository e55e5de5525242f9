"""What really happened in a world, told by its actors: the invariants judge by these and not by the machines' word."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from mpc.protocol.contract import Contract
from mpc.protocol.encoding import Record
from mpc.protocol.messages import Receipt
from mpc.protocol.rounds import Session
from mpc.protocol.signing import Signed, open_signed

opened = lru_cache(maxsize=4096)(open_signed)  # judges, adversary and machines read the same bytes often

if TYPE_CHECKING:
    from mpc.fuzz.infrastructure import EnclaveActor
    from mpc.fuzz.world import World


class Broken(Exception):
    """An invariant does not hold: the adversary has won, or a machine is wrong."""

    def __init__(self, invariant: str, why: str) -> None:
        super().__init__(f"{invariant}: {why}")
        self.invariant, self.why = invariant, why
        self.world: World | None = None  # in which it does not hold


@dataclass(frozen=True)
class Seen:
    """Bytes that anybody outside party and enclave can read."""

    data: bytes | memoryview = field(repr=False)


@dataclass(frozen=True)
class Shown:
    """Text that a person, a log or a host can read: errors, verdicts, the repr of events and actions."""

    text: str


@dataclass(frozen=True)
class Spoke:
    """A participant's own machine said this (never a forgery with its key)."""

    name: str
    honest: bool
    message: Record
    signed: Signed


@dataclass(frozen=True)
class EnclaveSpoke:
    """An enclave said this, at this time."""

    enclave: "EnclaveActor"
    message: Record
    signed: Signed
    now_ms: int


@dataclass(frozen=True)
class ResultLeft:
    """A chunk of a sealed result left an enclave, together with its release or not."""

    enclave: "EnclaveActor"
    with_release: bool


@dataclass(frozen=True)
class Computing:
    """An enclave hands these opened tables (by stream) to the program."""

    enclave: "EnclaveActor"
    contract: Contract
    tables: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Released:
    """An enclave has released; every recipient's result, opened with that recipient's key."""

    enclave: "EnclaveActor"
    receipt: Receipt = field(repr=False)
    results: Mapping[str, bytes] = field(repr=False)
    now_ms: int


@dataclass(frozen=True)
class Accepted:
    """A party's machine accepted a release and its shell has opened its result."""

    name: str
    honest: bool
    session: Session = field(repr=False)
    release: bytes = field(repr=False)
    result: bytes | None = field(repr=False)


@dataclass(frozen=True)
class Ticked:
    """Somebody looked at the clock."""

    name: str
    now_ms: int


@dataclass(frozen=True)
class Ending:
    """It is over for a participant."""

    name: str
    honest: bool
    released: bool
    why: str


Fact = Seen | Shown | Spoke | EnclaveSpoke | ResultLeft | Computing | Released | Accepted | Ticked | Ending
