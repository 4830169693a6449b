"""The walk of the movement kernels: the selected segments as a stream of pages, eight on their way at once.

Covers the order of pages, where each lies on both sides, runs, and how hashed pages join into checksums. The
kernels that are called from Python, and the words used here, are in `copies.py`; the loops over bytes are in
`vector.py`.

Pages that are next to each other in the stream share a group of eight, whether they belong to one segment or
to several blocks. A group keeps step up to its shortest page; what is left of longer ones, and a last group
that is not full, goes one lane at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from penstock.jit import inline_kernel
from penstock.pool.checksum import (
    LAST_STRIPE_SECRET,
    PAGE_BYTES,
    XXH3_BLOCK_BYTES,
    absorb,
    begin_page,
    block_state,
    end_page,
    end_xxh3_block,
    secret_address,
)
from penstock.pool.sides import NOWHERE, ORDINARY, STREAMING, Blocks, Engine, slot_address
from penstock.pool.vector import (
    LANES,
    NO_LIMIT,
    STRIPE,
    accumulate_1,
    accumulate_8,
    copy_1,
    copy_8,
    copy_bytes,
    hash_copy_1,
    hash_copy_8,
    hash_stream_1,
    hash_stream_8,
    load_i64,
    load_plain_u64,
    stack_words,
    store_byte,
    store_i64,
    store_plain_u64,
    stream_1,
    stream_8,
)

__all__ = ["Sums", "Way", "copy_runs", "start_of_block", "walk_hashed", "walk_plain"]

# The lanes' table on the stack, as byte offsets. Per lane a word each: the page's address in its slot; what
# to add to a position in the page to get its address in the engine's current run; the position where that run
# ends; the page's length. Then eight 8-byte accumulators per lane. Then the running checksum of the segment
# whose pages are being retired, and what its block's checksums start from.
_ENGINE, _RUN_END, _LENGTH, _STATE = 64, 128, 192, 256
_RUNNING = _STATE + LANES * STRIPE
_BLOCK = _RUNNING + 8
_TABLE_WORDS = (_BLOCK + 8) // 8


class Way(NamedTuple):
    """What to do with a page: how to store it, and in which direction."""

    store: int
    to_engine: bool


class Sums(NamedTuple):
    """Where checksums come from or go to, and whether they are written there or compared."""

    writing: bool
    n_segments: int
    table_addrs: int
    keys: int
    bad: int


@inline_kernel
def _plain_turns(lanes: int, store: int, table: int, begin: int, n_stripes: int) -> None:
    if lanes == LANES:
        if store == STREAMING:
            stream_8(table, table + _ENGINE, begin, n_stripes)
        else:
            copy_8(table, table + _ENGINE, begin, n_stripes)
    elif store == STREAMING:
        stream_1(table, table + _ENGINE, begin, n_stripes)
    else:
        copy_1(table, table + _ENGINE, begin, n_stripes)


@inline_kernel
def _hashed_turns(
    lanes: int, way: Way, table: int, begin: int, n_stripes: int, limit: int, state: int, secret: int
) -> None:
    sources, targets = (table, table + _ENGINE) if way.to_engine else (table + _ENGINE, table)
    if lanes == LANES:
        if way.store == STREAMING:
            hash_stream_8(sources, targets, begin, n_stripes, limit, state, secret)
        elif way.store == ORDINARY:
            hash_copy_8(sources, targets, begin, n_stripes, limit, state, secret)
        else:
            accumulate_8(table, table, begin, n_stripes, limit, state, secret)
    elif way.store == STREAMING:
        hash_stream_1(sources, targets, begin, n_stripes, limit, state, secret)
    elif way.store == ORDINARY:
        hash_copy_1(sources, targets, begin, n_stripes, limit, state, secret)
    else:
        accumulate_1(table, table, begin, n_stripes, limit, state, secret)


@inline_kernel
def _cross_runs(table: int, lanes: int, position: int, engine: Engine) -> None:
    """Lanes whose run ends at `position` of their page go on in the next run."""
    for lane in range(lanes):
        at = table + 8 * lane
        if load_i64(at + _RUN_END) == position:
            store_i64(at + _RUN_END, position + engine.run_bytes)
            store_i64(at + _ENGINE, load_i64(at + _ENGINE) + engine.run_gap)


@inline_kernel
def _place(table: int, lane: int, blocks: Blocks, engine: Engine, i: int, j: int, page: int, store: int) -> None:
    """Put page `page` of segment segs[j] of block `i` into a lane."""
    offset = page * PAGE_BYTES
    slot = slot_address(blocks, i, j)
    at = table + 8 * lane
    store_i64(at, slot + offset)
    store_i64(at + _LENGTH, blocks.last_bytes if page == blocks.n_pages - 1 else PAGE_BYTES)
    if store == NOWHERE:
        return
    far = load_i64(engine.seg_base + 8 * j) + load_i64(engine.block_index + 8 * i) * engine.block_stride + offset
    if engine.run_gap:
        run = offset // engine.run_bytes
        far += run * engine.run_gap
        store_i64(at + _RUN_END, (run + 1) * engine.run_bytes - offset)
    store_i64(at + _ENGINE, far)


@inline_kernel
def _shortest(table: int) -> int:
    shortest = load_i64(table + _LENGTH)
    for lane in range(1, LANES):
        shortest = min(shortest, load_i64(table + _LENGTH + 8 * lane))
    return shortest


@inline_kernel
def _longest(table: int) -> int:
    longest = load_i64(table + _LENGTH)
    for lane in range(1, LANES):
        longest = max(longest, load_i64(table + _LENGTH + 8 * lane))
    return longest


@inline_kernel
def _plain_range(table: int, lanes: int, begin: int, end: int, engine: Engine, store: int) -> None:
    """Copy bytes `begin` to `end` of the pages of `lanes` lanes, from the slot to the engine."""
    while begin < end:
        n_bytes = min(engine.grain - (begin & (engine.grain - 1)), end - begin)
        _plain_turns(lanes, store, table, begin, n_bytes // STRIPE)
        begin += n_bytes
        if engine.run_gap:
            _cross_runs(table, lanes, begin, engine)


@inline_kernel
def _plain_pages(table: int, lanes: int, engine: Engine, store: int) -> None:
    """Copy the pages of `lanes` lanes; eight keep step as far as the shortest goes."""
    done = 0
    if lanes == LANES:
        done = _shortest(table)
        _plain_range(table, LANES, 0, done, engine, store)
    for lane in range(lanes):
        _plain_range(table + 8 * lane, 1, done, load_i64(table + _LENGTH + 8 * lane), engine, store)


@inline_kernel
def walk_plain(blocks: Blocks, engine: Engine, store: int) -> None:
    """Copy the selected segments to the engine."""
    table = stack_words(_TABLE_WORDS)
    lane = 0
    for i in range(blocks.n_blocks):
        for j in range(blocks.n_segs):
            for page in range(blocks.n_pages):
                _place(table, lane, blocks, engine, i, j, page, store)
                lane += 1
                if lane == LANES:
                    _plain_pages(table, lane, engine, store)
                    lane = 0
    _plain_pages(table, lane, engine, store)


@inline_kernel
def _source_limit(table: int, page_end: int, engine: Engine, way: Way) -> int:
    """Up to where asking ahead pays. Behind a page or run comes more to read, but for an engine's small runs."""
    if way.to_engine or engine.run_bytes >= PAGE_BYTES:
        return NO_LIMIT
    return load_i64(table + _RUN_END) if engine.run_gap else page_end


