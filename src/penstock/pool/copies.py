"""Moving blocks between slots and an engine's tensors, with the checksum fused into the copy.

Covers `gather` and `gather_verified` (slots to an engine), `scatter` (an engine to slots), `verify` and
`seal` (no copy). Does not cover which slots may be touched (leases and grants do), what the checksum is
(`checksum.py`), or bounds: nothing here checks an address, callers do.

Words of the arguments, the same in every kernel:

    payload_addrs[i]   address of block i's slot, a multiple of 64; segment s lies at + s * segment_bytes
    segs[j]            the segments (layers) to move, any subset in any order seg_base[j]        where segment
    segs[j] of an engine's block 0 lies in the engine's memory, any alignment block_index[i]     which of the
    engine's blocks block i is, at seg_base[j] + block_index[i] * block_stride runs, run_stride   an engine's
    segment is `runs` pieces of segment_bytes / runs bytes, run_stride apart: one
                       for paged tensors, one per head for contiguous [heads, tokens, dim] caches
    segment_bytes      a multiple of 64, at least 256
    streaming          write past the cache: right unless the destination is small and read again at once
    table_addrs[i]     address of block i's n_segments checksums; a multiple of 8
    keys[i], roots[i]  block i's key as two little-endian words, and the root over its table

All strides and sizes are in bytes. Addresses are int64. All kernels release the GIL and end with the fence
that orders their stores before a publication that follows.

The loops are in `pages.py`. All that checksums is one compiled kernel: each more would cost seconds to
compile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.jit import kernel
from penstock.pool.atomics import store_fence_nt
from penstock.pool.checksum import PAGE_BYTES, XXH3_BLOCK_BYTES, table_root
from penstock.pool.pages import Sums, Way, copy_runs, start_of_block, walk_hashed, walk_plain
from penstock.pool.sides import NOWHERE, STREAMING, address_of, blocks_of, engine_of, store_kind
from penstock.pool.vector import STRIPE

__all__ = ["gather", "gather_verified", "scatter", "seal", "verify"]

I64s = NDArray[np.int64]
U64s = NDArray[np.uint64]

_VERIFY, _GATHER, _SEAL, _SCATTER = range(4)
# For `verify` and `seal`, which have no engine's side.
_NONE = np.zeros(1, dtype=np.int64)
_NO_BAD = np.zeros(1, dtype=np.uint8)

# n_blocks, payload_addrs, segs, seg_base, block_index, block_stride, runs, run_stride, segment_bytes
_MOVE = "int64, int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, int64, int64"
# n_segments, table_addrs, keys, roots, bad
_SUMS = "int64, int64[::1], uint64[:, ::1], uint64[::1], uint8[::1]"


@kernel(f"void({_MOVE}, boolean)")
def gather(
    n_blocks: int,
    payload_addrs: I64s,
    segs: I64s,
    seg_base: I64s,
    block_index: I64s,
    block_stride: int,
    runs: int,
    run_stride: int,
    segment_bytes: int,
    streaming: bool,
) -> None:
    """Copy the selected segments of `n_blocks` blocks from their slots to the engine, unverified."""
    blocks = blocks_of(n_blocks, payload_addrs, segs, segment_bytes)
    engine = engine_of(seg_base, block_index, block_stride, runs, run_stride, segment_bytes, PAGE_BYTES)
    if engine.grain < STRIPE:
        copy_runs(blocks, engine, True)
    else:
        walk_plain(blocks, engine, store_kind(engine, segs.shape[0], streaming))
    store_fence_nt()


@kernel(f"int64(int64, {_MOVE}, {_SUMS}, boolean)")
def _checked(
    task: int,
    n_blocks: int,
    payload_addrs: I64s,
    segs: I64s,
    seg_base: I64s,
    block_index: I64s,
    block_stride: int,
    runs: int,
    run_stride: int,
    segment_bytes: int,
    n_segments: int,
    table_addrs: I64s,
    keys: U64s,
    roots: U64s,
    bad: NDArray[np.uint8],
    streaming: bool,
) -> int:
    """All that computes checksums. Returns how many blocks are bad; writing tasks leave `bad` alone."""
    writing = task >= _SEAL
    blocks = blocks_of(n_blocks, payload_addrs, segs, segment_bytes)
    engine = engine_of(seg_base, block_index, block_stride, runs, run_stride, segment_bytes, XXH3_BLOCK_BYTES)
    sums = Sums(writing, n_segments, address_of(table_addrs), address_of(keys), address_of(bad))
    if not writing:
        for i in range(n_blocks):
            root = table_root(start_of_block(blocks, sums, i), table_addrs[i], n_segments)
            bad[i] = np.uint8(root != roots[i])
    store = NOWHERE
    if task == _GATHER:
        store = store_kind(engine, segs.shape[0], streaming)
    elif task == _SCATTER:
        store = STREAMING
    if store != NOWHERE and engine.grain < STRIPE:
        copy_runs(blocks, engine, task == _GATHER)
        store = NOWHERE
        engine = engine_of(seg_base, block_index, 0, 1, 0, segment_bytes, XXH3_BLOCK_BYTES)
    walk_hashed(blocks, engine, Way(store, task == _GATHER), sums)
    n_bad = 0
    for i in range(n_blocks):
        if writing:
            roots[i] = table_root(start_of_block(blocks, sums, i), table_addrs[i], n_segments)
        else:
            n_bad += bad[i]
    store_fence_nt()
    return n_bad


def gather_verified(
    n_blocks: int,
    payload_addrs: I64s,
    segs: I64s,
    seg_base: I64s,
    block_index: I64s,
    block_stride: int,
    runs: int,
    run_stride: int,
    segment_bytes: int,
    n_segments: int,
    table_addrs: I64s,
    keys: U64s,
    roots: U64s,
    bad: NDArray[np.uint8],
    streaming: bool,
) -> int:
    """`gather`, and check each block's table against its root and each copied segment against the table.

    Sets bad[i] to 1 where a check fails and to 0 where none does; returns how many failed. The bytes of a bad
    block have reached the engine by then: the caller discards them.
    """
    return _checked(
        _GATHER,
        n_blocks,
        payload_addrs,
        segs,
        seg_base,
        block_index,
        block_stride,
        runs,
        run_stride,
        segment_bytes,
        n_segments,
        table_addrs,
        keys,
        roots,
        bad,
        streaming,
    )


def verify(
    n_blocks: int,
    payload_addrs: I64s,
    segs: I64s,
    segment_bytes: int,
    n_segments: int,
    table_addrs: I64s,
    keys: U64s,
    roots: U64s,
    bad: NDArray[np.uint8],
) -> int:
    """The checks of `gather_verified` without the copy; with no segments only each table against its root."""
    return _checked(
        _VERIFY,
        n_blocks,
        payload_addrs,
        segs,
        _NONE,
        _NONE,
        0,
        1,
        0,
        segment_bytes,
        n_segments,
        table_addrs,
        keys,
        roots,
        bad,
        False,
    )


def scatter(
    n_blocks: int,
    payload_addrs: I64s,
    segs: I64s,
    seg_base: I64s,
    block_index: I64s,
    block_stride: int,
    runs: int,
    run_stride: int,
    segment_bytes: int,
    n_segments: int,
    table_addrs: I64s,
    keys: U64s,
    roots: U64s,
) -> None:
    """Copy the selected segments from the engine into the slots, and write their checksums and the roots.

    The slots are written past the cache. A block may be filled by several calls, a few layers each: roots[i]
    holds once every segment's checksum has been written.
    """
    _checked(
        _SCATTER,
        n_blocks,
        payload_addrs,
        segs,
        seg_base,
        block_index,
        block_stride,
        runs,
        run_stride,
        segment_bytes,
        n_segments,
        table_addrs,
        keys,
        roots,
        _NO_BAD,
        True,
    )


def seal(
    n_blocks: int,
    payload_addrs: I64s,
    segs: I64s,
    segment_bytes: int,
    n_segments: int,
    table_addrs: I64s,
    keys: U64s,
    roots: U64s,
) -> None:
    """Write the selected segments' checksums and the roots for slots that were filled in place."""
    _checked(
        _SEAL,
        n_blocks,
        payload_addrs,
        segs,
        _NONE,
        _NONE,
        0,
        1,
        0,
        segment_bytes,
        n_segments,
        table_addrs,
        keys,
        roots,
        _NO_BAD,
        False,
    )
