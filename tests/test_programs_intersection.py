"""Intersection: what is compared, what is counted, and what k keeps back."""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import EXACT, aggregate, column, read, stream, table
from joint_programs import agreed, results, told

from enclave_runtime.programs import ProgramRefused, intersection
from enclave_runtime.programs.inputs import open_tables
from mpc.protocol.contract import Contract, Rule
from mpc.protocol.errors import ContractError

ALL = ["nfc", "trim", "casefold"]


def pair(
    left: Rule = EXACT,
    right: Rule = EXACT,
    kind: str = "string",
    recipients: Sequence[str] = ("analyst",),
    **given: Any,
) -> Contract:
    tables = [
        table("customers", "shop", left, column("email", kind, "join"), column("person", "int64")),
        table("subscribers", "paper", right, column("mail", kind, "join")),
    ]
    parameters = {"keys": ["customers.email", "subscribers.mail"], "normalize": [], "members_to": []} | given
    return agreed("intersection", tables, parameters, *recipients)


def left(*keys: Any, persons: Sequence[int] = ()) -> list[dict[str, Any]]:
    return [{"email": key, "person": persons[i] if persons else i} for i, key in enumerate(keys)]


def right(*keys: Any) -> list[dict[str, Any]]:
    return [{"mail": key} for key in keys]


def size(described: Contract, *rows: Any) -> int | None:
    (row,) = told(described, *rows)
    assert row["suppressed"] == (row["size"] is None)
    found: int | None = row["size"]
    return found


def test_a_key_counts_once_and_nothing_matches_nothing() -> None:
    assert size(pair(), left("a", "b", "b", None, ""), right("b", "b", "c", None, "a")) == 2
    assert size(pair(), left(), right()) == 0
    assert size(pair(), left(None), right(None)) == 0
    assert size(pair(kind="int64"), left(2**63 - 1, -1), right(-1, 2**63 - 1, 0)) == 2


def test_keys_are_compared_exactly_unless_they_are_normalized() -> None:
    given_left = left("Ann@x.org", " bob@x.org\u3000", "zo\u00eb", "STRASSE", "\u0130", "c\x1f")
    given_right = right("ann@x.org", "bob@x.org", "zoe\u0308", "stra\u00dfe", "i\u0307", "c")
    assert size(pair(), given_left, given_right) == 0
    assert size(pair(normalize=["casefold"]), given_left, given_right) == 3
    assert size(pair(normalize=["trim"]), given_left, given_right) == 1
    assert size(pair(normalize=["nfc"]), given_left, given_right) == 1
    assert size(pair(normalize=ALL), given_left, given_right) == 5  # a control character is no white space


TEXTS = st.text(
    st.sampled_from("aAbB \u00e4\u00c4\u00df\u0130\u0131\u0345\u0301\u03b1\u1fb3\u1fb7\u00a0\u2003\t\u212b"), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.none() | TEXTS, max_size=8), steps=st.sets(st.sampled_from(ALL)))
def test_normalizing_at_once_is_normalizing_one_by_one(texts: list[str | None], steps: set[str]) -> None:
    def one(text: str) -> str:
        text = unicodedata.normalize("NFC", text) if "nfc" in steps else text
        while "trim" in steps and text[:1].isspace():
            text = text[1:]
        while "trim" in steps and text[-1:].isspace():
            text = text[:-1]
        text = text.casefold() if "casefold" in steps else text
        return unicodedata.normalize("NFC", text) if "nfc" in steps else text

    chunks = pa.chunked_array([texts[:3], texts[3:]], pa.string())
    expected = [None if text is None else one(text) for text in texts]
    assert intersection.normalized(chunks, sorted(steps)).to_pylist() == expected


