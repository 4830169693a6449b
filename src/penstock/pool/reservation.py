"""A reservation: slots to fill, then commit or abort."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.errors import PoolClosed, ViewsAlive
from penstock.pool.grants import GrantStore
from penstock.pool.tensors import TensorMap
from penstock.pool.views import Pins
from penstock.types import Drop, Intent, Miss

if TYPE_CHECKING:
    from penstock.identity import KeyChain
    from penstock.pool.client import Pool
    from penstock.pool.handles import PlacedSpace

__all__ = ["Reservation"]


class Reservation:
    """Slots granted to this client. `len()` may be less than was asked for; `drop` then says why.

    Fill every slot (`scatter`, or `view` and write), then `commit`; what is not committed is given back by `abort`, at
    the end of the `with` block, or by garbage collection. Not thread-safe.
    """

    __slots__ = (
        "_at",
        "_deadline",
        "_generations",
        "_give_up",
        "_grants",
        "_handle",
        "_open",
        "_pins",
        "_pool",
        "_roots",
        "_units",
        "drop",
    )

    def __init__(
        self,
        pool: Pool,
        grants: GrantStore,
        handle: PlacedSpace,
        slots: npt.NDArray[np.int64],
        drop: Drop,
        deadline: float,
        give_up: Callable[[], bool] | None = None,
    ) -> None:
        self._pool = pool
        self._at = at = grants.at
        self._grants = grants
        self._handle = handle
        self._units = np.ascontiguousarray(slots[:, 0])
        self._generations = np.ascontiguousarray(slots[:, 1])
        self._deadline = deadline
        self._give_up = give_up
        self._roots = np.zeros(len(slots), np.uint64)
        self._pins: Pins | None = None
        self.drop = drop
        self._open = len(slots) > 0
        if self._open:
            at.hold(1)

    def __len__(self) -> int:
        return len(self._units)

    def __repr__(self) -> str:
        return f"<Reservation of {len(self)} slots, drop={self.drop.name}>"

    def view(self, i: int) -> npt.NDArray[np.uint8]:
        """Slot i in place: a writable (block_bytes,) uint8 array. It must be gone before commit or abort."""
        self._require_live()
        if not 0 <= i < len(self):
            raise IndexError(f"slot {i} of a reservation of {len(self)}")
        if self._pins is None:
            self._pins = Pins()
        payloads, _ = self._located()
        address, size = int(payloads[i]), self._handle.block_bytes
        return self._pins.view(address, size, read_only=False, owner=self, label=f"slot {i}")

    def commit(self, keys: KeyChain, tensors: TensorMap | None = None, *, intent: Intent | None = None) -> int:
        """Publish the first len(keys) slots under these keys. Returns how many went into the ring.

        With `tensors`, block i is copied from `tensors.block_index[i]` first, checksums fused in; without, the views
        were filled and the checksums are computed now. What does not go into the ring (RING_FULL, after the wait the
        reservation allowed) is dropped and counted, and its slot used again. Slots beyond len(keys) are given back.
        Raises ViewsAlive while views live and ValueError for more keys than slots.
        """
        self._require_live()
        self._refuse_views("committed")
        n = len(keys)
        if n > len(self):
            raise ValueError(f"{n} keys for {len(self)} slots")
        if n:
            self._seal(keys, n, tensors)
        published = self._pool._publish(self, keys, n, intent) if n else 0
        self._keep_from(n)
        self.abort()
        return published

    def abort(self) -> None:
        """Give every slot back, unused. Idempotent. Raises ViewsAlive while views live."""
        self._refuse_views("aborted")
        units, generations = self._units, self._generations
        if self._open:
            self._open = False
            self._keep_from(len(self))
            if len(units) and self._at.dead is None:
                self._grants.push(self._handle.slot_class, np.stack([units, generations], axis=1))
            self._at.hold(-1)

    def _keep_from(self, n: int) -> None:
        self._units, self._generations = self._units[n:], self._generations[n:]

    def _seal(self, keys: KeyChain, n: int, tensors: TensorMap | None) -> None:
        from penstock.pool.copies import scatter, seal

        handle = self._handle
        payloads, tables = self._located()
        payloads, tables = payloads[:n], tables[:n]
        segs = handle.segments(None)
        roots = self._roots[:n]
        if tensors is None:
            seal(n, payloads, segs, handle.segment_bytes, handle.n_segments, tables, keys.array, roots)
            return
        if len(tensors.block_index) != n or len(tensors.seg_base) != len(segs):
            raise ValueError(
                f"the map has {len(tensors.block_index)} blocks and {len(tensors.seg_base)} segments; "
                f"{n} and {len(segs)} are to be committed"
            )
        scatter(
            n, payloads, segs, tensors.seg_base, tensors.block_index, tensors.block_stride, tensors.runs,
            tensors.run_stride, handle.segment_bytes, handle.n_segments, tables, keys.array, roots,
        )  # fmt: skip

    def _located(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        from penstock.pool.slots import unit_slots

        payloads, tables = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        unit_slots(self._at.ctx, self._units, payloads, tables)
        return payloads, tables

    def _refuse_views(self, what: str) -> None:
        if self._pins is not None and (alive := self._pins.alive()):
            raise ViewsAlive(f"slots cannot be {what} while arrays over {', '.join(alive)} live; delete them first")

    def _require_live(self) -> None:
        if self._at.dead is not None:
            raise PoolClosed(f"the pool was closed ({self._at.dead.name}) while this reservation stood")

    def time_left_s(self) -> float:
        """Seconds that are left of the wait that `reserve` allowed; 0 when it is over."""
        return max(0.0, self._deadline - time.monotonic())

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.abort()

    def __del__(self) -> None:
        # Views keep the reservation itself alive, so there are none left here.
        if getattr(self, "_open", False) and self._at.dead is not Miss.FORKED:
            self._at.finish(self.abort)
