"""Files that are no documents, receipts, images, policies or contracts: refused in a sentence that names the file."""

import base64
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from receipt_maker import KEYS, NOW_MS, PCRS, Machine, Story, contract, root

from mpc.cli.main import execute
from mpc.image import build
from mpc.protocol.encoding import MESSAGE_BYTES_MAX
from mpc.protocol.messages import Abort, Attestation, sign
from mpc.protocol.signing import ENVELOPE_BYTES_MAX

HERE = Path(__file__).parent
PEAK_BYTES_MAX = 200 << 20
DEEP = 100_000
HUGE = 1 << 30
ACCEPTED = [
    *(part for index, pcr in PCRS.items() for part in ("--pcr", f"{index}={pcr.hex()}")),
    *("--root", root().fingerprint.hex(), "--at", str(NOW_MS)),
]
RECEIPT, DOCUMENT = Story().release(), Machine(None).attest(bytes(32), b"", b"key", NOW_MS)
SIGNED = b"\x84\x58\x2f"  # as a message of ours begins
POLICY = "".join(["[[measurement]]\n", 'label = "a"\n', *(f'PCR{i} = "{pcr.hex()}"\n' for i, pcr in PCRS.items())])


def attestation_within(depth: int, document: bytes = b"\x00") -> bytes:
    """Messages within messages: an attestation whose roster is an attestation, and so on, or until it is large."""
    envelope = sign(KEYS["north"], Abort(contract().digest, 1, "late", "south"))
    for _ in range(depth):
        outer = Attestation(contract().digest, 1, (envelope,), bytes(1216), document)
        envelope = sign(KEYS["enclave"], outer)
        if len(envelope) > MESSAGE_BYTES_MAX // 6:
            break
    return envelope


