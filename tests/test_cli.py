"""The command line as a person and a script meet it: words, exit status, one JSON document, and never a traceback."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from receipt_maker import KEYS, NOW_MS, PCRS, Machine, Story, contract, participants, root

from mpc import scenario as scenarios
from mpc.attestation import AWS_NITRO_ROOT_G1, unverified_document
from mpc.cli import main as command_line
from mpc.cli.accepted import read_time
from mpc.cli.main import COMMANDS, execute
from mpc.image import build, standin
from mpc.protocol.errors import AppraisalError, LocalError
from mpc.protocol.messages import Abort, sign
from mpc.protocol.signing import ENVELOPE_BYTES_MAX
from parties import policy as policies

REAL = Path(__file__).parents[2] / "shared" / "vectors" / "attestation"
NONCE, USER_DATA = bytes(range(32)), b"what it is for"


class Run:
    """One command line: exit status and what was printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)  # one document, or it raises


Mpc = Callable[..., Run]


@pytest.fixture
def mpc(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mpc:
    """Run a command line in a new folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("MPC_DEBUG", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Run:
        status = execute([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        return Run(status, out, err)

    return run


@pytest.fixture
def receipt(tmp_path: Path) -> Path:
    file = tmp_path / "receipt.cbor"
    file.write_bytes(Story().release())
    return file


def document(**machine: Any) -> bytes:
    return Machine(None, **machine).attest(NONCE, USER_DATA, b"key", NOW_MS)


@pytest.fixture
def attested(tmp_path: Path) -> Path:
    file = tmp_path / "document.bin"
    file.write_bytes(document())
    return file


def given(pcrs: dict[int, bytes] = PCRS) -> list[str]:
    return [part for index, pcr in pcrs.items() for part in ("--pcr", f"{index}={pcr.hex()}")]


ACCEPTED = [*given(), "--root", root().fingerprint.hex(), "--at", str(NOW_MS)]
SALARIES = scenarios.find(Path("salaries")).read_text()


def scenario(folder: Path, old: str = "", new: str = "") -> Path:
    """The salaries, with something in it replaced."""
    assert old in SALARIES
    folder.mkdir(exist_ok=True)
    (folder / "scenario.toml").write_text(SALARIES.replace(old, new))
    return folder


# The group.


def test_help_names_every_command_and_each_has_examples(mpc: Mpc) -> None:
    said = mpc("--help")
    assert said.status == 0
    for name in COMMANDS:
        assert f"  {name} " in said.out
        helped = mpc(name, "build", "--help") if name == "image" else mpc(name, "--help")
        assert helped.status == 0
        assert "Examples:" in helped.out
        assert max(map(len, helped.out.splitlines())) <= 100


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mpc.cli.main import execute; execute(['--help']);"
        "print(sorted({'trio', 'pyarrow', 'duckdb', 'rich', 'cryptography', 'cbor2', 'msgspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(mpc: Mpc) -> None:
    assert mpc("--version").out.startswith("enclave-mpc ")


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["verify"], ["verify", "a", "b"], ["check", "--what"], ["measure", "x.eif"], ["init", "salarys"], []],
)
def test_misuse_is_one_line_on_standard_error(mpc: Mpc, arguments: list[str]) -> None:
    said = mpc(*arguments)
    if arguments:
        assert (said.status, said.out) == (2, "")
        assert re.fullmatch(r"mpc: .+\n", said.err)
    else:
        assert (said.status, said.err.startswith("Usage: mpc ")) == (2, True)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (LocalError("a file: wrong", expected="another"), 2, "mpc: a file: wrong: expected another\n"),
        (
            AppraisalError("PCR0", step=23, expected="a", got="b"),
            1,
            "mpc: refused: PCR0: expected a, got b (step 23)\n",
        ),
        (ExceptionGroup("tasks", [ValueError("secret"), LocalError("no disk")]), 2, "mpc: no disk\n"),
        (FileNotFoundError(2, "No such file", "data.csv"), 2, "mpc: data.csv: No such file\n"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("tasks", [KeyboardInterrupt()]), 130, ""),
        (SystemExit(1), 1, ""),
        (LocalError("a \x1b[31mcolour\u202e"), 2, "mpc: a \\x1b[31mcolour\\u202e\n"),
    ],
)
def test_errors_become_a_line_and_a_status(
    mpc: Mpc, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, words: str
) -> None:
    _fail_with(monkeypatch, error)
    said = mpc("fail")
    assert (said.status, said.err.lstrip(), said.out) == (status, words, "")


def test_a_bug_shows_its_place_and_neither_traceback_nor_data(mpc: Mpc, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, ValueError("row 7 of the payroll"))
    said = mpc("fail")
    assert said.status == 2
    assert "ValueError in test_cli.py" in said.err
    assert "payroll" not in said.err


def test_the_debug_variable_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _fail_with(monkeypatch, ValueError("why"))
    monkeypatch.setenv("MPC_DEBUG", "1")
    assert execute(["fail"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_errors_are_one_json_document_too(mpc: Mpc, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, AppraisalError("PCR0", step=23))
    assert mpc("fail", "--json").json == {"status": "refused", "reason": "PCR0 (step 23)", "step": 23, "peer": None}
    assert mpc("verify", "--json", "nothing").json["status"] == "error"
    assert mpc("verify", "--json").json["status"] == "error"


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A command `fail` that raises it."""
    import click

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def fail(as_json: bool) -> None:
        raise error

    monkeypatch.setitem(command_line.COMMANDS, "fail", (f"{__name__}:_failing", "fails"))
    monkeypatch.setattr(sys.modules[__name__], "_failing", fail, raising=False)


def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], receipt: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    execute(["verify", str(receipt)])
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", capfd.readouterr().out)
    monkeypatch.setenv("NO_COLOR", "1")
    execute(["verify", str(receipt)])
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", capfd.readouterr().out)


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m mpc.cli.main check salaries | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


