"""Whether tiers still have what they are believed to have: a part of the pool's blocks at a time, over and over.

A tier drops what it has no room for, a store is emptied or comes back with old data, and nobody tells. What a fetch
does not find is learnt there and then (`fetches.py`); this finds what nobody fetches because the pool has it.
"""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import numpy.typing as npt

from penstock.core.tiering import Tiering
from penstock.errors import TierError
from penstock.pool.stage import Stage
from penstock.runtime.mover.places import Places, TierPlace
from penstock.runtime.mover.spaces import as_tiers_know_it
from penstock.types import Urgency

__all__ = ["Audit"]

PERIOD_S = 1.0
LOCAL_UNITS = 4096
"""Slots a period for a tier that answers without I/O."""
FAR_UNITS, FAR_PERIODS = 256, 600
"""For others: so many slots a period, or as many as bring it around in so many periods."""


class Audit:
    """`look` is called often, by one thread. `lock` guards `tiering`."""

    def __init__(self, stage: Stage, places: Places, tiering: Tiering, lock: threading.Lock) -> None:
        self._stage, self._places, self._tiering, self._lock = stage, places, tiering, lock
        self._next = 0.0
        self._from = [0] * len(places.tiers)
        self._asking: set[int] = set()

    def look(self, there: npt.NDArray[np.bool_]) -> None:
        """Once a period, go on with each tier that answers. `there`: (n_units,), which slots hold blocks."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PERIOD_S
        for tier in self._places.usable():
            if tier.local:
                self._check(tier, self._part(tier.number, there, LOCAL_UNITS))
            elif tier.number not in self._asking:
                units = self._part(tier.number, there, max(FAR_UNITS, len(there) // FAR_PERIODS))
                self._asking.add(tier.number)
                self._places.workers.submit(
                    tier.number, Urgency.WRITE_BACK, 0, 0, None, partial(self._ask, tier, units)
                )

    def _part(self, tier: int, there: npt.NDArray[np.bool_], n: int) -> npt.NDArray[np.int64]:
        first = self._from[tier]
        stop = min(first + n, len(there))
        self._from[tier] = 0 if stop == len(there) else stop
        return np.arange(first, stop)[there[first:stop]]

    def _ask(self, tier: TierPlace, units: npt.NDArray[np.int64]) -> None:
        try:
            self._check(tier, units)
        finally:
            self._asking.discard(tier.number)

    def _check(self, tier: TierPlace, units: npt.NDArray[np.int64]) -> None:
        records = self._stage.records(units)
        with self._lock:
            believed = self._tiering.below(units[records.index]) >> np.uint64(tier.number) & np.uint64(1) != 0
        for number in np.unique(records.spaces[believed]):
            space = self._stage.space(int(number))
            if space is None:
                continue
            keys = np.ascontiguousarray(records.keys[believed & (records.spaces == number)])
            try:
                holds = tier.shelf.holds(as_tiers_know_it(space), keys, time.monotonic() + tier.config.timeout_s)
            except TierError:
                return  # that it does not answer says nothing about what it has
            if not holds.all():
                with self._lock:
                    self._tiering.gone(tier.number, np.ascontiguousarray(keys[~holds]))
