"""Noise: how much of it there is, that no entity changes more than it hides, and that no budget is spent twice."""

import datetime
import math
import random
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from joint import EXACT, Rows, aggregate, arrow, column, contract, read, stream, table
from joint_programs import in_engine

from enclave_runtime.programs import sql
from enclave_runtime.programs.sql_check import read_query
from enclave_runtime.programs.sql_noise import plan
from mpc import scenario
from mpc.cli.check import draft
from mpc.fuzz.world import Setting, World
from mpc.image import standin, variant
from mpc.protocol.contract import Column, Contract, Rule, Table
from mpc.protocol.errors import ContractError, MpcError, PolicyError
from parties import policy
from parties.ledger import Ledger
from parties.party import Debit, Pin, Sealed, debits, no_budget

SIDE_EFFECTS = Path(__file__).parents[1] / "scenarios" / "side-effects"
USES: Any = ("sum", "avg", "variance", "quantile", "count", "count_distinct")


@pytest.fixture(scope="module")
def run_module() -> Any:
    return pytest.importorskip(
        "enclave_runtime.programs.sql_noise_run", reason="the extra noise is not installed: no noise is drawn"
    )


needs_opendp = pytest.mark.usefixtures("run_module")


def noise(epsilon: float, *entity: str, rows: int = 1, delta: float = 0.0) -> Rule:
    return Rule("noise", entity, 0, epsilon, delta, rows)


def columns(*more: Column) -> list[Column]:
    return [
        column("id", "int64", "join"),
        column("g", "int64", "group", "filter"),
        column("x", "double", *USES, clamp=[0, 100]),
        *more,
    ]


def contracted(query: str, *tables: Table, image: str = "noise", **options: Any) -> Contract:
    drafted = contract(tables, query, **options)
    return replace(drafted, enclave=replace(drafted.enclave, image=image))


def one(query: str, rule: Rule, *more: Column) -> Contract:
    return contracted(query, table("t", "a", rule, *columns(*more)))


def noised(described: Contract, *rows: Rows) -> list[dict[str, Any]]:
    sql.check(described)
    tables = [arrow(t, given) for t, given in zip(described.tables, rows, strict=True)]
    return read(sql.run(described, tables)["analyst"])


def groups(count: int) -> str:
    return ", ".join(map(str, range(count)))


# the law


@needs_opendp
def test_counts_have_noise_of_the_stated_law() -> None:
    """1,000 groups that hold nothing show the noise alone: discrete Laplace's law with the scale rows / epsilon.

    What is compared strays so far once in a million times: five standard deviations of it, or more."""
    described = one(f"SELECT g, count(*) AS n FROM t WHERE g IN ({groups(1000)}) GROUP BY g", noise(0.5, "id", rows=3))
    found = noised(described, [])
    values = [row["n"] for row in found]
    alpha = math.exp(-0.5 / 3)
    variance = 2 * alpha / (1 - alpha) ** 2
    assert [row["g"] for row in found] == list(range(1000))
    assert abs(statistics.fmean(values)) < 5 * math.sqrt(variance / 1000)
    assert 0.6 < statistics.pvariance(values) / variance < 1.5
    for bound in (0, 3, 10):
        odds = 2 * alpha ** (bound + 1) / (1 + alpha)  # of being larger
        seen = sum(abs(value) > bound for value in values) / 1000
        assert abs(seen - odds) < 5 * math.sqrt(odds * (1 - odds) / 1000)
    assert noised(described, []) != found


@needs_opendp
def test_sums_have_noise_of_the_size_of_the_clamp() -> None:
    wide = replace(columns()[2], clamp=(-1000.0, 10.0))
    described = contracted(
        f"SELECT g, sum(x) AS s FROM t WHERE g IN ({groups(1000)}) GROUP BY g",
        table("t", "a", noise(2.0, "id", rows=2), *columns()[:2], wide),
    )
    values = [row["s"] for row in noised(described, [])]
    scale = 2 * 1000 / 2.0
    assert 0.85 < statistics.fmean(map(abs, values)) / scale < 1.15  # of Laplace's law it is the scale
    assert abs(statistics.fmean(values)) < 5 * scale * math.sqrt(2 / 1000)


