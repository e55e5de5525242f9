"""Files that a person names: bounded before they are read."""

import re
from pathlib import Path

import click

from mpc.protocol.errors import LocalError

PATH = click.Path(path_type=Path)


def read_bounded(path: Path, bytes_max: int) -> bytes:
    """The file's bytes. Raises LocalError when it cannot be read or is larger, without reading more than the limit."""
    if path.is_dir():
        raise LocalError(f"{path}: is a folder; name a file in it")
    try:
        with path.open("rb") as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise LocalError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > bytes_max:
        raise LocalError(f"{path}: too large for what this command reads", expected=f"at most {bytes_max} bytes")
    if not content:
        raise LocalError(f"{path}: is empty")
    return content


def refuse_other(path: Path, content: bytes) -> None:
    """Kinds of files that people take for a document or a message. Raises LocalError with what to do instead."""
    if content.startswith(b".eif"):
        raise LocalError(f"{path}: is an enclave image; `mpc measure` prints its measurements")
    if re.fullmatch(rb"[A-Za-z0-9+/_=\s-]{64,}", content):
        raise LocalError(f"{path}: is text; if it is Base64, decode it first: base64 -d FILE > document.bin")
