"""Writes data/*.csv: invented visits to three emergency departments. Always the same."""

import csv
import random
from pathlib import Path

HERE = Path(__file__).parent
MINUTES = {"immediate": 4, "very urgent": 12, "urgent": 45, "standard": 90, "minor": 130}


def main(folder: Path = HERE / "data") -> None:
    folder.mkdir(exist_ok=True)
    chance = random.Random(20262)
    for hospital, slow in {"northside": 1.0, "riverview": 1.4, "st-anne": 0.8}.items():
        rows = []
        for _ in range(260):
            patient = f"{hospital[0]}{chance.randrange(200):03d}"  # some come again
            urgency = chance.choices(list(MINUTES), [2, 12, 28, 40, 18])[0]
            age = chance.randrange(1, 95)
            wait = round(MINUTES[urgency] * slow * (0.5 + chance.random()) + age / 10, 1)
            rows.append([patient, urgency, age, "" if chance.random() < 0.03 else wait])
        with (folder / f"{hospital}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["patient", "urgency", "age", "wait"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
