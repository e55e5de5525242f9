"""The parent of a run's processes: it proposes the contract, watches, starts again what keeps nothing, and waits."""

import os
import time
from contextlib import aclosing
from dataclasses import dataclass

import trio

from mpc import scenario as scenarios
from mpc.cli.job import Job
from mpc.cli.live import Live
from mpc.cli.processes import Child, describe_status, start
from mpc.cli.stops import heeded, let_through
from mpc.host.backends import Prepared
from mpc.protocol.contract import Participant
from mpc.protocol.errors import LocalError
from mpc.protocol.messages import Abort, sign
from mpc.protocol.signing import SigningKey
from mpc.transport import Link, Refused, one_fault

RESTARTS_MAX = 3  # of the coordinator and of the host, which keep nothing that they cannot find again
START_S = 60  # for a party to make its keys, on a machine that is very busy
PATIENCE_S = 8.0  # with those who have not ended when the session has
LAST_WORD_S = 1.0  # for what a process that has ended said before
POLL_S = 0.01


@dataclass
class Pieces:
    """The processes of a run."""

    address: str
    prepared: Prepared
    coordinator: Child
    host: Child
    parties: dict[str, Child]

    def all(self) -> list[Child]:
        return [*self.parties.values(), self.host, self.coordinator]


async def supervise(job: Job, pieces: Pieces, live: Live) -> None:
    """Until every party has come to its end; raises KeyboardInterrupt when somebody stops the run."""
    async with one_fault() as nursery:
        nursery.start_soon(_stops)
        nursery.start_soon(live.refresh)
        async with one_fault() as session:
            session.start_soon(_watch, job, pieces, "coordinator", session.cancel_scope)
            session.start_soon(_watch, job, pieces, "host", session.cancel_scope)
            participants = await _listen(job, pieces, session)
            if participants is not None:
                session.start_soon(_unheard, job, session.cancel_scope)
                author = await _propose(job, pieces, participants)
                session.start_soon(_follow, job, pieces)
                await _until_ended(job, pieces, author)
                with trio.move_on_after(LAST_WORD_S):
                    while job.ended is None:
                        await trio.sleep(POLL_S)  # the coordinator's own view of it
            session.cancel_scope.cancel()
        job.conclude()
        nursery.cancel_scope.cancel()


async def _stops() -> None:
    with trio.open_signal_receiver(*heeded()) as signals, let_through():
        async for _ in signals:
            raise KeyboardInterrupt


async def _listen(job: Job, pieces: Pieces, nursery: trio.Nursery) -> dict[str, Participant] | None:
    """Hear what the parties say from now on, and first their public keys; None when one does not even start."""
    participants: dict[str, Participant] = {}

    async def listen(name: str, child: Child, known: trio.Event) -> None:
        async for line in child.lines():
            if "participant" in line:
                participants[name] = Participant.decode(bytes.fromhex(line["participant"]))
                known.set()
            else:
                job.told(name, line)
        known.set()

    for name, child in pieces.parties.items():
        known = trio.Event()
        nursery.start_soon(listen, name, child, known)
        with trio.move_on_after(START_S):
            await known.wait()
        if name not in participants:
            progress = job.parties[name]
            if not known.is_set():
                progress.failed = f"its process did not start within {START_S} s"
            elif progress.failed is None:
                progress.failed = _died(job, name, await child.ended())
            return None
    return participants


async def _propose(job: Job, pieces: Pieces, participants: dict[str, Participant]) -> SigningKey:
    """Write the contract, sign it, and name the session to all."""
    author = SigningKey(os.urandom(32))
    contract = scenarios.contract(
        job.scenario,
        participants=[participants[name] for name in job.scenario.party],
        author=author.public,
        measurements=[pieces.prepared.measurement],
        root=pieces.prepared.root,
        simulated=pieces.prepared.simulated,
        now_ms=time.time_ns() // 1_000_000,
        random=os.urandom(32),
    )
    envelope = sign(author, contract)
    (job.folder / "contract.cbor").write_bytes(envelope)
    await Link(pieces.address, contract.digest, _ignore).ask({"op": "propose", "envelope": envelope})
    job.proposed(envelope)
    told = {"session": contract.digest.hex(), "participants": [one.encode().hex() for one in contract.participants]}
    for child in (*pieces.parties.values(), pieces.host):
        child.tell(told)
    return author


