"""`mpc verify`: an attestation document or a receipt, offline, and in words what that proves and what not."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256, sha384
from pathlib import Path
from typing import Any

import click

from mpc.attestation import (
    AWS_NITRO_ROOT_G1,
    AppraisalPolicy,
    Evidence,
    Measurement,
    root_fingerprint,
    unverified_document,
)
from mpc.attestation import verify as verify_document
from mpc.attestation.policy import CODE_PCRS
from mpc.cli.files import PATH, read_bounded, refuse_other
from mpc.cli.output import CAUTION, GOOD, Output, examples, with_output
from mpc.cli.unverified import looks_signed, unverified_message
from mpc.protocol.contract import Contract
from mpc.protocol.errors import LocalError, PeerError, PolicyError
from mpc.protocol.messages import Release
from mpc.protocol.signing import ENVELOPE_BYTES_MAX
from mpc.receipt import Account, ResultAccount, TableAccount, utc, verify_receipt

POLICY_BYTES_MAX = PEM_BYTES_MAX = 1 << 20
MILLIS_FROM = 10**11  # a larger number is Unix time in milliseconds: in seconds it would be after the year 5000
NO_IMAGE = sha384(b"a PCR of zeros was asked for").digest()  # of nothing, so that no document has it


@click.command(
    epilog=examples(
        "mpc verify receipt.cbor                            as its signers agreed",
        "mpc verify receipt.cbor --policy policy.toml       and as you accept it",
        "mpc verify document.bin --pcr 0=HEX --pcr 1=HEX --pcr 2=HEX --nonce HEX",
        "mpc verify document.bin --policy policy.toml --at 2026-11-23T12:00:00Z",
    )
)
@click.argument("file", type=PATH)
@click.option(
    "--policy", type=PATH, metavar="FILE", help="What you accept: a policy.toml, a party's own or a plain one."
)
@click.option("--pcr", "pcrs", multiple=True, metavar="N=HEX", help="A PCR that you expect; 0, 1 and 2, or a policy.")
@click.option("--root", "roots", multiple=True, metavar="HEX|FILE.pem", help="A root that you accept, not AWS's G1.")
@click.option("--nonce", metavar="HEX", help="The nonce that a document must hold; only that proves freshness.")
@click.option("--at", metavar="TIME", help="Judge a document as of this time (ISO 8601 or Unix) and not as of now.")
@with_output
def verify(
    out: Output,
    file: Path,
    policy: Path | None,
    pcrs: tuple[str, ...],
    roots: tuple[str, ...],
    nonce: str | None,
    at: str | None,
) -> int:
    """Verify a receipt or an attestation document, offline.

    Exit status: 0 accepted; 1 refused, with the number of the failed step (R1 to R9 of a receipt, 1 to 27 of
    docs/ATTESTATION.md of a document); 2 misuse.
    """
    if policy is not None and roots:
        raise LocalError("--root: a policy names its own roots; leave out one of the two")
    expected, fingerprints = read_pcrs(pcrs), frozenset(read_root(root) for root in roots)
    nonce_bytes = None if nonce is None else read_hex("--nonce", nonce)
    at_ms = None if at is None else read_time(at)
    content = read_bounded(file, ENVELOPE_BYTES_MAX)
    if looks_signed(content):
        if nonce is not None or at is not None:
            raise LocalError(
                "--nonce, --at: a receipt has its own nonces and is judged at its own time; leave them out"
            )
        accepted = _accepted(policy, expected, fingerprints, _contract(content) if policy else None)
        return show_receipt(out, verify_receipt(content, accepted))
    refuse_other(file, content)
    unverified_document(content)  # a broken document is refused before anything is said about options
    accepted = _accepted(policy, expected, fingerprints, None)
    if accepted is None:
        raise LocalError(
            f"{file}: nothing says what you accept; name --policy FILE, or --pcr 0=HEX --pcr 1=HEX --pcr 2=HEX, from a "
            "source that you trust (`mpc measure`), not from the document"
        )
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    evidence = verify_document(content, accepted, nonce=nonce_bytes, at=now_ms if at_ms is None else at_ms)
    return show_evidence(out, evidence, unverified_document(content).cabundle[0])


# What people write.


def read_hex(option: str, text: str) -> bytes:
    if not re.fullmatch(r"([0-9A-Fa-f]{2})*", text):
        raise LocalError(option, expected="hex digits, two for each byte", got=f"{len(text)} characters")
    return bytes.fromhex(text)


def read_pcrs(texts: tuple[str, ...]) -> dict[int, bytes]:
    """Index → 48 bytes. Raises LocalError. Zeros, which are debug mode, become a value that no image has."""
    pcrs: dict[int, bytes] = {}
    for text in texts:
        match = re.fullmatch(r"([0-9]{1,2})=([0-9A-Fa-f]{96})", text)
        if match is None or int(match[1]) > 31:
            raise LocalError("--pcr", expected="N=HEX, with N from 0 to 31 and 96 hex digits", got=text[:24])
        index, value = int(match[1]), bytes.fromhex(match[2])
        if index in pcrs:
            raise LocalError(f"--pcr {index}", expected="each PCR once")
        pcrs[index] = NO_IMAGE if index in CODE_PCRS and not any(value) else value
    return pcrs


def read_root(text: str) -> bytes:
    """SHA-256 of a root certificate: from its PEM file, from hex digits, or by a known name."""
    path = Path(text)
    if not path.is_file():
        return root_fingerprint(text)
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificate = x509.load_pem_x509_certificate(read_bounded(path, PEM_BYTES_MAX))
    except ValueError:
        raise LocalError(f"{path}: not a certificate in PEM form") from None
    return sha256(certificate.public_bytes(Encoding.DER)).digest()


def read_time(text: str) -> int:
    """Unix ms. A time without an offset is UTC."""
    if re.fullmatch(r"[0-9]{1,15}", text):
        return int(text) if int(text) >= MILLIS_FROM else int(text) * 1000
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        expected = "ISO 8601 like 2026-11-23T12:00:00Z, or Unix time in seconds or milliseconds"
        raise LocalError("--at", expected=expected, got=text[:40]) from None
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def _accepted(
    file: Path | None, pcrs: Mapping[int, bytes], roots: frozenset[bytes], contract: Contract | None
) -> AppraisalPolicy | None:
    """What the reader accepts; None when nothing was said. `contract`: of a receipt, for policies that speak of it."""
    if file is not None:
        policy = _read_policy(file, contract)
        return _with_pcrs(policy, pcrs) if pcrs else policy
    if not pcrs and not roots:
        return None
    if missing := [f"--pcr {index}=HEX" for index in CODE_PCRS if index not in pcrs]:
        raise LocalError("what you accept", expected=f"also {' '.join(missing)}: only all three say which code runs")
    return AppraisalPolicy((Measurement("from the command line", pcrs),), roots or frozenset({AWS_NITRO_ROOT_G1}))


def _read_policy(file: Path, contract: Contract | None) -> AppraisalPolicy:
    text = read_bounded(file, POLICY_BYTES_MAX).decode(errors="replace")
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise LocalError(f"{file}: not TOML ({error})") from None
    if "party" not in table:
        try:
            return AppraisalPolicy.from_table(table)
        except LocalError as error:
            raise LocalError(f"{file}: {error.what}", expected=error.expected, got=error.got) from None
    from parties.policy import load  # a party's own policy says more than which enclaves

    policy = load(file)
    name, simulated = (contract.name, contract.enclave.simulated) if contract else ("", False)
    # A root that is accepted as simulated vouches for nothing that does not call itself so.
    roots = [root.fingerprint for root in policy.root if root.scenario in ("", name) and root.simulated == simulated]
    if not roots:
        words = " | ".join(root.scenario for root in policy.root)
        got = "a document alone" if contract is None else f"{name}, {'' if simulated else 'not '}called simulated"
        raise PolicyError("the policy accepts a SIMULATED root for one contract only", expected=words, got=got)
    return AppraisalPolicy(
        tuple(image.accepted for image in policy.measurement), frozenset(root_fingerprint(root) for root in roots)
    )


def _with_pcrs(policy: AppraisalPolicy, pcrs: Mapping[int, bytes]) -> AppraisalPolicy:
    """The policy, with further PCRs expected of every measurement."""
    kept = [m for m in policy.measurements if all(m.pcrs.get(index, pcr) == pcr for index, pcr in pcrs.items())]
    if not kept:
        raise PolicyError("no measurement of the policy has the PCRs on the command line")
    measurements = tuple(Measurement(m.label, {**m.pcrs, **pcrs}, m.expires_ms) for m in kept)
    return AppraisalPolicy(measurements, policy.roots, policy.age_max_ms)


def _contract(envelope: bytes) -> Contract | None:
    """What a receipt's contract claims to be; None when it is no receipt, which `verify_receipt` will say."""
    try:
        _, _, release = unverified_message(envelope)
        if not isinstance(release, Release):
            return None
        _, _, contract = unverified_message(release.receipt.history[0])
    except (PeerError, IndexError):
        return None
    return contract if isinstance(contract, Contract) else None


