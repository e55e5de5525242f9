"""A simulated root of attestation, and the certificate authorities below it, with the shape of AWS's.

Whoever holds its key signs what it likes, so it proves nothing about the machine that it is on. Nobody trusts such a
root unless a policy names its fingerprint, and every name in its certificates says simulated.

Source: the certificates in AWS's own documents of 2021 to 2026 (names, orders, extensions, life times).
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpc.protocol.errors import LocalError

REGION = "local"

# How long certificates live, and how old an authority may get before another takes its place.
HOUR_S = 3600
DAY_S = 24 * HOUR_S
ROOT_LIFE_S, ROOT_BACKDATED_S = 10958 * DAY_S + HOUR_S, DAY_S  # other clocks may be behind
REGIONAL_LIFE_S, REGIONAL_TURN_S = 20 * DAY_S + HOUR_S, 10 * DAY_S
ZONAL_LIFE_S, ZONAL_TURN_S = 5 * DAY_S + 22 * HOUR_S, 2 * DAY_S
INSTANCE_LIFE_S, INSTANCE_TURN_S = DAY_S, DAY_S // 2

Entropy = Callable[[int], bytes]  # like os.urandom
Extensions = tuple[tuple[x509.ExtensionType, bool], ...]  # each with whether it is critical

_CURVE = ec.SECP384R1()
_CURVE_ORDER = int("f" * 48 + "c7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)
KEY_SEED_BYTES = 56  # 8 more than the order has: no bias
_ROOT_FILE = "simulated-root.pem"


@dataclass(frozen=True)
class Template:
    """What a certificate says beside its key and its issuer."""

    subject: x509.Name
    serial: int
    not_before_s: int  # Unix time
    not_after_s: int
    extensions: Extensions


@dataclass(frozen=True)
class Issued:
    """A certificate, its private key, and what it was made from."""

    template: Template = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    der: bytes


def issue(template: Template, key: ec.EllipticCurvePrivateKey, issuer: Issued | None) -> Issued:
    """Sign a certificate (X.509 v3, ecdsa-with-SHA384, RFC 6979); no issuer: by itself."""
    builder = x509.CertificateBuilder(
        issuer_name=issuer.template.subject if issuer else template.subject,
        subject_name=template.subject,
        public_key=key.public_key(),
        serial_number=template.serial,
        not_valid_before=_utc(template.not_before_s),
        not_valid_after=_utc(template.not_after_s),
    )
    for extension, critical in template.extensions:
        builder = builder.add_extension(extension, critical)
    signed = builder.sign(issuer.key if issuer else key, hashes.SHA384(), ecdsa_deterministic=True)
    return Issued(template, key, signed.public_bytes(serialization.Encoding.DER))


def private_key(seed: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-384 key of 56 bytes of entropy."""
    return ec.derive_private_key(1 + int.from_bytes(seed, "big") % (_CURVE_ORDER - 1), _CURVE)


