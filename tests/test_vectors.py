"""The conformance vectors: each is refused by the step that it was made for, or accepted; they can be made again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from mpc.attestation import AppraisalPolicy, Evidence, Measurement, Step, verify
from mpc.protocol.errors import AppraisalError

FOLDER = Path(__file__).parent / "vectors"
INDEX = json.loads((FOLDER / "index.json").read_text())
VECTORS = INDEX["vectors"]
MEASURED = ("0", "1", "2", "8")


def appraise(vector: dict[str, Any]) -> Evidence:
    given = INDEX["defaults"] | vector
    pcrs = {name: bytes.fromhex(value) for name, value in given["pcrs"].items()}
    measurement = Measurement("vector", {int(name): pcrs[name] for name in MEASURED})
    policy = AppraisalPolicy((measurement,), frozenset({bytes.fromhex(given["root"])}), given["age_max_ms"])
    expected = {name: given[name] for name in ("nonce", "user_data", "public_key")}
    return verify(
        (FOLDER / vector["file"]).read_bytes(),
        policy,
        pcrs={int(name): value for name, value in pcrs.items() if name not in MEASURED},
        at=given["at_ms"],
        **{name: None if value is None else bytes.fromhex(value) for name, value in expected.items()},
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["file"])
def test_vector(vector: dict[str, Any]) -> None:
    if vector["expect"] is None:
        assert appraise(vector).root.hex() == INDEX["defaults"]["root"]
    else:
        with pytest.raises(AppraisalError) as refused:
            appraise(vector)
        assert refused.value.step == vector["expect"], str(refused.value)


def test_every_step_refuses_something() -> None:
    assert {vector["expect"] for vector in VECTORS} == {None, *Step}
    assert sum(vector["expect"] is not None for vector in VECTORS) >= 60


def test_every_file_is_in_the_index_once() -> None:
    files = sorted(path.name for path in FOLDER.glob("*.bin"))
    assert sorted(vector["file"] for vector in VECTORS) == files
    contents = [(FOLDER / file).read_bytes() for file in files if not file.startswith("13-")]  # there the time is wrong
    assert len(set(contents)) == len(contents)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # one has a wrong one
def test_no_signature_is_stale() -> None:
    """Whatever the fault is, the leaf that the document names signed it, unless that is the fault."""
    no_leaf = {f"05-{name}.bin" for name in ("array", "not_cbor", "not_utf8", "tagged_time")}
    no_leaf |= {"06-no_certificate.bin", "11-leaf_empty.bin", "11-leaf_null.bin"}
    no_leaf |= {"15-leaf_not_der.bin", "15-leaf_trailing_byte.bin"}
    unreadable = set()
    for vector in VECTORS:
        if vector["expect"] is not None and (vector["expect"] < Step.PAYLOAD or vector["expect"] == Step.SIGNATURE):
            continue
        protected, _, payload, signature = cbor2.loads((FOLDER / vector["file"]).read_bytes().removeprefix(b"\xd2"))
        try:
            leaf = x509.load_der_x509_certificate(cbor2.loads(payload)["certificate"]).public_key()
        except (cbor2.CBORDecodeError, LookupError, TypeError, ValueError):
            unreadable.add(vector["file"])
            continue
        r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
        signed = cbor2.dumps(["Signature1", protected, b"", payload])
        assert isinstance(leaf, ec.EllipticCurvePublicKey)
        leaf.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))
    assert unreadable == no_leaf


def test_the_same_bytes_come_out_again() -> None:
    path = os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    check = [sys.executable, "-B", str(FOLDER / "generate.py"), "--check"]
    done = subprocess.run(check, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
