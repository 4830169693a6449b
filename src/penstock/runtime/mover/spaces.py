"""The pool's memory as tiers want it: spaces by content, payloads as buffers over the segment."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from penstock.pool.handles import PlacedSpace
from penstock.tiers.base import BlockSpace

__all__ = ["as_tiers_know_it", "buffers"]


def as_tiers_know_it(space: PlacedSpace) -> BlockSpace:
    """The same space without its numbers in this pool."""
    return BlockSpace(
        space.digest, space.root, space.block_bytes, space.block_tokens, space.n_segments, space.segment_bytes,
        space.label,
    )  # fmt: skip


def buffers(addresses: npt.NDArray[np.int64], size_bytes: int, *, read_only: bool) -> list[memoryview]:
    """The `size_bytes` bytes at each address. The caller keeps what is there mapped, and leased or reserved."""
    kind = ctypes.c_ubyte * size_bytes
    views = [memoryview(kind.from_address(int(address))).cast("B") for address in addresses]
    return [view.toreadonly() for view in views] if read_only else views
