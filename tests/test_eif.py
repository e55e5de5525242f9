"""EIF files and the ramdisks in them: read, measured, described, signed, refused."""

import base64
import hashlib
import json
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpc.image import eif
from mpc.image.eif import ImageError, Kind
from mpc.image.measure import describe, measure
from mpc.image.signature import Signer
from mpc.protocol.errors import LocalError

HERE = Path(__file__).parent
CHECKOUT = HERE.parent
Sections = list[tuple[int, bytes]]
SMALL: Sections = [(1, b"kernel"), (2, b"cmdline"), (5, b"{}"), (3, b"rd0"), (3, b"rd1")]
# docs of the format: header '>4sHHQQHH32Q32QII', section header '>HHQ'
HEADER_BYTES, SECTION_BYTES = 548, 12


def assemble(sections: Sections, **changed: Any) -> bytes:
    """An EIF file, written independently of the product; `changed` header fields get a CRC that fits."""
    offsets, place = [], HEADER_BYTES
    for _, content in sections:
        offsets.append(place)
        place += SECTION_BYTES + len(content)
    fields: dict[str, Any] = {
        "magic": b".eif",
        "version": 4,
        "flags": 0,
        "memory": 1 << 30,
        "cpus": 2,
        "reserved": 0,
        "count": len(sections),
        "offsets": offsets,
        "sizes": [len(content) for _, content in sections],
        "unused": 0,
        "section_flags": 0,
        "tail": b"",
    } | changed
    padded = {name: [*fields[name], *[0] * (32 - len(fields[name]))] for name in ("offsets", "sizes")}
    start = [fields[name] for name in ("magic", "version", "flags", "memory", "cpus", "reserved", "count")]
    header = struct.pack(">4sHHQQHH32Q32QI", *start, *padded["offsets"], *padded["sizes"], fields["unused"])
    body: bytes = b"".join(
        struct.pack(">HHQ", kind, fields["section_flags"], len(content)) + content for kind, content in sections
    )
    body += fields["tail"]
    crc = struct.pack(">I", zlib.crc32(header + body))
    return header + crc + body


def pcr(content: bytes) -> str:
    return hashlib.sha384(bytes(48) + hashlib.sha384(content).digest()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "image.eif").write_bytes(content)
        return tmp_path / "image.eif"

    return write


Write = Callable[[bytes], Path]


# --- reading and measuring


def test_known_answer(file: Write) -> None:
    shown = measure(file(assemble(SMALL))).shown()
    assert shown == {
        "PCR0": "cfc385ad49306161345129a3b3ac9db45e823e3187596aee5851246cd13bb70e1385309bad2d170c9b146658244e98c1",
        "PCR1": "f262114f90445d9c5c9b2e4b0593fe8d312927fe56a54f204e3e458d0095362f951e32baae1bb4c2e6a6d5f36f23078e",
        "PCR2": "695029c2c04573eb1daf702d94e399b1c92ea53256b3f6683606ddbbb368c9c3b6f0a5059b95c334d8f9dca2d1bcf6b4",
    }


def test_one_ramdisk_only(file: Write) -> None:
    """As in two real documents: PCR0 is PCR1, and PCR2 is that of nothing."""
    measured = measure(file(assemble([(1, b"kernel"), (2, b"cmdline"), (3, b"ramdisk")])))
    assert measured.pcr0 == measured.pcr1
    assert measured.pcr2.hex() == (
        "21b9efbc184807662e966d34f390821309eeac6802309798826296bf3e8bec7c10edb30948c90ba67310f7b964fc500a"
    )


def test_all_further_ramdisks_are_the_application(file: Write) -> None:
    measured = measure(file(assemble([*SMALL, (3, b"rd2"), (3, b"")])))
    assert measured.pcr2.hex() == pcr(b"rd1rd2")
    assert measured.pcr0.hex() == pcr(b"kernelcmdlinerd0rd1rd2")


def test_what_we_write_is_the_format(tmp_path: Path) -> None:
    out = tmp_path / "ours.eif"
    eif.write(out, "x86_64", [(Kind(kind), [content[:2], content[2:]]) for kind, content in SMALL])
    assert out.read_bytes() == assemble(SMALL)
    eif.write(out, "aarch64", [(Kind(kind), [content]) for kind, content in SMALL])
    assert out.read_bytes() == assemble(SMALL, flags=1)