# mpc check, mpc init


def test_check_says_what_would_leave_to_whom_under_which_rules(mpc: Mpc) -> None:
    said = mpc("check", "salaries")
    assert said.status == 0
    for words in ("accepted", "SIMULATED", "mean_salary", "at least 5", "draft", "acme", "Mind"):
        assert words in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    told = mpc("check", "salaries", "--json").json
    assert told["status"] == "accepted"
    assert [column["name"] for column in told["columns"]] == ["level", "gender", "mean_salary", "employees"]
    assert told["recipients"] == ["acme", "brightside", "corvid", "dunmore", "eastgate"]
    assert {(owner["owner"], owner["k"], owner["receives_result"]) for owner in told["owners"]} >= {("acme", 5, True)}
    assert told["warnings"]
    assert re.fullmatch("[0-9a-f]{96}", told["draft_digest"])


def test_check_refuses_a_query_against_a_rule(mpc: Mpc, tmp_path: Path) -> None:
    folder = scenario(tmp_path / "mine", "SELECT level, gender, avg(salary)", "SELECT level, gender, max(salary)")
    said = mpc("check", folder)
    assert said.status == 1
    assert str(folder) in said.err
    assert mpc("check", folder, "--json").json["status"] == "refused"


def test_check_names_the_place_in_a_broken_file(mpc: Mpc, tmp_path: Path) -> None:
    said = mpc("check", scenario(tmp_path / "a", "[program]", "[program"))
    assert said.status == 2
    assert re.search(r"scenario\.toml, line \d+", said.err)
    said = mpc("check", scenario(tmp_path / "b", 'kind = "aggregate"', 'kind = "agregate"'))
    assert said.status == 2
    assert "party.acme.table.salaries.rule.kind" in said.err


def test_check_warns_of_files_that_a_run_would_not_find(mpc: Mpc, tmp_path: Path) -> None:
    warnings = mpc("check", scenario(tmp_path / "alone"), "--json").json["warnings"]
    assert any("party.acme.table.salaries.source" in warning and "no such file" in warning for warning in warnings)


