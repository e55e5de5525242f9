"""`mpc run`: a whole session on this machine, each participant a process of its own."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpc import scenario as scenarios
from mpc.cli.files import PATH
from mpc.cli.job import Job
from mpc.cli.output import Output, examples, with_output
from mpc.cli.processes import Child, end, fork
from mpc.cli.stops import held_back, let_through
from mpc.protocol.errors import LocalError, MpcError
from mpc.scenario import Scenario

if TYPE_CHECKING:
    from mpc.cli.live import Live
    from mpc.cli.supervise import Pieces

OWN_FOLDERS = ("coordinator", "host", "logs")  # names of files and folders that a party's must not fall together with
ADDRESS_BYTES_MAX = 100  # of a Unix socket, and a little less than Linux allows


@click.command(epilog=examples("mpc run scenarios/salaries", "mpc run scenarios/flights --out results --json"))
@click.argument("scenario", type=PATH)
@click.option("--out", "folder", type=PATH, metavar="FOLDER", help="New folder for the run.  [mpc-runs/NAME/TIME]")
@click.option("--image", type=PATH, metavar="FILE", help="An image file. nitro needs one; local builds its own.")
@click.option("--console", type=PATH, metavar="FILE", help="nitro: DEBUG MODE, which every party refuses; log it here.")
@with_output
def run(out: Output, scenario: Path, folder: Path | None, image: Path | None, console: Path | None) -> int:
    """Run SCENARIO: coordinator, enclave and one process for each party, on this machine.

    SCENARIO is a folder with a scenario.toml, such a file, or the name of a shipped scenario.

    Exit status: 0 released; 1 refused or aborted; 2 a file cannot be used; 130 interrupted.
    """
    began = time.time() - time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    path = scenarios.find(scenario)
    given = scenarios.load(path)
    _check(given)
    if console is not None:
        if given.enclave.backend == "local":
            raise LocalError('--console is for backend = "nitro"; a local enclave says why it does not start')
        from mpc.host.nitro import DEBUG_WARNING

        sys.stderr.write(DEBUG_WARNING)
    from mpc.cli.live import Live

    with held_back():
        try:
            with _new_folder(folder, given) as place:
                job = Job(given, path, place, began)
                with Live(job, quiet=out.quiet, as_json=out.as_json) as live:
                    _perform(job, image, console, live)
        except KeyboardInterrupt:
            job.interrupt()
        live.finish()
        out.document(job.summary())
    return {"released": 0, "interrupted": 130}.get(job.reason or job.status, 1)


def _check(given: Scenario) -> None:
    """Before anything starts: names that can be folders, and files that can be read."""
    from parties.datasets import locate

    if given.approvals.quorum:
        raise LocalError("approvals.quorum: there is no command to approve with yet; leave [approvals] out")
    for owner, party in given.party.items():
        if owner.lower() in OWN_FOLDERS:
            raise LocalError(f"party.{owner}: `mpc run` calls a folder of its own so; give the party another name")
        for name, table in party.table.items():
            where = f"party.{owner}.table.{name}.source"
            if not table.source:
                raise LocalError(f"{where}: is missing; `mpc run` reads every party's data on this machine")
            try:
                file = locate(table.source)
            except LocalError as error:
                raise LocalError(f"{where}: {error}") from None
            if not os.access(file, os.R_OK):
                raise LocalError(f"{where}: {file} cannot be read; check its permissions")


@contextmanager
def _new_folder(out: Path | None, given: Scenario) -> Iterator[Path]:
    """A folder that did not exist: two runs cannot share one, and no old result is written over.

    It is gone again, with the parents that were made for it, when the run is interrupted or cannot begin.
    """
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S.%f")[:-3]
    folder = (out or Path("mpc-runs") / given.scenario.name / stamp).absolute()
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise LocalError(
            f"{folder} exists already, and nothing in it was changed; name a new folder with --out"
        ) from None
    except OSError as error:
        raise LocalError(f"{folder} cannot be made ({error.strerror}); name another folder with --out") from None
    try:
        yield folder
    except (MpcError, KeyboardInterrupt):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another run's may be in it by now
            for parent in made:
                parent.rmdir()
        raise


def _perform(job: Job, image: Path | None, console: Path | None, live: "Live") -> None:
    """All processes, from start to end; raises KeyboardInterrupt when the run was stopped."""
    with _scratch(job.folder) as scratch, _pieces(job, image, console, scratch, live) as pieces:
        import trio

        from mpc.cli.supervise import supervise

        trio.run(supervise, job, pieces, live, restrict_keyboard_interrupt_to_checkpoints=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Where the coordinator's socket is; afterwards no copy of anybody's tables is left in the run's folder either."""
    scratch = Path(tempfile.mkdtemp(prefix="mpc-"))
    if len(str(scratch)) > ADDRESS_BYTES_MAX:
        scratch.rmdir()
        scratch = Path(tempfile.mkdtemp(prefix="mpc-", dir="/tmp"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for spool in folder.glob("*/spool"):  # of parties that were killed
            shutil.rmtree(spool, ignore_errors=True)


@contextmanager
def _pieces(job: Job, image: Path | None, console: Path | None, scratch: Path, live: "Live") -> "Iterator[Pieces]":
    """Start every process, and stop every process. Forks come first: this process holds no secret yet."""
    from mpc.cli.supervise import Pieces
    from mpc.host.backends import prepare

    enclave, state = job.scenario.enclave, _state_folder()

    def announce() -> None:
        live.stage(f"building the enclave image {enclave.image}, once for this installation", notable=True)

    with let_through():
        prepared = prepare(enclave, image and image.absolute(), state, announce)
    address, log = str(scratch / "coordinator"), job.folder / "logs"
    started: list[Child] = []
    pieces: Pieces | None = None
    try:
        arguments: dict[str, Any] = {"folder": str(job.folder / "coordinator"), "address": address}
        coordinator = fork("coordinator", "coordinator", log / "coordinator.log", arguments)
        started.append(coordinator)
        arguments = {
            "address": address,
            "state": str(state),
            "image": str(prepared.image),
            "console": str(console.absolute()) if console else None,
            "backend": enclave.backend,
            "cpus": enclave.cpus,
            "memory_bytes": int(enclave.memory),
        }
        host = fork("host", "host", log / "host.log", arguments)
        started.append(host)
        with let_through():
            _preload(job.scenario.program.kind)
        parties = {}
        for name in job.scenario.party:
            arguments = {
                "folder": str(job.folder / name),
                "name": name,
                "scenario": str(job.path.absolute()),
                "image": str(prepared.image),
                "address": address,
                "root": prepared.root.hex(),
                "simulated": prepared.simulated,
            }
            parties[name] = fork(name, "party", log / f"{name}.log", arguments)
            started.append(parties[name])
        pieces = Pieces(address, prepared, coordinator, host, parties)
        live.stage("the parties make their keys")
        yield pieces
    finally:
        end(pieces.all() if pieces else started)  # some may have been started again


def _preload(kind: str) -> None:
    """What every party needs, once for all of them."""
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # a thread does not survive a fork
    import duckdb  # noqa: F401
    import pyarrow.compute
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401
    import trio  # noqa: F401

    import mpc.image.cache  # noqa: F401
    import parties.client
    import parties.datasets
    import parties.policy
    import parties.results  # noqa: F401
    from enclave_runtime import programs

    programs.program(kind)


def _state_folder() -> Path:
    """Where this machine's simulated root lives."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "enclave-mpc"
