"""What a keeper costs while eight clients are attached and nobody does anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import EngineTensors, bench_space, client, fill, helper, random_chains, serving
from penstock.bench.report import Result, result
from penstock.bench.stats import Estimate
from penstock.pool.layout import MIB, plan_geometry

__all__ = ["run"]

SPACE = bench_space(n_segments=16, segment_bytes=4 << 10)
CLIENTS = 8
# Clients give back what they were granted ahead after two seconds; then they are idle.
_SETTLE_S = 4.0
_WINDOW_FACTOR = 3.0
_WINDOWS = 12


def run(group: Group, scale: Scale) -> Iterator[Result]:
    with serving(plan_geometry(512 * MIB)) as (name, keeper), ExitStack() as stack:
        pipes = [stack.enter_context(helper(_idle, name, i)) for i in range(CLIENTS)]
        for pipe in pipes:
            pipe.send("pid")
        clients = [pipe.recv() for pipe in pipes]
        time.sleep(_SETTLE_S * scale.window_s / 0.3)
        window_s = _WINDOW_FACTOR * scale.window_s
        rows = [_window(keeper, clients, window_s) for _ in range(_WINDOWS)]
    note = f"{CLIENTS} client processes, {_WINDOWS} windows of {window_s:.1f} s"
    for goal, values in zip(group.goals, np.array(rows).T, strict=True):
        # The mean, not the median: what is done once a second must count.
        yield result(goal, _mean(values), note=note)


def _window(keeper: int, clients: list[int], window_s: float) -> tuple[float, float]:
    """Percent of a core in one window: the keeper, and all clients together."""
    started = time.perf_counter()
    before = _cpu_ns(keeper), sum(map(_cpu_ns, clients))
    time.sleep(window_s)
    after = _cpu_ns(keeper), sum(map(_cpu_ns, clients))
    elapsed_ns = 1e9 * (time.perf_counter() - started)
    return 100 * (after[0] - before[0]) / elapsed_ns, 100 * (after[1] - before[1]) / elapsed_ns


def _cpu_ns(pid: int) -> int:
    """Time that a process's threads have run."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks)


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Estimate:
    """The mean with its 95% bootstrap interval."""
    picks = np.random.default_rng(1).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return Estimate(float(values.mean()), float(low), float(high))


def _idle(pipe: Pipe, name: str, number: int) -> None:
    """Attach, store something, and do nothing more."""
    import os

    pool, handle = client(name, SPACE)
    with pool:
        fill(pool, handle, random_chains(SPACE, 1, seed=number), EngineTensors(SPACE, 1 << 20))
        pipe.send("ready")
        pipe.recv()
        pipe.send(os.getpid())
        pipe.poll(None)
