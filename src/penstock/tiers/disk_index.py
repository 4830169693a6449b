"""Which block is in which slot, and which leaves next: what a disk tier knows in memory.

Covers keys, pins, eviction, and building all of it from rows. Does no I/O; the store holds its lock around every call.
What a call changed in the slabs' rows, the store writes to disk (`disk_store.py`).

The order of eviction is the brain's; a use is stamped with a counter, so no clock matters. Whoever reads or fills a
slot pins its unit.

A block that is removed while blocks continue it, or while somebody reads it, leaves a *ghost*: no key finds it and its
row is cleared, but its slot stays taken until the brain lets it go after what continues it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np
import numpy.typing as npt

from penstock.core.brain import Brain, ConsistencyError
from penstock.tiers.base import Keys
from penstock.tiers.disk_format import ROW_USED, Words
from penstock.tiers.disk_slab import Slab
from penstock.tiers.disk_slots import MAX_CLASSES, Place, Slots
from penstock.types import NO_UNIT, EventKind, event_dtype

__all__ = ["Index", "key_list"]

_FIRST_UNITS = 1024


def key_list(keys: Keys) -> list[bytes]:
    """The keys one by one."""
    packed = np.ascontiguousarray(keys, np.uint64).view("V16")
    each: list[bytes] = packed.ravel().tolist()
    return each


class Index:
    """All blocks and where they are. Guarded by the store's lock."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.keys: dict[int, dict[bytes, int]] = {}
        """Space number -> key -> unit."""
        self.brain = Brain(_FIRST_UNITS, MAX_CLASSES)
        self.tick = 1
        self.evicted = 0
        self._pins: dict[int, int] = {}
        self._ghosts: dict[int, tuple[int, bytes] | None] = {}
        """Unit -> whose slot it was; None where a writer was to fill it again and did not."""
        self._ghost_of: dict[tuple[int, bytes], int] = {}
        self._touched: set[int] = set()

    # ---- keys

    def find(self, space: int, keys: Iterable[bytes]) -> list[int]:
        """The unit of each key; -1 where it is not here."""
        known = self.keys.get(space, {})
        return [known.get(key, -1) for key in keys]

    def n_blocks(self) -> int:
        """How many blocks are here."""
        return sum(map(len, self.keys.values()))

    def used_bytes(self) -> int:
        """Bytes of slots that hold a block or are being filled."""
        return self.slots.used_bytes() - sum(self.slots.where(unit)[0].stride for unit in self._ghosts)

    def publish(self, space: int, keys: Keys, parents: Keys, roots: Words, units: list[int]) -> list[int]:
        """These blocks' bytes are in their slots: write their rows (in memory) and let them be found.

        Returns the numbers of the blocks that were published; the slots of those that somebody else has published in
        the meantime are free again, those whose slab was lost are gone.
        """
        names, above = key_list(keys), key_list(parents)
        known = self.keys.setdefault(space, {})
        alive = self.slots.has(units).tolist()
        mine = [i for i, name in enumerate(names) if name not in known and alive[i]]
        published = set(mine)
        self.abandon([unit for i, unit in enumerate(units) if i not in published])
        mine_units = [units[i] for i in mine]
        over = []
        for i in mine:
            over.append(known.get(above[i], NO_UNIT))
            known[names[i]] = units[i]
        events = _events(EventKind.COMMITTED, mine_units)
        # The slot of a ghost that blocks continue is in the brain's order still.
        events["kind"][self.brain.facts.rows["flags"][mine_units] != 0] = EventKind.TOUCHED
        events["parent"] = over
        for slab, slots, places in self.slots.places(mine_units, mine):
            events["slot_class"] = slab.slot_class
            self._fill(slab, slots, space, keys[places], parents[places], roots[places])
        self._observe(events)
        return mine

    def _fill(
        self, slab: Slab, slots: npt.NDArray[np.int64], space: int, keys: Keys, parents: Keys, roots: Words
    ) -> None:
        slab.words[slots, 0:2] = keys
        slab.words[slots, 2:4] = parents
        slab.words[slots, 4] = roots
        slab.rows["space"][slots] = space
        slab.rows["state"][slots] = ROW_USED
        slab.rows["stamp"][slots] = self.tick + 1
        slab.seal(slots)

    def forget(self, space: int, keys: Iterable[bytes]) -> list[int]:
        """Let these blocks not be found any more, and clear their rows (in memory). Returns their units."""
        known = self.keys.get(space, {})
        there = {key: known[key] for key in keys if key in known}
        self._clear(list(there.values()))
        # From the end: a chain's tail first.
        for key, unit in reversed(there.items()):
            self._ghosts[unit] = (space, key)
            self._ghost_of[space, key] = unit
            self._reap(unit)
        return list(there.values())

    def _clear(self, units: list[int]) -> None:
        """Take these blocks from the keys and clear their rows."""
        for slab, slots, _ in self.slots.places(units, units):
            spaces = slab.rows["space"][slots].tolist()
            for space, name in zip(spaces, key_list(slab.words[slots, 0:2]), strict=True):
                del self.keys[space][name]
            slab.words[slots] = 0
        self._touched.difference_update(units)

    # ---- ghosts

    def take_ghost(self, space: int, key: bytes) -> int | None:
        """The slot of a removed block, to be written again; None if there is none or somebody still reads it."""
        unit = self._ghost_of.get((space, key)) if self._ghost_of else None
        if unit is None or unit in self._pins or self._bad(unit):
            return None
        self._lay(unit)
        return unit

    def abandon(self, units: Iterable[int]) -> None:
        """Slots that were taken, and are not filled after all."""
        units = list(units)
        alive = self.slots.has(units).tolist()
        # The slot of a ghost: blocks may continue it still.
        again = [unit for unit, here in zip(units, alive, strict=True) if here and self._resident(unit)]
        for unit in again:
            self._ghosts[unit] = None
            self._reap(unit)
        self.slots.give_back([unit for unit in units if unit not in again])

    def _bad(self, unit: int) -> bool:
        slab, slot = self.slots.where(unit)
        return bool(slab.bad[slot])

    def _resident(self, unit: int) -> bool:
        return bool(self.brain.facts.rows["flags"][unit])

    def _lay(self, unit: int) -> None:
        name = self._ghosts.pop(unit)
        if name is not None and self._ghost_of.get(name) == unit:
            del self._ghost_of[name]

    def _reap(self, unit: int) -> None:
        """Free a ghost's slot if nobody reads it and nothing continues it."""
        row = self.brain.facts.rows[unit]
        if unit in self._pins or row["children"]:
            return
        self._lay(unit)
        if row["flags"]:
            self._observe(_events(EventKind.EVICTED, [unit]))
        self.slots.give_back([unit])

    # ---- pins and uses

    def pin(self, units: Iterable[int]) -> None:
        """Keep these slots from being given to others until `unpin`."""
        for unit in units:
            self._pins[unit] = self._pins.get(unit, 0) + 1

    def unpin(self, units: Iterable[int]) -> None:
        """End one `pin`."""
        for unit in units:
            left = self._pins[unit] - 1
            if left:
                self._pins[unit] = left
            else:
                del self._pins[unit]
                if unit in self._ghosts:
                    self._reap(unit)

    def _pinned(self, slab: Slab) -> bool:
        return any(slab.base <= unit < slab.base + slab.n_slots for unit in self._pins)

    def touch(self, units: list[int]) -> None:
        """These blocks were used, in this order."""
        if units:
            self._touched.update(units)
            self._observe(_events(EventKind.TOUCHED, units))

    def n_unsaved(self) -> int:
        """How many blocks were used since `stamp`."""
        return len(self._touched)

    def stamp(self) -> list[Place]:
        """Write uses into the rows (in memory). Returns which rows changed."""
        last_use = self.brain.facts.rows["last_use"]
        changed = self.slots.places(self._touched, self._touched)
        self._touched.clear()
        for slab, at, _ in changed:
            slab.rows["stamp"][at] = last_use[slab.base + at]
            slab.seal(at)
        return changed

    # ---- room

    def evict(self, slot_class: int, n: int) -> int:
        """Free up to n slots of the class, those whose blocks leave first. Returns how many."""
        out = np.empty(n, np.uint32)
        freed, kept = 0, set[int]()
        while freed < n and (found := self.brain.victims(slot_class, n - freed, out)):
            stays = self._answer(out[:found].tolist())
            freed += found - len(stays)
            # What is kept counts as used now: once it comes round again there is nothing else.
            if kept & stays:
                break
            kept |= stays
        return freed

    def _answer(self, victims: list[int]) -> set[int]:
        """Evict what nobody uses of the victims, children before parents; a parent of what stays, stays.

        Returns what stays.
        """
        parents = self.brain.facts.rows["parent"][victims].tolist()
        kept: set[int] = set()
        for unit, parent in zip(victims, parents, strict=True):
            if unit in self._pins or unit in kept:
                kept.update((unit, parent))
        gone = [unit for unit in victims if unit not in kept]
        laid = [unit for unit in gone if unit in self._ghosts]
        for unit in laid:
            self._lay(unit)
        blocks = [unit for unit in gone if unit not in laid]
        self._clear(blocks)
        self.evicted += len(blocks)
        events = _events(EventKind.EVICTED, victims)
        events["kind"] = [EventKind.KEPT if unit in kept else EventKind.EVICTED for unit in victims]
        self._observe(events)
        self.slots.give_back(gone)
        return kept & set(victims)

    def coldest(self, slot_class: int) -> Slab | None:
        """The slab of another class of which no block was used since the class's own oldest; None if there is none.

        A class without a block takes the coldest of all. Slabs in use are left alone.
        """
        rows = self.brain.facts.rows
        limit = None
        if self.brain.evictable(slot_class):
            mine = (rows["flags"] != 0) & (rows["slot_class"] == slot_class)
            limit = int(rows["last_use"][mine].min())
        pinned = np.array(list(self._pins), np.int64)
        pinned = pinned[self.slots.has(pinned.tolist())]
        busy = {slab.number for slab, _, _ in self.slots.places(pinned.tolist(), pinned.tolist())}
        best, best_use = None, limit
        for slab in self.slots.slabs:
            if slab.slot_class == slot_class or slab.number in busy:
                continue
            part = rows[slab.base : slab.base + slab.n_slots]
            use = int(part["last_use"][part["flags"] != 0].max(initial=0))
            if best_use is None or use < best_use:
                best, best_use = slab, use
        return best

    def empty(self, slab: Slab) -> list[Place] | None:
        """Evict every block of a slab and what continues them, and take the slab out.

        Returns the slots in other slabs whose rows were cleared (in memory); None, and nothing changed, if a block is
        in use.
        """
        doomed = self._with_descendants(slab)
        if self._pinned(slab) or any(unit in self._pins for unit in doomed):
            return None
        self._answer(doomed)
        self.slots.drop(slab)
        elsewhere = [unit for unit in doomed if not slab.base <= unit < slab.base + slab.n_slots]
        return self.slots.places(elsewhere, elsewhere)

    def lose(self, slab: Slab) -> None:
        """Take a slab out whose files are gone, and forget its blocks; what continues them begins chains now."""
        held = self._pinned(slab)
        self._clear((slab.base + np.flatnonzero(slab.used())).tolist())
        for unit in [each for each in self._ghosts if slab.base <= each < slab.base + slab.n_slots]:
            self._lay(unit)
        self.slots.drop(slab, keep_units=held)
        self.rebuild()

    def _with_descendants(self, slab: Slab) -> list[int]:
        """The slab's blocks and what continues their chains, children first.

        Pointer jumping: after k rounds each block knows of its 2**k nearest ancestors.
        """
        rows = self.brain.facts.rows
        units = np.flatnonzero(rows["flags"] != 0)
        nowhere = len(rows)
        doomed = np.zeros(nowhere + 1, bool)
        doomed[slab.base : slab.base + slab.n_slots] = True
        jump = np.full(nowhere + 1, nowhere)
        jump[units] = np.minimum(rows["parent"][units], nowhere)
        depth = (jump < nowhere).astype(np.int64)
        while (jump[units] < nowhere).any():
            doomed[units] |= doomed[jump[units]]
            depth[units] += depth[jump[units]]
            jump[units] = jump[jump[units]]
        chosen = units[doomed[units]]
        order: list[int] = chosen[np.argsort(-depth[chosen], kind="stable")].tolist()
        return order

    # ---- from rows

    def add(self, slab: Slab) -> bool:
        """Take an empty slab in. False, and nothing done, if it has a stride too many."""
        added = self.slots.add(slab)
        if self.slots.end > self.brain.facts.n_units:
            old = self.brain.facts
            units = np.flatnonzero(old.resident()).astype(np.uint32)
            self.brain = Brain(max(2 * old.n_units, self.slots.end), MAX_CLASSES)
            rows = old.rows[units]
            self._restore(units, rows["parent"], rows["slot_class"], rows["last_use"])
        return added

    def recover(self, slabs: list[Slab], strides: dict[int, int]) -> tuple[int, list[Slab]]:
        """Take in slabs and all of their rows. `strides` says which spaces are known.

        Returns how many rows were dropped (those of an unknown space or a wrong stride, second copies) and the slabs
        that were not taken in.
        """
        refused = [slab for slab in slabs if not self.slots.add(slab)]
        dropped = sum(int(slab.used().sum()) for slab in refused)
        self.brain = Brain(max(_FIRST_UNITS, self.slots.end), MAX_CLASSES)
        units, words = self._rows()
        good = np.zeros(len(units), bool)
        for number, mine in _by_space(words):
            if number in strides:
                good[mine] = self._strides(units[mine]) == strides[number]
        units, words, dropped = units[good], words[good], dropped + self._drop_rows(units[~good])
        for number, mine in _by_space(words):
            names = key_list(words[mine, 0:2])
            known = dict(zip(names, units[mine].tolist(), strict=True))
            if len(known) < len(names):
                known = self._newest(names, units[mine], words[mine, 6])
                dropped += len(names) - len(known)
            self.keys[number] = known
        self.tick = int(words[:, 6].max(initial=0)) + 1
        self._take_in(*(self._rows() if dropped else (units, words)))
        return dropped, refused

    def rebuild(self) -> None:
        """Make the brain anew from the rows in memory. Slots that are being filled stay taken."""
        self.stamp()
        for unit in [each for each in self._ghosts if each not in self._pins]:
            self._lay(unit)
            self.slots.give_back([unit])
        self._take_in(*self._rows())

    def _take_in(self, units: npt.NDArray[np.uint32], words: Words) -> None:
        """Make the brain from these rows; `keys` knows them all."""
        parents = np.full(len(units), NO_UNIT, np.uint32)
        # Most blocks lie behind the block that they continue.
        behind = np.zeros(len(units), bool)
        behind[1:] = (words[1:, 2:4] == words[:-1, 0:2]).all(axis=1) & (words[1:, 5] == words[:-1, 5])
        at = np.flatnonzero(behind)
        parents[at] = units[at - 1]
        for number, mine in _by_space(words):
            rest = np.arange(len(units))[mine]
            rest = rest[~behind[rest]]
            found = map(self.keys[number].get, key_list(words[rest, 2:4]), repeat(NO_UNIT))
            parents[rest] = np.fromiter(found, np.uint32, len(rest))
        self._restore(units, parents, self._classes(units), words[:, 6])

    def _strides(self, units: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        return self.slots.of_each(units, [slab.stride for slab in self.slots.slabs])

    def _classes(self, units: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        return self.slots.of_each(units, [slab.slot_class for slab in self.slots.slabs]).astype(np.uint32)

    def _drop_rows(self, units: npt.NDArray[np.uint32]) -> int:
        """Clear rows that no key finds, and free their slots. Returns how many."""
        for slab, slots, _ in self.slots.places(units.tolist(), units.tolist()):
            slab.words[slots] = 0
        self.slots.give_back(units.tolist())
        return len(units)

    def _restore(
        self,
        units: npt.NDArray[np.uint32],
        parents: npt.NDArray[np.uint32],
        classes: npt.NDArray[np.uint32],
        stamps: Words,
    ) -> None:
        # From high to low, for blocks with one stamp: a chain's head counts as used last.
        units, parents, classes, stamps = units[::-1], parents[::-1], classes[::-1], stamps[::-1]
        try:
            self.brain.restore(units, parents, classes, stamps)
        except ConsistencyError:
            # Rows that contradict each other: every block is a chain of its own.
            self.brain.restore(units, np.full(len(units), NO_UNIT, np.uint32), classes, stamps)

    def _rows(self) -> tuple[npt.NDArray[np.uint32], Words]:
        """The units in use and their rows as words, (n, 8)."""
        units, words = [np.zeros(0, np.int64)], [np.zeros((0, 8), np.uint64)]
        for slab in self.slots.slabs:
            at = np.flatnonzero(slab.used())
            units.append(slab.base + at)
            words.append(slab.words[at])
        return np.concatenate(units).astype(np.uint32), np.concatenate(words)

    def _newest(self, names: list[bytes], units: npt.NDArray[np.uint32], stamps: Words) -> dict[bytes, int]:
        """Of rows with the same key, keep the one that was used last and clear the others."""
        known = {names[i]: int(units[i]) for i in np.argsort(stamps, kind="stable").tolist()}
        kept = np.array([known[name] for name in names])
        self._drop_rows(units[kept != units])
        return known

    def _observe(self, events: npt.NDArray[np.void]) -> None:
        self.tick += 1
        try:
            self.brain.observe(events, self.tick)
        except ConsistencyError:
            self.rebuild()


def _by_space(words: Words) -> list[tuple[int, slice | npt.NDArray[np.int64]]]:
    """Which of the rows belong to each space."""
    spaces = words[:, 5] & np.uint64(0xFFFFFFFF)
    numbers = np.unique(spaces)
    if len(numbers) == 1:
        return [(int(numbers[0]), slice(None))]
    return [(int(number), np.flatnonzero(spaces == number)) for number in numbers]


def _events(kind: EventKind, units: list[int]) -> npt.NDArray[np.void]:
    events = np.zeros(len(units), event_dtype)
    events["kind"], events["unit"], events["parent"] = kind, units, NO_UNIT
    return events
