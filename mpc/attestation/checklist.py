"""The numbers of the checklist, and the one way to refuse. docs/ATTESTATION.md has the same numbers and titles."""

from enum import IntEnum
from hashlib import sha256
from typing import Self

from mpc.protocol.errors import AppraisalError


class Step(IntEnum):
    """One check of a document; an AppraisalError carries its number."""

    title: str

    def __new__(cls, number: int, title: str) -> Self:
        step = int.__new__(cls, number)
        step._value_ = number
        step.title = title
        return step

    SIZE = 1, "Size"
    ENVELOPE = 2, "COSE envelope"
    HEADERS = 3, "COSE headers"
    SIGNED_PARTS = 4, "Payload and signature present"
    PAYLOAD = 5, "Payload encoding"
    FIELDS = 6, "Fields"
    MODULE_ID = 7, "module_id"
    TIMESTAMP = 8, "timestamp"
    DIGEST = 9, "digest"
    PCRS = 10, "pcrs"
    CERTIFICATES = 11, "certificate and cabundle"
    OPTIONALS = 12, "public_key, user_data and nonce"
    TIME = 13, "Age"
    ROOT = 14, "Pinned root"
    CERTIFICATE_FORM = 15, "Form of each certificate"
    AUTHORITY = 16, "Certificate authorities"
    CHAIN = 17, "Issuers and their signatures"
    LEAF = 18, "Leaf certificate"
    VALIDITY = 19, "Validity of the whole chain"
    SIGNATURE = 20, "Signature of the document"
    PARENT = 21, "PCR4 against module_id"
    DEBUG = 22, "PCR0, PCR1 and PCR2 are measurements"
    MEASUREMENT = 23, "Accepted measurement"
    NONCE = 24, "Expected nonce"
    USER_DATA = 25, "Expected user_data"
    PUBLIC_KEY = 26, "Expected public_key"
    OTHER_PCRS = 27, "Expected further PCRs"


def refusal(step: Step, what: str, expected: object = None, got: object = None) -> AppraisalError:
    """The error of one step, to be raised by the caller."""
    return AppraisalError(what, step=int(step), expected=expected, got=got)


def shape(value: object) -> str:
    """What a value is, without its content."""
    if isinstance(value, str | bytes | list | tuple | dict):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def short(value: bytes | None) -> str:
    """A digest or key as a person compares it: its first eight bytes in hex."""
    return "none" if value is None else f"{value[:8].hex()}…" if len(value) > 8 else value.hex() or "0 bytes"


def fingerprint_of(value: bytes | None) -> str:
    """Stands for content that an error must not show: length and SHA-256."""
    return "none" if value is None else f"{len(value)} bytes with SHA-256 {short(sha256(value).digest())}"
