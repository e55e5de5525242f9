"""The scenarios of the programs, by `mpc run`: what each recipient gets is what the clear text says."""

import csv
import hashlib
import statistics
import unicodedata
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

import pytest
from runs import SCENARIOS, House, Plays, Run, result

from parties.ledger import Ledger

plays = Plays()


def rows(scenario: str, owner: str) -> list[dict[str, Any]]:
    with (SCENARIOS / scenario / "data" / f"{owner}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def released(house: House, scenario: str) -> Run:
    with house.run(SCENARIOS / scenario, "--json") as run:
        done = run.wait()
    assert (done.status, done.json["status"]) == (0, "released"), done.err
    return run


@plays
def overlap(house: House) -> None:
    run = released(house, "overlap")
    firms = (("gazette", "email"), ("bookshop", "mail"))
    given = [
        {unicodedata.normalize("NFC", row[column].strip().casefold()) for row in rows("overlap", owner)}
        for owner, column in firms
    ]
    for owner, _ in firms:
        assert result(run, owner) == [(len(given[0] & given[1]), False)] == [(180, False)]


@plays
def waiting_times(house: House) -> None:
    run = released(house, "waiting-times")
    hospitals = ("northside", "riverview", "st-anne")
    visits = [row | {"hospital": h} for h in hospitals for row in rows("waiting-times", h) if row["wait"]]
    found = {row[0]: row[1:] for row in result(run, "health-board")}
    assert list(found) == ["minor", "standard", "urgent"]
    assert found["standard"][3] is not None
    for urgency, (count, mean, variance, correlation, *buckets) in found.items():
        group = [row for row in visits if row["urgency"] == urgency]
        waits, ages = [float(row["wait"]) for row in group], [int(row["age"]) for row in group]
        assert count == len(group)
        assert mean == pytest.approx(statistics.fmean(waits), rel=1e-9)
        assert variance == pytest.approx(statistics.variance(waits), rel=1e-9)
        assert correlation in (None, pytest.approx(statistics.correlation(ages, waits), abs=1e-9))
        edges = (0, 15, 60, 120, 301)
        for low, high, shown in zip(edges, edges[1:], buckets, strict=False):
            inside = [row for row in group if low <= float(row["wait"]) < high]
            assert shown in (None, len(inside))
            people = [{row["patient"] for row in inside if row["hospital"] == h} for h in hospitals]
            assert shown is None or all(len(p) == 0 or len(p) >= 10 for p in people)


@plays
def loan_defaults(house: House) -> None:
    run = released(house, "loan-defaults")
    found = [{term: value for term, value, _ in result(run, bank)} for bank in ("alder", "birch", "cedar")]
    assert found[0] == found[1] == found[2]
    slopes = found[0]
    loans = [row for bank in ("alder", "birch", "cedar") for row in rows("loan-defaults", bank)]
    assert slopes["(rows)"] == len(loans)
    # At the maximum of the likelihood, residuals and features have nothing in common.
    features = {"(intercept)": lambda row: 1.0, "home_owner": lambda row: float(row["home_owner"] == "true")}
    features |= {name: lambda row, name=name: float(row[name]) for name in ("income", "debt", "years")}  # type: ignore[misc]
    slope = dict.fromkeys(features, 0.0)
    for row in loans:
        score = sum(slopes[name] * feature(row) for name, feature in features.items())
        residual = (row["defaulted"] == "true") - 1 / (1 + 2.718281828459045**-score)
        for name, feature in features.items():
            slope[name] += residual * feature(row)
    assert all(abs(value) < 1e-6 for value in slope.values()), slope


@plays
def licences(house: House) -> None:
    run = released(house, "licences")
    operators = ("aurora", "borealis", "comet", "dawn", "eclipse")
    bids = {owner: int(rows("licences", owner)[0]["euros"]) for owner in operators}
    ranked = sorted(operators, key=lambda owner: -bids[owner])  # keeps the order of the contract among equals
    expected = [(o, o in ranked[:2], bids[ranked[2]] if o in ranked[:2] else None) for o in operators]
    assert result(run, "regulator") == expected
    for line in expected:
        assert result(run, line[0]) == [line]
    verified = house.mpc("verify", run.folder / "regulator" / "receipt.cbor", "--json")
    assert "reserve = 1000000" in verified.json["query"].splitlines()
    losing = [str(bids[owner]).encode() for owner in ("aurora", "eclipse")]
    for file in run.folder.rglob("*"):
        if file.is_file() and file.relative_to(run.folder).parts[0] not in ("aurora", "eclipse"):
            assert not any(bid in file.read_bytes() for bid in losing), file


@plays
def similar_names(house: House) -> None:
    """Compiled and run inside the sandbox."""
    if find_spec("wasmtime") is None:
        pytest.skip("the extra wasm is not installed: no module runs")
    run = released(house, "similar-names")
    for owner in ("bank", "authority"):
        assert result(run, owner) == [(0, 20), (1, 23), (2, 22)]  # test_wasm.py counts them, too
    module = (SCENARIOS / "similar-names" / "screen.wasm").read_bytes()
    verified = house.mpc("verify", run.folder / "bank" / "receipt.cbor", "--json").json["query"]
    assert f"{len(module)} bytes, SHA-256 {hashlib.sha256(module).hexdigest()}" in verified


@plays
def side_effects(house: House) -> None:
    """Noise that the sandbox's kernel gives, within what is seen once in a billion runs, and paid for once."""
    if find_spec("opendp") is None:
        pytest.skip("the extra noise is not installed: no noise is drawn")
    run = released(house, "side-effects")
    drugs = {row["patient"]: row["drug"] for row in rows("side-effects", "registry")}
    stays: dict[str, list[int]] = {}
    for row in rows("side-effects", "insurer"):
        stays.setdefault(row["patient"], []).append(int(row["days"]))
    found = result(run, "institute")
    assert [row[0] for row in found] == ["aletol", "boramine", "cinadrox"]
    for drug, count, low, high, mean, *bars in found:
        of_patients = [days for patient, days in stays.items() if drugs.get(patient) == drug]
        assert abs(count - sum(min(len(days), 3) for days in of_patients)) < 9 * 21
        assert (low, high) == (count - 27, count + 27)
        assert mean == pytest.approx(statistics.fmean(min(d, 30) for days in of_patients for d in days), abs=6)
        assert bars[0] <= mean <= bars[1]
    told = " ".join(house.mpc("verify", run.folder / "registry" / "receipt.cbor").out.split())
    assert "noise, epsilon 1 and delta 0 spent by patient, 3 row(s) of each" in told
    for owner, dataset, spent in (("registry", "prescriptions", 1), ("insurer", "stays", 2)):
        ledger = Ledger(run.folder / owner)
        assert ledger.spent(dataset) == (spent, 0)
        ledger.close()


@plays
def what_people_read_before(house: House) -> None:
    for name in ("overlap", "waiting-times", "loan-defaults", "licences"):
        told = house.mpc("check", SCENARIOS / name, "--json").json
        assert told["status"] == "accepted"
        assert told["columns"]
        assert told["program"]["parameters"]
        assert len(told["program"]["digest"]) == 96
    shown = " ".join(house.mpc("check", SCENARIOS / "licences").out.split())
    assert 'units 2 price "second" reserve 1000000 tell "own"' in shown
    folder = house.new_folder()
    text = (SCENARIOS / "loan-defaults" / "scenario.toml").read_text()
    (folder / "scenario.toml").write_text(text.replace("ridge = 0.0", "ridge = 0"))
    refused = house.mpc("check", folder)
    assert refused.status == 1
    words = "program.parameters.ridge: expected a number with a point; for example ridge = 0.0"
    assert words in " ".join(refused.err.split())


@pytest.mark.parametrize("play", plays.found)
def test_a_scenario(play: str, played: dict[str, Future[None]]) -> None:
    played[play].result()