@needs_opendp
def test_epsilon_is_shared_by_all_numbers_of_a_group() -> None:
    query = "SELECT count(*) AS n, sum(x) AS s, avg(x) AS a, variance(x) AS v, quantile_cont(x, 0.5) AS q FROM t"
    made = plan(described := one(query, noise(1.2, "id")), read_query(described))
    assert [number.kind for number in made.numbers] == ["rows", "sum", "centred", "count", "squares", "histogram"]
    assert made.share == pytest.approx(0.2)
    assert sum(made.change * made.most(number) / made.scale(number) for number in made.numbers) <= 1.2


@needs_opendp
def test_error_bars_hold_what_they_say() -> None:
    """200 groups of the same 400 values; 95 of 100 bars hold the number without noise, or more."""
    chance = random.Random(7)
    values = [chance.betavariate(2, 5) * 100 for _ in range(400)]
    rows = [{"id": g * 1000 + i, "g": g, "x": x} for g in range(200) for i, x in enumerate(values)]
    query = (
        "SELECT g, count(*) AS n, sum(x) AS s, avg(x) AS a, variance(x) AS v, quantile_cont(x, 0.25) AS q, "
        f"count(DISTINCT x) AS d FROM t WHERE g IN ({groups(200)}) GROUP BY g"
    )
    found = noised(one(query, noise(4.0, "id")), rows)
    true = {
        "n": 400,
        "s": sum(values),
        "a": statistics.fmean(values),
        "v": statistics.variance(values),
        "q": sorted(values)[99],
        "d": len(set(values)),
    }
    for name, value in true.items():
        held = sum(row[f"{name}_low"] - 0.01 <= value <= row[f"{name}_high"] + 0.01 for row in found)
        assert held >= 173, name  # of 200 at 0.95, that is 5.5 standard deviations below 190
        assert all(row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] for row in found if row[name] is not None)
        assert statistics.fmean(row[name] for row in found) == pytest.approx(value, rel=0.1)


# what one entity can change


def _distance(made: Any, before: Any, after: Any, number: Any) -> int:
    keys = before.keys() | after.keys()
    nothing = {number: [0] * 64}
    return sum(
        abs(a - b)
        for key in keys
        for a, b in zip(before.get(key, nothing)[number], after.get(key, nothing)[number], strict=False)
    )


