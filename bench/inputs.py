"""What is measured on: tables that follow from a seed, in files, and the scenario that joins them."""

from pathlib import Path

import duckdb

SEED = 20261123
CPUS = 2  # of the enclave, and threads of the engine that it is compared with
CATEGORIES = ("food", "home", "garden", "travel", "books", "sport", "music", "rare")
REGIONS = ("north", "east", "south", "west", "islands", "nowhere")  # the last two hold few: some groups are too small
AGES = (18, 30, 45, 65)
K = 10
CLAMP = (0.0, 500.0)

QUERY = """
SELECT c.region AS region, p.category AS category, bucket(c.age) AS age,
       sum(p.amount) AS spent, avg(p.amount) AS mean, count(*) AS purchases
FROM purchases p JOIN customers c ON c.customer = p.customer
GROUP BY 1, 2, 3
ORDER BY 1, 2, 3
"""

_SCENARIO = """
[scenario]
name = "bench-join"
[enclave]
cpus = {cpus}
memory = "4 GiB"
[party.shop.table.purchases]
source = "purchases.{suffix}"
bytes_max = "1 GiB"
rule = {{ kind = "aggregate", entity = "card", k = {k} }}
[party.shop.table.purchases.columns]
card = {{ type = "int64" }}
customer = {{ type = "int64", use = ["join"] }}
category = {{ type = "string", use = ["group"] }}
amount = {{ type = "double", use = ["sum", "avg", "count"], clamp = [{clamp[0]}, {clamp[1]}] }}
[party.bank.table.customers]
source = "customers.{suffix}"
bytes_max = "1 GiB"
rule = {{ kind = "aggregate", entity = "customer", k = {k} }}
[party.bank.table.customers.columns]
customer = {{ type = "int64", use = ["join"] }}
region = {{ type = "string", use = ["group"] }}
age = {{ type = "int64", use = ["group"], buckets = {ages} }}
[program]
kind = "sql"
query = '''{query}'''
[recipients]
result = ["shop"]
"""


def write_join(folder: Path, rows: int, suffix: str) -> Path:
    """Two tables of `rows` rows, half of whose keys match, and their scenario; the path of the scenario.

    Some groups rest on fewer than `K` entities. The numbers follow from `SEED` and DuckDB's `hash`.
    """

    def drawn(what: int, size: int) -> str:
        return f"(hash(i, {SEED + what}) % {size})"

    def word(words: tuple[str, ...], what: int) -> str:
        """Each word about seven times as rare as the one before; the last one rarest."""
        listed = ", ".join(f"'{name}'" for name in words)
        return f"list_extract([{listed}], least(CAST(floor(-ln((1 + {drawn(what, 1 << 30)}) / {1 << 30}.0) / 1.2) AS INT) + 1, {len(words)}))"

    write(
        folder / f"purchases.{suffix}",
        f"""SELECT CAST({drawn(1, rows // 2)} AS BIGINT) AS card, CAST({drawn(2, 2 * rows)} AS BIGINT) AS customer,
            {word(CATEGORIES, 3)} AS category, {drawn(4, 60000)} / 100.0 AS amount FROM range({rows}) AS t(i)""",
    )
    write(
        folder / f"customers.{suffix}",
        f"""SELECT i AS customer, {word(REGIONS, 5)} AS region, CAST(18 + {drawn(6, 70)} AS BIGINT) AS age
            FROM range({rows}) AS t(i) ORDER BY {drawn(7, 1 << 62)}""",
    )
    path = folder / f"{suffix}.toml"
    path.write_text(_SCENARIO.format(cpus=CPUS, suffix=suffix, k=K, clamp=CLAMP, ages=list(AGES), query=QUERY))
    return path


def write(file: Path, query: str) -> None:
    """A query's rows as Parquet or CSV, in one order on any machine."""
    form = "PARQUET" if file.suffix == ".parquet" else "CSV, HEADER"
    duckdb.execute("SET preserve_insertion_order = true")
    duckdb.execute(f"COPY ({query}) TO '{file}' (FORMAT {form})")