async def _unheard(job: Job, session: trio.CancelScope) -> None:
    """Who knows the contract keeps its deadlines; a coordinator that stands still from the first tells nobody of it."""
    await trio.sleep(job.scenario.deadlines.consent / 1000 + 2 * PATIENCE_S)
    if job.first_consent is None:
        job.unheard()
        session.cancel()


async def _follow(job: Job, pieces: Pieces) -> None:
    """The coordinator's log, as an onlooker sees it."""
    assert job.session is not None
    link = Link(pieces.address, job.session.contract.digest, _ignore)
    async with aclosing(link.entries()) as entries:
        await anext(entries)  # the proposal
        async for entry, _ in entries:
            job.heard(entry)


async def _until_ended(job: Job, pieces: Pieces, author: SigningKey) -> None:
    """Until every party's process has; when the session is over before, only a little longer."""
    async with one_fault() as waiting:

        async def patience() -> None:
            while not job.doomed:
                await trio.sleep(POLL_S)
            await trio.sleep(PATIENCE_S)
            waiting.cancel_scope.cancel()

        async with one_fault() as parties:
            waiting.start_soon(patience)
            for name, child in pieces.parties.items():
                parties.start_soon(_await_party, job, pieces, author, name, child)
        waiting.cancel_scope.cancel()


async def _await_party(job: Job, pieces: Pieces, author: SigningKey, name: str, child: Child) -> None:
    """A party's process ends in a word, or its death ends the session."""
    status = await child.ended()
    progress = job.parties[name]
    with trio.move_on_after(LAST_WORD_S):
        while progress.ending is None and progress.failed is None and os.WIFEXITED(status):
            await trio.sleep(POLL_S)  # its last line is on the way
    if progress.ending is not None:
        return
    if progress.failed is None:
        progress.failed = _died(job, name, status)
    await _withdraw(job, pieces, author)


def _died(job: Job, name: str, status: int) -> str:
    log = job.folder / "logs" / f"{name}.log"
    see = f"; see {log}" if log.exists() and log.stat().st_size else ""
    return f"its process ended ({describe_status(status)}){see}"


async def _withdraw(job: Job, pieces: Pieces, author: SigningKey) -> None:
    """The author, who started all this, ends the session for those who still wait."""
    session = job.session
    if session is None or job.ended is not None:
        return
    said = sign(author, Abort(session.contract.digest, session.epoch, "withdrawn"))
    with trio.move_on_after(PATIENCE_S):
        try:
            link = Link(pieces.address, session.contract.digest, _ignore)
            await link.ask({"op": "post", "envelope": said})
        except Refused:
            return


async def _watch(job: Job, pieces: Pieces, which: str, session: trio.CancelScope) -> None:
    """Start the coordinator or the host again when it dies: both find their place."""
    for attempt in range(RESTARTS_MAX + 1):
        child: Child = getattr(pieces, which)
        failed = ""
        async for line in child.lines():
            failed = line.get("failed", failed)
            if "event" in line:
                job.events.append(line["event"])
            if "refused" in line:
                job.complaints.append(f"the {which} refused: {line['refused']}")
        status = await child.ended()
        child.wait(0)
        if status == 0 and not failed:
            return
        how = describe_status(status)
        if failed or attempt == RESTARTS_MAX:
            break
        job.events.append(f"the {which} ended ({how}) and was started again")
        again = start(child.name, child.piece, job.folder / "logs" / f"{which}.log", child.arguments)
        setattr(pieces, which, again)
        if which == "host" and job.session is not None:
            again.tell({"session": job.session.contract.digest.hex()})
    why = failed or f"the {which} ended again and again ({how}); see {job.folder / 'logs'}"
    if failed and not job.sealed:
        raise LocalError(why)
    job.fail(why)
    session.cancel()


def _ignore() -> None:
    """A coordinator that does not answer is being started again."""
