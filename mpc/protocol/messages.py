"""Everything that is said in a session, as signed payloads. Kinds are the COSE `typ` of the envelope."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from mpc.protocol.contract import Contract, SealingKey, VerifyingKey
from mpc.protocol.encoding import Blob, Bytes32, Count, Digest, Limit, Name, Record, digest, encode
from mpc.protocol.sealing import WRAPPED_BYTES
from mpc.protocol.signing import SigningKey, open_signed

Epoch = Annotated[int, Limit(1, 100)]
Envelopes = Annotated[tuple[Blob, ...], Limit(0, 4000)]

Reason = Literal[
    "withdrawn",  # a participant stopped it
    "policy",  # its policy refuses the contract
    "appraisal",  # the enclave is not the agreed one
    "commitments",  # another party's input is not the one of an earlier epoch
    "input",  # an opened input is not what its owner committed to, or not of its schema
    "late",  # a deadline has passed
    "rejected",  # an approver said no
    # The one word that leaves the enclave when the program gives no result:
    "query",  # the enclave refuses what the parties' own checks should have refused
    "fan-out",  # a join would count rows of an aggregated table more than once
    "memory",  # more than the contract's enclave has
    "time",  # not done by the contract's deadline
    "result-size",  # more than a result may be
    "engine",  # anything else
]


@dataclass(frozen=True)
class Consent(Record):
    """A party agrees to a contract in one epoch, with the input that it has now."""

    contract: Digest
    epoch: Epoch
    nonce: Bytes32  # fresh: makes the attestation document fresh
    commitment: Digest


@dataclass(frozen=True)
class Attestation(Record):
    """The enclave shows itself. Signed by the key that the document carries as `public_key`."""

    contract: Digest
    epoch: Epoch
    roster: Envelopes  # the parties' whole consents
    sealing_key: SealingKey
    document: Annotated[bytes, Limit(1, 32768)]


@dataclass(frozen=True)
class Binding(Record):
    """What one enclave in one epoch is for; its digest names that enclave everywhere."""

    contract: Digest
    epoch: Epoch
    roster: Digest
    sealing_key: SealingKey
    signing_key: VerifyingKey

    @property
    def digest(self) -> bytes:
        return digest("enclave-mpc/1 binding", self.encode())


@dataclass(frozen=True)
class Wrapped(Record):
    """The key of one stream, sealed to its receiver, and the number of its chunks."""

    stream: Annotated[int, Limit(0, 2000)]  # a table: its index in the contract; a result: tables + recipient's index
    secret: Annotated[bytes, Limit(WRAPPED_BYTES, WRAPPED_BYTES)]
    chunks: Count


@dataclass(frozen=True)
class Seal(Record):
    """A party's input: the keys of its tables. The chunks travel beside."""

    binding: Digest
    streams: Annotated[tuple[Wrapped, ...], Limit(1, 1000)]


@dataclass(frozen=True)
class Computed(Record):
    """The enclave has results, and has erased the inputs."""

    binding: Digest
    summary: Digest  # of what approvers decide on, with 32 random bytes in it


@dataclass(frozen=True)
class Decision(Record):
    """An approver's yes to one summary of one enclave. (A no is an Abort.)"""

    binding: Digest
    summary: Digest


@dataclass(frozen=True)
class SealedResult(Record):
    """One recipient's result: its salted commitment, its key and its chunks."""

    recipient: Name
    commitment: Digest
    key: Wrapped


@dataclass(frozen=True)
class Receipt(Record):
    """What a stranger needs to check a release, years later."""

    binding: Digest
    history: Envelopes  # contract, attestation (with the consents), seals, computed, decisions
    results: Annotated[tuple[SealedResult, ...], Limit(1, 1000)]

    @property
    def digest(self) -> bytes:
        return digest("enclave-mpc/1 receipt", self.encode())


@dataclass(frozen=True)
class Release(Record):
    """One object that ends a session; whoever has it may serve it on."""

    receipt: Receipt
    document: Annotated[bytes, Limit(1, 32768)]  # nonce = binding digest, user_data = receipt digest


@dataclass(frozen=True)
class Acknowledgement(Record):
    """A recipient of the result or of the receipt has stored it."""

    binding: Digest
    receipt: Digest


@dataclass(frozen=True)
class Abort(Record):
    """Somebody ends the session, for a reason of the list; `blamed` only with proof."""

    contract: Digest
    epoch: Epoch
    reason: Reason
    blamed: Name | None = None


KINDS: dict[str, type[Record]] = {
    "contract": Contract,
    "consent": Consent,
    "attestation": Attestation,
    "seal": Seal,
    "computed": Computed,
    "decision": Decision,
    "release": Release,
    "acknowledgement": Acknowledgement,
    "abort": Abort,
}
_KIND_OF = {cls: kind for kind, cls in KINDS.items()}


def sign(key: SigningKey, message: Record) -> bytes:
    """The envelope of a message."""
    return key.sign(_KIND_OF[type(message)], message.encode())


def roster_digest(consents: Sequence[bytes]) -> bytes:
    """Of the parties' consents, in any order; names their payloads and signers, not the envelopes."""
    return digest("enclave-mpc/1 roster", encode(sorted(open_signed(consent).digest for consent in consents)))


def result_streams(contract: Contract) -> dict[str, int]:
    """Recipient → number of the stream that carries its result."""
    return {name: len(contract.tables) + index for index, name in enumerate(contract.recipients)}
