"""`mpc inspect`: what a file says, decoded and not verified."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import wrap
from typing import Any

import click

from mpc.attestation import Document, unverified_document
from mpc.cli.files import PATH, read_bounded, refuse_other
from mpc.cli.output import CAUTION, WIDTH_MAX, Output, examples, printable, with_output
from mpc.cli.unverified import looks_signed, unverified_message
from mpc.protocol.contract import Contract
from mpc.protocol.encoding import Record
from mpc.protocol.errors import EncodingError, LocalError, PeerError
from mpc.protocol.signing import ENVELOPE_BYTES_MAX
from mpc.receipt import utc

WITHIN_MAX = 3  # a release holds its history, that an attestation, that the consents
HEX_SHOWN = 32  # digits of longer bytes; --json has all
ENVELOPES, DOCUMENT = ("roster", "history"), "document"  # fields that hold what can be decoded, too


@click.command(epilog=examples("mpc inspect receipt.cbor", "mpc inspect document.bin --json"))
@click.argument("file", type=PATH)
@with_output
def inspect(out: Output, file: Path) -> int:
    """Show what FILE says: an attestation document, a contract, a receipt, or any signed message.

    NOTHING is verified: no signature, no digest, no order. `mpc verify` does that.

    Exit status: 0 decoded; 2 the file is nothing that this command knows.
    """
    out.quiet = False  # all that it prints is its result
    content = read_bounded(file, ENVELOPE_BYTES_MAX)
    refuse_other(file, content)
    try:
        decoded = message(content) if looks_signed(content) else document(content)
    except PeerError as error:
        raise LocalError(f"{file}: cannot be decoded: {error}") from None
    out.verdict("not verified", f"{decoded['kind']}, as the file says; `mpc verify` checks", CAUTION)
    out.line()
    if looks_signed(content):
        for line in _lines(decoded, 1):
            out.line(line)
    else:
        _show_document(out, decoded["says"])
    out.document({"verified": False, **decoded})
    return 0


def message(envelope: bytes, within: int = 0) -> dict[str, Any]:
    """A signed message, and those inside it. Bytes are hex. Raises PeerError; no message of ours is `within` four."""
    if within > WITHIN_MAX:
        raise EncodingError("messages within messages", expected=f"at most {WITHIN_MAX} deep")
    kind, signer, record = unverified_message(envelope)
    shown = {"kind": kind, "claimed_signer": signer.hex(), "bytes": len(envelope)}
    if isinstance(record, Contract):
        shown["digest"] = record.digest.hex()
    return {**shown, "says": _record(record, within)}


def document(content: bytes) -> dict[str, Any]:
    """An attestation document."""
    return {"kind": "attestation document", "bytes": len(content), "says": _claims(unverified_document(content))}


def _record(record: Record, within: int) -> dict[str, Any]:
    return {
        field.name: _value(field.name, getattr(record, field.name), within)
        for field in fields(record)  # type: ignore[arg-type]
    }


def _value(name: str, value: object, within: int) -> Any:
    if isinstance(value, Record):
        return _record(value, within)
    if isinstance(value, tuple):
        return [message(item, within + 1) if name in ENVELOPES else _value(name, item, within) for item in value]
    if isinstance(value, bytes):
        return document(value) if name == DOCUMENT else value.hex()
    return value


def _claims(claims: Document) -> dict[str, Any]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    def certificate(der: bytes) -> dict[str, Any]:
        try:
            read = x509.load_der_x509_certificate(der)
            names = {"subject": read.subject.rfc4514_string(), "issuer": read.issuer.rfc4514_string()}
            times = (read.not_valid_before_utc, read.not_valid_after_utc)
            return {
                **names,
                "valid": " to ".join(f"{time:%F %T}" for time in times),
                "sha256": read.fingerprint(hashes.SHA256()).hex(),
            }
        except Exception:  # the parser's many kinds, all for the same reason
            return {"not_a_certificate": f"{len(der)} bytes"}

    return {
        "module_id": claims.module_id,
        "timestamp_ms": claims.timestamp_ms,
        "digest": claims.digest,
        "pcrs": {f"PCR{index}": pcr.hex() for index, pcr in claims.pcrs.items()},
        "cabundle": [certificate(der) for der in claims.cabundle],
        "certificate": certificate(claims.certificate),
        **{
            name: None if value is None else value.hex()
            for name, value in (
                ("public_key", claims.public_key),
                ("user_data", claims.user_data),
                ("nonce", claims.nonce),
            )
        },
    }


def _show_document(out: Output, says: dict[str, Any]) -> None:
    out.facts(
        [
            ("module_id", says["module_id"]),
            ("timestamp", utc(says["timestamp_ms"])),
            *((name, says[name] or "none") for name in ("public_key", "user_data", "nonce")),
            *_without_zeros(says["pcrs"]).items(),
        ]
    )
    out.heading("Certificates, root first")
    for certificate in (*says["cabundle"], says["certificate"]):
        out.line()
        out.facts((name, value.replace(",", ", ")) for name, value in certificate.items())


def _without_zeros(pcrs: dict[str, str]) -> dict[str, str]:
    zeros = [name for name, value in pcrs.items() if not value.strip("0")]
    return {**{name: value for name, value in pcrs.items() if name not in zeros}, "zero": ", ".join(zeros) or "none"}


def _lines(value: dict[str, Any], depth: int) -> Iterator[str]:
    """As an indented tree."""
    indent = "  " * depth
    width = max((len(name) for name, item in value.items() if not _nested(item)), default=0) + 2
    for name, item in value.items():
        if not _nested(item):
            yield from _leaf(f"{indent}{name.ljust(width)}", _words(name, item))
            continue
        yield f"{indent}{name}"
        if isinstance(item, dict):
            yield from _lines(_without_zeros(item) if name == "pcrs" else item, depth + 1)
            continue
        for one in item:
            first, *rest = _lines(one, depth + 2)
            yield f"{indent}  - {first.lstrip()}"
            yield from rest


def _leaf(start: str, text: str) -> Iterator[str]:
    """One value, in as many lines as it needs; text of several lines keeps them."""
    for paragraph in printable(text).strip().split("\n"):
        wrapped = wrap(paragraph, WIDTH_MAX - len(start), break_on_hyphens=False, drop_whitespace=False) or [""]
        for line in wrapped:
            yield start + line.rstrip()
            start = " " * len(start)


def _nested(item: object) -> bool:
    return isinstance(item, dict) or (isinstance(item, list) and bool(item) and isinstance(item[0], dict))


def _words(name: str, item: object) -> str:
    if item is None:
        return "none"
    if isinstance(item, list):
        return ", ".join(_words("", one) for one in item) or "none"
    if name.endswith("_ms") and isinstance(item, int):
        return utc(item)
    if isinstance(item, str) and len(item) > 2 * HEX_SHOWN and not set(item) - set("0123456789abcdef"):
        return f"{item[:HEX_SHOWN]}… ({len(item) // 2} bytes)"
    return str(item)
