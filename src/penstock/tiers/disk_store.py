"""An opened directory of slabs: blocks are written, read and removed here.

Covers the order of steps that makes a block whole or gone, finding room, and what to do when the device or its files
fail. Does not cover opening after the directory was lost, or closing while calls run (`disk.py`).

The order of a write, so that no row ever speaks of bytes that are not all there:

    under the lock   take a slot (free, of a new slab, or of a block that is evicted), pin it
    on the device    clear the slot's row, unless it is known to be clear; write the block; only then its row
    under the lock   let the block be found

The row is written after `write` returned for the block, so a killed process leaves the block or nothing. Rows are not
synced: after a power loss a row may have survived its block. Its root will not match what is in the slot, and whoever
reads the block drops it.

The lock is never held during I/O.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from penstock.errors import TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Usage
from penstock.tiers.disk_device import Lanes, Run, System, cut_runs, read_run, write_run
from penstock.tiers.disk_folder import Folder, Geometry
from penstock.tiers.disk_format import stride_of
from penstock.tiers.disk_index import Index, key_list
from penstock.tiers.disk_room import Room
from penstock.tiers.disk_slab import Slab
from penstock.tiers.disk_slots import Place

__all__ = ["Counts", "Store"]

_ROWS_APART = 64
"""Rows nearer than a page to each other are written with what lies between them."""
_READ_ONLY_S = 1.0
"""How long writes are refused after the file system said that it is read-only: each attempt evicts blocks first."""
_TAKES_NOTHING = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""What is there can be read on."""
_SAVE_USES = 8192
_SAVE_AFTER_S = 30.0
"""Uses are written to the rows after that many, or that long: a restart forgets later ones."""
_SAVE_WEAR_BYTES = 1 << 30


