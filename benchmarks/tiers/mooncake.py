"""The Mooncake tier against Mooncake's own batch calls: blocks of 2 MiB over TCP, in another process's memory.

    python -m benchmarks.tiers.mooncake [--pairs N] [--blocks N]

Run it from the checkout. Starts a master and a process that lends memory, both on loopback, and measures in interleaved
pairs: the bare side calls `batch_put_from` and `batch_get_into` on registered memory of its own, the tier writes and
reads the same batch.
`mooncake_of_batch_api` is the median, over the pairs, of bare time over the tier's (more than 1: the tier is faster),
with the interval in which the median lies with 95% (order statistics). The tier's look at what is there is part of its
time. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from penstock.tiers.base import Batch, BlockSpace, Found, Placed, Tier
from penstock.tiers.mooncake_link import import_store
from penstock.tiers.registry import open_tier, parse_tier
from tests.tiers.mooncake_servers import Lender, MooncakeMaster

BLOCK_BYTES = 2 << 20
SPACE = BlockSpace(bytes(range(32)), bytes(16), BLOCK_BYTES, 128, 32, BLOCK_BYTES // 32)


class Bare:
    """Mooncake's client with one registered region of `blocks` blocks."""

    def __init__(self, master: MooncakeMaster, blocks: int) -> None:
        self.client: Any = import_store()()
        if self.client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", f"127.0.0.1:{master.port}"):
            raise SystemExit("the bare client could not join")
        self.data = np.frombuffer(mmap.mmap(-1, blocks * BLOCK_BYTES), np.uint8)
        self.data[:] = 1
        if self.client.register_buffer(self.data.ctypes.data, self.data.nbytes):
            raise SystemExit("the bare client could not register its memory")
        self.addresses = [self.data.ctypes.data + at * BLOCK_BYTES for at in range(blocks)]
        self.sizes = [BLOCK_BYTES] * blocks

    def put(self, names: list[str]) -> None:
        if any(self.client.batch_put_from(names, self.addresses, self.sizes)):
            raise SystemExit("the bare client could not store the blocks")

    def get(self, names: list[str]) -> None:
        if self.client.batch_get_into(names, self.addresses, self.sizes) != self.sizes:
            raise SystemExit("the bare client could not read the blocks")


def batch_of(data: np.ndarray[Any, Any], blocks: int, round_number: int) -> Batch:
    """Blocks whose keys no other round has."""
    keys = np.stack([np.arange(blocks), np.full(blocks, round_number)], axis=1).astype(np.uint64)
    views = [memoryview(data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]) for at in range(blocks)]
    return Batch(SPACE, keys, keys, np.zeros(blocks, np.uint64), views)


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def median_interval(values: list[float]) -> tuple[float, float]:
    """In which the median lies with 95%, by order statistics."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    low = max(0, math.floor(len(ordered) / 2 - half))
    return ordered[low], ordered[min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half) - 1)]


def of_tier(tier: Tier, batch: Batch) -> list[float]:
    """Seconds of a write and of a read of the batch."""
    deadline, outcome = time.monotonic() + 60, []
    times = [
        timed(lambda: outcome.extend(tier.write(batch, deadline).tolist())),
        timed(lambda: outcome.extend(tier.read(batch, deadline).tolist())),
    ]
    if outcome != [Placed.STORED] * len(batch) + [Found.HERE] * len(batch):
        raise SystemExit("the tier could not store or find the blocks")
    return times


def measure(master: MooncakeMaster, pairs: int, blocks: int, options: str) -> dict[str, object]:
    bare = Bare(master, blocks)
    tier = open_tier(parse_tier(f"{master.address}?segment=0{options}"))
    data = np.frombuffer(mmap.mmap(-1, blocks * BLOCK_BYTES), np.uint8)
    data[:] = np.random.default_rng(0).integers(0, 256, len(data), np.uint8)
    shares: dict[str, list[float]] = {"put": [], "get": [], "both": []}
    rates: dict[str, list[float]] = {"put": [], "get": [], "bare put": [], "bare get": []}
    size = blocks * BLOCK_BYTES / 1e9
    for number in range(pairs + 2):
        batch = batch_of(data, blocks, number)
        names = [f"bare/{number}/{at}" for at in range(blocks)]
        its: list[float] = []
        own: list[float] = []
        for side in (0, 1) if number % 2 else (1, 0):
            if side:
                its = [timed(lambda names=names: bare.put(names)), timed(lambda names=names: bare.get(names))]
            else:
                own = of_tier(tier, batch)
        bare.client.batch_remove(names, True)
        tier.remove(SPACE, batch.keys, time.monotonic() + 60)
        if number < 2:
            continue  # connections and the lender's memory come into being
        for name, part in (("put", slice(0, 1)), ("get", slice(1, 2)), ("both", slice(0, 2))):
            shares[name].append(sum(its[part]) / sum(own[part]))
        for name, seconds in zip(rates, [*own, *its], strict=True):
            rates[name].append(size / seconds)
    tier.close()
    low, high = median_interval(shares["both"])
    return {
        "mooncake_of_batch_api": round(statistics.median(shares["both"]), 3),
        "interval_95": [round(low, 3), round(high, 3)],
        "put": round(statistics.median(shares["put"]), 3),
        "get": round(statistics.median(shares["get"]), 3),
        "gb_s": {name: round(statistics.median(each), 3) for name, each in rates.items()},
        "pairs": pairs,
        "blocks": blocks,
        "block_bytes": BLOCK_BYTES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the Mooncake tier as a fraction of Mooncake's batch calls")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--options", default="", help="more of the tier's address, as &buffer=256M")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="objects-") as folder:
        master = MooncakeMaster(Path(folder))
        with master, Lender(Path(folder), master, "512M", 1):
            print(json.dumps(measure(master, options.pairs, options.blocks, options.options)))


if __name__ == "__main__":
    main()
