"""Signals that stop a run. They are held back wherever they would leave something half done."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heeded() -> list[signal.Signals]:
    """Those that nobody ignores: `nohup` ignores SIGHUP, a shell SIGINT for what it starts in the background."""
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def held_back() -> Iterator[None]:
    """In the block a stop waits for `let_through`, where it is a KeyboardInterrupt. For the main thread, if alone."""
    numbers = heeded()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        while signal.sigtimedwait(numbers, 0) is not None:
            pass  # it has stopped already, or come to its end by itself
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def let_through() -> Iterator[None]:
    """Here, nothing is lost by stopping."""
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
