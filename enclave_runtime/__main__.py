"""The enclave's shell: bound, decode, handle, perform, on two inherited sockets and nothing else."""

import ctypes
import mmap
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from enclave_runtime.enclave import (
    Action,
    Begin,
    Chunk,
    Close,
    Compute,
    Enclave,
    Event,
    Message,
    Outcome,
    Send,
    SendChunk,
)
from enclave_runtime.engine import Engine
from enclave_runtime.nsm import device, over_socket
from enclave_runtime.programs import ProgramRefused
from mpc.protocol.channel import (
    BODY_BYTES_MAX,
    HEADER,
    Frame,
    chunk_head,
    frame,
    parse_begin,
    parse_chunk,
    parse_header,
)
from mpc.protocol.errors import EncodingError, PeerError
from mpc.protocol.sealing import Cryptography, OpeningKey, chunk_digest

CHANNEL_FD, NSM_FD = 3, 4
PR_SET_DUMPABLE = 4


class Tables:
    """Opened tables in anonymous shared memory, which the engine maps too."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}
        self._maps: list[mmap.mmap] = []
        self._hashers = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # threads start with the first chunk

    def allocate(self, stream: int, size: int) -> memoryview:
        self.files[stream] = os.memfd_create("table", os.MFD_CLOEXEC)
        os.ftruncate(self.files[stream], size)
        self._maps.append(mmap.mmap(self.files[stream], size))
        return memoryview(self._maps[-1])

    def digest(self, chunk: memoryview) -> Callable[[], bytes]:
        return self._hashers.submit(chunk_digest, chunk).result

    def erase(self) -> None:
        """Give the memory back; the kernel clears it before anybody gets it again."""
        self._hashers.shutdown(cancel_futures=True)
        for file in self.files.values():
            os.ftruncate(file, 0)
            os.close(file)
        self.files.clear()
        self._maps.clear()


def serve(channel: socket.socket, enclave: Enclave, tables: Tables, engine: Engine) -> None:
    """Until the enclave closes, or the host does."""
    body = bytearray(BODY_BYTES_MAX)
    try:
        while True:
            try:
                event: Event | None = _receive(channel, body)
                while event is not None:
                    event = _perform(enclave.handle(event), channel, tables, engine)
            except PeerError as error:
                channel.sendall(frame(Frame.REFUSED, str(error).encode()[:1000]))
    except (_Closed, ConnectionError):
        return


class _Closed(Exception):
    """The enclave has erased everything, or its host has hung up."""


def _receive(channel: socket.socket, body: bytearray) -> Event:
    kind, length = parse_header(_read(channel, memoryview(body)[: HEADER.size]))
    data = _read(channel, memoryview(body)[:length])
    if kind is Frame.CHUNK:
        return Chunk(*parse_chunk(data))
    if kind is Frame.BEGIN:
        epoch, contract = parse_begin(data)
        return Begin(contract, epoch)
    if kind is Frame.MESSAGE:
        return Message(bytes(data))
    raise EncodingError("frame", expected="one that a host sends", got=kind.name)


def _read(channel: socket.socket, place: memoryview) -> memoryview:
    done = 0
    while done < len(place):
        count = channel.recv_into(place[done:])
        if count == 0:
            raise _Closed
        done += count
    return place


def _perform(actions: list[Action], channel: socket.socket, tables: Tables, engine: Engine) -> Event | None:
    for action in actions:
        if isinstance(action, Compute):  # always the last
            return _compute(action, tables, engine)
        if isinstance(action, SendChunk):
            channel.sendall(chunk_head(action.stream, action.index, len(action.box)) + action.box)
        elif isinstance(action, Send):
            channel.sendall(frame(Frame.MESSAGE, action.envelope))
        elif isinstance(action, Close):
            raise _Closed
    return None


def _compute(action: Compute, tables: Tables, engine: Engine) -> Outcome:
    files = [(tables.files[stream], length) for stream, length in enumerate(action.lengths)]
    try:
        return Outcome(engine.compute(action.contract, files, action.seconds))
    except ProgramRefused as refusal:
        return Outcome(None, refusal.code, refusal.table_index if refusal.code == "input" else None)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    engine = Engine()  # forked before there is any secret, and without the channel and the NSM
    tables = Tables()
    OpeningKey(bytes(32))  # what a key needs is loaded before anybody waits for one
    nsm = device() if Path("/dev/nsm").exists() else over_socket(socket.socket(fileno=NSM_FD))  # Nitro, or local
    enclave = Enclave(nsm, Cryptography(), tables)
    serve(socket.socket(fileno=CHANNEL_FD), enclave, tables, engine)


if __name__ == "__main__":
    main()
