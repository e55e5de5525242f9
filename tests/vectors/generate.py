"""Write the conformance vectors: attestation documents that each break one rule, and some that break none.

    PYTHONPATH=. python tests/vectors/generate.py [--check]

Every document is signed after its fault was made, by a chain that is otherwise whole, so that none is refused only
because a signature is stale. The same bytes come out every time. README.md says what the files mean.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from forge import (
    CONTRACT,
    ES256_DER,
    ES384_DER,
    ES512_DER,
    HOST,
    INSTANCE,
    LEAF,
    LEVELS,
    MODULE_ID,
    NONCE,
    NOW_MS,
    NOW_S,
    OTHER,
    P384_ORDER,
    PCR16,
    PCRS,
    PUBLIC_KEY,
    REGIONAL,
    ROOT,
    TRUSTED,
    USER_DATA,
    ZERO,
    ZONAL,
    Draft,
    algorithm_of,
    chunked,
    drawn,
    extension_twice,
    flipped,
    key,
    other_s,
    p256,
    pair,
    patch,
    renamed,
    serial_negative,
    signature_of,
    tlv,
    version_1,
)

from mpc.host.simulated_nsm import PROTECTED, identity_pcr
from mpc.host.simulated_root import issue, key_usage

HERE = Path(__file__).parent
HOUR_S = 3600
AGE_MAX_MS = 300_000
DEFAULTS = {
    "at_ms": NOW_MS + 1000,
    "age_max_ms": AGE_MAX_MS,
    "root": TRUSTED.fingerprint.hex(),
    "pcrs": {str(index): value.hex() for index, value in (PCRS | {16: PCR16}).items()},
    "nonce": NONCE.hex(),
    "user_data": USER_DATA.hex(),
    "public_key": PUBLIC_KEY.hex(),
}

Make = Callable[[Draft], Draft | bytes]

FILES: dict[str, bytes] = {}
ENTRIES: list[dict[str, object]] = []


def add(step: int, name: str, says: str, make: Make, *, own_root: bool = False, **given: object) -> None:
    """A document that `step` of docs/ATTESTATION.md must refuse; 0: no step may.

    Args: own_root: the fault is in the root, so the root that is trusted is that very one. given: instead of DEFAULTS.
    """
    draft = Draft()
    made = make(draft)
    if own_root:
        given["root"] = hashlib.sha256(draft.issued[ROOT].der).hexdigest()
    file = f"{step:02}-{name}.bin"
    if file in FILES:
        raise ValueError(f"two vectors are called {file}")
    FILES[file] = made if isinstance(made, bytes) else made.document()
    ENTRIES.append({"file": file, "expect": step or None, "description": says, **given})


def accepted() -> None:
    none = {"nonce": None, "user_data": None, "public_key": None}
    full = bytes(1024)
    add(0, "plain", "As AWS's are since August 2025: a payload of indefinite length.", lambda d: d)
    add(0, "definite", "As AWS's were until April 2025.", lambda d: d.document(cbor2.dumps(d.fields)))
    add(0, "tag_18", "COSE_Sign1 with its tag.", lambda d: b"\xd2" + d.document())
    add(0, "other_s", "The other of the two values of s that are right.", lambda d: d.signed(other_s))
    add(0, "nulls", "The three optional fields are null.", lambda d: d.set(**none), **none)
    add(
        0, "empty", "user_data and nonce of 0 bytes.", lambda d: d.set(nonce=b"", user_data=b""), nonce="", user_data=""
    )
    longest = dict.fromkeys(none, full.hex())
    add(0, "longest", "1024 bytes in each optional field.", lambda d: d.set(**dict.fromkeys(none, full)), **longest)
    add(0, "all_pcrs", "All 32 PCRs are locked.", lambda d: d.pcr(*range(17, 32), value=drawn("more", 48)))
    ids = (x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier)
    add(0, "no_key_ids", "No key identifiers in the last authority, as before 2024.", lambda d: d.strip(HOST, *ids))


def envelope() -> None:
    def reencoded(draft: Draft, encode: Callable[[bytes], bytes]) -> bytes:
        return patch(draft.document(), cbor2.dumps(draft.payload()), encode(draft.payload()))

    def longer(payload: bytes) -> bytes:
        return b"\x5a" + len(payload).to_bytes(4, "big") + payload

    def overlong(draft: Draft) -> bytes:
        rest = len(draft.set(nonce=bytes(1000)).payload()) - 1000
        return b"\xd2" + draft.set(nonce=bytes(16385 - rest)).document()

    add(1, "empty", "Nothing.", lambda _: b"")
    add(1, "overlong", "A payload of 16385 bytes; AWS's limit is 16384.", overlong)
    add(2, "tag_61", "The tag of a CWT before tag 18.", lambda d: b"\xd8\x3d\xd2" + d.document())
    add(2, "tag_98", "The tag of COSE_Sign.", lambda d: b"\xd8\x62" + d.document())
    add(2, "tag_18_twice", "Tag 18 twice.", lambda d: b"\xd2\xd2" + d.document())
    add(2, "tag_18_long", "Tag 18 in two bytes, where one does.", lambda d: b"\xd8\x12" + d.document())
    add(2, "array_of_3", "No signature.", lambda d: cbor2.dumps(d.parts()[:3]))
    add(2, "array_of_5", "A fifth element.", lambda d: cbor2.dumps([*d.parts(), None]))
    add(2, "indefinite", "An array of indefinite length.", lambda d: b"\x9f" + d.document()[1:] + b"\xff")
    add(2, "trailing_byte", "A byte after the document.", lambda d: d.document() + b"\0")
    add(2, "truncated", "The last byte is missing.", lambda d: d.document()[:-1])
    add(2, "chunked_payload", "The payload in two chunks.", lambda d: reencoded(d, chunked))
    add(2, "long_payload_head", "The payload's length in four bytes, where two do.", lambda d: reencoded(d, longer))

    def header(name: str, says: str, protected: object, unprotected: object = None) -> None:
        """What is signed names the header that stands there."""
        add(3, name, says, lambda d: d.headed(protected, unprotected))

    header("alg_es256", "The header says ES256.", cbor2.dumps({1: -7}))
    header("alg_eddsa", "The header says EdDSA.", cbor2.dumps({1: -8}))
    header("alg_missing", "An empty protected header.", b"")
    header("alg_unprotected", "The algorithm only where it is not signed.", b"", {1: -35})
    header("alg_in_both", "The algorithm in both headers.", PROTECTED, {1: -35})
    header("alg_twice", "The algorithm twice.", bytes.fromhex("a2013822013822"))
    header("alg_long", "-35 in three bytes, where two do.", bytes.fromhex("a101390022"))
    header("protected_kid", "A key id beside the algorithm.", cbor2.dumps({1: -35, 4: b"1"}))
    header("protected_trailing_byte", "A byte after the protected map.", PROTECTED + b"\0")
    header("unprotected_kid", "A key id in the unprotected header.", PROTECTED, {4: b"1"})
    header("unprotected_chain", "A certificate in the unprotected header.", PROTECTED, {33: TRUSTED.certificate})
    signed = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)
    in_der = key("leaf").sign(cbor2.dumps(["Signature1", PROTECTED, b"", Draft().payload()]), signed)
    add(
        4,
        "payload_null",
        "Detached payload, rightly signed.",
        lambda d: cbor2.dumps([PROTECTED, {}, None, d.parts()[3]]),
    )
    add(4, "payload_empty", "A payload of 0 bytes.", lambda d: d.document(b""))
    add(4, "signature_null", "null as the signature.", lambda d: cbor2.dumps([*d.parts()[:3], None]))
    add(4, "signature_95", "The signature lacks its last byte.", lambda d: d.signed(lambda one: one[:-1]))
    add(4, "signature_97", "A byte after the signature.", lambda d: d.signed(lambda one: one + b"\0"))
    add(4, "signature_der", "The signature in DER.", lambda d: d.document(signature=in_der))


def payload() -> None:
    time, name = pair("timestamp", NOW_MS), cbor2.dumps(MODULE_ID)
    pcrs, other = cbor2.dumps("pcrs"), drawn("other", 48)

    def appended(draft: Draft, more: bytes) -> bytes:
        return draft.document(draft.payload()[:-1] + more + b"\xff")

    def indefinite(draft: Draft, field: str, head: bytes) -> bytes:
        start = cbor2.dumps(field)
        whole = pair(field, draft.fields[field])
        return draft.patched(whole, start + head + whole[len(start) + 1 :] + b"\xff")

    add(5, "not_cbor", "The payload is no CBOR.", lambda d: d.document(b"\x1c" * 64))
    add(5, "array", "An array of the nine values.", lambda d: d.document(cbor2.dumps(list(d.fields.values()))))
    add(5, "trailing_byte", "A byte after the map.", lambda d: d.document(d.payload() + b"\0"))
    add(5, "pcrs_twice", "pcrs twice; some readers keep the last.", lambda d: appended(d, pair("pcrs", {0: ZERO})))
    add(
        5,
        "nonce_twice",
        "nonce twice, the expected one last.",
        lambda d: appended(d.set(nonce=b""), pair("nonce", NONCE)),
    )
    add(5, "pcr0_twice", "PCR0 twice.", lambda d: d.patched(pcrs + b"\xb1", pcrs + b"\xb2" + pair(0, other)))
    long_zero = b"\x18\0" + cbor2.dumps(other)
    add(
        5,
        "pcr0_twice_long",
        "PCR0 twice, once as 0 in two bytes.",
        lambda d: d.patched(pcrs + b"\xb1", pcrs + b"\xb2" + long_zero),
    )
    index_16 = pair(16, PCR16)
    add(5, "long_index", "16 in two bytes, where one does.", lambda d: d.patched(index_16, b"\x18" + index_16))
    add(5, "long_time", "The time as a bignum.", lambda d: d.patched(time, time[:10] + b"\xc2\x48" + time[11:]))
    add(5, "tagged_time", "The time, tagged as one.", lambda d: d.patched(time, time[:10] + b"\xc1" + time[10:]))
    add(5, "chunked_text", "module_id in two chunks.", lambda d: d.patched(name, chunked(MODULE_ID)))
    add(5, "chunked_bytes", "The nonce in two chunks.", lambda d: d.patched(cbor2.dumps(NONCE), chunked(NONCE)))
    add(5, "indefinite_pcrs", "pcrs of indefinite length.", lambda d: indefinite(d, "pcrs", b"\xbf"))
    add(5, "indefinite_cabundle", "cabundle of indefinite length.", lambda d: indefinite(d, "cabundle", b"\x9f"))
    add(5, "not_utf8", "module_id is not UTF-8.", lambda d: d.patched(name, name[:2] + b"\xff" * 39))
    deep = b"\x81" * 200 + b"\0"
    add(5, "deep", "A nonce of 200 arrays in each other.", lambda d: d.patched(cbor2.dumps(NONCE), deep))
    for field in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"):
        add(6, f"no_{field}", f"No {field}.", lambda d, field=field: d.drop(field))
    add(6, "tenth_field", "A tenth field.", lambda d: d.set(extra=b""))
    add(6, "number_as_name", "A tenth field, named by a number.", lambda d: appended(d, pair(1, b"")))
    add(6, "bytes_as_name", "A tenth field, named pcrs in bytes.", lambda d: appended(d, pair(b"pcrs", {0: ZERO})))
    tpm = "nitrotpm_pcrs for pcrs: a NitroTPM document, of a whole instance, under the same roots."
    add(6, "nitrotpm", tpm, lambda d: d.set(nitrotpm_pcrs=d.fields["pcrs"]).drop("pcrs"))


def fields() -> None:
    add(7, "empty", "module_id of 0 characters.", lambda d: d.named(""))
    add(7, "null", "null as module_id.", lambda d: d.set(module_id=None))
    add(7, "bytes", "module_id in bytes.", lambda d: d.set(module_id=MODULE_ID.encode()))
    add(7, "nitrotpm", "The module_id of a NitroTPM.", lambda d: d.named(f"{INSTANCE}-tpm0000000000000000"))
    add(7, "no_enclave", "An instance without an enclave.", lambda d: d.named(INSTANCE))
    add(7, "line_end", "A line's end after it.", lambda d: d.named(MODULE_ID + "\n"))
    add(7, "capitals", "Capital letters.", lambda d: d.named(MODULE_ID.upper()))
    add(8, "zero", "Time 0.", lambda d: d.set(timestamp=0))
    add(8, "negative", "A time before 1970.", lambda d: d.set(timestamp=-NOW_MS))
    add(8, "float", "A floating-point number as the time.", lambda d: d.set(timestamp=float(NOW_MS)))
    add(8, "largest", "2^64 - 1, which no calendar has.", lambda d: d.set(timestamp=2**64 - 1))
    add(9, "sha256", "SHA256 as the digest.", lambda d: d.set(digest="SHA256"))
    add(9, "small_letters", "sha384 as the digest.", lambda d: d.set(digest="sha384"))
    add(10, "empty", "No PCR.", lambda d: d.set(pcrs={}))
    add(10, "index_32", "PCR32.", lambda d: d.pcr(32))
    add(10, "index_negative", "PCR-1.", lambda d: d.pcr(-1))
    add(10, "index_text", "A text as the index.", lambda d: d.pcr("0"))
    add(10, "index_false", "false as an index: 0 in some languages.", lambda d: d.drop_pcr(0).pcr(False, value=PCRS[0]))
    for size in (32, 64):
        add(10, f"bytes_{size}", f"PCR17 of {size} bytes.", lambda d, size=size: d.pcr(17, value=bytes(size)))
    add(10, "text", "PCR0 in hexadecimal digits.", lambda d: d.pcr(0, value=PCRS[0].hex()))
    filling = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), tlv(4, bytes(600)))
    add(11, "leaf_null", "null as the certificate.", lambda d: d.set(certificate=None))
    add(11, "leaf_empty", "A certificate of 0 bytes.", lambda d: d.set(certificate=b""))
    add(11, "leaf_too_long", "A leaf of more than 1024 bytes, else whole.", lambda d: d.extend(LEAF, filling, False))
    add(11, "cabundle_null", "null as cabundle.", lambda d: d.set(cabundle=None))
    add(11, "cabundle_empty", "cabundle without a certificate.", lambda d: d.bundle())
    bundle = (ROOT, REGIONAL, ZONAL, HOST)
    add(11, "authority_empty", "0 bytes after the certificates of cabundle.", lambda d: d.bundle(*bundle, b""))
    add(11, "authority_too_long", "A zonal certificate of that length.", lambda d: d.extend(ZONAL, filling, False))
    for field in ("public_key", "user_data", "nonce"):
        given = {field: None}
        add(
            12,
            f"{field}_1025",
            f"{field} of 1025 bytes.",
            lambda d, field=field: d.set(**{field: bytes(1025)}),
            **given,
        )
        add(12, f"{field}_text", f"{field} is text.", lambda d, field=field: d.set(**{field: "text"}), **given)
    add(12, "public_key_empty", "public_key of 0 bytes.", lambda d: d.set(public_key=b""), public_key=None)
    add(13, "too_old", "As of 300.001 s later.", lambda d: d, at_ms=NOW_MS + AGE_MAX_MS + 1)
    add(13, "future", "As of 10 minutes earlier.", lambda d: d, at_ms=NOW_MS - 600_000)


def certificates() -> None:
    def under_other_root(draft: Draft) -> Draft:
        draft.issued[:LEAF] = OTHER.chain(INSTANCE, NOW_S)
        return draft.certify(LEAF)

    add(14, "other_root", "A whole chain under a root of the same name, with another key.", under_other_root)
    add(14, "root_again", "The root's key and name in another certificate.", lambda d: d.certify(ROOT, serial=7))
    bundle = (OTHER.certificate, ROOT, REGIONAL, ZONAL, HOST)
    add(14, "other_root_first", "Another root before the right one.", lambda d: d.bundle(*bundle))
    add(14, "root_last", "cabundle from the last to the root.", lambda d: d.bundle(HOST, ZONAL, REGIONAL, ROOT))
    add(14, "no_root", "cabundle without the root.", lambda d: d.bundle(REGIONAL, ZONAL, HOST))
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.2"), tlv(5, b""))
    names = x509.NameConstraints([x509.DirectoryName(x509.Name([]))], None)
    add(15, "leaf_not_der", "The leaf is no certificate.", lambda d: d.set(certificate=drawn("leaf", 600)))
    add(15, "leaf_trailing_byte", "A byte after the leaf.", lambda d: d.set(certificate=d.issued[LEAF].der + b"\0"))
    add(15, "leaf_version_1", "An X.509 v1 leaf, without extensions.", lambda d: d.rewrite(LEAF, version_1))
    add(15, "leaf_serial_negative", "A serial number below 0.", lambda d: d.rewrite(LEAF, serial_negative))
    add(15, "leaf_extension_twice", "basicConstraints twice.", lambda d: d.rewrite(LEAF, extension_twice))
    add(15, "leaf_unknown_critical", "A critical extension that nobody knows.", lambda d: d.extend(LEAF, unknown))
    add(15, "name_constraints", "Critical name constraints in an authority.", lambda d: d.extend(ZONAL, names))
    says = "Name constraints in an authority, not critical: they hold all the same."
    add(15, "name_constraints_not_critical", says, lambda d: d.extend(ZONAL, names, False))
    add(15, "leaf_p256", "A leaf on P-256, whose key signed the document.", lambda d: d.certify(LEAF, own=p256("leaf")))
    add(15, "authority_p256", "An authority on P-256.", lambda d: d.certify(ZONAL, own=p256("zonal")))
    add(15, "root_p256", "The trusted root is on P-256.", lambda d: d.certify(ROOT, own=p256("root")), own_root=True)
    says = "The leaf is signed with SHA-256."
    add(15, "leaf_sha256", says, lambda d: d.rewrite(LEAF, algorithm_of(ES256_DER), ES256_DER))
    says = "An authority is signed with SHA-256."
    add(15, "authority_sha256", says, lambda d: d.rewrite(ZONAL, algorithm_of(ES256_DER), ES256_DER))

    def may_sign(path_length: int | None, ca: bool = True) -> x509.BasicConstraints:
        return x509.BasicConstraints(ca=ca, path_length=path_length)

    def authority_below_host(draft: Draft) -> Draft:
        below = draft.issued[HOST]
        name = renamed(below.template.subject, "fifth")
        draft.issued.insert(LEAF, below)
        draft.certify(LEAF, own=key("fifth"), subject=name, issuer=below)
        fifth = draft.issued.pop(LEAF)
        return draft.certify(LEAF, issuer=fifth).bundle(ROOT, REGIONAL, ZONAL, HOST, fifth.der)

    def leaf_as_authority(draft: Draft) -> Draft:
        enclave = draft.issued[LEAF]
        draft.issued[LEAF] = issue(enclave.template, key("stolen"), enclave)
        draft.set(certificate=draft.issued[LEAF].der)
        return draft.bundle(ROOT, REGIONAL, ZONAL, HOST, enclave.der)

    no_ca, no_sign = may_sign(None, ca=False), key_usage("digital_signature", "crl_sign")
    for level in (REGIONAL, ZONAL, HOST):
        says = f"The {LEVELS[level]} certificate is of no CA."
        add(16, f"{LEVELS[level]}_not_ca", says, lambda d, level=level: d.extend(level, no_ca))
        says = f"The {LEVELS[level]} certificate's keyUsage lacks keyCertSign."
        add(16, f"{LEVELS[level]}_no_cert_sign", says, lambda d, level=level: d.extend(level, no_sign))
    add(16, "root_not_ca", "The trusted root is no CA.", lambda d: d.extend(ROOT, no_ca), own_root=True)
    add(
        16,
        "root_no_cert_sign",
        "The trusted root's keyUsage likewise.",
        lambda d: d.extend(ROOT, no_sign),
        own_root=True,
    )
    add(16, "no_constraints", "An authority without basicConstraints.", lambda d: d.strip(ZONAL, x509.BasicConstraints))
    add(16, "no_key_usage", "An authority without keyUsage.", lambda d: d.strip(HOST, x509.KeyUsage))
    add(16, "not_critical", "basicConstraints are not critical.", lambda d: d.extend(ZONAL, may_sign(1), False))
    says = "The trusted root's path length is 2, with three authorities below it."
    add(16, "root_path_length", says, lambda d: d.extend(ROOT, may_sign(2)), own_root=True)
    says = "The regional path length is 1, with two authorities below it."
    add(16, "regional_path_length", says, lambda d: d.extend(REGIONAL, may_sign(1)))
    says = "The zonal path length is 0, with one authority below it."
    add(16, "zonal_path_length", says, lambda d: d.extend(ZONAL, may_sign(0)))
    add(16, "fifth_authority", "An authority below the instance's, whose path length is 0.", authority_below_host)
    add(16, "leaf_as_authority", "An enclave's certificate issued the one of the key that signed.", leaf_as_authority)


def chain() -> None:
    for level in (REGIONAL, ZONAL, HOST, LEAF):
        says = f"Another key than its issuer's signed the {LEVELS[level]} certificate."
        add(17, f"{LEVELS[level]}_forged", says, lambda d, level=level: d.forged(level))
        says = f"The {LEVELS[level]} certificate names another issuer than the one that signed it."
        name = renamed(Draft().subject(level - 1), "other")
        add(17, f"{LEVELS[level]}_misnamed", says, lambda d, level=level, name=name: d.misnamed(level, name))
    reordered = x509.Name(list(Draft().subject(HOST))[::-1])
    add(17, "issuer_reordered", "The issuer's name in another order.", lambda d: d.misnamed(LEAF, reordered))
    add(17, "leaf_flipped", "A bit of the leaf's signature.", lambda d: d.set(certificate=flipped(d.issued[LEAF].der)))
    says = "The leaf's two algorithm fields differ."
    add(17, "algorithms_differ", says, lambda d: d.rewrite(LEAF, algorithm_of(ES512_DER), ES384_DER))
    add(17, "host_missing", "cabundle lacks the leaf's issuer.", lambda d: d.bundle(ROOT, REGIONAL, ZONAL))
    add(17, "zonal_missing", "cabundle lacks the zonal certificate.", lambda d: d.bundle(ROOT, REGIONAL, HOST))
    add(17, "swapped", "Zonal and instance certificate swapped.", lambda d: d.bundle(ROOT, REGIONAL, HOST, ZONAL))
    other = OTHER.chain(INSTANCE, NOW_S)[HOST]
    add(17, "other_leaf", "A leaf from below another root, of the same names.", lambda d: d.certify(LEAF, issuer=other))
    usage = (key_usage("content_commitment"), key_usage("digital_signature", "key_cert_sign"))
    neighbour = f"{INSTANCE}-enc01a0c4506c005678"
    add(18, "ca", "The leaf is a CA.", lambda d: d.extend(LEAF, x509.BasicConstraints(ca=True, path_length=None)))
    add(18, "no_key_usage", "The leaf has no keyUsage.", lambda d: d.strip(LEAF, x509.KeyUsage))
    add(18, "no_signing", "The leaf's keyUsage lacks digitalSignature.", lambda d: d.extend(LEAF, usage[0], False))
    add(18, "cert_sign", "The leaf's keyUsage has keyCertSign.", lambda d: d.extend(LEAF, usage[1], False))
    add(18, "neighbour", "The leaf of another enclave of the instance.", lambda d: d.rename(LEAF, neighbour))
    add(18, "longer_name", "The leaf of an enclave whose name starts alike.", lambda d: d.rename(LEAF, f"{MODULE_ID}0"))
    add(18, "no_name", "The leaf has no common name.", lambda d: d.rename(LEAF))
    add(18, "two_names", "The leaf has two common names.", lambda d: d.rename(LEAF, MODULE_ID, neighbour))
    past = {"not_before_s": NOW_S - 4 * HOUR_S, "not_after_s": NOW_S - HOUR_S}
    future = {"not_before_s": NOW_S + HOUR_S, "not_after_s": NOW_S + 4 * HOUR_S}
    for level, name in enumerate(LEVELS):
        own = level == ROOT
        says = f"The {name} certificate expired an hour before."
        add(19, f"{name}_expired", says, lambda d, level=level: d.certify(level, **past), own_root=own)
    for level in (ROOT, LEAF):
        says = f"The {LEVELS[level]} certificate is valid from an hour later."
        own = level == ROOT
        add(19, f"{LEVELS[level]}_not_yet", says, lambda d, level=level: d.certify(level, **future), own_root=own)
    says = "The leaf was valid when the document was made, and is not 200 s later."
    soon = NOW_S + 100
    add(19, "leaf_expired_since", says, lambda d: d.certify(LEAF, not_after_s=soon), at_ms=NOW_MS + 200_000)


def signature() -> None:
    other, time = drawn("other", 48), (cbor2.dumps(NOW_MS - 1), cbor2.dumps(NOW_MS))
    order = P384_ORDER.to_bytes(48, "big")
    add(20, "other_key", "Another key.", lambda d: d.document(signature=d.sign(d.payload(), key("forger"))))
    says = "PCR0 was put in after signing."
    add(20, "pcr0_changed", says, lambda d: d.pcr(0, value=other).patched_after(other, PCRS[0]))
    says = "The nonce was put in after signing."
    add(20, "nonce_changed", says, lambda d: d.set(nonce=other).patched_after(other, NONCE))
    says = "The time was put in after signing."
    add(20, "time_changed", says, lambda d: d.set(timestamp=NOW_MS - 1).patched_after(*time))
    says = "The payload's map became one of definite length after signing."
    add(20, "made_definite", says, lambda d: d.document(cbor2.dumps(d.fields), d.sign(d.payload())))
    add(20, "flipped", "A bit of s.", lambda d: d.signed(flipped))
    add(20, "zeros", "r and s are 0.", lambda d: d.document(signature=bytes(96)))
    add(20, "r_zero", "r is 0.", lambda d: d.signed(lambda one: bytes(48) + one[48:]))
    add(20, "s_order", "s is the order of the group.", lambda d: d.signed(lambda one: one[:48] + order))
    add(20, "swapped", "s before r.", lambda d: d.signed(lambda one: one[48:] + one[:48]))
    add(20, "little_endian", "Least bytes first.", lambda d: d.signed(lambda one: one[47::-1] + one[:47:-1]))
    add(20, "sha256", "ECDSA over SHA-256.", lambda d: d.hashed(hashes.SHA256()))
    says = "The payload was signed, not the Sig_structure."
    add(20, "payload_only", says, lambda d: d.document(signature=signature_of(key("leaf"), d.payload(), d.hash)))
    add(20, "context", "The context of COSE_Sign.", lambda d: d.within("Signature", b""))
    add(20, "external_data", "External data was signed, too.", lambda d: d.within("Signature1", b"more"))


def claims() -> None:
    elsewhere = identity_pcr("i-0fedcba9876543210")
    add(21, "other_instance", "PCR4 of another instance.", lambda d: d.pcr(4, value=elsewhere))
    add(21, "zero", "PCR4 is zero.", lambda d: d.pcr(4))
    add(21, "missing", "No PCR4.", lambda d: d.drop_pcr(4))
    add(22, "debug", "Debug mode: PCR0, PCR1, PCR2 and PCR8 are zero.", lambda d: d.pcr(0, 1, 2, 8))
    for index in (0, 1, 2):
        add(22, f"pcr{index}_zero", f"PCR{index} is zero.", lambda d, index=index: d.pcr(index))
        add(22, f"pcr{index}_missing", f"No PCR{index}.", lambda d, index=index: d.drop_pcr(index))
    for index, value in PCRS.items():
        one = flipped(value)
        add(23, f"pcr{index}_other", f"Another PCR{index}.", lambda d, index=index, one=one: d.pcr(index, value=one))
    says = "The expected PCRs, each in another's place."
    add(23, "rotated", says, lambda d: d.pcr(0, value=PCRS[1]).pcr(1, value=PCRS[2]).pcr(2, value=PCRS[0]))
    add(23, "pcr8_missing", "No PCR8.", lambda d: d.drop_pcr(8))
    expected = {"nonce": NONCE, "user_data": USER_DATA, "public_key": PUBLIC_KEY}
    for step, (name, value) in enumerate(expected.items(), 24):
        add(step, "null", f"{name} is null.", lambda d, name=name: d.set(**{name: None}))
        one = flipped(value)
        add(step, "other", f"Another {name}.", lambda d, name=name, one=one: d.set(**{name: one}))
    add(24, "shorter", "The nonce lacks its last byte.", lambda d: d.set(nonce=NONCE[:-1]))
    add(24, "longer", "A byte after the nonce.", lambda d: d.set(nonce=NONCE + b"\0"))
    add(24, "empty", "A nonce of 0 bytes.", lambda d: d.set(nonce=b""))
    says = "nonce and user_data in each other's place."
    add(24, "swapped", says, lambda d: d.set(nonce=USER_DATA, user_data=NONCE))
    twice = hashlib.sha384(PCR16 + CONTRACT).digest()
    add(27, "zero", "PCR16 was not extended.", lambda d: d.pcr(16))
    add(27, "missing", "PCR16 was not locked.", lambda d: d.drop_pcr(16))
    add(27, "twice", "PCR16 was extended twice.", lambda d: d.pcr(16, value=twice))
    add(27, "elsewhere", "The value is in PCR17.", lambda d: d.pcr(16).pcr(17, value=PCR16))


def generate() -> dict[str, bytes]:
    """File name → content."""
    for part in (accepted, envelope, payload, fields, certificates, chain, signature, claims):
        part()
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in ENTRIES)
    index = f'{{\n "defaults": {json.dumps(DEFAULTS)},\n "vectors": [\n{rows}\n ]\n}}\n'
    return {**FILES, "index.json": index.encode()}


def main() -> int:
    files = generate()
    present = {path.name: path.read_bytes() for path in HERE.iterdir() if path.suffix in (".bin", ".json")}
    if sys.argv[1:] == ["--check"]:
        differ = sorted(name for name in files.keys() | present if files.get(name) != present.get(name))
        print(f"{len(differ)} of {len(files)} files differ {differ[:5]}")
        return 1 if differ else 0
    for name in present.keys() - files:
        (HERE / name).unlink()
    for name, content in files.items():
        (HERE / name).write_bytes(content)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