K, C, R = (1, b"kernel"), (2, b"cmdline"), (3, b"ramdisk")
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with .eif"),
    "another format": (b"\x7fELF" + bytes(1000), "does not begin with .eif"),
    "magic alone": (b".eif", "EIF header: expected 548 bytes, got 4"),
    "cut header": (assemble(SMALL)[:547], "EIF header: expected 548 bytes, got 547"),
    "version 3": (assemble(SMALL, version=3), "EIF version: expected 4, got 3"),
    "version 5": (assemble(SMALL, version=5), "EIF version: expected 4, got 5"),
    "unknown flag": (assemble(SMALL, flags=2), "a flag or a reserved field is set"),
    "reserved": (assemble(SMALL, reserved=1), "a flag or a reserved field is set"),
    "unused": (assemble(SMALL, unused=1), "a flag or a reserved field is set"),
    "no sections": (assemble([]), "number of sections: expected 3 to 32, got 0"),
    "33 sections": (assemble(SMALL, count=33), "number of sections: expected 3 to 32, got 33"),
    "one section too few": (assemble(SMALL, count=4), "beyond its 4 sections"),
    "one section too many": (assemble(SMALL, count=6), "section 5: offset in the header"),
    "gap": (assemble(SMALL, offsets=[548, 566, 585, 600, 615]), "section 3: offset in the header: expected 599"),
    "overlap": (assemble(SMALL, offsets=[548, 548, 585, 599, 614]), "section 1: offset in the header: expected 566"),
    "two orders": (assemble(SMALL, offsets=[548, 566, 585, 614, 599]), "section 3: offset in the header: expected 599"),
    "offset beyond the file": (assemble(SMALL, offsets=[548, 566, 585, 599, 1 << 63]), "section 4: offset"),
    "header size": (assemble(SMALL, sizes=[6, 7, 2, 3, 4]), "section 4: size: expected 4, as the file's header says"),
    "section flags": (assemble(SMALL, section_flags=1), "section 0: flags: expected 0, got 1"),
    "section type 0": (assemble([K, C, R, (0, b"")]), "section 3: type: expected 1 to 5, got 0"),
    "section type 6": (assemble([K, C, R, (6, b"")]), "section 3: type: expected 1 to 5, got 6"),
    "cut": (assemble(SMALL)[:-1], "section 4: size: expected at most the file's last 2, got 3"),
    "cut in a section header": (assemble(SMALL)[:-4], "section 4: the file ends before its header"),
    "tail": (assemble(SMALL, tail=b"x"), "bytes after the last section"),
    "no kernel": (assemble([C, R, R]), "expected one kernel, one cmdline, then one or more ramdisks"),
    "two kernels": (assemble([K, K, C, R]), "expected one kernel, one cmdline"),
    "no cmdline": (assemble([K, R, R]), "expected one kernel, one cmdline"),
    "no ramdisk": (assemble([K, C, (5, b"{}")]), "expected one kernel, one cmdline"),
    "ramdisk first": (assemble([R, K, C]), "got RAMDISK, KERNEL, CMDLINE"),
    "cmdline first": (assemble([C, K, R]), "got CMDLINE, KERNEL, RAMDISK"),
    "two metadata": (assemble([K, C, (5, b"{}"), (5, b"{}"), R]), "sections of type METADATA: expected at most one"),
    "two signatures": (assemble([K, C, R, (4, b""), (4, b"")]), "sections of type SIGNATURE: expected at most one"),
    "huge cmdline": (assemble([K, (2, bytes(65537)), R]), r"section 1 \(CMDLINE\): size: expected at most 65536"),
    "huge signature": (
        assemble([K, C, R, (4, bytes(32769))]),
        r"section 3 \(SIGNATURE\): size: expected at most 32768",
    ),
    "wrong CRC": (
        assemble(SMALL)[:544] + bytes(4) + assemble(SMALL)[548:],
        "CRC: expected 00000000, as its header says",
    ),
    "changed kernel": (assemble(SMALL).replace(b"kernel", b"kernal"), "CRC"),
    "empty signature": (assemble([*SMALL, (4, b"")]), "signature section: not the CBOR"),
    "no signatures": (assemble([*SMALL, (4, b"\x80")]), "signature section: expected one map"),
    "nested signature": (assemble([*SMALL, (4, b"\x81" * 30000)]), "signature section: not the CBOR"),
    "signature bomb": (assemble([*SMALL, (4, b"\x9b" + b"\x7f" * 8)]), "signature section: not the CBOR"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_in_one_sentence(name: str, file: Write) -> None:
    content, words = MALFORMED[name]
    path = file(content)
    with pytest.raises(ImageError, match=words) as caught:
        measure(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_any_flipped_bit_is_refused(file: Write) -> None:
    good = assemble(SMALL)
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path = file(bytes(bad))
        with pytest.raises(ImageError):
            measure(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"absent\.eif: cannot be read"):
        measure(tmp_path / "absent.eif")
    with pytest.raises(LocalError, match="is a folder"):
        measure(tmp_path)


def test_a_gigabyte_of_garbage_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    for start in (b"garbage", assemble(SMALL), assemble([K, C, (3, b"")], sizes=[6, 7, 1 << 62])):
        with path.open("wb") as made:
            made.write(start)
            made.truncate(1 << 30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ImageError):
            measure(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB


def test_measuring_takes_memory_of_constant_size(tmp_path: Path) -> None:
    path = tmp_path / "big.eif"
    path.write_bytes(assemble([K, C, (3, b"bootstrap"), (3, bytes(32 << 20))]))
    tracemalloc.start()
    try:
        measure(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- describing and signing


METADATA = {
    "ImageName": "hello",
    "ImageVersion": "1.0",
    "BuildMetadata": {
        "BuildTime": "2024-01-01T00:00:00+00:00",
        "BuildTool": "nitro-cli",
        "BuildToolVersion": "1.4.4",
        "OperatingSystem": "Linux",
        "KernelVersion": "4.14.256",
    },
    "DockerInfo": {"Id": "sha256:00"},
    "CustomMetadata": {"Team": "blue"},
}


def test_described_as_nitro_cli_does(file: Write) -> None:
    sections = [(kind, json.dumps(METADATA).encode() if kind == 5 else content) for kind, content in SMALL]
    path = file(assemble(sections))
    assert json.dumps(describe(path)) == json.dumps(
        {
            "EifVersion": 4,
            "Measurements": {"HashAlgorithm": "Sha384 { ... }", **measure(path).shown()},
            "IsSigned": False,
            "CheckCRC": True,
            "ImageName": "hello",
            "ImageVersion": "1.0",
            "Metadata": {**METADATA["BuildMetadata"], "DockerInfo": {"Id": "sha256:00"}, "Team": "blue"},  # type: ignore[dict-item]
        }
    )


def test_without_metadata(file: Write) -> None:
    assert set(describe(file(assemble([K, C, R])))) == {"EifVersion", "Measurements", "IsSigned", "CheckCRC"}


AWS_METADATA = b'{"ImageName": "a", "ImageVersion": "1", "BuildMetadata": {}, "DockerInfo": %s, "CustomMetadata": null}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{", b"{}", b"null", b"[" * 100_000, b'{"ImageName": "\xff"}'),
        *(AWS_METADATA % b"NaN", AWS_METADATA % b"1e999"),  # Python reads both; JSON has neither
    ],
)
def test_metadata_that_is_not_aws(content: bytes, file: Write) -> None:
    path = file(assemble([K, C, R, (5, content)]))
    with pytest.raises(ImageError, match="metadata section: expected the JSON that AWS's tools write"):
        describe(path)


CURVES: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def signer(curve: str = "P-384") -> Signer:
    key = ec.generate_private_key(CURVES[curve])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "release team")])
    dates = (datetime(2024, 3, 5, tzinfo=UTC), datetime(2044, 3, 15, tzinfo=UTC))
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, *dates).sign(key, hashes.SHA384())
    return Signer(key, certificate)


