"""Blocks of foreign spaces in another pool: found, copied in with their keys, parents and roots, copied out.

Covers what a tier asks of the pool that serves its segment. It is a client like any other: leases protect what it
reads, the keeper checks what it commits. Does not cover where that keeper comes from (`memory_server.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from penstock.errors import KeeperError, TierTimeout, TierUnavailable
from penstock.pool.attachment import Attachment
from penstock.pool.client import Pool
from penstock.pool.context import K_COMMITTED, K_WRITTEN_BYTES
from penstock.pool.copies import scatter  # compiled here, so that no call waits for it
from penstock.pool.counting import keeper_counters
from penstock.pool.keeper_context import G_APPLIED, G_EVICTED, G_REPEATED
from penstock.pool.layout import (
    COMMIT_BYTES,
    KIND_COMMIT,
    R_LENGTH,
    R_STATE,
    RECORD_BYTES,
    S_DIGEST,
    SPACE_BYTES,
    SlotState,
)
from penstock.pool.lease import Lease
from penstock.pool.link import SocketLink
from penstock.pool.reader import COUNT_BITS, COUNT_MASK, HEAD_BITS, HEAD_MASK, match
from penstock.pool.removals import is_resident
from penstock.pool.reservation import Reservation
from penstock.pool.spaces import read_spaces
from penstock.pool.tensors import TensorMap
from penstock.pool.wire import Forget, SpaceOf
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Usage
from penstock.types import Miss

__all__ = ["BlockClient"]

# Blocks that are copied between two looks at the clock.
CHUNK = 32
# Slots and payloads start at multiples of this: what copies past the cache need.
_ALIGNMENT = 64
# How long a block that is to be removed and is being read is left alone.
_LEASED_PAUSE_S = 0.002

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Lodging:
    """A space's numbers in one segment of the pool, with the fields of a handle that leases and reservations use."""

    at: Attachment
    id: int
    slot_class: int
    block_bytes: int
    n_segments: int
    segment_bytes: int

    @property
    def shape(self) -> int:
        return self.id | self.block_bytes << 32

    def segments(self, _which: None = None) -> npt.NDArray[np.int64]:
        return np.arange(self.n_segments, dtype=np.int64)


