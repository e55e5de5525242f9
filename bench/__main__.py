"""Measure, and say which goals are met.

    python -m bench [NAME ...] [--rounds N] [--json]

Exit status: 0 every goal is met, 1 one is missed, 2 usage.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.figures import Report

NAMES = ("join", "startup", "sealing", "image", "attestation", "fuzz")
ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure, and say which goals are met.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Which: {', '.join(NAMES)}.  [all]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"How often each pair is timed.  [{ROUNDS}]")
    parser.add_argument("--json", action="store_true", help="Print one JSON document.")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"{sorted(unknown)[0]}: is none of {', '.join(NAMES)}")
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    reports = _measure(arguments.names or NAMES, arguments.rounds, quiet=arguments.json)
    met = all(figure.met for report in reports.values() for figure in report.figures)
    if arguments.json:
        measured = {name: report.as_json() for name, report in reports.items()}
        print(json.dumps({"machine": _machine(), "met": met, "measurements": measured}, indent=2))
    return 0 if met else 1


def _measure(names: Sequence[str], rounds: int, *, quiet: bool) -> dict[str, Report]:
    reports: dict[str, Report] = {}
    if not quiet:
        print(", ".join(f"{key} {value}" for key, value in _machine().items()), flush=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="mpc-bench-") as work:
            reports[name] = import_module(f"bench.{name}").measure(rounds, Path(work))
        if not quiet:
            print("", *reports[name].lines(), sep="\n", flush=True)
    return reports


def _machine() -> dict[str, Any]:
    """What a figure means nothing without; a load above 0 says that others were at work."""
    described = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in described if line.startswith("model name")), "")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "model": model or platform.machine(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    sys.exit(main())
