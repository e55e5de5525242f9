"""The attestation document of AWS Nitro Enclaves, read strictly: steps 1 to 12 of docs/ATTESTATION.md.

Nothing here is trusted yet: the reader decides what the bytes say, `verify` whether that is true.

Source: aws-nitro-enclaves-nsm-api docs/attestation_process.md sections 2.2 and 3.2.2; RFC 9052; RFC 8949; and, where
they contradict each other, what real documents of 2021 to 2026 look like.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import cbor2

from mpc.attestation.checklist import Step, refusal, shape, short
from mpc.protocol.errors import LocalError

PAYLOAD_BYTES_MAX = 16384
SIGNATURE_BYTES = 96  # ES384: r ‖ s, 48 bytes each, big-endian
PROTECTED_ES384 = bytes.fromhex("a1013822")  # {1: -35}
# array of 4, protected in its byte string, empty map, and the two byte strings with their heads; a tag comes on top
DOCUMENT_BYTES_MAX = 1 + 1 + len(PROTECTED_ES384) + 1 + 3 + PAYLOAD_BYTES_MAX + 2 + SIGNATURE_BYTES
DEPTH_MAX = 4  # a right document has 2; what is a little deeper is refused by the step that knows why
MODULE_ID_CHARS_MAX = 128  # real ones have 39
YEAR_10000_MS = 253_402_300_800_000  # from where no clock or calendar here can hold it
PCR_COUNT_MAX = 32
PCR_BYTES = 48  # SHA-384; AWS's text also allows 32 and 64, for digests that no document may name
CERTIFICATE_BYTES_MAX = 1024
CABUNDLE_MAX = 8  # real ones have 4; each certificate costs a signature check
OPTIONAL_BYTES_MAX = 1024  # AWS's text says 512 in one place; the NSM signs 1024

_TAG_COSE_SIGN1 = b"\xd2"
_MANDATORY = ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle")
_OPTIONAL = ("public_key", "user_data", "nonce")
_MODULE_ID = re.compile(r"(i-[0-9a-f]+)-enc[0-9a-f]+")
_NITROTPM_ID = re.compile(r"i-[0-9a-f]+-tpm[0-9a-f]+")


@dataclass(frozen=True)
class Document:
    """What a well-formed document says. Made only by this module's reader."""

    module_id: str  # i-<instance>-enc<enclave>
    timestamp_ms: int  # Unix time, by the hypervisor's clock
    digest: str  # "SHA384"
    pcrs: Mapping[int, bytes]  # the locked ones: index 0 to 31 → 48 bytes
    certificate: bytes = field(repr=False)  # leaf, DER
    cabundle: tuple[bytes, ...] = field(repr=False)  # DER: root first, the leaf's issuer last
    public_key: bytes | None = field(repr=False)
    user_data: bytes | None = field(repr=False)
    nonce: bytes | None = field(repr=False)
    payload: bytes = field(repr=False)  # what is signed
    signature: bytes = field(repr=False)

    @property
    def instance_id(self) -> str:
        """The parent instance, `i-…`."""
        return self.module_id.split("-enc")[0]

    @property
    def signed_bytes(self) -> bytes:
        """The COSE Sig_structure, RFC 9052 section 4.4, without external data."""
        return cbor2.dumps(["Signature1", PROTECTED_ES384, b"", self.payload])


def unverified_document(document: bytes) -> Document:
    """Read a document without verifying that anything in it is true: for showing it, never for trusting it.

    Raises:  AppraisalError with the number of the failed step, 1 to 12.
    """
    if type(document) is not bytes:
        raise LocalError("attestation document", expected="bytes", got=type(document).__name__)
    # ATTESTATION step 1: before anything is decoded, so that no later step works on more than 16 KiB
    tagged = document.startswith(_TAG_COSE_SIGN1)
    if not 1 <= len(document) - tagged <= DOCUMENT_BYTES_MAX:
        raise refusal(Step.SIZE, "document size", f"1 to {DOCUMENT_BYTES_MAX} bytes", len(document) - tagged)
    payload, signature = _envelope(document[tagged:])
    fields = _fields(_payload(payload))
    module_id = _module_id(fields["module_id"])
    timestamp_ms = _timestamp(fields["timestamp"])
    digest = _digest(fields["digest"])
    pcrs = _pcrs(fields["pcrs"])
    certificate, cabundle = _certificates(fields["certificate"], fields["cabundle"])
    public_key = _optional(fields, "public_key", bytes_min=1)
    user_data, nonce = _optional(fields, "user_data"), _optional(fields, "nonce")
    return Document(
        module_id, timestamp_ms, digest, pcrs, certificate, cabundle, public_key, user_data, nonce, payload, signature
    )


