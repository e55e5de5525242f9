"""A party's policy: what it accepts, what it refuses and where, and how it reads an attestation document."""

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from enclave_runtime.nsm import Nsm
from mpc import scenario
from mpc.attestation import CONTRACT_PCR
from mpc.host.simulated_nsm import SimulatedNsm, SimulatedRoot
from mpc.protocol.contract import (
    SEALING_KEY_BYTES,
    Approvals,
    Contract,
    Measurement,
    Participant,
    Program,
    Rule,
)
from mpc.protocol.errors import AppraisalError, LocalError, PolicyError
from mpc.protocol.sealing import OpeningKey
from parties import policy
from parties.policy import Policy, accepts, appraise

NOW_MS = 1_790_000_000_000
IMAGE = Measurement("sql", b"\1" * 48, b"\2" * 48, b"\3" * 48)
OTHER = Measurement("other", b"\7" * 48, b"\2" * 48, b"\3" * 48)
SCENARIO = scenario.load(Path(__file__).parents[1] / "scenarios" / "salaries")
PEOPLE = [
    Participant(name, bytes([index]) * 32, OpeningKey(bytes([index]) * 32).public)
    for index, name in enumerate(SCENARIO.party, 1)
]
STRANGER = Participant("stranger", b"\x99" * 32, b"\x99" * SEALING_KEY_BYTES)


@pytest.fixture(scope="module")
def root() -> SimulatedRoot:
    return SimulatedRoot.create(entropy=random.Random(1).randbytes, now_ms=NOW_MS)


@pytest.fixture
def contract(root: SimulatedRoot) -> Contract:
    return scenario.contract(
        SCENARIO,
        participants=PEOPLE,
        author=bytes(32),
        measurements=[IMAGE],
        root=root.fingerprint,
        simulated=True,
        now_ms=NOW_MS,
        random=bytes(32),
    )


@pytest.fixture
def mine(root: SimulatedRoot) -> Policy:
    return policy.from_scenario(
        SCENARIO, "acme", participants=PEOPLE, measurements=[IMAGE], root=root.fingerprint, simulated=True
    )