@dataclass(slots=True)
class Counts:
    """What a disk tier counts, across losses of its directory. Guarded by the store's lock."""

    written_bytes: int = 0
    """To the device, by this process."""
    read_bytes: int = 0
    torn_rows: int = 0
    dropped_rows: int = 0
    short_reads: int = 0
    errors: int = 0
    lost_slabs: int = 0
    reopened: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Store:
    """One opened directory. Methods may be called by several threads at once; `close` only when none is running."""

    def __init__(self, folder: Folder, geometry: Geometry, direct: bool, system: System, counts: Counts) -> None:
        self.folder = folder
        self.counts = counts
        self._geometry = geometry
        self._system = system
        self._lock = threading.Lock()
        self.index = Index()
        self.room = Room(folder, geometry, direct, system, self.index, self._lock)
        torn, dropped = self.room.load()
        counts.torn_rows += torn
        counts.dropped_rows += dropped
        self._lanes = Lanes()
        self._read_only_until = 0.0
        self._saving = threading.Lock()
        self._saved_at = time.monotonic()
        self._saved_wear = self._wear_at_open = counts.written_bytes

    # ---- what a tier does

    def holds(self, space: BlockSpace, keys: Keys) -> npt.NDArray[np.bool_]:
        """(n,): which of these blocks are here."""
        number = self.folder.find(space)
        known = self.index.keys.get(number, {}) if number is not None else {}
        return np.fromiter((key in known for key in key_list(keys)), bool, len(keys))

    def read(self, batch: Batch) -> npt.NDArray[np.uint8]:
        """(n,) of Found."""
        answer = np.full(len(batch), Found.ABSENT, np.uint8)
        number = self.folder.find(batch.space)
        if number is None:
            return answer
        names = key_list(batch.keys)
        with self._lock:
            units = self.index.find(number, names)
            here = [i for i, unit in enumerate(units) if unit >= 0]
            pinned = [units[i] for i in here]
            places = self.index.slots.places(pinned, here)
            for slab, slots, numbers in places:
                batch.roots[numbers] = slab.rows["root"][slots]
            self._begin(pinned, places)
        codes = np.zeros(len(batch), np.int64)
        try:
            self._move(read_run, places, batch.payloads, codes)
        finally:
            with self._lock:
                self._end(pinned, places)
        answer[here] = np.where(codes[here] == 0, Found.HERE, Found.FAILED)
        self._after_read(number, names, units, here, codes, batch.space.block_bytes)
        return answer

    def write(self, batch: Batch) -> npt.NDArray[np.uint8]:
        """(n,) of Placed."""
        answer = np.full(len(batch), Placed.NO_ROOM, np.uint8)
        stride = stride_of(batch.space.block_bytes)
        writable = self._number(batch.space)
        number = writable if writable is not None else self.folder.find(batch.space)
        if number is None:
            return answer
        names, above = key_list(batch.keys), key_list(batch.parents)
        with self._lock:
            slot_class = self.index.slots.class_of(stride) if writable is not None else None
            units = self.index.find(number, names)
            # What the new blocks continue must not leave to make room for them.
            guarded = [unit for unit in {*units, *self.index.find(number, above)} if unit >= 0]
            self.index.pin(guarded)
            self.index.touch([unit for unit in units if unit >= 0])
        try:
            first_of = {name: i for i, name in reversed(list(enumerate(names)))}
            missing = [i for i, unit in enumerate(units) if unit < 0 and first_of[names[i]] == i]
            if missing and slot_class is not None:
                self._write_missing(batch, number, slot_class, stride, missing, names, answer)
        finally:
            with self._lock:
                self.index.unpin(guarded)
        answer[[i for i, unit in enumerate(units) if unit >= 0]] = Placed.PRESENT
        for i, name in enumerate(names):
            answer[i] = answer[first_of[name]]
        self._save_now_and_then()
        return answer

    def remove(self, space: BlockSpace, keys: Keys) -> None:
        """Forget these blocks. Raises OSError if that could not be written down: a restart may find them again."""
        number = self.folder.find(space)
        if number is not None:
            self._forget(number, key_list(keys))

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        """These blocks were used above."""
        number = self.folder.find(space)
        if number is not None:
            with self._lock:
                self.index.touch([unit for unit in self.index.find(number, key_list(keys)) if unit >= 0])

    def usage(self) -> Usage:
        """How full it is."""
        with self._lock:
            return Usage(self._geometry.size_bytes, self.index.used_bytes(), self.index.n_blocks())

    def counters(self) -> dict[str, int]:
        """What is counted since this directory was opened; `lifetime_written_bytes` is the directory's."""
        with self._lock:
            return {
                "errors": self.counts.errors + self.room.errors,
                "evictions": self.index.evicted,
                "slabs": len(self.index.slots.slabs),
                "lifetime_written_bytes": self._lifetime(),
            }

    def close(self) -> None:
        """Write uses and wear down, and close every file."""
        self._lanes.close()
        self._save()
        for slab in self.index.slots.slabs:
            slab.close()
        self.folder.close()

    # ---- steps

    def _number(self, space: BlockSpace) -> int | None:
        """The space's number; None where the device takes nothing now. What is there can be read, so that is no error.

        Raises TierUnavailable.
        """
        try:
            if time.monotonic() < self._read_only_until or self.folder.read_only():
                return None
            return self.folder.number(space)
        except OSError as error:
            if error.errno in _TAKES_NOTHING or error.errno == errno.EIO:
                self._count_errors(1)
                return None
            raise TierUnavailable(f"the disk tier cannot write to {self.folder.path}: {error.strerror}") from error

    def _write_missing(
        self,
        batch: Batch,
        space: int,
        slot_class: int,
        stride: int,
        missing: list[int],
        names: list[bytes],
        answer: npt.NDArray[np.uint8],
    ) -> None:
        """Write the blocks `missing`, as many as find room, and fill in their answers."""
        units = self.room.find(space, slot_class, stride, [names[i] for i in missing])
        missing = missing[: len(units)]
        unit_of = dict(zip(missing, units, strict=True))
        places: list[Place] = []
        codes = np.zeros(len(batch), np.int64)
        try:
            with self._lock:
                # Another call may have found meanwhile that a slab's files are gone.
                alive = self.index.slots.has(units).tolist()
                answer[missing] = Placed.FAILED
                missing = [i for i, there in zip(missing, alive, strict=True) if there]
                places = self.index.slots.places([unit_of[i] for i in missing], missing)
                self._begin([], places)
            self._clear_rows(places, codes)
            self._move(write_run, places, batch.payloads, codes)
            done = [i for i in missing if codes[i] == 0]
            if errno.EROFS in codes:
                self._read_only_until = time.monotonic() + _READ_ONLY_S
            answer[missing] = [_placed(int(codes[i])) for i in missing]
            with self._lock:
                mine = self.index.publish(
                    space, batch.keys[done], batch.parents[done], batch.roots[done], [unit_of[i] for i in done]
                )
                self.counts.written_bytes += len(done) * stride
                self.index.abandon(unit_of[i] for i in missing if codes[i])
                others = [done[at] for at in set(range(len(done))) - set(mine)]
                there = self.index.find(space, [names[i] for i in others])
            self._flush(self._places_of(places, {done[at] for at in mine}))
            # Not published: somebody else did so first, or the slab was lost.
            answer[others] = [Placed.PRESENT if unit >= 0 else Placed.FAILED for unit in there]
        finally:
            with self._lock:
                self._end(units, places)

    def _places_of(self, places: list[Place], numbers: set[int]) -> list[Place]:
        chosen: list[Place] = []
        for slab, slots, each in places:
            at = np.isin(each, list(numbers))
            if at.any():
                chosen.append((slab, slots[at], each[at]))
        return chosen

    def _clear_rows(self, places: list[Place], codes: npt.NDArray[np.int64]) -> None:
        """Before slots are overwritten: rows on disk that may still speak of their old blocks."""
        for slab, slots, numbers in places:
            with self._lock:
                stale = not slab.clean[slots].all()
            if stale:
                codes[numbers] = self._flush([(slab, slots, numbers)])

    def _flush(self, places: list[Place]) -> int:
        """Write these slots' rows to disk, neighbours together. The errno of a failure, which is counted; 0 without."""
        code = 0
        for slab, slots, _ in places:
            edges = [*np.flatnonzero(np.diff(slots, prepend=-_ROWS_APART) >= _ROWS_APART).tolist(), len(slots)]
            for first, stop in pairwise(edges):
                try:
                    slab.flush(self._system, self._lock, int(slots[first]), int(slots[stop - 1]) + 1)
                except OSError as error:
                    self._count_errors(1)
                    code = error.errno or errno.EIO
        return code

    def _move(
        self,
        transfer: Callable[[System, Run, list[memoryview]], list[int]],
        places: list[Place],
        payloads: list[memoryview],
        codes: npt.NDArray[np.int64],
    ) -> None:
        """Read or write all runs at once; an errno for each block goes to `codes`, where it was 0."""
        runs: list[Run] = []
        for slab, slots, numbers in places:
            if codes[numbers].any():
                continue
            if slab.vanished():
                codes[numbers] = errno.ESTALE
                self._lose(slab)
                continue
            runs += cut_runs(slab.data_fd, slab.stride, slots, numbers)

        def work(run: Run) -> None:
            codes[run.places] = transfer(self._system, run, payloads)

        self._lanes.each(work, runs)

    def _after_read(
        self,
        space: int,
        names: list[bytes],
        units: list[int],
        here: list[int],
        codes: npt.NDArray[np.int64],
        block_bytes: int,
    ) -> None:
        good = [i for i in here if codes[i] == 0]
        short = [names[i] for i in here if codes[i] == errno.ENODATA]
        bad = [i for i in here if codes[i] == errno.EIO]
        with self._lock:
            known = self.index.keys.get(space, {})
            self.index.touch([units[i] for i in good if known.get(names[i]) == units[i]])
            self.counts.read_bytes += len(good) * block_bytes
            self.counts.short_reads += len(short)
            self.counts.errors += len(here) - len(good) - len(short)
            self.index.slots.spoil(units[i] for i in bad)
            # Written anew in the meantime, elsewhere: that copy stays.
            unreadable = [names[i] for i in bad if known.get(names[i]) == units[i]]
        if short or unreadable:
            self._forget(space, short + unreadable)
        self._save_now_and_then()

    def _forget(self, space: int, names: list[bytes]) -> None:
        with self._lock:
            units = self.index.forget(space, names)
            places = self.index.slots.places(units, units)
            self._begin([], places)
        try:
            self._flush(places)
        finally:
            with self._lock:
                self._end([], places)

    def _lose(self, slab: Slab) -> None:
        """A slab's files were deleted by somebody."""
        with self._lock:
            if slab.retired:
                return
            self.counts.lost_slabs += 1
            self.counts.dropped_rows += int(slab.used().sum())
            self.index.lose(slab)
            slab.retired = True

    def _begin(self, units: list[int], places: list[Place]) -> None:
        self.index.pin(units)
        for slab, _, _ in places:
            slab.users += 1

    def _end(self, units: list[int], places: list[Place]) -> None:
        self.index.unpin(units)
        for slab, _, _ in places:
            slab.users -= 1
            if slab.retired and not slab.users:
                slab.close()

    def _count_errors(self, n: int) -> None:
        with self._lock:
            self.counts.errors += n

    # ---- what is written down now and then

    def _lifetime(self) -> int:
        return self.folder.written_before + self.counts.written_bytes - self._wear_at_open

    def _save_now_and_then(self) -> None:
        late = time.monotonic() - self._saved_at > _SAVE_AFTER_S
        much = self.counts.written_bytes - self._saved_wear > _SAVE_WEAR_BYTES
        if not late and not much and self.index.n_unsaved() < _SAVE_USES:
            return
        if self._saving.acquire(blocking=False):
            try:
                self._save()
            finally:
                self._saving.release()

    def _save(self) -> None:
        """Write down when blocks were used and how much was written; a failure is counted, and tried again later."""
        # Whoever has the directory now may have rows where ours were.
        if not self.folder.is_there():
            return
        self._saved_at = time.monotonic()
        with self._lock:
            places = self.index.stamp()
            self._begin([], places)
            wear = self._lifetime()
            self._saved_wear = self.counts.written_bytes
        try:
            self._flush(places)
            self.folder.save_wear(wear)
        except OSError:
            self._count_errors(1)
        finally:
            with self._lock:
                self._end([], places)


def _placed(code: int) -> Placed:
    if not code:
        return Placed.STORED
    return Placed.NO_ROOM if code in _TAKES_NOTHING else Placed.FAILED
