"""What verification costs: one core's speed over blocks in memory, and its share of a fetch from disk.

The share is the time that one core takes for the checksums of a chain's blocks, over the time of the whole fetch of
that chain as a client sees it: pool, mover and disk tier are real processes and files. The mover verifies one piece
while the next is read, so that this is more than what verification adds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.pool.rig import EngineTensors, bench_space, fill, random_chains
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.bench.tiers.disk import huge_memory
from penstock.bench.tiers.folder import bench_folder
from penstock.bench.tiers.serving import forget, served, wait_written
from penstock.pool.copies import seal
from penstock.types import FetchEnd

__all__ = ["run"]

_SIZES = {"64 KiB": (16, 4 << 10), "2 MiB": (32, 64 << 10)}
_FETCH_S = 60.0


def run(group: Group, scale: Scale) -> Iterator[Result]:
    full = scale.name == "full"
    speeds = {name: [_speed(*shape, 64 * MIB) for _ in range(25 if full else 3)] for name, shape in _SIZES.items()}
    slowest = min(speeds, key=lambda name: float(np.median(speeds[name])))
    note = ", ".join(f"{name} blocks {float(np.median(each)):.1f}" for name, each in speeds.items())
    yield result(group.goals[0], estimate(speeds[slowest]), note=note)
    shares = {name: _shares(shape, speeds[name], full) for name, shape in _SIZES.items()}
    largest = max(shares, key=lambda name: float(np.median(shares[name])))
    note = ", ".join(f"{name} blocks {float(np.median(each)):.3f}" for name, each in shares.items())
    yield result(group.goals[1], estimate(shares[largest]), note=note)


def _speed(n_segments: int, segment_bytes: int, n_bytes: int) -> float:
    """GB/s of `seal` on one core."""
    n = n_bytes // (n_segments * segment_bytes)
    memory = np.frombuffer(huge_memory(n_bytes), np.uint8)
    payloads = memory.ctypes.data + np.arange(n, dtype=np.int64) * (n_segments * segment_bytes)
    sums = np.zeros((n, n_segments), np.uint64)
    tables = sums.ctypes.data + np.arange(n, dtype=np.int64) * sums.strides[0]
    keys, roots = np.zeros((n, 2), np.uint64), np.zeros(n, np.uint64)
    started = time.perf_counter()
    seal(n, payloads, np.arange(n_segments), segment_bytes, n_segments, tables, keys, roots)
    return n_bytes / (time.perf_counter() - started) / 1e9


def _shares(shape: tuple[int, int], speeds: list[float], full: bool) -> list[float]:
    """Checksum time over fetch time, for fetches of chains of 64 blocks or 128 MiB."""
    space = bench_space(*shape)
    n_chains, rounds = (8, 3) if full else (2, 1)
    with (
        bench_folder() as folder,
        served("1G", [f"disk:{folder}/d?size=4G&write=through"]) as serving,
        serving.open() as pool,
    ):
        handle = pool.space(space, "bench")
        chains = random_chains(space, n_chains, seed=5)
        fill(pool, handle, chains, EngineTensors(space, 64 * space.block_bytes))
        wait_written(serving, sum(map(len, chains)))
        shares = []
        for chain in chains * rounds:
            forget(pool, handle, chain)
            started = time.perf_counter()
            fetch = pool.fetch(handle, chain, _FETCH_S)
            if fetch.wait() is not FetchEnd.DONE:
                raise RuntimeError(f"a fetch ended with {fetch.why.name}")
            took = time.perf_counter() - started
            shares.append(len(chain) * space.block_bytes / 1e9 / float(np.median(speeds)) / took)
    return shares
