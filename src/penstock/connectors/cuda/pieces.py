"""What one transfer moves: a piece for each (block, segment), with its address on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.errors import Refused
from penstock.pool.tensors import TensorMap

__all__ = ["Pieces"]

I64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Segment segs[j] of block i: `segment_bytes` bytes at slots[i] + segs[j] * segment_bytes on the host and at
    tensors.seg_base[j] + tensors.block_index[i] * tensors.block_stride on the device."""

    slots: I64s
    """(n_blocks,) addresses."""
    segs: I64s
    """(n_segments,) which segments."""
    tensors: TensorMap
    segment_bytes: int

    def __post_init__(self) -> None:
        tensors = self.tensors
        if tensors.runs != 1:
            raise Refused(
                f"a segment in {tensors.runs} runs: only paged KV, whose segments are in one piece, moves to a GPU"
            )
        if len(tensors.block_index) != len(self.slots) or len(tensors.seg_base) != len(self.segs):
            raise ValueError(
                f"the map has {len(tensors.block_index)} blocks and {len(tensors.seg_base)} segments; "
                f"{len(self.slots)} and {len(self.segs)} were selected"
            )

    @property
    def count(self) -> int:
        """Pieces."""
        return len(self.slots) * len(self.segs)

    @property
    def n_bytes(self) -> int:
        return self.count * self.segment_bytes

    def table(self) -> I64s:
        """What the kernel reads, (2 * n_blocks + 2 * n_segments,): slots, offsets of pages, offsets of segments in a
        slot, bases of layers."""
        pages = self.tensors.block_index * self.tensors.block_stride
        return np.concatenate([self.slots, pages, self.segs * self.segment_bytes, self.tensors.seg_base])

    def alignment(self) -> int:
        """The largest power of two up to 16 that divides every address and size, in bytes."""
        every = int(np.bitwise_or.reduce(self.table())) | self.segment_bytes | 16
        return every & -every

    def runs(self) -> I64s:
        """Pieces joined where they follow one another on both sides, (n_runs, 3): slot and page address, bytes.

        Never across slots: two slots may lie in memory that was registered in two calls.
        """
        near = self.slots[:, None] + self.segs * self.segment_bytes
        far = (self.tensors.block_index * self.tensors.block_stride)[:, None] + self.tensors.seg_base
        starts = np.ones(near.shape, np.bool_)
        starts[:, 1:] = (np.diff(near) != self.segment_bytes) | (np.diff(far) != self.segment_bytes)
        first = np.flatnonzero(starts.ravel())
        sizes = np.diff(np.append(first, self.count)) * self.segment_bytes
        return np.stack([near.ravel()[first], far.ravel()[first], sizes], axis=1)