def _envelope(untagged: bytes) -> tuple[bytes, bytes]:
    """Payload and signature of the COSE_Sign1, RFC 9052 section 4.2."""
    # ATTESTATION step 2: one form; its re-encoding must be the same bytes, which leaves no room for trailing bytes,
    # longer heads, indefinite lengths or another tag
    envelope, encoded = _decode(untagged, Step.ENVELOPE)
    if type(envelope) is not list or len(envelope) != 4:
        raise refusal(Step.ENVELOPE, "COSE_Sign1", "an array of 4", shape(envelope))
    if encoded != untagged:
        raise refusal(Step.ENVELOPE, "COSE_Sign1", "its shortest encoding, tag 18 or none, and nothing after it")
    protected, unprotected, payload, signature = envelope
    # ATTESTATION step 3: the algorithm is read from nowhere else
    if type(protected) is not bytes or protected != PROTECTED_ES384:
        got = short(protected) if type(protected) is bytes else shape(protected)
        raise refusal(Step.HEADERS, "protected header", f"{PROTECTED_ES384.hex()} (ES384)", got)
    if type(unprotected) is not dict or unprotected:
        raise refusal(Step.HEADERS, "unprotected header", "an empty map", shape(unprotected))
    # ATTESTATION step 4: a detached payload is null
    if type(payload) is not bytes or not 1 <= len(payload) <= PAYLOAD_BYTES_MAX:
        raise refusal(Step.SIGNED_PARTS, "payload", f"1 to {PAYLOAD_BYTES_MAX} bytes", shape(payload))
    if type(signature) is not bytes or len(signature) != SIGNATURE_BYTES:
        raise refusal(Step.SIGNED_PARTS, "signature", f"{SIGNATURE_BYTES} bytes", shape(signature))
    return payload, signature


def _payload(payload: bytes) -> dict[Any, Any]:
    # ATTESTATION step 5: AWS wrote the map with a definite length until 2025-04, with an indefinite one since; all
    # else has its one shortest encoding. What re-encodes to the same bytes holds no chunked string and no trailing byte
    value, definite = _decode(payload, Step.PAYLOAD)
    if type(value) is not dict:
        raise refusal(Step.PAYLOAD, "payload", "a map", shape(value))
    indefinite = b"\xbf" + definite[1:] + b"\xff"  # the head of a map of under 24 entries is one byte
    if payload != definite and (payload != indefinite or len(value) >= 24):
        raise refusal(Step.PAYLOAD, "payload", "one map, all else in its shortest encoding, and nothing after it")
    return value


def _fields(value: dict[Any, Any]) -> dict[str, Any]:
    # ATTESTATION step 6: sibling formats live under the same root, so they are refused by name; and a field that this
    # program does not know may change what the others mean
    if sibling := [key for key in value if type(key) is str and key.startswith("nitrotpm")]:
        what = "this is a NitroTPM document, of a whole instance and not of an enclave"
        raise refusal(Step.FIELDS, what, "pcrs", ascii(sibling[0][:32]))
    names = {key for key in value if type(key) is str}
    if unknown := [key for key in value if key not in _MANDATORY and key not in _OPTIONAL]:
        named = [ascii(key[:32]) if type(key) is str else type(key).__name__ for key in unknown[:4]]
        raise refusal(Step.FIELDS, "a field that this version does not know", "AWS's nine", ", ".join(named))
    if missing := [name for name in _MANDATORY if name not in names]:
        raise refusal(Step.FIELDS, "a field is missing", ", ".join(missing))
    return value


