"""The SQL program: honest queries give the clear-text answer, evasions are refused before the engine sees data, and
no group below k ever shows."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import EXACT, Rows, aggregate, arrow, column, contract, read, stream, table

from enclave_runtime.programs import ProgramRefused, sql
from enclave_runtime.programs.duck import TIMESTAMP
from enclave_runtime.programs.duck import column as rebuild
from mpc.protocol.contract import Contract, Table
from mpc.protocol.errors import ContractError

K = 3
ORDERS = table(
    "orders",
    "shop",
    aggregate(K, "customer"),
    column("customer", "string", "join", "count", "count_distinct"),
    column("channel", "string", "group", "filter", "count"),
    column("amount", "double", "sum", "avg", "count", "filter", buckets=[10, 100], clamp=[0, 1000]),
    column("items", "int64", "sum", "avg", "filter", "join", clamp=[0, 5]),
    column("weight", "double", "group", "sum", "avg"),
    column("day", "date", "group", "filter"),
    column("placed", "timestamp", "filter"),
    column("paid", "bool", "group", "filter"),
    column("secret", "string"),
)
PEOPLE = table(
    "people",
    "Crm",
    aggregate(K, "id"),
    column("id", "string", "join", "count"),
    column("age", "int64", "group", "filter", buckets=[18, 42.5, 65]),
    column("segment", "string", "group", "filter"),
    column("note", "string"),
)


def orders(count: int = 60) -> Rows:
    """Each of 20 customers orders thrice; some values are missing."""
    return [
        {
            "customer": f"c{i % 20}",
            "channel": ("web", "shop", None)[i % 3],
            "amount": None if i % 5 == 0 else i * 25.0 - 30,
            "items": None if i % 7 == 0 else i % 9,
            "weight": 0.1 * (i % 4),
            "day": date(2026, 1, 1 + i % 2),
            "placed": datetime(2026, 1, 1, i % 24, tzinfo=UTC),
            "paid": i % 4 == 0,
            "secret": f"canary-{i}",
        }
        for i in range(count)
    ]


def people(count: int = 20) -> Rows:
    return [
        {"id": f"c{i}", "age": None if i == 3 else 10 + 4 * i, "segment": "AB"[i % 2], "note": f"canary-{i}"}
        for i in range(count)
    ]


def agreed(query: str, *tables: Table, **options: Any) -> Contract:
    return contract(tables or (ORDERS, PEOPLE), query, **options)


def run(query: str, **options: Any) -> list[dict[str, Any]]:
    described = agreed(query, **options)
    sql.check(described)
    return read(sql.run(described, [arrow(ORDERS, orders()), arrow(PEOPLE, people())])["analyst"])


def grouped(rows: Iterable[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return dict(found)


def clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


# honest queries


def test_group_by_with_every_aggregate() -> None:
    found = run(
        "SELECT channel, count(*) AS n, count(amount) AS known, sum(amount) AS total, avg(amount) AS mean, "
        "sum(items) AS items, avg(items) AS per_order, count(DISTINCT customer) AS buyers FROM orders GROUP BY channel"
    )
    expected = grouped(orders(), "channel")
    assert [row["channel"] for row in found] == ["shop", "web", None]
    for row in found:
        rows = expected[(row["channel"],)]
        amounts = [clamp(r["amount"], 0, 1000) for r in rows if r["amount"] is not None]
        items = [clamp(r["items"], 0, 5) for r in rows if r["items"] is not None]
        assert (row["n"], row["known"], row["items"]) == (len(rows), len(amounts), sum(items))
        assert row["buyers"] == len({r["customer"] for r in rows})
        assert row["total"] == pytest.approx(sum(amounts), rel=1e-12)
        assert row["mean"] == pytest.approx(sum(amounts) / len(amounts), rel=1e-12)
        assert row["per_order"] == pytest.approx(sum(items) / len(items), rel=1e-12)


def test_buckets_of_a_joined_table_have_labels_in_order() -> None:
    found = run(
        "SELECT bucket(p.age) AS age, count(*) AS n FROM orders o JOIN people p ON o.customer = p.id "
        "GROUP BY bucket(p.age) ORDER BY age"
    )
    ages = {person["id"]: person["age"] for person in people()}
    expected: dict[str | None, int] = defaultdict(int)
    for order in orders():
        age = ages[order["customer"]]
        label = (
            None
            if age is None
            else "< 18"
            if age < 18
            else "[18, 42.5)"
            if age < 43
            else "[42.5, 65)"
            if age < 65
            else ">= 65"
        )
        expected[label] += 1
    # Two people are below 18 and one has no age: these groups are left out together, and hold K people.
    assert [(row["age"], row["n"]) for row in found] == [
        (label, expected[label]) for label in ("[18, 42.5)", "[42.5, 65)", ">= 65")
    ]


HONEST: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("channel = 'web'", lambda r: r["channel"] == "web"),
    ("channel IN ('web', 'shop')", lambda r: r["channel"] in ("web", "shop")),
    ("channel IS NULL", lambda r: r["channel"] is None),
    ("channel IS NOT NULL", lambda r: r["channel"] is not None),
    ("items >= 3 AND items < 7", lambda r: r["items"] is not None and 3 <= r["items"] < 7),
    ("items BETWEEN 2 AND 4", lambda r: r["items"] is not None and 2 <= r["items"] <= 4),
    ("(items > 0) AND (paid = true AND day < '2026-01-02')", lambda r: r["items"] and r["paid"] and r["day"].day == 1),
    ("day = DATE '2026-01-02'", lambda r: r["day"].day == 2),
    ("placed >= TIMESTAMP '2026-01-01 12:00:00'", lambda r: r["placed"].hour >= 12),
    ("placed < TIMESTAMPTZ '2026-01-01 12:00:00+02'", lambda r: r["placed"].hour < 10),
    ("bucket(amount) = '[10, 100)'", lambda r: r["amount"] is not None and 10 <= r["amount"] < 100),
    ("bucket(amount) IN ('< 10', '>= 100')", lambda r: r["amount"] is not None and not 10 <= r["amount"] < 100),
    ("bucket(amount) IS NULL", lambda r: r["amount"] is None),
]  # fmt: skip


@pytest.mark.parametrize(("condition", "keeps"), HONEST)
def test_filters(condition: str, keeps: Callable[[dict[str, Any]], Any]) -> None:
    kept = [row for row in orders() if keeps(row)]
    found = run(f"SELECT count(*) AS n FROM orders WHERE {condition}")
    assert len({row["customer"] for row in kept}) >= K
    assert found == [{"n": len(kept)}]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT channel, paid, count(*) AS n FROM orders GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2",
        "select CHANNEL, Paid, COUNT() n from ORDERS group by all order by n desc, channel nulls last, paid",
        'SELECT o."channel", "o".paid, count(*) AS "n" FROM orders AS o GROUP BY o.channel, o.paid ORDER BY n DESC;',
        "FROM orders SELECT channel, paid, count(*) AS n GROUP BY ALL ORDER BY count(*) DESC -- as said",
        "SELECT channel AS channel, paid, count(*) AS n FROM orders GROUP BY paid, channel ORDER BY 3 DESC NULLS LAST",
    ],
)
def test_the_same_said_otherwise_is_the_same(query: str) -> None:
    counts = {key: len(rows) for key, rows in grouped(orders(), "channel", "paid").items()}
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0][0] is None, item[0]))
    found = run(query)
    assert [tuple(row.values()) for row in found] == [(*key, n) for key, n in expected]
    assert [name.lower() for name in found[0]] == ["channel", "paid", "n"]


def test_order_of_the_result() -> None:
    query = "SELECT channel, count(*) AS n FROM orders GROUP BY 1 ORDER BY channel DESC NULLS FIRST"
    assert [row["channel"] for row in run(query)] == [None, "web", "shop"]
    query = "SELECT channel, count(*) AS n FROM orders GROUP BY 1 ORDER BY ALL DESC"
    assert [row["channel"] for row in run(query)] == ["web", "shop", None]


def test_dates_times_and_numbers_as_groups() -> None:
    assert run("SELECT day FROM orders GROUP BY day") == [{"day": date(2026, 1, 1)}, {"day": date(2026, 1, 2)}]
    found = run("SELECT weight, count(*) AS n FROM orders GROUP BY weight")
    assert [row["weight"] for row in found] == sorted({order["weight"] for order in orders()})


def test_left_join_counts_rows_without_a_partner() -> None:
    query = "SELECT segment, count(*) AS n, count(p.id) AS known FROM orders o LEFT JOIN people p ON customer = id"
    tables = [arrow(ORDERS, orders(20)), arrow(PEOPLE, people(10))]
    assert read(sql.run(agreed(f"{query} GROUP BY 1"), tables)["analyst"]) == [
        {"segment": "A", "n": 5, "known": 5},
        {"segment": "B", "n": 5, "known": 5},
        {"segment": None, "n": 10, "known": 0},
    ]


def test_using_and_compound_keys_and_three_tables() -> None:
    key = [column("a", "string", "join"), column("b", "date", "join")]
    facts = table("facts", "x", aggregate(2), *key, column("v", "int64", "sum"), column("c", "int64", "join"))
    first = table("first", "y", aggregate(2), *key, column("g", "string", "group"))
    second = table("second", "z", aggregate(2), column("c", "int64", "join"), column("h", "string", "group"))
    query = "SELECT g, h, sum(v) AS v FROM facts JOIN first USING (a, b) JOIN second USING (c) GROUP BY ALL"
    days = [date(2026, 1, 1), date(2026, 1, 2)]
    rows = [{"a": a, "b": b, "v": 1, "c": c} for a in "pqrs" for b in days for c in (1, 2, 3, 4) for _ in range(2)]
    described = contract([facts, first, second], query)
    found = sql.run(
        described,
        [
            arrow(facts, rows),
            arrow(first, [{"a": a, "b": b, "g": "G" if a in "pq" else "H"} for a in "pqrs" for b in days]),
            arrow(second, [{"c": c, "h": "low" if c < 3 else "high"} for c in (1, 2, 3, 4)]),
        ],
    )
    assert [tuple(row.values()) for row in read(found["analyst"])] == [
        (g, h, 16) for g in ("G", "H") for h in ("high", "low")
    ]


def test_one_to_one_join_aggregates_both_sides() -> None:
    left = table("mine", "x", aggregate(2, "id"), column("id", "string", "join"), column("v", "int64", "sum"))
    right = table("yours", "y", aggregate(2, "id"), column("id", "string", "join"), column("w", "int64", "sum"))
    described = contract(
        [left, right], "SELECT sum(v) AS v, sum(w) AS w, count(*) AS n FROM mine JOIN yours USING (id)"
    )
    found = sql.run(
        described,
        [
            arrow(left, [{"id": f"i{i}", "v": i} for i in range(10)]),
            arrow(right, [{"id": f"i{i}", "w": 100} for i in range(5, 30)]),
        ],
    )
    assert read(found["analyst"]) == [{"v": 35, "w": 500, "n": 5}]


def test_every_recipient_gets_the_same_bytes_always_and_on_any_number_of_threads() -> None:
    query = "SELECT channel, sum(amount) AS a, avg(weight) AS w FROM orders GROUP BY 1"
    many = [arrow(ORDERS, orders(60)) for _ in range(400)]
    tables = [pa.concat_tables(many), arrow(PEOPLE, people())]
    results = [
        sql.run(agreed(query, recipients=("one", "two"), cpus=cpus), tables)[name]
        for cpus in (1, 2, 4)
        for name in ("one", "two")
    ]
    assert len(set(results)) == 1


def test_sums_of_very_unlike_numbers_are_right_and_stable() -> None:
    values = table("values", "x", aggregate(1), column("g", "string", "group"), column("v", "double", "sum", "avg"))
    rows = [{"g": "small", "v": 1e-3 + i * 1e-9} for i in range(500_000)] + [{"g": "fill", "v": 9.96921e36}]
    described = contract([values], "SELECT g, sum(v) AS s, avg(v) AS a FROM values GROUP BY 1", cpus=4)
    results = {sql.run(described, [arrow(values, rows)])["analyst"] for _ in range(3)}
    assert len(results) == 1
    fill, small = read(results.pop())
    assert (fill["s"], small["s"]) == (pytest.approx(9.96921e36), pytest.approx(624.99975))


def test_the_last_bits_of_a_sum_do_not_tell_of_hidden_rows() -> None:
    def sums(clamp: tuple[float, ...], extreme: float) -> list[tuple[Any, ...]]:
        value = column("v", "double", "sum", "avg", clamp=clamp)
        described = table("values", "x", aggregate(3), column("g", "string", "group"), value)
        rows = [{"g": group, "v": 0.1} for group in "aabbccabcabc"] + [{"g": "z", "v": extreme}]
        return shown("SELECT g, sum(v) AS s, avg(v) AS m FROM values GROUP BY g", [described], rows)

    for clamp in ((), (0, 1e12), (-1e300, 1e300), (0, 1e-300)):
        assert len({tuple(sums(clamp, extreme)) for extreme in (0.1, 3e8, 5e8, 1e9, 1e30)}) == 1
    assert sums((10, 100), 0.1)[0] == ("b", 40, 10)  # all values below the clamp; a goes with z


def test_clamped_sums_are_right_to_a_part_of_the_clamp() -> None:
    described = table("values", "x", aggregate(1), column("v", "double", "sum", "avg", clamp=(-1000, 600)))
    rows = [{"v": i * 0.37 - 1500} for i in range(10_000)]
    ((total, mean),) = shown("SELECT sum(v) AS s, avg(v) AS m FROM values", [described], rows)
    expected = math.fsum(clamp(row["v"], -1000, 600) for row in rows)
    assert total == pytest.approx(expected, rel=1e-15, abs=len(rows) * 2.0**-62 * 1024)
    assert mean == pytest.approx(expected / len(rows), rel=1e-15)


def test_zero_has_one_sign() -> None:
    values = table("values", "x", aggregate(1), column("g", "double", "group"))
    described = contract([values], "SELECT g, count(*) AS n FROM values GROUP BY 1")
    found = read(sql.run(described, [arrow(values, [{"g": -0.0}, {"g": 0.0}, {"g": -0.0}])])["analyst"])
    assert [(str(row["g"]), row["n"]) for row in found] == [("0.0", 3)]


def test_nothing_is_left_under_nulls_and_behind_the_last_bit() -> None:
    """Whatever lay in the engine's memory there."""
    validity = pa.py_buffer(b"\xfd" + bytes(63))  # of eight values the second is null; the last five are cut off
    for kind in (pa.int64(), pa.float64(), pa.date32(), TIMESTAMP):
        left = pa.Array.from_buffers(kind, 8, [validity, pa.py_buffer(b"canary!!" * 8)]).slice(0, 3)
        rebuilt = rebuild(pa.chunked_array([left]), kind)
        assert rebuilt.equals(left)
        width = kind.bit_width // 8
        assert bytes(rebuilt.buffers()[1])[width : 2 * width] == bytes(width)
        assert bytes(rebuilt.buffers()[0])[:1] == b"\x05"


