"""What a person accepts, as written on a command line: PCRs, roots, times, a policy file, a contract file."""

import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256, sha384
from pathlib import Path

from mpc.attestation import AWS_NITRO_ROOT_G1, AppraisalPolicy, Measurement, root_fingerprint
from mpc.attestation.document import YEAR_10000_MS
from mpc.attestation.policy import CODE_PCRS
from mpc.cli.files import read_bounded
from mpc.cli.unverified import looks_signed
from mpc.protocol.contract import Contract
from mpc.protocol.errors import LocalError, PeerError, PolicyError
from mpc.protocol.rounds import Session
from mpc.protocol.signing import ENVELOPE_BYTES_MAX
from mpc.settings import FILE_BYTES_MAX, parse

PEM_BYTES_MAX = 1 << 20
MILLIS_FROM = 10**11  # a larger number is Unix time in milliseconds: in seconds it would be after the year 5000
NO_IMAGE = sha384(b"a PCR of zeros was asked for").digest()  # of nothing, so that no document has it


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
    """SHA-256 of a root certificate: by a known name, from hex digits, or from its PEM file.

    In this order: a file that somebody named like AWS's root must not take its place.
    """
    try:
        return root_fingerprint(text)
    except LocalError:
        if not os.path.isfile(text):  # noqa: PTH113 - Path's raises for a name that is too long for one
            raise
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    path = Path(text)
    try:
        (certificate,) = x509.load_pem_x509_certificates(read_bounded(path, PEM_BYTES_MAX))
    except ValueError:
        raise LocalError(f"{path}: not one certificate in PEM form") from None
    return sha256(certificate.public_bytes(Encoding.DER)).digest()


def read_time(text: str) -> int:
    """Unix ms. A time without an offset is UTC."""
    try:
        if re.fullmatch(r"[0-9]{1,15}", text):
            time_ms = int(text) if int(text) >= MILLIS_FROM else int(text) * 1000
        else:
            time = datetime.fromisoformat(text)
            time_ms = round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
        if 0 < time_ms < YEAR_10000_MS:
            return time_ms
    except ValueError:
        pass
    expected = "ISO 8601 like 2026-11-23T12:00:00Z, or Unix time in seconds or milliseconds; after 1970, before 10000"
    raise LocalError("--at", expected=expected, got=text[:40])


def accepted(
    file: Path | None, pcrs: Mapping[int, bytes], roots: frozenset[bytes], session: tuple[str, bool] | None
) -> AppraisalPolicy | None:
    """What the reader accepts; None when nothing was said.

    Args: session: of which a party's policy may speak: the contract's name, and whether it calls itself simulated.
    """
    if file is not None:
        policy = _read_policy(file, session)
        return _with_pcrs(policy, pcrs) if pcrs else policy
    if not pcrs and not roots:
        return None
    if missing := [f"--pcr {index}=HEX" for index in CODE_PCRS if index not in pcrs]:
        raise LocalError("what you accept", expected=f"also {' '.join(missing)}: only all three say which code runs")
    return AppraisalPolicy((Measurement("from the command line", pcrs),), roots or frozenset({AWS_NITRO_ROOT_G1}))


def _read_policy(file: Path, session: tuple[str, bool] | None) -> AppraisalPolicy:
    table = parse(read_bounded(file, FILE_BYTES_MAX), str(file))
    if "party" not in table:
        try:
            return AppraisalPolicy.from_table(table)
        except LocalError as error:
            raise LocalError(f"{file}: {error.what}", expected=error.expected, got=error.got) from None
    from parties.policy import load  # a party's own policy says more than which enclaves

    policy = load(file)
    name, simulated = session or ("", False)
    # A root that is accepted as simulated vouches for nothing that does not call itself so.
    roots = [root.fingerprint for root in policy.root if root.scenario in ("", name) and root.simulated == simulated]
    if not roots:
        words = " | ".join(root.scenario for root in policy.root)
        kind = "called simulated" if simulated else "not called simulated"
        got = "a document alone, without --contract" if session is None else f"{name}, {kind}"
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


def read_contract(file: Path) -> Contract:
    """A contract that its author signed, as `mpc run` writes it (contract.cbor). Raises LocalError."""
    content = read_bounded(file, ENVELOPE_BYTES_MAX)
    if not looks_signed(content):
        raise LocalError(f"{file}: is not a contract", expected="a signed one, like the contract.cbor of a run")
    try:
        return Session.propose(content).contract
    except PeerError as error:
        raise LocalError(f"{file}: cannot be used as a contract: {error}") from None
