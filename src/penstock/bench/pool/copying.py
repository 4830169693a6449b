"""Copies against `memcpy`: out of slots into an engine's tensors, and back until another process sees the blocks.

Reads are match, gather and release of random resident chains, a batch of 64 blocks each. Writes are reserve, copy in
with checksums, commit, batch after batch; the time ends when another process has matched the last block. Each pair is
one `memcpy` and the same number of bytes moved through the pool, one after the other; its ratio is the `memcpy` time
over the pool's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe

import numpy as np

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import (
    BATCH,
    Copier,
    EngineTensors,
    bench_space,
    client,
    fill,
    helper,
    random_chains,
    serving,
)
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, paired_ratios
from penstock.identity import KeyChain, Space
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.layout import Geometry, plan_geometry, plan_slots
from penstock.pool.tensors import TensorMap

__all__ = ["SPACES", "BatchReader", "resident_chains", "room_for_blocks", "run"]

SPACES = {
    "64kib": bench_space(n_segments=16, segment_bytes=4 << 10),
    "2mib": bench_space(n_segments=64, segment_bytes=32 << 10),
}
# What stays empty is for grants made ahead: a sixteenth of a pool, but never less than two batches.
_FILLED = 0.9
_WATCH_S = 10.0


def run(group: Group, scale: Scale) -> Iterator[Result]:
    space = SPACES[group.option]
    geometry = plan_geometry(scale.copy_pool_bytes)
    memcpy, tensors = Copier(scale.memcpy_bytes), EngineTensors(space, scale.tensor_bytes)
    with serving(geometry) as (name, _):
        pool, handle = client(name, space)
        with pool:
            chains = resident_chains(pool, handle, tensors, room_for_blocks(geometry, space))
            reader = BatchReader(pool, handle, chains, tensors, scale.memcpy_bytes)
            yield from _reads(group, scale, memcpy, reader)
            with helper(_watch, name, space) as watcher:
                writer = _Writer(pool, handle, tensors, scale.memcpy_bytes, watcher)
                goal = group.goals[-1]
                yield _against(goal.name, group, scale, memcpy, writer.seconds, writer.n_bytes)


def room_for_blocks(geometry: Geometry, space: Space) -> int:
    """How many blocks of a space stay in a pool that nobody adds to."""
    slots = geometry.n_slabs * plan_slots(geometry, space.block_bytes, space.n_segments).slots_per_slab
    return max(BATCH, min(int(slots * _FILLED), slots - 2 * BATCH))


def resident_chains(pool: Pool, handle: SpaceHandle, tensors: EngineTensors, n_blocks: int) -> list[KeyChain]:
    """Fill the pool with chains of 64 blocks, together at most n_blocks, and return them."""
    chains = random_chains(handle.space, max(1, n_blocks // BATCH), seed=2)
    fill(pool, handle, chains, tensors)
    return chains


def _reads(group: Group, scale: Scale, memcpy: Copier, reader: BatchReader) -> Iterator[Result]:
    reader.warm()
    for goal in group.goals:
        if "read" in goal.name:
            verify = goal.name.startswith("verified")
            yield _against(goal.name, group, scale, memcpy, lambda v=verify: reader.seconds(v), reader.n_bytes)


def _against(name: str, group: Group, scale: Scale, memcpy: Copier, move: object, n_bytes: int) -> Result:
    """Interleave `memcpy` and `move` (seconds for n_bytes each time it is called)."""
    assert callable(move)
    base, ours = [], []
    for _ in range(scale.pairs):
        base.append(memcpy.n_bytes / memcpy.seconds() / 1e9)
        ours.append(n_bytes / move() / 1e9)
    note = f"{float(np.median(ours)):.2f} GB/s; baseline: memcpy in GB/s"
    return result(group.goal(name), estimate(paired_ratios(ours, base)), baseline=float(np.median(base)), note=note)


@dataclass(slots=True)
class BatchReader:
    """Reads random chains, whole, into random pages, until about `wanted_bytes` are moved."""

    pool: Pool
    handle: SpaceHandle
    chains: list[KeyChain]
    tensors: EngineTensors
    wanted_bytes: int
    n_batches: int = 0
    _round: int = 0

    def __post_init__(self) -> None:
        self.n_batches = max(1, self.wanted_bytes // (BATCH * self.handle.block_bytes))

    @property
    def n_bytes(self) -> int:
        return self.n_batches * BATCH * self.handle.block_bytes

    def warm(self) -> None:
        """Read every chain once: pages of the pool that this process has not mapped yet cost it a fault each."""
        page = self.tensors.map(np.arange(BATCH, dtype=np.int64))
        for chain in self.chains:
            self._read(chain, page, False)

    def seconds(self, verify: bool) -> float:
        """Time of one round over other chains and pages than the last."""
        self._round += 1
        picks = np.random.default_rng(self._round).integers(0, len(self.chains), self.n_batches)
        maps = self.tensors.random_maps(self.n_batches, self._round)
        chains = [self.chains[i] for i in picks]
        started = time.perf_counter()
        for chain, tensor_map in zip(chains, maps, strict=True):
            self._read(chain, tensor_map, verify)
        return time.perf_counter() - started

    def _read(self, chain: KeyChain, tensor_map: TensorMap, verify: bool) -> None:
        with self.pool.match(self.handle, chain) as lease:
            good = lease.gather(tensor_map, verify=verify) if len(lease) == BATCH else 0
        if good != BATCH:
            raise RuntimeError(f"{good} of {BATCH} blocks read: {lease.miss.name}")


class _Writer:
    """Writes new chains, the oldest blocks leaving for them, and waits for the last block to be seen elsewhere."""

    def __init__(self, pool: Pool, handle: SpaceHandle, tensors: EngineTensors, n_bytes: int, watcher: Pipe) -> None:
        self._pool, self._handle, self._tensors, self._watcher = pool, handle, tensors, watcher
        self._n_batches = max(1, n_bytes // (BATCH * handle.block_bytes))
        self.n_bytes = self._n_batches * BATCH * handle.block_bytes
        self._round = 0

    def seconds(self) -> float:
        self._round += 1
        chains = random_chains(self._handle.space, self._n_batches, 10_000 + self._round)
        maps = self._tensors.random_maps(self._n_batches, self._round)
        started = time.perf_counter()
        for chain, tensor_map in zip(chains, maps, strict=True):
            stored = self._pool.store(self._handle, chain, tensor_map, wait_s=1.0)
            if stored.n_blocks != BATCH:
                raise RuntimeError(f"{stored.n_blocks} of {BATCH} blocks stored: {stored.drop.name}")
        self._watcher.send(chains[-1][BATCH - 1 :])
        if not self._watcher.poll(_WATCH_S):
            raise RuntimeError("the other process never saw the last block")
        seen: float = self._watcher.recv()
        return seen - started


def _watch(pipe: Pipe, name: str, space: Space) -> None:
    """For each key received: look for it until it is there, and answer with the time (one clock for all processes)."""
    pool, handle = client(name, space)
    pipe.send("ready")
    while True:
        try:
            keys = pipe.recv()
        except EOFError:
            return
        while not len(pool.match(handle, keys)):
            pass
        pipe.send(time.perf_counter())