def test_check_says_what_a_run_would_need_or_refuse(mpc: Mpc, tmp_path: Path) -> None:
    folder = scenario(tmp_path / "mine", "[scenario]", '[enclave]\nbackend = "nitro"\n\n[scenario]')
    with (folder / "scenario.toml").open("a") as file:
        file.write('\n[approvals]\nquorum = 1\napprovers = ["acme"]\n')
    warnings = "\n".join(mpc("check", folder, "--json").json["warnings"])
    assert "approving comes with a command `mpc approve`" in warnings
    assert "--image" in warnings
    assert "docs/NITRO.md" in warnings
    assert not any("nitro" in warning for warning in mpc("check", "salaries", "--json").json["warnings"])


def test_init_copies_a_scenario_that_can_be_checked(mpc: Mpc, tmp_path: Path) -> None:
    assert "salaries" in mpc("init", "--list").out
    assert mpc("init", "salaries", "mine").status == 0
    assert mpc("check", tmp_path / "mine").status == 0
    assert mpc("init", "salaries", "mine").status == 2  # nothing is overwritten
    assert mpc("init").status == 2
    assert "did you mean salaries" in mpc("init", "salarie").err


# mpc verify


def test_verify_tells_what_a_receipt_proves_and_what_not(mpc: Mpc, receipt: Path) -> None:
    said = mpc("verify", receipt)
    assert said.status == 0
    for words in ("accepted", "SIMULATED", "This proves", "It does not prove", "signers agreed to", "FROM wages"):
        assert words in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    told = mpc("verify", receipt, "--json").json
    assert (told["status"], told["kind"], told["simulated"]) == ("accepted", "receipt", True)
    assert told["contract"] == contract().digest.hex()
    assert told["pcrs"]["0"] == PCRS[0].hex()
    assert mpc("verify", "--quiet", receipt).out.splitlines() == ["accepted  receipt of wages"]


def test_verify_refuses_a_receipt_with_the_step(mpc: Mpc, receipt: Path) -> None:
    receipt.write_bytes(Story(second_ms=NOW_MS + 10**7).release())
    said = mpc("verify", receipt)
    assert (said.status, said.out) == (1, "")
    assert "refused: " in said.err
    assert "R9" in said.err
    assert mpc("verify", receipt, "--json").json["step"] == "R9"
    receipt.write_bytes(sign(KEYS["author"], contract()))
    said = mpc("verify", receipt)
    assert said.status == 1
    assert "expected a signed release, got 'contract' (step R1)" in said.err


def test_verify_narrows_a_receipt_by_what_its_reader_accepts(mpc: Mpc, receipt: Path) -> None:
    by_root = ["--root", root().fingerprint.hex()]
    assert mpc("verify", receipt, *given(), *by_root).status == 0
    assert mpc("verify", receipt, *given()).status == 1  # under AWS's root it is not
    assert mpc("verify", receipt, *given({**PCRS, 1: bytes(range(48))}), *by_root, "--json").json["step"] == "R5"
    assert mpc("verify", receipt, *by_root).status == 2  # a root alone says nothing about code
    assert mpc("verify", receipt, "--nonce", "00").status == 2
    assert mpc("verify", receipt, "--at", "2026-01-01").status == 2


