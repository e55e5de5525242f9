"""docs/PROTOCOL.md says what the code does: its tables are printed from it, and its labels are all of them."""

import re
from pathlib import Path

import pytest

from mpc.fuzz import diagram
from mpc.protocol.rounds import RULES, Round, Rule

ROOT = Path(__file__).parents[1]
PAGE = diagram.PAGE.read_text()


def test_the_page_is_what_the_code_prints() -> None:
    assert diagram.filled(PAGE) == PAGE, "run: python -m mpc.fuzz.diagram --write"
    assert diagram.main([]) == 0


def test_every_part_is_on_the_page_once() -> None:
    assert {name: PAGE.count(f"<!-- {name} -->") for name in diagram.PARTS} == dict.fromkeys(diagram.PARTS, 1)


def test_another_rule_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, rule = next(iter(RULES[Round.SEAL].items()))
    changed = {**RULES, Round.SEAL: {kind: Rule(rule.speaker, rule.times, Round.RELEASE)}}
    monkeypatch.setattr(diagram, "RULES", changed)
    assert diagram.filled(PAGE) != PAGE
    assert diagram.main([]) == 1


def test_every_label_is_on_the_page() -> None:
    sources = [*(ROOT / "mpc/protocol").glob("*.py"), *(ROOT / "enclave_runtime").glob("*.py")]
    text = "".join(source.read_text() for source in sources)
    labels = set(re.findall(r'"enclave-mpc/1 ([^"\\{]+)["\\]', text))
    labels |= {f"{kind} commitment" for kind in ("input", "result")}
    assert len(labels) > 10
    assert [label for label in sorted(labels) if f"enclave-mpc/1 {label}" not in PAGE] == []
