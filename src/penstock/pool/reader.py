"""The read path: match a chain, lease what is there, release it. No system call, no message.

The order is that of hazard pointers (Michael, PODC 2002): publish the lease, fence fully, look again. The keeper marks
a slot as leaving, fences fully, and scans the lanes; so either it sees the lease, or the reader sees the mark.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import inline_kernel, kernel
from penstock.pool.atomics import fence_full, load, load_acquire, prefetch, store, store_release
from penstock.pool.context import (
    K_HITS,
    K_HITS_UNREPORTED,
    K_KEYS,
    K_LOOKUPS,
    K_MISS,
    K_RETRIES,
    X_DIRECTORY,
    X_FREE,
    X_GENERATIONS,
    X_HIT_HEAD,
    X_HITS,
    X_HWM,
    X_LANE,
    X_LEASES,
    X_MASK,
    X_N_FREE,
    X_N_UNITS,
    X_NEXT,
    X_RECORDS,
    X_RING_MASK,
    X_UNITS,
)
from penstock.pool.layout import (
    BUCKET_BYTES,
    HIT_BYTES,
    L_COUNTERS,
    L_HIT_HEAD,
    L_HIT_TAIL,
    L_LEASE_HWM,
    R_GENERATION,
    R_KEY,
    R_LENGTH,
    R_STATE,
    RECORD_BYTES,
)
from penstock.pool.lookup import LEAVING, LOW32, READY, find, first_candidate, ready_generation
from penstock.types import Miss

# Keys looked up together: their cache misses overlap, and one fence serves them all.
CHUNK = 64
# Rounds of looking up a block that left while it was being leased, before it counts as a miss.
MAX_ROUNDS = 4

# A match's result in one integer: head cell | count << 24 | reason << 48.
HEAD_BITS = 24
COUNT_BITS = 24
HEAD_MASK = (1 << HEAD_BITS) - 1
COUNT_MASK = (1 << COUNT_BITS) - 1

_ABSENT = int(Miss.ABSENT)
_BUSY = int(Miss.BUSY)
_FULL = int(Miss.LEASE_TABLE_FULL)
_SPACE = int(Miss.SPACE)
_CHANGED = int(Miss.CHANGED)


@inline_kernel
def bump(lane: int, counter: int, by: int) -> None:
    """Add to one of the lane's counters; the lane has one writer."""
    cell = lane + L_COUNTERS + 8 * counter
    store(cell, load(cell) + by)


@inline_kernel
def _look_up(ctx: int, keys: int, n: int, shape: int, cell: int) -> int:
    """Find up to n keys from `cell` on, into the private twins of free cells. Returns found | reason << 48."""
    directory, mask, records = load(ctx + X_DIRECTORY), load(ctx + X_MASK), load(ctx + X_RECORDS)
    n_units, following = load(ctx + X_N_UNITS), load(ctx + X_NEXT)
    units, generations = load(ctx + X_UNITS), load(ctx + X_GENERATIONS)
    for i in range(n):
        prefetch(directory + (load(keys + 16 * i) & mask) * BUCKET_BYTES)
    at = cell
    for i in range(n):
        unit = first_candidate(directory, mask, load(keys + 16 * i), load(keys + 16 * i + 8))
        if unit >= n_units:
            unit = -1
        store(units + 8 * at, unit)
        if unit >= 0:
            prefetch(records + unit * RECORD_BYTES)
        at = load(following + 8 * at)
    at = cell
    for i in range(n):
        lo, hi = load(keys + 16 * i), load(keys + 16 * i + 8)
        unit = load(units + 8 * at)
        if unit < 0:
            return i | _ABSENT << 48
        generation = ready_generation(records + unit * RECORD_BYTES, lo, hi)
        if generation == 0:
            held = records + unit * RECORD_BYTES
            leaving = (
                load(held + R_STATE) & 0xFF == LEAVING and load(held + R_KEY) == lo and load(held + R_KEY + 8) == hi
            )
            unit = find(directory, mask, records, n_units, lo, hi)
            if unit < 0:
                return i | (_BUSY if leaving else _ABSENT) << 48
            generation = ready_generation(records + unit * RECORD_BYTES, lo, hi)
            if generation == 0:
                return i | _BUSY << 48
        record = records + unit * RECORD_BYTES
        if (load(record + R_STATE) >> 32) & LOW32 != shape & LOW32 or load(record + R_LENGTH) != shape >> 32:
            return i | _SPACE << 48
        store(units + 8 * at, unit)
        store(generations + 8 * at, generation)
        at = load(following + 8 * at)
    return n


