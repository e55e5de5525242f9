"""`mpc verify`: an attestation document or a receipt, offline, and in words what that proves and what not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from mpc.attestation import AWS_NITRO_ROOT_G1, AppraisalPolicy, Evidence, contract_pcr, unverified_document
from mpc.attestation import verify as verify_document
from mpc.cli import accepted as given
from mpc.cli.files import PATH, read_bounded, refuse_other
from mpc.cli.output import CAUTION, GOOD, Output, examples, with_output
from mpc.cli.unverified import looks_signed
from mpc.protocol.contract import Contract
from mpc.protocol.errors import LocalError, PeerError
from mpc.protocol.signing import ENVELOPE_BYTES_MAX
from mpc.receipt import Account, ResultAccount, TableAccount, accepted_for, utc, verify_receipt


@click.command(
    epilog=examples(
        "mpc verify receipt.cbor                            as its signers agreed",
        "mpc verify receipt.cbor --policy policy.toml       and as you accept it",
        "mpc verify document.bin --pcr 0=HEX --pcr 1=HEX --pcr 2=HEX --nonce HEX",
        "mpc verify document.bin --policy policy.toml --at 2026-11-23T12:00:00Z",
        "mpc verify document.bin --policy policy.toml --contract contract.cbor",
    )
)
@click.argument("file", type=PATH)
@click.option(
    "--policy", type=PATH, metavar="FILE", help="What you accept: a policy.toml, a party's own or a plain one."
)
@click.option("--pcr", "pcrs", multiple=True, metavar="N=HEX", help="A PCR that you expect; 0, 1 and 2, or a policy.")
@click.option("--root", "roots", multiple=True, metavar="HEX|FILE.pem", help="A root that you accept, not AWS's G1.")
@click.option(
    "--contract",
    "contract_file",
    type=PATH,
    metavar="FILE",
    help="The contract that the receipt must be of, or the enclave work for: its digest is in PCR16.",
)
@click.option("--nonce", metavar="HEX", help="The nonce that a document must hold; only that proves freshness.")
@click.option("--at", metavar="TIME", help="Judge a document as of this time (ISO 8601 or Unix) and not as of now.")
@with_output
def verify(
    out: Output,
    file: Path,
    policy: Path | None,
    pcrs: tuple[str, ...],
    roots: tuple[str, ...],
    contract_file: Path | None,
    nonce: str | None,
    at: str | None,
) -> int:
    """Verify a receipt or an attestation document, offline.

    Exit status: 0 accepted; 1 refused, with the number of the failed step (R1 to R9 of a receipt, 1 to 27 of
    docs/ATTESTATION.md of a document); 2 misuse.
    """
    if policy is not None and roots:
        raise LocalError("--root: a policy names its own roots; leave out one of the two")
    expected, fingerprints = given.read_pcrs(pcrs), frozenset(given.read_root(root) for root in roots)
    nonce_bytes = None if nonce is None else given.read_hex("--nonce", nonce)
    at_ms = None if at is None else given.read_time(at)
    contract = None if contract_file is None else given.read_contract(contract_file)
    content = read_bounded(file, ENVELOPE_BYTES_MAX)
    if looks_signed(content):
        if nonce is not None or at is not None:
            raise LocalError(
                f"{file}: a receipt has its own nonces and is judged at its own time; leave --nonce and --at out"
            )
        digest = contract.digest if contract else None
        with _refused(file):
            account = verify_receipt(content, None, digest)  # a broken receipt is refused before a policy is
            mine = given.accepted(policy, expected, fingerprints, (account.name, account.simulated))
            return show_receipt(out, account if mine is None else verify_receipt(content, mine, digest))
    refuse_other(file, content)
    with _refused(file):
        unverified_document(content)  # a broken document is refused before anything is said about options
    session = (contract.name, contract.enclave.simulated) if contract else None
    mine = given.accepted(policy, expected, fingerprints, session)
    if mine is None:
        raise LocalError(
            f"{file}: nothing says what you accept; name --policy FILE, or --pcr 0=HEX --pcr 1=HEX --pcr 2=HEX, from a "
            "source that you trust (`mpc measure`), not from the document"
        )
    with _refused(file):
        evidence = _evidence(content, mine, contract, nonce_bytes, at_ms)
        return show_evidence(out, evidence, contract, unverified_document(content).cabundle[0])


def _evidence(
    document: bytes, mine: AppraisalPolicy, contract: Contract | None, nonce: bytes | None, at_ms: int | None
) -> Evidence:
    """A contract narrows what is accepted, and is in PCR16 (step 27)."""
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    policy, pcrs = (mine, {}) if contract is None else (accepted_for(contract, mine), contract_pcr(contract.digest))
    return verify_document(document, policy, nonce=nonce, pcrs=pcrs, at=now_ms if at_ms is None else at_ms)


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    """A refusal says of which file."""
    try:
        yield
    except PeerError as error:
        error.what = f"{file}: {error.what}"
        raise


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


def show_evidence(out: Output, evidence: Evidence, contract: Contract | None, root: bytes) -> int:
    from cryptography import x509

    subject = x509.load_der_x509_certificate(root).subject.rfc4514_string()
    simulated = not evidence.aws and "simulated" in subject.lower()
    proves, does_not = _document_claims(evidence, contract, simulated)
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
            *([("contract", contract.digest.hex())] if contract else []),
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
        "contract": contract.digest.hex() if contract else None,
        **{name: None if value is None else value.hex() for name, value in _carried(evidence).items()},
        "unchecked": list(evidence.unchecked),
        "proves": proves,
        "does_not_prove": does_not,
    }
    out.document({"status": "accepted", "kind": "attestation document", **said})
    return 0


def _document_claims(evidence: Evidence, contract: Contract | None, simulated: bool) -> tuple[list[str], list[str]]:
    proves = [
        f"At {utc(evidence.timestamp_ms)} a security module under this root signed that an enclave runs with the PCRs "
        f"that you accept ({evidence.measurement.label}).",
        "It does not run in debug mode: its host cannot read its console.",
    ]
    if contract is not None:
        proves.append(f"It works for this contract ({contract.name}) and for no other: PCR16 is locked to its digest.")
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
    if table.rule == "noise":
        rule = f"noise, epsilon {table.epsilon:g} and delta {table.delta:g} spent{entity}, {table.rows} row(s) of each"
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