class BlockClient:
    """Wraps an attached `Pool`. Thread-safe."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._lodgings: dict[bytes, _Lodging] = {}
        self._usage: tuple[tuple[bytes, int, int, int], Usage] | None = None
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="penstock-memory-space")

    # ---- questions

    def holds(self, space: BlockSpace, keys: Keys) -> npt.NDArray[np.bool_]:
        """(n,): which of these blocks are there now. Raises TierUnavailable."""
        lodging = self._known(space)
        if lodging is None:
            return np.zeros(len(keys), np.bool_)
        return is_resident(lodging.at, lodging.shape, np.ascontiguousarray(keys))

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        """Count a use of what is there: what is leased counts as used."""
        lodging = None if self.pool.closed else self._known(space)
        if lodging is None:
            return
        keys = np.ascontiguousarray(keys)
        here = keys[is_resident(lodging.at, lodging.shape, keys)]
        if len(here):
            self._lease(lodging, here).release()

    def usage(self) -> Usage:
        """As the slot records say. They are counted anew only if the keeper has taken in or evicted something."""
        at = self.pool._at
        counters = keeper_counters(at.tables.array)
        seen = (at.uuid, int(counters[G_APPLIED]), int(counters[G_EVICTED]), int(counters[G_REPEATED]))
        if self._usage is None or self._usage[0] != seen:
            self._usage = seen, _count(at)
        return self._usage[1]

    # ---- out

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """Copy out what is there. Blocks that the clock leaves no time for are FAILED. Raises TierUnavailable."""
        lodging = self._known(batch.space)
        found = np.full(len(batch), Found.ABSENT, np.uint8)
        if lodging is None:
            return found
        keys = np.ascontiguousarray(batch.keys)
        here = np.flatnonzero(is_resident(lodging.at, lodging.shape, keys))
        for first in range(0, len(here), CHUNK):
            if time.monotonic() >= deadline:
                found[here[first:]] = Found.FAILED
                break
            self._read_some(lodging, batch, here[first : first + CHUNK], found)
        return found

    def _read_some(
        self, lodging: _Lodging, batch: Batch, which: npt.NDArray[np.intp], found: npt.NDArray[np.uint8]
    ) -> None:
        """Lease run after run of the chosen blocks; what stops a run is left out of the next one."""
        done = 0
        while done < len(which):
            rest = which[done:]
            with self._lease(lodging, np.ascontiguousarray(batch.keys[rest])) as lease:
                n = len(lease)
                good = self._copy_out(lodging, lease, batch, rest[:n])
                found[rest[:good]] = Found.HERE
                found[rest[good:n]] = Found.FAILED
                reason = lease.miss
            done += n
            if done < len(which):
                found[which[done]] = Found.ABSENT if reason is Miss.ABSENT else Found.FAILED
                done += 1

    def _lease(self, lodging: _Lodging, keys: Keys) -> Lease:
        at = lodging.at
        if at.left:
            at.clean()
        with at.lease_lock:
            if at.dead is not None:
                raise TierUnavailable("the memory's pool was closed or replaced meanwhile; ask again")
            packed = match(at.ctx, keys, lodging.shape)
        cell, count = packed & HEAD_MASK, packed >> HEAD_BITS & COUNT_MASK
        return Lease(self.pool, at, cast(Any, lodging), cell, count, Miss(packed >> (HEAD_BITS + COUNT_BITS)))

    def _copy_out(self, lodging: _Lodging, lease: Lease, batch: Batch, which: npt.NDArray[np.intp]) -> int:
        """Payloads and roots of the leased blocks. Returns how many, from the first, are good."""
        if not len(which):
            return 0
        roots = lease._located().roots
        good = lease.gather(_over(lodging, [batch.payloads[i] for i in which]), verify=False)
        batch.roots[which[:good]] = roots[:good]
        return good

    # ---- in

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """Copy in what is not there, and wait until the keeper has taken it. Raises TierUnavailable without a keeper,
        TierTimeout where it does not answer by the deadline; what it took by then is there."""
        lodging = self._registered(batch.space, deadline)
        placed = np.full(len(batch), Placed.NO_ROOM, np.uint8)
        present = is_resident(lodging.at, lodging.shape, np.ascontiguousarray(batch.keys))
        placed[present] = Placed.PRESENT
        missing = np.flatnonzero(~present)
        offered = [
            self._write_some(lodging, batch, missing[first : first + CHUNK], deadline)
            for first in range(0, len(missing), CHUNK)
        ]
        which = np.concatenate(offered) if offered else missing[:0]
        if len(which):
            self._settle(deadline)
            there = is_resident(lodging.at, lodging.shape, np.ascontiguousarray(batch.keys[which]))
            placed[which] = np.where(there, Placed.STORED, Placed.FAILED)
        return placed

    def _settle(self, deadline: float) -> None:
        if not self.pool.flush(max(0.0, deadline - time.monotonic())):
            if not self.pool.keeper_alive:
                raise TierUnavailable("the memory's keeper died; it is started again")
            raise TierTimeout("the memory's keeper did not take the blocks in by the deadline")

    def _write_some(
        self, lodging: _Lodging, batch: Batch, which: npt.NDArray[np.intp], deadline: float
    ) -> npt.NDArray[np.intp]:
        """Reserve, fill and publish. Returns which blocks were published."""
        pool, at = self.pool, lodging.at
        if not pool.keeper_alive:
            raise TierUnavailable("the memory's keeper is not running; it is started again")
        with pool.reserve(cast(Any, lodging), len(which), max(0.0, deadline - time.monotonic())) as reservation:
            n = len(reservation)
            if not n or reservation._at is not at:
                return which[:0]
            taken = which[:n]
            self._fill(lodging, reservation, batch, taken)
            published = self._publish(lodging, reservation, batch, taken, deadline)
        return taken[:published]

    def _fill(self, lodging: _Lodging, reservation: Reservation, batch: Batch, which: npt.NDArray[np.intp]) -> None:
        """Payloads past the cache, their checksum tables computed on the way. A block's root is the one that came with
        it: if the bytes are not what it says, whoever verifies finds that out here as well."""
        n = len(which)
        source = _over(lodging, [batch.payloads[i] for i in which])
        payloads, tables = reservation._located()
        computed = np.zeros(n, np.uint64)
        scatter(
            n, payloads, lodging.segments(), source.seg_base, source.block_index, source.block_stride, 1, 0,
            lodging.segment_bytes, lodging.n_segments, tables, np.ascontiguousarray(batch.keys[which]), computed,
        )  # fmt: skip

    def _publish(
        self, lodging: _Lodging, reservation: Reservation, batch: Batch, which: npt.NDArray[np.intp], deadline: float
    ) -> int:
        """Commit under the blocks' own keys, parents and roots; waits for room in the ring. Returns how many."""
        pool, at, n = self.pool, lodging.at, len(which)
        rows = np.zeros((n, COMMIT_BYTES // 8), np.int64)
        rows[:, 0], rows[:, 3] = KIND_COMMIT, at.given.epoch
        rows[:, 1], rows[:, 2] = reservation._units[:n], reservation._generations[:n]
        rows[:, 4:6] = np.ascontiguousarray(batch.keys[which]).view(np.int64)
        rows[:, 6:8] = np.ascontiguousarray(batch.parents[which]).view(np.int64)
        rows[:, 8], rows[:, 9] = lodging.block_bytes, lodging.id
        rows[:, 10] = np.ascontiguousarray(batch.roots[which]).view(np.int64)
        done = pool._put(at, rows)
        while done < n and pool._wait_for_keeper(at, deadline):
            done += pool._put(at, rows[done:])
        pool._count(at, K_COMMITTED, done)
        pool._count(at, K_WRITTEN_BYTES, done * lodging.block_bytes)
        reservation._grants.used(lodging.slot_class, done)
        reservation._keep_from(done)
        return done

    # ---- away

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        """Have blocks evicted, with what continues their chains, as soon as nobody leases them.

        Raises TierTimeout where that is not before the deadline, TierUnavailable.
        """
        pool = self.pool
        if self._known(space) is None or not len(keys):
            return
        if not isinstance(pool._link, SocketLink):
            raise TierUnavailable("the memory's keeper is not reached by a socket")
        request = Forget(space.digest, np.ascontiguousarray(keys).tobytes())
        while self._ask(partial(pool._link.forget, request), deadline):
            if time.monotonic() + _LEASED_PAUSE_S >= deadline:
                raise TierTimeout("a block that is to be removed is being read")
            time.sleep(_LEASED_PAUSE_S)

    def _ask(self, question: Callable[[], T], deadline: float) -> T:
        """Ask the keeper, on a thread: one that is stopped answers nothing, and questions have no deadline."""
        try:
            return self._asking.submit(question).result(max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise TierTimeout("the memory's keeper did not answer by the deadline") from error
        except KeeperError as error:
            raise TierUnavailable(f"the memory's keeper: {error}") from error
        except RuntimeError as error:
            raise TierUnavailable("the memory tier is closed") from error

    # ---- spaces

    def _known(self, space: BlockSpace) -> _Lodging | None:
        """The space's numbers as the segment's own table has them; None if nothing of it was ever written there."""
        at = self.pool._at
        if at.dead is not None:
            raise TierUnavailable("the memory's pool is closed")
        lodging = self._lodgings.get(space.digest)
        if lodging is not None and lodging.at is at and _digest_of(at, lodging.id) == space.digest:
            return lodging
        for row in read_spaces(at.tables.array, at.geometry):
            if row.digest == space.digest:
                lodging = self._lodgings[space.digest] = _Lodging(
                    at, row.id, row.slot_class, row.block_bytes, row.n_segments, row.segment_bytes
                )
                return lodging
        return None

    def _registered(self, space: BlockSpace, deadline: float) -> _Lodging:
        """The same, after asking the keeper for a number where there is none."""
        known = self._known(space)
        if known is not None:
            return known
        request = SpaceOf(
            space.digest, space.root, space.block_bytes, space.block_tokens, space.n_segments, space.segment_bytes,
            space.label,
        )  # fmt: skip
        self._ask(partial(self.pool._link.space, request), deadline)
        known = self._known(space)
        if known is None:
            raise TierUnavailable("the memory's pool was replaced meanwhile; ask again")
        return known

    def close(self) -> None:
        """Ask nothing any more. The pool is closed by whoever opened it."""
        self._asking.shutdown(wait=False)


def _count(at: Attachment) -> Usage:
    geometry = at.geometry
    raw = at.tables.array[geometry.records_offset :][: geometry.n_units * RECORD_BYTES].view(np.uint64)
    records = raw.reshape(-1, RECORD_BYTES // 8)
    ready = records[:, R_STATE // 8] & np.uint64(0xFF) == SlotState.READY
    used = int(records[ready, R_LENGTH // 8].sum())
    return Usage(geometry.n_slabs * geometry.slab_bytes, used, int(ready.sum()))


def _digest_of(at: Attachment, number: int) -> bytes:
    start = at.geometry.spaces_offset + number * SPACE_BYTES + S_DIGEST
    return at.tables.array[start : start + 32].tobytes()


def _over(lodging: _Lodging, payloads: list[memoryview]) -> TensorMap:
    """The buffers of a batch as an engine's tensors: block i lies at its own address."""
    addresses = np.array([np.frombuffer(payload, np.uint8).ctypes.data for payload in payloads], np.int64)
    if (addresses % _ALIGNMENT).any():
        raise ValueError(f"payloads must start at multiples of {_ALIGNMENT}")
    base = np.arange(lodging.n_segments, dtype=np.int64) * lodging.segment_bytes
    return TensorMap(base, addresses // _ALIGNMENT, _ALIGNMENT, keep_alive=payloads)
