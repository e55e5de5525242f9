"""The scenario file: what people write down before a session, and the contract that it becomes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mpc.protocol import contract as terms
from mpc.protocol.encoding import encode
from mpc.protocol.errors import LocalError, MpcError
from mpc.settings import Duration, Named, Settings, Size, about, nearest, read, reference

NITRO_ROOT = "aws-nitro-enclaves-g1"
MODULE_BYTES_MAX = 3 << 19  # a contract with the module in it goes to everybody


class About(Settings, frozen=True, kw_only=True):
    """What the scenario is called."""

    name: Annotated[Named, about("Names the contract and the folder of a run.", "flights")]
    title: Annotated[str, about("The question, in a sentence.", "Does wind delay?")] = ""


class Enclave(Settings, frozen=True, kw_only=True):
    """The enclave that computes."""

    backend: Annotated[
        Literal["local", "nitro"], about("`local`: a sandboxed process under a SIMULATED root; `nitro`: AWS.", "local")
    ] = "local"
    image: Annotated[
        Named,
        about(
            "Variant of the image; `mpc measure` gives its measurements. nitro: `mpc run --image` names the file.",
            "sql",
        ),
    ] = "sql"
    root: Annotated[
        str,
        about(
            "nitro: root of attestation, by name or by the SHA-256 of its certificate, which parts of AWS other than "
            "the commercial regions need. local: always the machine's own.",
            NITRO_ROOT,
        ),
    ] = NITRO_ROOT
    cpus: Annotated[
        int, about("Processors; also the engine's threads. nitro on x86: an even number.", 2, ge=1, le=256)
    ] = 1
    memory: Annotated[Size, about("Memory, engine and inputs together; at least 64 MiB.", "4 GiB")] = Size(2 << 30)
    epochs: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=100)] | None,
        about(
            "Enclaves that may be started, one after another died, at most 100; none written: 3, and 1 under a rule of "
            "noise, of which each spends the budget.",
            3,
        ),
    ] = None

    def __post_init__(self) -> None:
        if not 64 << 20 <= self.memory <= 1 << 42:
            raise LocalError("memory", expected="64 MiB to 4 TiB")
        if self.root != NITRO_ROOT:
            from mpc.attestation.roots import root_fingerprint  # not for everybody: it takes longer than the file

            root_fingerprint(self.root)
            if self.backend == "local":
                raise LocalError('root: is for backend = "nitro"; a local enclave has its machine\'s own')


class Deadlines(Settings, frozen=True, kw_only=True):
    """Durations from the proposal; consent < seal < release. Nothing of a round counts after its deadline."""

    consent: Annotated[Duration, about("Every party has consented.", "2 min")] = Duration(120_000)
    seal: Annotated[Duration, about("Every input is sealed.", "10 min")] = Duration(600_000)
    release: Annotated[Duration, about("The result is released.", "1 h")] = Duration(1_800_000)

    def __post_init__(self) -> None:
        if not self.consent < self.seal < self.release:
            raise LocalError("consent, seal, release", expected="each longer than the one before it")


class Rule(Settings, frozen=True, kw_only=True):
    """What may leave of the table, as its owner decides."""

    kind: Annotated[
        Literal["aggregate", "exact", "noise"],
        about(
            "`aggregate`: groups of at least `k` entities, columns used only as listed; "
            "`exact`: the program of this file, word for word, and no other; "
            "`noise`: differential privacy, columns used only as listed.",
            "aggregate",
        ),
    ]
    entity: Annotated[
        str | tuple[str, ...], about("Column or columns that name one entity; none: each row is one.", "employee")
    ] = ()
    k: Annotated[int, about("aggregate: distinct entities behind every group.", 10, ge=0, le=1_000_000)] = 0
    epsilon: Annotated[
        float, about("noise: how much one entity may change the odds of any result; less is safer.", 1.0, ge=0)
    ] = 0.0
    delta: Annotated[
        float, about("noise: chance that a group shows which one entity alone makes; 0: named groups only.", 1e-7, ge=0)
    ] = 0.0
    rows: Annotated[int, about("noise: rows of one entity that count.", 5, ge=0, le=1_000_000)] = 0

    @property
    def entities(self) -> tuple[str, ...]:
        return (self.entity,) if isinstance(self.entity, str) else self.entity


class Column(Settings, frozen=True, kw_only=True):
    """A column and the only ways in which its owner lets a query use it."""

    type: Annotated[
        terms.Type,
        about("`timestamp` is UTC with microseconds; `date` has no time.", "double"),
    ]
    use: Annotated[
        tuple[terms.Use, ...], about("Under a rule of aggregate or noise: ways to use it.", ("avg", "count"))
    ] = ()
    buckets: Annotated[
        tuple[float, ...], about("Ascending edges; then grouped and filtered only as `bucket(column)`.", (0, 5, 20))
    ] = ()
    clamp: Annotated[
        tuple[float, ...], about("[low, high]: values are moved into it before they are added up.", (-60, 600))
    ] = ()


class Table(Settings, frozen=True, kw_only=True):
    """One owner's table. Tables of one name that several parties own have the same columns and are stacked."""

    source: Annotated[
        str,
        about(
            "CSV (also in .gz or .zip), Parquet or Arrow file beside the scenario file, or `package:NAME/path`, "
            "a file of an installed Python package. Needed by `mpc run`.",
            "data/flights.csv.zip",
        ),
    ] = ""
    null: Annotated[tuple[str, ...], about("Spellings of a missing value in a CSV.", ("NA", ""))] = ("",)
    bytes_max: Annotated[Size, about("Limit of its Arrow form.", "64 MiB")] = Size(1 << 30)
    like: Annotated[
        str,
        about("A party whose table of this name gives what is not written here: all but the source.", "acme"),
    ] = ""
    rule: Rule | None = None
    columns: dict[str, Column] = msgspec.field(default_factory=dict)


