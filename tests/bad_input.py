"""Plays command lines on bad files, each in a forked child, and prints what came of them: one JSON list.

Argument: a JSON list of command lines. Memory is the child's own peak, as the kernel counts it.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import mpc.cli.inspect
import mpc.cli.measure
import mpc.cli.verify
import mpc.image.measure
import mpc.image.signature  # noqa: F401
from mpc.cli.main import execute

END_S = 60  # of a hang; the slowest takes a second or two


def play(arguments: list[str]) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(END_S)
            status = execute(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status, used = os.wait4(child, 0)
        said = [os.pread(stream.fileno(), 1 << 16, 0).decode() for stream in (out, err)]
    return {
        "arguments": arguments,
        "status": os.waitstatus_to_exitcode(status),
        "out": said[0],
        "err": said[1],
        "peak_bytes": used.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps([play(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]))