def test_nothing_of_the_engine_is_left_in_a_result() -> None:
    described = agreed("SELECT channel, avg(items) AS a FROM orders GROUP BY 1")
    result = sql.run(described, [arrow(ORDERS, orders()), arrow(PEOPLE, people())])["analyst"]
    rebuilt = pa.Table.from_pylist(read(result), pa.ipc.open_stream(result).schema)
    assert result == stream(rebuilt)
    assert b"canary" not in result


# what may be shown


def shown(query: str, described: list[Table], *rows: Rows, **options: Any) -> list[tuple[Any, ...]]:
    agreement = contract(described, query, **options)
    tables = [arrow(table, part) for table, part in zip(described, rows, strict=True)]
    return [tuple(row.values()) for row in read(sql.run(agreement, tables)["analyst"])]


def refusal(query: str, described: list[Table], *rows: Rows) -> str:
    with pytest.raises(ProgramRefused) as refused:
        shown(query, described, *rows)
    return refused.value.code


def visits(owner: str, k: int, *entity: str) -> Table:
    group = column("g", "string", "group", "filter", "join")
    return table(
        "visits", owner, aggregate(k, *entity), column("who", "int64", "join"), group, column("v", "int64", "sum")
    )


def rows_of(sizes: dict[str, int], first: int = 0, value: int | None = 1) -> list[dict[str, Any]]:
    """So many people in each group, each once."""
    found: list[dict[str, Any]] = []
    for group, size in sizes.items():
        found += [{"who": first + len(found) + i, "g": group, "v": value} for i in range(size)]
    return found


