"""What a client is handed: a space's numbers in one pool, and what became of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from penstock.pool.wire import SpaceIs
from penstock.types import Drop

if TYPE_CHECKING:
    from penstock.identity import Space

__all__ = ["PlacedSpace", "SpaceHandle", "Stored"]


@dataclass(slots=True, eq=False)
class PlacedSpace:
    """A space's numbers in one pool. `id` and `slot_class` belong to the pool's present segment."""

    digest: bytes
    root: bytes
    block_bytes: int
    block_tokens: int
    n_segments: int
    segment_bytes: int
    label: str
    id: int = -1
    slot_class: int = -1
    shape: int = -1
    """id | block bytes << 32, as the kernels take it."""

    def number(self, answer: SpaceIs) -> None:
        """Take the numbers that the keeper gave this space."""
        self.id, self.slot_class = answer.id, answer.slot_class
        self.shape = answer.id | self.block_bytes << 32

    def segments(self, which: npt.ArrayLike | None) -> npt.NDArray[np.int64]:
        """Indices of layer segments as a checked int64 array; None is all of them."""
        if which is None:
            return np.arange(self.n_segments, dtype=np.int64)
        segs = np.ascontiguousarray(which, dtype=np.int64)
        if segs.ndim != 1 or (len(segs) and (segs.min() < 0 or segs.max() >= self.n_segments)):
            raise ValueError(f"segments {which!r} of a block that has {self.n_segments}")
        return segs


@dataclass(slots=True, eq=False, kw_only=True)
class SpaceHandle(PlacedSpace):
    """A space as one pool knows it, for who knows what the space stands for."""

    space: Space


@dataclass(frozen=True, slots=True)
class Stored:
    """What `Pool.store` did: blocks published, and why there are no more."""

    n_blocks: int
    drop: Drop
