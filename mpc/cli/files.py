"""Files that a person names on the command line."""

import re
from pathlib import Path

import click

from mpc.files import read_bounded
from mpc.protocol.errors import LocalError

PATH = click.Path(path_type=Path)

__all__ = ["PATH", "read_bounded", "refuse_other"]


def refuse_other(path: Path, content: bytes) -> None:
    """Kinds of files that people take for a document or a message. Raises LocalError with what to do instead."""
    if content.startswith(b".eif"):
        raise LocalError(f"{path}: is an enclave image; `mpc measure` prints its measurements")
    if re.fullmatch(rb"[A-Za-z0-9+/_=\s-]{64,}", content):
        raise LocalError(f"{path}: is text; if it is Base64, decode it first: base64 -d FILE > document.bin")
