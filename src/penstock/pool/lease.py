"""A lease: blocks that stay where they are until it is released."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import PoolClosed, ViewsAlive
from penstock.pool.attachment import Attachment
from penstock.pool.context import K_MISS, K_READ_BLOCKS, K_READ_BYTES
from penstock.pool.reader import release as release_cells
from penstock.pool.reader import skip, unchanged
from penstock.pool.tensors import TensorMap
from penstock.pool.views import Pins
from penstock.types import Miss

if TYPE_CHECKING:
    from penstock.pool.client import Pool
    from penstock.pool.handles import PlacedSpace

__all__ = ["Handover", "Lease"]

# Below this many bytes the destination stays in the cache for the layer that reads it next.
STREAM_FROM_BYTES = 1 << 20


class Handover(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lease as another process can take it over: what `Lease.handover` packs."""

    uuid: bytes
    digest: bytes
    handles: bytes
    """n x (unit, generation), int64 little-endian."""
    keys: bytes
    """n x 16 bytes."""


class Lease:
    """The longest prefix that was there, pinned. `len()` is the number of blocks; `miss` says why there are no more.

    Release it (or leave its `with` block) when the bytes are no longer needed; garbage collection does it too, late.
    Not thread-safe; different leases of one pool may be used by different threads.
    """

    __slots__ = ("_at", "_cell", "_count", "_damaged", "_handle", "_pins", "_pool", "_slots", "miss")

    def __init__(self, pool: Pool, at: Attachment, handle: PlacedSpace, cell: int, count: int, miss: Miss) -> None:
        self._pool = pool
        self._at = at
        self._handle = handle
        self._cell = cell
        self._count = count
        self._pins: Pins | None = None
        self._slots: _Slots | None = None
        self._damaged: tuple[int, int, bytes] | None = None
        self.miss = miss

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<Lease of {self._count} blocks, miss={self.miss.name}>"

    def gather(
        self,
        tensors: TensorMap,
        *,
        blocks: slice = slice(None),
        segments: npt.ArrayLike | None = None,
        verify: bool | None = None,
    ) -> int:
        """Copy blocks of the lease into an engine's tensors; the i-th chosen block to `tensors.block_index[i]`.

        Returns how many blocks, from the first chosen one, are good: fewer than were chosen when a checksum was wrong
        (`miss` is then CHECKSUM, and the keeper is told) or the slot changed (CHANGED); what was copied behind them
        must not be used. `segments` selects layer segments (all by default); `verify` overrides the pool's default.
        Raises ValueError when the map does not fit the selection, PoolClosed after a fork or close.
        """
        from penstock.pool.copies import gather, gather_verified

        self._require_live()
        first, stop, step = blocks.indices(self._count)
        n = max(0, stop - first)
        segs = self._handle.segments(segments)
        self._check_map(tensors, n, step, segs)
        if not n:
            return 0
        slots = self._located()
        handle, streaming = self._handle, n * len(segs) * self._handle.segment_bytes >= STREAM_FROM_BYTES
        move = (
            n, slots.payloads[first:stop], segs, tensors.seg_base, tensors.block_index,
            tensors.block_stride, tensors.runs, tensors.run_stride, handle.segment_bytes,
        )  # fmt: skip
        good = n
        if self._pool.verify if verify is None else verify:
            bad = np.empty(n, np.uint8)
            sums = slots.tables[first:stop], slots.keys[first:stop], slots.roots[first:stop]
            if gather_verified(*move, handle.n_segments, *sums, bad, streaming):
                good = int(bad.argmax())
                self._found_damage(first + good)
        else:
            gather(*move, streaming)
        good = min(good, self._still_good(first, good))
        self._count_read(good, len(segs))
        return good

    def views(self, i: int) -> npt.NDArray[np.uint8]:
        """Block i in place: a read-only (block_bytes,) uint8 array, not verified. The slot stays pinned until the array
        and everything made from it are gone, whatever happens to the lease."""
        self._require_live()
        if not 0 <= i < self._count:
            raise IndexError(f"block {i} of a lease of {self._count}")
        if self._pins is None:
            self._pins = Pins()
        address = int(self._located().payloads[i])
        return self._pins.view(address, self._handle.block_bytes, read_only=True, owner=self, label=f"block {i}")

    def verify(self) -> int:
        """Check every block's checksum in place. Returns how many blocks, from the first, are good."""
        from penstock.pool.copies import verify

        self._require_live()
        if not self._count:
            return 0
        slots, handle = self._located(), self._handle
        bad = np.empty(self._count, np.uint8)
        verified = verify(
            self._count, slots.payloads, handle.segments(None), handle.segment_bytes, handle.n_segments,
            slots.tables, slots.keys, slots.roots, bad,
        )  # fmt: skip
        if not verified:
            return self._count
        good = int(bad.argmax())
        self._found_damage(good)
        return good

    def handover(self) -> bytes:
        """The lease as bytes for `Pool.adopt` in another process. This lease must stand until that one is taken."""
        from penstock.pool.slots import lease_handles

        self._require_live()
        handles, keys = np.zeros((self._count, 2), np.int64), np.zeros((self._count, 2), np.uint64)
        if self._count:
            lease_handles(self._at.ctx, self._cell, self._count, handles, keys)
        return msgspec.msgpack.encode(Handover(self._at.uuid, self._handle.digest, handles.tobytes(), keys.tobytes()))

    def truncate(self, n_blocks: int) -> None:
        """Release all but the first n_blocks. Raises ViewsAlive if views are."""
        if n_blocks < self._count:
            self._refuse_views("truncated")
            self._give_back(max(0, n_blocks))

    def release(self) -> None:
        """Give every block back. Raises ViewsAlive, naming them, if arrays made by `views` still live. Idempotent."""
        if self._pins is not None:
            self._refuse_views("released")
        self._give_back(0)

    def _give_back(self, keep: int) -> None:
        n = self._count - keep
        if n <= 0:
            return
        self._count = keep
        at = self._at
        if at.dead is not None and at.dead is Miss.FORKED:
            return
        with at.lease_lock:
            cell = self._cell if not keep else skip(at.ctx, self._cell, keep)
            release_cells(at.ctx, cell, n)
            if at.dead is not None:
                at.let_go()
        if self._damaged is not None and not keep:
            damaged, self._damaged = self._damaged, None
            self._pool._report_damage(at, *damaged)

    def _refuse_views(self, what: str) -> None:
        if self._pins is not None and (alive := self._pins.alive()):
            raise ViewsAlive(f"a lease cannot be {what} while arrays over {', '.join(alive)} live; delete them first")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        # Views keep the lease itself alive, so there are none left here.
        if getattr(self, "_count", 0):
            self._at.finish(partial(self._give_back, 0))

    # ---- inside

    def _require_live(self) -> None:
        # The attachment alone may have ended: its segment was replaced, and is there for as long as the lease.
        if self._at.dead is not None and (self._at.dead is Miss.FORKED or self._pool.closed):
            raise PoolClosed(f"the pool was closed ({self._at.dead.name}) while this lease stood; open it again")

    def _located(self) -> _Slots:
        if self._slots is None:
            self._slots = _Slots(self._at, self._cell, self._count)
        return self._slots

    def _check_map(self, tensors: TensorMap, n: int, step: int, segs: npt.NDArray[np.int64]) -> None:
        if step != 1:
            raise ValueError("blocks are copied in order: a slice with a step is not supported")
        if len(tensors.block_index) != n or len(tensors.seg_base) != len(segs):
            raise ValueError(
                f"the map has {len(tensors.block_index)} blocks and {len(tensors.seg_base)} segments; "
                f"{n} and {len(segs)} were selected"
            )
        if self._handle.segment_bytes % tensors.runs:
            raise ValueError(f"{self._handle.segment_bytes} bytes of a segment are not {tensors.runs} equal runs")

    def _still_good(self, first: int, n: int) -> int:
        """How many of the copied blocks kept their generation throughout (all of them, while the lease stands)."""
        at = self._at
        still = unchanged(at.ctx, skip(at.ctx, self._cell, first), n)
        if still < n:
            self.miss = Miss.CHANGED
            self._count_miss(Miss.CHANGED)
        return int(still)

    def _found_damage(self, i: int) -> None:
        """Block i has a wrong checksum. The keeper is told when the lease ends: before that it could not drop it."""
        from penstock.pool.slots import lease_handles

        self.miss = Miss.CHECKSUM
        self._count_miss(Miss.CHECKSUM)
        handles, keys = np.zeros((self._count, 2), np.int64), np.zeros((self._count, 2), np.uint64)
        lease_handles(self._at.ctx, self._cell, self._count, handles, keys)
        self._damaged = (int(handles[i, 0]), int(handles[i, 1]), keys[i].tobytes())

    def _count_miss(self, why: Miss) -> None:
        with self._at.lease_lock:
            self._at.counters()[K_MISS + why] += 1

    def _count_read(self, n_blocks: int, n_segments: int) -> None:
        with self._at.lease_lock:
            counters = self._at.counters()
            counters[K_READ_BLOCKS] += n_blocks
            counters[K_READ_BYTES] += n_blocks * n_segments * self._handle.segment_bytes


class _Slots:
    """Addresses, roots and keys of a lease's blocks."""

    __slots__ = ("keys", "payloads", "roots", "tables")

    def __init__(self, at: Attachment, cell: int, count: int) -> None:
        from penstock.pool.slots import lease_slots

        self.payloads, self.tables = np.empty(count, np.int64), np.empty(count, np.int64)
        self.roots, self.keys = np.empty(count, np.uint64), np.empty((count, 2), np.uint64)
        lease_slots(at.ctx, cell, count, self.payloads, self.tables, self.roots, self.keys)