def test_verify_reads_both_kinds_of_policy(mpc: Mpc, receipt: Path, attested: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    rows = "".join(f'PCR{index} = "{pcr.hex()}"\n' for index, pcr in PCRS.items())
    plain.write_text(f'roots = ["{root().fingerprint.hex()}"]\n[[measurement]]\nlabel = "agreed by us"\n{rows}')
    assert mpc("verify", receipt, "--policy", plain, "--json").json["measurement"] == "agreed by us"
    assert mpc("verify", attested, "--policy", plain, "--at", NOW_MS).status == 0
    assert (
        mpc("verify", attested, "--policy", plain, "--at", NOW_MS, "--pcr", f"16={'ab' * 48}", "--json").json["step"]
        == 23
    )
    assert mpc("verify", attested, "--policy", plain, "--at", NOW_MS, "--pcr", f"0={'ab' * 48}").status == 1
    assert mpc("verify", receipt, "--policy", plain, "--root", "00" * 32).status == 2
    plain.write_text("measurement = 1")
    assert "plain.toml" in mpc("verify", receipt, "--policy", plain).err
    plain.write_text("measurement = ")
    assert mpc("verify", receipt, "--policy", plain).status == 2


def test_verify_reads_a_partys_own_policy(mpc: Mpc, receipt: Path, attested: Path, tmp_path: Path) -> None:
    text = SALARIES.replace('name = "salaries"', 'name = "wages"')
    (tmp_path / "scenario.toml").write_text(text)
    asked = scenarios.load(tmp_path)
    own = policies.from_scenario(
        asked,
        "acme",
        participants=[type(participants()[0])("acme", bytes(32), bytes(1216))],
        measurements=contract().enclave.measurements,
        root=root().fingerprint,
        simulated=True,
    )
    file = tmp_path / "policy.toml"
    file.write_text(policies.dump(own))
    assert mpc("verify", receipt, "--policy", file).status == 0
    assert mpc("verify", attested, "--policy", file, "--at", NOW_MS).status == 1  # simulated, for one contract only
    attested.write_bytes(Machine(contract().digest).attest(NONCE, USER_DATA, b"key", NOW_MS))
    (tmp_path / "contract.cbor").write_bytes(sign(KEYS["author"], contract()))
    bound = ["--policy", file, "--at", NOW_MS, "--contract", tmp_path / "contract.cbor"]
    assert mpc("verify", attested, *bound).status == 0
    file.write_text(policies.dump(own).replace('"wages"', '"another"'))
    assert "wages" in mpc("verify", receipt, "--policy", file).err
    receipt.write_bytes(receipt.read_bytes()[:-1])
    assert mpc("verify", receipt, "--policy", file, "--json").json["step"] == "R1"  # and no word of the policy


def test_verify_compares_with_a_contract(mpc: Mpc, receipt: Path, tmp_path: Path) -> None:
    agreed, other = tmp_path / "contract.cbor", tmp_path / "other.cbor"
    agreed.write_bytes(sign(KEYS["author"], contract()))
    other.write_bytes(sign(KEYS["author"], contract(title="another")))
    assert mpc("verify", receipt, "--contract", agreed).status == 0
    said = mpc("verify", receipt, "--contract", other, "--json")
    assert (said.status, said.json["step"]) == (1, "R2")
    assert contract().digest.hex() in said.err

    bound = tmp_path / "bound.bin"
    bound.write_bytes(Machine(contract().digest).attest(NONCE, USER_DATA, b"key", NOW_MS))
    said = mpc("verify", bound, *ACCEPTED, "--contract", agreed)
    assert said.status == 0
    assert "this contract (wages) and for no other" in said.out
    assert mpc("verify", bound, *ACCEPTED, "--contract", agreed, "--json").json["contract"] == contract().digest.hex()
    assert mpc("verify", bound, *ACCEPTED, "--json").json["contract"] is None
    said = mpc("verify", bound, *ACCEPTED, "--contract", other, "--json")
    assert (said.status, said.json["step"]) == (1, 27)
    bound.write_bytes(document())  # PCR16 was never extended
    assert mpc("verify", bound, *ACCEPTED, "--contract", agreed, "--json").json["step"] == 27
    assert mpc("verify", bound, "--contract", agreed).status == 2  # a contract is its author's word, not yours


def test_a_contract_narrows_what_is_accepted(mpc: Mpc, tmp_path: Path) -> None:
    enclave = contract().enclave
    theirs = replace(enclave, measurements=(replace(enclave.measurements[0], pcr2=b"\x22" * 48),))
    for changed, words in (
        (contract(enclave=theirs), "no measurement of the contract"),
        (contract(enclave=replace(enclave, root=bytes(32))), "the contract's attestation root"),
    ):
        (tmp_path / "contract.cbor").write_bytes(sign(KEYS["author"], changed))
        (tmp_path / "document").write_bytes(Machine(changed.digest).attest(NONCE, USER_DATA, b"key", NOW_MS))
        said = mpc("verify", tmp_path / "document", *ACCEPTED, "--contract", tmp_path / "contract.cbor")
        assert said.status == 1
        assert words in said.err


@pytest.mark.parametrize("by", ["north", "stranger"])
def test_a_contract_is_signed_by_its_author(mpc: Mpc, attested: Path, tmp_path: Path, by: str) -> None:
    (tmp_path / "contract.cbor").write_bytes(sign(KEYS[by], contract()))
    said = mpc("verify", attested, *ACCEPTED, "--contract", tmp_path / "contract.cbor")
    assert said.status == 2
    assert "contract.cbor: cannot be used as a contract: " in said.err


def test_verify_accepts_a_document_and_says_how_far(mpc: Mpc, attested: Path) -> None:
    said = mpc("verify", attested, *ACCEPTED)
    assert said.status == 0
    for words in ("accepted", "SIMULATED", "Freshness was not checked", "user_data", USER_DATA.hex()):
        assert words in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    fresh = mpc("verify", attested, *ACCEPTED, "--nonce", NONCE.hex(), "--json").json
    assert fresh["fresh"]
    assert "nonce" not in fresh["unchecked"]
    assert mpc("verify", attested, *ACCEPTED, "--nonce", "00" * 32, "--json").json["step"] == 24


def test_verify_refuses_documents_by_step(mpc: Mpc, attested: Path) -> None:
    assert mpc("verify", attested, *given(), "--at", NOW_MS, "--json").json["step"] == 14  # not AWS's root
    assert mpc("verify", attested, *ACCEPTED[:-2], "--at", NOW_MS + 10**6, "--json").json["step"] == 13
    assert mpc("verify", attested, *ACCEPTED[:-2], "--json").json["step"] == 13  # made in another year
    assert mpc("verify", attested, *ACCEPTED, "--pcr", f"16={'00' * 48}", "--json").json["step"] == 23
    attested.write_bytes(document()[:-1])
    assert mpc("verify", attested, *ACCEPTED, "--json").json["step"] == 2
    attested.write_bytes(document(debug=True))
    for pcrs in (PCRS, dict.fromkeys(PCRS, bytes(48))):  # debug mode is refused even when it is asked for
        said = mpc("verify", attested, *given(pcrs), *ACCEPTED[6:], "--json")
        assert (said.status, said.json["step"]) == (1, 22)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--pcr", "0=00"],
        ["--pcr", f"32={'00' * 48}"],
        ["--pcr", f"x={'00' * 48}"],
        ["--pcr", f"0={'00' * 48}"],
        given()[:4],
        [*given(), *given()[:2]],
        [*given(), "--root", "zz"],
        [*given(), "--root", "8cf60e2b2efca96c6a9e71e851d00c1b6991cc09eadbe64a6a1d1b1eb9faff7c"],
        [*given(), "--nonce", "0"],
        [*given(), "--at", "yesterday"],
        [*given(), "--at", "0"],
        [*given(), "--at", "9999-12-31T23:59:59-23:59"],
        [*given(), "--policy", "missing.toml"],
        [],
    ],
)
def test_verify_needs_to_know_what_is_accepted(mpc: Mpc, attested: Path, wrong: list[str]) -> None:
    said = mpc("verify", attested, *wrong)
    assert (said.status, said.out) == (2, "")
    assert "--at" not in wrong or "--at: expected ISO 8601" in said.err