COUNT = "SELECT g, count(*) AS n FROM visits GROUP BY g"


def test_groups_below_k_are_left_out_whatever_the_number_of_rows() -> None:
    rows = rows_of({"a": 5, "b": 7}) + [{"who": who % 4, "g": "c", "v": 1} for who in range(100)]
    assert shown(COUNT, [visits("x", 5, "who")], rows) == [("b", 7)]  # and the smaller of the others, for c has four
    assert shown(COUNT, [visits("x", 4, "who")], rows) == [("a", 5), ("b", 7), ("c", 100)]
    assert shown(COUNT, [visits("x", 5)], rows) == [("a", 5), ("b", 7), ("c", 100)]  # where each row is an entity


def test_what_is_left_out_holds_k_or_nothing() -> None:
    described = [visits("x", 5, "who")]
    assert shown(COUNT, described, rows_of({"a": 9, "b": 4, "c": 8})) == [("a", 9)]
    assert shown(COUNT, described, rows_of({"a": 9, "b": 4, "c": 8, "d": 1})) == [("a", 9), ("c", 8)]
    assert shown(COUNT, described, rows_of({"a": 9, "b": 5})) == [("a", 9), ("b", 5)]
    assert shown(COUNT, described, rows_of({"b": 4})) == []
    same = rows_of({"b": 4}) + [{"who": who, "g": "d", "v": 1} for who in range(4)]  # the same four twice
    assert shown(COUNT, described, same + rows_of({"a": 9, "c": 8}, first=100)) == [("a", 9)]


def test_the_smallest_of_large_groups_goes() -> None:
    assert shown(COUNT, [visits("x", 5, "who")], rows_of({"a": 300, "b": 150, "c": 2, "d": 200})) == [
        ("a", 300),
        ("d", 200),
    ]


def test_equally_small_groups_go_in_their_order() -> None:
    assert shown(COUNT, [visits("x", 5, "who")], rows_of({"c": 6, "b": 6, "a": 6, "d": 2})) == [("b", 6), ("c", 6)]


def test_without_groups_the_whole_is_one() -> None:
    query = "SELECT count(*) AS n, sum(v) AS s FROM visits"
    assert shown(query, [visits("x", 5, "who")], rows_of({"a": 5})) == [(5, 5)]
    assert shown(query, [visits("x", 6, "who")], rows_of({"a": 5})) == []
    assert shown(query, [visits("x", 6, "who")], []) == []


def test_entities_of_large_k_are_counted() -> None:
    for size, expected in ((199, []), (200, [("a", 200)])):
        assert shown(COUNT, [visits("x", 200, "who")], rows_of({"a": size})) == expected


