"""Taking blocks down: what `core/tiering.py` orders is leased, written to its tier, and reported back."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

from penstock.core.tiering import Tiering, WriteOrder
from penstock.errors import PoolClosed, TierError
from penstock.pool.stage import Stage
from penstock.runtime.mover.places import Places, TierPlace
from penstock.runtime.mover.spaces import as_tiers_know_it, buffers
from penstock.tiers.base import Batch, Placed
from penstock.types import Urgency

__all__ = ["Writer"]


class Writer:
    """Runs write orders on the tiers' threads. `lock` guards `tiering`, which others use, too."""

    def __init__(self, stage: Stage, places: Places, tiering: Tiering, lock: threading.Lock) -> None:
        self._stage = stage
        self._places = places
        self._tiering = tiering
        self._lock = lock

    def submit(self, order: WriteOrder) -> None:
        """Queue the blocks of one order."""
        space = self._stage.space(order.space)
        n_bytes = (0 if space is None else space.block_bytes) * len(order.units)
        self._places.workers.submit(
            order.tier, Urgency.WRITE_BACK, order.tenant, n_bytes, None, lambda: self._write(order)
        )

    def _write(self, order: WriteOrder) -> None:
        placed = np.full(len(order.units), Placed.FAILED, np.uint8)
        try:
            self._try(order, self._places.tiers[order.tier], placed)
        except (TierError, PoolClosed):
            pass  # counted by the shelf; what was not placed is refused below
        finally:
            self._settle(order, placed)

    def _try(self, order: WriteOrder, tier: TierPlace, placed: npt.NDArray[np.uint8]) -> None:
        """Write what of the order still stands where it stood; `placed` takes what became of it."""
        space = self._stage.space(order.space)
        if space is None:
            return
        leased = self._stage.lease(space, order.units, order.generations, order.keys)
        with leased.lease:
            n = len(leased.lease)
            if n:
                batch = Batch(
                    as_tiers_know_it(space), order.keys[:n], order.parents[:n], leased.roots,
                    buffers(leased.payloads, space.block_bytes, read_only=True),
                )  # fmt: skip
                placed[:n] = tier.shelf.write(batch, time.monotonic() + tier.config.timeout_s)

    def _settle(self, order: WriteOrder, placed: npt.NDArray[np.uint8]) -> None:
        there = (placed == Placed.STORED) | (placed == Placed.PRESENT)
        with self._lock:
            for chosen, answer in ((there, True), (~there, False)):
                if not chosen.any():
                    continue
                which = (order.units[chosen], order.generations[chosen], order.keys[chosen])
                if answer:
                    self._tiering.stored(order.tier, *which)
                else:
                    self._tiering.refused(order.tier, *which, time.monotonic_ns() // 1_000_000)
