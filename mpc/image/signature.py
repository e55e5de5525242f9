"""The signature section of an EIF file: one COSE_Sign1 over PCR0 by the key of an X.509 certificate.

Nothing in it is believed: what it must sign is rebuilt from the PCR0 that we measured.

Source: aws-nitro-enclaves-image-format src/utils/eif_signer.rs and src/defs/mod.rs; RFC 9052 section 4.4.
"""

from dataclasses import dataclass
from typing import Any

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from mpc.image.eif import SMALL_BYTES_MAX, ImageError, Kind
from mpc.protocol.errors import LocalError

_DEPTH_MAX = 4  # list → map → list of bytes is 3
# Curve → COSE algorithm (ES256, ES384, ES512), its hash, bytes of r and of s.
_ALGORITHMS: dict[str, tuple[int, hashes.HashAlgorithm, int]] = {
    "secp256r1": (-7, hashes.SHA256(), 32),
    "secp384r1": (-35, hashes.SHA384(), 48),
    "secp521r1": (-36, hashes.SHA512(), 66),
}


@dataclass(frozen=True)
class Signer:
    """Who signs images: a private key on P-256, P-384 or P-521 and the certificate of that key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def load(cls, key_pem: bytes, certificate_pem: bytes) -> "Signer":
        """Raises LocalError unless the two are PEM, unencrypted, and belong together."""
        try:
            key = serialization.load_pem_private_key(key_pem, None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except (ValueError, TypeError):
            raise LocalError(
                "signing an image", expected="key and certificate as PEM files without a password"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _ALGORITHMS:
            raise LocalError("signing an image: the key", expected="one on P-256, P-384 or P-521")
        if certificate.public_key() != key.public_key():
            raise LocalError("signing an image: the certificate is of another key")
        return cls(key, certificate)

    def sign(self, pcr0: bytes) -> bytes:
        """The content of the signature section."""
        algorithm, digest, size = _ALGORITHMS[self.key.curve.name]
        protected, payload = cbor2.dumps({1: algorithm}), _payload(pcr0)
        how = ec.ECDSA(digest, deterministic_signing=True)  # RFC 6979: two builds are the same bytes
        r, s = decode_dss_signature(self.key.sign(_signed(protected, payload), how))
        signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
        pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        message = cbor2.dumps([protected, {}, payload, signature])
        return cbor2.dumps([{"signing_certificate": list(pem), "signature": list(message)}])


def verify(section: bytes, pcr0: bytes) -> x509.Certificate:
    """The certificate whose key signed this PCR0.

    Raises: ImageError when the section is anything else. Whether to trust the certificate is another question.
    """
    items = _decode(section, list)
    if len(items) != 1 or not isinstance(items[0], dict) or items[0].keys() != {"signing_certificate", "signature"}:
        raise ImageError("signature section", expected="one map of signing_certificate and signature")
    pem, message = (_octets(items[0][name], name) for name in ("signing_certificate", "signature"))
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        key = certificate.public_key()
    except Exception:  # ValueError, UnsupportedAlgorithm and, for some broken keys, others
        raise ImageError("signature section: its certificate", expected="an X.509 certificate as PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _ALGORITHMS:
        raise ImageError("signature section: key of the certificate", expected="one on P-256, P-384 or P-521")
    algorithm, digest, size = _ALGORITHMS[key.curve.name]
    protected, payload = cbor2.dumps({1: algorithm}), _payload(pcr0)
    match _decode(message, list):
        case [bytes(header), dict(unprotected), bytes(signed), bytes(signature)]:
            if header != protected or unprotected or len(signature) != 2 * size:
                raise ImageError(
                    "signature section: COSE_Sign1", expected=f"algorithm {algorithm} for this key, no more"
                )
        case _:
            raise ImageError("signature section: COSE_Sign1", expected="a list of header, {}, payload, signature")
    if signed != payload:
        raise ImageError("signature section: it signs another image than this one")
    r, s = int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big")
    try:
        key.verify(encode_dss_signature(r, s), _signed(protected, payload), ec.ECDSA(digest))
    except InvalidSignature:
        raise ImageError("signature section: the signature is not valid") from None
    return certificate


def _payload(pcr0: bytes) -> bytes:
    """As serde_cbor writes AWS's PcrInfo."""
    return cbor2.dumps({"register_index": 0, "register_value": list(pcr0)})


def _signed(protected: bytes, payload: bytes) -> bytes:
    return cbor2.dumps(["Signature1", protected, b"", payload])


def _decode(data: bytes, kind: type) -> Any:
    try:
        value = cbor2.loads(data, allow_duplicate_keys=False, max_depth=_DEPTH_MAX)
        if isinstance(value, kind) and cbor2.dumps(value) == data:
            return value
    except Exception:  # noqa: S110 - cbor2's own and Python's, all for the same reason
        pass
    raise ImageError("signature section: not the CBOR that AWS's tools write", expected=f"a {kind.__name__}")


def _octets(value: object, name: str) -> bytes:
    """Bytes that serde wrote as a list of numbers."""
    try:
        if isinstance(value, list) and len(value) <= SMALL_BYTES_MAX[Kind.SIGNATURE]:
            return bytes(value)
    except (TypeError, ValueError):
        pass
    raise ImageError(f"signature section: {name}", expected="a list of bytes")