def test_a_root_may_be_a_pem_file(mpc: Mpc, attested: Path, tmp_path: Path) -> None:
    pem = tmp_path / "root.pem"
    pem.write_bytes(x509.load_der_x509_certificate(root().certificate).public_bytes(Encoding.PEM))
    assert mpc("verify", attested, *given(), "--root", pem, "--at", NOW_MS).status == 0
    for name in ("aws-nitro-enclaves-g1", AWS_NITRO_ROOT_G1.hex()):  # a file of that name is not that root
        (tmp_path / name).write_bytes(pem.read_bytes())
        assert mpc("verify", attested, *given(), "--root", name, "--at", NOW_MS, "--json").json["step"] == 14
    assert "64 hex digits" in mpc("verify", attested, *given(), "--root", "a" * 5000).err
    pem.write_text("nothing")
    assert "root.pem" in mpc("verify", attested, *given(), "--root", pem, "--at", NOW_MS).err


def test_times_are_iso_or_unix() -> None:
    for text in ("2026-09-21T14:13:20Z", "2026-09-21T16:13:20+02:00", "2026-09-21 14:13:20", "1790000000", str(NOW_MS)):
        assert read_time(text) == NOW_MS
    assert read_time("2026-09-21") == datetime(2026, 9, 21, tzinfo=UTC).timestamp() * 1000


