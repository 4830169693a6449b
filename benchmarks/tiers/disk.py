"""The disk tier beside the bare device: chains written and read, and how long a restart takes. Prints JSON.

    python -m benchmarks.tiers.disk --directory /var/tmp

The device is what the same process gets from preallocated, already written files in the same directory with O_DIRECT,
2 MiB a call and as many calls in flight as the tier has for a batch. Tier and device take turns, in pairs, and the
medians of the pairs' ratios are reported, so that what else happens on the machine meets both. The tier is full before
it is measured: every write evicts.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np

from penstock.tiers.base import Batch, BlockSpace, Found, Placed
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_device import DEPTH, RUN_BYTES
from penstock.tiers.disk_format import ROW_USED, Header, check_rows, pack_header, row_dtype

MIB = 1 << 20
PASS_BYTES = 512 * MIB
BATCH_BYTES = 32 * MIB
SIZE_BYTES = 1 << 30


def space_of(block_bytes: int) -> BlockSpace:
    """A space of blocks with eight layers."""
    digest = blake2b(str(block_bytes).encode(), digest_size=32).digest()
    return BlockSpace(digest, digest[:16], block_bytes, 16, 8, block_bytes // 8, "bench")


class Chains:
    """Batches of one chain after the other, all over the same memory."""

    def __init__(self, block_bytes: int, memory: memoryview) -> None:
        self.space = space_of(block_bytes)
        self.n = BATCH_BYTES // block_bytes
        self.payloads = [memory[i * block_bytes : (i + 1) * block_bytes] for i in range(self.n)]

    def batch(self, number: int) -> Batch:
        """The chain of that number."""
        keys = np.random.default_rng(number).integers(0, 1 << 63, (self.n, 2), dtype=np.uint64)
        parents = np.concatenate([np.frombuffer(self.space.root, "<u8")[None], keys[:-1]])
        return Batch(self.space, keys, parents, np.arange(self.n, dtype=np.uint64), self.payloads)


class Device:
    """The directory without a tier."""

    def __init__(self, folder: Path, memory: memoryview) -> None:
        self.fd = os.open(folder / "device.bin", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self.fd, 0, PASS_BYTES)
        self.memory = memory
        self.pool = ThreadPoolExecutor(DEPTH)
        self.run(self.write)

    def run(self, call: Callable[[int], int]) -> float:
        """Seconds for one pass."""
        start = time.perf_counter()
        moved = sum(self.pool.map(call, range(0, PASS_BYTES, RUN_BYTES)))
        seconds = time.perf_counter() - start
        assert moved == PASS_BYTES
        return seconds

    def _part(self, offset: int) -> memoryview:
        return self.memory[offset % BATCH_BYTES :][:RUN_BYTES]

    def write(self, offset: int) -> int:
        return os.pwrite(self.fd, self._part(offset), offset)

    def read(self, offset: int) -> int:
        return os.preadv(self.fd, [self._part(offset)], offset)

    def close(self) -> None:
        self.pool.shutdown()
        os.close(self.fd)


def timed(calls: list[Callable[[], object]]) -> float:
    """Seconds for all of them, one after the other."""
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def measure(folder: Path, block_bytes: int, pairs: int) -> dict[str, float]:
    """GB/s and fractions of the device, for blocks of one size."""
    memory = memoryview(mmap.mmap(-1, BATCH_BYTES))
    memory[:] = os.urandom(BATCH_BYTES)
    device, chains = Device(folder, memory), Chains(block_bytes, memory)
    tier = DiskTier(folder / "tier", DiskOptions(size=str(SIZE_BYTES + 64 * MIB)))
    count = PASS_BYTES // BATCH_BYTES
    number = 0

    def write(batch: Batch) -> None:
        assert (tier.write(batch, 0.0) == Placed.STORED).all()

    def read(batch: Batch) -> None:
        assert (tier.read(batch, 0.0) == Found.HERE).all()

    times: dict[str, list[float]] = {name: [] for name in ("device_write", "write", "device_read", "read")}
    for turn in range(-3, pairs):
        batches = [chains.batch(number + i) for i in range(count)]
        number += count
        calls = {
            "device_write": [lambda: device.run(device.write)],
            "write": [lambda batch=batch: write(batch) for batch in batches],
            "device_read": [lambda: device.run(device.read)],
            "read": [lambda batch=batch: read(batch) for batch in batches],
        }
        for name, work in calls.items():
            if turn >= 0:
                times[name].append(timed(work))
            elif name == "write":
                timed(work)
    device.close()
    tier.close()
    shutil.rmtree(folder / "tier")
    os.unlink(folder / "device.bin")
    return report(times)


def report(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians."""
    result = {f"{name}_gb_s": PASS_BYTES / statistics.median(each) / 1e9 for name, each in times.items()}
    for name in ("write", "read"):
        ratios = [bare / ours for bare, ours in zip(times[f"device_{name}"], times[name], strict=True)]
        result[f"{name}_of_device"] = statistics.median(ratios)
    return {name: round(value, 3) for name, value in result.items()}


