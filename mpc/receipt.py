"""A receipt, checked offline, years later: the file is enough, and what its reader accepts.

The checks, in this order; an error carries the number of the first that fails, and the document's own step after it:

R1  The file is one signed release, in its one form.
R2  Its history begins with a contract that the contract's author signed; the one that the reader names, if any.
R3  The rest of the history, heard again: the attestation with one consent of each party, each party's seal, the
    word that there are results, the approvals. Each is signed by who may say it, once and in its round, names
    this contract, epoch and enclave, and nothing is missing.
R4  The release is the enclave's, holds exactly this history, and one result for each recipient.
R5  Reader's policy and contract have a measurement and a root in common (without a policy: the contract's).
R6  First document: nonce = roster digest, user_data = binding digest, public_key = the enclave's signing key,
    PCR16 = SHA384(0^48 ‖ contract digest); docs/ATTESTATION.md, at the document's own time.
R7  Second document: nonce = binding digest, user_data = receipt digest, the same key and PCR16; likewise.
R8  Both documents are of one enclave: the same module_id and the same PCRs.
R9  The second is not older than the first, and not later than the contract's deadline for release.

Source: docs/PROTOCOL.md, round 6 and `receipt`; docs/ATTESTATION.md.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from mpc.attestation import AWS_NITRO_ROOT_G1, AppraisalPolicy, Evidence, Measurement, contract_pcr, verify
from mpc.protocol.contract import Contract
from mpc.protocol.encoding import decode
from mpc.protocol.errors import EncodingError, OrderError, PeerError
from mpc.protocol.messages import Attestation, Binding, Consent, Decision, Release, Seal
from mpc.protocol.rounds import Round, Session
from mpc.protocol.signing import open_signed


@dataclass(frozen=True)
class PartyAccount:
    """A party of the contract: its key, and the commitment to its input that it signed."""

    name: str
    key: bytes
    commitment: bytes


@dataclass(frozen=True)
class TableAccount:
    """An input: whose, under which rule, and its size in chunks of at most 1 MiB."""

    owner: str
    name: str
    rule: str  # kind
    k: int  # 0 unless the rule is `aggregate`
    entity: tuple[str, ...]
    chunks: int
    epsilon: float  # what it spent of the owner's budget; 0 unless the rule is `noise`, and so are the next two
    delta: float
    rows: int  # of an entity, that count


@dataclass(frozen=True)
class ResultAccount:
    """A result: for whom, its salted commitment, its size in chunks of at most 1 MiB."""

    recipient: str
    commitment: bytes
    chunks: int


@dataclass(frozen=True)
class Account:
    """What a receipt that passed every check says, and how far that goes. Times are Unix ms of the enclave's NSM."""

    name: str
    title: str
    contract: bytes  # digest
    author: bytes  # key
    parties: tuple[PartyAccount, ...]
    recipients: tuple[str, ...]
    receipt_recipients: tuple[str, ...]
    quorum: int
    approved_by: tuple[str, ...]
    program: str  # kind
    query: str  # or the parameters, a line each
    tables: tuple[TableAccount, ...]
    results: tuple[ResultAccount, ...]
    epoch: int
    epochs_max: int
    attested_ms: int
    released_ms: int
    deadline_ms: int
    measurement: str  # label, the policy's own if there was one
    pcrs: tuple[tuple[int, bytes], ...]  # those that the measurement names
    root: bytes  # SHA-256 of the certificate
    simulated: bool
    module_id: str
    own_policy: bool  # the reader gave one
    proves: tuple[str, ...]
    does_not_prove: tuple[str, ...]


