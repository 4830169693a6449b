"""What the brain costs per event: LRU over a million resident blocks that lie in no order.

A round is what a keeper's turn gives it: touches of whole chains, victims picked and answered, new chains committed
into the slots they left. Time is that of `victims` and `observe`; events are touches, evictions and commits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import BATCH
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.core.brain import Brain
from penstock.types import NO_UNIT, EventKind, event_dtype

__all__ = ["run"]

Units = npt.NDArray[np.uint32]

# Chains that come, go and are touched in one round.
NEW_CHAINS = 16
TOUCHED_CHAINS = 32
ROUNDS_A_WINDOW = 20


def run(group: Group, scale: Scale) -> Iterator[Result]:
    rig = _Rig(scale.blocks // BATCH * BATCH)
    costs = []
    for _ in range(scale.windows):
        rounds = [rig.round() for _ in range(ROUNDS_A_WINDOW)]
        costs.append(1e6 * sum(s for _, s in rounds) / sum(n for n, _ in rounds))
    rig.brain.assert_consistent()
    shares = f"{TOUCHED_CHAINS}:{NEW_CHAINS}:{NEW_CHAINS} touches, evictions, commits"
    yield result(group.goals[0], estimate(costs), note=f"{rig.n_blocks} blocks; {shares}")


class _Rig:
    """A full brain, and which chain lies in which slots."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.brain = Brain(n_blocks, 1)
        self._rng = np.random.default_rng(11)
        self._chains = self._rng.permutation(n_blocks).astype(np.uint32).reshape(-1, BATCH)
        self._victims = np.zeros(NEW_CHAINS * BATCH, np.uint32)
        self._now = 0
        for start in range(0, len(self._chains), NEW_CHAINS):
            self.brain.observe(_committed(self._chains[start : start + NEW_CHAINS]), start)

    def round(self) -> tuple[int, float]:
        """Events of one round, and the brain's seconds for them."""
        self._now += 1
        touched = _events(EventKind.TOUCHED, self._some(TOUCHED_CHAINS))
        seconds = self._observe(touched)
        started = time.perf_counter()
        n = self.brain.victims(0, len(self._victims), self._victims)
        seconds += time.perf_counter() - started
        if n != len(self._victims):
            raise RuntimeError(f"{n} victims")
        seconds += self._observe(_events(EventKind.EVICTED, self._victims))
        rows = self._replace(self._victims)
        seconds += self._observe(_committed(rows))
        return len(touched) + n + rows.size, seconds

    def _observe(self, events: npt.NDArray[np.void]) -> float:
        started = time.perf_counter()
        self.brain.observe(events, self._now)
        return time.perf_counter() - started

    def _some(self, n: int) -> Units:
        """The blocks of n random chains, each from head to tail."""
        return self._chains[self._rng.integers(0, len(self._chains), n)].reshape(-1)

    def _replace(self, left: Units) -> Units:
        """Whole chains leave in LRU order, tail first: put a new chain where each was."""
        rows = left.reshape(-1, BATCH)[:, ::-1]
        return np.ascontiguousarray(rows)


def _events(kind: EventKind, units: Units) -> npt.NDArray[np.void]:
    events = np.zeros(len(units), event_dtype)
    events["kind"], events["unit"], events["parent"] = kind, units, NO_UNIT
    return events


def _committed(rows: Units) -> npt.NDArray[np.void]:
    """Chains, one a row, committed from head to tail."""
    events = _events(EventKind.COMMITTED, rows.reshape(-1))
    parents = events["parent"].reshape(rows.shape)
    parents[:, 1:] = rows[:, :-1]
    return events
