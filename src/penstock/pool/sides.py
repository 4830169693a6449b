"""The two sides of a move: the pool's slots and an engine's tensors, as numbers for the kernels' helpers.

The words are explained in `copies.py`; `pages.py` walks over what is described here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.jit import inline_kernel
from penstock.pool.checksum import PAGE_BYTES
from penstock.pool.vector import STRIPE, load_i64

__all__ = [
    "NOWHERE",
    "ORDINARY",
    "STREAMING",
    "Blocks",
    "Engine",
    "address_of",
    "blocks_of",
    "engine_address",
    "engine_of",
    "slot_address",
    "store_kind",
]

I64s = NDArray[np.int64]

# How a page's bytes are stored: not at all, through the cache, past it.
NOWHERE, ORDINARY, STREAMING = 0, 1, 2


class Blocks(NamedTuple):
    """The pool's side of one call, and how its segments are cut.

    Arrays are addresses here: numba counts references to every array that is passed from helper to helper,
    which took a quarter of the speed.
    """

    n_blocks: int
    payload_addrs: int
    n_segs: int
    segs: int
    segment_bytes: int
    n_pages: int
    last_bytes: int


class Engine(NamedTuple):
    """The engine's side. `grain`: the most bytes a lane may move at once without crossing a run's end."""

    seg_base: int
    block_index: int
    block_stride: int
    run_bytes: int
    run_gap: int
    grain: int


@inline_kernel
def address_of(array: NDArray[Any]) -> int:
    return np.int64(array.ctypes.data)  # type: ignore[return-value]  # an int64 in numba


@inline_kernel
def slot_address(blocks: Blocks, i: int, j: int) -> int:
    return load_i64(blocks.payload_addrs + 8 * i) + load_i64(blocks.segs + 8 * j) * blocks.segment_bytes


@inline_kernel
def engine_address(engine: Engine, i: int, j: int) -> int:
    return load_i64(engine.seg_base + 8 * j) + load_i64(engine.block_index + 8 * i) * engine.block_stride


@inline_kernel
def blocks_of(n_blocks: int, payload_addrs: I64s, segs: I64s, segment_bytes: int) -> Blocks:
    n_pages = max(1, segment_bytes // PAGE_BYTES)
    last_bytes = segment_bytes - (n_pages - 1) * PAGE_BYTES
    return Blocks(
        n_blocks,
        address_of(payload_addrs),
        segs.shape[0],
        address_of(segs),
        segment_bytes,
        n_pages,
        last_bytes,
    )


@inline_kernel
def engine_of(
    seg_base: I64s,
    block_index: I64s,
    block_stride: int,
    runs: int,
    run_stride: int,
    segment_bytes: int,
    most: int,
) -> Engine:
    run_bytes, gap, grain = segment_bytes, 0, most
    if runs > 1:
        run_bytes = segment_bytes // runs
        gap = run_stride - run_bytes
        if gap:
            # The largest power of two that divides the run.
            grain = min(most, run_bytes & -run_bytes)
    return Engine(address_of(seg_base), address_of(block_index), block_stride, run_bytes, gap, grain)


@inline_kernel
def store_kind(engine: Engine, n_segs: int, streaming: bool) -> int:
    """How to store into the engine: past the cache only if every piece starts at a multiple of 64."""
    low = engine.block_stride | engine.run_gap
    for j in range(n_segs):
        low |= load_i64(engine.seg_base + 8 * j)
    return STREAMING if streaming and low % STRIPE == 0 else ORDINARY