def signed(by: Signer, sections: Sections = SMALL, change: Callable[[bytes], bytes] = lambda section: section) -> bytes:
    content = b"".join(content for kind, content in sections if kind in (1, 2, 3))
    return assemble([*sections, (4, change(by.sign(bytes.fromhex(pcr(content)))))])


@pytest.mark.parametrize("curve", CURVES)
def test_signed(curve: str, file: Write) -> None:
    by = signer(curve)
    unsigned = measure(file(assemble(SMALL)))
    path = file(signed(by, [section for section in SMALL if section[0] != 5]))
    measured = measure(path)
    der = by.certificate.public_bytes(serialization.Encoding.DER)
    assert measured.pcr8 is not None
    assert measured.pcr8.hex() == pcr(der)
    assert {index: measured.pcrs[index] for index in (0, 1, 2)} == unsigned.pcrs
    described = describe(path)
    shown = ("EifVersion", "Measurements", "IsSigned", "SigningCertificate", "CheckCRC", "SignatureCheck")
    assert tuple(described) == shown
    assert described["Measurements"]["PCR8"] == pcr(der)
    assert described["SigningCertificate"] == {
        "IssuerName": {"commonName": "release team"},
        "Algorithm": "ecdsa-with-SHA384",
        "NotBefore": "Mar  5 00:00:00 2024 GMT",
        "NotAfter": "Mar 15 00:00:00 2044 GMT",
        "Signature": by.certificate.signature.hex(":").upper(),
    }


