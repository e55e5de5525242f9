"""`mpc run`: a whole session on this machine, each participant a process of its own."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from mpc import scenario as scenarios
from mpc.cli.processes import Child, describe_status, fork, start
from mpc.protocol.contract import Participant
from mpc.protocol.errors import LocalError, MpcError, PeerError
from mpc.protocol.messages import Abort, sign
from mpc.protocol.rounds import Round, Session
from mpc.protocol.signing import SigningKey
from mpc.scenario import Scenario

RESTARTS_MAX = 3  # of the coordinator and of the host, which keep nothing that they cannot find again


@click.command(
    epilog="""Examples:

\b
  mpc run scenarios/salaries
  mpc run scenarios/flights --out results --json
"""
)
@click.argument("scenario", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="New folder for the run.  [mpc-runs/NAME/TIME]")
@click.option("--image", type=click.Path(path_type=Path), help="An image file, instead of the one built from source.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; text goes to standard error.")
@click.option("--quiet", is_flag=True, help="No live picture.")
def run(scenario: Path, out: Path | None, image: Path | None, as_json: bool, quiet: bool) -> None:
    """Run SCENARIO: coordinator, enclave and one process for each party, on this machine.

    Exit status: 0 released, 1 refused or aborted, 2 usage, 130 interrupted.
    """
    began = time.time() - time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
    path = scenarios.find(scenario)
    given = scenarios.load(path)
    _check_sources(given)
    folder = _new_folder(out, given)
    job = Job(given, path, folder, began)
    from mpc.cli.live import Live

    live = Live(job, quiet=quiet, to_stderr=as_json)
    try:
        _perform(job, image, live)
    except (KeyboardInterrupt, SystemExit):
        shutil.rmtree(folder, ignore_errors=True)
        live.say("Interrupted. Every process is stopped and nothing is left behind.")
        sys.exit(130)
    except MpcError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    live.finish()
    if as_json:
        click.echo(json.dumps(job.summary(), indent=2))
    sys.exit(0 if job.status == "released" else 1)


@dataclass
class Progress:
    """What a party's process has told about its own work."""

    read: int = 0  # bytes of canonical tables prepared
    sealed: dict[int, int] = field(default_factory=dict)  # bytes by stream
    size: dict[int, int] = field(default_factory=dict)
    ending: str | None = None
    released: bool = False
    failed: str | None = None
    step: int | str | None = None
    result: dict[str, str] | None = None
    receipt: str | None = None


class Job:
    """One run: what is known of it, for the picture and for the summary. It decides nothing about the protocol."""

    def __init__(self, scenario: Scenario, path: Path, folder: Path, began: float) -> None:
        self.scenario, self.path, self.folder, self.began = scenario, path, folder, began
        self.parties = {name: Progress() for name in scenario.party}
        self.session: Session | None = None
        self.reached: dict[Round, float] = {}  # round → time at which it began
        self.first_consent: float | None = None
        self.released_at: float | None = None
        self.proposed_at: float | None = None
        self.events: list[str] = []
        self.blame: str | None = None
        self.step: int | str | None = None
        self.reason: str | None = None
        self.status = "running"
        self.over = False

    def summary(self) -> dict[str, Any]:
        """What `--json` prints; DESIGN section 11."""
        job = self.released_at - self.first_consent if self.released_at and self.first_consent else None
        startup = self.proposed_at - self.began if self.proposed_at else None
        return {
            "status": self.status,
            "session": self.session.contract.digest.hex() if self.session else None,
            "reason": self.reason,
            "step": self.step,
            "blame": self.blame,
            "results": {name: p.result for name, p in self.parties.items() if p.result},
            "receipts": {name: p.receipt for name, p in self.parties.items() if p.receipt},
            "timings_s": {"startup": startup, "job": job, "total": time.time() - self.began},
            "simulated": self.scenario.enclave.backend == "local",
            "folder": str(self.folder),
        }

    def conclude(self) -> None:
        """From what the parties said, in the order in which it explains most."""
        parties = self.parties.values()
        recipients = self.scenario.recipients.result
        if all(self.parties[name].released and self.parties[name].result for name in recipients):
            self.status = "released"
            return
        sealed = any(p.sealed for p in parties)
        self.status = "aborted" if sealed else "refused"
        own = [(name, p) for name, p in self.parties.items() if p.failed]
        other = [(name, p) for name, p in self.parties.items() if p.ending and not p.released]
        explained = [(name, p) for name, p in other if not (p.ending or "").startswith(_SECOND_HAND)]
        for name, progress in own or explained or other:
            self.reason = self.reason or f"{name}: {progress.failed or progress.ending}"
            self.step = self.step or progress.step
            break
        self.reason = self.reason or "the session did not come to an end"


_SECOND_HAND = ("the coordinator ended", "author ended")  # says that it ended, not why


def _check_sources(given: Scenario) -> None:
    """Before anything starts: the files that `mpc run` will read exist and can be read."""
    from parties.datasets import locate

    for owner, party in given.party.items():
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