@pytest.mark.skipif(not REAL.is_dir(), reason="the 44 real documents and variants are not here, and were not checked")
def test_real_documents_get_their_verdicts(mpc: Mpc) -> None:
    known = {entry["file"]: entry for entry in json.loads((REAL / "index.json").read_text()) if "verifies" in entry}
    accepted = 0
    for file in sorted(REAL.glob("*.bin")):
        try:
            claims = unverified_document(file.read_bytes())
            at_ms, pcrs = claims.timestamp_ms, {index: claims.pcrs[index] for index in (0, 1, 2)}
        except (AppraisalError, KeyError):
            at_ms, pcrs = NOW_MS, dict.fromkeys((0, 1, 2), bytes(48))
        entry = known.get(file.name, {})
        good = (entry.get("verifies") and not entry["debug"]) or file.name == "derived_tag18_valid.bin"
        said = mpc("verify", file, "--at", at_ms, *given(pcrs))
        assert said.status == (0 if good else 1), (file.name, said.err)
        accepted += said.status == 0
    assert accepted >= 12


# mpc inspect


def test_inspect_decodes_and_says_that_it_verified_nothing(mpc: Mpc, receipt: Path, attested: Path) -> None:
    said = mpc("inspect", receipt)
    assert said.status == 0
    assert said.out.startswith("not verified")
    assert "FROM wages" in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    told = mpc("inspect", receipt, "--json").json
    assert told["verified"] is False
    assert [one["kind"] for one in told["says"]["receipt"]["history"]] == [
        *("contract", "attestation", "seal", "seal", "computed", "decision")
    ]
    assert told["says"]["receipt"]["history"][0]["digest"] == contract().digest.hex()
    assert told["says"]["receipt"]["history"][1]["says"]["document"]["says"]["timestamp_ms"] == NOW_MS + 10_000
    assert "not verified" in mpc("inspect", attested).out
    assert mpc("inspect", attested, "--json").json["says"]["user_data"] == USER_DATA.hex()


def test_inspect_shows_any_signed_message_even_a_forged_one(mpc: Mpc, tmp_path: Path) -> None:
    file = tmp_path / "message.cbor"
    forged = bytearray(sign(KEYS["north"], Abort(contract().digest, 1, "late", "south")))
    forged[-1] ^= 1
    file.write_bytes(forged)
    assert mpc("inspect", file, "--json").json["says"]["blamed"] == "south"