def verify_receipt(envelope: bytes, policy: AppraisalPolicy | None, contract_digest: bytes | None = None) -> Account:
    """Check a receipt file.

    Args:    envelope: the file's bytes. policy: what its reader accepts; None: whatever the contract's signers did.
             contract_digest: of the contract that it must be of, 48 bytes; None: of any.
    Raises:  PeerError (AppraisalError for a document) whose `step` is the number above.
    """
    with _step("R1"):
        release = _release(envelope)
    with _step("R2"):
        session = _proposed(release.receipt.history)
        if contract_digest is not None and contract_digest != session.contract.digest:
            got = session.contract.digest.hex()
            raise OrderError("it is of another contract", expected=contract_digest.hex(), got=got)
    with _step("R3"):
        session = session.hear_all(release.receipt.history[1:])
        if session.round is not Round.RELEASE:
            raise OrderError("the history is not complete", expected=f"more from {', '.join(session.missing())}")
    with _step("R4"):
        session, _ = session.hear(envelope)
        if len(release.receipt.results) != len(session.contract.recipients):
            raise OrderError("results", expected=len(session.contract.recipients), got=len(release.receipt.results))
    contract = session.contract
    with _step("R5"):
        accepted = accepted_for(contract, policy)
    assert session.binding is not None
    first, second = _documents(session, session.binding, release, accepted)
    with _step("R8"):
        _same("module_id of the second document", first.module_id, second.module_id)
        _same("PCRs of the second document", dict(first.pcrs), dict(second.pcrs))
    with _step("R9"):
        if second.timestamp_ms < first.timestamp_ms:
            raise OrderError(
                "release before attestation", expected=utc(first.timestamp_ms), got=utc(second.timestamp_ms)
            )
        if second.timestamp_ms > contract.deadlines.release_ms:
            deadline = utc(contract.deadlines.release_ms)
            raise OrderError("release after its deadline", expected=f"until {deadline}", got=utc(second.timestamp_ms))
    return _account(session, release, first, second, policy is not None)


def parameters(encoded: bytes) -> str:
    """A program's parameters as a person reads them, a line each; a contract may hold any bytes."""
    try:
        fields = decode(encoded).items()
        return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False, default=_bytes)}" for name, value in fields)
    except (EncodingError, AttributeError, TypeError):
        return "parameters that no program of ours reads"


def _bytes(value: bytes) -> str:
    return f"{len(value)} bytes, SHA-256 {hashlib.sha256(value).hexdigest()}"


def utc(time_ms: int) -> str:
    """Unix milliseconds as a person reads them; a contract may name any."""
    try:
        return f"{datetime.fromtimestamp(time_ms // 1000, UTC):%F %T} UTC"
    except (ValueError, OverflowError):
        return f"{time_ms // 31_556_952_000 + 1970} CE"


def _release(envelope: bytes) -> Release:
    signed = open_signed(envelope)
    if signed.kind != "release":
        raise EncodingError("a receipt", expected="a signed release", got=ascii(signed.kind)[:40])
    return Release.decode(signed.payload)


def _proposed(history: tuple[bytes, ...]) -> Session:
    """The session of the contract, in the epoch that the attestation names."""
    if len(history) < 2:
        raise OrderError("history", expected="a contract, an attestation and more", got=f"{len(history)} messages")
    Session.propose(history[0])
    attestation = open_signed(history[1])
    if attestation.kind != "attestation":
        raise OrderError("history after the contract", expected="the attestation", got=ascii(attestation.kind)[:40])
    return Session.propose(history[0], Attestation.decode(attestation.payload).epoch)


def accepted_for(contract: Contract, policy: AppraisalPolicy | None) -> AppraisalPolicy:
    """What policy and contract accept at once; without a policy, what the contract names. Raises PolicyError."""
    theirs = tuple(
        Measurement(one.label or "unnamed", {0: one.pcr0, 1: one.pcr1, 2: one.pcr2})
        for one in contract.enclave.measurements
    )
    if policy is None:
        return AppraisalPolicy(theirs, frozenset({contract.enclave.root}))
    return policy.narrow(theirs, [contract.enclave.root])


def _documents(
    session: Session, binding: Binding, release: Release, accepted: AppraisalPolicy
) -> tuple[Evidence, Evidence]:
    """Evidence of the attestation and of the release. Their nonces, not a clock, say which session they belong to."""
    (attestation,) = session.messages(Attestation).values()
    pcrs = contract_pcr(session.contract.digest)
    with _step("R6"):
        first = verify(
            Attestation.decode(open_signed(attestation).payload).document,
            accepted,
            nonce=binding.roster,
            user_data=binding.digest,
            public_key=binding.signing_key,
            pcrs=pcrs,
        )
    with _step("R7"):
        second = verify(
            release.document,
            accepted,
            nonce=binding.digest,
            user_data=release.receipt.digest,
            public_key=binding.signing_key,
            pcrs=pcrs,
        )
    return first, second


