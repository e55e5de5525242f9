"""Writes data/*.csv: invented people with an address at example.org, spelled as people type it. Always the same."""

import csv
import random
from pathlib import Path

HERE = Path(__file__).parent


def typed(chance: random.Random, address: str) -> str:
    """As somebody may have entered it in a form."""
    return chance.choice([address, address, address.title(), address.upper(), f" {address}", f"{address} "])


def main(folder: Path = HERE / "data") -> None:
    folder.mkdir(exist_ok=True)
    chance = random.Random(20261)
    names = ["ana", "björn", "chloé", "dmitri", "elif", "fatou", "george", "hana", "ivan", "júlia", "kofi", "lena"]
    people = [f"{chance.choice(names)}.{number:04d}@example.org" for number in range(1000)]
    tables = {"gazette": ("email", people[:600]), "bookshop": ("mail", people[420:])}
    for owner, (column, addresses) in tables.items():
        rows = [typed(chance, address) for address in addresses]
        rows += [typed(chance, address) for address in addresses[:30]]  # who registered twice
        chance.shuffle(rows)
        with (folder / f"{owner}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([column])
            writer.writerows([row] for row in rows)


if __name__ == "__main__":
    main()
