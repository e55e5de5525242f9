"""The processes of `mpc run`: coordinator, host and one for each party. They share nothing but sockets.

Each is forked from a parent that holds no secret, or started as `python -m mpc.cli.pieces` when it must be
restarted, and talks to its parent by one line of JSON for each thing that a person wants to see.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpc.protocol.errors import LocalError, MpcError

if TYPE_CHECKING:
    import trio

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


class Control:
    """A piece's end of the line to its parent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lines = sock.makefile("r")

    def report(self, event: dict[str, Any]) -> None:
        if "refused" in event:
            sys.stderr.write(f"refused: {event['refused']}\n")  # its log
        try:
            self._sock.sendall(json.dumps(event).encode() + b"\n")
        except OSError:
            os._exit(1)  # the parent is gone, and with it the reason to go on

    def wait(self) -> dict[str, Any]:
        """The parent's next line."""
        line = self._lines.readline()
        if not line:
            os._exit(1)
        answer: dict[str, Any] = json.loads(line)
        return answer


def coordinator(control: Control, *, folder: str, address: str) -> None:
    """Serve until ended."""
    import trio

    from mpc.coordinator.server import Server

    async def serve() -> None:
        server = Server(Path(folder))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, address)
            control.report({"ready": True})

    trio.run(serve)


def host(control: Control, *, address: str, state: str, image: str, console: str | None, **enclave: Any) -> None:
    """Launch enclaves for the session that the parent names."""
    import trio

    from mpc.host.backends import launcher
    from mpc.host.launched import EnclaveLost, Launched
    from mpc.host.serve import Host
    from mpc.transport import one_fault

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # enclaves are unpacked on the disk, and must not stay there
    start = launcher(image=Path(image), state=Path(state), console=Path(console) if console else None, **enclave)
    ready: list[Launched | EnclaveLost] = []
    try:
        ready.append(start())  # the first enclave starts while the parties read their data
    except EnclaveLost as lost:
        ready.append(lost)  # it was that of the first epoch, which has not begun

    def next_enclave() -> Launched:
        first = ready.pop() if ready else start()
        if isinstance(first, EnclaveLost):
            raise first
        return first

    async def serve(session: bytes) -> None:
        async with one_fault() as nursery:
            nursery.start_soon(_until_terminated, nursery.cancel_scope)
            await Host(address, session, next_enclave, control.report).run()
            nursery.cancel_scope.cancel()

    try:
        control.report({"ready": True})
        trio.run(serve, bytes.fromhex(control.wait()["session"]))
    finally:
        for one in ready:
            if isinstance(one, Launched):
                one.terminate()


async def _until_terminated(scope: "trio.CancelScope") -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def party(
    control: Control, *, folder: str, name: str, scenario: str, image: str, address: str, root: str, simulated: bool
) -> None:
    """Be one party, from its keys to its result."""
    import trio

    from mpc import scenario as scenarios
    from mpc.host.backends import measurement
    from mpc.protocol.contract import Contract, Participant
    from parties import datasets, policy, results
    from parties.client import Client, drop_spool
    from parties.identity import load_or_create
    from parties.ledger import IDENTITY, Ledger

    home = Path(folder)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chdir(home)
    Ledger(home).close()
    identity = load_or_create(name, home / IDENTITY)
    control.report({"participant": identity.participant.encode().hex()})
    given = scenarios.load(Path(scenario))
    # The measurement is this party's own: computed from its own installation, not told by the host.
    own = measurement(given.enclave, Path(image))
    told = control.wait()
    mine = policy.from_scenario(
        given,
        name,
        participants=[Participant.decode(bytes.fromhex(one)) for one in told["participants"]],
        measurements=[own],
        root=bytes.fromhex(root),
        simulated=simulated,
    )
    (home / "policy.toml").write_text(policy.dump(mine))
    session = bytes.fromhex(told["session"])

    def spool(contract: Contract, stream: int, target: Path) -> int:
        table = contract.tables[stream]
        return datasets.spool(source_of(given, name, table.name), table, target, progress=_reading(control, stream))

    def appraise(document: bytes, **what: Any) -> None:
        try:
            policy.appraise(mine, document, **what)
        except MpcError as error:
            control.report({"step": error.step})
            raise

    client = Client(
        identity=identity,
        folder=home,
        address=address,
        session=session,
        accepts=lambda contract: policy.accepts(mine, contract, name, time.time_ns() // 1_000_000),
        appraise=appraise,
        affords=partial(policy.affords, mine),
        spool=spool,
        report=control.report,
    )
    ending = trio.run(client.run)
    drop_spool(home)
    files = {}
    if ending.result is not None:
        files = {kind: str(path) for kind, path in results.write(ending.result, home, "result").items()}
    receipt = str(ending.receipt) if ending.receipt is not None else None
    control.report({"ending": ending.why, "released": ending.released, "result": files or None, "receipt": receipt})


def source_of(given: Any, party_name: str, table: str) -> Any:
    """Where a party's table comes from, as its dataset reader wants it."""
    from parties.datasets import Source

    written = given.party[party_name].table[table]
    return Source(location=written.source, null=written.null)


def _reading(control: Control, stream: int) -> Callable[[int], None]:
    return lambda done: control.report({"read": done, "stream": stream})


PIECES: dict[str, Callable[..., None]] = {"coordinator": coordinator, "host": host, "party": party}


def run_piece(name: str, sock: socket.socket, arguments: dict[str, Any], parent: int) -> int:
    """Exit status of a piece; its last line says why when that is not 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when it is over
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1  # it went before it could be watched
    library.prctl(PR_SET_NAME, f"mpc-{arguments.get('name', name)}".encode()[:15], 0, 0, 0)  # for ps and top
    control = Control(sock)
    try:
        PIECES[name](control, **arguments)
    except MpcError as error:
        status = 2 if isinstance(error, LocalError) else 1
        control.report({"failed": str(error), "step": error.step})
        return status
    except BaseExceptionGroup as group:
        found = group.subgroup(MpcError)
        if found is None:
            raise
        control.report({"failed": str(_first(found))})
        return 1
    return 0


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


if __name__ == "__main__":
    sys.exit(run_piece(sys.argv[1], socket.socket(fileno=int(sys.argv[3])), json.loads(sys.argv[2]), int(sys.argv[4])))
