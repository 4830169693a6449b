"""Whether two processes that read the pool get as much more than one as two that copy plain memory do.

Each round takes the throughput of one reading process, of two, of one that only copies, and of two, in equal times.
The ratio is (two readers over one) over (two copiers over one).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.pool.copying import SPACES, BatchReader, resident_chains, room_for_blocks
from penstock.bench.pool.rig import Copier, EngineTensors, client, helper, random_chains, serving
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, paired_ratios
from penstock.pool.layout import plan_geometry

__all__ = ["run"]

SPACE = SPACES["64kib"]
# Bytes between two looks at the clock.
_STEP_BYTES = 64 * MIB
# Both start at a moment that lies this far ahead.
_LEAD_S = 0.02
_ANSWER_S = 30.0


def run(group: Group, scale: Scale) -> Iterator[Result]:
    geometry = plan_geometry(scale.copy_pool_bytes)
    with serving(geometry) as (name, _):
        pool, handle = client(name, SPACE)
        with pool:
            n_blocks = room_for_blocks(geometry, SPACE)
            n_chains = len(resident_chains(pool, handle, EngineTensors(SPACE, 4 * MIB), n_blocks))
        with (
            helper(_work, name, n_chains, scale) as one,
            helper(_work, name, n_chains, scale) as other,
        ):
            rows = [_round([one, other], scale.window_s) for _ in range(scale.windows)]
    reading, two_reading, copying, two_copying = np.array(rows).T
    readers, copiers = paired_ratios(two_reading, reading), paired_ratios(two_copying, copying)
    note = f"two readers {np.median(readers):.2f} times one; baseline: two copying processes against one"
    measured = estimate(paired_ratios(readers, copiers))
    yield result(group.goals[0], measured, baseline=float(np.median(copiers)), note=note)


def _round(workers: list[Pipe], window_s: float) -> list[float]:
    """Bytes a second of: one reader, two readers, one copier, two copiers."""
    return [_run(workers[:n], task, window_s) for task in ("read", "copy") for n in (1, 2)]


def _run(workers: list[Pipe], task: str, window_s: float) -> float:
    start = time.perf_counter() + _LEAD_S
    for worker in workers:
        worker.send((task, start, window_s))
    rate = 0.0
    for worker in workers:
        if not worker.poll(_ANSWER_S):
            raise RuntimeError("a worker does not answer")
        rate += worker.recv()
    return rate


def _work(pipe: Pipe, name: str, n_chains: int, scale: Scale) -> None:
    """Read or copy, from a given moment on for a given time; answer with bytes a second."""
    pool, handle = client(name, SPACE)
    chains = random_chains(SPACE, n_chains, seed=2)
    reader = BatchReader(pool, handle, chains, EngineTensors(SPACE, scale.tensor_bytes), _STEP_BYTES)
    reader.warm()
    memcpy = Copier(scale.memcpy_bytes)
    tasks: dict[str, tuple[Callable[[], float], int]] = {
        "read": (lambda: reader.seconds(False), reader.n_bytes),
        "copy": (memcpy.seconds, memcpy.n_bytes),
    }
    pipe.send("ready")
    while True:
        try:
            task, start, window_s = pipe.recv()
        except EOFError:
            return
        step, n_bytes = tasks[task]
        while time.perf_counter() < start:
            pass
        busy, moved = 0.0, 0
        while time.perf_counter() < start + window_s:
            busy += step()
            moved += n_bytes
        pipe.send(moved / busy)