def _new_folder(out: Path | None, given: Scenario) -> Path:
    """A folder that did not exist: two runs cannot share one, and no old result is written over."""
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S.%f")[:-3]
    folder = (out or Path("mpc-runs") / given.scenario.name / stamp).absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise LocalError(
            f"{folder} exists already, and nothing in it was changed; name a new folder with --out"
        ) from None
    except OSError as error:
        raise LocalError(f"{folder} cannot be made ({error.strerror}); name another folder with --out") from None
    return folder


def _perform(job: Job, image: Path | None, live: Any) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="mpc-"))
    os.environ["TMPDIR"] = str(scratch)  # for the host, whose enclaves are unpacked there
    try:
        with _pieces(job, image, scratch, live) as pieces:
            import trio

            trio.run(_supervise, job, pieces, live, restrict_keyboard_interrupt_to_checkpoints=True)
    finally:
        del os.environ["TMPDIR"]
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass
class Pieces:
    """The processes of a run."""

    address: str
    root: bytes  # fingerprint of the simulated root
    measurement: Any
    coordinator: Child
    host: Child
    parties: dict[str, Child]

    def all(self) -> list[Child]:
        return [*self.parties.values(), self.host, self.coordinator]


@contextmanager
def _pieces(job: Job, image: Path | None, scratch: Path, live: Any) -> Iterator[Pieces]:
    """Start every process, and stop every process. Forks come first: this process holds no secret yet."""
    from mpc.host.simulated_root import SimulatedRoot
    from mpc.image.cache import cached_image, contract_measurement

    enclave = job.scenario.enclave
    live.say("Building the enclave image, once …", transient=True)
    built, _ = cached_image(enclave.image)
    measurement = contract_measurement(enclave.image)
    state = _state_folder()
    root = SimulatedRoot.load_or_create(state)
    address, log = str(scratch / "coordinator"), job.folder / "logs"
    started: list[Child] = []
    try:
        arguments: dict[str, Any] = {"folder": str(job.folder / "coordinator"), "address": address}
        coordinator = fork("coordinator", "coordinator", log / "coordinator.log", arguments)
        started.append(coordinator)
        arguments = {
            "address": address,
            "image": str(image or built),
            "cpus": enclave.cpus,
            "memory_bytes": int(enclave.memory),
            "root": str(state),
        }
        host = fork("host", "host", log / "host.log", arguments)
        started.append(host)
        _preload()
        parties = {}
        for name in job.scenario.party:
            arguments = {
                "folder": str(job.folder / name),
                "name": name,
                "scenario": str(job.path.absolute()),
                "address": address,
                "root": root.fingerprint.hex(),
            }
            parties[name] = fork(name, "party", log / f"{name}.log", arguments)
            started.append(parties[name])
        pieces = Pieces(address, root.fingerprint, measurement, coordinator, host, parties)
        yield pieces
        started = pieces.all()  # some may have been started again
    finally:
        for child in started:
            child.end()


def _preload() -> None:
    """What every party needs, once for all of them."""
    import duckdb  # noqa: F401
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401
    import trio  # noqa: F401

    import parties.client
    import parties.policy
    import parties.results  # noqa: F401


def _state_folder() -> Path:
    """Where this machine's simulated root lives."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "enclave-mpc"


async def _supervise(job: Job, pieces: Pieces, live: Any) -> None:
    """Until every party has come to its end, or somebody interrupts."""
    from mpc.transport import one_fault

    async with one_fault() as nursery, live.showing(nursery):
        nursery.start_soon(_interrupts)
        nursery.start_soon(_watch, job, pieces, "coordinator")
        nursery.start_soon(_watch, job, pieces, "host")
        envelope, author = await _propose(job, pieces, nursery)
        nursery.start_soon(_follow, job, pieces, envelope)
        async with one_fault() as waiting:
            for name, child in pieces.parties.items():
                waiting.start_soon(_await_party, job, pieces, author, name, child)
        job.conclude()
        nursery.cancel_scope.cancel()


async def _interrupts() -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            raise KeyboardInterrupt


async def _propose(job: Job, pieces: Pieces, nursery: Any) -> tuple[bytes, SigningKey]:
    """Collect the participants' public keys, write the contract, sign it, and name the session to all."""
    import trio

    participants: dict[str, Participant] = {}

    async def collect(name: str, child: Child, done: Any) -> None:
        async for line in child.lines():
            if "participant" in line:
                participants[name] = Participant.decode(bytes.fromhex(line["participant"]))
                done.set()
            else:
                _note(job, name, line)
        done.set()

    for name, child in pieces.parties.items():
        done = trio.Event()
        nursery.start_soon(collect, name, child, done)
        await done.wait()
    missing = set(pieces.parties) - set(participants)
    if missing:
        raise LocalError(f"{sorted(missing)[0]}: its process could not start; see {job.folder / 'logs'}")
    author = SigningKey(os.urandom(32))
    contract = scenarios.contract(
        job.scenario,
        participants=[participants[name] for name in job.scenario.party],
        author=author.public,
        measurements=[pieces.measurement],
        root=pieces.root,
        simulated=True,
        now_ms=time.time_ns() // 1_000_000,
        random=os.urandom(32),
    )
    envelope = sign(author, contract)
    from mpc.transport import Link

    (job.folder / "contract.cbor").write_bytes(envelope)
    await Link(pieces.address, contract.digest, lambda: None).ask({"op": "propose", "envelope": envelope})
    job.session, job.proposed_at = Session.propose(envelope), time.time()
    told = {"session": contract.digest.hex(), "participants": [one.encode().hex() for one in contract.participants]}
    for child in (*pieces.parties.values(), pieces.host):
        child.tell(told)
    return envelope, author


