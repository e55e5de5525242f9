"""What the Nitro hypervisor measures when it starts an image: PCR0, PCR1, PCR2, and PCR8 of a signed one.

Source: aws-nitro-enclaves-image-format src/utils/mod.rs (get_pcrs), src/utils/eif_reader.rs;
aws-nitro-enclaves-cli src/lib.rs (describe_eif), src/common/json_output.rs.
"""

import calendar
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpc.image.eif import HEADER, SECTION_HEADER, Buffer, Image, ImageError, Kind, Section, opened

if TYPE_CHECKING:  # loaded where an image is signed: few are, and it takes longer than a lookup in the cache
    from cryptography import x509

Content = Callable[[], Iterable[Buffer]]  # of one section; called once for each hash that it goes into


@dataclass(frozen=True)
class Measurements:
    """The PCRs that depend on the image, 48 bytes each; PCR8 is None for an image that nobody signed."""

    pcr0: bytes  # all of it
    pcr1: bytes  # kernel, command line, bootstrap ramdisk
    pcr2: bytes  # application
    pcr8: bytes | None = None  # the certificate of who signed it

    @property
    def pcrs(self) -> dict[int, bytes]:
        """By index, as an attestation document has them."""
        return {int(name[3:]): value for name, value in asdict(self).items() if value is not None}

    def shown(self) -> dict[str, str]:
        """`PCR0` and so on, in hexadecimal."""
        return {f"PCR{index}": value.hex() for index, value in self.pcrs.items()}


def pcr(digest: bytes) -> bytes:
    """A PCR that was zero and has been extended once, with this digest."""
    return hashlib.sha384(bytes(48) + digest).digest()


def measure_sections(kernel: Content, cmdline: Content, ramdisks: Sequence[Content]) -> Measurements:
    """Hash in two threads. Section headers, the EIF header, metadata and signature are measured by nobody."""
    with ThreadPoolExecutor(1) as pool:
        application = pool.submit(_hash, hashlib.sha384(), *ramdisks[1:])
        return _measurements(kernel, cmdline, ramdisks, application)


def _measurements(
    kernel: Content, cmdline: Content, ramdisks: Sequence[Content], application: "Future[hashlib._Hash]"
) -> Measurements:
    bootstrap = _hash(hashlib.sha384(), kernel, cmdline, ramdisks[0])
    whole = _hash(bootstrap.copy(), *ramdisks[1:])
    return Measurements(*(pcr(state.digest()) for state in (whole, bootstrap, application.result())))


def _hash(state: "hashlib._Hash", *contents: Content) -> "hashlib._Hash":
    for content in contents:
        for buffer in content():
            state.update(buffer)
    return state


def measure(path: Path) -> Measurements:
    """Measure any EIF file, reading all of it. Raises ImageError or LocalError: see `opened`."""
    with opened(path) as image:
        return measure_image(image)[0]


def measure_image(image: Image) -> "tuple[Measurements, x509.Certificate | None]":
    """Check CRC and signature too. Raises ImageError for an image that AWS's tools would not launch."""

    def content(section: Section) -> Content:
        return lambda: image.chunks(section.offset, section.size)

    kernel, cmdline = (content(image.of(kind)[0]) for kind in (Kind.KERNEL, Kind.CMDLINE))
    ramdisks = image.of(Kind.RAMDISK)
    with ThreadPoolExecutor(1) as pool:
        application = pool.submit(_hash_and_check, image, ramdisks[1:])
        measured = _measurements(kernel, cmdline, [content(ramdisk) for ramdisk in ramdisks], application)
    certificate = None
    for section in image.of(Kind.SIGNATURE):
        from mpc.image import signature

        certificate = signature.verify(image.read(section), measured.pcr0)
        measured = signed_by(measured, certificate)
    return measured, certificate


def _hash_and_check(image: Image, application: Sequence[Section]) -> "hashlib._Hash":
    """The application's hash, and in the same pass the CRC of the whole file. Raises ImageError."""
    state = hashlib.sha384()
    crc = zlib.crc32(next(image.chunks(0, HEADER.size))[:-4])
    for section in image.sections:
        crc = zlib.crc32(SECTION_HEADER.pack(section.kind, 0, section.size), crc)
        for chunk in image.chunks(section.offset, section.size):
            crc = zlib.crc32(chunk, crc)
            if section in application:
                state.update(chunk)
    if crc != image.crc:
        raise ImageError(f"{image.path}: CRC", expected=f"{image.crc:08x}, as its header says", got=f"{crc:08x}")
    return state


def signed_by(measured: Measurements, certificate: "x509.Certificate") -> Measurements:
    """The same image, signed by the holder of that certificate."""
    from cryptography.hazmat.primitives.serialization import Encoding

    digest = hashlib.sha384(certificate.public_bytes(Encoding.DER)).digest()
    return Measurements(measured.pcr0, measured.pcr1, measured.pcr2, pcr(digest))


def describe(path: Path) -> dict[str, Any]:
    """What `nitro-cli describe-eif` prints, for json.dumps; raises as `measure` does, so both checks are true."""
    with opened(path) as image:
        measured, certificate = measure_image(image)
        signer = None if certificate is None else _certificate(certificate)
        metadata = _metadata(image)
    shown: dict[str, Any] = {
        "EifVersion": 4,
        "Measurements": {"HashAlgorithm": "Sha384 { ... }", **measured.shown()},
        "IsSigned": signer is not None,
    }
    if signer is not None:
        shown["SigningCertificate"] = signer
    shown["CheckCRC"] = True
    if signer is not None:
        shown["SignatureCheck"] = True
    return shown | metadata


def _metadata(image: Image) -> dict[str, Any]:
    """ImageName, ImageVersion and Metadata, where the image has a section for them. Nobody measures it."""
    for section in image.of(Kind.METADATA):
        try:
            value = json.loads(image.read(section))
            json.dumps(value, allow_nan=False)  # Python reads more than JSON; what we print must be read by others
            custom = value["CustomMetadata"] or {}
            inner = {**value["BuildMetadata"], "DockerInfo": value["DockerInfo"], **custom}
            return {"ImageName": value["ImageName"], "ImageVersion": value["ImageVersion"], "Metadata": inner}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ImageError(f"{image.path}: metadata section", expected="the JSON that AWS's tools write") from None
    return {}


def _certificate(certificate: "x509.Certificate") -> dict[str, Any]:
    """As OpenSSL writes these fields. Raises ImageError: the library reads names and times when they are asked for."""
    try:
        return {
            "IssuerName": {_long_name(part.oid): str(part.value) for part in certificate.issuer},
            "Algorithm": _long_name(certificate.signature_algorithm_oid),
            "NotBefore": _date(certificate.not_valid_before_utc),
            "NotAfter": _date(certificate.not_valid_after_utc),
            "Signature": ":".join(f"{octet:02X}" for octet in certificate.signature),
        }
    except ValueError:
        raise ImageError("signature section: its certificate", expected="well-formed names and times") from None


def _long_name(oid: "x509.ObjectIdentifier") -> str:
    return str(oid._name)


def _date(time: datetime) -> str:
    return f"{calendar.month_abbr[time.month]} {time.day:2} {time:%H:%M:%S %Y} GMT"