def test_a_signature_of_another_image(file: Write) -> None:
    by = signer()
    theirs = by.sign(bytes.fromhex(pcr(b"another")))
    path = file(assemble([*SMALL, (4, theirs)]))
    with pytest.raises(ImageError, match="it signs another image than this one"):
        measure(path)


def _in_message(change: Callable[[list[Any]], None]) -> Callable[[bytes], bytes]:
    def changed(section: bytes) -> bytes:
        outer = cbor2.loads(section)
        message = cbor2.loads(bytes(outer[0]["signature"]))
        change(message)
        return cbor2.dumps([{**outer[0], "signature": list(cbor2.dumps(message))}])

    return changed


def _set(index: int, value: object) -> Callable[[list[Any]], None]:
    return lambda message: message.__setitem__(index, value)


def _in_outer(change: Callable[[list[Any]], None]) -> Callable[[bytes], bytes]:
    def changed(section: bytes) -> bytes:
        outer = cbor2.loads(section)
        change(outer)
        return cbor2.dumps(outer)

    return changed


FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "bit of the signature": (_in_message(lambda m: _set(3, bytes([m[3][0] ^ 1]) + m[3][1:])(m)), "is not valid"),
    "zero signature": (_in_message(_set(3, bytes(96))), "is not valid"),
    "short signature": (_in_message(_set(3, bytes(95))), "algorithm -35 for this key"),
    "algorithm of another curve": (_in_message(_set(0, cbor2.dumps({1: -7}))), "algorithm -35 for this key"),
    "algorithm in the unprotected header": (_in_message(_set(1, {1: -35})), "algorithm -35 for this key"),
    "no payload": (_in_message(_set(2, None)), "expected a list of header"),
    "five elements": (_in_message(lambda m: m.append(0)), "expected a list of header"),
    "trailing byte": (lambda section: section + b"\0", "not the CBOR"),
    "two signatures": (_in_outer(lambda outer: outer.append(outer[0])), "expected one map"),
    "one field more": (_in_outer(lambda outer: outer[0].update(more=1)), "expected one map"),
    "certificate that is none": (_in_outer(lambda outer: outer[0].update(signing_certificate=[1])), "its certificate"),
    "certificate as text": (_in_outer(lambda outer: outer[0].update(signing_certificate="x")), "a list of bytes"),
    "number that is no byte": (_in_outer(lambda outer: outer[0].update(signature=[256])), "a list of bytes"),
    "another's certificate": (
        _in_outer(lambda outer: outer[0].update(
            signing_certificate=list(signer().certificate.public_bytes(serialization.Encoding.PEM))
        )),
        "is not valid",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_signature_section_is_refused(name: str, file: Write) -> None:
    change, words = FAULTS[name]
    path = file(signed(signer(), change=change))
    with pytest.raises(ImageError, match=f"signature section.*{words}"):
        measure(path)


def test_a_certificate_with_a_broken_name_is_refused(file: Write) -> None:
    """No signature covers it that anybody checks, so nobody notices before the name is to be printed."""
    by, name = signer(), b"\x0c\x0crelease team"  # a UTF8String

    def broken(outer: list[Any]) -> None:
        der = by.certificate.public_bytes(serialization.Encoding.DER)
        assert der.count(name) == 2
        lines = base64.encodebytes(der.replace(name, name[:2] + b"\xff" * 12))
        outer[0]["signing_certificate"] = [*b"-----BEGIN CERTIFICATE-----\n", *lines, *b"-----END CERTIFICATE-----\n"]

    path = file(signed(by, [*SMALL[:2], *SMALL[3:]], _in_outer(broken)))
    measure(path)
    with pytest.raises(ImageError, match=f"{path}: signature section: its certificate: expected well-formed"):
        describe(path)


def test_signers_that_cannot_sign() -> None:
    key, other = signer(), signer()
    pem = key.certificate.public_bytes(serialization.Encoding.PEM)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    plain = key.key.private_bytes(*form, serialization.NoEncryption())
    assert Signer.load(plain, pem).certificate == key.certificate
    with pytest.raises(LocalError, match="the certificate is of another key"):
        Signer.load(other.key.private_bytes(*form, serialization.NoEncryption()), pem)
    for bad in (b"", key.key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret"))):
        with pytest.raises(LocalError, match="as PEM files without a password"):
            Signer.load(bad, pem)
