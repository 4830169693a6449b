"""The numbers of a disk tier's slots, and which of them are free.

A slot is named by a *unit*: the slabs' slots, one slab after the other. A slab that is laid out anew gets new units, so
that a unit means the same slot for as long as somebody may hold it. Does no I/O and knows no keys; the store's lock
guards it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from penstock.tiers.disk_slab import Slab

__all__ = ["MAX_CLASSES", "Place", "Slots"]

MAX_CLASSES = 64
"""How many different strides there may be at once in one process."""

Numbers = npt.NDArray[np.int64]
Place = tuple[Slab, Numbers, Numbers]
"""A slab, slots in it, ascending, and for each the number that came with its unit."""


class Slots:
    """All slabs that are in use."""

    def __init__(self) -> None:
        self.slabs: list[Slab] = []
        """In the order of their units."""
        self.end = 0
        """Units are below it."""
        self._bases: list[int] = []
        self._spare: list[tuple[int, int]] = []
        """(first, number) of units whose slab was dropped."""
        self._classes: dict[int, int] = {}
        self._roomy: dict[int, dict[int, Slab]] = {}
        """Slot class -> the slabs with free slots, by number."""

    def class_of(self, stride: int) -> int | None:
        """The slot class of a stride; None if there are too many strides already."""
        if stride not in self._classes and len(self._classes) < MAX_CLASSES:
            self._classes[stride] = len(self._classes)
        return self._classes.get(stride)

    def add(self, slab: Slab) -> bool:
        """Give a slab its units. Slots without a row are free. False, and nothing done, if it has a stride too many."""
        slot_class = self.class_of(slab.stride)
        if slot_class is None:
            return False
        slab.slot_class = slot_class
        slab.base = self._units_for(slab.n_slots)
        insort(self._bases, slab.base)
        insort(self.slabs, slab, key=lambda each: each.base)
        self.release_all(slab)
        return True

    def release_all(self, slab: Slab) -> None:
        """Make every slot of the slab free that has no row."""
        slab.release_all()
        roomy = self._roomy.setdefault(slab.slot_class, {})
        if slab.n_free:
            roomy[slab.number] = slab
        else:
            roomy.pop(slab.number, None)

    def drop(self, slab: Slab, keep_units: bool = False) -> None:
        """Take a slab out. With `keep_units` nobody gets its units again: somebody may still hold them."""
        at = self._bases.index(slab.base)
        del self._bases[at], self.slabs[at]
        self._roomy.get(slab.slot_class, {}).pop(slab.number, None)
        if not keep_units:
            self._spare.append((slab.base, slab.n_slots))

    def where(self, unit: int) -> tuple[Slab, int]:
        """The slab and the slot of a unit. Raises KeyError if its slab is gone."""
        at = bisect_right(self._bases, unit) - 1
        if at < 0 or unit >= self._bases[at] + self.slabs[at].n_slots:
            raise KeyError(unit)
        slab = self.slabs[at]
        return slab, unit - slab.base

    def of_each(self, units: npt.NDArray[np.uint32], of_slab: list[int]) -> Numbers:
        """(n,): for each unit what `of_slab`, in the order of the slabs, says of its slab."""
        if not len(units):
            return np.zeros(0, np.int64)
        found: Numbers = np.array(of_slab, np.int64)[np.searchsorted(self._bases, units, "right") - 1]
        return found

    def has(self, units: Iterable[int]) -> npt.NDArray[np.bool_]:
        """(n,): whether each unit's slab is still in use."""
        wanted = np.array(list(units), np.int64)
        if not self.slabs:
            return np.zeros(len(wanted), bool)
        at = np.searchsorted(self._bases, wanted, "right") - 1
        ends = np.array([slab.base + slab.n_slots for slab in self.slabs])
        found: npt.NDArray[np.bool_] = (at >= 0) & (wanted < ends[at])
        return found

    def places(self, units: Iterable[int], numbers: Iterable[int]) -> list[Place]:
        """Slab by slab, the slots of these units and the numbers that go with them. All slabs must be in use."""
        wanted, given = np.array(list(units), np.int64), np.array(list(numbers), np.int64)
        order = np.argsort(wanted, kind="stable")
        wanted, given = wanted[order], given[order]
        found: list[Place] = []
        first = 0
        while first < len(wanted):
            slab, _ = self.where(int(wanted[first]))
            stop = int(np.searchsorted(wanted, slab.base + slab.n_slots))
            found.append((slab, wanted[first:stop] - slab.base, given[first:stop]))
            first = stop
        return found

    def take(self, slot_class: int, n: int) -> list[int]:
        """Up to n free slots of the class, neighbours as far as possible, ascending within a slab."""
        taken: list[int] = []
        roomy = self._roomy.get(slot_class, {})
        for slab in sorted(roomy.values(), key=lambda each: -each.n_free):
            slots = _neighbours(np.flatnonzero(slab.free), n - len(taken))
            slab.free[slots] = False
            slab.n_free -= len(slots)
            if not slab.n_free:
                del roomy[slab.number]
            taken += (slab.base + slots).tolist()
            if len(taken) == n:
                break
        return taken

    def has_free(self, slot_class: int) -> bool:
        """Whether `take` would find something."""
        return bool(self._roomy.get(slot_class))

    def give_back(self, units: Iterable[int]) -> None:
        """Make taken slots free again that hold nothing. Those whose slab is gone are ignored."""
        given = np.array(list(units), np.int64)
        given = given[self.has(given.tolist())]
        for slab, slots, _ in self.places(given, given):
            slots = slots[~slab.bad[slots]]
            if not len(slots):
                continue
            slab.free[slots] = True
            slab.n_free += len(slots)
            self._roomy.setdefault(slab.slot_class, {})[slab.number] = slab

    def spoil(self, units: Iterable[int]) -> None:
        """Let nobody take these slots again: the device cannot read them. Those whose slab is gone are ignored."""
        given = np.array(list(units), np.int64)
        given = given[self.has(given.tolist())]
        for slab, slots, _ in self.places(given, given):
            slab.bad[slots] = True
            slab.free[slots] = False
            slab.n_free = int(slab.free.sum())
            if not slab.n_free:
                self._roomy.get(slab.slot_class, {}).pop(slab.number, None)

    def used_bytes(self) -> int:
        """Bytes of slots that are taken, spoiled ones among them."""
        return sum((slab.n_slots - slab.n_free) * slab.stride for slab in self.slabs)

    def _units_for(self, n: int) -> int:
        for at, (base, length) in enumerate(self._spare):
            if length >= n:
                self._spare[at : at + 1] = [(base + n, length - n)] if length > n else []
                return base
        self.end += n
        return self.end - n


def _neighbours(free: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Up to n of the free slots, ascending: of the shortest run that is long enough, or else of the longest ones."""
    if len(free) <= n:
        return free
    starts = np.flatnonzero(np.diff(free, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(free))
    enough = np.flatnonzero(lengths >= n)
    if len(enough):
        first = starts[enough[np.argmin(lengths[enough])]]
        return free[first : first + n]
    longest = np.argsort(-lengths, kind="stable")
    picked = np.concatenate([free[starts[run] : starts[run] + lengths[run]] for run in longest])
    return np.sort(picked[:n])
