"""The auction: who wins, what is paid, and what nobody learns."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import EXACT, Rows, aggregate, column, read, table
from joint_programs import agreed, results

from enclave_runtime.programs import ProgramRefused, auction
from mpc.protocol.contract import Contract, Rule
from mpc.protocol.errors import ContractError

MOST = 2**63 - 1


def sale(bidders: int, *recipients: str, rules: Sequence[Rule] = (), **given: Any) -> Contract:
    columns = column("cents", "int64"), column("note", "string"), column("rate", "double")
    owned = [table("bids", f"b{i}", rules[i] if rules else EXACT, *columns) for i in range(bidders)]
    parameters = {"table": "bids", "bid": "cents", "units": 1, "price": "second", "reserve": 0, "tell": "all"} | given
    return agreed("auction", owned, parameters, *(recipients or ("seller",)))


def bids(*cents: int | None) -> Rows:
    return [{"cents": value} for value in cents]


def winners(described: Contract, *rows: Rows, to: str = "seller") -> dict[str, int]:
    found = read(results(described, *rows)[to])
    assert all(row["won"] == (row["price"] is not None) for row in found)
    return {row["bidder"]: row["price"] for row in found if row["won"]}


def test_the_highest_bid_wins() -> None:
    three = bids(500), bids(900), bids(700)
    assert winners(sale(3), *three) == {"b1": 700}
    assert winners(sale(3, price="first"), *three) == {"b1": 900}
    assert winners(sale(3, units=2), *three) == {"b1": 500, "b2": 500}
    assert winners(sale(3, units=2, price="first"), *three) == {"b1": 900, "b2": 700}
    assert winners(sale(3, units=3, reserve=450), *three) == {"b0": 450, "b1": 450, "b2": 450}
    assert winners(sale(3, units=1000), *three) == {"b0": 0, "b1": 0, "b2": 0}


def test_of_equal_bids_the_first_bidder_of_the_contract_wins() -> None:
    assert winners(sale(3), bids(5), bids(7), bids(7)) == {"b1": 7}
    assert winners(sale(4, units=2), bids(7), bids(7), bids(7), bids(7)) == {"b0": 7, "b1": 7}
    described = sale(3)
    turned = replace(described, tables=described.tables[::-1])
    assert winners(turned, bids(7), bids(7), bids(5)) == {"b2": 7}


def test_a_bid_below_the_reserve_does_not_count_and_no_bid_is_none() -> None:
    assert winners(sale(3, reserve=600), bids(500), bids(900), bids(599)) == {"b1": 600}
    assert winners(sale(3, reserve=600), bids(500), bids(), bids(None)) == {}
    assert winners(sale(3), bids(-5), bids(-1), bids()) == {}  # a negative bid is below every reserve
    assert winners(sale(2), bids(0), bids(-(2**63))) == {"b0": 0}
    assert winners(sale(2), bids(MOST), bids(MOST)) == {"b0": MOST}


def test_of_several_rows_of_a_bidder_the_highest_counts() -> None:
    """Its own second bid is no losing bid, and it wins one unit."""
    assert winners(sale(2, units=2), bids(9, 8, 7), bids(1)) == {"b0": 0, "b1": 0}
    assert winners(sale(2), bids(9, 8, None), bids(1)) == {"b0": 1}


def test_a_bidder_learns_of_itself_only() -> None:
    described = sale(3, "b0", "b1", "seller", tell="own")
    found = results(described, bids(500), bids(900), bids(700))
    assert read(found["b0"]) == [{"bidder": "b0", "won": False, "price": None}]
    assert read(found["b1"]) == [{"bidder": "b1", "won": True, "price": 700}]
    assert [row["bidder"] for row in read(found["seller"])] == ["b0", "b1", "b2"]


def test_what_losers_bid_never_leaves() -> None:
    """Whatever they bid below the price, no byte of any result changes; in order of bids nobody stands."""
    for given_price in ("first", "second"):
        described = sale(5, "b0", "seller", units=2, price=given_price)
        rows = [bids(10), bids(90), bids(80), bids(70), bids(20)]
        other = [bids(69), bids(90), bids(80), bids(70), bids()]
        assert results(described, *rows) == results(described, *other)
    described = sale(3, units=2)
    assert results(described, bids(90), bids(80), bids(7)) == results(described, bids(80), bids(90), bids(7))


BIDS = st.lists(st.lists(st.none() | st.integers(-3, 9), max_size=3), min_size=2, max_size=7)


@settings(max_examples=150, deadline=None)
@given(offers=BIDS, units=st.integers(1, 4), reserve=st.integers(0, 5), price=st.sampled_from(["first", "second"]))
def test_as_if_units_were_sold_one_by_one(offers: list[list[int | None]], units: int, reserve: int, price: str) -> None:
    left = [max((o for o in rows if o is not None and o >= reserve), default=None) for rows in offers]
    sold: dict[int, int] = {}
    for _ in range(units):
        best = max((bid for bid in left if bid is not None), default=None)
        if best is not None:
            winner = left.index(best)
            sold[winner], left[winner] = best, None
    second = max((bid for bid in left if bid is not None), default=reserve)
    expected = {f"b{i}": bid if price == "first" else second for i, bid in sold.items()}
    described = sale(len(offers), units=units, reserve=reserve, price=price)
    assert winners(described, *(bids(*rows) for rows in offers)) == expected


REFUSED: list[tuple[Contract, str]] = [
    (sale(1), r"program\.parameters\.table: only b0 owns bids: expected two bidders or more"),
    (
        sale(2, rules=[EXACT, aggregate(5)]),
        r"b1's rule for bids is aggregate, and a price is somebody's bid: expected a",
    ),
    (sale(2, table="bid"), r"program\.parameters\.table: no table 'bid' in the contract: expected one of bids"),
    (sale(2, bid="note"), r"program\.parameters\.bid: bids\.note: expected a column of int64, got string"),
    (sale(2, bid="rate"), r"program\.parameters\.bid: bids\.rate: expected a column of int64, got double"),
    (sale(2, bid="amount"), r"program\.parameters\.bid: table bids has no column 'amount': expected one of cents"),
    (sale(2, units=0), r"program\.parameters\.units: expected 1 to 1000; for example units = 1, got 0"),
    (sale(2, units=1.0), r"units: expected a whole number; for example units = 1, got a number with a point"),
    (sale(2, reserve=-1), r"program\.parameters\.reserve: expected 0 to 9223372036854775807"),
    (sale(2, price="third"), r"program\.parameters\.price: expected one of \('first', 'second'\)"),
]


@pytest.mark.parametrize(("described", "words"), REFUSED)
def test_is_refused(described: Contract, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        auction.check(described)
    with pytest.raises(ProgramRefused) as refused:
        auction.run(described, [])
    assert refused.value.code == "query"


def test_what_people_read() -> None:
    shown = auction.check(sale(3, "b0", "seller", units=2, tell="own", reserve=7))
    text = " ".join([*(f"{name}: {why}" for name, why in shown.columns), *shown.rules, *shown.warnings])
    for words in (
        "the highest bids win; 2 units, one for a bidder; a bidder's bid is its highest bids.cents, 7 or more",
        "of equal bids the one wins whose bidder comes first in b0, b1, b2",
        "price: what a winner pays: for every winner the highest losing bid, or 7 where nobody loses",
        "the bidder alone, in a bidder's",
        "so few bidders that the price tells whose bid it was",
    ):
        assert words in text, words