KEYS = st.lists(st.none() | st.sampled_from("abcdefghij"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    sets=st.lists(KEYS, min_size=3, max_size=3), k=st.integers(1, 4), persons=st.lists(st.integers(0, 3), min_size=12)
)
def test_the_size_is_the_sets_own_or_suppressed(sets: list[list[str | None]], k: int, persons: list[int]) -> None:
    described = pair(aggregate(k, "person"), aggregate(2))
    third = replace(described.tables[1], owner="radio", rule=EXACT)  # of one name: each owner's is a set of its own
    described = replace(
        described,
        tables=(*described.tables, third),
        participants=(*described.participants, replace(described.participants[0], name="radio", key=b"r" * 32)),
    )
    a, b, c = sets
    both = {*a} & {*b} & {*c} - {None}
    behind = {person for key, person in zip(a, persons, strict=False) if key in both}
    enough = not both or (len(both) >= max(k, 2) and len(behind) >= k)
    found = size(described, left(*a, persons=persons), right(*b), right(*c))
    assert found == (len(both) if enough else None)


def test_fewer_than_k_keys_are_not_shown_and_none_is() -> None:
    described = pair(aggregate(3), aggregate(2))
    assert [size(described, left(*"abcd"), right(*"abcd"[:n])) for n in range(5)] == [0, None, None, 3, 4]


def test_one_entity_with_many_keys_is_one() -> None:
    described = pair(aggregate(3, "person"))
    keys = [f"k{i}" for i in range(50)]
    assert size(described, left(*keys, persons=[7] * 50), right(*keys)) is None
    assert size(described, left(*keys, persons=[i % 3 for i in range(50)]), right(*keys)) == 50


def test_one_key_of_many_entities_is_one() -> None:
    described = pair(aggregate(3, "person"))
    assert size(described, left(*"aaaa", persons=range(4)), right("a")) is None


def test_members_go_to_the_named_recipients_only() -> None:
    described = pair(recipients=("shop", "paper"), members_to=["shop"], normalize=ALL)
    found = results(described, left("B ", "a", "a", "c"), right("b", "A", "d"))
    assert read(found["shop"]) == [{"key": "a"}, {"key": "b"}]
    assert read(found["paper"]) == [{"size": 2, "suppressed": False}]
    told_to = intersection.check(described)
    assert [name for name, _ in told_to.columns] == ["size", "suppressed", "key"]
    assert "Only for shop" in told_to.columns[2][1]


def test_rows_in_another_order_on_more_threads_give_the_same_bytes() -> None:
    a, b = [f"k{i % 700}" for i in range(3000)], [f"k{i}" for i in range(300, 2000)]
    one = pair(members_to=["analyst"])
    two = replace(one, enclave=replace(one.enclave, cpus=2))
    assert results(one, left(*a), right(*b)) == results(two, left(*a[::-1]), right(*b[::-1]))


REFUSED: list[tuple[Contract, str]] = [
    (pair(keys=["customers.email"]), r"program\.parameters\.keys: expected a key of table subscribers too"),
    (
        pair(keys=["customers.email", "nobody.mail"]),
        r"keys\[1\]: expected table\.column of each table once \(customers",
    ),
    (pair(keys=["customers.email", "customers.email"]), r"keys\[1\]: expected table\.column of each table once"),
    (
        pair(keys=["customers.email", "subscribers.email"]),
        r"keys\[1\]: table subscribers has no column 'email'.*one of mail",
    ),
    (pair(keys=["customers.person", "subscribers.mail"]), r"keys: expected columns of one type, got int64, string"),
    (
        pair(aggregate(2), keys=["customers.person", "subscribers.mail"]),
        r"shop does not allow join of customers\.person",
    ),
    (pair(kind="double"), r"keys\[0\]: customers\.email: expected a column of string or int64 or date, got double"),
    (pair(kind="int64", normalize=["trim"]), r"normalize: expected \[\]: keys are of type int64"),
    (
        pair(normalize=["lower"]),
        r"program\.parameters\.normalize\[0\]: expected one of .*casefold.*for example normalize",
    ),
    (pair(normalize="trim"), r"program\.parameters\.normalize: expected a list; for example .*, got text"),
    (pair(members_to=["paper"]), r"members_to: expected recipients of the result \(analyst\), got paper"),
    (
        pair(right=aggregate(5), members_to=["analyst"]),
        r"members_to: paper's rule for subscribers is aggregate.*expected members_to = \[\], or a rule of kind exact",
    ),
    (pair(keys=["customers.email\x1b"]), r"table customers has no column 'email\\x1b'"),
]


@pytest.mark.parametrize(("described", "words"), REFUSED)
def test_is_refused(described: Contract, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        intersection.check(described)
    with pytest.raises(ProgramRefused) as refused:  # also by an enclave that nobody checked for
        intersection.run(described, [])
    assert refused.value.code == "query"


def test_one_party_alone_is_refused() -> None:
    described = pair()
    alone = replace(described, tables=tuple(replace(one, owner="shop") for one in described.tables))
    with pytest.raises(ContractError, match="tables of at least two parties"):
        intersection.check(alone)


@pytest.mark.parametrize("count", [256, 257])
def test_many_parties(count: int) -> None:
    tables = [table("people", f"p{i}", aggregate(2), column("id", "int64", "join")) for i in range(count)]
    described = agreed("intersection", tables, {"keys": ["people.id"], "normalize": [], "members_to": []})
    rows = [[{"id": 1}, {"id": 2}, {"id": 10 + i}] for i in range(count)]
    if count <= 256:
        assert size(described, *rows) == 2
        return
    with pytest.raises(ContractError, match="tables: expected at most 256, got 257"):
        intersection.check(described)


def test_forged_text_is_refused_before_it_is_read() -> None:
    described = pair()
    forged = stream(pa.table({"mail": pa.array(["ok"])})).replace(b"ok", b"\xff\xfe")
    honest = stream(pa.table({"email": pa.array(["a"]), "person": pa.array([1])}))
    with pytest.raises(ProgramRefused) as refused:
        intersection.run(described, open_tables(described, [honest, forged]))
    assert (refused.value.code, refused.value.table_index) == ("input", 1)


def test_what_people_read() -> None:
    told_to = intersection.check(pair(aggregate(10, "person"), aggregate(5), recipients=("paper",), normalize=ALL))
    text = " ".join([*(f"{name}: {why}" for name, why in told_to.columns), *told_to.rules, *told_to.warnings])
    for words in (
        "number of distinct keys that every party has: shop allows join; paper allows join. For paper",
        "compared exactly, Unicode NFC, no white space around, letter case folded",
        "1 to 9 keys, or so many distinct person is not shown",
        "paper contributes rows and receives the result: with rows that it forges",
        "a size of 0, or of all its keys, tells paper",
        "each row counts as one entity",
    ):
        assert words in text, words
