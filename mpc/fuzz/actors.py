"""The shells of the world: each holds a real machine, performs its actions on the world's wires, and may be killed.

What a real process keeps on its disk outlives `kill`; nothing else does.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from enclave_runtime import enclave as runtime
from enclave_runtime.enclave import Enclave
from mpc.coordinator.mailbox import EnclaveLost, Mailbox, Post
from mpc.fuzz.facts import (
    Broken,
    Shown,
    opened,
)
from mpc.protocol.contract import Contract, Participant
from mpc.protocol.errors import MpcError, PeerError, SealError
from mpc.protocol.messages import (
    Binding,
    SealedResult,
)
from mpc.protocol.sealing import (
    TAG_BYTES,
    ChunkCipher,
    Cryptography,
    OpeningKey,
    StreamSecret,
    chunk_bytes,
    chunk_count,
    result_commitment,
    result_context,
)
from mpc.protocol.signing import SigningKey
from mpc.transport import Entry
from parties import party as member
from parties.party import Party

if TYPE_CHECKING:
    from mpc.fuzz.world import World

FORWARDED = ("consent", "seal", "decision", "abort")  # what a host hands to its enclave


class SeededCryptography(Cryptography):
    """Entropy from a seed. HPKE draws its own, so ciphertexts differ between replays; no event does."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def random(self, size: int) -> bytes:
        return self._random.randbytes(size)


@dataclass(frozen=True)
class Keys:
    """A participant's keys, public and private."""

    name: str
    signing: SigningKey = field(repr=False)
    opening: OpeningKey = field(repr=False)

    @classmethod
    def draw(cls, name: str, cryptography: Cryptography) -> "Keys":
        return cls(name, SigningKey(cryptography.random(32)), OpeningKey(cryptography.random(32)))

    @property
    def participant(self) -> Participant:
        return Participant(self.name, self.signing.public, self.opening.public)


@dataclass(frozen=True)
class Put:
    """A sealed chunk on its way to the coordinator."""

    epoch: int
    stream: int
    index: int
    box: bytes = field(repr=False)


Item = Entry | Post | Put | EnclaveLost | runtime.Begin | runtime.Message | runtime.Chunk


class Actor:
    """A shell: one machine, one wire to it, and what is asked of its own process."""

    honest = True

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.alive = False
        self.silent = False  # the adversary no longer delivers to it, and it no longer moves
        self.skew_ms = 0
        self.crash_in: int | None = None  # dies before it performs so many more actions
        self.cryptography = SeededCryptography(f"{world.entropy} {name}")

    @property
    def wire(self) -> list[Item]:
        return self.world.wires[self.name]

    def now_ms(self) -> int:
        return self.world.now_ms + self.skew_ms

    def start(self) -> None:
        self.alive = True

    def kill(self) -> None:
        """Memory is lost, disk is not."""
        self.alive = False
        self.crash_in = None

    def receive(self, item: Any) -> None:
        raise NotImplementedError

    def work(self) -> bool:
        """Go on with what its own process has to do; False when there is nothing, or it must wait."""
        return False

    def tick(self) -> None:
        """Look at the clock."""

    def ask(self, machine: object, event: object, call: Callable[[], list[Any]]) -> list[Any]:
        """What a machine answers; nothing when it refuses, and then it must be as it was."""
        before, heard = _state(machine), f"{word(event)}{self._whose(event)}"
        try:
            actions = call()
        except PeerError as error:
            self.world.tell(f"{self.name} refuses {heard}: {type(error).__name__}: {error.what}", Shown(str(error)))
            if _state(machine) != before:
                raise Broken("first check, then change", f"{self.name} refused {word(event)} and changed") from error
            return []
        words = ", ".join(map(word, actions)) or "nothing"
        self.world.tell(f"{self.name} hears {heard} and does {words}", Shown(repr((event, actions))))
        return actions

    def _whose(self, event: object) -> str:
        """Who signed it, in words."""
        entry = event.entry if isinstance(event, member.Heard) else event
        try:
            return f" of {self.world.who(opened(entry.envelope).signer)}"  # type: ignore[attr-defined]
        except (AttributeError, MpcError):
            return ""

    def crashes(self) -> bool:
        """Whether it dies here, between two actions."""
        if self.crash_in is None:
            return False
        self.crash_in -= 1
        if self.crash_in >= 0:
            return False
        self.world.tell(f"{self.name} is killed between two actions")
        self.kill()
        return True


def open_result(
    contract: Contract, binding: Binding, sealed: SealedResult, keys: Keys, boxes: Sequence[bytes]
) -> bytes:
    """A recipient's result; raises SealError when it is not the one that the receipt names."""
    context = result_context(binding.digest, binding.signing_key, sealed.recipient)
    secret = StreamSecret.decode(keys.opening.unwrap(sealed.key.secret, context))
    if len(boxes) != chunk_count(secret.length):
        raise SealError("length of the result")
    cipher, opened = ChunkCipher(secret), bytearray()
    for index, box in enumerate(boxes):
        chunk = bytearray(chunk_bytes(secret.length, index))
        if len(box) != len(chunk) + TAG_BYTES:
            raise SealError("size of a chunk of the result")
        cipher.open_into(box, index, memoryview(chunk))
        opened += chunk
    result = bytes(opened[: secret.length])
    if result_commitment(secret.salt, contract.digest, keys.signing.public, result) != sealed.commitment:
        raise SealError("the result is not the one that the receipt names")
    return result


def word(thing: object) -> str:
    """One word for an event or action, the same in every replay."""
    if isinstance(thing, member.Heard):
        thing = thing.entry
    envelope = thing if isinstance(thing, bytes) else getattr(thing, "envelope", None)
    if envelope is not None:
        try:
            return opened(envelope).kind
        except MpcError:
            return "an altered message"
    if isinstance(thing, member.Remember):
        return f"remember {type(thing.memory).__name__}"
    return type(thing).__name__.lower()


_PLAIN = {bytes, int, bool, str, float, type(None)}  # what a machine holds most of


def _state(thing: object, depth: int = 5) -> object:
    """A copy of what a machine holds, deep enough to see any change."""
    if type(thing) in _PLAIN:
        return thing
    if isinstance(thing, dict):
        return {key: _state(value, depth - 1) for key, value in thing.items()}
    if isinstance(thing, list | set):
        return copy(thing)
    parameters = getattr(thing, "__dataclass_params__", None)
    mutable = isinstance(thing, Party | Enclave | Mailbox) if parameters is None else not parameters.frozen
    if mutable and depth:
        return {name: _state(value, depth - 1) for name, value in vars(thing).items()}
    return thing