def changed(settings: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(settings, **changes)


def test_the_scenarios_own_contract_is_accepted(mine: Policy, contract: Contract) -> None:
    accepts(mine, contract, "acme", NOW_MS)
    accepts(mine, contract, "acme", NOW_MS - policy.CLOCK_SLACK_MS)


def test_a_contract_may_ask_for_less(mine: Policy, contract: Contract) -> None:
    less = replace(contract, recipients=("corvid",), receipt_recipients=(), epochs_max=1)
    accepts(mine, replace(less, tables=contract.tables[:3], participants=contract.participants[:3]), "acme", NOW_MS)


def test_a_signer_is_only_an_addition(mine: Policy, contract: Contract) -> None:
    """PCR8 in the policy: the contract says nothing of it, and the document must have it."""
    signed = changed(mine, measurement=(changed(mine.measurement[0], pcr8="08" * 48),))
    accepts(signed, contract, "acme", NOW_MS)
    assert policy._appraisal(signed, contract).measurements[0].pcrs[8] == b"\x08" * 48
    with pytest.raises(PolicyError, match=r"enclave\.measurements\.other"):
        accepts(signed, enclave(contract, measurements=(OTHER,)), "acme", NOW_MS)


def test_a_key_that_nothing_can_be_sealed_to_is_refused(mine: Policy, contract: Contract) -> None:
    """Even where the policy names it: the enclave would find out only after it has computed."""
    people = [replace(one, sealing_key=b"\xff" * SEALING_KEY_BYTES) for one in PEOPLE]
    agreed = changed(mine, participant={one.name: policy.known(one) for one in people})
    with pytest.raises(PolicyError, match="sealing_key: expected ML-KEM-768"):
        accepts(agreed, replace(contract, participants=tuple(people)), "acme", NOW_MS)


def test_a_policy_file_reads_back_as_it_was(mine: Policy, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    expires = datetime(2027, 1, 31, tzinfo=UTC)
    whole = changed(
        mine,
        measurement=(*mine.measurement, changed(mine.measurement[0], label='an "odd"\nlabel\x7f', expires=expires)),
        root=(*mine.root, policy.Root(fingerprint="aws-nitro-enclaves-g1")),
        approvals=scenario.Approvals(quorum=1, approvers=("corvid",)),
        limits=policy.Limits(epochs=1, release=policy.Duration(90_000)),
    )
    for each in (mine, whole):
        path.write_text(policy.dump(each))
        assert policy.load(path) == each
    text = path.read_text()
    assert 'release = "90 s"' in text
    assert 'salary = { type = "int64", use = ["avg", "count"], clamp = [15000.0, 300000.0] }' in text


def test_a_relative_source_is_beside_the_policy(mine: Policy, tmp_path: Path) -> None:
    table = changed(mine.table["salaries"], source="mine.csv")
    (tmp_path / "policy.toml").write_text(policy.dump(changed(mine, table={"salaries": table})))
    assert policy.load(tmp_path / "policy.toml").table["salaries"].source == str(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ('PCR0 = "' + "01" * 48, 'PCR0 = "' + "00" * 48, r"policy.toml: measurement\[0\]: .*PCR0"),
        ('PCR0 = "' + "01" * 48, 'PCR0 = "' + "01" * 47, r"measurement\[0\].PCR0: expected 96 hex digits"),
        ("PCR2 =", "PCR3 =", r"measurement\[0\].PCR2: is missing"),
        ("[[measurement]]", "[measurement]", r"measurement: expected tables, each under \[\[measurement\]\]"),
        ('scenario = "salaries"', "", r"root\[0\]: scenario: expected the contract's name for a simulated root"),
        ("simulated = true", "simulated = false", r"root\[0\]: scenario: expected"),
        ("[participant.acme]", "[participant.acne]", "participant.acme: expected this party's own keys"),
        ("k = 5", "k = 0", "policy.toml: party.acme.table.salaries: rule: k: expected at least 1"),
        ("[limits]", "[limit]", r"limit: unknown key \(did you mean limits\?\)"),
    ],
)
def test_a_policy_that_is_wrong_says_where(mine: Policy, tmp_path: Path, right: str, wrong: str, says: str) -> None:
    text = policy.dump(mine)
    assert text.count(right) == 1
    (tmp_path / "policy.toml").write_text(text.replace(right, wrong))
    with pytest.raises(LocalError, match=says):
        policy.load(tmp_path / "policy.toml")


def test_an_empty_policy_is_none(mine: Policy) -> None:
    for empty in ({"measurement": ()}, {"root": ()}):
        with pytest.raises(LocalError, match="an empty policy would accept anything"):
            changed(mine, **empty).__post_init__()


def table(contract: Contract, **changes: Any) -> Contract:
    return replace(contract, tables=(replace(contract.tables[0], **changes), *contract.tables[1:]))


def column(contract: Contract, index: int, **changes: Any) -> Contract:
    columns = list(contract.tables[0].columns)
    columns[index] = replace(columns[index], **changes)
    return table(contract, columns=tuple(columns))


def query(contract: Contract, text: str) -> Contract:
    return replace(contract, program=Program("sql", text))


def enclave(contract: Contract, **changes: Any) -> Contract:
    return replace(contract, enclave=replace(contract.enclave, **changes))


def person(contract: Contract, index: int, **changes: Any) -> Contract:
    people = list(contract.participants)
    people[index] = replace(people[index], **changes)
    return replace(contract, participants=tuple(people))


MORE: list[tuple[Callable[[Contract], Contract], str]] = [
    (lambda c: table(c, rule=replace(c.tables[0].rule, k=4)), "tables.salaries.rule.k: expected 5, got 4"),
    (lambda c: table(c, rule=Rule("exact")), "tables.salaries.rule.kind: expected aggregate, got exact"),
    (lambda c: table(c, rule=replace(c.tables[0].rule, entity=())), "tables.salaries.rule.entity: expected"),
    (lambda c: table(c, bytes_max=1 << 30), "tables.salaries.bytes_max: expected 1048576, got 1073741824"),
    (lambda c: column(c, 3, use=("avg", "count", "group")), "tables.salaries.columns.salary.use: expected"),
    (lambda c: column(c, 3, clamp=()), "tables.salaries.columns.salary.clamp: expected"),
    (lambda c: column(c, 0, use=("join",)), "tables.salaries.columns.employee.use: expected"),
    (lambda c: replace(c, tables=(replace(c.tables[0], name="pensions"), *c.tables)), "tables: .* got pensions"),
    (lambda c: replace(c, tables=c.tables[1:]), "tables: expected a table of acme, got none"),
    (lambda c: person(c, 0, key=b"\x77" * 32), "participants.acme.key: expected"),
    (lambda c: person(c, 2, key=b"\x77" * 32), "participants.corvid.key: expected"),
    (lambda c: person(c, 2, sealing_key=b"\x77" * SEALING_KEY_BYTES), "participants.corvid.sealing_key"),
    (lambda c: replace(c, participants=(*c.participants, STRANGER)), "participants: .* got stranger"),
    (lambda c: replace(c, program=Program("wasm", "x")), "program.kind: expected sql, got wasm"),
    (lambda c: query(c, "SELECT employee, salary FROM salaries"), "contract: program: "),
    (lambda c: query(c, "SELECT sum(salary) FROM salaries GROUP BY level"), "contract: program: "),
    (
        lambda c: replace(c, approvals=Approvals(0, ("corvid",))),
        "approvals.approvers: expected only nobody, got corvid",
    ),
    (lambda c: replace(c, epochs_max=4), "epochs_max: expected at most 3, got 4"),
    (lambda c: enclave(c, simulated=False), "enclave.root: expected .*simulated, for salaries.*, got a root"),
    (lambda c: enclave(c, root=b"\x77" * 32), "enclave.root: expected .*, got a SIMULATED root"),
    (lambda c: replace(c, name="other"), "enclave.root: expected .*simulated, for salaries.* of other"),
    (lambda c: enclave(c, measurements=(OTHER,)), "enclave.measurements.other: expected sql: PCR0 0101"),
    (lambda c: enclave(c, measurements=(IMAGE, OTHER)), "enclave.measurements.other: expected sql: PCR0 0101"),
    (lambda c: enclave(c, measurements=(replace(IMAGE, pcr1=b"\7" * 48),)), "expected .*PCR1 02.*, got .*PCR1 07"),
]


@pytest.mark.parametrize(("ask", "says"), MORE)
def test_a_contract_may_not_ask_for_more(
    mine: Policy, contract: Contract, ask: Callable[[Contract], Contract], says: str
) -> None:
    with pytest.raises(PolicyError, match=says):
        accepts(mine, ask(contract), "acme", NOW_MS)


@pytest.mark.parametrize(
    ("narrower", "says"),
    [
        (lambda p: changed(p, recipients=scenario.Recipients(result=("acme",))), "recipients: expected only acme"),
        (
            lambda p: changed(p, recipients=scenario.Recipients(result=p.recipients.result, receipt=("acme",))),
            "receipt_recipients: expected only acme, got brightside | corvid",
        ),
        (lambda p: changed(p, approvals=scenario.Approvals(quorum=1, approvers=("acme",))), "approvals.quorum"),
        (
            lambda p: changed(p, limits=policy.Limits(release=policy.Duration(60_000))),
            "at most 1 min from now, got 30 min",
        ),
        (lambda p: changed(p, party="corvid"), "party: expected corvid, got acme"),
        (
            lambda p: changed(p, measurement=(changed(p.measurement[0], expires=datetime.fromtimestamp(9, UTC)),)),
            "enclave.measurements.sql: expected a measurement that has not expired",
        ),
        (lambda p: changed(p, table={}), "tables: expected none, got salaries"),
    ],
)
def test_a_narrower_policy_refuses(
    mine: Policy, contract: Contract, narrower: Callable[[Policy], Policy], says: str
) -> None:
    with pytest.raises(PolicyError, match=says):
        accepts(narrower(mine), contract, "acme", NOW_MS)


def test_times(mine: Policy, contract: Contract) -> None:
    with pytest.raises(PolicyError, match="a time to come, got one that has passed"):
        accepts(mine, contract, "acme", contract.deadlines.release_ms)
    with pytest.raises(PolicyError, match="at most 30 min from now"):
        accepts(mine, contract, "acme", NOW_MS - policy.CLOCK_SLACK_MS - 1)


def test_an_exact_rule_accepts_its_own_text_only(mine: Policy, contract: Contract) -> None:
    own = changed(mine.table["salaries"], rule=scenario.Rule(kind="exact"))
    exact = changed(mine, table={"salaries": own})
    tables = tuple(replace(each, rule=Rule("exact")) for each in contract.tables)
    read = replace(contract, tables=tables)
    accepts(exact, read, "acme", NOW_MS)
    with pytest.raises(PolicyError, match=r"program.text: expected a text that the policy lists word for word"):
        accepts(exact, query(read, "SELECT * FROM salaries"), "acme", NOW_MS)


def document(root: SimulatedRoot, contract: Contract, image: Measurement = IMAGE, **fields: bytes) -> bytes:
    pcrs = {0: image.pcr0, 1: image.pcr1, 2: image.pcr2}
    entropy = random.Random(2).randbytes
    nsm = Nsm(SimulatedNsm(root, pcrs, clock_ms=lambda: NOW_MS, entropy=entropy).handle)
    nsm.extend_pcr(CONTRACT_PCR, contract.digest)
    nsm.lock_pcr(CONTRACT_PCR)
    return nsm.attest(**{"user_data": b"binding", "nonce": b"n" * 48, "public_key": b"k" * 32} | fields)


def test_a_document_for_this_contract_is_appraised(mine: Policy, contract: Contract, root: SimulatedRoot) -> None:
    told = {"nonce": b"n" * 48, "user_data": b"binding", "public_key": b"k" * 32}
    for at in (NOW_MS, None):
        appraise(mine, document(root, contract), **told, contract=contract, at=at)
    other = replace(contract, random=b"\1" * 32)
    stranger = SimulatedRoot.create(entropy=random.Random(3).randbytes, now_ms=NOW_MS)
    for wrong in (
        document(root, other),  # its PCR16 names another contract
        document(root, contract, image=OTHER),
        document(stranger, contract),
        document(root, contract, nonce=b"m" * 48),
        document(root, contract, user_data=b"another"),
        document(root, contract, public_key=b"l" * 32),
    ):
        with pytest.raises(AppraisalError):
            appraise(mine, wrong, **told, contract=contract, at=NOW_MS)
    with pytest.raises(AppraisalError, match="root"):
        appraise(mine, document(root, contract), **told, contract=replace(contract, name="other"), at=NOW_MS)
    day_ms = timedelta(days=1) // timedelta(milliseconds=1)
    with pytest.raises(AppraisalError):
        appraise(mine, document(root, contract), **told, contract=contract, at=NOW_MS + day_ms)
