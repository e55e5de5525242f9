"""A whole `mpc run`, as a person would start it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.watch import Watch


@dataclass(frozen=True)
class Run:
    began: float  # Unix time
    wall_s: float
    summary: dict[str, Any]  # of `mpc run --json`
    folder: Path

    @property
    def job_s(self) -> float:
        """From the first consent to the release; reading and preparing the files comes before."""
        return float(self.summary["timings_s"]["job"])

    @property
    def startup_s(self) -> float:
        """Until every process has started and the contract is proposed."""
        return float(self.summary["timings_s"]["startup"])


@contextmanager
def session(scenario: Path, work: Path, watch: Watch | None = None) -> Iterator[Run]:
    """Run it, in a new folder below `work` that is removed afterwards. It must release.

    The machine's simulated root is one of its own, in `work`; the built image is the user's.
    """
    folder = work / "run"
    command = [str(Path(sys.executable).with_name("mpc")), "run", str(scenario), "--out", str(folder), "--json"]
    environment = {**os.environ, "XDG_STATE_HOME": str(work / "state"), "TMPDIR": str(work)}
    try:
        began = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        if watch is not None:
            watch.start(process.pid)
        out, error = process.communicate()
        wall_s = time.time() - began
        if watch is not None:
            watch.stop()
        if process.returncode:
            raise SystemExit(f"mpc run {scenario} ended with {process.returncode}: {(error or out).decode()[-2000:]}")
        yield Run(began, wall_s, json.loads(out), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def timed(command: list[str]) -> float:
    """Seconds of a whole command."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def build_image() -> None:
    """So that no measurement pays for it."""
    from mpc.image.cache import cached_image

    cached_image("sql")