class Party(Settings, frozen=True, kw_only=True):
    """Somebody with keys of its own: an owner of tables, a recipient, an approver, or several of these."""

    table: dict[Named, Table] = msgspec.field(default_factory=dict)


class Program(Settings, frozen=True, kw_only=True):
    """What is computed."""

    kind: Annotated[Named, about("Family of joint programs.", "sql")]
    query: Annotated[
        str,
        about("sql: the query; tables by their names.", "SELECT …", max_length=16384),
    ] = ""
    module: Annotated[
        str, about("wasm: the module, a file beside the scenario file; the contract holds its bytes.", "screen.wasm")
    ] = ""
    parameters: Annotated[dict[str, Any], about("Of other kinds: what docs/PROGRAMS.md says.", {"units": 1})] = (
        msgspec.field(default_factory=dict)
    )

    @property
    def terms(self) -> terms.Program:
        """As the contract has it. Raises LocalError: a parameter that is no plain value, or the module's file."""
        for name, value in self.parameters.items():
            if not _is_plain(value):
                raise LocalError(f"parameters.{name}", expected="text, numbers, true or false, or lists and tables")
        parameters = dict(self.parameters)
        if self.module:
            if "module" in parameters:
                raise LocalError("parameters.module", expected="nothing, where program.module names the file")
            parameters["module"] = _module(Path(self.module))
        try:
            return terms.Program(self.kind, self.query, encode(parameters) if parameters else b"")
        except MpcError as error:
            raise LocalError(f"program: {error.what}", expected=error.expected, got=error.got) from None


class Recipients(Settings, frozen=True, kw_only=True):
    """Who gets what."""

    result: Annotated[
        tuple[str, ...],
        about("Parties that get the result.", ("airlines", "registry"), min_length=1),
    ]
    receipt: Annotated[
        tuple[str, ...] | None, about("Parties that get the receipt; none written: every party.", ("airlines",))
    ] = None


class Approvals(Settings, frozen=True, kw_only=True):
    """Separation of duties: who must agree before the result is released. Left out: nobody has to."""

    quorum: Annotated[int, about("Approvals that release.", 2, ge=0, le=1000)] = 0
    approvers: Annotated[tuple[str, ...], about("Who may approve.", ("audit", "legal"))] = ()


class Scenario(Settings, frozen=True, kw_only=True):
    """A whole scenario file."""

    scenario: About
    enclave: Enclave = Enclave()
    deadlines: Deadlines = Deadlines()
    party: dict[Named, Party]
    program: Program
    recipients: Recipients
    approvals: Approvals = Approvals()

    @property
    def tables(self) -> tuple[terms.Table, ...]:
        """As the contract has them, in the file's order."""
        owned = ((owner, name, table) for owner, party in self.party.items() for name, table in party.table.items())
        return tuple(contract_table(owner, name, table) for owner, name, table in owned)

    @property
    def epochs(self) -> int:
        """How many enclaves may be started."""
        noise = any(table.rule.kind == "noise" for table in self.tables)
        return self.enclave.epochs or (1 if noise else 3)

    @property
    def receipt_recipients(self) -> tuple[str, ...]:
        return tuple(self.party) if self.recipients.receipt is None else self.recipients.receipt


