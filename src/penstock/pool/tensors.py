"""Where an engine keeps its KV: addresses and strides, so that the pool needs to know no tensor library."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError

__all__ = ["TensorMap"]


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Run r of segment j of the i-th block lies at seg_base[j] + block_index[i] * block_stride + r * run_stride.

    A run has segment_bytes / runs bytes. Paged tensors: one run, block_index = page numbers. A contiguous
    [heads, tokens, dim] cache: runs = heads, run_stride = token capacity * dim * itemsize, block_stride =
    block_tokens * dim * itemsize, block_index = 0, 1, 2, ... All strides are bytes; the addresses must stay valid while
    a call that takes the map runs, which `keep_alive` is there for.
    """

    seg_base: npt.NDArray[np.int64]
    """(n_segments or as many as are selected,) addresses."""
    block_index: npt.NDArray[np.int64]
    """(n_blocks,)"""
    block_stride: int
    runs: int = 1
    run_stride: int = 0
    keep_alive: object = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("seg_base", "block_index"):
            array = getattr(self, name)
            if array.dtype != np.int64 or array.ndim != 1 or not array.flags.c_contiguous:
                raise ConfigError(f"TensorMap.{name} must be a contiguous one-dimensional int64 array")
        if self.runs < 1 or (self.runs > 1 and self.run_stride < 1):
            raise ConfigError(f"TensorMap with {self.runs} runs, {self.run_stride} bytes apart")

    def blocks(self, which: slice) -> TensorMap:
        """The same tensors with a part of the blocks."""
        part = np.ascontiguousarray(self.block_index[which])
        return TensorMap(self.seg_base, part, self.block_stride, self.runs, self.run_stride, self.keep_alive)
