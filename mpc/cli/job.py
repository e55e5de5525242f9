"""What is known of one run, for its picture and its summary. It decides nothing about the protocol."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enclave_runtime.programs import CODES
from mpc.protocol.errors import PeerError
from mpc.protocol.messages import Abort
from mpc.protocol.rounds import Role, Round, Session
from mpc.scenario import Scenario
from mpc.settings import quantity
from mpc.transport import Ended, EpochOpened, Said

REFUSALS = {
    **CODES,
    "input": "its input is not what it committed to, or not of the contract's schema; it must be prepared again",
    "late": "a deadline of the contract had passed; allow more time under [deadlines]",
}
INTERRUPTED = "interrupted"


@dataclass
class Progress:
    """What a party's process has told about its own work."""

    read: int = 0  # bytes of canonical tables prepared
    sealed: dict[int, int] = field(default_factory=dict)  # bytes by stream
    size: dict[int, int] = field(default_factory=dict)
    ending: str | None = None
    released: bool = False
    failed: str | None = None  # why its process ended without an ending
    step: int | str | None = None
    result: dict[str, str] | None = None
    receipt: str | None = None

    @property
    def stopped(self) -> str | None:
        """Its own words about why it ended without a release."""
        return self.failed or (self.ending if not self.released else None)


class Job:
    """One run."""

    def __init__(self, scenario: Scenario, path: Path, folder: Path, began: float) -> None:
        self.scenario, self.path, self.folder, self.began = scenario, path, folder, began
        self.parties = {name: Progress() for name in scenario.party}
        self.session: Session | None = None
        self._proposal = b""
        self.reached: dict[Round, float] = {}  # round of this epoch → Unix time at which it began
        self.first_consent: float | None = None
        self.sealed_at: float | None = None  # the last chunk of this epoch
        self.released_at: float | None = None
        self.proposed_at: float | None = None
        self.events: list[str] = []  # what a person should see at once
        self.complaints: list[str] = []  # what was refused without an end to it: explains a silence later
        self.sealed = False  # by any party in any epoch
        self.aborts: list[tuple[str, Abort]] = []  # as the coordinator took them
        self.ended: Ended | None = None
        self.status = "running"
        self.reason: str | None = None
        self.step: int | str | None = None
        self.blame: str | None = None

    # What happens.

    def proposed(self, envelope: bytes) -> None:
        self._proposal = envelope
        self.proposed_at = time.time()
        self._begin(Session.propose(envelope))

    def heard(self, entry: Said | EpochOpened | Ended) -> None:
        """The coordinator's log goes on."""
        if isinstance(entry, EpochOpened):
            self._begin(Session.propose(self._proposal, entry.epoch))
            self.events.append(f"the enclave was lost; epoch {entry.epoch} begins, with new consents")
        elif isinstance(entry, Ended):
            self.ended = entry
        else:
            self._hear(entry.envelope)

    def _begin(self, session: Session) -> None:
        self.session, self.sealed_at = session, None
        self.reached = {session.round: time.time()}
        for progress in self.parties.values():
            progress.sealed.clear()

    def _hear(self, envelope: bytes) -> None:
        assert self.session is not None
        try:
            session, heard = self.session.hear(envelope)
        except PeerError:
            return
        now = time.time()
        if heard.signed.kind == "consent" and self.first_consent is None:
            self.first_consent = now
        if heard.signed.kind == "release":
            self.released_at = now
        self.sealed = self.sealed or heard.signed.kind == "seal"
        if isinstance(heard.message, Abort):
            self.aborts.append((heard.name, heard.message))
        if session.round is not self.session.round:
            self.reached[session.round] = now
        self.session = session

    def told(self, name: str, line: dict[str, Any]) -> None:
        """A line of a party's process."""
        progress = self.parties[name]
        if "read" in line:
            progress.read = line["read"]
        elif "sealed" in line:
            progress.sealed[line["stream"]] = line["sealed"]
            progress.size[line["stream"]] = line["of"]
            if self._all_sealed():
                self.sealed_at = time.time()
        elif "ending" in line:
            progress.ending, progress.released = line["ending"], line["released"]
            progress.result, progress.receipt = line["result"], line["receipt"]
        elif "failed" in line:
            progress.failed = line["failed"]
        elif "refused" in line:
            self.complaints.append(f"{name} refused: {line['refused']}")
        if line.get("step") is not None:
            progress.step = line["step"]

    def _all_sealed(self) -> bool:
        tables = sum(len(party.table) for party in self.scenario.party.values())
        return sum(len(p.sealed) for p in self.parties.values()) == tables and all(
            p.sealed == p.size for p in self.parties.values()
        )

    @property
    def doomed(self) -> bool:
        """A participant has stopped, or the coordinator closed the session: who is still there will end soon."""
        if self.ended is not None or self.aborts:
            return True
        closing = self.session is not None and self.session.round is Round.CLOSE
        return not closing and any(progress.stopped for progress in self.parties.values())

    # What came of it.

    def conclude(self) -> None:
        """Say what the run came to, and if nothing was released, why: in the words of who ended it."""
        if self.status != "running":
            return
        if all(self.parties[name].result for name in self.scenario.recipients.result):
            self.status = "released"
            return
        self.fail(self._why())

    def fail(self, reason: str) -> None:
        """Nothing is released, or not to everybody."""
        if self.status == "running":
            self.status, self.reason = ("aborted" if self.sealed else "refused"), reason

    def unheard(self) -> None:
        """Long after the first deadline no party has even consented."""
        given = quantity(self.scenario.deadlines.consent)
        self.fail(f"the coordinator: not heard, and nobody could consent within {given} (deadlines.consent)")

    def interrupt(self) -> None:
        """Somebody stopped it, whatever it had come to."""
        self.status, self.reason, self.step = "aborted", INTERRUPTED, None

    def _why(self) -> str:
        for name, abort in self.aborts:  # only the first counts, save where it says nothing itself
            if name == Role.ENCLAVE.value:
                # Only a party has appraised the enclave; what an onlooker hears may be anybody's word.
                endings = [progress.ending or "" for progress in self.parties.values()]
                proven = any(f"proven against {abort.blamed}" in ending for ending in endings)
                self.blame = abort.blamed if proven else None
                who = f"{self.blame}, as the enclave proves" if self.blame else "the enclave"
                return f"{who}: {REFUSALS.get(abort.reason, abort.reason)}"
            progress = self.parties.get(name)
            if progress is not None and progress.stopped:
                return self._in_words(name, progress, abort.reason)
        failed = {name: progress for name, progress in self.parties.items() if progress.failed}
        if self.ended is not None and not failed:
            return self._ended_in_words(self.ended)
        stopped = failed or {name: progress for name, progress in self.parties.items() if progress.stopped}
        for name, progress in stopped.items():
            return "; ".join([self._in_words(name, progress), *self.complaints[:1]])
        return "the session did not come to an end"

    def _in_words(self, name: str, progress: Progress, reason: str = "") -> str:
        self.step = progress.step
        if reason == "policy" and (progress.ending or "").startswith("contract: program: "):
            # Every party reads the same program, and the scenario is where a person mends it.
            return f"{self.path}: program.{(progress.ending or '').removeprefix('contract: program: ')}"
        return f"{name}: {progress.stopped}"

    def _ended_in_words(self, ended: Ended) -> str:
        if ended.outcome == "enclave lost":
            return f"the enclave was lost, {ended.reason}"
        if ended.outcome != "not heard":
            return " ".join(filter(None, (f"{ended.outcome}:", ended.reason, *ended.names)))
        what = f"not heard in {ended.reason}, whose deadline is"
        if ended.reason == "round compute" and Role.ENCLAVE.value not in ended.names:
            what = "its input had not arrived whole at the deadline of"
        why = f"{', '.join(ended.names)}: {what} {self._deadline(ended)}"
        return "; ".join([why, *self.complaints[:1]])

    def _deadline(self, ended: Ended) -> str:
        """Which key of the scenario set the deadline that was missed."""
        given, early = self.scenario.deadlines, ended.reason in ("round consent", "round attest")
        if early and (self.session is None or self.session.epoch == 1):
            return f"{quantity(given.consent)} (deadlines.consent)"
        if early or ended.reason == "round seal" or Role.ENCLAVE.value not in ended.names:
            return f"{quantity(given.seal)} (deadlines.seal)"
        return f"{quantity(given.release)} (deadlines.release)"

    def _limitations(self) -> list[str]:
        """What this launch of the enclave could not prevent: a sentence each, as `mpc doctor` prints them."""
        if self.scenario.enclave.backend != "local":
            return []
        from mpc.host import local

        return local.limitations()

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
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
            "simulated": self.session.contract.enclave.simulated if self.session else None,
            "limitations": self._limitations(),
            "folder": str(self.folder),
        }