class SimulatedRoot:
    """A root of attestation of this machine, and the certificate authorities below it, which follow from its key."""

    def __init__(self, issued: Issued) -> None:
        self._issued = issued
        self._secret = issued.key.private_numbers().private_value.to_bytes(48, "big")
        # An authority is drawn from root key, level and time alone, so a forgotten one comes back the same.
        self._regional = lru_cache(maxsize=8)(self._issue_regional)
        self._zonal = lru_cache(maxsize=8)(self._issue_zonal)
        self._instance = lru_cache(maxsize=64)(self._issue_instance)

    @classmethod
    def create(cls, *, entropy: Entropy = os.urandom, now_ms: int | None = None) -> Self:
        """A new root, valid for 30 years from now on."""
        now_s = int(time.time()) if now_ms is None else now_ms // 1000
        key = private_key(entropy(KEY_SEED_BYTES))
        template = Template(
            subject=_authority_name("simulated.nitro-enclaves"),
            serial=serial(entropy(16)),
            not_before_s=now_s - ROOT_BACKDATED_S,
            not_after_s=now_s - ROOT_BACKDATED_S + ROOT_LIFE_S,
            extensions=(
                (x509.BasicConstraints(ca=True, path_length=None), True),
                (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
                (key_usage("digital_signature", "key_cert_sign", "crl_sign"), True),
            ),
        )
        return cls(issue(template, key, None))

    @classmethod
    def load_or_create(cls, folder: Path) -> Self:
        """The root of `folder`, made at the first call; of two processes that make one, both get the same.

        Raises: LocalError when the file is not what this function wrote, or others may read it.
        """
        path = folder / _ROOT_FILE
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_once(path, cls.create()._pem())
        return cls(_read_root(path))

    @property
    def certificate(self) -> bytes:
        """DER."""
        return self._issued.der

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate's DER, 32 bytes: what a policy names."""
        return hashlib.sha256(self._issued.der).digest()

    def chain(self, instance_id: str, now_s: int) -> tuple[Issued, Issued, Issued, Issued]:
        """Root, regional, zonal and instance authority that sign at this time."""
        window = now_s // INSTANCE_TURN_S
        start_s = window * INSTANCE_TURN_S
        zonal_s = start_s // ZONAL_TURN_S * ZONAL_TURN_S
        return (
            self._issued,
            self._regional(zonal_s // REGIONAL_TURN_S),
            self._zonal(zonal_s // ZONAL_TURN_S),
            self._instance(instance_id, window),
        )

    def _issue_regional(self, window: int) -> Issued:
        label = f"regional {window}"
        return self._issue_authority(
            label,
            self._issued,
            _authority_name(f"{self._draw(f'{label} name', 8).hex()}.{REGION}.simulated.nitro-enclaves"),
            window * REGIONAL_TURN_S,
            REGIONAL_LIFE_S,
            path_length=2,
        )

    def _issue_zonal(self, window: int) -> Issued:
        label, start_s = f"zonal {window}", window * ZONAL_TURN_S
        common_name = f"{self._draw(f'{label} name', 8).hex()}.zonal.{REGION}.simulated.nitro-enclaves"
        return self._issue_authority(
            label,
            self._regional(start_s // REGIONAL_TURN_S),
            _name(CN=common_name, OU="Simulated", O="Simulated", C="ZZ", ST="SI", L="Simulated"),
            start_s,
            ZONAL_LIFE_S,
            path_length=1,
        )

    def _issue_authority(
        self, label: str, issuer: Issued, subject: x509.Name, start_s: int, life_s: int, *, path_length: int
    ) -> Issued:
        key = private_key(self._draw(f"{label} key", KEY_SEED_BYTES))
        file = self._draw(f"{label} list", 16).hex()
        list_url = x509.UniformResourceIdentifier(f"http://crl.simulated.invalid/crl/{file}.crl")
        extensions: Extensions = (
            (x509.BasicConstraints(ca=True, path_length=path_length), True),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (key_usage("digital_signature", "key_cert_sign", "crl_sign"), True),
            (x509.CRLDistributionPoints([x509.DistributionPoint([list_url], None, None, None)]), False),
        )
        number = serial(self._draw(f"{label} serial", 16))
        return issue(Template(subject, number, start_s, start_s + life_s, extensions), key, issuer)

    def _issue_instance(self, instance_id: str, window: int) -> Issued:
        label, start_s = f"instance {instance_id} {window}", window * INSTANCE_TURN_S
        issuer = self._zonal(start_s // ZONAL_TURN_S)
        key = private_key(self._draw(f"{label} key", KEY_SEED_BYTES))
        template = Template(
            subject=member_name(f"{instance_id}.{REGION}.simulated.nitro-enclaves"),
            serial=serial(self._draw(f"{label} serial", 20)),
            not_before_s=start_s,
            not_after_s=start_s + INSTANCE_LIFE_S,
            extensions=(
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (key_usage("key_cert_sign"), True),
                (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
                (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False),
            ),
        )
        return issue(template, key, issuer)

    def _draw(self, label: str, size: int) -> bytes:
        return hashlib.shake_256(self._secret + label.encode()).digest(size)

    def _pem(self) -> bytes:
        key = self._issued.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        certificate = x509.load_der_x509_certificate(self._issued.der)
        return key + certificate.public_bytes(serialization.Encoding.PEM)


def key_usage(*uses: str) -> x509.KeyUsage:
    """Exactly these uses, by cryptography's names."""
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    rest = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: name in uses for name in (*names, *rest)})


def member_name(common_name: str) -> x509.Name:
    """Of an instance authority or a leaf."""
    return _name(C="ZZ", ST="Simulated", L="Simulated", O="Simulated", OU="Simulated", CN=common_name)


def serial(drawn: bytes) -> int:
    """Positive and less than 2^159, as X.509 (RFC 5280, 4.1.2.2) and cryptography want it."""
    return (int.from_bytes(drawn, "big") | 1) & ((1 << 159) - 1)


def _authority_name(common_name: str) -> x509.Name:
    return _name(C="ZZ", O="Simulated", OU="Simulated", CN=common_name)


def _name(**parts: str) -> x509.Name:
    """In the order given: AWS's authorities differ in it, and issuer and subject are compared as bytes."""
    oids = {
        "C": NameOID.COUNTRY_NAME,
        "ST": NameOID.STATE_OR_PROVINCE_NAME,
        "L": NameOID.LOCALITY_NAME,
        "O": NameOID.ORGANIZATION_NAME,
        "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
        "CN": NameOID.COMMON_NAME,
    }
    return x509.Name([x509.NameAttribute(oids[key], value) for key, value in parts.items()])


def _utc(seconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def _write_once(path: Path, content: bytes) -> None:
    """Write a file that only we may read; if there is one by now, leave that."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(name, path)  # never replaces; the file appears whole
    except FileExistsError:
        pass
    finally:
        Path(name).unlink()


def _read_root(path: Path) -> Issued:
    remedy = "remove it to have a new root made (its fingerprint, which policies may name, is lost)"
    if path.stat().st_mode & 0o077:
        raise LocalError(f"{path}: others may read this key; chmod 600 it, or {remedy}")
    pem = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(pem, None)
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise LocalError(f"{path}: not a simulated root; {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise LocalError(f"{path}: key and certificate do not belong together; {remedy}")
    template = Template(
        certificate.subject,
        certificate.serial_number,
        int(certificate.not_valid_before_utc.timestamp()),
        int(certificate.not_valid_after_utc.timestamp()),
        tuple((extension.value, extension.critical) for extension in certificate.extensions),
    )
    return Issued(template, key, certificate.public_bytes(serialization.Encoding.DER))
