"""How long after `commit` a sleeping keeper's pool shows the block.

One client commits a block, another in the same process matches it in a tight loop; the keeper is a process of its own
that is asleep at the moment of the commit (its sleeping word says so). The time runs from before the call of `commit`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import EngineTensors, bench_space, client, random_chains, serving
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, percentiles, windows
from penstock.identity import KeyChain
from penstock.pool.cells import peek
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.layout import H_SLEEPING, MIB, plan_geometry

__all__ = ["run"]

SPACE = bench_space(n_segments=16, segment_bytes=4 << 10)
_GIVE_UP_S = 5.0
_NAP_S = 0.001
# Calls in a window of which the 99th percentile is taken.
_CALLS_SHARE = 40


def run(group: Group, scale: Scale) -> Iterator[Result]:
    n_calls = scale.windows * max(10, scale.calls // _CALLS_SHARE)
    with serving(plan_geometry(256 * MIB)) as (name, _):
        writer, handle = client(name, SPACE)
        reader, reading = client(name, SPACE)
        tensors = EngineTensors(SPACE, 1 << 20)
        with writer, reader:
            took = [
                _once(writer, handle, reader, reading, chain, tensors)
                for chain in random_chains(SPACE, n_calls, seed=3, n_blocks=1)
            ]
    parts = windows(took, scale.windows)
    note = f"{n_calls} commits, median {float(np.median(took)):.0f} us"
    yield result(group.goals[0], estimate(percentiles(parts, 99)), note=note)


def _once(
    writer: Pool, handle: SpaceHandle, reader: Pool, reading: SpaceHandle, chain: KeyChain, tensors: EngineTensors
) -> float:
    """Microseconds from the call of commit until the other client's match finds the block."""
    page = tensors.map(np.zeros(1, np.int64))
    with writer.reserve(handle, 1, wait_s=1.0) as reservation:
        _wait_for_sleep(writer)
        started = time.perf_counter_ns()
        if len(reservation) < 1 or reservation.commit(chain, page) < 1:
            raise RuntimeError(f"the block was dropped: {reservation.drop.name}")
        deadline = started + int(_GIVE_UP_S * 1e9)
        while not len(reader.match(reading, chain)):
            if time.perf_counter_ns() > deadline:
                raise RuntimeError(f"not visible after {_GIVE_UP_S:.0f} s")
        return (time.perf_counter_ns() - started) / 1000


def _wait_for_sleep(pool: Pool) -> None:
    """Until the keeper has nothing to do any more."""
    sleeping, deadline = pool._at.tables.address + H_SLEEPING, time.monotonic() + _GIVE_UP_S
    while True:
        time.sleep(_NAP_S)
        if peek(sleeping):
            return
        if time.monotonic() > deadline:
            raise RuntimeError("the keeper does not go to sleep")
