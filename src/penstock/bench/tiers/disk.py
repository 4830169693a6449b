"""Chains to and from the disk tier, as a fraction of what the bare device gives in the same directory.

The device is preallocated, already written files with O_DIRECT, 2 MiB a call and as many calls in flight as the tier
has for a batch, in the same process. Tier and device take turns, so that what else happens on the machine meets both.
The tier is full before it is measured: every write evicts. Memory is in huge pages where the system gives them, as a
pool's is.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, paired_ratios
from penstock.bench.tiers.folder import bench_folder
from penstock.tiers.base import Batch, BlockSpace, Found, Placed
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_device import DEPTH, RUN_BYTES

__all__ = ["disk_space", "huge_memory", "run"]

BATCH_BYTES = 32 * MIB
_BLOCKS = {"64kib": 64 << 10, "2mib": 2 << 20}
_WARM_UP = 3
_MADV_HUGEPAGE = 14


def disk_space(block_bytes: int) -> BlockSpace:
    """A space of blocks with eight layers."""
    digest = blake2b(str(block_bytes).encode(), digest_size=32).digest()
    return BlockSpace(digest, digest[:16], block_bytes, 16, 8, block_bytes // 8, "bench")


def huge_memory(n_bytes: int) -> memoryview:
    """Touched memory full of noise."""
    memory = mmap.mmap(-1, n_bytes)
    memory.madvise(_MADV_HUGEPAGE)
    view = memoryview(memory)
    view[:] = os.urandom(n_bytes)
    return view


class _Chains:
    """Batches of one chain after the other, all over the same memory."""

    def __init__(self, block_bytes: int, memory: memoryview) -> None:
        self.space = disk_space(block_bytes)
        self.n = BATCH_BYTES // block_bytes
        self.payloads = [memory[i * block_bytes : (i + 1) * block_bytes] for i in range(self.n)]

    def batch(self, number: int) -> Batch:
        """The chain of that number."""
        keys = np.random.default_rng(number).integers(0, 1 << 63, (self.n, 2), dtype=np.uint64)
        parents = np.concatenate([np.frombuffer(self.space.root, "<u8")[None], keys[:-1]])
        return Batch(self.space, keys, parents, np.arange(self.n, dtype=np.uint64), self.payloads)


class _Device:
    """The directory without a tier."""

    def __init__(self, folder: Path, memory: memoryview, pass_bytes: int) -> None:
        self._fd = os.open(folder / "device.bin", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self._fd, 0, pass_bytes)
        self._memory, self._pass_bytes = memory, pass_bytes
        self._threads = ThreadPoolExecutor(DEPTH)
        self.seconds(self.write)

    def seconds(self, call: Callable[[int], int]) -> float:
        """For one pass."""
        started = time.perf_counter()
        moved = sum(self._threads.map(call, range(0, self._pass_bytes, RUN_BYTES)))
        if moved != self._pass_bytes:
            raise RuntimeError(f"the device moved {moved} of {self._pass_bytes} bytes")
        return time.perf_counter() - started

    def _part(self, offset: int) -> memoryview:
        return self._memory[offset % BATCH_BYTES :][:RUN_BYTES]

    def write(self, offset: int) -> int:
        return os.pwrite(self._fd, self._part(offset), offset)

    def read(self, offset: int) -> int:
        return os.preadv(self._fd, [self._part(offset)], offset)

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._fd)


def run(group: Group, scale: Scale) -> Iterator[Result]:
    block_bytes = _BLOCKS[group.option]
    full = scale.name == "full"
    pass_bytes, pairs = (512 * MIB, 11) if full else (2 * BATCH_BYTES, 3)
    with bench_folder() as folder:
        times = _measure(folder, block_bytes, pass_bytes, pairs)
    for goal, name in zip(group.goals, ("write", "read"), strict=True):
        speed = pass_bytes / float(np.median(times[name])) / 1e9
        bare = pass_bytes / float(np.median(times[f"device_{name}"])) / 1e9
        ratios = paired_ratios(times[f"device_{name}"], times[name])
        yield result(goal, estimate(ratios), baseline=bare, note=f"{speed:.2f} GB/s, the device {bare:.2f}")


def _measure(folder: Path, block_bytes: int, pass_bytes: int, pairs: int) -> dict[str, list[float]]:
    memory = huge_memory(BATCH_BYTES)
    device, chains = _Device(folder, memory, pass_bytes), _Chains(block_bytes, memory)
    tier = DiskTier(folder / "tier", DiskOptions(size=str(2 * pass_bytes + 64 * MIB)))
    per_pass = pass_bytes // BATCH_BYTES
    times: dict[str, list[float]] = {name: [] for name in ("device_write", "write", "device_read", "read")}
    try:
        for turn in range(-_WARM_UP, pairs):
            first = (turn + _WARM_UP) * per_pass
            batches = [chains.batch(first + i) for i in range(per_pass)]
            took = {
                "device_write": device.seconds(device.write),
                "write": _seconds(lambda batches=batches: _write(tier, batches)),  # type: ignore[misc]
                "device_read": device.seconds(device.read),
                "read": _seconds(lambda batches=batches: _read(tier, batches)),  # type: ignore[misc]
            }
            if turn >= 0:
                for name, seconds in took.items():
                    times[name].append(seconds)
    finally:
        device.close()
        tier.close()
    return times


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _write(tier: DiskTier, batches: list[Batch]) -> None:
    for batch in batches:
        if not (tier.write(batch, time.monotonic() + 60) == Placed.STORED).all():
            raise RuntimeError("the disk tier did not store a batch")


def _read(tier: DiskTier, batches: list[Batch]) -> None:
    for batch in batches:
        if not (tier.read(batch, time.monotonic() + 60) == Found.HERE).all():
            raise RuntimeError("the disk tier lost a batch")
