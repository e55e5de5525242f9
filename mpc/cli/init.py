"""`mpc init`: a scenario to start from."""

from pathlib import Path

import click

from mpc import scenario as scenarios
from mpc.cli.files import PATH
from mpc.cli.output import GOOD, Output, examples, with_output
from mpc.protocol.errors import LocalError


@click.command(epilog=examples("mpc init --list", "mpc init salaries", "mpc init flights my-own"))
@click.argument("name", required=False)
@click.argument("folder", type=PATH, required=False)
@click.option("--list", "list_them", is_flag=True, help="Print the names of the scenarios that there are.")
@with_output
def init(out: Output, name: str | None, folder: Path | None, list_them: bool) -> int:
    """Copy the shipped scenario NAME into FOLDER, a new one (by default NAME in this folder).

    Exit status: 0 copied; 2 there is no such scenario, or FOLDER exists.
    """
    if list_them:
        out.quiet = False  # the names are the result
        titles = {shipped: _title(shipped) for shipped in scenarios.shipped()}
        out.facts(titles.items())
        out.document({"scenarios": titles})
        return 0
    if name is None:
        raise LocalError("name the scenario to copy; `mpc init --list` prints them")
    target = folder or Path(name)
    scenarios.copy(name, target)
    out.verdict("copied", f"{target}", GOOD)
    out.line()
    out.points([f"edit {target / 'scenario.toml'}", f"mpc check {target}", f"mpc run {target}"])
    out.document({"scenario": name, "folder": str(target)})
    return 0


def _title(name: str) -> str:
    return scenarios.load(scenarios.find(Path(name))).scenario.title
