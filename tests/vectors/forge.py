"""Makes attestation documents of which any part may be false, and signs them when that is done."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from mpc.host.simulated_nsm import PROTECTED, encode_payload, identity_pcr, leaf_template
from mpc.host.simulated_root import Extensions, Issued, SimulatedRoot, issue, private_key

NOW_MS = 1_790_000_000_000  # 2026-09-21T14:13:20Z
NOW_S = NOW_MS // 1000
INSTANCE = "i-0123456789abcdef0"
MODULE_ID = f"{INSTANCE}-enc01a0c4506c001234"
ZERO = bytes(48)
ROOT, REGIONAL, ZONAL, HOST, LEAF = range(5)  # HOST: the authority of the parent instance
LEVELS = ("root", "regional", "zonal", "instance", "leaf")
P384_ORDER = int("f" * 48 + "c7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)
ES256_DER = bytes.fromhex("300a06082a8648ce3d040302")
ES384_DER = bytes.fromhex("300a06082a8648ce3d040303")
ES512_DER = bytes.fromhex("300a06082a8648ce3d040304")
HASHES = {ES256_DER: hashes.SHA256(), ES384_DER: hashes.SHA384(), ES512_DER: hashes.SHA512()}

Key = ec.EllipticCurvePrivateKey


def drawn(label: str, size: int) -> bytes:
    """Fixed bytes that look random."""
    return hashlib.shake_256(f"attestation vectors: {label}".encode()).digest(size)


def new_root(label: str) -> SimulatedRoot:
    parts = iter((f"{label} key", f"{label} serial"))
    return SimulatedRoot.create(entropy=lambda size: drawn(next(parts), size), now_ms=NOW_MS - 30 * 86_400_000)


def key(label: str) -> Key:
    return private_key(drawn(label, 56))


def p256(label: str) -> Key:
    return ec.derive_private_key(int.from_bytes(drawn(label, 31), "big"), ec.SECP256R1())


TRUSTED = new_root("root")
OTHER = new_root("other root")
PCRS = {index: drawn(f"PCR{index}", 48) for index in (0, 1, 2, 8)}
CONTRACT = drawn("contract", 48)
PCR16 = hashlib.sha384(ZERO + CONTRACT).digest()
NONCE, USER_DATA, PUBLIC_KEY = drawn("nonce", 48), drawn("user data", 48), drawn("public key", 32)


class Draft:
    """A document that breaks no rule, until something in it is changed."""

    def __init__(self) -> None:
        authorities = TRUSTED.chain(INSTANCE, NOW_S)
        leaf = issue(leaf_template(MODULE_ID, NOW_S), key("leaf"), authorities[-1])
        self.issued = [*authorities, leaf]
        self.protected: object = PROTECTED
        self.unprotected: object = {}
        self.context: tuple[str, bytes] = ("Signature1", b"")  # and external data
        self.hash: hashes.HashAlgorithm = hashes.SHA384()
        self.fields: dict[Any, Any] = {
            "module_id": MODULE_ID,
            "digest": "SHA384",
            "timestamp": NOW_MS,
            "pcrs": dict.fromkeys(range(16), ZERO) | PCRS | {4: identity_pcr(INSTANCE), 16: PCR16},
            "certificate": leaf.der,
            "cabundle": [issued.der for issued in authorities],
            "public_key": PUBLIC_KEY,
            "user_data": USER_DATA,
            "nonce": NONCE,
        }

    # What it says

    def set(self, **fields: object) -> Self:
        self.fields.update(fields)
        return self

    def drop(self, name: object) -> Self:
        del self.fields[name]
        return self

    def pcr(self, *indices: object, value: object = ZERO) -> Self:
        self.fields["pcrs"].update(dict.fromkeys(indices, value))
        return self

    def drop_pcr(self, index: int) -> Self:
        del self.fields["pcrs"][index]
        return self

    def named(self, module_id: str) -> Self:
        """Another enclave, with the leaf that belongs to it."""
        return self.set(module_id=module_id).rename(LEAF, module_id)

    # Its certificates

    def certify(self, level: int, *, own: Key | None = None, issuer: Issued | None = None, **changes: Any) -> Self:
        """Issue one certificate anew with changes, and, when its name or key changed, those below it."""
        old, above = self.issued[level], issuer or (self.issued[level - 1] if level else None)
        extensions = key_ids(old.template.extensions, own or old.key, above)
        self.issued[level] = issue(
            replace(old.template, **{"extensions": extensions, **changes}), own or old.key, above
        )
        if level < LEAF and (own or "subject" in changes):
            return self.certify(level + 1)
        return self._bind()

    def _bind(self) -> Self:
        return self.set(cabundle=[one.der for one in self.issued[:LEAF]], certificate=self.issued[LEAF].der)

    def rename(self, level: int, *names: str) -> Self:
        return self.certify(level, subject=renamed(self.subject(level), *names))

    def extend(self, level: int, extension: x509.ExtensionType, critical: bool = True) -> Self:
        """Put the extension in the place of one of its kind, or after all others."""
        old = self.issued[level].template.extensions
        if all(each.oid != extension.oid for each, _ in old):
            return self.certify(level, extensions=(*old, (extension, critical)))
        new = ((extension, critical) if each[0].oid == extension.oid else each for each in old)
        return self.certify(level, extensions=tuple(new))

    def strip(self, level: int, *kinds: type[x509.ExtensionType]) -> Self:
        kept = (each for each in self.issued[level].template.extensions if not isinstance(each[0], kinds))
        return self.certify(level, extensions=tuple(kept))

    def rewrite(self, level: int, change: Callable[[bytes], bytes], algorithm: bytes = ES384_DER) -> Self:
        """A certificate that no builder makes: what is signed of it is changed as DER."""
        to_sign = change(inner(self.issued[level].der)[0])
        signature = self.issued[level - 1].key.sign(to_sign, ec.ECDSA(HASHES[algorithm], deterministic_signing=True))
        der = tlv(0x30, to_sign + algorithm + tlv(3, b"\0" + signature))
        self.issued[level] = replace(self.issued[level], der=der)
        return self._bind()

    def subject(self, level: int) -> x509.Name:
        return self.issued[level].template.subject

    def misnamed(self, level: int, name: x509.Name) -> Self:
        """The issuer's key under another issuer's name."""
        above = self.issued[level - 1]
        return self.certify(level, issuer=replace(above, template=replace(above.template, subject=name)))

    def forged(self, level: int) -> Self:
        """The issuer's name, but not its key."""
        above = replace(self.issued[level - 1], key=key("forger"))
        self.issued[level] = issue(self.issued[level].template, self.issued[level].key, above)
        return self._bind()

    def bundle(self, *authorities: int | bytes) -> Self:
        return self.set(cabundle=[one if isinstance(one, bytes) else self.issued[one].der for one in authorities])

    # Its envelope

    def payload(self) -> bytes:
        return encode_payload(self.fields)

    def sign(self, payload: object, signer: Key | None = None) -> bytes:
        message = cbor2.dumps([self.context[0], self.protected, self.context[1], payload])
        return signature_of(signer or self.issued[LEAF].key, message, self.hash)

    def parts(self, payload: object = None, signature: object = None) -> list[object]:
        payload = self.payload() if payload is None else payload
        return [self.protected, self.unprotected, payload, self.sign(payload) if signature is None else signature]

    def document(self, payload: object = None, signature: object = None) -> bytes:
        return cbor2.dumps(self.parts(payload, signature))

    def signed(self, change: Callable[[bytes], bytes]) -> bytes:
        """With a change to its right signature."""
        return self.document(signature=change(self.sign(self.payload())))

    def patched(self, old: bytes, new: bytes) -> bytes:
        """Signed over a payload in which some bytes, that it holds once, are others."""
        return self.document(patch(self.payload(), old, new))

    def patched_after(self, old: bytes, new: bytes) -> bytes:
        """Signed, and then patched."""
        payload = self.payload()
        return self.document(patch(payload, old, new), self.sign(payload))

    def headed(self, protected: object, unprotected: object = None) -> Self:
        self.protected, self.unprotected = protected, {} if unprotected is None else unprotected
        return self

    def hashed(self, algorithm: hashes.HashAlgorithm) -> Self:
        self.hash = algorithm
        return self

    def within(self, context: str, external: bytes) -> Self:
        self.context = context, external
        return self