def _account(session: Session, release: Release, first: Evidence, second: Evidence, own_policy: bool) -> Account:
    contract = session.contract
    commitments = {
        name: Consent.decode(open_signed(consent).payload).commitment
        for name, consent in session.messages(Consent).items()
    }
    seals = (Seal.decode(open_signed(seal).payload) for seal in session.messages(Seal).values())
    chunks = {key.stream: key.chunks for seal in seals for key in seal.streams}
    return Account(
        name=contract.name,
        title=contract.title,
        contract=contract.digest,
        author=contract.author,
        parties=tuple(
            PartyAccount(name, contract.participant(name).key, commitments[name]) for name in contract.parties
        ),
        recipients=contract.recipients,
        receipt_recipients=contract.receipt_recipients,
        quorum=contract.approvals.quorum,
        approved_by=tuple(session.messages(Decision)),
        program=contract.program.kind,
        query=contract.program.text or parameters(contract.program.parameters),
        tables=tuple(
            TableAccount(
                *(table.owner, table.name, table.rule.kind, table.rule.k, table.rule.entity, chunks[stream]),
                *(table.rule.epsilon, table.rule.delta, table.rule.rows),
            )
            for stream, table in enumerate(contract.tables)
        ),
        results=tuple(ResultAccount(one.recipient, one.commitment, one.key.chunks) for one in release.receipt.results),
        epoch=session.epoch,
        epochs_max=contract.epochs_max,
        attested_ms=first.timestamp_ms,
        released_ms=second.timestamp_ms,
        deadline_ms=contract.deadlines.release_ms,
        measurement=first.measurement.label,
        pcrs=tuple(first.measurement.pcrs.items()),
        root=first.root,
        simulated=contract.enclave.simulated,
        module_id=first.module_id,
        own_policy=own_policy,
        proves=_proves(session, first, second, own_policy),
        does_not_prove=_does_not_prove(contract, first, own_policy),
    )


def _proves(session: Session, first: Evidence, second: Evidence, own_policy: bool) -> tuple[str, ...]:
    contract, count = session.contract, len(session.contract.parties)
    whose = "your policy accepts" if own_policy else "the contract names"
    sentences = [
        f"All {count} parties signed this contract, and committed to their inputs before anything was sealed."
        if count > 1
        else "The party signed this contract, and committed to its input before anything was sealed.",
        f"At {utc(first.timestamp_ms)} an enclave attested, under a root that {whose}, that it runs an image that "
        f"{whose} and works for exactly this contract and these consents (epoch {session.epoch}).",
        "Every party signed that it sealed its input to the keys of this enclave.",
        f"At {utc(second.timestamp_ms)}, before the contract's deadline, the same enclave signed this receipt: one "
        f"result each for {', '.join(contract.recipients)}, of the commitments that stand here, and for nobody else.",
    ]
    if approved := tuple(session.messages(Decision)):
        sentences.append(f"{', '.join(approved)} approved that release ({contract.approvals.quorum} needed).")
    return tuple(sentences)


def _does_not_prove(contract: Contract, first: Evidence, own_policy: bool) -> tuple[str, ...]:
    sentences = []
    if contract.enclave.simulated:
        sentences.append(
            "SIMULATED: that any hardware kept the inputs secret. Whoever owns the machine with this root can read "
            "its enclaves and sign any document."
        )
    elif first.root != AWS_NITRO_ROOT_G1:
        sentences.append(
            "That AWS vouches for the enclave: the root is not that of AWS's commercial partition, and whoever holds "
            "its key can sign any document."
        )
    if not own_policy:
        sentences.append(
            "That you would accept this enclave: without a policy of yours, image and root are those that the "
            "contract's signers agreed to, whoever they are."
        )
    sentences += [
        "What the code behind the measurement does: that it computes this program and keeps the owners' rules is what "
        "its source says, and `mpc measure --from-source` says whether the image is that source.",
        "Who holds the keys: compare them with those that the organisations gave you.",
        "That the inputs were true or complete: only that each was fixed beforehand.",
        "What recipients did with the results afterwards.",
        "That no certificate was revoked: the documents are judged as of their own time.",
    ]
    return tuple(sentences)


@contextmanager
def _step(number: str) -> Iterator[None]:
    """Every refusal in here carries this number, and the document's own step after it."""
    try:
        yield
    except PeerError as error:
        error.step = number if error.step is None else f"{number}, document step {error.step}"
        raise


def _same(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise OrderError(what, expected="that of the first")