def lay_out_rows(folder: Path, block_bytes: int, n_blocks: int, chain: int) -> BlockSpace:
    """A tier's files as they are with n_blocks blocks in chains of `chain`; the data is allocated and never written."""
    space = space_of(block_bytes)
    slab_bytes = 64 * MIB
    tier = DiskTier(folder, DiskOptions(size=str(2 * n_blocks * block_bytes), keep_free="0", slab=str(slab_bytes)))
    store = tier._store
    assert store is not None
    number, salt = store.folder.number(space), store.folder.salt
    # A space without a block would be forgotten at once: the files are made while the tier is open.
    n_slots = slab_bytes // block_bytes
    random = np.random.default_rng(1)
    tier.close()
    spaces = json.loads((folder / "penstock.spaces").read_text())
    assert spaces["spaces"][0]["number"] == number
    for slab in range(-(-n_blocks // n_slots)):
        rows = np.zeros(n_slots, row_dtype)
        rows["key"] = random.integers(0, 1 << 63, (n_slots, 2), dtype=np.uint64)
        rows["parent"][1:] = rows["key"][:-1]
        rows["parent"][::chain] = np.frombuffer(space.root, "<u8")
        rows["space"], rows["state"], rows["stamp"] = number, ROW_USED, slab + 1
        words = rows.view(np.uint64).reshape(n_slots, 8)
        rows["check"] = check_rows(words, slab, np.arange(n_slots))
        header = pack_header(Header(slab, salt, slab, block_bytes, n_slots))
        (folder / f"slab-{slab:06d}.rows").write_bytes(header + rows.tobytes())
        with open(folder / f"slab-{slab:06d}.data", "wb") as data:
            data.truncate(slab_bytes)
    return space


def measure_recovery(folder: Path, block_bytes: int, n_blocks: int) -> dict[str, float]:
    """Seconds until a tier with that many blocks has answered `holds` and `read` of one."""
    space = lay_out_rows(folder, block_bytes, n_blocks, 256)
    options = DiskOptions(size=str(2 * n_blocks * block_bytes), keep_free="0")
    memory = memoryview(mmap.mmap(-1, block_bytes))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        tier = DiskTier(folder, options)
        opened = time.perf_counter() - start
        held = tier.usage().blocks
        assert held is not None and held >= n_blocks, held
        key = np.random.default_rng(1).integers(0, 1 << 63, (1, 2), dtype=np.uint64)
        parent = np.frombuffer(space.root, "<u8")[None]
        batch = Batch(space, key, parent, np.zeros(1, np.uint64), [memory])
        assert tier.holds(space, key, 0.0).all() and tier.read(batch, 0.0)[0] == Found.HERE
        seconds.append((time.perf_counter() - start, opened))
        tier.close()
    shutil.rmtree(folder)
    whole, opened = (statistics.median(each) for each in zip(*seconds, strict=True))
    return {"blocks": held, "first_read_s": round(whole, 3), "open_s": round(opened, 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="penstock-disk-", dir=arguments.directory))
    try:
        result: dict[str, object] = {
            f"blocks_{name}": measure(folder, size, arguments.pairs)
            for name, size in (("64kib", 64 << 10), ("2mib", 2 << 20))
        }
        result["recover_1m_64kib"] = measure_recovery(folder / "recover", 64 << 10, 1_000_000)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