SHAPES = {
    "one table": ("FROM t", 1, ("a",)),
    "stacked": ("FROM t", 1, ("a", "b")),
    "joined": ("FROM t JOIN u ON t.id = u.id", 1, ("a",)),
    "outer": ("FROM t LEFT JOIN u ON t.id = u.id", 2, ("a",)),
    "stacked and joined": ("FROM t JOIN u ON t.id = u.id", 2, ("a", "b")),
    "with a table agreed to": ("FROM t JOIN p ON t.g = p.g LEFT JOIN u ON t.id = u.id", 2, ("a",)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_entity_changes_more_than_the_noise_hides(shape: str, run_module: Any) -> None:
    """Whoever is taken out of an owner's table, or out of all of them: no sum of differences is above the plan's."""
    source, factor, owners = SHAPES[shape]
    rule = noise(1.0, "id", rows=2, delta=1e-6)
    tables = [table("t", owner, rule, *columns()) for owner in owners]
    w = column("w", "int64", "group")
    tables += [table("u", "c", rule, column("id", "int64", "join"), w)] if " u " in source else []
    tables += [table("p", "d", EXACT, column("g", "int64", "join"))] if " p " in source else []
    tables = [replace(t, columns=tuple(replace(c, use=(*c.use, "join")) for c in t.columns)) for t in tables]
    grouped = "t.g, u.w" if " u " in source else "t.g"
    functions = "count(*) AS n, count(x) AS c, count(DISTINCT x) AS d, sum(x) AS s, avg(x) AS a, variance(x) AS v"
    described = contracted(f"SELECT {grouped}, {functions}, quantile_cont(x, 0.5) AS q {source} GROUP BY ALL", *tables)
    made = plan(described, read_query(described))
    assert made.change == 2 * factor
    chance = random.Random(shape)
    most = dict.fromkeys(made.numbers, 0)
    for _ in range(5):
        rows = [_drawn(t, chance) for t in tables]
        before = run_module.measured(made, [arrow(t, r) for t, r in zip(tables, rows, strict=True)])
        for entity in (0, 1, None):
            held = [t.rule.kind == "noise" for t in tables]
            choices = [held] if len(owners) == 1 else []
            for where in [*choices, *([i == j for j in range(len(tables))] for i in range(len(tables)) if held[i])]:
                left = [
                    [row for row in r if not (out and row["id"] == entity)] if out else r
                    for r, out in zip(rows, where, strict=True)
                ]
                after = run_module.measured(made, [arrow(t, r) for t, r in zip(tables, left, strict=True)])
                for number in made.numbers:
                    most[number] = max(most[number], _distance(made, before, after, number))
    for number, found in most.items():
        assert found <= made.change * made.most(number), number
    assert any(found > 0 for found in most.values())


def _drawn(described: Table, chance: random.Random) -> Rows:
    values: dict[str, Sequence[Any]] = {"id": (0, 1, 2, 3, None), "g": (1, 2, 3), "w": (1, 2)}
    return [
        {c.name: chance.choice(values.get(c.name) or (0.0, 50.0, 100.0, 200.0, -9.0, None)) for c in described.columns}
        for _ in range(chance.randrange(20))
    ]


@needs_opendp
def test_of_an_entity_only_so_many_rows_count() -> None:
    rows = [{"id": 1, "g": 1, "x": 100.0}] * 1000
    (found,) = noised(one("SELECT count(*) AS n, sum(x) AS s FROM t", noise(20.0, "id", rows=3)), rows)
    assert abs(found["n"] - 3) < 10  # noise with the scale 0.3
    assert abs(found["s"] - 300) < 1000


@needs_opendp
def test_columns_may_be_called_what_the_generated_query_calls_its_own() -> None:
    owned = replace(one("SELECT count(*) AS n FROM t", noise(5.0, "id")).tables[0], columns=tuple(columns()))
    renamed = tuple(replace(c, name=name) for c, name in zip(owned.columns, ("one", "g0", "v0"), strict=True))
    rule = noise(5.0, "one")
    described = contracted(
        "SELECT g0, sum(v0) AS s FROM t WHERE g0 IN (1) GROUP BY g0", replace(owned, columns=renamed, rule=rule)
    )
    (found,) = noised(described, [{"one": i, "g0": 1, "v0": 1.0} for i in range(1000)])
    assert abs(found["s"] - 1000) < 500


# groups


@needs_opendp
def test_a_group_of_one_entity_does_not_show() -> None:
    rule = noise(1.0, "id", rows=1, delta=1e-9)
    rows = [{"id": i, "g": 0} for i in range(500)] + [{"id": 1000 + g, "g": g} for g in range(1, 2001)]
    found = noised(one("SELECT g, count(*) AS n FROM t GROUP BY g", rule), rows)
    assert [row["g"] for row in found] == [0]  # another one shows twice in a million runs
    assert abs(found[0]["n"] - 500) < 30


@needs_opendp
def test_groups_that_the_contract_names_show_always() -> None:
    extra = (
        column("b", "bool", "group"),
        column("y", "double", "group", buckets=[1, 2]),
        column("d", "date", "group", "filter"),
    )
    rule = noise(1.0, "id")
    found = noised(one("SELECT b, bucket(y) AS y, count(*) AS n FROM t GROUP BY ALL", rule, *extra), [])
    assert {(row["b"], row["y"]) for row in found} == {
        (b, y) for b in (True, False, None) for y in ("< 1", "[1, 2)", ">= 2", None)
    }
    query = "SELECT d, count(*) AS n FROM t WHERE d IN ('2026-01-31', '1969-12-31') GROUP BY d ORDER BY d DESC"
    days = [datetime.date(2026, 1, 31), datetime.date(1969, 12, 31)]
    rows = [{"id": i, "d": days[1]} for i in range(1000)]
    found = noised(one(query, rule, *extra), rows)
    assert [row["d"] for row in found] == days
    assert found[0]["n"] < 100 < 900 < found[1]["n"]


@needs_opendp
def test_nothing_but_noise_decides_the_order() -> None:
    rule = noise(1.0, "id", delta=1e-6)
    rows = [{"id": i, "g": i % 5} for i in range(5000)]
    found = noised(one("SELECT g, count(*) AS n FROM t GROUP BY g", rule), rows)
    assert [row["g"] for row in found] == list(range(5))
    found = noised(one("SELECT g, count(*) AS n FROM t GROUP BY g ORDER BY n DESC", rule), rows)
    assert [row["n"] for row in found] == sorted((row["n"] for row in found), reverse=True)


# what is refused before consent


U = table("u", "b", noise(1.0, "id"), column("id", "int64", "join"), column("g", "int64", "join", "group"))


@pytest.mark.parametrize(
    ("query", "tables", "says"),
    [
        ("SELECT g, count(*) AS n FROM t GROUP BY g", (), r"g: that a group is there .*IN \(…\) in WHERE"),
        ("SELECT sum(z) AS s FROM t", (), "s: z has no usable clamp"),
        ("SELECT g FROM t WHERE g IN (1) GROUP BY g", (), "at least one aggregate"),
        ("SELECT count(*) AS n, sum(x) AS n_low FROM t", (), "names that stay different"),
        ("SELECT quantile_cont(x, 2) AS q FROM t", (), "a fraction between 0 and 1"),
        ("SELECT quantile_cont(x) AS q FROM t", (), "has no place here"),
        ("SELECT sum(x, 0.5) AS q FROM t", (), "has no place here"),
        ("SELECT max(x) AS m FROM t", (), "has no place here"),
        (
            f"SELECT g, quantile_cont(x, 0.5) AS q FROM t WHERE g IN ({groups(900)}) AND x < 3 GROUP BY g",
            (),
            "filter of",
        ),
        ("SELECT count(*) AS n FROM t JOIN u ON t.g = u.g", (U,), "all columns of the entity"),
        ("SELECT count(*) AS n FROM p LEFT JOIN t ON t.id = p.id", ("p",), "rows without a partner"),
        ("SELECT count(*) AS n FROM p", ("p",), "it does not use t"),
        (
            "SELECT count(*) AS n FROM t",
            (replace(U, rule=aggregate(3)),),
            "b's rule for u is aggregate, .*expected noise",
        ),
    ],
    ids=lambda value: str(value)[:70],
)
def test_what_the_rule_forbids(query: str, tables: Any, says: str) -> None:
    extra = column("z", "double", "sum")
    owned = table("t", "a", noise(1.0, "id"), *columns(extra))
    owned = replace(
        owned, columns=tuple(replace(c, use=(*c.use, "join")) if c.name == "g" else c for c in owned.columns)
    )
    public = table("p", "b", EXACT, column("id", "int64"))
    described = contracted(query, owned, *(public if one == "p" else one for one in tables))
    with pytest.raises(ContractError, match=says):
        sql.check(described)


def test_only_the_image_with_noise_runs_it() -> None:
    described = contracted("SELECT count(*) AS n FROM t", table("t", "a", noise(1.0, "id"), *columns()), image="sql")
    with pytest.raises(ContractError, match=r'enclave.image: expected "?noise'):
        sql.check(described)


def test_too_many_numbers() -> None:
    query = f"SELECT g, quantile_cont(x, 0.5) AS q, bucket(y) AS y FROM t WHERE g IN ({groups(999)}) GROUP BY ALL"
    described = one(query, noise(1.0, "id"), column("y", "double", "group", buckets=[1, 2, 3]))
    with pytest.raises(ContractError, match="groups times outputs: expected at most 200,000 numbers"):
        sql.check(described)


def test_quantiles_and_variance_are_for_noise_only() -> None:
    for function in ("quantile_cont(x, 0.5)", "variance(x)"):
        described = contract([table("t", "a", aggregate(3), *columns())], f"SELECT {function} AS v FROM t")
        with pytest.raises(ContractError, match="has no place here"):
            sql.check(described)


@pytest.mark.parametrize(
    "given",
    [
        {"epsilon": 0.0},
        {"epsilon": 21.0},
        {"delta": 0.01},
        {"delta": -1e-9},
        {"rows": 0},
        {"k": 3},
        {"entity": (), "rows": 2},
        {"kind": "exact"},
        {"kind": "aggregate", "k": 3},
        {"epsilon": float("nan")},
    ],
    ids=str,
)
def test_a_rule_that_says_nothing_clear(given: dict[str, Any]) -> None:
    good = {"kind": "noise", "entity": ("id",), "k": 0, "epsilon": 1.0, "delta": 1e-6, "rows": 3}
    Rule(**good)  # type: ignore[arg-type]
    with pytest.raises(MpcError, match=r"[rR]ule"):
        Rule(**(good | given))


def test_the_strictest_rule_of_all_owners_holds() -> None:
    owned = (
        table("t", "a", noise(2.0, "id", rows=5, delta=1e-6), *columns()),
        table("t", "b", noise(0.5, "id", rows=9, delta=1e-5), *columns()),
        table("t", "c", EXACT, *columns()),
    )
    described = contracted("SELECT count(*) AS n FROM t", *owned)
    made = plan(described, read_query(described))
    assert (made.epsilon, made.delta, made.rows, made.change) == (0.5, 1e-6, 5, 5)
    told = sql.check(described)
    assert any("the strictest rule holds for all: epsilon 0.5" in rule for rule in told.rules)
    assert any("charged epsilon 2, delta 1e-06" in rule for rule in told.rules)
    assert "error bars are of the noise alone" in told.warnings[-1]


# budgets


def seal(contract_digest: bytes, epoch: int, *spent: Debit) -> Sealed:
    return Sealed(contract_digest, epoch, b"a", b"s", (bytes(32),), (Pin("a", bytes(48)),), spent)


def limited(epsilon: float, delta: float = 0.0) -> policy.Policy:
    given = scenario.load(SIDE_EFFECTS)
    described = draft(given)
    mine = policy.from_scenario(
        given,
        "registry",
        participants=described.participants,
        measurements=described.enclave.measurements,
        root=described.enclave.root,
        simulated=True,
    )
    return msgspec.structs.replace(mine, budget={"prescriptions": policy.Budget(epsilon=epsilon, delta=delta)})


def test_a_ledger_adds_up_what_every_contract_spent(tmp_path: Path) -> None:
    """As people write the numbers: ten times 0.1 is 1. It survives the process."""
    spent = Debit("prescriptions", 0.1, 1e-7)
    for number in range(10):
        ledger = Ledger(tmp_path)
        policy.affords(limited(1.0, 1e-6), [spent], ledger.spent)
        ledger.write(seal(bytes([number]) * 48, 1, spent, Debit("another", 9.0, 0.0)))
        ledger.close()
    ledger = Ledger(tmp_path)
    assert ledger.spent("prescriptions") == (Decimal("1.0"), Decimal("1e-6"))
    for tiny in (Debit("prescriptions", 1e-6, 0.0), Debit("prescriptions", 0.0, 1e-12)):
        with pytest.raises(PolicyError, match=r"budget of prescriptions: (epsilon|delta): expected at most 0"):
            policy.affords(limited(1.0, 1e-6), [tiny], ledger.spent)
    with pytest.raises(PolicyError, match=r"\[budget.another\] in policy.toml"):
        policy.affords(limited(1.0), [Debit("another", 0.1, 0.0)], ledger.spent)
    ledger.close()


def test_a_scenario_s_policy_has_the_budget_of_one_run() -> None:
    given = scenario.load(SIDE_EFFECTS)
    described = draft(given)
    assert described.epochs_max == 1  # none written
    assert debits(described, "insurer") == (Debit("stays", 2.0, 0.0),)
    assert debits(described, "institute") == ()
    mine = limited(1.0)
    assert policy.dump(mine).count("[budget.prescriptions]") == 1


class Wallet:
    """A party's disk and its budget, in a world of machines."""

    def __init__(self, world: World, name: str, epsilon: float, before: Sequence[Sealed] = ()) -> None:
        self.party, self.before, self.mine = world.parties[name], list(before), limited(epsilon)
        self.party.affords = lambda spends: policy.affords(self.mine, spends, self.spent)  # type: ignore[method-assign]
        self.party.start()

    @property
    def seals(self) -> list[Sealed]:
        return [*self.before, *(m for m in self.party.ledger if isinstance(m, Sealed))]

    def spent(self, dataset: str) -> tuple[Decimal, Decimal]:
        found = [d for s in self.seals for d in s.debits if d.dataset == dataset]
        return sum((Decimal(repr(d.epsilon)) for d in found), Decimal(0)), Decimal(0)


class Noisy(World):
    """A world in which the first party's table has a rule of noise."""

    def _draw_contract(self) -> Contract:
        drafted = super()._draw_contract()
        first = replace(drafted.tables[0], name="prescriptions", rule=noise(1.0))
        return replace(drafted, tables=(first, *drafted.tables[1:]))


TWO = Setting(parties=2, epochs_max=3)


def test_a_budget_is_debited_with_the_seal_and_not_before() -> None:
    world = Noisy(1, TWO)
    wallet = Wallet(world, "party-0", 1.0)
    world.until(lambda: wallet.party.ledger)
    assert wallet.spent("prescriptions")[0] == 0
    world.fair()
    assert wallet.spent("prescriptions")[0] == 1
    assert all(released for released, _ in world.endings().values())


def test_no_crash_makes_a_party_spend_more_than_it_has() -> None:
    """Killed between any two actions, and started again of what is on its disk: one seal, one debit."""
    for actions in range(12):
        world = Noisy(actions, TWO)
        wallet = Wallet(world, "party-0", 1.0)
        wallet.party.crash_in = actions
        world.fair()
        assert [len(s.debits) for s in wallet.seals] == [1], actions
        assert wallet.spent("prescriptions")[0] == 1


def test_a_second_enclave_is_not_paid_for_from_an_empty_budget() -> None:
    world = Noisy(2, TWO)
    wallet = Wallet(world, "party-0", 1.5)
    world.until(lambda: wallet.seals)
    world.kill_enclave(world.enclaves[0])
    world.fair()
    assert wallet.spent("prescriptions")[0] == 1
    released, why = world.endings()["party-0"]
    assert not released
    assert "budget of prescriptions: epsilon: expected at most 0.5 left, got 1.0" in why


def test_a_budget_that_pays_for_two_enclaves_pays_for_two() -> None:
    world = Noisy(2, TWO)
    wallet = Wallet(world, "party-0", 2.0)
    world.until(lambda: wallet.seals)
    world.kill_enclave(world.enclaves[0])
    world.fair()
    assert wallet.spent("prescriptions")[0] == 2
    assert all(released for released, _ in world.endings().values())


def test_a_new_contract_meets_the_same_ledger() -> None:
    first = Noisy(3, TWO)
    spent = Wallet(first, "party-0", 1.5)
    first.fair()
    second = Noisy(4, TWO)
    assert second.contract.digest != first.contract.digest
    wallet = Wallet(second, "party-0", 1.5, before=spent.seals)
    second.fair()
    assert len(wallet.seals) == 1
    assert "budget of prescriptions" in second.endings()["party-0"][1]


def test_what_was_spent_between_consent_and_seal_counts() -> None:
    world = Noisy(5, TWO)
    wallet = Wallet(world, "party-0", 1.5)
    world.until(lambda: len(wallet.party.ledger) == 2)  # committed and consented
    wallet.before.append(seal(bytes(48), 1, Debit("prescriptions", 1.0, 0.0)))
    world.fair()
    assert wallet.party.ledger[-1].why.startswith("budget of prescriptions")  # type: ignore[union-attr]
    assert len(wallet.seals) == 1


def test_a_party_that_was_given_no_budget_spends_none() -> None:
    world = Noisy(6, TWO)
    world.parties["party-0"].affords = no_budget  # type: ignore[method-assign]
    world.parties["party-0"].start()
    world.fair()
    assert "no budget for noise" in world.endings()["party-0"][1]
    assert not any(isinstance(memory, Sealed) for memory in world.parties["party-0"].ledger)


# in the enclave


@needs_opendp
def test_in_the_enclave_s_own_process() -> None:
    described = one("SELECT count(*) AS n FROM t", noise(1.0, "id"))
    rows = arrow(described.tables[0], [{"id": i} for i in range(1000)])
    first, second = (read(in_engine(described, [stream(rows)])["analyst"])[0]["n"] for _ in range(2))
    assert abs(first - 1000) < 60
    assert abs(second - 1000) < 60


@needs_opendp
def test_the_image_has_what_noise_needs(tmp_path: Path) -> None:
    for file in variant.files("noise"):
        (tmp_path / file.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.name).symlink_to(file.path)
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); from enclave_runtime.programs import warm; warm();"
        "from enclave_runtime.programs import sql_noise_run as r; before = set(sys.modules);"
        "assert len(r.laplace([0, 1], 1, 1.0, 2.0)) == 2; assert len(r.threshold([999], 1, 1.0, 0.1, 2.0)) == 1;"
        "print(sorted(set(sys.modules) - before));"
        "print([m.__file__ for m in sys.modules.values() if 'packages' in (getattr(m, '__file__', '') or '')])"
    )
    command = [str(standin.interpreter().executable), "-I", "-S", "-B", "-c", code]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n[]\n"), done.stderr


@needs_opendp
def test_noise_that_is_too_small_is_not_drawn(run_module: Any) -> None:
    with pytest.raises(Exception, match="engine failed"):
        run_module.laplace([5], 3, 1.0, 2.9)
