"""The slots a client holds without having filled them: granted ahead of time, so that a write asks nobody.

How many are wanted ahead follows what was reserved lately; what stays unused goes back (`Pool.return_idle_grants`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.pool.attachment import Attachment
from penstock.pool.layout import N_CLASSES
from penstock.pool.writer import take_grants, unapplied
from penstock.pool.writer import want as publish_want

__all__ = ["GrantStore"]

Slots = npt.NDArray[np.int64]


class GrantStore:
    """Free slots of one attachment by class, rows of (unit, generation). Thread-safe through the attachment's lock."""

    def __init__(self, at: Attachment) -> None:
        self.at = at
        self._taken = np.zeros((at.geometry.ring, 3), np.int64)
        self._free: list[Slots] = [np.zeros((0, 2), np.int64) for _ in range(N_CLASSES)]
        self._reserved = [0] * N_CLASSES
        self._ahead = [0] * N_CLASSES

    def want(self, slot_class: int, n: int, missing: int) -> None:
        """After n slots were asked for and all but `missing` popped: tell the keeper how many to keep outstanding.

        What is in use, what is missing, and as many ahead as lately were asked for at once.
        """
        at = self.at
        with at.write_lock:
            if at.dead is not None:
                return
            self._ahead[slot_class] = max(n, self._ahead[slot_class] * 7 // 8)
            in_use = self._reserved[slot_class] + int(unapplied(at.ctx))
            total = min(in_use + missing + self._ahead[slot_class], at.geometry.ring)
            publish_want(at.ctx, slot_class, total)

    def pop(self, slot_class: int, n: int) -> Slots:
        """Up to n free slots of a class."""
        at = self.at
        with at.write_lock:
            if at.dead is not None:
                return np.zeros((0, 2), np.int64)
            if len(self._free[slot_class]) < n:
                self._take()
            free = self._free[slot_class]
            slots, self._free[slot_class] = free[:n], free[n:]
            self._reserved[slot_class] += len(slots)
            return slots

    def push(self, slot_class: int, slots: Slots) -> None:
        """Slots that were reserved and not used."""
        with self.at.write_lock:
            self.keep(slot_class, slots)
            self._reserved[slot_class] -= len(slots)

    def keep(self, slot_class: int, slots: Slots) -> None:
        """Slots that were drained and could not be returned."""
        with self.at.write_lock:
            self._free[slot_class] = np.concatenate([slots, self._free[slot_class]])

    def used(self, slot_class: int, n: int) -> None:
        """n reserved slots were published."""
        with self.at.write_lock:
            self._reserved[slot_class] -= n

    def drain(self) -> Slots:
        """Every free slot, rows of (class, unit, generation); and want no more."""
        at = self.at
        with at.write_lock:
            if at.dead is not None:
                return np.zeros((0, 3), np.int64)
            for slot_class in range(N_CLASSES):
                self._ahead[slot_class] = 0
                publish_want(at.ctx, slot_class, 0)
            self._take()
            rows = [np.insert(free, 0, number, axis=1) for number, free in enumerate(self._free) if len(free)]
            self._free = [np.zeros((0, 2), np.int64) for _ in range(N_CLASSES)]
            return np.concatenate(rows) if rows else np.zeros((0, 3), np.int64)

    def count(self) -> int:
        """Free slots held, of all classes."""
        with self.at.write_lock:
            if self.at.dead is None:
                self._take()
            return sum(len(free) for free in self._free)

    def _take(self) -> None:
        n = take_grants(self.at.ctx, self._taken)
        taken = self._taken[:n]
        classes = set(taken[:, 1].tolist())  # np.unique takes longer than all the rest
        for slot_class in classes:
            slots = (taken if len(classes) == 1 else taken[taken[:, 1] == slot_class])[:, ::2]
            self._free[slot_class] = np.concatenate([self._free[slot_class], slots])