# What they read.


def show_receipt(out: Output, account: Account) -> int:
    out.verdict("accepted", f"receipt of {account.name}", GOOD)
    if account.simulated:
        out.line("SIMULATED: no hardware vouches for this enclave, only the owner of one machine.", f"bold {CAUTION}")
    out.heading("Session")
    by = "your policy's label" if account.own_policy else "the contract's label"
    out.facts(
        [
            ("contract", account.contract.hex()),
            ("title", account.title),
            ("parties", ", ".join(party.name for party in account.parties)),
            *((f"key of {party.name}", party.key.hex()) for party in account.parties),
            ("result for", ", ".join(account.recipients)),
            (
                "approved by",
                f"{', '.join(account.approved_by)} ({account.quorum} needed)" if account.quorum else "nobody had to",
            ),
            ("attested", f"{utc(account.attested_ms)}, epoch {account.epoch} of at most {account.epochs_max}"),
            ("released", f"{utc(account.released_ms)} (deadline {utc(account.deadline_ms)})"),
            ("enclave", account.module_id),
            ("image", f"{account.measurement} ({by})"),
            *((f"PCR{index}", pcr.hex()) for index, pcr in account.pcrs),
            ("root", _root_words(account.root, account.simulated)),
        ]
    )
    out.heading("Inputs and results")
    out.facts(
        [
            *((f"{table.owner}.{table.name}", _table_words(table)) for table in account.tables),
            *((f"result for {result.recipient}", _result_words(result)) for result in account.results),
        ]
    )
    out.heading(f"Program ({account.program})")
    out.block(account.query)
    _claims(out, account.proves, account.does_not_prove)
    out.line()
    out.line("A receipt shows its reader who took part, the query, the rules and the sizes; share it accordingly.")
    out.document({"status": "accepted", "kind": "receipt", **_plain(asdict(account)), "pcrs": _hex(dict(account.pcrs))})
    return 0


