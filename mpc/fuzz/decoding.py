"""Every decoder of mpc.fuzz.parsers, attacked with generated and mutated bytes.

What is held for each of them and any bytes (`hold`): nothing escapes but the errors of its row; it ends; it takes no
more memory than its row says; what it accepts is written back as the same bytes, or, where a format has many
spellings, as bytes that are read as the same and written as the same.

    python -m mpc.fuzz.decoding --seconds 300              all of them; by coverage where atheris is installed
    python -m mpc.fuzz.decoding --only contract --repeat contract.fault
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

import click

from mpc.fuzz.parsers import MIB, PARSERS
from mpc.protocol import encoding

CPU_S_MAX = 20.0  # of one decoding; the slowest right one takes a hundredth
INPUT_BYTES_MAX = 1 << 20  # of a mutated input


class Hang(BaseException):
    """A decoding takes too long; nothing may catch this."""


class Fault(Exception):
    """A decoder did what its row does not allow; `data` shows it again."""

    def __init__(self, decoder: str, why: str, data: bytes) -> None:
        super().__init__(f"{decoder}: {why}; {len(data)} bytes: {data.hex() if len(data) <= 2000 else data[:80].hex()}")
        self.decoder, self.why, self.data = decoder, why, data


def hold(name: str, data: bytes) -> bool:
    """Whether these bytes are accepted; raises Fault."""
    decoder = PARSERS[name]
    try:
        value = decoder.decode(data)
    except decoder.errors:
        return False
    except (Hang, Exception) as error:
        raise Fault(name, f"{type(error).__name__} escapes ({error})", data) from error
    except BaseException as error:  # a panic in a library
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise Fault(name, f"{type(error).__name__} escapes ({error})", data) from error
    if decoder.encode is not None:
        written = decoder.encode(value)
        if decoder.form is not None and decoder.form(written) != decoder.form(data):
            raise Fault(name, f"a second form is accepted, of {written[:500].hex()}", data)
        if decoder.encode(decoder.decode(written)) != written:
            raise Fault(name, "what it writes, it reads as something else", data)
    return True


@contextmanager
def guarded(name: str, data: bytes) -> Iterator[None]:
    """Time and memory of one decoding are watched, in the main thread. Raises Fault."""
    signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S_MAX)
    tracemalloc.start()
    try:
        yield
        taken, most = tracemalloc.get_traced_memory()[1], PARSERS[name].memory_bytes
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        tracemalloc.stop()
    if taken > most:
        raise Fault(name, f"takes {taken / MIB:.1f} MiB; its row allows {most / MIB:.0f}", data)


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise Hang(f"more than {CPU_S_MAX} s")


def mutated(name: str, random: Random) -> bytes:
    """A seed of that decoder, changed."""
    decoder, seeds = PARSERS[name], PARSERS[name].seeds()
    return decoder.mutate(random.choice(seeds), random, seeds)[:INPUT_BYTES_MAX]


def hostile() -> Iterator[bytes]:
    """For any decoder: sizes, counts and depths that promise or hold too much."""
    yield from (b"", b"\0", b"\xff", bytes(1 << 16), b"\xff" * (1 << 16), b"[" * 100_000, b"{" * 100_000)
    for head in ("5b", "7b", "9b", "bb"):  # lengths of 8 bytes
        for length in (1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
            yield bytes.fromhex(head) + length.to_bytes(8, "big") + b"\0" * 64
    for nested in ("81", "a100", "c6", "d81c81", "9f", "bf00", "5f", "91", "dd"):
        yield bytes.fromhex(nested) * 100_000
    items = encoding.ITEMS_MAX
    yield b"\x9a" + (items - 1).to_bytes(4, "big") + b"\0" * (items - 1)
    yield b"\x9a" + (items - 1).to_bytes(4, "big") + b"\x80" * (items - 1)
    yield b"\x9a" + (4 * MIB - 5).to_bytes(4, "big") + b"\xf6" * (4 * MIB - 5)
    yield b"\x9a" + (items // 2).to_bytes(4, "big") + b"\xfb\x3f\xf1\x99\x99\x99\x99\x99\x9a" * (items // 2)
    keys = b"".join(b"\x65%05d\0" % i for i in range(items // 2 - 1))
    yield b"\xba" + (items // 2 - 1).to_bytes(4, "big") + keys
    yield b"\x5a" + (4 * MIB - 5).to_bytes(4, "big") + bytes(4 * MIB - 5)
    yield b"\x84\x43\xa1\x01\x27\xa0\x5a" + (4 * MIB).to_bytes(4, "big") + bytes(4 * MIB) + b"\x40"
    yield b"\xdd" + (1 << 31).to_bytes(4, "big") + b"\x91" * 1000  # msgpack: an array of arrays
    yield b"\xdc\x10\x00" * 1400 + b"\xc0" * MIB


# The long version.


@click.command()
@click.option("--seconds", default=20.0, show_default=True, help="For each decoder.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(PARSERS)), help="This decoder.  [all of them]")
@click.option("--repeat", type=click.Path(path_type=Path), help="Decode this file once with the decoders of --only.")
@click.option("--jobs", default=os.cpu_count() or 1, help="Decoders attacked at once.  [processors]")
def main(seconds: float, seed: int, only: tuple[str, ...], repeat: Path | None, jobs: int) -> None:
    """Attack every decoder, each in a process of its own. Exit status: 0 all held; 1 a fault, kept in a file."""
    names = only or tuple(PARSERS)
    if repeat is not None:
        for name in names:
            with guarded(name, data := repeat.read_bytes()):
                click.echo(f"{name}: {'accepted' if hold(name, data) else 'refused, as it should be'}")
        return
    click.echo(f"{len(names)} decoders, {seconds:g} s each, {'guided by coverage' if guided() else 'by chance'}")
    with ThreadPoolExecutor(jobs) as pool:
        held = list(pool.map(lambda name: attack(name, seconds, seed), names))
    sys.exit(not all(held))


def guided() -> bool:
    return importlib.util.find_spec("atheris") is not None


def attack(name: str, seconds: float, seed: int) -> bool:
    """Attack one decoder in a process of its own, and say how that went; False after a fault."""
    last = Path(f"{re.sub('[^a-z]+', '-', name.lower())}.fault")
    line = [sys.executable, "-m", "mpc.fuzz.guided", name, str(seconds), str(seed), str(last)]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        click.echo(f"{name:22} {done.stdout.strip()}")
        return True
    why = done.stdout.strip() or done.stderr[-2000:]
    repeat = f"python -m mpc.fuzz.decoding --only '{name}' --repeat {last}"
    click.echo(f"{name:22} FAULT, exit status {done.returncode}\n{why}\nRepeat it:  {repeat}")
    return False


if __name__ == "__main__":
    main()
