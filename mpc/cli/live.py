"""The picture of a run: rounds down, parties across, bytes sealed with a bar, time; then the result."""

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from mpc.cli.job import INTERRUPTED, Job, Progress
from mpc.cli.output import printable
from mpc.protocol.messages import Acknowledgement, Computed, Consent, Release, Seal
from mpc.protocol.rounds import Round

REFRESH_HZ = 10
ROWS_SHOWN = 20
BAR_CELLS = 12
SIZE_CELLS = 9  # " 12.3 MiB"
COLUMN_CELLS = (13, BAR_CELLS + SIZE_CELLS)  # at least and at most; in less room the parties stand one below the other
ROUND_CELLS, TIME_CELLS, GAP = 7, 7, 2
ROOM_CELLS = 70
WORDS = {
    Round.CONSENT: "consent",
    Round.ATTEST: "attest",
    Round.SEAL: "seal",
    Round.COMPUTE: "compute",
    Round.RELEASE: "release",
    Round.CLOSE: "close",
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # whoever reads has seen enough; `main` gives that its status


class Live:
    """Shows one job: moving on a terminal, else a line for each round. All of it is on standard error."""

    def __init__(self, job: Job, *, quiet: bool, as_json: bool) -> None:
        self._job, self._quiet = job, quiet
        self._console = _Console(stderr=True, quiet=quiet, highlight=False, emoji=False)
        self._errors = _Console(stderr=True, highlight=False, emoji=False)
        self._results = _Console(stderr=as_json, highlight=False, emoji=False)
        ascii_only = self._console.options.ascii_only
        self._done, self._bar, self._failed = ("ok", "#", "x") if ascii_only else ("✓", "━", "✗")
        moving = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._live = RichLive(console=self._console, auto_refresh=False) if moving else None
        self._stage = "starting"
        self._told_rounds: set[tuple[int, Round]] = set()
        self._told_events = 0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        self._update()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._update()
        if self._live is not None:
            self._live.stop()

    def stage(self, text: str, *, notable: bool = False) -> None:
        """What happens before the session begins; a notable one takes so long that people wonder."""
        self._stage = text
        if notable and self._live is None:
            self._console.print(f"{self._since(time.time())}  {text} …", markup=False)
        self._update()

    async def refresh(self) -> None:
        """Until cancelled."""
        while True:
            self._update()
            await trio.sleep(1 / REFRESH_HZ)

    def _update(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
        else:
            self._tell()

    # Without a terminal.

    def _tell(self) -> None:
        job = self._job
        for event in job.events[self._told_events :]:
            self._console.print(Text(f"{self._since(time.time())}  {event}"), soft_wrap=True)
        self._told_events = len(job.events)
        epoch = job.session.epoch if job.session else 1
        for round_, at in list(job.reached.items()):
            if (epoch, round_) not in self._told_rounds:
                self._told_rounds.add((epoch, round_))
                self._console.print(Text(f"{self._since(at)}  {self._reached(round_)}"), soft_wrap=True)

    def _since(self, at: float) -> str:
        return f"{at - self._job.began:7.2f} s"

    def _reached(self, round_: Round) -> str:
        job = self._job
        assert job.session is not None
        parties = ", ".join(job.parties)
        return {
            Round.CONSENT: f"proposed to {parties}, in session {job.session.contract.digest.hex()[:16]}…",
            Round.ATTEST: "every party has consented",
            Round.SEAL: f"the enclave has attested, in epoch {job.session.epoch}",
            Round.COMPUTE: "every party has accepted the enclave, and seals its input to it",
            Round.RELEASE: "the enclave has computed",
            Round.CLOSE: "the enclave has released the results",
        }.get(round_, WORDS.get(round_, round_.name.lower()))

    # On a terminal.

    def _picture(self) -> RenderableType:
        job = self._job
        title = Text(printable(f"{job.scenario.scenario.name}  {job.scenario.scenario.title}"), style="bold")
        if job.scenario.enclave.backend == "local" or (job.session and job.session.contract.enclave.simulated):
            title.append("  SIMULATED enclave", style="bold yellow")
        cells = self._column_cells()
        state = [Text(f"{self._stage} …", style="dim")] if job.session is None else []
        notes = [Text(f"! {event}", style="yellow") for event in job.events[-5:]]
        least = max(COLUMN_CELLS[0], *map(len, job.parties))
        table = self._across(cells) if cells >= min(least, COLUMN_CELLS[1]) else self._down()
        return Group(title, table, *notes, *state, Text(f"{time.time() - job.began:.1f} s", style="dim"))

    def _column_cells(self) -> int:
        """How wide a participant's column may be."""
        room = self._console.width - ROUND_CELLS - TIME_CELLS - 2 * GAP
        return min(room // (len(self._job.parties) + 1) - GAP, COLUMN_CELLS[1])

    def _across(self, cells: int) -> Table:
        job = self._job
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
        table.add_column("", style="dim", width=ROUND_CELLS)
        for name in (*job.parties, "enclave"):
            table.add_column(name, width=cells, no_wrap=True)
        table.add_column("", style="dim", width=TIME_CELLS, justify="right")
        for round_, word in WORDS.items():
            parties = (self._cell(round_, name, cells) for name in job.parties)
            table.add_row(word, *parties, self._enclave_cell(round_), self._took(round_))
        return table

    def _down(self) -> Table:
        """Where the parties do not fit side by side: each one's latest round, and what it sealed."""
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=False)
        for _ in range(4):
            table.add_column("", no_wrap=True)
        room = self._console.width >= ROOM_CELLS
        for name, progress in self._job.parties.items():
            states = ((round_, self._cell(round_, name, 0)) for round_ in reversed(WORDS))
            word, state = self._latest(states)
            if room and progress.sealed:
                bar = self._sealed(progress, COLUMN_CELLS[1])
                table.add_row(name, word, Text() if word.plain == WORDS[Round.SEAL] else state, bar)
            else:
                table.add_row(name, word, state, "")
        states = ((round_, self._enclave_cell(round_)) for round_ in reversed(WORDS))
        table.add_row("enclave", *self._latest(states), "")
        return table

    def _latest(self, states: Iterable[tuple[Round, Text]]) -> tuple[Text, Text]:
        return next(((Text(WORDS[round_], style="dim"), text) for round_, text in states if text), (Text(), Text()))

    def _cell(self, round_: Round, name: str, cells: int) -> Text:
        session, progress = self._job.session, self._job.parties[name]
        if progress.stopped and round_ is (session.round if session else Round.CONSENT):
            return Text(f"{self._failed} {'refused' if progress.ending else 'failed'}", style="red")
        if session is None:
            return Text()
        if round_ is Round.CONSENT and name in session.contract.parties:
            if name in session.messages(Consent):
                return self._check("")
            return Text(f"reads {_size(progress.read)}" if progress.read else "…")
        if round_ is Round.SEAL and (progress.sealed or name in session.messages(Seal)):
            return self._sealed(progress, cells)
        if round_ is Round.RELEASE and progress.result:
            return self._check("result")
        if round_ is Round.CLOSE and name in session.messages(Acknowledgement):
            return self._check("receipt")
        return Text()

    def _sealed(self, progress: Progress, cells: int) -> Text:
        """A bar and a number of bytes."""
        done, size = sum(progress.sealed.values()), sum(progress.size.values())
        length = max(0, cells - SIZE_CELLS)
        full = length * done // size if size else 0
        bar = Text(self._bar * full, style="green").append(self._bar * (length - full), style="dim")
        return bar.append(f" {_size(done)}".rjust(SIZE_CELLS), style="default")

    def _enclave_cell(self, round_: Round) -> Text:
        session = self._job.session
        if session is None:
            return Text()
        if round_ is Round.ATTEST and session.binding is not None:
            return self._check(f"epoch {session.epoch}")
        if round_ is Round.COMPUTE and session.messages(Computed):
            return self._check("computed")
        if round_ is Round.COMPUTE and session.round is Round.COMPUTE:
            return Text("computes …" if self._job.sealed_at else "opens …")
        if round_ is Round.RELEASE and session.messages(Release):
            return self._check("released")
        return Text()

    def _check(self, text: str) -> Text:
        return Text(self._done, style="green").append(f" {text}" if text else "", style="default")

    def _took(self, round_: Round) -> str:
        """From its beginning to the beginning of the next that was reached; sealing goes on until the last chunk."""
        reached = dict(self._job.reached)
        if Round.COMPUTE in reached and self._job.sealed_at is not None:
            reached[Round.COMPUTE] = self._job.sealed_at
        later = [at for other, at in reached.items() if other.value > round_.value]
        return f"{max(0, min(later) - reached[round_]):.2f} s" if round_ in reached and later else ""

    # At the end.

    def finish(self) -> None:
        """The result, where everything lies, and how to verify it; or the reason why there is none."""
        job = self._job
        if job.reason == INTERRUPTED:
            self._errors.print("Interrupted. Every process is stopped, and nothing is left behind.")
            return
        if job.status != "released":
            self._explain()
            return
        summary = job.summary()
        first = next(iter(summary["results"].values()))
        if job.scenario.scenario.title:
            self._results.print(Text(printable(job.scenario.scenario.title), style="bold"))
        self._results.print(_result_table(Path(first["parquet"])))
        self._results.print(Text(f"Results and receipts: {_short(job.folder)}/"), soft_wrap=True)
        if not self._quiet:
            timings = summary["timings_s"]
            took = f"Released {timings['job']:.2f} s after the first consent; {timings['total']:.2f} s in all."
            self._results.print(took)
        if summary["simulated"]:
            self._results.print("The enclave was SIMULATED: whoever owns this machine could see all.", style="yellow")
        if self._quiet:
            return
        if summary["limitations"]:
            self._errors.print("What its sandbox here cannot prevent: mpc doctor", soft_wrap=True)
        receipt = next(iter(summary["receipts"].values()), None)
        if receipt:
            verify = Text("Verify it any time, offline:  ").append(f"mpc verify {_short(receipt)}", style="bold")
            self._results.print(verify, soft_wrap=True)

    def _explain(self) -> None:
        job = self._job
        sent = "" if job.sealed else " No data was sent."
        why = Text(f"mpc: {job.status}: ", style="bold red")
        why.append(printable(f"{_sentence(job.reason or '')}{sent}"), style="not bold default")
        self._errors.print(why, soft_wrap=True)
        if not self._quiet:
            self._errors.print(Text(f"The run's logs: {_short(job.folder / 'logs')}/", style="dim"), soft_wrap=True)


def _result_table(file: Path) -> RenderableType:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(file)
    table = Table(caption_justify="left")
    for column in rows.schema:
        number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        table.add_column(Text(printable(column.name)), justify="right" if number else "left")
    for row in rows.slice(0, ROWS_SHOWN).to_pylist():
        table.add_row(*(Text(printable(_shown(value))) for value in row.values()))
    if rows.num_rows > ROWS_SHOWN:
        table.caption = Text(f"{ROWS_SHOWN} of {rows.num_rows} rows; all are in {file.with_suffix('.csv').name}")
    return table


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", "/")) else f"{text}."


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
