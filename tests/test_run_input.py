"""`mpc run` on bad input: one line that names the file, the place and the remedy, and nothing was sent."""

import json
import re
import subprocess
import sys
import zlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from runs import House, Plays, Run, Staff, staff

from mpc.image import cpio, eif
from mpc.protocol.messages import Attestation
from mpc.protocol.signing import open_signed

plays = Plays()
STAFF: dict[str, Staff] = {}


@pytest.fixture(scope="module", autouse=True)
def _scenarios(tmp_path_factory: pytest.TempPathFactory) -> None:
    STAFF["small"] = staff(tmp_path_factory.mktemp("staff") / "small")


# Seen before anything starts.

TEXT = "scenario.toml"
BEFORE: dict[str, tuple[tuple[str, str], str]] = {
    "broken TOML": (('"id"', '"id'), r"scenario\.toml, line 19, column \d+: "),
    "unknown key": (("title", "titel"), r"scenario\.toml: scenario\.titel: unknown key \(did you mean title\?\)"),
    "missing key": (('[program]\nkind = "sql"', "[program]"), r"scenario\.toml: program\.kind: is missing"),
    "a party twice": (
        ("party.cora", "party.bert"),
        r"scenario\.toml, line \d+, .*party\.bert.* stands here a second time",
    ),
    "no such type": (
        ('"int64"', '"int"'),
        r"scenario\.toml: party\.ada\.table\.staff\.columns\.pay\.type: expected .*int64",
    ),
    "no such entity": (
        ('"id"', '"employee"'),
        r"scenario\.toml: party\.ada\.table\.staff\.rule\.entity: employee is not one",
    ),
    "unknown recipient": (
        ('["ada", "bert"]', '["adam"]'),
        r"scenario\.toml: recipients\.result: adam .*did you mean ada",
    ),
    "no file": (("cora.csv", "none.csv"), r"party\.cora\.table\.staff\.source: .*none\.csv: no such file"),
    "no package": (
        ("cora.csv", "package:nothing/x.csv"),
        r"party\.cora\.table\.staff\.source: .*nothing is not installed",
    ),
    "no source": (('source = "cora.csv"', 'source = ""'), r"party\.cora\.table\.staff\.source: is missing"),
    "name of a piece": (("cora", "coordinator"), r"party\.coordinator: .*another name"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_bad_input_is_refused_before_anything_starts(case: str, house: House, tmp_path: Path) -> None:
    """One line that names the file and the place, exit status 2, and not even a folder."""
    (old, new), expected = BEFORE[case]
    given = staff(tmp_path / "staff")
    assert old in given.text
    (given.folder / TEXT).write_text(given.text.replace(old, new))
    assert_unusable(house.mpc("run", given.folder, "--out", tmp_path / "run"), expected, tmp_path / "run")


def assert_unusable(done: Any, expected: str, folder: Path) -> None:
    assert done.status == 2, done
    assert re.fullmatch(f"mpc: .*{expected}.*\n", done.err), done.err
    assert not done.out
    assert not folder.exists()


def test_a_file_that_may_not_be_read(house: House, tmp_path: Path) -> None:
    """By a normal user, or by root without the privilege to read what it may not."""
    given = staff(tmp_path / "staff")
    given.file()
    (given.folder / "cora.csv").chmod(0)
    drop = "import ctypes; [ctypes.CDLL(None).prctl(24, number, 0, 0, 0) for number in (1, 2)]; "  # PR_CAPBSET_DROP
    again = "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'mpc.cli.main', *sys.argv[1:]])"
    line = [sys.executable, "-c", drop + again, "run", str(given.folder), "--out", str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, env=house.environment(tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(
        r"mpc: party\.cora\.table\.staff\.source: .*cora\.csv cannot be read; check its permissions\n", done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_json_of_bad_input_is_one_document(house: House, tmp_path: Path) -> None:
    done = house.mpc("run", tmp_path / "nowhere.toml", "--json")
    assert done.status == 2
    assert done.json["status"] == "error"
    assert "nowhere.toml: no such scenario" in done.json["reason"]


# Seen by the parties or the enclave's host.


@plays.each(
    empty=("", "cora.csv: is empty"),
    headless=("id,level,pay\ncora-1,level 1,3\n", "cora.csv: .*note"),
    rowless=("id,level,pay,note\n", "cora.csv: holds no rows"),
    wrong_type=(
        "id,level,pay,note\na,level 1,12,x\nb,level 1,twelve,x\n",
        r"cora.csv: row 2 \(line 3\), column pay.*int64",
    ),
    too_large=(
        "id,level,pay,note\n" + "a,level 1,12,xxxxxxxx\n" * 100_000,
        r"cora.csv: is too big: expected at most 1048576 bytes .*\(bytes_max\)",
    ),
)
def a_table_is_not_what_the_contract_says(house: House, content: str, expected: str) -> None:
    given = staff(house.new_folder() / "staff")
    (given.folder / "cora.csv").write_text(content)
    with house.run(given.file(bytes_max='"1 MiB"')) as run:
        assert_refused(run, expected, "cora: ")


@plays.each(
    no_sql=("SELEKT level FROM staff", r"program\.query 1:1: syntax error"),
    forbidden_use=("SELECT id, count(*) FROM staff GROUP BY id", r"program\.query 1:\d+: .*id"),
    unknown_column=("SELECT grade, count(*) FROM staff GROUP BY grade", r"program\.query 1:\d+: .*'grade'"),
    no_select=("DROP TABLE staff", r"program\.query: expected exactly one SELECT"),
    two=("SELECT level, count(*) FROM staff GROUP BY level; SELECT 1", r"program\.query: expected exactly one SELECT"),
)
def a_query_breaks_the_owners_rules(house: House, query: str, expected: str) -> None:
    given = staff(house.new_folder() / "staff")
    scenario = given.file(query=json.dumps(query))
    with house.run(scenario) as run:
        assert_refused(run, f"{re.escape(str(scenario))}: {expected}", "")


def assert_refused(run: Run, expected: str, who: str, step: int | None = None) -> None:
    """Exit status 1, one line, and nothing was sealed."""
    done = run.wait()
    assert done.status == 1, done
    assert not done.out
    (line,) = [line for line in done.err.splitlines() if line.startswith("mpc: ")]
    assert re.fullmatch(f"mpc: refused: {who}.*{expected}.* No data was sent\\.", line), line
    assert not run.sealed()
    assert not list(run.folder.glob("*/re*"))


@plays
def an_image_with_one_byte_changed(house: House) -> None:
    """As it is, it does not start; with its checksum mended it starts, and no party seals to it."""
    path, changed = house.new_folder() / "changed.eif", house.new_folder() / "mended.eif"
    house.image(path)
    content = bytearray(path.read_bytes())
    content[_docstring(path)] ^= 1
    path.write_bytes(content)
    with house.run(STAFF["small"].file(), "--image", str(path)) as run:
        done = run.wait()
        assert done.status == 2
        assert re.fullmatch(r"mpc: .*changed\.eif: CRC: expected [0-9a-f]{8}.*", done.err.splitlines()[-1])
        assert not run.folder.exists()
    place = eif.HEADER.size - 4
    content[place : place + 4] = zlib.crc32(content[:place] + content[place + 4 :]).to_bytes(4, "big")
    changed.write_bytes(content)
    path.unlink()
    with house.run(STAFF["small"].file(), "--image", str(changed)) as run:
        assert_refused(run, r"the enclave is not the one that was agreed on: .*PCR0.*\(step \d+\)", "(ada|bert|cora): ")
    changed.unlink()


def _docstring(path: Path) -> int:
    """The place of a byte in the image that no code depends on."""
    with eif.opened(path) as image:
        section = image.of(eif.Kind.RAMDISK)[1]
        for entry in cpio.entries(image.reader(section), section.size):
            if entry.name.endswith("app/mpc/__init__.py"):
                return section.offset + entry.offset + 5
    raise AssertionError


OTHER_PCRS = """
import msgspec
from parties import policy
def from_scenario(given, name, *, made=policy.from_scenario, **more):
    policy = made(given, name, **more)
    if name != "bert":
        return policy
    (image,) = policy.measurement
    other = msgspec.structs.replace(image, pcr0="ab" * 48)
    return msgspec.structs.replace(policy, measurement=(other,))
policy.from_scenario = from_scenario
"""


@plays
def a_policy_that_names_another_image(house: House) -> None:
    with house.run(STAFF["small"].file(), plant=OTHER_PCRS) as run:
        assert_refused(
            run, "contract: enclave.measurements.*: expected .*PCR0 abab.*, got PCR0 [0-9a-f]{16}….*", "bert: "
        )


REPLAYED = """
from dataclasses import replace
from mpc.host.serve import Host
from mpc.protocol.messages import Attestation, sign
from mpc.protocol.signing import SigningKey, open_signed
async def tell(self, request, *more, told=Host._tell):
    if request.get("op") == "post" and open_signed(request["envelope"]).kind == "attestation":
        own = Attestation.decode(open_signed(request["envelope"]).payload)
        false = replace(own, document=bytes.fromhex({document!r}))
        request["envelope"] = sign(SigningKey(bytes(32)), false)
    await told(self, request, *more)
Host._tell = tell
"""


@plays
def a_document_of_an_earlier_run(house: House) -> None:
    """The host has a key of its own, and shows a genuine document that another session's enclave was given."""
    with house.run(STAFF["small"].file()) as run:
        assert run.wait().status == 0
    said = [open_signed(envelope) for envelope in run.receipt("ada").receipt.history]
    document = next(Attestation.decode(one.payload).document for one in said if one.kind == "attestation")
    with house.run(STAFF["small"].file(), "--json", plant=REPLAYED.format(document=document.hex())) as run:
        done = run.wait()
    assert (done.status, done.json["status"]) == (1, "refused")
    assert isinstance(done.json["step"], int)
    assert re.search(r"the enclave is not the one that was agreed on: .*\(step \d+\)", done.json["reason"])
    assert not run.sealed()


@pytest.mark.parametrize("play", plays.found)
def test_input(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()
