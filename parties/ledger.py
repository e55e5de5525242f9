"""What a party signed and sealed, on disk before the message leaves: it keeps the party honest to itself."""

import fcntl
import os
import sqlite3
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path

from mpc.protocol.errors import LocalError
from parties.party import Committed, Consented, Finished, Memory, Sealed

IDENTITY = "identity.cbor"  # made after the ledger: an identity without one has forgotten what it signed
_KINDS: dict[str, type[Committed | Consented | Sealed | Finished]] = {
    cls.__name__: cls for cls in (Committed, Consented, Sealed, Finished)
}


def exact(numbers: Iterable[float]) -> Decimal:
    """Their sum as people write the numbers: ten times 0.1 is 1."""
    return sum((Decimal(repr(number)) for number in numbers), Decimal(0))


class Ledger:
    """One folder's ledger; only one process at a time has it open."""

    def __init__(self, folder: Path) -> None:
        """Raises LocalError when another process has it, or when it cannot be read."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "ledger.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise LocalError(f"{folder}: another process is this party; wait for it, or end it") from None
        path = folder / "ledger.sqlite"
        if not path.exists() and (folder / IDENTITY).exists():
            os.close(self._lock)
            raise LocalError(
                f"{path}: is missing, and this identity may have signed before; bring it back, or begin with a new "
                "identity that your partners' contracts name"
            )
        path.touch(mode=0o600)
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS memory"
                " (number INTEGER PRIMARY KEY, contract BLOB, kind TEXT, body BLOB) STRICT"
            )
        except sqlite3.Error as error:
            raise LocalError(f"{path}: not a ledger that can be used ({error})") from None

    def write(self, memory: Memory) -> None:
        """On the disk when this returns; raises LocalError when that failed."""
        row = (memory.contract, type(memory).__name__, memory.encode())
        try:
            self._database.execute("INSERT INTO memory (contract, kind, body) VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            raise LocalError(f"the ledger cannot be written ({error}); nothing was sent") from None

    def read(self, contract: bytes) -> list[Memory]:
        """What was remembered for one contract, in order."""
        rows = self._database.execute("SELECT kind, body FROM memory WHERE contract = ? ORDER BY number", (contract,))
        return [_KINDS[kind].decode(body) for kind, body in rows]

    def spent(self, dataset: str) -> tuple[Decimal, Decimal]:
        """Epsilon and delta that all seals of all contracts have spent of a dataset: a seal's row is its own debit."""
        rows = self._database.execute("SELECT body FROM memory WHERE kind = ?", (Sealed.__name__,))
        spends = [debit for (body,) in rows for debit in Sealed.decode(body).debits if debit.dataset == dataset]
        return exact(debit.epsilon for debit in spends), exact(debit.delta for debit in spends)

    def close(self) -> None:
        self._database.close()
        os.close(self._lock)
