"""Taking blocks down: what `core/tiering.py` orders is leased, written to its tier, and reported back."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.core.tiering import Tiering, WriteOrder
from penstock.errors import PoolClosed, TierError, TierTimeout
from penstock.pool.stage import Stage
from penstock.runtime.mover.places import Places, TierPlace
from penstock.runtime.mover.spaces import as_tiers_know_it, buffers
from penstock.runtime.mover.workers import Transfer
from penstock.tiers.base import Batch, Placed
from penstock.types import Urgency

__all__ = ["Writer"]

PART_BYTES = 8 << 20
"""What one call writes at most: each has the tier's whole `timeout`."""


@dataclass(slots=True, eq=False)
class _Flight:
    """An order on its way. `landed`: the brain was told how it ended, or that nobody waits for it any more."""

    order: WriteOrder
    transfer: Transfer | None = None
    landed: bool = False


class Writer:
    """Runs write orders on the tiers' threads. `lock` guards `tiering`, which others use, too."""

    def __init__(self, stage: Stage, places: Places, tiering: Tiering, lock: threading.Lock) -> None:
        self._stage = stage
        self._places = places
        self._tiering = tiering
        self._lock = lock
        self._flights: list[set[_Flight]] = [set() for _ in places.tiers]
        self._part_bytes = [PART_BYTES] * len(places.tiers)

    def submit(self, order: WriteOrder) -> None:
        """Queue the blocks of one order."""
        space = self._stage.space(order.space)
        n_bytes = (0 if space is None else space.block_bytes) * len(order.units)
        flight = _Flight(order)
        with self._lock:
            self._flights[order.tier].add(flight)
        flight.transfer = self._places.workers.submit(
            order.tier, Urgency.WRITE_BACK, order.tenant, n_bytes, None, lambda: self._write(flight)
        )

    def give_up(self, tier: int) -> None:
        """Its calls do not return: what waits for it, or hangs in it, may be written elsewhere.

        A run that hangs keeps its lease, and counts after all if the call ever says that it was stored.
        """
        with self._lock:
            flights = list(self._flights[tier])
        for flight in flights:
            transfer = flight.transfer
            if transfer is None or flight.landed:
                continue
            if self._places.workers.cancel(transfer) or self._places.workers.overdue(transfer):
                self._land(flight, _nothing(flight.order), reached=False)

    def _write(self, flight: _Flight) -> None:
        placed, reached = _nothing(flight.order), False
        try:
            self._try(flight.order, self._places.tiers[flight.order.tier], placed)
            reached = True
        except (TierError, PoolClosed):
            pass  # counted by the shelf; what was not placed is refused below
        finally:
            self._land(flight, placed, reached=reached)

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
                self._write_parts(tier, batch, placed)

    def _write_parts(self, tier: TierPlace, batch: Batch, placed: npt.NDArray[np.uint8]) -> None:
        """Part by part: a run that takes longer than a call may would be written in vain again and again."""
        first, block_bytes = 0, batch.space.block_bytes
        while first < len(batch):
            part_bytes = self._part_bytes[tier.number]
            stop = min(len(batch), first + max(1, part_bytes // block_bytes))
            began = time.monotonic()
            try:
                placed[first:stop] = tier.shelf.write(batch.part(first, stop), began + tier.config.timeout_s)
            except TierTimeout:
                self._part_bytes[tier.number] = max(block_bytes, (stop - first) * block_bytes // 2)
                raise
            if time.monotonic() - began < tier.config.timeout_s / 4:  # twice as much would still be in time
                self._part_bytes[tier.number] = min(PART_BYTES, 2 * part_bytes)
            first = stop

    def _land(self, flight: _Flight, placed: npt.NDArray[np.uint8], *, reached: bool) -> None:
        """Tell the brain, once. `reached`: the tier answered; else it is down, and that counts against no block."""
        order = flight.order
        there = (placed == Placed.STORED) | (placed == Placed.PRESENT)
        with self._lock:
            self._flights[order.tier].discard(flight)
            if not reached:
                self._tiering.set_up(order.tier, False)
            if there.any():
                self._tiering.stored(order.tier, order.units[there], order.generations[there], order.keys[there])
            if not flight.landed and not there.all():
                self._tiering.refused(
                    order.tier, order.units[~there], order.generations[~there], order.keys[~there],
                    time.monotonic_ns() // 1_000_000,
                )  # fmt: skip
            flight.landed = True


def _nothing(order: WriteOrder) -> npt.NDArray[np.uint8]:
    return np.full(len(order.units), Placed.FAILED, np.uint8)
