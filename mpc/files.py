"""Files that a person names: regular ones only, and bounded before they are read."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mpc.protocol.errors import LocalError


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it. Raises LocalError naming it, also for what would block or never end.

    A pipe waits for somebody who writes; a device gives bytes for ever. Opened without waiting, then looked at.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))  # noqa: SIM115 - Path.open takes no opener
    except IsADirectoryError:
        raise LocalError(f"{path}: is a folder; name a file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise LocalError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise LocalError(f"{path}: is no regular file but a pipe or a device; save its content to a file first")
    return file


def read_bounded(path: Path, bytes_max: int) -> bytes:
    """The file's bytes. Raises LocalError when it cannot be read, is empty, or is larger, without reading it all."""
    with open_regular(path) as file:
        try:
            content = file.read(bytes_max + 1)
        except OSError as error:
            raise LocalError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > bytes_max:
        raise LocalError(f"{path}: too large for what this command reads", expected=f"at most {bytes_max} bytes")
    if not content:
        raise LocalError(f"{path}: is empty")
    return content
