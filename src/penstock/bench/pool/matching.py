"""How long a match takes, with its lease and its release, through the public API.

Beside it a client process stores new chains without pause, so that the keeper commits, evicts and grants all the time.
Each call is timed for itself and nothing is subtracted. Calls that did not find their whole chain (it was evicted) are
left out; the note says how many were.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe

import numpy as np
import numpy.typing as npt

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import (
    BATCH,
    EngineTensors,
    bench_space,
    client,
    fill,
    helper,
    random_chains,
    serving,
)
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, percentiles
from penstock.identity import KeyChain
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.layout import MIB, Geometry, plan_geometry
from penstock.types import Miss

__all__ = ["run"]

# Blocks are small, so that a million of them fit into a machine: nothing here looks at their bytes.
SPACE = bench_space(n_segments=1, segment_bytes=4096)
# The client that churns makes its chains in portions of this share of the pool.
_CHURN_SHARE = 8


def geometry_for(blocks: int) -> Geometry:
    """A pool that `blocks` blocks of the small space nearly fill."""
    return plan_geometry(round(blocks * (4096 + 64 + 128 + 64) * 1.04) + 64 * MIB, unit_bytes=4096)


def run(group: Group, scale: Scale) -> Iterator[Result]:
    n_chains = scale.blocks // BATCH
    with serving(geometry_for(scale.blocks)) as (name, _):
        chains = random_chains(SPACE, n_chains, seed=1)
        pool, handle = client(name, SPACE)
        with pool:
            fill(pool, handle, chains, EngineTensors(SPACE, 1 << 20))
            singles = [chain[:1] for chain in chains]
            _measure(pool, handle, chains, scale, 1)
            with helper(_churn, name, n_chains // _CHURN_SHARE):
                long, long_note = _measure(pool, handle, chains, scale, scale.windows)
                short, short_note = _measure(pool, handle, singles, scale, scale.windows)
    yield result(group.goals[0], estimate(percentiles(long, 50)), note=long_note)
    yield result(group.goals[1], estimate(percentiles(long, 99)), note=long_note)
    yield result(group.goals[2], estimate(percentiles(short, 50)), note=short_note)


def _measure(
    pool: Pool, handle: SpaceHandle, chains: list[KeyChain], scale: Scale, n_windows: int
) -> tuple[list[npt.NDArray[np.float64]], str]:
    """Microseconds of the calls that hit, by window, and what there is to say about them."""
    order = np.random.default_rng(7).integers(0, len(chains), (n_windows, scale.calls))
    found, calls, misses = [], 0, 0
    for row in order:
        window, missed = time_matches(pool, handle, [chains[i] for i in row])
        found.append(window)
        calls, misses = calls + len(row), misses + missed
    return found, f"{calls} calls, {misses} left out as their chain was evicted"


def time_matches(pool: Pool, handle: SpaceHandle, chains: list[KeyChain]) -> tuple[npt.NDArray[np.float64], int]:
    """Microseconds of each match with its release that found its whole chain, and how many did not."""
    took = np.zeros(len(chains))
    clock, whole = time.perf_counter_ns, Miss.NONE
    for i, keys in enumerate(chains):
        started = clock()
        lease = pool.match(handle, keys)
        lease.release()
        ended = clock()
        took[i] = ended - started if lease.miss is whole else np.nan
    hits = took[~np.isnan(took)]
    return hits / 1000, len(chains) - len(hits)


def _churn(pipe: Pipe, name: str, n_chains: int) -> None:
    """Store new chains until the pipe closes."""
    pool, handle = client(name, SPACE)
    tensors = EngineTensors(SPACE, 1 << 20)
    page = tensors.map(np.arange(BATCH, dtype=np.int64))
    seed = 1000
    pipe.send("ready")
    while True:
        for chain in random_chains(SPACE, n_chains, seed):
            pool.store(handle, chain, page, wait_s=1.0)
            if pipe.poll():
                return
        seed += 1
