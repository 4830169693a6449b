"""Room on the disk: which slabs there are, when one is added, and when one changes its stride.

Covers opening the slabs of a directory, the limits (bytes, bytes that stay free), eviction and the competition of
strides. Does not cover which block leaves first (`disk_index.py`) or what is written into the slots (`disk_store.py`).
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from pathlib import Path

from penstock.tiers.disk_device import System
from penstock.tiers.disk_folder import Folder, Geometry
from penstock.tiers.disk_format import HEADER_BYTES, MAX_SLOTS, ROW_BYTES, Header, stride_of
from penstock.tiers.disk_index import Index
from penstock.tiers.disk_slab import Slab, create_slab, load_slab, remove_slab_files, slab_files_bytes
from penstock.tiers.disk_slots import Place

__all__ = ["Room"]

_NO_GROWTH_S = 5.0
"""How long no slab is added after the file system had no room for one, or deleted after that made no room."""
_MAX_ROUNDS = 64
"""Other writers may take what was made free; a writer that lost this often goes without."""


class Room:
    """The slabs of one directory. `load` first; then `find` may be called by several threads at once."""

    def __init__(
        self, folder: Folder, geometry: Geometry, direct: bool, system: System, index: Index, lock: threading.Lock
    ) -> None:
        self._folder = folder
        self._geometry = geometry
        self._direct = direct
        self._system = system
        self._index = index
        self._lock = lock
        self._changing = threading.Lock()
        """Held while a slab is made or laid out anew; taken before the lock."""
        self._grow_again = 0.0
        self._delete_again = 0.0
        self._left: dict[int, int] = {}
        """Slabs that could not be read, or are no files: they hold nothing and are left as they are. Their bytes."""
        self._turned_over: dict[int, int] = {}
        """Slot class -> blocks it evicted since it last looked for a colder slab."""
        self.errors = 0

    @property
    def path(self) -> Path:
        """The directory."""
        return self._folder.path

    # ---- opening

    def load(self) -> tuple[int, int]:
        """Take in the slabs that are there. Returns (torn rows, rows dropped for other reasons). Raises OSError."""
        slabs: list[Slab] = []
        try:
            return self._load_into(slabs)
        except OSError:
            for slab in slabs:
                slab.close()
            raise

    def _load_into(self, slabs: list[Slab]) -> tuple[int, int]:
        torn = dropped = 0
        for number in self._folder.slabs():
            try:
                slab, n_torn, n_beyond = load_slab(self.path, number, self._folder.salt, self._direct)
            except OSError as error:
                # That is this process's trouble, not the slab's.
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise
                self.errors += 1
                self._left[number] = slab_files_bytes(self.path, number)
                continue
            torn, dropped = torn + n_torn, dropped + n_beyond
            if slab is None:
                remove_slab_files(self.path, number)
            else:
                slabs.append(slab)
        self._shrink(slabs)
        strides = {number: stride_of(space.block_bytes) for number, space in self._folder.spaces().items()}
        n_dropped, refused = self._index.recover(slabs, strides)
        for slab in refused:
            slabs.remove(slab)
            slab.close()
        self._folder.keep_only({number for number, keys in self._index.keys.items() if keys})
        self._write_clearings()
        return torn, dropped + n_dropped

    def _write_clearings(self) -> None:
        """Let the disk forget the rows that were dropped, lest they come back when the data is longer again."""
        for slab in self._index.slots.slabs:
            if (~slab.clean & ~slab.used()).any():
                try:
                    slab.flush(self._system, self._lock, 0, slab.n_slots)
                except OSError:
                    self.errors += 1

    def _shrink(self, slabs: list[Slab]) -> None:
        """Delete the coldest slabs until the others fit into the size."""
        slabs.sort(key=lambda each: int(each.rows["stamp"].max(initial=0)))
        while slabs and sum(map(_disk_bytes, slabs)) + sum(self._left.values()) > self._geometry.size_bytes:
            slab = slabs.pop(0)
            slab.close()
            remove_slab_files(self.path, slab.number)

    # ---- room for blocks

    def find(self, space: int, slot_class: int, stride: int, names: list[bytes]) -> list[int]:
        """Units for these blocks, pinned; fewer where there is no room for the last ones."""
        units: list[int] = []
        if _file_bytes(stride, self._slots_of(stride)) > self._geometry.size_bytes:
            return units
        for _ in range(_MAX_ROUNDS):
            with self._lock:
                new = []
                for name in names[len(units) :]:
                    ghost = self._index.take_ghost(space, name)
                    if ghost is None:
                        break
                    new.append(ghost)
                new += self._index.slots.take(slot_class, len(names) - len(units) - len(new))
                self._index.pin(new)
                units += new
            wanted = len(names) - len(units)
            if not wanted or not self._make(slot_class, stride, wanted):
                break
        return units

    def _make(self, slot_class: int, stride: int, n: int) -> bool:
        """Make room for up to n blocks in any way there is; False if there is none."""
        if self._grow(slot_class, stride):
            return True
        with self._lock:
            own = self._index.brain.evictable(slot_class)
            look = self._turned_over.get(slot_class, 0) >= self._slots_of(stride) or not own
            if look:
                self._turned_over[slot_class] = 0
        if look and self._take_colder(slot_class, stride):
            return True
        with self._lock:
            freed = self._index.evict(slot_class, n)
            self._turned_over[slot_class] = self._turned_over.get(slot_class, 0) + freed
        return freed > 0

    def _slots_of(self, stride: int) -> int:
        return min(max(1, self._geometry.slab_bytes // stride), MAX_SLOTS)

    def _grow(self, slot_class: int, stride: int) -> bool:
        """Add a slab; True if there are free slots now, whoever made them."""
        with self._changing:
            with self._lock:
                if self._index.slots.has_free(slot_class):
                    return True
            return self._add_slab(stride)

    def _add_slab(self, stride: int) -> bool:
        needed = _file_bytes(stride, self._slots_of(stride))
        with self._lock:
            slabs = self._index.slots.slabs
            all_bytes = sum(map(_disk_bytes, slabs)) + sum(self._left.values()) + needed
            taken = self._left.keys() | {slab.number for slab in slabs}
        if all_bytes > self._geometry.size_bytes or time.monotonic() < self._grow_again:
            return False
        number = next(i for i in range(len(taken) + 1) if i not in taken)
        if not self._leaves_enough(needed) or not self._lay_out(number, stride):
            self._grow_again = time.monotonic() + _NO_GROWTH_S
            return False
        return True

    def _leaves_enough(self, needed: int) -> bool:
        try:
            return self._folder.free_bytes() - needed >= self._geometry.keep_free_bytes
        except OSError:
            return False

    def _lay_out(self, number: int, stride: int) -> bool:
        """Make the slab `number` anew with this stride; False if the file system cannot."""
        n_slots = self._slots_of(stride)
        header = Header(number, self._folder.salt, secrets.randbits(64), stride, n_slots)
        # Files in a directory that has replaced ours belong to somebody else.
        if not self._folder.is_there():
            return False
        try:
            slab = create_slab(self._system, self.path, header, n_slots * stride, self._direct)
        except OSError:
            self.errors += 1
            return False
        with self._lock:
            added = self._index.add(slab)
        if not added:
            slab.close()
        return added

    def _take_colder(self, slot_class: int, stride: int) -> bool:
        """Give the class a slab of another class that was used less lately, emptied; False if there is none.

        Where one is too small, it and others are deleted and a slab is added.
        """
        n_slots = self._slots_of(stride)
        needed, freed = _file_bytes(stride, n_slots), 0
        with self._changing:
            if time.monotonic() < self._delete_again:
                return False
            # No more are deleted than make room for one slab: some file systems give space back late, or never.
            while freed < needed and self._folder.is_there():
                with self._lock:
                    slab = self._index.coldest(slot_class)
                    places = self._index.empty(slab) if slab is not None else None
                    if slab is None or places is None:
                        return False
                    for other, _, _ in places:
                        other.users += 1
                self._clear_on_disk(places)
                made = slab.data_bytes >= n_slots * stride and self._lay_out(slab.number, stride)
                if not made:
                    self._remove_files(slab.number)
                self._retire(slab)
                freed += _disk_bytes(slab)
                self._grow_again = 0.0
                if made or self._add_slab(stride):
                    return True
            self._delete_again = time.monotonic() + _NO_GROWTH_S
        return False

    def _clear_on_disk(self, places: list[Place]) -> None:
        """Write down that these slots are free: a restart would find a second copy of what was removed since."""
        for slab, slots, _ in places:
            try:
                slab.flush(self._system, self._lock, int(slots[0]), int(slots[-1]) + 1)
            except OSError:
                self.errors += 1
            with self._lock:
                slab.users -= 1
                idle = slab.retired and not slab.users
            if idle:
                slab.close()

    def _remove_files(self, number: int) -> None:
        # Files in a directory that has replaced ours belong to somebody else.
        if self._folder.is_there():
            remove_slab_files(self.path, number)

    def _retire(self, slab: Slab) -> None:
        with self._lock:
            slab.retired = True
            idle = not slab.users
        if idle:
            slab.close()


def _file_bytes(stride: int, n_slots: int) -> int:
    return stride * n_slots + HEADER_BYTES + n_slots * ROW_BYTES


def _disk_bytes(slab: Slab) -> int:
    """What a slab takes on the disk."""
    return slab.data_bytes + HEADER_BYTES + slab.n_slots * ROW_BYTES
