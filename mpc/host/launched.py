"""What every backend's `launch` returns, and how it says that an enclave died before it could."""

import atexit
import socket
import threading
from abc import ABC, abstractmethod
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from mpc.image.measure import Measurements
from mpc.protocol.errors import LocalError


class EnclaveLost(LocalError):
    """The enclave died while it was starting. Nothing is wrong with image or machine: another may live."""


class Launched(ABC):
    """A running enclave. `channel` is its one channel: a connected, blocking stream socket."""

    def __init__(self, channel: socket.socket, measurements: Measurements, undo: ExitStack) -> None:
        """`measurements`: as its documents show them. `undo`: hangs up, ends it, and removes what it left here."""
        self.channel, self.measurements = channel, measurements
        self._undo, self._lock = undo, threading.Lock()
        atexit.register(self.terminate)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What `nitro-cli describe-enclaves` says of it; its `State` is TERMINATED when it is gone."""

    def terminate(self) -> None:
        """End the enclave, if it has not ended itself. To do it twice is to do it once.

        Raises: LocalError when it still runs: it holds keys, and this machine's memory.
        """
        atexit.unregister(self.terminate)
        with self._lock:
            self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.terminate()
