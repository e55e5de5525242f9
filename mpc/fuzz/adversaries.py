"""The bounded adversaries that the explorer exhausts: who is there, and what they may do."""

from dataclasses import dataclass, replace

from mpc.fuzz.actors import Actor
from mpc.fuzz.forger import other_contract
from mpc.fuzz.infrastructure import EnclaveActor
from mpc.fuzz.setting import Setting
from mpc.fuzz.stage import CRASHES_MAX, DEFERRED_MAX, Stage
from mpc.fuzz.world import CONSENT_MS, OTHER_PCRS, PCRS, RELEASE_MS, SEAL_MS, START_MS

AGREED, OTHER_CODE, DEBUG, OTHER_CONTRACT = "agreed", "other code", "debug", "other contract"
TIMES_MS = tuple(START_MS + late + 1 for late in (0, CONSENT_MS, SEAL_MS, RELEASE_MS))  # between deadlines
MOVES = {
    "coordinator": "an honest coordinator's machine takes part",
    "epochs": "any epoch is called for at any time",
    "ends": "it is said to be over",
    "slow": f"parties prepare their tables slowly, and meanwhile hear up to {DEFERRED_MAX} things, each once",
    "crash": f"each party dies up to {CRASHES_MAX} time, between any two events or actions, and starts again",
    "time": "the clock passes each deadline, at any time",
    "forge": "stranger and corrupt participants sign what no machine would",
    "alter": "all also arrives with a bit flipped, cut off, or at another place",
}


@dataclass(frozen=True)
class Adversary:
    """One bounded adversary. All of them own the network: see mpc.fuzz.explorer.

    A corrupt party is no machine here: from the start the adversary has its consents to every epoch, with each of
    its inputs, and seals each of them to every enclave that shows itself.
    """

    name: str
    about: str
    setting: Setting
    enclaves: tuple[tuple[int, str], ...] = ((1, AGREED),)  # epoch, and what it is
    moves: frozenset[str] = frozenset()
    inputs: int = 2  # that a corrupt party may come with
    fair: bool = False  # where nothing can change any more, the session has ended in a result

    @property
    def times_ms(self) -> tuple[int, ...]:
        return TIMES_MS if "time" in self.moves else TIMES_MS[:1]

    @property
    def bound(self) -> str:
        """Who is there, and what the adversary may do."""
        setting = self.setting
        corrupt = f" ({', '.join(sorted(setting.corrupt))} corrupt)" if setting.corrupt else ""
        approvers = f", {setting.approvers} approvers" if setting.approvers else ""
        epochs = "one epoch" if setting.epochs_max == 1 else f"{setting.epochs_max} epochs"
        who = f"{setting.parties} parties{approvers}{corrupt}, {epochs}"
        enclaves = ", ".join(f"{kind} in epoch {epoch}" for epoch, kind in self.enclaves)
        moves = [about for move, about in MOVES.items() if move in self.moves]
        return "; ".join([who, f"enclaves: {enclaves or 'none'}", "any order, loss and repetition", *moves])

    def actors(self, stage: Stage) -> list[Actor]:
        """The machines that take part."""
        made: list[Actor] = [actor for actor in (*stage.parties.values(), *stage.approvers.values()) if actor.honest]
        for number, (epoch, kind) in enumerate(self.enclaves):
            pcrs = OTHER_PCRS if kind == OTHER_CODE else PCRS
            proposal = other_contract(stage) if kind == OTHER_CONTRACT else stage.proposal
            made.append(EnclaveActor(stage, number, epoch, proposal, pcrs, debug=kind == DEBUG))
        if "coordinator" in self.moves:
            made.append(stage.coordinator)
        return made


TWO = Setting(parties=2, epochs_max=1)
TWICE = replace(TWO, epochs_max=2)
PARTNER, APPROVER, BOTH = frozenset({"party-1"}), frozenset({"approver-1"}), frozenset({"party-0", "party-1"})
APPROVED = replace(TWO, approvers=2, quorum=2, corrupt=APPROVER)
REWOUND = ((1, AGREED), (2, AGREED))
ADVERSARIES: tuple[Adversary, ...] = (
    Adversary("order", "only the network", TWO, moves=frozenset({"coordinator"}), fair=True),
    Adversary("slow", "tables take their time", TWO, moves=frozenset({"slow", "crash"}), fair=True),
    Adversary("approve", "one of two approvers is corrupt", APPROVED, moves=frozenset({"forge"})),
    Adversary("late", "deadlines pass", TWO, moves=frozenset({"time"})),
    Adversary("crash", "parties die", TWO, moves=frozenset({"crash"}), fair=True),
    Adversary("split", "two enclaves in one epoch", TWO, ((1, AGREED), (1, AGREED)), frozenset({"crash"})),
    Adversary(
        "rewind",
        "a corrupt partner has two inputs, and there are two epochs",
        replace(TWICE, corrupt=PARTNER),
        REWOUND,
        frozenset({"epochs"}),
    ),
    Adversary(
        "all",
        "the same, and the other party dies, and it is said to be over",
        replace(TWICE, corrupt=PARTNER),
        REWOUND,
        frozenset({"epochs", "crash", "ends"}),
    ),
    Adversary(
        "rogue",
        "enclaves that are not the agreed one",
        TWO,
        ((1, AGREED), (1, OTHER_CODE), (1, DEBUG), (1, OTHER_CONTRACT)),
    ),
    Adversary(
        "forge", "a corrupt partner signs anything", replace(TWO, corrupt=PARTNER), moves=frozenset({"forge", "alter"})
    ),
    Adversary(
        "mailbox",
        "the coordinator's machine, when everybody else is corrupt",
        replace(TWO, corrupt=BOTH),
        (),
        frozenset({"coordinator", "epochs", "forge", "time"}),
        inputs=1,
    ),
)
