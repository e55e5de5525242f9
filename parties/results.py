"""A result as files that people open: CSV and Parquet, whole or not at all, and never over another file."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mpc.protocol.errors import LocalError

if TYPE_CHECKING:
    import pyarrow as pa


def write(result: bytes, folder: Path, name: str) -> dict[str, Path]:
    """Write `folder/name.csv` and `folder/name.parquet`.

    Args:    result: an Arrow IPC stream, as it was opened.
    Returns: `csv` and `parquet` → path.
    Raises:  LocalError: one of the files exists, or cannot be written; then neither was written.
    """
    import pyarrow.csv as arrow_csv
    import pyarrow.parquet as pq

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise LocalError("name of a result", expected="letters, digits, dots, - and _", got=ascii(name)[:40])
    table = read(result)
    writers: dict[str, Callable[[pa.Table, str], None]] = {"csv": arrow_csv.write_csv, "parquet": pq.write_table}
    done: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, writer in writers.items():
            path = folder / f"{name}.{suffix}"
            _write_new(path, table, writer)
            done.append(path)
    except BaseException as error:
        for path in done:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise LocalError(f"{folder}: the result cannot be written ({os.strerror(error.errno or 0)})") from None
        raise
    return dict(zip(writers, done, strict=True))


def read(result: bytes) -> "pa.Table":
    """The table of a result, checked as if it came from a stranger. Raises LocalError."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(result).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise LocalError(f"the result is not an Arrow stream ({type(error).__name__})") from None
    return table


def _write_new(path: Path, table: "pa.Table", writer: "Callable[[pa.Table, str], None]") -> None:
    """Under another name first, then linked: a link never replaces a file, and never shows half of one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))  # for its recipient only
        writer(table, str(part))
        path.hardlink_to(part)
    except FileExistsError:
        raise LocalError(f"{path}: exists already, and nothing was overwritten; name another folder") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
