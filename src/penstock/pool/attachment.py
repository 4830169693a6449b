"""One client's hold on one segment: its mappings, its lane, its kernels' context.

Leases and reservations refer to the attachment, not to the pool, so that they stay true when the pool's segment is
replaced under it. Covers memory and lane state; the link to the keeper is `link.py`, the API `client.py`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.errors import PoolClosed
from penstock.pool import layout
from penstock.pool.context import (
    CONTEXT_CELLS,
    X_COMMIT_HEAD,
    X_COMMITS,
    X_DATA,
    X_DIRECTORY,
    X_EPOCH,
    X_FREE,
    X_GENERATIONS,
    X_GRANTS,
    X_HEADER,
    X_HITS,
    X_LANE,
    X_LEASES,
    X_MASK,
    X_N_FREE,
    X_N_LEASES,
    X_N_UNITS,
    X_NEXT,
    X_RECORDS,
    X_RING_MASK,
    X_SLAB_BYTES,
    X_SLABS,
    X_UNIT_BYTES,
    X_UNITS,
    X_UNITS_PER_SLAB,
)
from penstock.pool.locks import ByteLock
from penstock.pool.segment import Mapping, Segment
from penstock.types import Miss

__all__ = ["Attachment", "LaneGrant"]


@dataclass(frozen=True, slots=True)
class LaneGrant:
    """What the keeper gave a client: a lane and the epoch under which it is the client's."""

    lane: int
    epoch: int


class Attachment:
    """Maps the tables read-only, the lane and the data read-write. Holds the lane's lock through `locks`."""

    def __init__(self, segment: Segment, locks: ByteLock, given: LaneGrant) -> None:
        geometry = segment.geometry
        self.uuid = segment.uuid
        self.geometry = geometry
        self.given = given
        self.locks = locks
        self.tables: Mapping = segment.map(0, geometry.lanes_offset, writable=False)
        lane_at = geometry.lanes_offset + given.lane * geometry.lane_bytes
        self.lane: Mapping = segment.map(lane_at, geometry.lane_bytes, writable=True, fork=False)
        data_bytes = geometry.total_bytes - geometry.data_offset
        self.data: Mapping = segment.map(geometry.data_offset, data_bytes, writable=True)
        at = layout.L_COUNTERS
        self._counters = self.lane.array[at : at + 8 * layout.LANE_COUNTERS].view(np.uint64)
        self._lists = np.zeros((3, geometry.leases), np.int64)
        self._lists[0] = np.arange(1, geometry.leases + 1)
        self._cells = _context(self, segment)
        self.ctx = int(self._cells.ctypes.data)
        self.lease_lock = threading.RLock()
        self.write_lock = threading.RLock()
        self.dead: Miss | None = None
        """Why nothing new can be done here any more: FORKED or CLOSED."""
        self._reservations = 0
        self.left: deque[Callable[[], object]] = deque()
        """What finalizers could not do where they ran; whoever comes next does it (`clean`)."""

    def finish(self, work: Callable[[], object]) -> None:
        """For finalizers: do it now, or, when the collector ran in the middle of a locked region of this thread, later.

        There it must neither change what the region is changing nor wait for the other lock.
        """
        self.left.append(work)
        if not any(lock._is_owned() for lock in (self.lease_lock, self.write_lock)):  # type: ignore[attr-defined]
            self.clean()

    def clean(self) -> None:
        """Do what finalizers left. The caller holds none of the locks."""
        while self.left:
            try:
                work = self.left.popleft()
            except IndexError:  # another thread was faster
                return
            work()

    def n_leased(self) -> int:
        """Lease cells in use."""
        return self.geometry.leases - int(self._cells[X_N_FREE // 8])

    def counters(self) -> npt.NDArray[np.uint64]:
        """This lane's counters (a live view). Raises PoolClosed in a forked child, which does not have the lane."""
        if self.dead is not None and self.dead is Miss.FORKED:
            raise PoolClosed("this process was forked from the pool's client; open the pool again here")
        return self._counters

    def hold(self, n: int) -> None:
        """Count n reservations more (or fewer) whose slots may be written to."""
        with self.lease_lock:
            self._reservations += n
            self.let_go()

    def end(self) -> None:
        """Take no more work. The lane stays locked while a lease or a reservation stands: its memory may be in use."""
        with self.write_lock, self.lease_lock:
            if self.dead is None:
                self.dead = Miss.CLOSED
            self.let_go()

    def let_go(self) -> None:
        """Drop the lane's lock once the attachment has ended and nothing stands. The caller holds `lease_lock`."""
        if self.dead is Miss.CLOSED and not self._reservations and not self.n_leased():
            self.locks.close()

    def forked(self) -> None:
        """In a forked child: the lane and its lock are the parent's. Other threads' locks died with them."""
        self.dead = Miss.FORKED
        self.locks.abandon()
        self.lease_lock, self.write_lock = threading.RLock(), threading.RLock()
        self.left.clear()


def _context(attachment: Attachment, segment: Segment) -> npt.NDArray[np.int64]:
    geometry, base, lane = segment.geometry, attachment.tables.address, attachment.lane.address
    lists = attachment._lists
    cells = np.zeros(CONTEXT_CELLS, np.int64)
    values = {
        X_HEADER: base,
        X_RECORDS: base + geometry.records_offset,
        X_DIRECTORY: base + geometry.directory_offset,
        X_MASK: geometry.n_buckets - 1,
        X_N_UNITS: geometry.n_units,
        X_LANE: lane,
        X_LEASES: lane + geometry.lease_table_offset,
        X_COMMITS: lane + geometry.commit_ring_offset,
        X_GRANTS: lane + geometry.grant_ring_offset,
        X_HITS: lane + geometry.hit_ring_offset,
        X_RING_MASK: geometry.ring - 1,
        X_EPOCH: attachment.given.epoch,
        X_DATA: attachment.data.address,
        X_SLABS: base + geometry.slabs_offset,
        X_UNITS_PER_SLAB: geometry.units_per_slab,
        X_SLAB_BYTES: geometry.slab_bytes,
        X_UNIT_BYTES: geometry.unit_bytes,
        X_NEXT: lists[0].ctypes.data,
        X_UNITS: lists[1].ctypes.data,
        X_GENERATIONS: lists[2].ctypes.data,
        X_FREE: 0,
        X_N_FREE: geometry.leases,
        X_N_LEASES: geometry.leases,
        X_COMMIT_HEAD: 0,
    }
    for offset, value in values.items():
        cells[offset // 8] = value
    return cells
