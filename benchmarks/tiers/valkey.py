"""The Valkey tier against a bare pipelined client loop: blocks of 2 MiB over a Unix socket, set and got.

    python benchmarks/tiers/valkey.py [--pairs N] [--blocks N]

Starts a server of its own (valkey-server or redis-server), and measures in interleaved pairs: the bare loop stores and
reads a batch through redis-py's pipelines, the tier stores and reads the same batch. `valkey_of_bare_client` is the
median, over the pairs, of bare time over the tier's (more than 1: the tier is faster), with the interval in which the
median lies with 95% (order statistics). Both sides' blocks are new to the server at each set, so the tier's look at
what is there is part of its time. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import redis

from penstock.tiers.base import Batch, BlockSpace, Found, Placed
from penstock.tiers.registry import open_tier, parse_tier

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.tiers.servers import ValkeyServer

BLOCK_BYTES = 2 << 20
SPACE = BlockSpace(bytes(range(32)), bytes(16), BLOCK_BYTES, 128, 32, BLOCK_BYTES // 32)


def batch_of(blocks: int, round_number: int) -> Batch:
    """Blocks whose keys no other round has."""
    memory = mmap.mmap(-1, blocks * BLOCK_BYTES)
    data = np.frombuffer(memory, np.uint8)
    data[:] = np.random.default_rng(round_number).integers(0, 256, len(data), np.uint8)
    keys = np.stack([np.arange(blocks), np.full(blocks, round_number)], axis=1).astype(np.uint64)
    views = [memoryview(data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]) for at in range(blocks)]
    return Batch(SPACE, keys, keys, np.zeros(blocks, np.uint64), views)


def timed(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def bare_set(client: redis.Redis, batch: Batch) -> None:
    pipeline = client.pipeline(transaction=False)
    for key, payload in zip(batch.keys, batch.payloads):
        pipeline.set(b"bare" + key.tobytes(), payload)
    if pipeline.execute() != [True] * len(batch):
        raise SystemExit("the bare client could not store the blocks")


def bare_get(client: redis.Redis, batch: Batch) -> None:
    """What it got goes where the blocks belong, as the tier's does."""
    pipeline = client.pipeline(transaction=False)
    for key in batch.keys:
        pipeline.get(b"bare" + key.tobytes())
    for payload, value in zip(batch.payloads, pipeline.execute()):
        payload[:] = value


def median_interval(values: list[float]) -> tuple[float, float]:
    """In which the median lies with 95%, by order statistics."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    low = max(0, math.floor(len(ordered) / 2 - half))
    return ordered[low], ordered[min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half) - 1)]


def measure(server: ValkeyServer, pairs: int, blocks: int) -> dict[str, object]:
    client = redis.Redis(unix_socket_path=str(server.unix), protocol=3)
    tier = open_tier(parse_tier(f"valkey+unix://{server.unix}"))
    shares: dict[str, list[float]] = {"set": [], "get": [], "both": []}
    rates: list[float] = []
    for number in range(pairs + 1):
        batch = batch_of(blocks, number)
        times: dict[str, list[float]] = {}

        def bare(batch: Batch = batch, times: dict[str, list[float]] = times) -> None:
            times["bare"] = [timed(lambda: bare_set(client, batch)), timed(lambda: bare_get(client, batch))]

        def ours(batch: Batch = batch, times: dict[str, list[float]] = times) -> None:
            deadline = time.monotonic() + 60
            outcome: list[int] = []
            times["ours"] = [
                timed(lambda: outcome.extend(tier.write(batch, deadline).tolist())),
                timed(lambda: outcome.extend(tier.read(batch, deadline).tolist())),
            ]
            if outcome != [Placed.STORED] * blocks + [Found.HERE] * blocks:
                raise SystemExit("the tier could not store or find the blocks")

        for side in (bare, ours) if number % 2 else (ours, bare):
            side()
        client.flushall()
        if number == 0:
            continue  # connections and the server's memory come into being
        for name, part in (("set", slice(0, 1)), ("get", slice(1, 2)), ("both", slice(0, 2))):
            shares[name].append(sum(times["bare"][part]) / sum(times["ours"][part]))
        rates.append(2 * blocks * BLOCK_BYTES / sum(times["ours"]) / 1e9)
    tier.close()
    client.close()
    low, high = median_interval(shares["both"])
    return {
        "valkey_of_bare_client": round(statistics.median(shares["both"]), 3),
        "interval_95": [round(low, 3), round(high, 3)],
        "set": round(statistics.median(shares["set"]), 3),
        "get": round(statistics.median(shares["get"]), 3),
        "tier_gb_s": round(statistics.median(rates), 3),
        "pairs": pairs,
        "blocks": blocks,
        "block_bytes": BLOCK_BYTES,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the Valkey tier as a fraction of a bare client")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stores-") as folder, ValkeyServer(Path(folder)) as server:
        print(json.dumps(measure(server, options.pairs, options.blocks)))


if __name__ == "__main__":
    main()