def show_evidence(out: Output, evidence: Evidence, root: bytes) -> int:
    from cryptography import x509

    subject = x509.load_der_x509_certificate(root).subject.rfc4514_string()
    simulated = not evidence.aws and "simulated" in subject.lower()
    proves, does_not = _document_claims(evidence, simulated)
    out.verdict("accepted", f"attestation document of {evidence.module_id}", GOOD)
    if simulated:
        out.line("SIMULATED: no hardware vouches for this enclave, only the owner of one machine.", f"bold {CAUTION}")
    out.line()
    out.facts(
        [
            ("signed", utc(evidence.timestamp_ms)),
            ("judged as of", utc(evidence.at_ms)),
            ("image", evidence.measurement.label),
            *((f"PCR{index}", pcr.hex()) for index, pcr in evidence.pcrs.items() if any(pcr)),
            ("root", _root_words(evidence.root, simulated)),
            *((name, value.hex()) for name, value in _carried(evidence).items() if value),
        ]
    )
    _claims(out, proves, does_not)
    said = {
        "module_id": evidence.module_id,
        "timestamp_ms": evidence.timestamp_ms,
        "at_ms": evidence.at_ms,
        "fresh": evidence.fresh,
        "measurement": evidence.measurement.label,
        "pcrs": _hex(evidence.pcrs),
        "root": evidence.root.hex(),
        "root_subject": subject,
        "simulated": simulated,
        **{name: None if value is None else value.hex() for name, value in _carried(evidence).items()},
        "unchecked": list(evidence.unchecked),
        "proves": proves,
        "does_not_prove": does_not,
    }
    out.document({"status": "accepted", "kind": "attestation document", **said})
    return 0