def many_items() -> bytes:
    """As many values as fit, each of which is much larger in memory than in the file."""
    items = (MESSAGE_BYTES_MAX - 16) // 3
    return b"\x84\x40\xa0\x9a" + items.to_bytes(4, "big") + b"\x82\xa0\xa0" * items + b"\x40"


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def contents(image: bytes) -> dict[str, bytes]:
    """What no command reads; the keys are for people."""
    return {
        "empty": b"",
        "one byte": b"\x00",
        "a truncated document": DOCUMENT[: len(DOCUMENT) // 2],
        "a truncated receipt": RECEIPT[: len(RECEIPT) // 2],
        "a truncated image": image[: len(image) // 2],
        "an image's header": image[:548],
        "a flipped image": flipped(image),
        "arrays, deep": b"\x81" * DEEP + b"\x00",
        "arrays, deep and open": b"\x9f" * DEEP,
        "maps, deep": b"\xa1\x00" * DEEP + b"\x00",
        "maps with maps as keys": b"\xa1" * DEEP + b"\x00" * (DEEP + 1),
        "tags, deep": b"\xc6" * DEEP + b"\x00",
        "arrays in what seems signed": SIGNED + b"\x81" * DEEP + b"\x00",
        "arrays in a signed payload": KEYS["north"].sign("contract", b"\x81" * DEEP + b"\x00"),
        "maps in a signed payload": KEYS["north"].sign("release", b"\xa1\x60" * DEEP + b"\x00"),
        "messages within messages": attestation_within(DEEP),
        "many items": many_items(),
        "many items that seem signed": SIGNED + many_items(),
        "a long array that is not there": b"\x9b" + b"\xff" * 8,
        "a long string that is not there": SIGNED[:1] + b"\x5b" + b"\xff" * 8,
        "msgpack arrays, deep": b"\x91" * DEEP + b"\x00",
        "msgpack maps, deep": b"\x81\xa0" * DEEP + b"\x00",
        "JSON, deep": b"[" * DEEP,
        "TOML, deep": b"a = " + b"[" * DEEP,
        "a key of many parts": b"a." * DEEP + b"a = 1",
        "a string without its end": b'a = """' + b'\\"' * DEEP,
        "another TOML": b"[scenario]\nname = 'x'\n",
        "Base64 of a document": base64.b64encode(DOCUMENT),
        "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "an ELF": b"\x7fELF" + bytes(200),
        "a ZIP": b"PK\x03\x04" + bytes(200),
        "line ends changed": RECEIPT.replace(b"\n", b"\r\n"),
        "the largest that is read, of zeros": bytes(ENVELOPE_BYTES_MAX),
        "the largest policy, of one word": b"a" * (1 << 20),
        "random": random.Random(4).randbytes(100_000),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Bad files; those that are no files; and, under `good/`, right ones for the other arguments."""
    folder = tmp_path_factory.mktemp("bad")
    good = folder / "good"
    good.mkdir()
    (good / "receipt").write_bytes(RECEIPT)
    (good / "document").write_bytes(DOCUMENT)
    build.write_image({"a.py": b"pass\n"}, good / "image", build.Boot.local(), title="small")
    for name, content in contents((good / "image").read_bytes()).items():
        (folder / name).write_bytes(content)
    for name, start in {"zeros": b"", "signed": SIGNED, "image": (good / "image").read_bytes()}.items():
        path = folder / f"huge {name}"
        path.write_bytes(start)
        os.truncate(path, HUGE)  # sparse
    (folder / "a folder").mkdir()
    os.mkfifo(folder / "a FIFO")
    (folder / "unreadable").write_bytes(DOCUMENT)
    (folder / "unreadable").chmod(0)
    (folder / "a link to nothing").symlink_to("nowhere")
    (folder / "a link to itself").symlink_to("a link to itself")
    (folder / "zeros without end").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        yield folder


def command_lines(folder: Path) -> list[list[str]]:
    """Each bad file in each place where a file can be named."""
    bad = [str(path) for path in sorted(folder.iterdir()) if path.name != "good"]
    if os.geteuid() == 0:  # who may read everything
        bad.remove(str(folder / "unreadable"))
    receipt, document = str(folder / "good" / "receipt"), str(folder / "good" / "document")
    lines = []
    for path in bad:
        lines += [["inspect", path], ["measure", path], ["verify", path, *(ACCEPTED[:8])], ["verify", path, *ACCEPTED]]
        lines += [["verify", receipt, "--policy", path], ["verify", document, "--policy", path, "--json"]]
        lines += [["verify", receipt, "--contract", path], ["verify", document, *ACCEPTED, "--contract", path]]
    return lines


@pytest.fixture(scope="module")
def played(folder: Path) -> list[dict[str, Any]]:
    lines = folder / "good" / "lines.json"
    lines.write_text(json.dumps(command_lines(folder)))
    done = subprocess.run([sys.executable, str(HERE / "bad_input.py"), str(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout)
    return told


def test_every_bad_file_is_refused_in_a_sentence_that_names_it(folder: Path, played: list[dict[str, Any]]) -> None:
    wrong = []
    for play in played:
        path = next(part for part in play["arguments"] if Path(part).parent == folder)
        refused = play["status"] in (1, 2) and len(play["err"].splitlines()) == 1 and path in play["err"]
        silent = play["out"] == "" or (json.loads(play["out"])["status"] in ("refused", "error"))
        if not (refused and silent and play["err"].startswith("mpc: ") and "this is a bug" not in play["err"]):
            wrong.append((play["arguments"], play["status"], play["out"][:200], play["err"][-300:]))
    assert not wrong, "\n".join(map(str, wrong[:10]))
    assert len(played) >= 8 * 40


def test_none_takes_much_memory(played: list[dict[str, Any]]) -> None:
    much = {" ".join(play["arguments"][:3]): play["peak_bytes"] for play in played}
    assert max(much.values()) < PEAK_BYTES_MAX, max(much, key=lambda line: much[line])
    assert min(much.values()) > 10 << 20  # it was measured


@pytest.mark.skipif(os.geteuid() != 0, reason="a normal user's own test is the one above")
def test_a_file_of_somebody_else(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "measure", "verify"):
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            os._exit(execute([command, str(folder / "unreadable")]))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert len(re.findall(r"unreadable: cannot be read \(Permission denied\)", capfd.readouterr().err)) == 3


@pytest.mark.parametrize(
    ("command", "content"),
    [("inspect", RECEIPT), ("verify", RECEIPT), ("inspect", DOCUMENT), ("verify", DOCUMENT)],
    ids=["inspect receipt", "verify receipt", "inspect document", "verify document"],
)
def test_flipped_bits(command: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`verify` refuses each; `inspect` may well show what a changed file says, and says that it verified nothing."""
    chance, file = random.Random(11), tmp_path / "file"
    extra = ACCEPTED if command == "verify" and content is DOCUMENT else []
    for _ in range(150):
        place = chance.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
        status = execute([command, str(file), *extra])
        said = capfd.readouterr()
        assert status in ((1, 2) if command == "verify" else (0, 2)), place
        assert "this is a bug" not in said.err
        assert status == 0 or (said.out == "" and str(file) in said.err), place


def test_what_is_shown_ends_in_time_for_the_deepest_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(attestation_within(3, DOCUMENT))
    assert execute(["inspect", str(tmp_path / "file"), "--json"]) == 0
    (tmp_path / "file").write_bytes(attestation_within(4, DOCUMENT))
    assert execute(["inspect", str(tmp_path / "file"), "--json"]) == 2
