"""Writes data/*.csv: invented names, some of them on both lists as people misspell them. Always the same."""

import csv
import random
from pathlib import Path

HERE = Path(__file__).parent
FIRST = ["Ada", "Boris", "Carmen", "Dilek", "Emeka", "Farah", "Goran", "Hilde", "Imre", "Jasmin", "Kazuo", "Lucia"]
LAST = ["ander", "berg", "costa", "dovic", "ellin", "fuchs", "garov", "holm", "ibarra", "janko", "keller", "lund"]


def misspelt(chance: random.Random, name: str, letters: int) -> str:
    """With so many letters changed, left out or added."""
    for _ in range(letters):
        at = chance.randrange(1, len(name))
        name = name[:at] + chance.choice(["", "x", "y" + name[at : at + 1]]) + name[at + 1 :]
    return name


def main(folder: Path = HERE / "data") -> None:
    folder.mkdir(exist_ok=True)
    chance = random.Random(20262)
    people = sorted({f"{a} {chance.choice('BCDFGKLMNPRSTV')}{b}{c}" for a in FIRST for b in LAST for c in LAST})
    chance.shuffle(people)
    listed = people[:200]
    customers = people[200:1000] + [misspelt(chance, name, i % 4) for i, name in enumerate(listed[:80])]
    chance.shuffle(customers)
    for owner, names in {"bank": customers, "authority": listed}.items():
        with (folder / f"{owner}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["name"])
            writer.writerows([name] for name in names)


if __name__ == "__main__":
    main()