def test_a_strangers_text_cannot_steer_the_terminal(mpc: Mpc, tmp_path: Path) -> None:
    file = tmp_path / "contract.cbor"
    file.write_bytes(sign(KEYS["author"], contract(title="\x1b[2Jaccepted\u202e\r[red]")))
    assert "\\x1b[2Jaccepted\\u202e\\r[red]" in mpc("inspect", file).out


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\x84\x58",
        b"\x84\x58\x2f" + bytes(100),
        b"\x9f" * 4000,
        b"\x84\x58\x01\xa0\xa0" + b"\x9f" * 4000,
        b"\xbb\xff\xff\xff\xff\xff\xff\xff\xff",
        b"[scenario]\nname = 'x'\n",
        base64.b64encode(bytes(300)),
        b".eif" + bytes(600),
        KEYS["north"].sign("contract", b"\xa0"),
        KEYS["north"].sign("gossip", b"\xa0"),
        bytes(ENVELOPE_BYTES_MAX + 1),
    ],
    ids=range(13),
)
def test_other_files_are_refused_clearly(mpc: Mpc, tmp_path: Path, command: str, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    said = mpc(command, file, *(ACCEPTED if command == "verify" and content[:2] != b"\x84\x58" else []))
    assert said.status in ((2,) if command == "inspect" else (1, 2))
    assert said.out == ""
    assert "this is a bug" not in said.err


@pytest.mark.parametrize("command", ["inspect", "verify", "measure", "check"])
def test_what_is_no_file_is_refused(mpc: Mpc, tmp_path: Path, command: str) -> None:
    for path in (tmp_path / "missing", tmp_path):
        said = mpc(command, path)
        assert said.status == 2
        assert str(path) in said.err


# mpc measure, mpc image, mpc doctor


@pytest.fixture
def small_image(tmp_path: Path) -> Path:
    file = tmp_path / "small.eif"
    build.write_image({"hello.py": b"print('hello')\n"}, file, build.Boot.local(), title="small")
    return file


def test_measure_prints_what_nitro_cli_prints(mpc: Mpc, small_image: Path) -> None:
    pcrs = mpc("measure", small_image, "--json").json["Measurements"]
    assert pcrs["HashAlgorithm"] == "Sha384 { ... }"
    said = mpc("measure", small_image)
    assert said.status == 0
    for index in range(3):
        assert pcrs[f"PCR{index}"] in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    assert pcrs["PCR2"] in mpc("--quiet", "measure", small_image).out


def test_measure_compares_with_the_source_and_names_what_differs(mpc: Mpc, small_image: Path) -> None:
    said = mpc("measure", small_image, "--from-source", "--variant", "core")
    assert said.status == 1
    assert f"{standin.APPLICATION_FOLDER}/" in said.out
    assert mpc("measure", small_image, "--from-source", "--variant", "core", "--json").json["same"] is False


def test_an_image_is_what_the_source_measures(mpc: Mpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = mpc("image", "build", "--variant", "core", "-o", tmp_path / "core.eif", "--json").json
    source = mpc("measure", "--from-source", "--variant", "core", "--json").json["Measurements"]
    assert built["Measurements"] == {name: source[name] for name in ("PCR0", "PCR1", "PCR2")}
    assert mpc("measure", tmp_path / "core.eif", "--from-source", "--variant", "core").status == 0
    assert mpc("image", "build", "--variant", "none").status == 2
    content = bytearray((tmp_path / "core.eif").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "core.eif").write_bytes(content)
    assert mpc("measure", tmp_path / "core.eif").status == 2


def test_doctor_names_what_is_missing_and_the_line_that_mends_it(
    mpc: Mpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mpc("doctor", "--json").json
    assert {check["name"] for check in whole["checks"]} >= {
        "system",
        "Python",
        "libraries",
        "seccomp",
        "sandbox",
        "image",
    }
    monkeypatch.setenv("PATH", str(tmp_path))
    said = mpc("doctor")
    assert said.status == 1
    assert "apt install bubblewrap" in said.out
    assert mpc("doctor", "--json").json["status"] == "lacking"
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    said = mpc("doctor")
    assert said.status == 1
    assert "Permission denied" in said.out
    assert "sysctl" in said.out
