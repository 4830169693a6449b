"""The pool as the mover sees it: blocks by slot and key instead of by chain, spaces by their number.

Covers what the process that moves blocks between the pool and the tiers needs beyond an engine's client: what stands in
a slot, a lease on given slots, slots to fill whose checksum tables somebody else computes. It is a client like any
other: every lease and commit is checked by the same rules. Which blocks move is not decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.errors import PoolClosed
from penstock.pool.client import Pool
from penstock.pool.handles import PlacedSpace
from penstock.pool.layout import bytes_ahead, slot_share
from penstock.pool.lease import Lease
from penstock.pool.reader import COUNT_BITS, COUNT_MASK, HEAD_BITS, HEAD_MASK, adopt, match
from penstock.pool.records import RECORD_COLUMNS, read_records
from penstock.pool.removals import is_resident
from penstock.pool.reservation import Reservation
from penstock.pool.slots import lease_slots, unit_slots
from penstock.pool.spaces import read_space
from penstock.pool.wire import SpaceIs
from penstock.types import Miss

__all__ = ["Leased", "Records", "Stage"]

Keys = npt.NDArray[np.uint64]
_SCAN = 1 << 16


@dataclass(frozen=True, slots=True)
class Records:
    """What stood in slots when they were looked at; one row for each that held a block."""

    index: npt.NDArray[np.int64]
    """Which of the units that were asked about."""
    generations: npt.NDArray[np.int64]
    spaces: npt.NDArray[np.int64]
    keys: Keys
    parents: Keys
    priorities: npt.NDArray[np.int64]
    tenants: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def part(self, chosen: npt.NDArray[np.bool_]) -> Records:
        """Only the chosen rows, (n,)."""
        return Records(
            self.index[chosen], self.generations[chosen], self.spaces[chosen], np.ascontiguousarray(self.keys[chosen]),
            np.ascontiguousarray(self.parents[chosen]), self.priorities[chosen], self.tenants[chosen],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Leased:
    """A lease on given slots, with what a tier needs of them; `len()` of the lease may be less than was asked for."""

    lease: Lease
    payloads: npt.NDArray[np.int64]
    """Addresses."""
    roots: npt.NDArray[np.uint64]


class Stage:
    """Wraps a `Pool` of this process. Thread-safe as the pool is."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._at = pool._at
        self._spaces: dict[int, PlacedSpace] = {}

    @property
    def n_units(self) -> int:
        """Slots are named by units below this number."""
        return self._at.geometry.n_units

    @property
    def data_bytes(self) -> int:
        """Room for blocks, in bytes."""
        return self._at.geometry.n_slabs * self._at.geometry.slab_bytes

    @property
    def most_slots(self) -> int:
        """Slots that may be reserved at once."""
        return self._at.geometry.ring

    def space(self, number: int) -> PlacedSpace | None:
        """The space that has this number now; None if none has. Its number may have been another space's before."""
        at, known = self._at, self._spaces.get(number)
        row = read_space(at.tables.array, at.geometry, number) if 0 <= number < at.geometry.max_spaces else None
        if row is None:
            return None
        if known is None or known.digest != row.digest:
            known = PlacedSpace(
                row.digest, row.root, row.block_bytes, row.block_tokens, row.n_segments, row.segment_bytes, row.label
            )
            known.number(SpaceIs(row.id, row.slot_class))
            self._spaces[number] = known
        return known

    def slot_share(self, space: PlacedSpace) -> int:
        """What a block of this space takes of the pool, with its share of what is left over in a slab, in bytes."""
        return slot_share(self._at.geometry, space.block_bytes, space.n_segments)

    @property
    def bytes_ahead(self) -> int:
        """How much may be read before the blocks that it follows are there."""
        return bytes_ahead(self._at.geometry)

    # ---- what is there

    def records(self, units: npt.NDArray[np.int64]) -> Records:
        """What stands in these slots now, as far as they hold blocks."""
        units = np.ascontiguousarray(units, np.int64)
        found, rows = np.empty(len(units), np.int64), np.empty((len(units), RECORD_COLUMNS), np.int64)
        n = int(read_records(self._at.ctx, units, found, rows))
        rows = rows[:n]
        keys, parents = (np.ascontiguousarray(rows[:, at : at + 2]).view(np.uint64) for at in (2, 4))
        return Records(found[:n], rows[:, 0].copy(), rows[:, 1].copy(), keys, parents, rows[:, 6], rows[:, 7])

    def scan(self) -> npt.NDArray[np.int64]:
        """The units of all blocks that are there now; those that come or go meanwhile may be missed."""
        found = []
        for first in range(0, self.n_units, _SCAN):
            units = np.arange(first, min(first + _SCAN, self.n_units))
            found.append(units[self.records(units).index])
        return np.concatenate(found)

    def resident(self, space: PlacedSpace, keys: Keys) -> npt.NDArray[np.bool_]:
        """(n,): which of these keys are in the pool at this moment. Leases nothing."""
        return is_resident(self._at, space.shape, keys)

    # ---- reading

    def lease(
        self, space: PlacedSpace, units: npt.NDArray[np.int64], generations: npt.NDArray[np.int64], keys: Keys
    ) -> Leased:
        """Lease these slots as far as they, from the first, still hold these blocks. Does not count as a use."""
        at = self._at
        handles = np.ascontiguousarray(np.stack([units, generations], axis=1), np.int64)
        keys = np.array(keys, np.uint64, order="C")
        with at.lease_lock:
            if at.dead is not None:
                raise PoolClosed(f"the pool was closed ({at.dead.name})")
            packed = adopt(at.ctx, handles, keys, space.shape)
        cell, count = packed & HEAD_MASK, packed >> HEAD_BITS & COUNT_MASK
        lease = Lease(self.pool, at, space, cell, count, Miss(packed >> (HEAD_BITS + COUNT_BITS)))
        payloads, tables = np.empty(count, np.int64), np.empty(count, np.int64)
        roots, found = np.empty(count, np.uint64), np.empty((count, 2), np.uint64)
        lease_slots(at.ctx, cell, count, payloads, tables, roots, found)
        return Leased(lease, payloads, roots)

    def lease_key(self, space: PlacedSpace, key: Keys) -> Lease:
        """Lease the block of this key, (1, 2), wherever it lies; empty if it is not there. Counts as a use."""
        at = self._at
        key = np.array(key, np.uint64, order="C").reshape(1, 2)
        with at.lease_lock:
            if at.dead is not None:
                return Lease(self.pool, at, space, 0, 0, at.dead)
            packed = match(at.ctx, key, space.shape)
        return Lease(
            self.pool, at, space, packed & HEAD_MASK, packed >> HEAD_BITS & COUNT_MASK,
            Miss(packed >> (HEAD_BITS + COUNT_BITS)),
        )  # fmt: skip

    # ---- writing

    def reserve(
        self, space: PlacedSpace, n: int, wait_s: float, give_up: Callable[[], bool] | None = None
    ) -> Reservation:
        """Up to n slots: as many as there are as soon as there is one. Else as `Pool.reserve`."""
        return self.pool._reserve(space, n, 1, wait_s, give_up)

    def places(self, reservation: Reservation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Addresses of the reserved slots' payloads and checksum tables, to be filled by the caller."""
        payloads, tables = np.empty(len(reservation), np.int64), np.empty(len(reservation), np.int64)
        unit_slots(self._at.ctx, reservation._units, payloads, tables)
        return payloads, tables

    def slots(self, reservation: Reservation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Units and generations of the reserved slots, for a lease on what will be committed into them."""
        return reservation._units.copy(), reservation._generations.copy()

    def commit(
        self, reservation: Reservation, keys: Keys, parents: Keys, roots: npt.NDArray[np.uint64], said: Sequence[int]
    ) -> int:
        """Publish the first len(keys) slots, filled with payloads and tables that give these roots; the rest goes back.

        `said` is session, tenant, priority, ttl_ms and deadline_ms as a commit carries them. Returns how many were
        published; the keeper may still refuse one (its parent left, another copy came first).
        """
        n = len(keys)
        reservation._roots[:n] = roots
        keys, parents = np.ascontiguousarray(keys), np.ascontiguousarray(parents)
        published = 0
        if n:
            published = self.pool._publish_words(reservation, keys.view(np.int64), parents.view(np.int64), said)
        reservation._keep_from(n)
        reservation.abort()
        return published
