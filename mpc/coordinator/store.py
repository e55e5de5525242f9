"""What a coordinator keeps: logs in SQLite, sealed chunks in files. All of it may be read by anybody."""

import shutil
import sqlite3
from pathlib import Path

import msgpack

from mpc.protocol.errors import LocalError
from mpc.transport import Entry, decode_entry, encode_entry, unpack


class Store:
    """One folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._chunks = folder / "chunks"
        self._database = sqlite3.connect(folder / "log.sqlite", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS log (session BLOB, number INTEGER, entry BLOB,"
            " PRIMARY KEY (session, number)) STRICT"
        )

    def sessions(self) -> list[bytes]:
        return [session for (session,) in self._database.execute("SELECT DISTINCT session FROM log")]

    def read(self, session: bytes) -> list[Entry]:
        rows = self._database.execute("SELECT entry FROM log WHERE session = ? ORDER BY number", (session,))
        return [decode_entry(unpack(entry)) for (entry,) in rows]

    def append(self, session: bytes, number: int, entries: list[Entry]) -> None:
        """All or none of them; raises LocalError when the disk does not take them."""
        rows = [(session, number + i, msgpack.packb(encode_entry(entry))) for i, entry in enumerate(entries)]
        try:
            self._database.execute("BEGIN")
            self._database.executemany("INSERT INTO log VALUES (?, ?, ?)", rows)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise LocalError(f"the coordinator cannot write its log ({error})") from None

    def put_chunk(self, session: bytes, epoch: int, stream: int, index: int, box: memoryview) -> None:
        """Whole, or not at all."""
        path = self._path(session, epoch, stream, index)
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(box)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise LocalError(f"the coordinator cannot store a chunk ({error.strerror}); free space there") from None

    def chunk(self, session: bytes, epoch: int, stream: int, index: int) -> Path:
        """The file that is one chunk."""
        return self._path(session, epoch, stream, index)

    def chunks(self, session: bytes, epoch: int) -> list[tuple[int, int]]:
        """(stream, index) of what is here of one epoch."""
        folder = self._chunks / session.hex() / str(epoch)
        return [(int(path.parent.name), int(path.name)) for path in folder.glob("*/*") if path.name.isdigit()]

    def delete_chunks(self, session: bytes) -> None:
        shutil.rmtree(self._chunks / session.hex(), ignore_errors=True)

    def close(self) -> None:
        self._database.close()

    def _path(self, session: bytes, epoch: int, stream: int, index: int) -> Path:
        return self._chunks / session.hex() / str(epoch) / str(stream) / str(index)