@inline_kernel
def _publish(ctx: int, cell: int, n: int) -> int:
    """Write n lease cells, raise the mark up to which the keeper scans, fence. Returns the cell after the last."""
    leases, units, following = load(ctx + X_LEASES), load(ctx + X_UNITS), load(ctx + X_NEXT)
    hwm = load(ctx + X_HWM)
    top = hwm
    at = cell
    for _ in range(n):
        store(leases + 8 * at, load(units + 8 * at) + 1)
        top = max(top, at + 1)
        at = load(following + 8 * at)
    if top > hwm:
        store(ctx + X_HWM, top)
        store(load(ctx + X_LANE) + L_LEASE_HWM, top)
    fence_full()
    return at


@inline_kernel
def _validate(ctx: int, cell: int, n: int) -> int:
    """How many of n leased blocks, from the first, are still READY under the generation that was found.

    State before generation, the other way round than in the lookup: a READY of a later use is seen with its generation.
    """
    records, units = load(ctx + X_RECORDS), load(ctx + X_UNITS)
    generations, following = load(ctx + X_GENERATIONS), load(ctx + X_NEXT)
    at = cell
    for i in range(n):
        record = records + load(units + 8 * at) * RECORD_BYTES
        if load_acquire(record + R_STATE) & 0xFF != READY:
            return i
        if load_acquire(record + R_GENERATION) != load(generations + 8 * at):
            return i
        at = load(following + 8 * at)
    return n


@inline_kernel
def _clear(ctx: int, cell: int, n: int) -> int:
    """Zero n lease cells. Returns the last of them."""
    leases, following = load(ctx + X_LEASES), load(ctx + X_NEXT)
    at, last = cell, cell
    for _ in range(n):
        store_release(leases + 8 * at, 0)
        last = at
        at = load(following + 8 * at)
    return last


@inline_kernel
def _report_hits(ctx: int, cell: int, n: int) -> None:
    """Tell the keeper what was used, in a ring that drops when it is full: recency is worth no wait."""
    lane, mask = load(ctx + X_LANE), load(ctx + X_RING_MASK)
    head = load(ctx + X_HIT_HEAD)
    if head + n - load_acquire(lane + L_HIT_TAIL) > mask + 1:
        bump(lane, K_HITS_UNREPORTED, n)
        return
    hits, units = load(ctx + X_HITS), load(ctx + X_UNITS)
    generations, following = load(ctx + X_GENERATIONS), load(ctx + X_NEXT)
    at = cell
    for i in range(n):
        entry = load(units + 8 * at) | (load(generations + 8 * at) & LOW32) << 32
        store(hits + ((head + i) & mask) * HIT_BYTES, entry)
        at = load(following + 8 * at)
    store(ctx + X_HIT_HEAD, head + n)
    store_release(lane + L_HIT_HEAD, head + n)


@inline_kernel
def _take(ctx: int, cell: int, count: int) -> None:
    """Take the first `count` cells off the free list, whose next free cell is `cell`."""
    store(ctx + X_FREE, cell)
    store(ctx + X_N_FREE, load(ctx + X_N_FREE) - count)


