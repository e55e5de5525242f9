"""Writes data/*.csv: invented loans of three banks. Always the same."""

import csv
import random
from math import exp
from pathlib import Path

HERE = Path(__file__).parent


def main(folder: Path = HERE / "data") -> None:
    folder.mkdir(exist_ok=True)
    chance = random.Random(20263)
    for bank in ("alder", "birch", "cedar"):
        rows = []
        for number in range(500):
            income = round(min(max(chance.gauss(42, 14), 8), 140), 1)  # thousands a year
            debt = round(income * chance.uniform(0.0, 0.9), 1)
            years = chance.randrange(0, 31)  # with this bank
            owner = chance.random() < 0.4
            score = -1.2 + 4.0 * debt / income - 0.05 * years - 0.6 * owner - 0.01 * (income - 42)
            defaulted = chance.random() < 1 / (1 + exp(-score))
            rows.append([f"{bank}-{number}", income, debt, years, str(owner).lower(), str(defaulted).lower()])
        with (folder / f"{bank}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["loan", "income", "debt", "years", "home_owner", "defaulted"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