def _document_claims(evidence: Evidence, simulated: bool) -> tuple[list[str], list[str]]:
    proves = [
        f"At {utc(evidence.timestamp_ms)} a security module under this root signed that an enclave runs with the PCRs "
        f"that you accept ({evidence.measurement.label}).",
        "It does not run in debug mode: its host cannot read its console.",
    ]
    does_not = []
    if simulated:
        does_not.append("SIMULATED: that any hardware is involved. Who owns the machine with this root signs anything.")
    elif not evidence.aws:
        does_not.append("That AWS vouches for it: this is not the root of AWS's commercial partition.")
    if evidence.fresh:
        proves.append("It was made after its nonce was chosen, so it answers whoever drew that nonce.")
    else:
        does_not.append(
            "That it is new. Freshness was not checked: that needs the expected nonce, of 16 bytes or more (--nonce); "
            "without it this may be an old document, shown again."
        )
    does_not += [
        f"What its {name} is for: it was compared with nothing here."
        for name in ("user_data", "public_key")
        if _carried(evidence)[name]
    ]
    does_not.append("What the code behind the PCRs does: rebuild the image from its source and compare.")
    does_not.append("That no certificate was revoked: revocation lists are not asked.")
    return proves, does_not


def _claims(out: Output, proves: list[str] | tuple[str, ...], does_not: list[str] | tuple[str, ...]) -> None:
    out.heading("This proves")
    out.points(proves, "✓", GOOD)
    out.heading("It does not prove")
    out.points(does_not, "–", CAUTION)


def _carried(evidence: Evidence) -> dict[str, bytes | None]:
    return {"nonce": evidence.nonce, "user_data": evidence.user_data, "public_key": evidence.public_key}


def _table_words(table: TableAccount) -> str:
    entity = f" by {', '.join(table.entity)}" if table.entity else ""
    rule = f"{table.rule}, groups of at least {table.k}{entity}" if table.k else f"{table.rule}: this program only"
    return f"{rule}; at most {table.chunks} MiB"


def _result_words(result: ResultAccount) -> str:
    return f"commitment {result.commitment.hex()[:32]}…; at most {result.chunks} MiB"


def _root_words(root: bytes, simulated: bool) -> str:
    if root == AWS_NITRO_ROOT_G1:
        return "AWS Nitro Enclaves Root G1"
    return f"{'SIMULATED, ' if simulated else 'not AWS commercial, '}SHA-256 {root.hex()}"


def _hex(pcrs: Mapping[int, bytes]) -> dict[str, str]:
    return {str(index): pcr.hex() for index, pcr in pcrs.items()}


def _plain(value: Any) -> Any:
    """With bytes as hex, for JSON."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
