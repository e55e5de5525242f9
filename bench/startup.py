"""A whole small session, from the command to its end, against the bare imports that it cannot do without."""

import sys
from pathlib import Path

from bench.figures import Figure, Report, median, ratio
from bench.session import build_image, session, timed

SCENARIO = Path(__file__).parents[1] / "scenarios" / "salaries"
IMPORTS = "import trio, cryptography, duckdb, pyarrow"
SECONDS_MAX = 2.5


def measure(rounds: int, work: Path) -> Report:
    build_image()
    times = []
    for _ in range(rounds + 1):
        with session(SCENARIO, work) as run:
            whole = {"mpc": run.wall_s, "startup": run.startup_s, "job": run.job_s}
        times.append({**whole, "imports": timed([sys.executable, "-c", IMPORTS])})
    del times[0]  # which brings the files into memory
    parties = len(list((SCENARIO / "data").iterdir()))
    return Report(
        f"Start-up: `mpc run scenarios/salaries`, {parties} parties, image built; median of {rounds}",
        [
            Figure("mpc run, whole command", median(t["mpc"] for t in times), "s", SECONDS_MAX),
            Figure("  of which until the contract is proposed", median(t["startup"] for t in times), "s"),
            Figure("  of which the job, first consent to release", median(t["job"] for t in times), "s"),
            Figure(f'python -c "{IMPORTS}"', median(t["imports"] for t in times), "s"),
            Figure("mpc run / imports", ratio(times, "mpc", "imports"), "x"),
        ],
    )
