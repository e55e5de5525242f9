"""DuckDB alone: the join on both owners' files at once, which no owner would allow.

    python -m bench.alone {protected|plain} FOLDER SUFFIX

`protected` gives the answer that the enclave gives: groups that rest on fewer than K entities of an owner are hidden,
what is hidden holds no entity or at least K of each owner, and no row counts twice. `plain` is the bare query.
Prints JSON: the seconds from connecting to the last row, after imports, and the rows.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import duckdb

from bench.inputs import AGES, CLAMP, CPUS, K

ENTITIES = ("card", "customer")
BUCKET = "CASE " + " ".join(f"WHEN c.age < {edge} THEN {i}" for i, edge in enumerate(AGES)) + f" ELSE {len(AGES)} END"
JOINED = f"""SELECT c.region, p.category, {BUCKET} AS age, least(greatest(p.amount, {CLAMP[0]}), {CLAMP[1]}) AS amount,
    p.card, p.customer FROM {{purchases}} AS p JOIN {{customers}} AS c ON c.customer = p.customer"""
TOTALS = "sum(amount) AS spent, avg(amount) AS mean, count(*) AS purchases"
GROUP = "region, category, age"

Rows = list[tuple[Any, ...]]


def plain(connection: duckdb.DuckDBPyConnection, joined: str) -> Rows:
    return connection.execute(f"SELECT {GROUP}, {TOTALS} FROM ({joined}) GROUP BY ALL ORDER BY {GROUP}").fetchall()


def protected(connection: duckdb.DuckDBPyConnection, joined: str, customers: str) -> Rows:
    run = connection.execute
    run(f"CREATE TEMP TABLE joined AS {joined}")
    # An amount counts once if no customer is there twice.
    rows, distinct = run(f"SELECT count(*), count(DISTINCT customer) FROM {customers}").fetchall()[0]
    assert rows == distinct
    counts = ", ".join(f"count(DISTINCT {entity}) AS {entity}" for entity in ENTITIES)
    few = " OR ".join(f"{entity} < {K}" for entity in ENTITIES)
    run(
        f"CREATE TEMP TABLE groups AS SELECT *, {few} AS hidden FROM "
        f"(SELECT {GROUP}, {TOTALS}, {counts} FROM joined GROUP BY ALL)"
    )
    while short := _short(connection, counts):
        run(
            f"UPDATE groups SET hidden = true WHERE ({GROUP}) = "
            f"(SELECT ({GROUP}) FROM groups WHERE NOT hidden ORDER BY {short}, {GROUP} LIMIT 1)"
        )
    return run(f"SELECT {GROUP}, spent, mean, purchases FROM groups WHERE NOT hidden ORDER BY {GROUP}").fetchall()


def _short(connection: duckdb.DuckDBPyConnection, counts: str) -> str | None:
    """The owner's entity of which the hidden groups together hold too few, while groups are shown."""
    hidden, shown = connection.execute(
        "SELECT count(*) FILTER (hidden), count(*) FILTER (NOT hidden) FROM groups"
    ).fetchall()[0]
    if not hidden or not shown:
        return None
    found = connection.execute(
        f"SELECT {counts} FROM joined SEMI JOIN (FROM groups WHERE hidden) USING ({GROUP})"
    ).fetchall()[0]
    return next((entity for entity, count in zip(ENTITIES, found, strict=True) if 0 < count < K), None)


def clear_text(folder: Path, suffix: str) -> tuple[str, str]:
    """SQL of the joined rows, and of the customers."""
    purchases, customers = (f"read_{suffix}('{folder / name}.{suffix}')" for name in ("purchases", "customers"))
    return JOINED.format(purchases=purchases, customers=customers), customers


def main() -> None:
    what, folder, suffix = sys.argv[1:]
    joined, customers = clear_text(Path(folder), suffix)
    began = time.perf_counter()
    with duckdb.connect(config={"threads": CPUS}) as connection:
        rows = plain(connection, joined) if what == "plain" else protected(connection, joined, customers)
    json.dump({"seconds": time.perf_counter() - began, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    main()