def _module_id(value: object) -> str:
    # ATTESTATION step 7
    if type(value) is not str:
        raise refusal(Step.MODULE_ID, "module_id", "text", shape(value))
    if len(value) <= MODULE_ID_CHARS_MAX and _MODULE_ID.fullmatch(value):
        return value
    if len(value) <= MODULE_ID_CHARS_MAX and _NITROTPM_ID.fullmatch(value):
        raise refusal(Step.MODULE_ID, "this is a NitroTPM document, of a whole instance", "i-…-enc…", value)
    raise refusal(Step.MODULE_ID, "module_id", "i-<hex>-enc<hex>, an enclave's name", shape(value))


def _timestamp(value: object) -> int:
    # ATTESTATION step 8
    if type(value) is not int or not 0 < value < YEAR_10000_MS:
        got = value if type(value) is int else type(value).__name__
        raise refusal(Step.TIMESTAMP, "timestamp", "milliseconds since 1970, above 0, before the year 10000", got)
    return value


def _digest(value: object) -> str:
    # ATTESTATION step 9
    if type(value) is not str or value != "SHA384":
        raise refusal(Step.DIGEST, "digest", "SHA384", ascii(value[:16]) if type(value) is str else shape(value))
    return value


def _pcrs(value: object) -> Mapping[int, bytes]:
    # ATTESTATION step 10; True is an int for Python, and not an index
    if type(value) is not dict or not 1 <= len(value) <= PCR_COUNT_MAX:
        raise refusal(Step.PCRS, "pcrs", f"a map of 1 to {PCR_COUNT_MAX}", shape(value))
    for index, pcr in value.items():
        if type(index) is not int or not 0 <= index < PCR_COUNT_MAX:
            got = index if type(index) is int else type(index).__name__
            raise refusal(Step.PCRS, "PCR index", f"0 to {PCR_COUNT_MAX - 1}", got)
        if type(pcr) is not bytes or len(pcr) != PCR_BYTES:
            raise refusal(Step.PCRS, f"PCR{index}", f"{PCR_BYTES} bytes", shape(pcr))
    return MappingProxyType(value)


def _certificates(certificate: Any, cabundle: Any) -> tuple[bytes, tuple[bytes, ...]]:
    # ATTESTATION step 11
    if type(cabundle) is not list or not 1 <= len(cabundle) <= CABUNDLE_MAX:
        raise refusal(Step.CERTIFICATES, "cabundle", f"an array of 1 to {CABUNDLE_MAX}", shape(cabundle))
    named = {"certificate": certificate} | {f"cabundle[{index}]": der for index, der in enumerate(cabundle)}
    for name, der in named.items():
        if type(der) is not bytes or not 1 <= len(der) <= CERTIFICATE_BYTES_MAX:
            raise refusal(Step.CERTIFICATES, name, f"1 to {CERTIFICATE_BYTES_MAX} bytes", shape(der))
    return certificate, tuple(cabundle)


def _optional(fields: dict[str, Any], name: str, bytes_min: int = 0) -> bytes | None:
    # ATTESTATION step 12: absent ones are null in every real document; AWS's grammar lets them be left out
    value = fields.get(name)
    if value is not None and (type(value) is not bytes or not bytes_min <= len(value) <= OPTIONAL_BYTES_MAX):
        raise refusal(Step.OPTIONALS, name, f"null, or {bytes_min} to {OPTIONAL_BYTES_MAX} bytes", shape(value))
    return value


class _NoTags(dict[int, Any]):
    """Refuses every tag. cbor2 would otherwise build regular expressions, dates or cycles from a stranger's bytes."""

    def __missing__(self, tag: int) -> Any:
        raise ValueError(f"tag {tag}")


_NO_TAGS = _NoTags()


def _decode(data: bytes, step: Step) -> tuple[Any, bytes]:
    """The value, and its one encoding with shortest heads and definite lengths, to be compared with `data`."""
    try:
        value = cbor2.loads(data, allow_duplicate_keys=False, max_depth=DEPTH_MAX, semantic_decoders=_NO_TAGS)
        return value, cbor2.dumps(value)
    except Exception as error:  # cbor2's own kinds and Python's: all say that the bytes are not such CBOR
        reason = ascii(str(error))[1:-1][:120] if isinstance(error, cbor2.CBORError) else type(error).__name__
        part = "document" if step is Step.ENVELOPE else "payload"
        what = f"{part} is not well-formed CBOR without tags, repeated keys and deep nesting"
        raise refusal(step, what, got=reason) from None