@kernel("int64(int64, uint64[:, ::1], int64)")
def match(ctx: int, key_array: npt.NDArray[np.uint64], shape: int) -> int:
    """Lease the longest resident prefix of n keys, (n, 2) words.

    `shape` is space id | block bytes << 32. Returns head cell | count << 24 | miss reason << 48.
    """
    keys, n = key_array.ctypes.data, key_array.shape[0]
    lane = load(ctx + X_LANE)
    head = load(ctx + X_FREE)
    limit = min(n, load(ctx + X_N_FREE))
    cell, count, rounds = head, 0, 0
    reason = 0 if limit == n else _FULL
    while count < limit:
        wanted = min(CHUNK, limit - count)
        found = _look_up(ctx, keys + 16 * count, wanted, shape, cell)
        stop = found >> 48
        found = found & COUNT_MASK
        after = _publish(ctx, cell, found)
        valid = _validate(ctx, cell, found)
        if valid < found or stop == _BUSY:
            following = load(ctx + X_NEXT)
            for _ in range(valid):
                cell = load(following + 8 * cell)
            _clear(ctx, cell, found - valid)
            count += valid
            rounds += 1
            bump(lane, K_RETRIES, 1)
            if rounds == MAX_ROUNDS:
                reason = _BUSY
                break
            continue
        count += found
        cell = after
        if stop != 0:
            reason = stop
            break
    _report_hits(ctx, head, count)
    _take(ctx, cell, count)
    bump(lane, K_LOOKUPS, 1)
    bump(lane, K_KEYS, n)
    bump(lane, K_HITS, count)
    bump(lane, K_MISS + reason, 1 if reason != 0 else 0)
    return head | count << HEAD_BITS | reason << 48


@kernel("int64(int64, int64[:, ::1], uint64[:, ::1], int64)")
def adopt(ctx: int, handle_array: npt.NDArray[np.int64], key_array: npt.NDArray[np.uint64], shape: int) -> int:
    """Lease n blocks that another process holds, given as rows of (unit, generation) and of their keys.

    Stops at the first one that is no longer what the giver held. Returns the same as `match`.
    """
    handles, keys, n = handle_array.ctypes.data, key_array.ctypes.data, key_array.shape[0]
    lane, records, n_units = load(ctx + X_LANE), load(ctx + X_RECORDS), load(ctx + X_N_UNITS)
    units, generations, following = load(ctx + X_UNITS), load(ctx + X_GENERATIONS), load(ctx + X_NEXT)
    head = load(ctx + X_FREE)
    limit = min(n, load(ctx + X_N_FREE))
    reason = 0 if limit == n else _FULL
    at, found = head, 0
    while found < limit:
        unit, generation = load(handles + 16 * found), load(handles + 16 * found + 8)
        if unit < 0 or unit >= n_units:
            break
        record = records + unit * RECORD_BYTES
        current = ready_generation(record, load(keys + 16 * found), load(keys + 16 * found + 8))
        if current == 0 or current != generation:
            break
        if (load(record + R_STATE) >> 32) & LOW32 != shape & LOW32 or load(record + R_LENGTH) != shape >> 32:
            break
        store(units + 8 * at, unit)
        store(generations + 8 * at, generation)
        at = load(following + 8 * at)
        found += 1
    after = _publish(ctx, head, found)
    valid = _validate(ctx, head, found)
    if valid < found:
        after = head
        for _ in range(valid):
            after = load(following + 8 * after)
        _clear(ctx, after, found - valid)
    if valid < limit:
        reason = _CHANGED
    _take(ctx, after, valid)
    bump(lane, K_MISS + reason, 1 if reason != 0 else 0)
    return head | valid << HEAD_BITS | reason << 48


@kernel("void(int64, int64, int64)")
def release(ctx: int, head: int, count: int) -> None:
    """Give back `count` lease cells that start at `head`."""
    if count > 0:
        last = _clear(ctx, head, count)
        store(load(ctx + X_NEXT) + 8 * last, load(ctx + X_FREE))
        _take(ctx, head, -count)


@kernel("int64(int64, int64, int64)")
def skip(ctx: int, head: int, count: int) -> int:
    """The cell `count` places after `head` in a lease."""
    following = load(ctx + X_NEXT)
    for _ in range(count):
        head = load(following + 8 * head)
    return head


@kernel("int64(int64, int64, int64)")
def unchanged(ctx: int, head: int, count: int) -> int:
    """How many of a lease's blocks, from the first, still have the generation they were leased under.

    The state says nothing here: while the lease stands, the keeper may try to evict the block (LEAVING), finds the
    lease and lets it be. A slot's bytes change only after its generation did. The fence puts the copy before the look.
    """
    records, units = load(ctx + X_RECORDS), load(ctx + X_UNITS)
    generations, following = load(ctx + X_GENERATIONS), load(ctx + X_NEXT)
    fence_full()
    for i in range(count):
        if load(records + load(units + 8 * head) * RECORD_BYTES + R_GENERATION) != load(generations + 8 * head):
            return i
        head = load(following + 8 * head)
    return count