def find(given: Path) -> Path:
    """The scenario file that is meant: a file, a folder with a `scenario.toml`, or the name of a shipped scenario."""
    if not given.exists() and given.name == str(given) and given.name in shipped():
        return _shipped_folder() / given.name / "scenario.toml"
    return given / "scenario.toml" if given.is_dir() else given


def load(path: Path) -> Scenario:
    """Read and check a scenario file, or the `scenario.toml` of a folder.

    Relative sources become absolute (beside the file), and tables that are `like` another's are filled in.

    Raises: LocalError: the file, the line or the dotted path, what is wrong and what would be right.
    """
    file = find(path)
    if not file.exists():
        known = ", ".join(shipped()) or "none"
        raise LocalError(f"{file}: no such scenario; `mpc init NAME` copies one that is shipped ({known})")
    scenario = read(file, Scenario)
    try:
        scenario = _resolved(scenario, file.parent.absolute())
        _check(scenario)
    except LocalError as error:
        raise LocalError(f"{file}: {error.what}", expected=error.expected, got=error.got) from None
    return scenario


def contract(
    scenario: Scenario,
    *,
    participants: Sequence[terms.Participant],
    author: bytes,
    measurements: Sequence[terms.Measurement],
    root: bytes,
    simulated: bool,
    now_ms: int,
    random: bytes,
) -> terms.Contract:
    """The contract of one session of this scenario.

    Args:   participants: one for each party of the scenario. author: Ed25519 key of who will sign it.
            root: SHA-256 of the root certificate. now_ms: Unix time; deadlines count from it. random: 32 bytes.
    Raises: LocalError: participants are not the scenario's parties. ContractError: it contradicts itself.
    """
    by_name = {participant.name: participant for participant in participants}
    if by_name.keys() != scenario.party.keys() or len(by_name) != len(participants):
        raise LocalError("participants", expected=sorted(scenario.party), got=sorted(p.name for p in participants))
    enclave, deadlines = scenario.enclave, scenario.deadlines
    return terms.Contract(
        version=1,
        random=random,
        name=scenario.scenario.name,
        title=scenario.scenario.title,
        author=author,
        participants=tuple(by_name[name] for name in scenario.party),
        tables=scenario.tables,
        program=scenario.program.terms,
        recipients=scenario.recipients.result,
        receipt_recipients=scenario.receipt_recipients,
        approvals=terms.Approvals(scenario.approvals.quorum, scenario.approvals.approvers),
        enclave=terms.Enclave(
            enclave.image, tuple(measurements), root, simulated, enclave.cpus, memory_bytes=int(enclave.memory)
        ),
        deadlines=terms.Deadlines(
            now_ms + deadlines.consent, now_ms + deadlines.seal, release_ms=now_ms + deadlines.release
        ),
        epochs_max=scenario.epochs,
    )


def contract_table(owner: str, name: str, table: Table) -> terms.Table:
    """The contract's form of a table. Raises LocalError naming the dotted path."""
    path = f"party.{owner}.table.{name}"
    if table.rule is None:
        raise LocalError(f"{path}.rule: is missing", expected='a table with kind = "aggregate", "noise" or "exact"')
    if not table.columns:
        raise LocalError(f"{path}.columns: is missing", expected='a line for each column, like id = { type = "int64" }')
    for entity in table.rule.entities:
        if entity not in table.columns:
            guess = nearest(entity, table.columns)
            raise LocalError(f"{path}.rule.entity: {entity} is not one of the table's columns{guess}")
    try:
        columns = tuple(terms.Column(n, c.type, c.use, c.buckets, c.clamp) for n, c in table.columns.items())
        given = table.rule
        rule = terms.Rule(given.kind, given.entities, given.k, float(given.epsilon), float(given.delta), given.rows)
        return terms.Table(name, owner, rule, columns, int(table.bytes_max))
    except MpcError as error:
        raise LocalError(f"{path}: {error.what}", expected=error.expected, got=error.got) from None


def _resolved(scenario: Scenario, folder: Path) -> Scenario:
    party = {
        owner: Party(table={name: _full(scenario, owner, name, folder) for name in party.table})
        for owner, party in scenario.party.items()
    }
    program = scenario.program
    if program.module:
        program = msgspec.structs.replace(program, module=str(folder / program.module))
    return msgspec.structs.replace(scenario, party=party, program=program)


