"""Writes data/*.csv: invented patients, their prescriptions and their days in hospital. Always the same."""

import csv
import random
from pathlib import Path

HERE = Path(__file__).parent
DAYS = {"aletol": 4.0, "boramine": 4.2, "cinadrox": 7.5}  # mean stay of those who get it


def write(file: Path, header: list[str], rows: list[list[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main(folder: Path = HERE / "data") -> None:
    folder.mkdir(exist_ok=True)
    chance = random.Random(20263)
    patients = [(f"P{number:05d}", chance.choice(list(DAYS))) for number in range(6000)]
    write(folder / "registry.csv", ["patient", "drug"], [list(one) for one in patients])
    stays: list[list[object]] = []
    for patient, drug in patients[1000:]:
        count = chance.choices([0, 1, 2, 3, 6], [60, 25, 9, 5, 1])[0]
        stays += [[patient, 1 + min(60, round(chance.expovariate(1 / DAYS[drug])))] for _ in range(count)]
    stays += [[f"Q{number:05d}", 1 + round(chance.expovariate(1 / 5))] for number in range(1500)]  # not registered
    chance.shuffle(stays)
    write(folder / "insurer.csv", ["patient", "days"], stays)


if __name__ == "__main__":
    main()
