"""From the start of a pool's processes to the first hit on a chain that only the disk has.

The disk tier holds 8 GiB in blocks of 2 MiB; the pool's segment is new each time, as after a reboot. The clock starts
where `penstock serve` is started and stops when a client has leased a whole chain of 8 blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.pool.rig import bench_space, random_chains
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.bench.tiers.disk import huge_memory
from penstock.bench.tiers.folder import bench_folder
from penstock.bench.tiers.serving import Served, served
from penstock.identity import KeyChain, Space, root_key
from penstock.pool.copies import seal
from penstock.tiers.base import Batch, BlockSpace, Placed
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.types import FetchEnd

__all__ = ["run"]

_CHAIN = 8
_FETCH_S = 60.0


def run(group: Group, scale: Scale) -> Iterator[Result]:
    full = scale.name == "full"
    n_bytes, rounds = (8 << 30, 9) if full else (64 * MIB, 2)
    space = bench_space(32, 64 << 10)
    with bench_folder() as folder:
        size = f"{(n_bytes >> 20) + 256}M"
        chains = _write(folder / "d", size, space, n_bytes)
        with served("1G", [f"disk:{folder}/d?size={size}&keep_free=0"]) as serving:
            serving.open().close()
            serving.report()
            took = [_restart(serving, space, chains[number]) for number in range(rounds)]
    note = f"{n_bytes >> 30} GiB in {n_bytes // space.block_bytes} blocks"
    yield result(group.goals[0], estimate(took), note=note)


def _write(folder: Path, size: str, space: Space, n_bytes: int) -> list[KeyChain]:
    """Fill the disk through the tier itself, with bytes that verify."""
    block = space.block_bytes
    chains = random_chains(space, n_bytes // block // _CHAIN, seed=9, n_blocks=_CHAIN)
    memory = huge_memory(_CHAIN * block)
    payloads = [memory[i * block : (i + 1) * block] for i in range(_CHAIN)]
    root = bytes(root_key(space))
    place = BlockSpace(space.digest(), root, block, space.block_tokens, space.n_segments, space.segment_bytes, "bench")
    tier = DiskTier(folder, DiskOptions(size=size, keep_free="0"))
    try:
        for chain in chains:
            batch = _sealed(place, chain, memory, payloads)
            if not (tier.write(batch, time.monotonic() + 60) == Placed.STORED).all():
                raise RuntimeError("the disk tier did not store a chain")
    finally:
        tier.close()
    return chains


def _sealed(place: BlockSpace, chain: KeyChain, memory: memoryview, payloads: list[memoryview]) -> Batch:
    n = len(chain)
    at = np.frombuffer(memory, np.uint8).ctypes.data + np.arange(n, dtype=np.int64) * place.block_bytes
    sums, roots = np.zeros((n, place.n_segments), np.uint64), np.zeros(n, np.uint64)
    tables = sums.ctypes.data + np.arange(n, dtype=np.int64) * sums.strides[0]
    keys = chain.array.copy()
    seal(n, at, np.arange(place.n_segments), place.segment_bytes, place.n_segments, tables, keys, roots)
    parents = np.concatenate([np.frombuffer(chain.parent, "<u8")[None], keys[:-1]])
    return Batch(place, keys, parents, roots, payloads)


def _restart(serving: Served, space: Space, chain: KeyChain) -> float:
    serving.stop()
    serving.remove()
    started = time.perf_counter()
    serving.start()
    with serving.open() as pool:
        handle = pool.space(space, "bench")
        while True:
            fetch = pool.fetch(handle, chain, _FETCH_S)
            if fetch.wait() is FetchEnd.DONE:
                break
            if fetch.why is not FetchEnd.NO_TIERS or time.perf_counter() - started > _FETCH_S:
                raise RuntimeError(f"the first fetch ended with {fetch.why.name}")
            time.sleep(0.001)  # a client that asks without a pause takes one of the cores that the start needs
        with pool.match(handle, chain) as lease:
            took = time.perf_counter() - started
            if len(lease) < len(chain):
                raise RuntimeError("the first hit was none")
    return took
