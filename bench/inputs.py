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
        """Each word about three times as rare as the one before; the last one rarest."""
        listed = ", ".join(f"'{name}'" for name in words)
        uniform = f"(1 + {drawn(what, 1 << 30)}) / {1 << 30}.0"
        return f"[{listed}][least(CAST(floor(-ln({uniform}) / 1.2) AS INT) + 1, {len(words)})]"

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


LARGE_MEMORY_BYTES = 4 << 30
_LARGE_ROW_BYTES = 48  # of Arrow: four numbers, and a text of 12 letters with its offset
_ROW_GROUP_BYTES = 64 << 20
_LARGE = f"""
[scenario]
name = "bench-sealing"
[enclave]
cpus = {CPUS}
memory = "{LARGE_MEMORY_BYTES >> 30} GiB"
[party.owner.table.events]
source = "events.parquet"
bytes_max = "2 GiB"
rule = {{ kind = "aggregate", k = {K} }}
[party.owner.table.events.columns]
id = {{ type = "int64" }}
at = {{ type = "int64" }}
text = {{ type = "string", use = ["group"] }}
size = {{ type = "int64", use = ["sum"] }}
price = {{ type = "double", use = ["avg"] }}
[program]
kind = "sql"
query = "SELECT text, sum(size) AS size, avg(price) AS price, count(*) AS n FROM events GROUP BY text ORDER BY text"
[recipients]
result = ["owner"]
"""


def write_large(folder: Path, size: int) -> Path:
    """One table of about `size` bytes of Arrow, as Parquet in row groups of 64 MiB, and a scenario that sums it up."""
    write(
        folder / "events.parquet",
        f"""SELECT i AS id, CAST(hash(i, {SEED}) >> 20 AS BIGINT) AS at, 'category ' || (100 + hash(i, 1) % 50) AS text,
            CAST(hash(i, 2) % 1000000 AS BIGINT) AS size, (hash(i, 3) % 100000) / 100.0 AS price
            FROM range({size // _LARGE_ROW_BYTES}) AS t(i)""",
        f", ROW_GROUP_SIZE {_ROW_GROUP_BYTES // _LARGE_ROW_BYTES}",
    )
    path = folder / "large.toml"
    path.write_text(_LARGE)
    return path


def write(file: Path, query: str, options: str = "") -> None:
    """A query's rows as Parquet or CSV, in one order on any machine."""
    form = "PARQUET" if file.suffix == ".parquet" else "CSV, HEADER"
    duckdb.execute("SET preserve_insertion_order = true")
    duckdb.execute(f"COPY ({query}) TO '{file}' (FORMAT {form}{options})")
