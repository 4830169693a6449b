"""The mover: transfers on a stream of its own, each holding its lease until the device is done.

Covers taking a lease or a reservation over, choosing the way, and giving back whatever happens. A device computes no
checksum: `gather` can verify the blocks on the host before it copies them, and the slots' generations are looked at
after the copy; `Reservation.commit` computes the checksums of what `scatter` brought.
"""

from __future__ import annotations

import threading
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from penstock.connectors.cuda.copies import PROGRAMS, Limits, copy_runs, fused, have_kernels
from penstock.connectors.cuda.pieces import Pieces
from penstock.connectors.cuda.registration import Registration
from penstock.connectors.cuda.streams import Stream, stream_for
from penstock.connectors.cuda.transfers import Transfer
from penstock.errors import PoolClosed, ViewsAlive
from penstock.pool.client import SpaceHandle
from penstock.pool.lease import Lease
from penstock.pool.reservation import Reservation
from penstock.pool.tensors import TensorMap

__all__ = ["Mover"]


class Mover:
    """Moves blocks between one registered pool and one device. Thread-safe; a lease or a reservation is not.

    It keeps every transfer until that has ended, so that one which nobody waits for holds its lease for as long as it
    must and no longer than the next call here. Close it before the registration. `device="cpu"` moves within host
    memory, with the kernel only under Triton's interpreter: for tests.
    """

    def __init__(
        self,
        memory: Registration,
        device: torch.device | str = "cuda",
        *,
        limits: Limits | None = None,
        programs: int = PROGRAMS,
        stream: Stream | None = None,
    ) -> None:
        """`programs` bounds how many of the device's processors the fused kernel takes."""
        self._memory = memory
        self._device = torch.device(device)
        self._limits = limits if limits is not None else Limits()
        self._programs = programs
        self._stream = stream if stream is not None else stream_for(self._device)
        self._have_kernels = have_kernels()
        self._lock = threading.Lock()
        self._flying: list[Transfer] = []
        self._closed = False

    def gather(
        self,
        lease: Lease,
        handle: SpaceHandle,
        tensors: TensorMap,
        *,
        segments: npt.ArrayLike | None = None,
        verify: bool = False,
    ) -> Transfer:
        """Copy a lease's blocks into pages; block i to `tensors.block_index[i]`. The lease belongs to the transfer from
        this call on, also when it raises: it is released when the device is done with it.

        With `verify`, the checksums are checked on the host first (at its memory's speed, in this thread), and only the
        blocks before the first bad one are copied. Raises Refused for tensors in runs, ValueError for a map that does
        not fit the lease, PoolClosed after a close, ConfigError for a segment that is not registered.
        """
        held = _HeldLease(lease, tensors)
        try:
            good = lease.verify() if verify else len(lease)
            segs = handle.segments(segments)
            pieces = Pieces(held.pin(len(lease), handle.block_bytes), segs, tensors, handle.segment_bytes)
            if good < len(lease):
                part = slice(0, good)
                pieces = Pieces(pieces.slots[part], segs, tensors.blocks(part), handle.segment_bytes)
            held.n_blocks, held.n_segments = good, len(segs)
            return self._queue(pieces, held, handle.block_bytes, to_pages=True)
        except BaseException:
            held.finish(False)
            raise

    def scatter(self, reservation: Reservation, handle: SpaceHandle, tensors: TensorMap) -> Transfer:
        """Copy pages into a reservation's first slots, as many as the map has blocks. When the transfer has ended,
        `good` of them are filled: `reservation.commit(keys)` computes their checksums and publishes them.

        The reservation stays the caller's; it cannot be committed or aborted before (ViewsAlive). Raises as `gather`.
        """
        held = _HeldSlots(reservation, tensors)
        try:
            n_blocks = len(tensors.block_index)
            if n_blocks > len(reservation):
                raise ValueError(f"the map has {n_blocks} blocks, the reservation {len(reservation)} slots")
            slots = held.pin(n_blocks, handle.block_bytes)
            pieces = Pieces(slots, handle.segments(None), tensors, handle.segment_bytes)
            return self._queue(pieces, held, handle.block_bytes, to_pages=False)
        except BaseException:
            held.finish(False)
            raise

    def reap(self) -> int:
        """End the transfers whose event has passed; returns how many are still under way. Does not block."""
        with self._lock:
            flying = list(self._flying)
        ended = {id(transfer) for transfer in flying if transfer.done()}
        with self._lock:
            self._flying = [transfer for transfer in self._flying if id(transfer) not in ended]
            return len(self._flying)

    def close(self) -> None:
        """Wait for every transfer, and take no more. Idempotent."""
        with self._lock:
            self._closed = True
            flying, self._flying = self._flying, []
        for transfer in flying:
            transfer.wait()

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # ---- inside

    def _queue(self, pieces: Pieces, held: _Held, block_bytes: int, *, to_pages: bool) -> Transfer:
        """Queue the pieces. After an exception nothing is under way any more."""
        self._memory.require(pieces.slots, block_bytes)
        self.reap()
        # One at a time, and none after close: an event stands behind its own transfer's work.
        with self._lock:
            if self._closed:
                raise PoolClosed("the mover was closed; make another one")
            try:
                with self._stream.entered():
                    self._move(pieces, to_pages)
                transfer = Transfer(self._stream, self._stream.mark(), held.finish)
                self._flying.append(transfer)
            except BaseException:
                # Some of it may be under way, into pages and out of slots that are given back next.
                self._stream.drain()
                raise
            return transfer

    def _move(self, pieces: Pieces, to_pages: bool) -> None:
        if not pieces.count:
            return
        n_runs = len(pieces.runs())
        if not self._have_kernels or self._limits.prefer_copies(n_runs, pieces.n_bytes):
            copy_runs(pieces, self._memory.tensor, self._device, to_pages=to_pages)
        else:
            fused(pieces, self._device, to_pages=to_pages, programs=self._programs)


class _Held:
    """Slots and tensors that a transfer uses. Views pin the slots: what they belong to cannot be ended meanwhile."""

    def __init__(self, owner: Lease | Reservation, tensors: TensorMap) -> None:
        self._owner = owner
        self._tensors: TensorMap | None = tensors
        self._views: list[npt.NDArray[np.uint8]] = []
        self.n_blocks = 0
        self.n_segments = 0

    def pin(self, n: int, block_bytes: int) -> npt.NDArray[np.int64]:
        """Pin the first n slots and return their addresses, (n,)."""
        view = self._owner.views if isinstance(self._owner, Lease) else self._owner.view
        self._views = [view(i) for i in range(n)]
        if any(view.size != block_bytes for view in self._views):
            self._views = []
            raise ValueError(f"the blocks are not the {block_bytes} bytes of this space: pass the handle they are of")
        self.n_blocks = n
        return np.array([view.__array_interface__["data"][0] for view in self._views], np.int64)

    def finish(self, arrived: bool) -> int:
        """Let go of everything; returns how many blocks may be used."""
        self._views = []
        self._tensors = None
        return self.n_blocks if arrived else 0


class _HeldLease(_Held):
    def finish(self, arrived: bool) -> int:
        lease = self._owner
        assert isinstance(lease, Lease)
        n = super().finish(arrived)
        try:
            # As after every copy: a slot that was taken away meanwhile has another generation.
            good = lease._still_good(0, n) if n else 0
            lease._count_read(good, self.n_segments)
            return good
        finally:
            _release(lease)


class _HeldSlots(_Held):
    pass


def _release(lease: Lease) -> None:
    try:
        lease.release()
    except ViewsAlive:
        # The caller made views of its own: the lease goes when they do.
        return