@inline_kernel
def _hashed_range(
    table: int, state: int, lanes: int, begin: int, end: int, engine: Engine, way: Way, secret: int
) -> None:
    """Hash (and move) bytes `begin` to `end` of `lanes` pages; a page's last stripe is not among them."""
    while begin < end:
        n_bytes = min(engine.grain - (begin & (engine.grain - 1)), end - begin)
        within = begin & (XXH3_BLOCK_BYTES - 1)
        limit = _source_limit(table, end + STRIPE, engine, way)
        _hashed_turns(lanes, way, table, begin, n_bytes // STRIPE, limit, state, secret + within // 8)
        begin += n_bytes
        if engine.run_gap:
            _cross_runs(table, lanes, begin, engine)
        if begin & (XXH3_BLOCK_BYTES - 1) == 0:
            for lane in range(lanes):
                end_xxh3_block(state + STRIPE * lane, secret)


@inline_kernel
def _hashed_pages(table: int, lanes: int, engine: Engine, way: Way, secret: int) -> None:
    """Hash (and move) the pages of `lanes` lanes; eight keep step up to the shortest's last stripe."""
    state = table + _STATE
    for lane in range(lanes):
        begin_page(state + STRIPE * lane)
    done = 0
    if lanes == LANES:
        done = _shortest(table) - STRIPE
        _hashed_range(table, state, LANES, 0, done, engine, way, secret)
        if done + STRIPE == _longest(table):
            _hashed_turns(LANES, way, table, done, 1, NO_LIMIT, state, secret + LAST_STRIPE_SECRET)
            return
    for lane in range(lanes):
        at, own = table + 8 * lane, state + STRIPE * lane
        last = load_i64(at + _LENGTH) - STRIPE
        _hashed_range(at, own, 1, done, last, engine, way, secret)
        _hashed_turns(1, way, at, last, 1, NO_LIMIT, own, secret + LAST_STRIPE_SECRET)


@inline_kernel
def start_of_block(blocks: Blocks, sums: Sums, i: int) -> np.uint64:
    key = sums.keys + 16 * i
    return block_state(blocks.segment_bytes, sums.n_segments, load_plain_u64(key), load_plain_u64(key + 8))


@inline_kernel
def _retire(table: int, lane: int, blocks: Blocks, sums: Sums, number: int, secret: int) -> None:
    """Take a hashed page into its segment's checksum; at the segment's end write or compare it.

    Pages are retired in order, so one running checksum (and its block's start) is enough.
    """
    segment, page = divmod(number, blocks.n_pages)
    i, j = divmod(segment, blocks.n_segs)
    seg = load_i64(blocks.segs + 8 * j)
    if page == 0:
        if j == 0:
            store_plain_u64(table + _BLOCK, start_of_block(blocks, sums, i))
        store_plain_u64(table + _RUNNING, absorb(load_plain_u64(table + _BLOCK), np.uint64(seg + 1)))
    digest = end_page(table + _STATE + STRIPE * lane, secret, load_i64(table + _LENGTH + 8 * lane))
    checksum = absorb(load_plain_u64(table + _RUNNING), digest)
    store_plain_u64(table + _RUNNING, checksum)
    if page == blocks.n_pages - 1:
        at = load_i64(sums.table_addrs + 8 * i) + 8 * seg
        if sums.writing:
            store_plain_u64(at, checksum)
        elif load_plain_u64(at) != checksum:
            store_byte(sums.bad + i, 1)


@inline_kernel
def _hash_lanes(
    table: int, lanes: int, first: int, blocks: Blocks, engine: Engine, way: Way, sums: Sums, secret: int
) -> None:
    """Hash (and move) what is in the lanes, of which the first is page number `first` of the call."""
    _hashed_pages(table, lanes, engine, way, secret)
    for lane in range(lanes):
        _retire(table, lane, blocks, sums, first + lane, secret)


@inline_kernel
def walk_hashed(blocks: Blocks, engine: Engine, way: Way, sums: Sums) -> None:
    """Hash (and move) the selected segments; write their checksums, or set bad[i] where one differs."""
    secret = secret_address()
    table = stack_words(_TABLE_WORDS)
    lane = done = 0
    for i in range(blocks.n_blocks):
        for j in range(blocks.n_segs):
            for page in range(blocks.n_pages):
                _place(table, lane, blocks, engine, i, j, page, way.store)
                lane += 1
                if lane == LANES:
                    _hash_lanes(table, lane, done, blocks, engine, way, sums, secret)
                    done += lane
                    lane = 0
    _hash_lanes(table, lane, done, blocks, engine, way, sums, secret)


@inline_kernel
def copy_runs(blocks: Blocks, engine: Engine, to_engine: bool) -> None:
    """Run by run, for runs that are no whole number of stripes: right, and slow."""
    for i in range(blocks.n_blocks):
        for j in range(blocks.n_segs):
            near = load_i64(blocks.payload_addrs + 8 * i) + load_i64(blocks.segs + 8 * j) * blocks.segment_bytes
            far = load_i64(engine.seg_base + 8 * j) + load_i64(engine.block_index + 8 * i) * engine.block_stride
            for at in range(0, blocks.segment_bytes, engine.run_bytes):
                if to_engine:
                    copy_bytes(far, near + at, engine.run_bytes)
                else:
                    copy_bytes(near + at, far, engine.run_bytes)
                far += engine.run_bytes + engine.run_gap
