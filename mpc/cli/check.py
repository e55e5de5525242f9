"""`mpc check`: what a scenario would disclose, to whom and under which rules, before anything runs."""

import json
import os
import time
from pathlib import Path

import click

from mpc import scenario as scenarios
from mpc.cli.files import PATH
from mpc.cli.output import CAUTION, GOOD, Output, examples, with_output
from mpc.host.backends import needs
from mpc.protocol.contract import SEALING_KEY_BYTES, Contract, Measurement, Participant, Table, Use
from mpc.protocol.errors import ContractError, LocalError
from mpc.scenario import Scenario
from mpc.settings import quantity

ADDED: tuple[Use, ...] = (
    "sum",
    "avg",
    "variance",
    "quantile",
    "correlation",
    "regression",
)  # values moved into the clamp before


@click.command(epilog=examples("mpc check salaries", "mpc check scenarios/flights --json"))
@click.argument("scenario", type=PATH)
@with_output
def check(out: Output, scenario: Path) -> int:
    """Say what SCENARIO would disclose, to whom and under which rules. Nothing is run or sent, no data is read.

    SCENARIO is a folder with a scenario.toml, such a file, or the name of a shipped scenario.

    Exit status: 0 the owners' rules allow the program; 1 they do not; 2 the file cannot be used.
    """
    from enclave_runtime import programs

    file = scenarios.find(scenario)
    given = scenarios.load(file)
    try:
        contract = draft(given)
        disclosure = programs.program(contract.program.kind).check(contract)
    except ContractError as error:
        raise ContractError(f"{file}: {error.what}", expected=error.expected, got=error.got) from None
    warnings = [*disclosure.warnings, *not_yet(given), *needs(given.enclave), *missing_sources(given)]
    _show(out, given, contract, disclosure, warnings)
    out.document(
        {
            "status": "accepted",
            "scenario": str(file),
            "name": contract.name,
            "draft_digest": contract.digest.hex(),
            "simulated": contract.enclave.simulated,
            "owners": [_owner(contract, table) for table in contract.tables],
            "query": contract.program.text,
            "program": {
                "kind": contract.program.kind,
                "module": given.program.module or None,
                "parameters": given.program.parameters,
                "digest": contract.program.digest.hex(),
            },
            "columns": [{"name": name, "why": why} for name, why in disclosure.columns],
            "rules": list(disclosure.rules),
            "recipients": list(disclosure.recipients),
            "receipt_recipients": list(contract.receipt_recipients),
            "approvals": {"quorum": contract.approvals.quorum, "approvers": list(contract.approvals.approvers)},
            "warnings": warnings,
        }
    )
    return 0


def draft(given: Scenario) -> Contract:
    """The contract that the scenario becomes, with throw-away keys, and an image that does not exist."""
    participants = [Participant(name, os.urandom(32), os.urandom(SEALING_KEY_BYTES)) for name in given.party]
    pcrs = (os.urandom(48), os.urandom(48), os.urandom(48))
    return scenarios.contract(
        given,
        participants=participants,
        author=os.urandom(32),
        measurements=[Measurement("draft", *pcrs)],
        root=os.urandom(32),
        simulated=given.enclave.backend == "local",
        now_ms=time.time_ns() // 1_000_000,
        random=os.urandom(32),
    )


def not_yet(given: Scenario) -> list[str]:
    """What of the scenario this version's `mpc run` refuses."""
    if not given.approvals.quorum:
        return []
    return ["approvals.quorum: `mpc run` refuses this scenario as yet; approving comes with a command `mpc approve`"]


def missing_sources(given: Scenario) -> list[str]:
    """One sentence for each file that `mpc run` would not find on this machine."""
    from parties.datasets import locate

    missing = []
    for owner, party in given.party.items():
        for name, table in party.table.items():
            try:
                locate(table.source)
            except LocalError as error:
                missing.append(f"`mpc run` needs every party's data here; party.{owner}.table.{name}.source: {error}")
    return missing


def _show(out: Output, given: Scenario, contract: Contract, disclosure: object, warnings: list[str]) -> None:
    from enclave_runtime.programs import Disclosure

    assert isinstance(disclosure, Disclosure)
    enclave, deadlines = given.enclave, given.deadlines
    root = "SIMULATED" if contract.enclave.simulated else f"under the root {enclave.root}"
    out.verdict("accepted", f"{contract.name}: {contract.title}" if contract.title else contract.name, GOOD)
    out.line()
    durations = (deadlines.consent, deadlines.seal, deadlines.release)
    out.facts(
        [
            ("draft", contract.digest.hex()),
            ("", "The digest of a draft: a session's own has other random bytes, keys, image and times in it."),
            (
                "enclave",
                f"{enclave.backend}, {root}; image {enclave.image}, {enclave.cpus} CPU, {quantity(enclave.memory)}",
            ),
            ("deadlines", "consent {}, seal {}, release {}".format(*map(quantity, durations))),
            ("receipt for", ", ".join(contract.receipt_recipients)),
        ]
    )
    if given.program.parameters:
        out.heading(f"The program: {contract.program.kind}, digest {contract.program.digest.hex()[:16]}…")
        out.facts([(name, json.dumps(value, ensure_ascii=False)) for name, value in given.program.parameters.items()])
    out.heading(f"{', '.join(disclosure.recipients)} would get")
    out.facts(disclosure.columns)
    if contract.approvals.quorum:
        approvers = ", ".join(contract.approvals.approvers)
        out.points([f"only after {contract.approvals.quorum} of {approvers} approved"])
    out.heading("Rules that hold for it")
    out.points(disclosure.rules)
    out.heading("What each owner lets a query do")
    allowed: dict[tuple[str, str], list[str]] = {}
    for table in contract.tables:
        allowed.setdefault((table.name, _allowed(table)), []).append(table.owner)
    out.points(f"{table} of {', '.join(owners)}: {what}" for (table, what), owners in allowed.items())
    if warnings:
        out.heading("Mind")
        out.points(warnings, "!", CAUTION)


def _allowed(table: Table) -> str:
    rule = table.rule
    if rule.kind == "exact":
        return "exact: this program, word for word, and all that it gives"
    whose = " and ".join(rule.entity) if rule.entity else "row"
    opening = f"groups of at least {rule.k} (each {whose} counts once)"
    if rule.kind == "noise":
        opening = (
            f"noise with epsilon {rule.epsilon:g}, delta {rule.delta:g} (of each {whose} {rule.rows} row(s) count)"
        )
    uses: dict[str, list[str]] = {}
    for column in table.columns:
        for use in column.use:
            shown = f"bucket({column.name})" if column.buckets and use in ("group", "filter") else column.name
            clamp = " in {:g} to {:g}".format(*column.clamp) if column.clamp and use in ADDED else ""
            uses.setdefault(use.replace("_", " "), []).append(shown + clamp)
    listed = "; ".join(f"{use} {', '.join(columns)}" for use, columns in uses.items())
    return f"{opening}; {listed or 'no column may be used'}"


def _owner(contract: Contract, table: Table) -> dict[str, object]:
    return {
        "owner": table.owner,
        "table": table.name,
        "rule": table.rule.kind,
        "k": table.rule.k,
        "epsilon": table.rule.epsilon,
        "delta": table.rule.delta,
        "rows": table.rule.rows,
        "entity": list(table.rule.entity),
        "uses": {column.name: list(column.use) for column in table.columns},
        "receives_result": table.owner in contract.recipients,
    }
