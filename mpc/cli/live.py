"""The picture of a run: rounds down, parties across, bytes sealed with a bar, time; then the result."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from mpc.protocol.messages import Acknowledgement, Computed, Consent, Release, Seal
from mpc.protocol.rounds import Round

if TYPE_CHECKING:
    from mpc.cli.run import Job

REFRESH_HZ = 10
ROWS_SHOWN = 20
BAR_CELLS = 12
WORDS = {
    Round.CONSENT: "consent",
    Round.ATTEST: "attest",
    Round.SEAL: "seal",
    Round.COMPUTE: "compute",
    Round.RELEASE: "release",
    Round.CLOSE: "close",
}


class Live:
    """Shows one job on a terminal; plain lines elsewhere."""

    def __init__(self, job: "Job", *, quiet: bool, to_stderr: bool) -> None:
        self._job = job
        self._console = Console(stderr=to_stderr, quiet=quiet, highlight=False)
        self._moving = self._console.is_terminal and not quiet
        self._told = 0
        self._transient = ""

    def say(self, text: str, *, transient: bool = False) -> None:
        """A line; a transient one only where it can be wiped away again."""
        if transient:
            self._transient = text if self._moving else ""
            return
        self._console.print(text)

    @asynccontextmanager
    async def showing(self, nursery: trio.Nursery) -> AsyncIterator[None]:
        """The picture, until the block ends."""
        if not self._moving:
            nursery.start_soon(self._tell_rounds)
            yield
            return
        with RichLive(self._picture(), console=self._console, auto_refresh=False, transient=False) as live:

            async def refresh() -> None:
                while True:
                    live.update(self._picture(), refresh=True)
                    await trio.sleep(1 / REFRESH_HZ)

            nursery.start_soon(refresh)
            try:
                yield
            finally:
                live.update(self._picture(), refresh=True)

    async def _tell_rounds(self) -> None:
        while True:
            self._tell()
            await trio.sleep(1 / REFRESH_HZ)

    def _tell(self) -> None:
        for event in self._job.events[self._told :]:
            self._console.print(f"  {event}")
            self._told += 1

    def _picture(self) -> RenderableType:
        job = self._job
        elapsed = time.time() - job.began
        simulated = "  [bold yellow]SIMULATED enclave[/]" if job.scenario.enclave.backend == "local" else ""
        title = Text.from_markup(f"[bold]{job.scenario.scenario.name}[/]  {job.scenario.scenario.title}{simulated}")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("round", style="dim", min_width=8)
        for name in (*job.parties, "enclave"):
            table.add_column(name, min_width=BAR_CELLS + 7)
        for round_, word in WORDS.items():
            table.add_row(word, *(self._cell(round_, name) for name in job.parties), self._enclave_cell(round_))
        notes = [Text(f"  {event}", style="yellow") for event in job.events[-5:]]
        return Group(title, table, *notes, Text(f"{elapsed:.1f} s", style="dim"))

    def _cell(self, round_: Round, name: str) -> str:
        job, session = self._job, self._job.session
        progress = job.parties[name]
        if session is None or progress.failed:
            return "[red]failed[/]" if progress.failed and round_ is Round.CONSENT else ""
        if round_ is Round.CONSENT and name in session.contract.parties:
            done = name in session.messages(Consent)
            return "[green]✓[/]" if done else f"reading {_size(progress.read)}" if progress.read else "…"
        if round_ is Round.SEAL and (progress.sealed or name in session.messages(Seal)):
            done_bytes, size = sum(progress.sealed.values()), sum(progress.size.values())
            cells = round(BAR_CELLS * done_bytes / size) if size else 0
            return f"[green]{'━' * cells}[/][dim]{'━' * (BAR_CELLS - cells)}[/] {_size(done_bytes)}"
        if round_ is Round.RELEASE and progress.result:
            return "[green]✓[/] result"
        if round_ is Round.CLOSE and name in session.messages(Acknowledgement):
            return "[green]✓[/] receipt"
        return ""

    def _enclave_cell(self, round_: Round) -> str:
        job, session = self._job, self._job.session
        if session is None:
            return ""
        if round_ is Round.ATTEST and session.binding is not None:
            return f"[green]✓[/] epoch {session.epoch}"
        if round_ is Round.COMPUTE:
            if session.messages(Computed):
                took = job.reached.get(Round.RELEASE, 0) - job.reached.get(Round.COMPUTE, 0)
                return f"[green]✓[/] {took:.2f} s"
            return "computing …" if session.round is Round.COMPUTE else ""
        if round_ is Round.RELEASE and session.messages(Release):
            return "[green]✓[/] released"
        return ""

    def finish(self) -> None:
        """The result, where everything lies, and how to verify it; or the reason why there is none."""
        job = self._job
        self._tell()
        if job.status != "released":
            step = f" (step {job.step})" if job.step is not None else ""
            blame = f"\nProven against: {job.blame}." if job.blame else ""
            self._console.print(f"[bold red]{job.status.capitalize()}.[/] {job.reason}{step}{blame}", soft_wrap=True)
            self._console.print(f"Logs: {_short(job.folder / 'logs')}", soft_wrap=True)
            return
        summary = job.summary()
        first = next(iter(summary["results"].values()))
        self._console.print(_result_table(Path(first["parquet"]), job.scenario.scenario.title))
        for name, files in summary["results"].items():
            self._console.print(f"{name}: {_short(files['csv'])}, {_short(files['parquet'])}", soft_wrap=True)
        timings = summary["timings_s"]
        self._console.print(
            f"Released in {timings['job']:.2f} s from the first consent; {timings['total']:.2f} s with start-up."
            + (" The enclave was SIMULATED: this machine's owner could see all." if summary["simulated"] else "")
        )
        receipt = next(iter(summary["receipts"].values()), None)
        if receipt:
            self._console.print(f"Verify it any time, offline:  [bold]mpc verify {_short(receipt)}[/]", soft_wrap=True)


def _result_table(file: Path, title: str) -> RenderableType:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(file)
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in rows.schema:
        number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        table.add_column(column.name, justify="right" if number else "left")
    for row in rows.slice(0, ROWS_SHOWN).to_pylist():
        table.add_row(*(_shown(value) for value in row.values()))
    if rows.num_rows > ROWS_SHOWN:
        table.caption = f"{ROWS_SHOWN} of {rows.num_rows} rows"
    return table


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"


def _short(path: Path | str) -> str:
    """Relative to here when it is below."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
