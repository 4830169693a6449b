"""Blocks of 2 MiB set and got through the Valkey tier over a Unix socket, against a bare pipelined client loop.

Both sides use one server (valkey-server or redis-server from PATH) and take turns with a batch each. The bare loop is
redis-py's pipeline; what it gets is copied into the blocks' memory, which is where a reader needs it. Every block is
new to the server when it is set, so the tier's look at what is there is part of its time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, paired_ratios
from penstock.bench.tiers.disk import huge_memory
from penstock.bench.tiers.folder import bench_folder
from penstock.tiers.base import Batch, BlockSpace, Found, Placed, Tier
from penstock.tiers.registry import open_tier, parse_tier

__all__ = ["run"]

_BLOCK = 2 * MIB
_BLOCKS = 16
_SPACE = BlockSpace(bytes(range(32)), bytes(16), _BLOCK, 128, 32, _BLOCK // 32)
_START_S = 10.0


def run(group: Group, scale: Scale) -> Iterator[Result]:
    import redis

    pairs = 20 if scale.name == "full" else 3
    with bench_folder() as folder, _server(folder) as path:
        client = redis.Redis(unix_socket_path=str(path), protocol=3)
        tier = open_tier(parse_tier(f"valkey+unix://{path}"))
        batches = [_batch(number) for number in range(2)]
        bare, ours = [], []
        for number in range(-1, pairs):
            took = [
                _bare(client, _numbered(batches[0], 2 * number)),
                _ours(tier, _numbered(batches[1], 2 * number + 1)),
            ]
            client.flushdb()
            if number >= 0:
                bare.append(took[0])
                ours.append(took[1])
        tier.close()
        client.close()
    moved = 2 * _BLOCKS * _BLOCK / 1e9
    note = f"{moved / float(np.median(ours)):.2f} GB/s set and got, the bare loop {moved / float(np.median(bare)):.2f}"
    yield result(
        group.goals[0], estimate(paired_ratios(bare, ours)), baseline=moved / float(np.median(bare)), note=note
    )


@contextmanager
def _server(folder: Path) -> Iterator[Path]:
    here = Path(sys.executable).parent
    names = [*(str(here / name) for name in ("valkey-server", "redis-server")), "valkey-server", "redis-server"]
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        raise RuntimeError("no valkey-server and no redis-server on PATH; `make test` installs one where root")
    path = folder / "s"
    command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while not path.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait()


def _batch(number: int) -> Batch:
    memory = huge_memory(_BLOCKS * _BLOCK)
    payloads = [memory[i * _BLOCK : (i + 1) * _BLOCK] for i in range(_BLOCKS)]
    keys = np.zeros((_BLOCKS, 2), np.uint64)
    return Batch(_SPACE, keys, keys, np.zeros(_BLOCKS, np.uint64), payloads)


def _numbered(batch: Batch, number: int) -> Batch:
    """The same memory under keys that no other round has."""
    keys = np.stack([np.arange(_BLOCKS), np.full(_BLOCKS, number + 2)], axis=1).astype(np.uint64)
    return Batch(batch.space, keys, keys, batch.roots, batch.payloads)


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _bare(client: Any, batch: Batch) -> float:
    def work() -> None:
        setting = client.pipeline(transaction=False)
        for key, payload in zip(batch.keys, batch.payloads, strict=True):
            setting.set(b"bare" + key.tobytes(), payload)
        setting.execute()
        getting = client.pipeline(transaction=False)
        for key in batch.keys:
            getting.get(b"bare" + key.tobytes())
        for payload, value in zip(batch.payloads, getting.execute(), strict=True):
            payload[:] = value

    return _timed(work)


def _ours(tier: Tier, batch: Batch) -> float:
    def work() -> None:
        placed = tier.write(batch, time.monotonic() + 60)
        found = tier.read(batch, time.monotonic() + 60)
        if not (placed == Placed.STORED).all() or not (found == Found.HERE).all():
            raise RuntimeError("the tier lost a block")

    return _timed(work)
