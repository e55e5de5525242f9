"""The certificate chain of a document, from the pinned root to the leaf: steps 14 to 19 of docs/ATTESTATION.md.

Walked by hand, because AWS's leaves have no subject alternative name, no extended key usage and sometimes no key
identifiers, so that profiles made for the web refuse them; parsing, names and signatures are `cryptography`'s.

Source: RFC 5280 section 6.1; aws-nitro-enclaves-nsm-api docs/attestation_process.md section 3.2.3.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509.oid import NameOID

from mpc.attestation.checklist import Step, refusal, short
from mpc.attestation.document import Document

CHAINS_REMEMBERED = 128  # about 10 KB each; a region's chain down to the instance serves for a day

_ES384 = ec.ECDSA(hashes.SHA384())
_ECDSA_WITH_SHA384 = bytes.fromhex("300a06082a8648ce3d040303")  # AlgorithmIdentifier, RFC 5758 section 3.2
T = TypeVar("T", bound=x509.ExtensionType)


@dataclass(frozen=True)
class Certificate:
    """What the walk needs of one certificate of the right form."""

    parsed: x509.Certificate
    key: ec.EllipticCurvePublicKey
    constraints: x509.Extension[x509.BasicConstraints] | None
    usage: x509.Extension[x509.KeyUsage] | None
    not_before_ms: int
    not_after_ms: int
    signed: bytes  # TBSCertificate; this and the next three as encoded
    inner_algorithm: bytes
    issuer: bytes
    subject: bytes

    @property
    def path_length(self) -> int | None:
        """How many authorities may stand below this one; None is any number."""
        return self.constraints.value.path_length if self.constraints else 0


def check_chain(document: Document, roots: frozenset[bytes], earliest_ms: int, latest_ms: int) -> Certificate:
    """Walk from the pinned root to the leaf and give the leaf, whose key signed the document.

    Args:    roots: accepted SHA-256 fingerprints; the chain must hold from earliest_ms to latest_ms, Unix time.
    Raises:  AppraisalError, steps 14 to 19.
    """
    # ATTESTATION step 14: the place says which certificate claims to be the root, its fingerprint whether it is
    if (root := sha256(document.cabundle[0]).digest()) not in roots:
        accepted = " or ".join(sorted(short(fingerprint) for fingerprint in roots))
        raise refusal(Step.ROOT, "root certificate (SHA-256 of cabundle[0])", accepted, short(root))
    authorities = _authorities(document.cabundle)
    leaf = _leaf(document.cabundle, document.certificate)
    _check_leaf_name(leaf, document.module_id)
    # ATTESTATION step 19: of every certificate, root included, and never from memory
    for index, certificate in enumerate((*authorities, leaf)):
        if not (certificate.not_before_ms <= earliest_ms and latest_ms <= certificate.not_after_ms):
            place = f"cabundle[{index}]" if index < len(authorities) else "certificate"
            validity = _span(certificate.not_before_ms, certificate.not_after_ms)
            raise refusal(Step.VALIDITY, f"{place}: validity", validity, _span(earliest_ms, latest_ms))
    return leaf


def check_signature(document: Document, leaf: Certificate) -> None:
    """Check the document's COSE signature by the leaf's key; raises AppraisalError, step 20."""
    half = len(document.signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (document.signature[:half], document.signature[half:]))
    try:
        # ATTESTATION step 20: r and s out of range are refused below; high s is allowed, most real documents have it
        leaf.key.verify(utils.encode_dss_signature(r, s), document.signed_bytes, _ES384)
    except InvalidSignature:
        raise refusal(Step.SIGNATURE, "the document's signature is not of its certificate's key") from None


_LIMITS = (x509.NameConstraints, x509.PolicyConstraints, x509.InhibitAnyPolicy)


@lru_cache(maxsize=CHAINS_REMEMBERED)
def _authorities(bundle: tuple[bytes, ...]) -> tuple[Certificate, ...]:
    """All that does not depend on the time, for a chain of authorities, each checked under the one before.

    Remembered for exactly these certificates' bytes, so each prefix of a chain is checked once; refusals are not.
    The first certificate's own signature proves nothing: its fingerprint is what is trusted.
    """
    place = f"cabundle[{len(bundle) - 1}]"
    above = _authorities(bundle[:-1]) if len(bundle) > 1 else ()
    certificate = _read(bundle[-1], place)
    # ATTESTATION step 16
    if not (certificate.constraints and certificate.constraints.critical and certificate.constraints.value.ca):
        raise refusal(Step.AUTHORITY, f"{place}: basicConstraints", "critical, CA")
    if not (certificate.usage and certificate.usage.value.key_cert_sign):
        raise refusal(Step.AUTHORITY, f"{place}: keyUsage", "keyCertSign")
    for index, authority in enumerate(above):
        allowed, below = authority.path_length, len(above) - index
        if allowed is not None and below > allowed:
            raise refusal(Step.AUTHORITY, f"cabundle[{index}]: authorities below it", f"at most {allowed}", below)
    if above:
        _check_issued(certificate, above[-1], place)
    return (*above, certificate)


@lru_cache(maxsize=CHAINS_REMEMBERED)
def _leaf(bundle: tuple[bytes, ...], der: bytes) -> Certificate:
    """The leaf under its authorities; remembered for exactly these bytes."""
    leaf = _read(der, "certificate")
    _check_issued(leaf, _authorities(bundle)[-1], "certificate")
    # ATTESTATION step 18
    if leaf.constraints and leaf.constraints.value.ca:
        raise refusal(Step.LEAF, "certificate: basicConstraints", "not a CA")
    if not leaf.usage or not leaf.usage.value.digital_signature or leaf.usage.value.key_cert_sign:
        raise refusal(Step.LEAF, "certificate: keyUsage", "digitalSignature and not keyCertSign")
    return leaf


def _check_leaf_name(leaf: Certificate, module_id: str) -> None:
    # ATTESTATION step 18: the name is the enclave's, followed by nothing or by its region
    try:
        names = [name.value for name in leaf.parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except ValueError:  # names are parsed when they are asked for
        raise refusal(Step.LEAF, "certificate: subject", "well-formed names") from None
    if len(names) != 1 or str(names[0]).partition(".")[0] != module_id:
        raise refusal(Step.LEAF, "certificate: common name", f"{module_id}.<region>", ascii(names)[:160])


def _read(der: bytes, place: str) -> Certificate:
    # ATTESTATION step 15
    step = Step.CERTIFICATE_FORM
    try:
        signed, algorithm, _ = _elements(der)
        _, serial, inner_algorithm, issuer, _, subject, *_ = _elements(signed)
        _check_positive(serial)
        certificate = x509.load_der_x509_certificate(der)
        key, extensions, version = certificate.public_key(), certificate.extensions, certificate.version
        not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except Exception as error:  # the parser's many kinds, all for the same reason
        expected = "strict DER of X.509 v3, a serial number above 0, no extension twice, a key on its curve"
        raise refusal(step, f"{place}: not a certificate", expected, type(error).__name__) from None
    if version is not x509.Version.v3:
        raise refusal(step, f"{place}: version", "v3", version.name)
    if algorithm != _ECDSA_WITH_SHA384:
        got = certificate.signature_algorithm_oid.dotted_string
        raise refusal(step, f"{place}: signature algorithm", "ecdsa-with-SHA384, without parameters", got)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        got = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
        raise refusal(step, f"{place}: key", "on P-384", got)
    for extension in extensions:
        if extension.critical and type(extension.value) not in (x509.BasicConstraints, x509.KeyUsage):
            understood = "basicConstraints and keyUsage only"
            raise refusal(step, f"{place}: critical extension", understood, extension.oid.dotted_string)
        if isinstance(extension.value, _LIMITS):  # RFC 5280 section 6.1 heeds them, critical or not
            raise refusal(
                step, f"{place}: extension", "no constraints on names or policies", extension.oid.dotted_string
            )
    return Certificate(
        parsed=certificate,
        key=key,
        constraints=_extension(extensions, x509.BasicConstraints),
        usage=_extension(extensions, x509.KeyUsage),
        not_before_ms=int(not_before.timestamp()) * 1000,
        not_after_ms=int(not_after.timestamp()) * 1000,
        signed=signed,
        inner_algorithm=inner_algorithm,
        issuer=issuer,
        subject=subject,
    )


def _elements(sequence: bytes) -> list[bytes]:
    """The elements of a DER SEQUENCE, as encoded: right for a certificate that the library reads, too. It is strict.

    Names are compared as they are encoded (step 17), which the library shows nobody.
    """
    elements, place = [], _content(sequence, 0)[0]
    while place < len(sequence):
        start, size = _content(sequence, place)
        elements.append(sequence[place : start + size])
        place = start + size
    return elements


def _content(der: bytes, place: int) -> tuple[int, int]:
    """Where the content of the element at `place` begins, and its size; X.690 section 8.1.3."""
    size, start = der[place + 1], place + 2
    if size < 0x80:
        return start, size
    end = start + (size & 0x7F)
    return end, int.from_bytes(der[start:end], "big")


def _check_positive(serial: bytes) -> None:
    """Before the library reads it: of another serial number that warns on standard error, and goes on."""
    if int.from_bytes(serial[_content(serial, 0)[0] :], "big", signed=True) <= 0:
        raise ValueError("serial number")


def _extension(extensions: x509.Extensions, kind: type[T]) -> x509.Extension[T] | None:
    return next((extension for extension in extensions if type(extension.value) is kind), None)


def _check_issued(certificate: Certificate, issuer: Certificate, place: str) -> None:
    # ATTESTATION step 17: names as encoded, because AWS orders the attributes of its names differently from one
    # authority to the next, and no two encodings of a name are one name. `verify_directly_issued_by` compares the same,
    # but makes the issuer's key anew each time
    if certificate.issuer != issuer.subject:
        raise refusal(Step.CHAIN, f"{place}: its issuer is not the subject of the certificate above it")
    if certificate.inner_algorithm != _ECDSA_WITH_SHA384:
        raise refusal(Step.CHAIN, f"{place}: it names another signature algorithm inside than outside")
    try:
        issuer.key.verify(certificate.parsed.signature, certificate.signed, _ES384)
    except InvalidSignature:
        raise refusal(Step.CHAIN, f"{place}: its signature is not of the certificate above it") from None


def _span(*times_ms: int) -> str:
    return " to ".join(dict.fromkeys(f"{datetime.fromtimestamp(ms / 1000, UTC):%F %TZ}" for ms in times_ms))


def forget() -> None:
    """Forget all chains that were remembered: for measuring, and for nothing else."""
    _authorities.cache_clear()
    _leaf.cache_clear()
