"""One decoder of mpc.fuzz.parsers, attacked for a while in a process of its own.

By coverage where atheris is installed (`pip install atheris`), else by chance. What is decoded lies in a file before
it is decoded, so that a crash of the whole process leaves it behind: `mpc.fuzz.decoding` starts this and reads that.
"""

import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

try:
    import atheris  # type: ignore[import-untyped]
except ImportError:
    atheris = None
    from mpc.fuzz import decoding
    from mpc.fuzz.parsers import PARSERS
else:
    with atheris.instrument_imports(include=["mpc", "parties", "enclave_runtime"]):
        from mpc.fuzz import decoding
        from mpc.fuzz.parsers import PARSERS

RESIDENT_MIB_MAX = 512  # of libraries, seeds and one decoding; above what tracemalloc sees
COVERED_BYTES_MAX = 1 << 15  # of an input that coverage guides: larger ones take its time
FAULT = 3  # exit status


class Tally:
    """Decodes what it is given, and counts; at the first fault, or when time is over, the process ends."""

    def __init__(self, name: str, last: Path) -> None:
        self.name = name
        self.tidy: list[Callable[[], object]] = [last.unlink]
        self.begin(math.inf)
        self._file = os.open(last, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def begin(self, seconds: float) -> None:
        """Count from here."""
        self.examples = self.accepted = 0
        self._began = time.monotonic()
        self._until = self._began + seconds

    def take(self, data: bytes) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, data, 0)
        try:
            with decoding.guarded(self.name, data):
                self.accepted += decoding.hold(self.name, data)
        except decoding.Fault as fault:
            _end(FAULT, fault.why)
        self.examples += 1
        if self.examples % 256 == 0 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > RESIDENT_MIB_MAX << 10:
            _end(FAULT, f"the process holds more than {RESIDENT_MIB_MAX} MiB")
        if time.monotonic() > self._until:
            for tidy in self.tidy:
                tidy()
            rate = self.examples / (time.monotonic() - self._began)
            _end(0, f"{self.examples:>9} inputs  {rate:>7.0f}/s  {self.accepted:>8} accepted")


def _end(status: int, word: str) -> None:
    print(word, flush=True)
    os._exit(status)  # the engine of atheris would not let Python end in its own way


def by_chance(tally: Tally, seed: int) -> None:
    random = Random(seed)
    while True:
        tally.take(decoding.mutated(tally.name, random))


def by_coverage(tally: Tally, seed: int, engine: Any) -> None:
    decoder = PARSERS[tally.name]
    seeds = decoder.seeds()

    def change(data: bytes, bytes_max: int, draw: int) -> bytes:
        random = Random(draw)
        if random.random() < 0.2:
            return bytes(engine.Mutate(data, bytes_max))
        return decoder.mutate(data, random, seeds)[:bytes_max]

    folder = TemporaryDirectory(prefix="mpc-parsers-")
    tally.tidy.append(folder.cleanup)
    for number, one in enumerate(seeds):
        (Path(folder.name) / str(number)).write_bytes(one)
    options = {"seed": seed, "max_len": COVERED_BYTES_MAX, "verbosity": 0, "timeout": 60, "rss_limit_mb": 4096}
    flags = [f"-{name}={value}" for name, value in options.items()]
    engine.Setup([sys.argv[0], *flags, folder.name], tally.take, custom_mutator=change)
    engine.Fuzz()


def main(name: str, seconds: str, seed: str, last: str) -> None:
    tally = Tally(name, Path(last))
    for data in (*PARSERS[name].seeds(), *decoding.hostile()):
        tally.take(data)
    tally.begin(float(seconds))
    if atheris is None:
        by_chance(tally, int(seed))
    else:
        by_coverage(tally, int(seed), atheris)


if __name__ == "__main__":
    main(*sys.argv[1:])
