"""What left the pool: a reader's view of the keeper's ring of removals, and the look-up that settles a gap.

The keeper writes the ring whether or not anybody reads it, and knows no reader: a slow or dead one costs nothing.
Embedded pools have it too. Does not tell what came into the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.jit import kernel
from penstock.pool.atomics import fence_full, load, load_acquire
from penstock.pool.cells import peek
from penstock.pool.context import X_DIRECTORY, X_HEADER, X_MASK, X_N_UNITS, X_RECORDS
from penstock.pool.layout import (
    BUCKET_BYTES,
    BUCKET_ENTRIES,
    H_REMOVALS_SINCE,
    H_REMOVED,
    H_REMOVING,
    R_KEY,
    R_STATE,
    RECORD_BYTES,
    REMOVAL_BYTES,
)
from penstock.pool.lookup import LEAVING, LOW32, READY

if TYPE_CHECKING:
    from penstock.pool.attachment import Attachment
    from penstock.pool.client import Pool, SpaceHandle

__all__ = ["Removals", "Removed", "is_resident"]

_NOTHING = np.zeros((0, 2), np.uint64)
_NOTHING.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class Removed:
    """What left since the last look."""

    keys: npt.NDArray[np.uint64]
    """(n, 2) words, in the order in which they left. A key may have come back since, and may stand here twice."""
    gap: bool
    """Not all is known: take every key for unknown and look it up again (`Pool.resident`). There are no keys then."""


_UNCHANGED = Removed(_NOTHING, False)


class Removals:
    """The removals of some spaces, from the moment `Pool.watch_removals` made this. For one thread at a time.

    A gap is told when the keeper overtook this reader (it took no look while the ring went round), when another keeper
    took over, and when the pool's segment was replaced. Between two gaps nothing is left out.
    """

    def __init__(self, pool: Pool, handles: Sequence[SpaceHandle]) -> None:
        self._pool = pool
        self._handles = tuple(handles)
        self._at = pool._at
        self._read = self._since = 0
        self._begin()

    def add(self, handle: SpaceHandle) -> None:
        """Follow this space too: what leaves it after the last `take` (or after this feed began) is told."""
        if handle not in self._handles:
            self._handles += (handle,)

    def take(self) -> Removed:
        """What left the pool since the last call. Never waits; costs a few microseconds if nothing did.

        Raises PoolClosed, and changes nothing then.
        """
        pool = self._pool
        pool._require_open()
        with pool._changing:  # a segment and the numbers that spaces have in it belong together
            at, spaces = pool._at, [handle.id for handle in self._handles]
        if at is not self._at:
            self._at = at
            return self._gap()
        n = int(peek(at.tables.address + H_REMOVED)) - self._read
        if not n and not self._another_keeper():
            return _UNCHANGED
        if not 0 <= n <= at.geometry.n_removals:
            return self._gap()
        rows = np.empty((n, REMOVAL_BYTES // 8), np.uint64)
        if self._lost(rows):
            return self._gap()
        self._read += n
        wanted = np.isin(rows[:, 2] & np.uint64(LOW32), np.array(spaces, np.uint64))
        return Removed(rows[wanted, :2], False)

    def _lost(self, rows: npt.NDArray[np.uint64]) -> bool:
        """Copy the next entries into `rows`. True if they cannot be relied on."""
        at = self._at
        ring = at.tables.address + at.geometry.removals_offset
        # Loaded before `H_REMOVALS_SINCE`: whoever sees a later keeper's removals sees that it is another keeper.
        behind = copy_removals(at.ctx, ring, at.geometry.n_removals - 1, self._read, rows)
        return behind > at.geometry.n_removals or self._another_keeper()

    def _another_keeper(self) -> bool:
        return bool(peek(self._at.tables.address + H_REMOVALS_SINCE) != self._since)

    def _gap(self) -> Removed:
        self._begin()
        return Removed(_NOTHING, True)

    def _begin(self) -> None:
        header = self._at.tables.address
        # In this order: what a keeper repairs after the first load changes the cell after it, and is another gap.
        self._since = int(peek(header + H_REMOVALS_SINCE))
        self._read = int(peek(header + H_REMOVED))


def is_resident(at: Attachment, shape: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """[n]: which of these keys, (n, 2), are there. `shape` is space id | block bytes << 32."""
    keys = np.array(keys, np.uint64, order="C").reshape(-1, 2)  # of one's own: kernels take no read-only arrays
    there = np.zeros(len(keys), np.bool_)
    look_up_all(at.ctx, keys, shape & LOW32, there)
    return there


@kernel("int64(int64, int64, int64, int64, uint64[:, ::1])")
def copy_removals(ctx: int, ring: int, mask: int, start: int, rows: npt.NDArray[np.uint64]) -> int:
    """Copy the entries from number `start` on into `rows`, (n, 3) words.

    Returns how far the keeper may have written ahead of `start` by the time they were copied.
    """
    for i in range(rows.shape[0]):
        entry = ring + ((start + i) & mask) * REMOVAL_BYTES
        for word in range(REMOVAL_BYTES // 8):
            rows[i, word] = load(entry + 8 * word)
    fence_full()
    return load(load(ctx + X_HEADER) + H_REMOVING) - start


@kernel("void(int64, uint64[:, ::1], int64, bool[::1])")
def look_up_all(ctx: int, key_array: npt.NDArray[np.uint64], space: int, there: npt.NDArray[np.bool_]) -> None:
    """Which of n keys, (n, 2) words, a READY or LEAVING record of this space holds.

    LEAVING counts: the keeper may yet let the block be, and if not, it tells so after this look.
    """
    keys, directory, mask = key_array.ctypes.data, load(ctx + X_DIRECTORY), load(ctx + X_MASK)
    for i in range(key_array.shape[0]):
        lo, hi = load(keys + 16 * i), load(keys + 16 * i + 8)
        bucket = lo & mask
        for _ in range(2):
            for slot in range(BUCKET_ENTRIES):
                entry = load_acquire(directory + bucket * BUCKET_BYTES + 8 * slot)
                unit = (entry & LOW32) - 1
                if (entry >> 32) & LOW32 != (hi >> 32) & LOW32 or unit < 0 or unit >= load(ctx + X_N_UNITS):
                    continue
                record = load(ctx + X_RECORDS) + unit * RECORD_BYTES
                state = load_acquire(record + R_STATE)
                if state & 0xFF != READY and state & 0xFF != LEAVING:
                    continue
                same = load(record + R_KEY) == lo and load(record + R_KEY + 8) == hi
                if same and (state >> 32) & LOW32 == space:
                    there[i] = True
            bucket = hi & mask