def _module(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MODULE_BYTES_MAX:
            raise LocalError(f"program.module: {file}", expected=f"at most {MODULE_BYTES_MAX} bytes", got=size)
        return file.read_bytes()
    except OSError as error:
        raise LocalError(f"program.module: {file}: cannot be read ({error.strerror})") from None


def _full(scenario: Scenario, owner: str, name: str, folder: Path) -> Table:
    table = scenario.party[owner].table[name]
    source = table.source
    if source and not source.startswith("package:"):
        source = str(folder / source)
    if not table.like:
        return msgspec.structs.replace(table, source=source)
    path = f"party.{owner}.table.{name}.like"
    model = scenario.party[table.like].table.get(name) if table.like in scenario.party else None
    if model is None:
        owners = [party for party in scenario.party if name in scenario.party[party].table]
        raise LocalError(f"{path}: no party {table.like} has a table {name}{nearest(table.like, owners)}")
    if model.like:
        raise LocalError(f"{path}: the table of {table.like} is itself `like` another; name {model.like}")
    return Table(
        source=source,
        null=table.null if table.null != Table().null else model.null,
        bytes_max=table.bytes_max if table.bytes_max != Table().bytes_max else model.bytes_max,
        rule=table.rule or model.rule,
        columns=table.columns or model.columns,
    )


def _check(scenario: Scenario) -> None:
    """What lies between tables of the file."""
    tables, approvals = scenario.tables, scenario.approvals
    program = scenario.program
    if not (program.query or program.module or program.parameters):
        raise LocalError("program.query: is missing", expected="text, or the parameters of another kind of program")
    if not tables:
        raise LocalError("party: nobody has a table; write [party.NAME.table.NAME]")
    lower: dict[str, str] = {}
    for name in scenario.party:
        if other := lower.get(name.lower()):
            raise LocalError(f"party.{name}: the same party as {other}, written differently; keep one")
        lower[name.lower()] = name
    roles = {
        "recipients.result": scenario.recipients.result,
        "recipients.receipt": scenario.receipt_recipients,
        "approvals.approvers": approvals.approvers,
    }
    for path, names in roles.items():
        for name in names:
            if name not in scenario.party:
                remedy = nearest(name, scenario.party) or f"; write [party.{name}] if it only receives or approves"
                raise LocalError(f"{path}: {name} is nobody here{remedy}")
        if len(set(names)) != len(names):
            raise LocalError(path, expected="each name once")
    if approvals.quorum > len(approvals.approvers):
        raise LocalError("approvals.quorum", expected=f"at most {len(approvals.approvers)}, the number of approvers")
    first: dict[str, terms.Table] = {}
    for table in tables:
        model = first.setdefault(table.name, table)
        if [(c.name, c.type) for c in table.columns] != [(c.name, c.type) for c in model.columns]:
            raise LocalError(
                f"party.{table.owner}.table.{table.name}.columns",
                expected=f"the names and types, in order, that {model.owner} has: tables of one name are stacked",
            )
    for name, party in scenario.party.items():
        if not party.table and not any(name in names for names in (scenario.recipients.result, approvals.approvers)):
            raise LocalError(f"party.{name}: owns no table, receives no result and approves nothing; give it a part")


def document() -> str:
    """docs/SCENARIO.md, from the types."""
    opening = (
        "# The scenario file",
        "",
        "Every key of a `scenario.toml`, printed from the types in `mpc/scenario.py`. NAME stands for a name of your",
        "choice: a letter, then letters, digits, `-` or `_`. A heading whose keys all have defaults may be left out.",
        "`mpc init` copies a scenario to start from; `mpc check` reads one and says what it would disclose to whom.",
        "",
    )
    return "\n".join((*opening, *reference(Scenario))).rstrip() + "\n"


def _is_plain(value: object) -> bool:
    """Of TOML, times are not, nor numbers beyond 64 bits."""
    if isinstance(value, list | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | float) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _shipped_folder() -> Path:
    """In the wheel beside this module; in a checkout beside the package."""
    here = Path(__file__).absolute().parent
    return next((f for f in (here / "scenarios", here.parent / "scenarios") if f.is_dir()), here / "scenarios")


def shipped() -> tuple[str, ...]:
    """Names of the scenarios that come with this installation."""
    return tuple(sorted(file.parent.name for file in _shipped_folder().glob("*/scenario.toml")))


def copy(name: str, target: Path) -> None:
    """Copy a shipped scenario into `target`, a folder that does not exist yet. Raises LocalError."""
    if name not in shipped():
        raise LocalError(
            f"no shipped scenario is called {name}{nearest(name, shipped())}", expected=" | ".join(shipped())
        )
    if target.exists():
        raise LocalError(f"{target}: exists already, and nothing was overwritten; name another folder")
    try:
        shutil.copytree(_shipped_folder() / name, target, ignore=shutil.ignore_patterns("__pycache__", "mpc-runs"))
    except OSError as error:
        raise LocalError(f"{target}: cannot be written ({error.strerror or 'copy failed'})") from None
