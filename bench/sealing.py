"""A table of 1 GiB on its way from a party's Parquet file into the enclave's memory: rate, and peak memory."""

import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import Figure, Report, median
from bench.inputs import LARGE_MEMORY_BYTES, write_large
from bench.session import build_image, session
from bench.watch import Watch
from mpc import scenario as scenarios
from mpc.protocol.sealing import CHUNK_BYTES, TAG_BYTES, ChunkCipher, StreamSecret, chunk_digest
from parties.datasets import Source, spool

MIB = 1 << 20
TABLE_BYTES = 1 << 30
SERVICE_MIB_MAX, PARTY_MIB_MAX, LOADED_MAX = 150, 300, 1.1
PIECES = ("mpc-owner", "mpc-coordinator", "mpc-host", "enclave", "engine")


def measure(rounds: int, work: Path, table_bytes: int = TABLE_BYTES) -> Report:
    build_image()
    scenario = write_large(work, table_bytes)
    runs = [_round(scenario, work) for _ in range(min(rounds, 3))]
    alone = _stages(scenario, work)

    def typical(key: str) -> float:
        return median(run[key] for run in runs)

    def most(key: str) -> float:
        return max(run[key] for run in runs)

    figures = [
        Figure("Parquet file to enclave memory", typical("rate"), "MB/s"),
        Figure("  of which until the first chunk is open: read, prepare, consent, attest", typical("before"), "s"),
        Figure("  of which seal, upload, relay, open", typical("under way"), "s"),
        *(Figure(f"  processor time of {piece}", typical(f"cpu {piece}"), "s") for piece in PIECES),
        *(Figure(f"one core, {what}", rate, "MB/s") for what, rate in alone.items()),
        Figure("peak memory, coordinator", most("peak mpc-coordinator"), "MiB", SERVICE_MIB_MAX),
        Figure("peak memory, host", most("peak mpc-host"), "MiB", SERVICE_MIB_MAX),
        Figure("peak memory, party", most("peak mpc-owner"), "MiB", PARTY_MIB_MAX),
        Figure("the enclave's own process after loading / data", most("loaded"), "x", LOADED_MAX),
        Figure("  its private memory", most("loaded private"), "MiB"),
        Figure("  its libraries", most("loaded files"), "MiB"),
        Figure("the engine's private memory, peak", most("engine"), "MiB", LARGE_MEMORY_BYTES / MIB),
        Figure("  while it waits for the tables", most("engine waits"), "MiB"),
        Figure("both processes after loading / data", most("both loaded"), "x"),
        Figure("both processes, peak", most("both"), "MiB"),
    ]
    notes = (
        "Peak memory is VmHWM: with libraries and with what a forked process still shares with its parent.",
        "The opened tables are in memory that the enclave shares with its engine: they count as the enclave's own, and",
        "once where both are meant. The contract's memory limit is of each process's private memory.",
    )
    data = typical("data") / MIB
    title = (
        f"Sealing: one table of {data:,.0f} MiB of Arrow, row groups of 64 MiB; median of {len(runs)}, memory the most"
    )
    return Report(title, figures, notes)


def _round(scenario: Path, work: Path) -> dict[str, float]:
    watch = Watch()
    with session(scenario, work, watch) as run:
        began = run.began + run.startup_s
    data = max(moment.enclave.tables_bytes for moment in watch.moments)
    first = next(moment.at for moment in watch.moments if moment.enclave.tables_bytes)
    full = next(moment.at for moment in watch.moments if moment.enclave.tables_bytes >= data * 0.999)
    loaded = max((moment for moment in watch.moments if not moment.computing), key=lambda moment: moment.enclave.bytes)
    return {
        "data": data,
        "rate": data / 1e6 / (full - began),
        "before": first - began,
        "under way": full - first,
        "loaded": loaded.enclave.bytes / data,
        "loaded private": loaded.enclave.private_bytes / MIB,
        "loaded files": loaded.enclave.files_bytes / MIB,
        "engine": max(moment.engine.private_bytes for moment in watch.moments) / MIB,
        "engine waits": loaded.engine.private_bytes / MIB,
        "both loaded": loaded.bytes / data,
        "both": max(moment.bytes for moment in watch.moments) / MIB,
        **{f"cpu {piece}": watch.cpu_s(piece) for piece in PIECES},
        **{f"peak {piece}": watch.peak_bytes(piece) / MIB for piece in PIECES},
    }


def _stages(scenario: Path, work: Path) -> dict[str, float]:
    """MB/s of each stage by itself, on one core, over the same table."""
    given = scenarios.load(scenario)
    (table,) = given.tables
    spooled = work / "large.arrow"
    seconds = _timed(lambda: spool(Source(given.party["owner"].table[table.name].source), table, spooled))
    size = spooled.stat().st_size
    secret = StreamSecret(bytes(32), bytes(32), size)
    cipher, out = ChunkCipher(secret), memoryview(bytearray(CHUNK_BYTES))
    with spooled.open("rb") as file:
        chunk = file.read(CHUNK_BYTES)
    spooled.unlink()
    box = cipher.seal(chunk, 0)
    assert len(box) == CHUNK_BYTES + TAG_BYTES
    works: dict[str, Callable[[], object]] = {
        "digest a chunk": lambda: chunk_digest(chunk),
        "seal a chunk": lambda: cipher.seal(chunk, 0),
        "open a chunk": lambda: cipher.open_into(box, 0, out),
    }
    rates = {name: CHUNK_BYTES / 1e6 / median(_timed(one) for _ in range(100)) for name, one in works.items()}
    return {"read and prepare": size / 1e6 / seconds, **rates}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