def key_ids(extensions: Extensions, own: Key, above: Issued | None) -> Extensions:
    """The same extensions with the key identifiers of these keys."""
    kinds: dict[type[object], x509.ExtensionType] = {
        x509.SubjectKeyIdentifier: x509.SubjectKeyIdentifier.from_public_key(own.public_key()),
    }
    if above:
        kinds[x509.AuthorityKeyIdentifier] = x509.AuthorityKeyIdentifier.from_issuer_public_key(above.key.public_key())
    return tuple((kinds.get(type(extension), extension), critical) for extension, critical in extensions)


def renamed(name: x509.Name, *names: str) -> x509.Name:
    """With these common names."""
    kept = [attribute for attribute in name if attribute.oid != NameOID.COMMON_NAME]
    common = (x509.NameAttribute(NameOID.COMMON_NAME, f"{one}.local.simulated", _validate=False) for one in names)
    return x509.Name([*kept, *common])


def signature_of(signer: Key, message: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    """r ‖ s, 48 bytes each."""
    r, s = decode_dss_signature(signer.sign(message, ec.ECDSA(algorithm, deterministic_signing=True)))
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


def other_s(signature: bytes) -> bytes:
    """Of the two values of s that are right, the other one."""
    return signature[:48] + (P384_ORDER - int.from_bytes(signature[48:], "big")).to_bytes(48, "big")


def pair(name: object, value: object) -> bytes:
    return cbor2.dumps(name) + cbor2.dumps(value)


def patch(data: bytes, old: bytes, new: bytes) -> bytes:
    if data.count(old) != 1:
        raise ValueError(f"{data.count(old)} places to patch, not 1")
    return data.replace(old, new)


def flipped(data: bytes, at: int = -1) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def chunked(data: bytes | str) -> bytes:
    """A string of indefinite length, in two chunks."""
    return (b"\x5f" if isinstance(data, bytes) else b"\x7f") + cbor2.dumps(data[:3]) + cbor2.dumps(data[3:]) + b"\xff"


def tlv(tag: int, content: bytes) -> bytes:
    """DER of up to 64 KiB."""
    size = len(content)
    head = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + head + content


def inner(der: bytes) -> list[bytes]:
    """The elements of a constructed DER value."""
    elements, content = [], der[2 + max(0, der[1] - 128) :]
    while content:
        more = max(0, content[1] - 128)
        end = 2 + more + (int.from_bytes(content[2 : 2 + more], "big") if more else content[1])
        elements.append(content[:end])
        content = content[end:]
    return elements


def version_1(certificate: bytes) -> bytes:
    """Without version and extensions."""
    return tlv(0x30, b"".join(inner(certificate)[1:-1]))


def serial_negative(certificate: bytes) -> bytes:
    version, _, *others = inner(certificate)
    return tlv(0x30, b"".join([version, tlv(2, b"\xff\x01"), *others]))


def extension_twice(certificate: bytes) -> bytes:
    *others, extensions = inner(certificate)
    each = inner(inner(extensions)[0])
    return tlv(0x30, b"".join(others) + tlv(0xA3, tlv(0x30, b"".join([*each, each[0]]))))


def algorithm_of(algorithm: bytes) -> Callable[[bytes], bytes]:
    return lambda certificate: certificate.replace(ES384_DER, algorithm, 1)
