"""One verification against the bare ECDSA P-384 verifications that its chain needs, in turn in one process.

The document is a real one of ../shared/vectors/attestation, and where that folder is absent one of the simulated NSM.
Each round times the bare verifications, with keys that are loaded already; a whole verification whose chain was met
before, as all are but an enclave's first; one with nothing remembered; and beside them the peers of ../shared/peers:
the least that a verifier on these libraries does (parse, issuers, signatures, and no rule more), and, where it is
installed, epsilon-attestation-verifier, which checks less than ours (no pinned fingerprint, nonce or validity).

With nothing remembered the goal is out of reach for these libraries: OpenSSL prepares a key at its first use, and the
bare verifications with keys loaded anew say how much that alone is.
"""

import base64
import importlib.util
import logging
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bench.figures import Figure, Report, median, ratio
from mpc.attestation import (
    AWS_NITRO_ROOT_G1,
    AppraisalPolicy,
    Document,
    Measurement,
    chain,
    unverified_document,
    verify,
)

REAL = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "attestation" / "worldcoin_tests.bin"
ROUNDS = 300
RATIO_MAX = 1.15


def bare_verifications(document: Document, *, anew: bool = False) -> Callable[[], None]:
    """Only the signatures: each authority's by the one above it, the leaf's, and the document's; `anew`: each with a
    key that was just made."""
    certificates = [x509.load_der_x509_certificate(der) for der in (*document.cabundle, document.certificate)]
    keys = [certificate.public_key() for certificate in certificates]
    r, s = (int.from_bytes(part, "big") for part in (document.signature[:48], document.signature[48:]))
    signed = [
        (key, child.signature, child.tbs_certificate_bytes)
        for key, child in zip(keys[:-1], certificates[1:], strict=True)
    ]
    signed.append((keys[-1], utils.encode_dss_signature(r, s), document.signed_bytes))
    es384 = ec.ECDSA(hashes.SHA384())

    def run() -> None:
        for key, signature, data in signed:
            assert isinstance(key, ec.EllipticCurvePublicKey)
            key.verify(signature, data, es384)

    points = [key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) for key, _, _ in signed]

    def run_anew() -> None:
        for point, (_, signature, data) in zip(points, signed, strict=True):
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point).verify(signature, data, es384)

    return run_anew if anew else run


def least(raw: bytes) -> Callable[[], None]:
    """What ../shared/peers/w7_attest.py calls the floor: decode, parse, names and signatures, and no other rule."""
    es384 = ec.ECDSA(hashes.SHA384())

    def run() -> None:
        protected, _, payload, signature = cbor2.loads(raw)
        fields = cbor2.loads(payload)
        certificates = [x509.load_der_x509_certificate(der) for der in (*fields["cabundle"], fields["certificate"])]
        for above, below in pairwise(certificates):
            below.verify_directly_issued_by(above)
        r, s = (int.from_bytes(part, "big") for part in (signature[:48], signature[48:]))
        key, data = certificates[-1].public_key(), cbor2.dumps(["Signature1", protected, b"", payload])
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(utils.encode_dss_signature(r, s), data, es384)

    return run


def epsilon(raw: bytes) -> Callable[[], None]:
    """The peer's verifier, told to take the document's time."""
    from epsilon_verifier import verify_attestation  # type: ignore[import-not-found]

    logging.disable(logging.CRITICAL)
    text, root = base64.b64encode(raw).decode(), str(REAL.with_name("aws-nitro-root-g1.pem"))

    def run() -> None:
        assert verify_attestation(text, aws_root_cert_path=root, allow_expired=True).valid

    return run


def simulated_document() -> tuple[bytes, bytes]:
    """A document of a fresh simulated root, and that root's fingerprint."""
    from mpc.host.simulated_nsm import SimulatedNsm, SimulatedRoot

    root = SimulatedRoot.create()
    nsm = SimulatedNsm(root, {index: bytes([index + 1]) * 48 for index in range(3)})
    return cbor2.loads(nsm.handle(cbor2.dumps({"Attestation": {}})))["Attestation"]["document"], root.fingerprint


def timed(work: Callable[[], object]) -> float:
    """In ms of this thread's CPU time: nothing here waits, and a busy machine is not what is measured."""
    start = time.thread_time()
    work()
    return (time.thread_time() - start) * 1000


def measure(rounds: int, work: Path) -> Report:
    real = REAL.exists()
    raw, root = (REAL.read_bytes(), AWS_NITRO_ROOT_G1) if real else simulated_document()
    document = unverified_document(raw)
    policy = AppraisalPolicy((Measurement("bench", {i: document.pcrs[i] for i in (0, 1, 2)}),), frozenset({root}))

    def whole() -> None:
        verify(raw, policy, at=document.timestamp_ms)

    def cold() -> None:
        chain.forget()
        whole()

    works = {
        "bare": bare_verifications(document),
        "anew": bare_verifications(document, anew=True),
        "least": least(raw),
        "first": cold,
        "again": whole,
    }
    names = {
        "bare": "bare P-384 verifications",
        "anew": "bare P-384 verifications, keys loaded anew",
        "least": "peer: parse, issuers, signatures, and no rule more",
        "first": "verify, nothing remembered",
        "again": "verify, chain remembered",
    }
    if real and importlib.util.find_spec("epsilon_verifier"):
        works["epsilon"], names["epsilon"] = epsilon(raw), "peer: epsilon-attestation-verifier"
    times = [{name: timed(work) for name, work in works.items()} for _ in range(ROUNDS)]
    figures = [Figure(names[name], median(t[name] for t in times), "ms") for name in works]
    figures += [
        Figure(f"{names[name]} / bare", ratio(times, name, "bare"), "x", RATIO_MAX if name == "again" else None)
        for name in list(works)[1:]
    ]
    what = REAL.name if real else "a simulated document"
    absent = "epsilon-attestation-verifier was not measured: it is not installed, or no real document is here"
    notes = () if "epsilon" in works else (absent,)
    return Report(f"Attestation: {what}, {len(document.cabundle) + 1} signatures; median of {ROUNDS}", figures, notes)
