"""The verifier: real documents, freshness, policies, mutations, and that its checklist is the documented one."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256, sha384
from pathlib import Path
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enclave_runtime.enclave
from mpc.attestation import (
    AWS_NITRO_ROOT_G1,
    CONTRACT_PCR,
    DOCUMENT_BYTES_MAX,
    AppraisalPolicy,
    Measurement,
    Step,
    contract_pcr,
    root_fingerprint,
    unverified_document,
    verify,
)
from mpc.attestation.policy import AGE_MAX_MS
from mpc.host.simulated_nsm import SimulatedNsm, encode_payload, leaf_template, sign1
from mpc.host.simulated_root import SimulatedRoot, issue, private_key
from mpc.protocol.errors import AppraisalError, LocalError, PolicyError

HERE = Path(__file__).parent
REAL = HERE.parents[1] / "shared" / "vectors" / "attestation"
REAL_INDEX = json.loads((REAL / "index.json").read_text()) if REAL.exists() else []
REAL_COUNT = 44
CHECKLIST = (HERE.parent / "docs" / "ATTESTATION.md").read_text()
MUTATIONS = int(os.environ.get("MPC_ATTESTATION_MUTATIONS", "21000"))

NOW_MS = 1_790_000_000_000
NONCE, USER_DATA, PUBLIC_KEY = bytes(range(48)), b"user data " * 4, b"public key " * 3
PCRS = {index: sha384(bytes([index])).digest() for index in (0, 1, 2)}
EXPECTED = {"nonce": NONCE, "user_data": USER_DATA, "public_key": PUBLIC_KEY}
HOUR_MS = 3_600_000


class Enclave:
    """A simulated NSM on a clock that can be turned."""

    def __init__(self, root: SimulatedRoot | None = None, **options: Any) -> None:
        self.now_ms = NOW_MS
        self.root = root or SimulatedRoot.create(now_ms=NOW_MS)
        self.nsm = SimulatedNsm(self.root, options.pop("pcrs", PCRS), clock_ms=lambda: self.now_ms, **options)

    def attest(self, **values: bytes | None) -> bytes:
        answer = cbor2.loads(self.nsm.handle(cbor2.dumps({"Attestation": EXPECTED | values})))
        document: bytes = answer["Attestation"]["document"]
        return document

    def policy(self, *measurements: Measurement, age_max_ms: int = AGE_MAX_MS) -> AppraisalPolicy:
        accepted = measurements or (Measurement("release", PCRS),)
        return AppraisalPolicy(accepted, frozenset({self.root.fingerprint}), age_max_ms)


@pytest.fixture(scope="module")
def enclave() -> Enclave:
    return Enclave()


def refused(step: Step, document: bytes, policy: AppraisalPolicy, **expectations: Any) -> AppraisalError:
    with pytest.raises(AppraisalError) as caught:
        verify(document, policy, **expectations)
    assert caught.value.step == step, str(caught.value)
    return caught.value


# Real documents


def known(entry: dict[str, Any], name: str) -> Any:
    """What the index says of a document, or of the one that it was derived from."""
    origin = f"{entry.get('derived_from')}.bin"
    return entry.get(name) or next((other[name] for other in REAL_INDEX if other["file"] == origin), None)


@pytest.mark.parametrize("entry", REAL_INDEX or [None], ids=lambda entry: entry["file"] if entry else "absent")
def test_real_document(entry: dict[str, Any] | None) -> None:
    if entry is None:
        pytest.skip(f"{REAL_COUNT} real documents were not checked: shared/vectors is not beside this project")
    document = (REAL / entry["file"]).read_bytes()
    pcrs = {int(index): bytes.fromhex(pcr) for index, pcr in (known(entry, "pcrs") or {}).items()}
    measurement = Measurement(entry["file"], PCRS | pcrs)
    policy, at = AppraisalPolicy((measurement,)), known(entry, "timestamp_ms") or NOW_MS
    if not (entry.get("verifies") or entry.get("expected") == "valid"):
        with pytest.raises(AppraisalError):
            verify(document, policy, at=at)
    elif entry.get("debug"):
        assert "debug mode" in str(refused(Step.DEBUG, document, policy, at=at))
    else:
        evidence = verify(document, policy, at=at)
        assert evidence.aws
        assert not evidence.fresh
        assert "nonce" in evidence.unchecked
        refused(Step.MEASUREMENT, document, AppraisalPolicy((Measurement("other", PCRS),)), at=at)
        refused(Step.TIME, document, policy, at=at + AGE_MAX_MS + 1)


def test_all_real_documents_are_counted() -> None:
    assert len(REAL_INDEX) in (0, REAL_COUNT)


# Evidence and freshness


def test_evidence(enclave: Enclave) -> None:
    pcr16 = contract_pcr(b"contract")
    assert pcr16 == {16: sha384(bytes(48) + b"contract").digest()}
    assert CONTRACT_PCR == enclave_runtime.enclave.CONTRACT_PCR  # measured code imports nothing of this
    one = Enclave(enclave.root)
    one.nsm.handle(cbor2.dumps({"ExtendPCR": {"index": 16, "data": b"contract"}}))
    one.nsm.handle(cbor2.dumps({"LockPCR": {"index": 16}}))
    evidence = verify(one.attest(), enclave.policy(), **EXPECTED, pcrs=pcr16, at=NOW_MS + 1000)
    assert evidence.fresh
    assert not evidence.own_time
    assert evidence.unchecked == ()
    assert (evidence.timestamp_ms, evidence.at_ms) == (NOW_MS, NOW_MS + 1000)
    assert (evidence.measurement.label, evidence.root) == ("release", enclave.root.fingerprint)
    assert (evidence.nonce, evidence.user_data, evidence.public_key) == (NONCE, USER_DATA, PUBLIC_KEY)
    assert evidence.module_id == one.nsm.module_id
    assert {index: evidence.pcrs[index] for index in (0, 1, 2, 16)} == PCRS | pcr16
    assert not evidence.aws


def test_without_nonce_nothing_is_fresh(enclave: Enclave) -> None:
    evidence = verify(enclave.attest(), enclave.policy(), at=NOW_MS)
    assert not evidence.fresh
    assert evidence.unchecked == ("nonce", "user_data", "public_key")


def test_own_time_needs_a_nonce_that_nobody_guesses(enclave: Enclave) -> None:
    refused(Step.TIME, enclave.attest(), enclave.policy())
    refused(Step.TIME, enclave.attest(nonce=NONCE[:15]), enclave.policy(), nonce=NONCE[:15])
    short = verify(enclave.attest(nonce=NONCE[:15]), enclave.policy(), nonce=NONCE[:15], at=NOW_MS)
    assert not short.fresh
    evidence = verify(enclave.attest(nonce=NONCE[:16]), enclave.policy(), nonce=NONCE[:16])
    assert evidence.fresh
    assert evidence.own_time
    assert evidence.at_ms == NOW_MS
    refused(Step.NONCE, enclave.attest(), enclave.policy(), nonce=NONCE[::-1])


def test_a_remembered_chain_still_expires(enclave: Enclave) -> None:
    document, patient = enclave.attest(), enclave.policy(age_max_ms=100 * HOUR_MS)
    verify(document, patient, at=NOW_MS)
    verify(document, patient, at=NOW_MS + 2 * HOUR_MS)
    refused(Step.VALIDITY, document, patient, at=NOW_MS + 4 * HOUR_MS)


def test_a_remembered_chain_is_still_under_its_root_only(enclave: Enclave) -> None:
    document = enclave.attest()
    verify(document, enclave.policy(), at=NOW_MS)
    refused(Step.ROOT, document, Enclave().policy(), at=NOW_MS)
    refused(Step.ROOT, document, AppraisalPolicy((Measurement("release", PCRS),)), at=NOW_MS)


def test_a_remembered_chain_vouches_for_no_other_certificate(enclave: Enclave) -> None:
    verify(enclave.attest(), enclave.policy(), at=NOW_MS)
    protected, unprotected, payload, signature = cbor2.loads(enclave.attest())
    fields = cbor2.loads(payload)
    stranger = cbor2.loads(cbor2.loads(Enclave(instance_id="i-0123456789abcdef0").attest())[2])
    for place in range(1, 4):
        cabundle = [*fields["cabundle"][:place], stranger["cabundle"][place], *fields["cabundle"][place + 1 :]]
        changed = cbor2.dumps([protected, unprotected, cbor2.dumps(fields | {"cabundle": cabundle}), signature])
        refused(Step.CHAIN, changed, enclave.policy(), at=NOW_MS)
    leaf = cbor2.dumps(fields | {"certificate": stranger["certificate"]})
    refused(Step.CHAIN, cbor2.dumps([protected, unprotected, leaf, signature]), enclave.policy(), at=NOW_MS)


def test_debug_mode_is_explained(enclave: Enclave) -> None:
    document = Enclave(enclave.root, debug=True).attest()
    error = refused(Step.DEBUG, document, enclave.policy(), at=NOW_MS)
    assert "debug mode" in str(error)
    assert "console" in str(error)


def test_errors_show_no_content(enclave: Enclave) -> None:
    for name, step in (("user_data", Step.USER_DATA), ("public_key", Step.PUBLIC_KEY), ("nonce", Step.NONCE)):
        secret = b"another value that nobody may read"
        text = str(refused(step, enclave.attest(), enclave.policy(), at=NOW_MS, **{name: secret}))
        for value in (secret, EXPECTED[name]):
            assert value.hex()[:16] not in text
            assert value.decode("latin-1")[:8] not in text
            assert f"{len(value)} bytes" in text


@pytest.mark.parametrize(
    "arguments",
    [
        {"nonce": "text"},
        {"user_data": bytearray(3)},
        {"at": 0},
        {"at": True},
        {"at": 1.5},
        {"pcrs": {32: bytes(48)}},
        {"pcrs": {16: bytes(32)}},
        {"pcrs": {"16": bytes(48)}},
        {"pcrs": [bytes(48)]},
    ],
    ids=str,
)
def test_wrong_arguments_are_the_callers_fault(enclave: Enclave, arguments: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        verify(enclave.attest(), enclave.policy(), **{"at": NOW_MS, **arguments})


def test_the_document_is_bytes(enclave: Enclave) -> None:
    for wrong in (bytearray(enclave.attest()), enclave.attest().hex(), None):
        with pytest.raises(LocalError):
            unverified_document(wrong)  # type: ignore[arg-type]
    with pytest.raises(LocalError):
        verify(enclave.attest(), None, at=NOW_MS)  # type: ignore[arg-type]


def test_unverified_document_reads_and_verifies_nothing(enclave: Enclave) -> None:
    raw = enclave.attest()
    document = unverified_document(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert (document.module_id, document.timestamp_ms) == (enclave.nsm.module_id, NOW_MS)
    assert document.nonce == NONCE
    assert NONCE.hex() not in repr(document)
    refused(Step.SIZE, bytes(DOCUMENT_BYTES_MAX + 1), enclave.policy(), at=NOW_MS)


def test_every_tag_is_refused(enclave: Enclave) -> None:
    """cbor2 gives tags meanings of its own, some of them expensive; none may reach it."""
    payload = cbor2.loads(enclave.attest())[2]
    value = cbor2.dumps(USER_DATA)
    for tag in (*range(1200), 43000, 55799, 2**32):
        tagged = payload.replace(value, cbor2.dumps(cbor2.CBORTag(tag, USER_DATA)))
        refused(
            Step.PAYLOAD, cbor2.dumps([bytes.fromhex("a1013822"), {}, tagged, bytes(96)]), enclave.policy(), at=NOW_MS
        )


def test_sibling_formats_are_refused_by_name(enclave: Enclave) -> None:
    protected, unprotected, payload, signature = cbor2.loads(enclave.attest())
    fields = cbor2.loads(payload)
    renamed = {"nitrotpm_pcrs" if name == "pcrs" else name: value for name, value in fields.items()}
    other_id = fields | {"module_id": "i-0123456789abcdef0-tpm0000000000000000"}
    for changed, step in ((renamed, Step.FIELDS), (other_id, Step.MODULE_ID)):
        document = cbor2.dumps([protected, unprotected, cbor2.dumps(changed), signature])
        assert "NitroTPM" in str(refused(step, document, enclave.policy(), at=NOW_MS))


def test_a_certificate_made_after_the_document_is_refused(enclave: Enclave) -> None:
    now_s, instance = NOW_MS // 1000, "i-0123456789abcdef0"
    fields = cbor2.loads(cbor2.loads(enclave.attest())[2])
    authorities = enclave.root.chain(instance, now_s)
    for later_s, step in ((0, None), (60, Step.VALIDITY)):
        leaf = issue(leaf_template(enclave.nsm.module_id, now_s + later_s), private_key(bytes(56)), authorities[-1])
        document = sign1(encode_payload(fields | {"certificate": leaf.der}), leaf.key)
        if step is None:
            verify(document, enclave.policy(), at=NOW_MS + 120_000)
        else:
            refused(step, document, enclave.policy(), at=NOW_MS + 120_000)


# Policies


def test_several_releases_each_until_its_expiry(enclave: Enclave) -> None:
    other = {index: sha384(b"other").digest() for index in (0, 1, 2)}
    old, new = Measurement("old", PCRS, NOW_MS + 1000), Measurement("new", other)
    policy = enclave.policy(new, old)
    assert verify(enclave.attest(), policy, at=NOW_MS + 999).measurement == old
    error = refused(Step.MEASUREMENT, enclave.attest(), policy, at=NOW_MS + 1000)
    assert "'old'" in str(error)
    assert "2026-09-21 14:13:21Z" in str(error)
    again = enclave.policy(old, Measurement("extended", PCRS))
    assert verify(enclave.attest(), again, at=NOW_MS + 1000).measurement.label == "extended"


def test_pcr8_counts_in_addition(enclave: Enclave) -> None:
    signed = PCRS | {8: sha384(b"signer").digest()}
    policy = enclave.policy(Measurement("signed", signed))
    verify(Enclave(enclave.root, pcrs=signed).attest(), policy, at=NOW_MS)
    refused(Step.MEASUREMENT, enclave.attest(), policy, at=NOW_MS)
    with pytest.raises(LocalError, match="PCR0, PCR1, PCR2"):
        Measurement("signer only", {8: signed[8]})


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_measurement_names_all_code(missing: int) -> None:
    for pcrs in ({i: PCRS[i] for i in PCRS if i != missing}, PCRS | {missing: bytes(48)}):
        with pytest.raises(LocalError, match=f"PCR{missing}"):
            Measurement("incomplete", pcrs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AppraisalPolicy(()),
        lambda: AppraisalPolicy((Measurement("m", PCRS),), frozenset()),
        lambda: AppraisalPolicy((Measurement("m", PCRS),), frozenset({b"short"})),
        lambda: AppraisalPolicy((Measurement("m", PCRS),), age_max_ms=0),
        lambda: AppraisalPolicy((PCRS,)),  # type: ignore[arg-type]
        lambda: Measurement("", PCRS),
        lambda: Measurement("m", PCRS | {32: bytes(48)}),
        lambda: Measurement("m", PCRS | {8: bytes(32)}),
        lambda: Measurement("m", PCRS, 0),
        lambda: Measurement("m", PCRS, 2**60),
    ],
)
def test_no_policy_is_vacuous(make: Callable[[], object]) -> None:
    with pytest.raises(LocalError):
        make()


VALUES = [sha384(bytes([value])).digest() for value in range(2)]
SOME_PCRS = st.fixed_dictionaries(
    {0: st.sampled_from(VALUES), 1: st.just(VALUES[0]), 2: st.just(VALUES[0])}, optional={8: st.sampled_from(VALUES)}
)
SOME_MEASUREMENTS = st.lists(
    st.builds(Measurement, st.just("m"), SOME_PCRS, st.sampled_from([None, 5, 10])), min_size=1, max_size=3
)


def accepts(measurements: Any, pcrs: Any, at: int) -> bool:
    alive = (one for one in measurements if one.expires_ms is None or at < one.expires_ms)
    return any(one.mismatch(pcrs) is None for one in alive)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(SOME_MEASUREMENTS, SOME_MEASUREMENTS, SOME_PCRS, st.sampled_from([1, 7, 20]))
def test_a_contract_narrows_and_never_widens(mine: Any, theirs: Any, pcrs: Any, at: int) -> None:
    policy = AppraisalPolicy(tuple(mine))
    try:
        both: Any = policy.narrow(theirs, [AWS_NITRO_ROOT_G1, bytes(32)]).measurements
    except PolicyError:
        both = ()
    assert accepts(both, pcrs, at) == (accepts(mine, pcrs, at) and accepts(theirs, pcrs, at))


def test_narrowed_roots_and_age() -> None:
    root, own = bytes(range(32)), Measurement("m", PCRS)
    policy = AppraisalPolicy((own,), frozenset({AWS_NITRO_ROOT_G1, root}), 1000)
    narrowed = policy.narrow([own], [root, bytes(32)], 5000)
    assert (narrowed.roots, narrowed.age_max_ms) == ({root}, 1000)
    assert policy.narrow([own], [root], 500).age_max_ms == 500
    with pytest.raises(PolicyError):
        policy.narrow([own], [bytes(32)])
    with pytest.raises(PolicyError):
        policy.narrow([], [root])
    with pytest.raises(PolicyError):
        policy.narrow([Measurement("theirs", PCRS | {2: VALUES[0]})], [root])


def test_the_documented_policy_is_one() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", CHECKLIST, re.DOTALL)
    policy = AppraisalPolicy.from_toml(example)
    (measurement,) = policy.measurements
    assert (policy.roots, policy.age_max_ms) == ({AWS_NITRO_ROOT_G1}, 300_000)
    assert (measurement.label, measurement.expires_ms) == ("0.1.0 cp311 x86_64", 1_814_313_600_000)
    assert sorted(measurement.pcrs) == [0, 1, 2]


HEX = "ab" * 48
RELEASE = f'[[measurement]]\nlabel = "a"\nPCR0 = "{HEX}"\nPCR1 = "{HEX}"\nPCR2 = "{HEX}"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "measurement"),
        ("measurement = []", "at least one"),
        ("measurement = 3", "measurement"),
        ("not toml", "not TOML"),
        ("a = " + "[" * 5000, "not TOML"),
        (RELEASE + RELEASE, "two measurements"),
        (RELEASE.replace('label = "a"', ""), "label"),
        (RELEASE.replace("PCR2", "PCR3"), "PCR2"),
        (RELEASE.replace("PCR2", "PCR02"), "PCR02"),
        (RELEASE.replace("PCR2", "pcr2"), "pcr2"),
        (RELEASE.replace(f'PCR2 = "{HEX}"', f'PCR2 = "{HEX[2:]}"'), "96 hex digits"),
        (RELEASE.replace(f'PCR2 = "{HEX}"', f'PCR2 = "{"0" * 96}"'), "zero"),
        (RELEASE + "expires = 2027-01-01", "offset"),
        (RELEASE + "expires = 2027-01-01T00:00:00", "offset"),
        (RELEASE + "skip = true", "skip"),
        ("debug = true\n" + RELEASE, "debug"),
        ("roots = []\n" + RELEASE, "roots"),
        ('roots = ["G1"]\n' + RELEASE, "aws-nitro-enclaves-g1"),
        ("roots = [1]\n" + RELEASE, "roots"),
        ("age_max = 300\n" + RELEASE, "5 min"),
        ('age_max = "0 s"\n' + RELEASE, "above 0"),
        ('age_max = "1 week"\n' + RELEASE, "5 min"),
    ],
)
def test_a_wrong_policy_file_is_explained(text: str, says: str) -> None:
    with pytest.raises(LocalError, match=re.escape(says)):
        AppraisalPolicy.from_toml(text)


def test_root_fingerprints_as_people_write_them() -> None:
    text = AWS_NITRO_ROOT_G1.hex()
    colons = ":".join(text[i : i + 2] for i in range(0, 64, 2)).upper()
    assert {root_fingerprint(one) for one in ("aws-nitro-enclaves-g1", text, colons)} == {AWS_NITRO_ROOT_G1}
    with pytest.raises(LocalError, match="ZIP"):
        root_fingerprint("8cf60e2b2efca96c6a9e71e851d00c1b6991cc09eadbe64a6a1d1b1eb9faff7c")
    for wrong in ("", text[:-1], text + "00", "g" * 64):
        with pytest.raises(LocalError):
            root_fingerprint(wrong)


@pytest.mark.skipif(not REAL_INDEX, reason="the certificate is fetched material, kept beside the project")
def test_the_pinned_fingerprint_is_the_certificates() -> None:
    document = unverified_document((REAL / "worldcoin_tests.bin").read_bytes())
    assert sha256(document.cabundle[0]).digest() == AWS_NITRO_ROOT_G1


# Mutations: a document is changed in one place and not signed again


def head(major: int, count: int) -> bytes:
    first, *rest = cbor2.dumps(count)
    return bytes([major | first, *rest])


def mutated(items: list[bytes], chance: random.Random) -> list[bytes]:
    """One element of a list flipped, dropped, duplicated or moved."""
    items, place = list(items), chance.randrange(len(items))
    match chance.randrange(4):
        case 0:
            items[place] = flipped(items[place], chance)
        case 1:
            del items[place]
        case 2:
            items.insert(chance.randrange(len(items) + 1), items[place])
        case _:
            items.insert(chance.randrange(len(items)), items.pop(place))
    return items


def flipped(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def pairs(table: dict[Any, Any]) -> list[bytes]:
    return [cbor2.dumps(key) + cbor2.dumps(value) for key, value in table.items()]


def variant(document: bytes, chance: random.Random) -> bytes:
    """The document with one element of one of its levels changed: bytes, COSE array, fields, PCRs or certificates."""
    level = chance.choice(["bytes", "runs", "array", "fields", "pcrs", "cabundle"])
    if level == "bytes":
        return b"".join(mutated([bytes([byte]) for byte in document], chance))
    if level == "runs":
        cuts = sorted(chance.sample(range(1, len(document)), 5))
        return b"".join(mutated([document[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)], chance))
    parts = [cbor2.dumps(part) for part in cbor2.loads(document)]
    if level == "array":
        parts = mutated(parts, chance)
        return head(0x80, len(parts)) + b"".join(parts)
    fields = cbor2.loads(cbor2.loads(document)[2])
    if level == "fields":
        entries = mutated(pairs(fields), chance)
    else:
        inner = pairs(fields["pcrs"]) if level == "pcrs" else [cbor2.dumps(der) for der in fields["cabundle"]]
        inner = mutated(inner, chance)
        changed = head(0xA0 if level == "pcrs" else 0x80, len(inner)) + b"".join(inner)
        entries = [
            cbor2.dumps(name) + (changed if name == level else cbor2.dumps(value)) for name, value in fields.items()
        ]
    payload = b"\xbf" + b"".join(entries) + b"\xff"
    return head(0x80, 4) + parts[0] + parts[1] + cbor2.dumps(payload) + parts[3]


def cpu_s(work: Callable[[], object], times: int) -> float:
    """The least of several runs, in CPU seconds of this thread: what else the machine does is not in it."""
    least = float("inf")
    for _ in range(times):
        start = time.thread_time()
        with suppress(AppraisalError):
            work()
        least = min(least, time.thread_time() - start)
    return least


def test_no_mutation_is_accepted(enclave: Enclave) -> None:
    document, policy, chance = enclave.attest(), enclave.policy(), random.Random(20261123)
    steps, slowest, same = Counter[int](), [(0.0, b"")], 0
    for number in range(MUTATIONS):
        changed = variant(document, chance)
        if changed == document:  # two equal elements changed places
            same += 1
            continue
        start = time.thread_time()
        try:
            verify(changed, policy, at=NOW_MS, **EXPECTED)
        except AppraisalError as error:
            steps[int(str(error.step))] += 1
        else:
            pytest.fail(f"mutation {number} was accepted: {changed.hex()}")
        if (took := time.thread_time() - start) > slowest[0][0]:
            slowest = sorted([*slowest, (took, changed)])[-5:]
    assert MUTATIONS - same >= 20_000 or "MPC_ATTESTATION_MUTATIONS" in os.environ
    assert len(steps) >= 12, steps  # it reaches deep into the checklist
    assert steps[Step.SIGNATURE] > MUTATIONS / 50, steps
    # The slowest again, each several times: what was slow because the machine was busy is not slow then
    valid = cpu_s(lambda: verify(document, policy, at=NOW_MS, **EXPECTED), 20)
    for _, changed in slowest:
        again = cpu_s(lambda changed=changed: verify(changed, policy, at=NOW_MS, **EXPECTED), 5)  # type: ignore[misc]
        assert again < 50 * valid, changed.hex()


# The checklist


def test_the_checklist_is_the_documented_one() -> None:
    documented = re.findall(r"^### (\d+)\. (.+)$", CHECKLIST, re.MULTILINE)
    assert [(int(number), title) for number, title in documented] == [(int(step), step.title) for step in Step]
    sections = re.split(r"^###? .*$", CHECKLIST, flags=re.MULTILINE)
    for section in [text for text in sections if "*Stops:*" in text or "*Source:*" in text]:
        assert section.count("*Source:*") == section.count("*Stops:*") == 1, section
    assert CHECKLIST.count("*Stops:*") == len(Step)


def test_every_step_has_a_vector_that_it_refuses() -> None:
    index = json.loads((HERE / "vectors" / "index.json").read_text())
    assert {vector["expect"] for vector in index["vectors"]} >= {int(step) for step in Step}


def test_limits_are_the_documented_ones() -> None:
    assert f"1 to {DOCUMENT_BYTES_MAX:,} bytes" in CHECKLIST


def test_it_stands_alone() -> None:
    script = "import sys, mpc.attestation; print(*sorted(n for n in sys.modules if n.split('.')[0] in sys.argv[1:]))"
    run = [sys.executable, "-c", script, "mpc", "parties", "enclave_runtime"]
    names = subprocess.run(run, check=True, capture_output=True, text=True, cwd=HERE.parent).stdout.split()
    assert "mpc.attestation.verify" in names
    others = [name for name in names if not name.startswith("mpc.attestation")]
    assert others == ["mpc", "mpc.protocol", "mpc.protocol.errors"]