def test_an_entity_of_several_columns() -> None:
    rows = [{"who": i % 2, "g": "ab"[i // 2 % 2], "v": i} for i in range(40)]
    assert shown("SELECT count(*) FROM visits", [visits("x", 4, "who", "g")], rows) == [(40,)]
    assert shown("SELECT count(*) FROM visits", [visits("x", 5, "who", "g")], rows) == []


def test_rows_without_an_entity_are_one_entity_together() -> None:
    rows: Rows = [{"who": None, "g": "a", "v": 1} for _ in range(9)]
    assert shown(COUNT, [visits("x", 2, "who")], rows) == []
    assert shown(COUNT, [visits("x", 2, "who")], [*rows, {"who": 1, "g": "a", "v": 1}]) == [("a", 10)]


def test_stacked_owners_each_have_k_or_no_row() -> None:
    described = [visits("x", 5, "who"), visits("y", 3, "who")]
    few = rows_of({"a": 6, "b": 6, "c": 6, "d": 6})
    # b has too few of y; the least of y's groups goes with it, for y has only two in b.
    assert shown(COUNT, described, few, rows_of({"a": 3, "b": 2, "c": 4})) == [("c", 10), ("d", 6)]
    assert shown(COUNT, described, few, rows_of({"a": 3, "c": 4})) == [("a", 9), ("b", 6), ("c", 10), ("d", 6)]
    assert shown(COUNT, described, few, []) == [("a", 6), ("b", 6), ("c", 6), ("d", 6)]


def test_an_average_rests_on_k_values_too() -> None:
    query = "SELECT g, sum(v) AS s, count(*) AS n FROM visits GROUP BY g"
    alone = [*rows_of({"a": 20}, value=None), {"who": 99, "g": "a", "v": 7}]  # one value, the salary of one person
    others = rows_of({"b": 6, "c": 7}, first=200)
    assert shown(query, [visits("x", 5, "who")], alone + others) == [("c", 7, 7)]
    assert shown(query, [visits("x", 5, "who")], alone[:-1] + others) == [("a", None, 20), ("b", 6, 6), ("c", 7, 7)]


def test_rows_without_a_value_rest_on_k_entities_where_they_can_be_counted() -> None:
    value = column("v", "double", "sum", "avg", "count", "count_distinct")
    described = table("t", "x", aggregate(5, "who"), column("who", "int64"), column("g", "string", "group"), value)
    for missing in range(7):
        rows = [{"who": i, "g": "a", "v": None if i < missing else 1.0} for i in range(12)]
        for outputs in ("count(*), count(v), sum(v)", "count(DISTINCT v)", "sum(v), avg(v)"):
            found = shown(f"SELECT g, {outputs} FROM t GROUP BY g", [described], rows)
            assert len(found) == (missing in (0, 5, 6))
        for outputs in ("avg(v), count(*)", "sum(v), count(*)"):
            assert len(shown(f"SELECT g, {outputs} FROM t GROUP BY g", [described], rows)) == 1


def test_rows_without_a_partner_rest_on_k_entities_where_they_can_be_counted() -> None:
    members = table("members", "y", aggregate(1), column("id", "int64", "join", "count"))
    query = "SELECT g, count(*) AS n, count(id) AS known FROM visits LEFT JOIN members ON who = id GROUP BY g"
    for known, expected in ((12, [("a", 12, 12)]), (11, []), (8, []), (7, [("a", 12, 7)]), (0, [("a", 12, 0)])):
        ids = [{"id": i} for i in range(known)]
        assert shown(query, [visits("x", 5, "who"), members], rows_of({"a": 12}), ids) == expected


def test_a_joined_owner_needs_k_entities_behind_each_group() -> None:
    places = table(
        "places", "y", aggregate(3, "city"), column("city", "string", "join"), column("land", "string", "group")
    )
    rows = [{"who": i, "g": f"city{i % 8}", "v": 1} for i in range(80)]
    lands = [{"city": f"city{i}", "land": "A" if i < 2 else "B" if i < 5 else "C"} for i in range(8)]
    query = "SELECT land, count(*) AS n FROM visits JOIN places ON g = city GROUP BY land"
    # A is two cities; B, as small as C, goes with it.
    assert shown(query, [visits("x", 5, "who"), places], rows, lands) == [("C", 30)]
    whole = [{"city": row["city"], "land": "AB"[i // 4]} for i, row in enumerate(lands)]
    assert shown(query, [visits("x", 5, "who"), places], rows, whole) == [("A", 40), ("B", 40)]


FAN_OUT = [
    "SELECT count(*) FROM visits JOIN places ON g = city",
    "SELECT sum(v) FROM visits JOIN places ON g = city",
    "SELECT land, sum(v) FROM visits LEFT JOIN places ON g = city GROUP BY 1",
    "SELECT count(*) FROM places JOIN visits ON g = city",
    "SELECT count(*), sum(v) FROM places LEFT JOIN visits ON g = city",
]


@pytest.mark.parametrize("query", FAN_OUT)
def test_a_row_counts_once(query: str) -> None:
    places = table("places", "y", aggregate(1), column("city", "string", "join"), column("land", "string", "group"))
    rows = rows_of({"a": 5, "b": 5})
    doubled = [{"city": "a", "land": f"L{i % 2}"} for i in range(1000)] + [{"city": "b", "land": "L0"}]
    assert refusal(query, [visits("x", 5, "who"), places], rows, doubled) == "fan-out"


def test_a_row_counts_once_though_others_have_no_partner() -> None:
    places = table("places", "y", aggregate(1), column("city", "string", "join"), column("land", "string", "group"))
    rows = rows_of({"a": 5, "b": 500})
    assert refusal(FAN_OUT[0], [visits("x", 5, "who"), places], rows, [{"city": "a"}, {"city": "a"}]) == "fan-out"


def test_count_of_rows_in_an_outer_join_counts_the_first_table_too() -> None:
    places = table("places", "y", aggregate(1), column("city", "string", "join"), column("land", "string", "group"))
    rows, cities = rows_of({"a": 5, "b": 5}), [{"city": city, "land": "A"} for city in "abc"]
    described = [visits("x", 5, "who"), places]
    both = "SELECT count(*) AS n, sum(v) AS s FROM places"
    assert shown(f"{both} JOIN visits ON g = city", described, rows, cities) == [(10, 10)]
    assert refusal(f"{both} LEFT JOIN visits ON g = city", described, rows, cities) == "fan-out"
    assert shown("SELECT sum(v) AS s FROM places LEFT JOIN visits ON g = city", described, rows, cities) == [(10,)]


def test_a_join_of_everything_with_everything_ends_early() -> None:
    places = table("places", "y", aggregate(1), column("city", "string", "join"))
    rows, doubled = rows_of({"a": 20_000}), [{"city": "a"}] * 20_000
    assert refusal(FAN_OUT[0], [visits("x", 5, "who"), places], rows, doubled) == "fan-out"


def test_keys_that_are_null_do_not_fan_out() -> None:
    places = table("places", "y", aggregate(1), column("city", "string", "join"))
    cities: Rows = [{"city": None}, {"city": None}, {"city": "z"}, {"city": "a"}]
    rows = [*rows_of({"a": 5}), {"who": 9, "g": None, "v": 1}, {"who": 10, "g": None, "v": 1}]
    assert shown(FAN_OUT[0], [visits("x", 5, "who"), places], rows, cities) == [(5,)]


KEYS = {"a": "int64", "b": "string"}
NEIGHBOURS = [-(2**63), -65, -64, -1, 0, 1, 32, 63, 64, 2**63 - 64, 2**63 - 1]  # of one word of bits, and of the next


@pytest.mark.parametrize("doubled", [None, *NEIGHBOURS])
@pytest.mark.parametrize("keys", [("a", "b"), ("b", "a")])
def test_neighbouring_keys_are_not_the_same(keys: tuple[str, str], doubled: int | None) -> None:
    """Whole numbers are compared 64 at a time; a compound key begins with one, or does not."""
    described = [
        table("rows", "x", aggregate(1), *(column(k, t, "join") for k, t in KEYS.items()), column("v", "int64", "sum")),
        table("places", "y", aggregate(1), *(column(k, t, "join") for k, t in KEYS.items())),
    ]
    query = f"SELECT sum(v) AS s FROM rows JOIN places ON {' AND '.join(f'rows.{k} = places.{k}' for k in keys)}"
    places: Rows = [{"a": a, "b": b} for a in NEIGHBOURS for b in "xy"]
    rows: Rows = [{**place, "v": 1} for place in places]
    if doubled is None:
        assert shown(query, described, rows, places) == [(len(places),)]
    else:
        assert refusal(query, described, rows, [*places, {"a": doubled, "b": "y"}]) == "fan-out"


@pytest.mark.parametrize("query", [*FAN_OUT, "SELECT sum(v) AS s FROM visits JOIN places ON g = city WHERE land = 'A'"])
@pytest.mark.parametrize("matched", [False, True])
def test_fan_out_does_not_tell_whether_a_key_has_a_partner(query: str, matched: bool) -> None:
    use = column("land", "string", "group", "filter")
    places = table("places", "y", aggregate(1), column("city", "string", "join"), use)
    rows = rows_of({"a": 9} | ({"probe": 1} if matched else {}))
    cities = [{"city": city, "land": land} for city, land in (("a", "A"), ("probe", "B"), ("probe", "B"))]
    assert refusal(query, [visits("x", 5, "who"), places], rows, cities) == "fan-out"


def test_keys_are_judged_over_all_owners_all_columns_and_all_steps_of_the_joins() -> None:
    facts = table("facts", "x", aggregate(1), column("a", "int64", "join"), column("b", "int64", "join"),
                  column("v", "int64", "sum"))  # fmt: skip
    firsts = [table("first", owner, aggregate(1), *(column(name, "int64", "join") for name in "abc")) for owner in "yz"]
    last = table("last", "w", aggregate(1), column("c", "int64", "join"))
    query = "SELECT sum(v) AS v FROM facts f JOIN first s ON f.a = s.a AND f.b = s.b JOIN last t ON s.c = t.c"
    rows: Rows = [{"a": 1, "b": 1, "v": 1}, {"a": 1, "b": 2, "v": 2}]
    one, two, null = ({"a": 1, "b": 1, "c": 7}, {"a": 1, "b": 2, "c": 7}, {"a": 5, "b": None, "c": 7})

    def outcome(y: Rows, z: Rows, w: Rows) -> Any:
        try:
            return shown(query, [facts, *firsts, last], rows, y, z, w)
        except ProgramRefused as refused:
            return refused.code

    assert outcome([one, null, null], [two, null], [{"c": 7}, {"c": None}, {"c": None}]) == [(3,)]
    assert outcome([one], [two, {"a": 5, "b": 5, "c": 7}], [{"c": 7}]) == [(3,)]
    assert outcome([one, {"a": 5, "b": 5, "c": 7}], [two, {"a": 5, "b": 5, "c": 8}], [{"c": 7}]) == "fan-out"
    assert outcome([one], [two], [{"c": 7}, {"c": 8}, {"c": 8}]) == "fan-out"


def test_exact_beside_aggregate() -> None:
    free = table("places", "y", EXACT, column("city", "string"), column("land", "string"))
    rows, cities = rows_of({"a": 5, "b": 4, "c": 9}), [{"city": city, "land": city.upper()} for city in "abc"]
    query = "SELECT land, count(*) AS n, count(DISTINCT city) AS c FROM visits JOIN places ON g = city GROUP BY land"
    assert refusal(query, [visits("x", 5, "who"), free], rows, [*cities, {"city": "a", "land": "X"}]) == "fan-out"
    one_each = [{"who": i, "g": city, "v": 1} for i, city in enumerate("abc")]
    assert shown(query, [visits("x", 1, "who"), free], one_each, cities) == [("A", 1, 1), ("B", 1, 1), ("C", 1, 1)]
    only_grouped = "SELECT land, count(*) AS n FROM visits JOIN places ON g = city GROUP BY land"
    assert shown(only_grouped, [visits("x", 5, "who"), free], rows, cities) == [("C", 9)]


# a random world against an oracle in plain Python

FACTS = [
    table("facts", owner, aggregate(k, "who"), column("who", "int64"), column("key", "int64", "join"),
          column("g", "string", "group", "filter"), column("x", "int64", "sum", "avg", "count", "count_distinct"))
    for owner, k in (("x", 3), ("y", 2))
]  # fmt: skip
NOTES = table(
    "notes", "z", aggregate(2, "id"), column("id", "int64", "join"), column("h", "int64", "group", buckets=[2, 4])
)
FACT = st.fixed_dictionaries(
    {
        "who": st.integers(0, 9),
        "key": st.none() | st.integers(0, 7),
        "g": st.sampled_from(["a", "b", "c", None]),
        "x": st.none() | st.integers(-5, 5),
    }
)
NOTE = st.fixed_dictionaries({"id": st.none() | st.integers(0, 7), "h": st.none() | st.integers(0, 6)})
AGGREGATES: dict[str, Callable[[list[int]], Any]] = {
    "sum(x)": lambda values: sum(values) if values else None,
    "avg(x)": lambda values: sum(values) / len(values) if values else None,
    "count(x)": len,
    "count(DISTINCT x)": lambda values: len(set(values)),
}


def bucket(value: int | None) -> str | None:
    return None if value is None else "< 2" if value < 2 else "[2, 4)" if value < 4 else ">= 4"


@settings(max_examples=40, deadline=None)
@given(
    parts=st.tuples(st.lists(FACT, max_size=60), st.lists(FACT, max_size=30)),
    notes=st.lists(NOTE, max_size=12),
    join=st.sampled_from(["", "JOIN", "LEFT JOIN"]),
    keep=st.none() | st.sampled_from(["a", "b"]),
    by=st.sets(st.sampled_from(["g", "bucket(h)"])),
    outputs=st.lists(st.sampled_from(sorted(AGGREGATES)), max_size=3, unique=True),
)
def test_no_group_below_k_and_every_other_value_right(
    parts: tuple[Rows, Rows], notes: Rows, join: str, keep: str | None, by: set[str], outputs: list[str]
) -> None:
    by = by if join else by - {"bucket(h)"}
    keys, select = sorted(by), [*sorted(by), "count(*)", *outputs]
    query = f"SELECT {', '.join(select)} FROM facts {f'{join} notes ON key = id' if join else ''}"
    query += f" WHERE g = '{keep}'" if keep else ""
    query += f" GROUP BY {', '.join(keys)}" if keys else ""
    described = [*FACTS, NOTES]
    joined = []
    for source, part in enumerate(parts):
        for row in part:
            partners = [note for note in notes if join and note["id"] is not None and note["id"] == row["key"]]
            if join == "LEFT JOIN" or not join:
                partners = partners or [{}]
            joined += [(source, id(row), row, note) for note in partners if keep in (None, row["g"])]
    ids = [note["id"] for note in notes if note["id"] is not None]
    if join and len(set(ids)) < len(ids):
        assert refusal(query, described, *parts, notes) == "fan-out"
        return
    found = {row[: len(keys)]: row[len(keys) :] for row in shown(query, described, *parts, notes)}

    groups = defaultdict(list)
    for source, _, row, note in joined:
        values = {"g": row["g"], "bucket(h)": bucket(note.get("h"))}
        groups[tuple(values[key] for key in keys)].append((source, row, note))

    needed: dict[Any, int] = {0: 3, (0, "x"): 3, (0, "no x"): 3}

    def supports(members: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> dict[Any, set[Any]]:
        entities: dict[Any, set[Any]] = defaultdict(set)
        for source, row, note in members:
            entities[source].add(row["who"])
            if row["x"] is not None and outputs:
                entities[source, "x"].add(row["who"])
            if row["x"] is None and (
                {*outputs} & {"count(x)", "count(DISTINCT x)"} or {*outputs} >= {"sum(x)", "avg(x)"}
            ):
                entities[source, "no x"].add(row["who"])
            if note:
                entities[2].add(note["id"])
        return entities

    def enough(members: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> bool:
        return all(len(entities) >= needed.get(support, 2) for support, entities in supports(members).items())

    assert found.keys() <= groups.keys()
    for group, result in found.items():
        assert enough(groups[group])
        xs = [row["x"] for _, row, _ in groups[group] if row["x"] is not None]
        assert result == pytest.approx((len(groups[group]), *(AGGREGATES[name](xs) for name in outputs)))
    rest = [member for group in groups.keys() - found.keys() for member in groups[group]]
    may_show = [group for group in groups if enough(groups[group])]
    left_out = {support for support, entities in supports(rest).items()}
    shown_supports = {support for group in found for support in supports(groups[group])}
    # Left out is what must be, and one more group at most for each support that then holds too little.
    assert len(may_show) - len(found) <= len(left_out)
    if len(may_show) == len(groups):
        assert len(found) == len(groups)
    for support, entities in supports(rest).items():
        assert support not in shown_supports or len(entities) >= needed.get(support, 2)


# evasions

PLACE = "has no place here"
EVASIONS = [
    ("SELECT sum(CASE WHEN customer = 'c7' THEN amount END) FROM orders", "CASE"),
    ("SELECT sum(amount * (items = 7)::INT) FROM orders", "function '*'"),
    ("SELECT sum(amount + 1) FROM orders", "function '+'"),
    ("SELECT sum(items * pow(2, items)) FROM orders", "function '*'"),
    ("SELECT sum(ascii(substr(secret, 1))) FROM orders", "function 'ascii'"),
    ("SELECT sum(amount::INT) FROM orders", "a cast"),
    ("SELECT sum(TRY_CAST(secret AS INT)) FROM orders", "a cast"),
    ("SELECT count(*) FROM orders WHERE customer <> 'c7'", "singles out"),
    ("SELECT count(*) FROM orders WHERE channel <> 'web'", "singles out"),
    ("SELECT count(*) FROM orders WHERE channel NOT IN ('web')", "singles out"),
    ("SELECT count(*) FROM orders WHERE NOT channel = 'web'", "singles out"),
    ("SELECT count(*) FROM orders WHERE items NOT BETWEEN 1 AND 2", "singles out"),
    ("SELECT count(*) FROM orders WHERE channel IS DISTINCT FROM 'web'", "singles out"),
    ("SELECT count(*) FROM orders WHERE channel = 'web' OR paid = true", "OR"),
    ("SELECT count(*) FROM orders WHERE channel LIKE 'w%'", "function '~~'"),
    ("SELECT count(*) FROM orders WHERE channel ~ 'w.*'", "function 'regexp"),
    ("SELECT count(*) FROM orders WHERE items + 0 = 1", "function '+'"),
    ("SELECT count(*) FROM orders WHERE items = items", "column ref has no place"),
    ("SELECT count(*) FROM orders WHERE items % 2 = 1", "function '%'"),
    ("SELECT count(*) FROM orders WHERE items = '5'::INT", "a cast"),
    ("SELECT count(*) FROM orders WHERE items = 1 / 0", "function '/'"),
    ("SELECT count(*) FROM orders WHERE paid", "column ref has no place"),
    ("SELECT count(*) FROM orders WHERE true", "a constant"),
    ("SELECT count(*) FROM orders WHERE items = (SELECT max(age) FROM people)", "a subquery"),
    ("SELECT count(*) FROM orders WHERE EXISTS (SELECT 1 FROM people WHERE id = customer)", "a subquery"),
    ("SELECT count(*) FROM orders WHERE items IN (SELECT age FROM people)", "a subquery"),
    ("SELECT channel, count(*) FROM orders GROUP BY 1 HAVING sum(amount) > 10", "HAVING"),
    ("SELECT channel, count(*) FROM orders GROUP BY 1 QUALIFY true", "QUALIFY"),
    ("SELECT channel, count(*) FROM orders GROUP BY 1 LIMIT 1", "LIMIT"),
    ("SELECT channel, count(*) FROM orders GROUP BY 1 LIMIT 50%", "LIMIT"),
    ("SELECT channel, count(*) FROM orders GROUP BY 1 OFFSET 1", "LIMIT"),
    ("SELECT DISTINCT channel FROM orders", "DISTINCT"),
    ("SELECT DISTINCT ON (channel) channel FROM orders GROUP BY channel", "DISTINCT"),
    ("SELECT count(*) FROM orders TABLESAMPLE 10%", "a sample"),
    ("SELECT count(*) FROM orders USING SAMPLE 5", "a sample"),
    ("SELECT sum(amount) OVER () FROM orders", "a window function"),
    ("SELECT row_number() OVER (ORDER BY amount) FROM orders", "window"),
    ("SELECT count(*) FILTER (WHERE items = 7) FROM orders", "FILTER"),
    ("SELECT sum(DISTINCT items) FROM orders", "sum(DISTINCT"),
    ("SELECT sum(items ORDER BY customer) FROM orders", "ORDER BY in"),
    ("SELECT max(amount) FROM orders", "max(…)"),
    ("SELECT min(amount), any_value(amount) FROM orders", "min(…)"),
    ("SELECT list(amount) FROM orders", "list(…)"),
    ("SELECT string_agg(secret, ',') FROM orders", "string_agg(…)"),
    ("SELECT histogram(items) FROM orders", "histogram(…)"),
    ("SELECT [amount] FROM orders", "list_value(…)"),
    ("SELECT amount[1] FROM orders", "array extract"),
    ("SELECT {'a': amount} FROM orders", "a named argument of 'struct_pack'"),
    ("SELECT to_json(orders) FROM orders", "to_json(…)"),
    ("SELECT orders FROM orders", "no column 'orders'"),
    ("SELECT * FROM orders", "star"),
    ("SELECT orders.* FROM orders", "star"),
    ("SELECT COLUMNS('amo.*') FROM orders", "star"),
    ("SELECT count(COLUMNS(*)) FROM orders", "star"),
    ("SELECT secret FROM orders GROUP BY secret", "shop does not allow group of orders.secret"),
    ('SELECT "SECRET" FROM orders GROUP BY 1', "shop does not allow group of orders.secret"),
    ("SELECT count(secret) FROM orders", "shop does not allow count of orders.secret"),
    ("SELECT amount, count(*) FROM orders GROUP BY 1", "shop does not allow group of orders.amount"),
    ("SELECT bucket(amount), count(*) FROM orders GROUP BY 1", "shop does not allow group of orders.amount"),
    ("SELECT age, count(*) FROM people GROUP BY 1", "in buckets only"),
    ("SELECT count(*) FROM people WHERE age = 18", "in buckets only"),
    ("SELECT count(*) FROM people WHERE bucket(age) < '[18, 42.5)'", "names of its buckets"),
    ("SELECT count(*) FROM people WHERE bucket(age) = '[17, 18)'", "one of < 18, [18, 42.5), [42.5, 65), >= 65"),
    ("SELECT bucket(age, 1) FROM people GROUP BY 1", "its edges are the owner's"),
    ("SELECT bucket(segment) FROM people GROUP BY 1", "has no buckets"),
    ("SELECT main.bucket(age) FROM people GROUP BY 1", "a schema"),
    ("SELECT sum(age) FROM people", "Crm does not allow sum of people.age"),
    ("SELECT count(*) FROM orders o JOIN people p ON o.channel = p.segment", "does not allow join of orders.channel"),
    ("SELECT count(*) FROM orders, people", "a cross join"),
    ("SELECT count(*) FROM orders CROSS JOIN people", "a cross join"),
    ("SELECT count(*) FROM orders NATURAL JOIN people", "a natural join"),
    ("SELECT count(*) FROM orders JOIN people ON true", "a constant"),
    ("SELECT count(*) FROM orders JOIN people ON customer >= id", "compare greaterthanorequalto"),
    ("SELECT count(*) FROM orders JOIN people ON customer = id OR paid", "OR"),
    ("SELECT count(*) FROM orders FULL JOIN people ON customer = id", "a full join"),
    ("SELECT count(*) FROM orders SEMI JOIN people ON customer = id", "a semi join"),
    ("SELECT count(*) FROM orders ANTI JOIN people ON customer = id", "a anti join"),
    ("SELECT count(*) FROM orders POSITIONAL JOIN people", "a positional join"),
    ("SELECT count(*) FROM orders ASOF JOIN people ON customer >= id", "a asof join"),
    ("SELECT count(*) FROM orders a JOIN orders b ON a.customer = b.customer", "used twice"),
    ("SELECT count(*) FROM orders JOIN (SELECT * FROM people) p ON customer = id", "a subquery"),
    ("SELECT count(*) FROM orders JOIN LATERAL (SELECT 1) ON true", "a subquery"),
    ("SELECT count(*) FROM (SELECT * FROM orders)", "a subquery"),
    ("WITH o AS (SELECT * FROM orders) SELECT count(*) FROM o", "WITH"),
    ("WITH RECURSIVE r AS (SELECT 1 UNION ALL SELECT 1 FROM r) SELECT count(*) FROM orders", "WITH"),
    ("SELECT count(*) FROM orders UNION ALL SELECT count(*) FROM people", "UNION"),
    ("SELECT count(*) FROM orders EXCEPT SELECT 1", "UNION"),
    ("SELECT channel, count(*) FROM orders GROUP BY ROLLUP (channel)", "grouping sets"),
    ("SELECT channel, count(*) FROM orders GROUP BY CUBE (channel)", "grouping sets"),
    ("SELECT channel, count(*) FROM orders GROUP BY GROUPING SETS ((channel), ())", "grouping sets"),
    ("SELECT count(*) FROM orders GROUP BY channel", "not in the SELECT list"),
    ("SELECT channel, count(*) FROM orders", "neither aggregated nor in GROUP BY"),
    ("SELECT channel, count(*) FROM orders GROUP BY channel ORDER BY avg(amount)", "not in the SELECT list"),
    ("SELECT channel, count(*) FROM orders GROUP BY channel ORDER BY random()", "random(…)"),
    ("SELECT count(*) AS n FROM orders GROUP BY n", "names an aggregate"),
    ("SELECT channel AS paid, paid AS channel FROM orders GROUP BY channel, paid", ""),
    ("SELECT #1 FROM orders", "positional reference"),
    ("SELECT count(*), 3 FROM orders", "a constant"),
    ("SELECT random(), count(*) FROM orders", "random(…)"),
    ("SELECT now() FROM orders", "now(…)"),
    ("SELECT current_setting('threads') FROM orders", "current_setting(…)"),
    ("SELECT current_date FROM orders GROUP BY 1", "no column 'current_date'"),
    ("SELECT rowid FROM orders GROUP BY 1", "no column 'rowid'"),
    ("SELECT count(*) FROM orders AS o(customer, secret)", "renaming columns"),
    ("SELECT count(*) FROM main.orders", "a schema before a table"),
    ("SELECT count(*) FROM 'orders.csv'", "no table 'orders.csv'"),
    ("SELECT count(*) FROM read_csv('/etc/passwd')", "a table function"),
    ("SELECT count(*) FROM query('SELECT 1')", "a table function"),
    ("SELECT count(*) FROM query_table('orders')", "a table function"),
    ("SELECT count(*) FROM range(10)", "a table function"),
    ("SELECT count(*) FROM duckdb_settings()", "a table function"),
    ("SELECT count(*) FROM duckdb_tables", "no table"),
    ("SELECT count(*) FROM information_schema.tables", "a schema before a table"),
    ("DESCRIBE orders", ""),
    ("SUMMARIZE orders", ""),
    ("SHOW TABLES", ""),
    ("VALUES (1)", ""),
    ("SELECT count(*) FROM orders; SELECT 1", "exactly one SELECT"),
    ("COPY orders TO '/tmp/x'", "exactly one SELECT"),
    ("ATTACH '/tmp/x' AS x", "exactly one SELECT"),
    ("PRAGMA database_list", "exactly one SELECT"),
    ("SET threads = 4", "exactly one SELECT"),
    ("CREATE MACRO f(x) AS x", "exactly one SELECT"),
    ("INSTALL httpfs", "exactly one SELECT"),
    ("EXPLAIN ANALYZE SELECT 1", "exactly one SELECT"),
    ("PIVOT orders ON channel USING sum(amount)", "exactly one SELECT"),
    ("SELECT count(*) FROM orders WHERE items = $1", "parameters"),
    ("SELECT count(*) FROM orders WHERE items = ?", "parameters"),
    ("SELECT /* count(*) */ secret -- count(*)\nFROM orders", "query 1:23: shop does not allow group of orders.secret"),
    ("", "exactly one SELECT"),
    (";", "exactly one SELECT"),
    ("SELECT", "exactly one SELECT"),
    ("SELECT " + "(" * 3000 + "1" + ")" * 3000, "exactly one SELECT"),
    ("SELECT 1" + " + 1" * 900, "cannot read it"),
]  # fmt: skip


@pytest.mark.parametrize(("query", "reason"), EVASIONS, ids=range(len(EVASIONS)))
def test_evasions_are_refused(query: str, reason: str) -> None:
    described = agreed(query)
    with pytest.raises(ContractError) as refused:
        sql.check(described)
    assert reason in str(refused.value)


def test_the_enclave_checks_again_before_it_looks_at_tables() -> None:
    with pytest.raises(ProgramRefused) as refused:
        sql.run(agreed(EVASIONS[0][0]), [])
    assert refused.value.code == "query"


MISTAKES = [
    ("SELECT count(*)\n FROM ordres", "query 2:7: no table 'ordres' in the contract: expected one of orders, people"),
    ("SELECT 'ä', coutn(amount) FROM orders", "query 1:8: a constant has no place here"),
    ("SELECT segment, coutn(*) FROM people GROUP BY 1", "query 1:17: 'coutn(…)' has no place here"),
    ("SELECT segmnt FROM people GROUP BY 1", "query 1:8: no column 'segmnt' in the tables of FROM"),
    ("SELECT count(*) AS a, count(*) AS A FROM people", "two outputs are called 'A'"),
    ("SELECT count(*) FROM people WHERE segment = 5", "the constant: expected a string, got integer '5'"),
    ("SELECT count(*) FROM orders WHERE items = 1.5", "expected a int64, got numeric '1.5'"),
    ("SELECT count(*) FROM orders WHERE items = 99999999999999999999", "expected a int64"),
    ("SELECT count(*) FROM orders WHERE day = '2026-02-30'", "expected a date, got string '2026-02-30'"),
    ("SELECT count(*) FROM orders WHERE channel = NULL", "got null literal"),
    ("SELECT segment, count(*) FROM people GROUP BY 2", "query 1:8: segment is neither aggregated nor in GROUP BY"),
    ("SELECT segment, count(*) FROM people GROUP BY 3", "the position: expected 1 to 2"),
    ("SELECT count(*) FROM orders o JOIN people o ON customer = id", "alias 'o' is used twice"),
    ("SELECT count(*) FROM orders JOIN people USING (customer)", "USING ('customer')"),
    ("SELECT count(*) FROM orders JOIN people ON segment = id", "a column of people = one of a table before"),
    ("SELECT count(*) FROM orders JOIN people ON items = id", "items and id are of two types: expected join columns"),
    (
        "SELECT segment AS g, note FROM people GROUP BY 1",
        "Crm does not allow group of people.note: expected a use that",
    ),
]


@pytest.mark.parametrize(("query", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_told_with_place_and_remedy(query: str, words: str) -> None:
    with pytest.raises(ContractError) as refused:
        sql.check(agreed(query))
    assert words in str(refused.value)
    assert "query 1:" in str(refused.value) or "query 2:" in str(refused.value)


def test_stacked_owners_must_agree() -> None:
    def owner(name: str, kind: str, *, buckets: tuple[int, int] = (0, 1), entity: str = "id", clamp: int = 9) -> Table:
        use = ("group", "sum") if kind == "all" else ("group",)
        value = column("v", "int64", *use, buckets=buckets, clamp=(0, clamp))
        return table("t", name, aggregate(2, entity), column("id", "int64"), column("other", "int64"), value)

    def words(other: Table, query: str) -> str:
        with pytest.raises(ContractError) as refused:
            sql.check(contract([owner("x", "all"), other], query))
        return str(refused.value)

    groups, sums = "SELECT bucket(v) FROM t GROUP BY 1", "SELECT sum(v) FROM t"
    assert "y does not allow sum of t.v" in words(owner("y", "group"), sums)
    assert "buckets of t.v: expected the same for all owners (x, y)" in words(owner("y", "all", buckets=(0, 2)), groups)
    assert "clamp of t.v: expected the same" in words(owner("y", "all", clamp=8), sums)
    assert "the entity of table t" in words(owner("y", "all", entity="other"), sums)


def test_an_enclave_too_small_for_the_engine_is_refused_before_consent() -> None:
    with pytest.raises(ContractError, match="enclave memory: expected at least 320 MiB, got 319 MiB"):
        sql.check(agreed("SELECT count(*) FROM orders", memory_bytes=319 << 20))


def test_tables_whose_names_differ_in_case_only() -> None:
    tables = [table(name, "x", aggregate(1), column("v", "int64", "sum")) for name in ("Visit", "visit")]
    with pytest.raises(ContractError, match="in other letter cases"):
        sql.check(contract(tables, "SELECT sum(v) FROM visit"))


# what people are told


def test_disclosure_says_why_each_column_is_allowed_and_who_could_cheat() -> None:
    described = agreed(
        "SELECT bucket(age) AS age, avg(items) AS items, sum(weight) AS w, count(*) AS n "
        "FROM orders JOIN people ON customer = id GROUP BY 1",
        recipients=("shop", "analyst"),
    )
    told = sql.check(described)
    assert told.recipients == ("shop", "analyst")
    assert dict(told.columns) == {
        "age": "groups by people.age, in buckets 18.0, 42.5, 65.0: Crm allows group",
        "items": "average of orders.items, each first moved into [0.0, 5.0]: shop allows avg",
        "w": "sum of orders.weight: shop allows sum",
        "n": "number of rows",
    }
    assert any("orders of shop" in rule and "at least 3 distinct customer" in rule for rule in told.rules)
    assert any("people of Crm" in rule and "at least 3 distinct id" in rule for rule in told.rules)
    assert any(
        "shop contributes rows and receives the result" in warning and "Crm" in warning for warning in told.warnings
    )
    assert any("orders.weight has no clamp" in warning for warning in told.warnings)
    assert not any("items" in warning for warning in told.warnings)


# exact


def exact(query: str, **options: Any) -> Contract:
    free = [table("mine", "x", EXACT, column("id", "int64"), column("v", "double"), column("d", "date"))]
    free += [table("mine", "y", EXACT, column("id", "int64"), column("v", "double"), column("d", "date"))]
    return contract(free, query, **options)


def run_exact(query: str) -> list[tuple[Any, ...]]:
    described = exact(query)
    sql.check(described)
    rows = [[{"id": i, "v": i / 4, "d": date(2026, 1, 1 + i)} for i in part] for part in (range(3), range(3, 5))]
    tables = [arrow(table, part) for table, part in zip(described.tables, rows, strict=True)]
    return [tuple(row.values()) for row in read(sql.run(described, tables)["analyst"])]


def test_exact_runs_the_agreed_text_over_stacked_tables() -> None:
    assert run_exact("SELECT sum(id) AS s, max(v) AS m, count(*) AS n FROM mine") == [(10, 1.0, 5)]
    assert run_exact("SELECT id, d FROM mine WHERE id <> 3 ORDER BY id DESC LIMIT 2") == [
        (4, date(2026, 1, 5)),
        (2, date(2026, 1, 3)),
    ]
    query = "WITH m AS (SELECT *, row_number() OVER (ORDER BY v DESC) AS r FROM mine) SELECT r FROM m WHERE id = 0"
    assert run_exact(query) == [(5,)]
    assert run_exact("SELECT CASE WHEN v > 0.5 THEN 'hi' END AS c, d::VARCHAR AS t FROM mine WHERE id IN (0, 4)") == [
        (None, "2026-01-01"),
        ("hi", "2026-01-05"),
    ]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SELECT * FROM read_csv('/etc/passwd')", "table function"),
        ("SELECT * FROM mine, range(3)", "table function"),
        ("SELECT * FROM '/etc/passwd'", "no table '/etc/passwd'"),
        ("SELECT * FROM duckdb_settings", "no table"),
        ("SELECT * FROM information_schema.tables", "base table"),
        ("SELECT getenv('HOME') FROM mine", "getenv"),
        ("SELECT current_setting('threads') AS a FROM mine", "current_setting"),
        ("SELECT random() AS r FROM mine", "random"),
        ("SELECT now() AS r FROM mine", "now"),
        ("SELECT current_date AS r FROM mine", "current_date"),
        ("SELECT uuid()::VARCHAR AS r FROM mine", "uuid"),
        ("SELECT reservoir_quantile(v, 0.5) AS r FROM mine", "reservoir_quantile"),
        ("SELECT * FROM mine USING SAMPLE 2", "select node"),
        ("SELECT * FROM (SELECT * FROM mine TABLESAMPLE 10%)", "base table"),
        ("SELECT x FROM mine", "Binder Error"),
        ("SELECT list(v) AS l FROM mine", "a plain value: cast it"),
        ("SELECT id, id FROM mine", "two outputs of one name"),
        ("SELECT 1; SELECT 2", "exactly one SELECT"),
        ("COPY mine TO '/tmp/x'", "exactly one SELECT"),
        ("SELECT $1 AS a", "parameters"),
    ],
)
def test_exact_stays_inside_its_tables(query: str, words: str) -> None:
    with pytest.raises(ContractError) as refused:
        sql.check(exact(query))
    assert words in str(refused.value)


def test_no_word_of_the_engine_leaves() -> None:
    described = exact("SELECT d::VARCHAR::INT AS canary FROM mine")
    tables = [arrow(table, [{"id": 1, "v": 0.5, "d": date(2026, 1, 1)}]) for table in described.tables]
    with pytest.raises(ProgramRefused) as refused:
        sql.run(described, tables)
    assert (refused.value.code, refused.value.table_index) == ("engine", None)
    assert "2026" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_limits_have_their_own_words() -> None:
    described = exact("SELECT a.id AS x, b.id AS y, c.id AS z FROM mine a, mine b, mine c", memory_bytes=1 << 29)
    wide = [arrow(table, [{"id": i, "v": 0.0, "d": None} for i in range(80)]) for table in described.tables]
    with pytest.raises(ProgramRefused) as refused:
        sql.run(described, wide)
    assert refused.value.code == "result-size"
    query = "SELECT a.id AS x FROM mine a, mine b, mine c ORDER BY hash(a.id, b.id, c.id)"
    described = exact(query, memory_bytes=1 << 26)
    with pytest.raises(ProgramRefused) as refused:
        sql.run(described, wide)
    assert refused.value.code == "memory"