async def _follow(job: Job, pieces: Pieces, proposal: bytes) -> None:
    """The coordinator's log, as an onlooker sees it."""
    from mpc.transport import Ended, EpochOpened, Link

    assert job.session is not None
    link = Link(pieces.address, job.session.contract.digest, lambda: None)
    async with aclosing(link.entries()) as entries:
        async for entry, _ in entries:
            now = time.time()
            if isinstance(entry, EpochOpened):
                job.session = Session.propose(proposal, entry.epoch)
                job.events.append(f"the enclave was lost; epoch {entry.epoch} begins with new consents")
            elif isinstance(entry, Ended):
                job.over = True
                if entry.outcome != "released":
                    job.events.append(" ".join(filter(None, (entry.outcome, entry.reason, ", ".join(entry.names)))))
            else:
                _hear(job, entry.envelope, now)


def _hear(job: Job, envelope: bytes, now: float) -> None:
    assert job.session is not None
    try:
        session, heard = job.session.hear(envelope)
    except PeerError:
        return
    if heard.signed.kind == "consent" and job.first_consent is None:
        job.first_consent = now
    if heard.signed.kind == "release":
        job.released_at = now
    if isinstance(heard.message, Abort) and heard.message.blamed:
        job.blame = heard.message.blamed
    if session.round is not job.session.round:
        job.reached[session.round] = now
    job.session = session


def _note(job: Job, name: str, line: dict[str, Any]) -> None:
    """A line of a party's process."""
    progress = job.parties[name]
    if "read" in line:
        progress.read = line["read"]
    elif "sealed" in line:
        progress.sealed[line["stream"]] = line["sealed"]
        progress.size[line["stream"]] = line["of"]
    elif "ending" in line:
        progress.ending, progress.released = line["ending"], line["released"]
        progress.result, progress.receipt = line["result"], line["receipt"]
    elif "failed" in line:
        progress.failed, progress.step = line["failed"], line.get("step")
    elif "refused" in line:
        progress.step = line.get("step", progress.step)
        job.events.append(f"{name} refused: {line['refused']}")


async def _await_party(job: Job, pieces: Pieces, author: SigningKey, name: str, child: Child) -> None:
    """A party's process ends in a word, or its death ends the session."""
    import trio

    status = await child.ended()
    with trio.move_on_after(1):
        while job.parties[name].ending is None and job.parties[name].failed is None and status == 0:
            await trio.sleep(0.01)  # its last line is on the way
    progress = job.parties[name]
    if progress.ending is None:
        if progress.failed is None:
            progress.failed = f"its process ended ({describe_status(status)}); see {job.folder / 'logs' / name}.log"
        await _abort(job, pieces, author)


async def _abort(job: Job, pieces: Pieces, author: SigningKey) -> None:
    """The author, who started all this, ends the session for those who still wait."""
    import trio

    from mpc.transport import Link, Refused

    session = job.session
    if session is None or job.over:
        return
    said = sign(author, Abort(session.contract.digest, session.epoch, "withdrawn"))
    with trio.move_on_after(5):
        try:
            link = Link(pieces.address, session.contract.digest, lambda: None)
            await link.ask({"op": "post", "envelope": said})
        except Refused:
            return


async def _watch(job: Job, pieces: Pieces, which: str) -> None:
    """Restart the coordinator or the host when it dies; both find their place again."""
    for attempt in range(RESTARTS_MAX + 1):
        child: Child = getattr(pieces, which)
        failed = ""
        async for line in child.lines():
            if "failed" in line:
                failed = line["failed"]
            elif "refused" in line:
                job.events.append(f"{which}: refused {line['refused']}")
        status = await child.ended()
        child.end()
        if status == 0 and not failed:
            return
        if failed or attempt == RESTARTS_MAX:
            raise LocalError(failed or f"the {which} ended again ({describe_status(status)}); see {job.folder}/logs")
        job.events.append(f"the {which} ended ({describe_status(status)}) and was started again")
        again = start(child.name, child.piece, job.folder / "logs" / f"{which}.log", child.arguments)
        setattr(pieces, which, again)
        if which == "host" and job.session is not None:
            again.tell({"session": job.session.contract.digest.hex()})
