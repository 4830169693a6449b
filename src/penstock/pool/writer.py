"""The write path's two rings: grants come in, commits and aborts go out. Single producer, single consumer each."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import kernel
from penstock.pool.atomics import fence_full, load, load_acquire, store, store_fence_nt, store_release
from penstock.pool.context import (
    X_COMMIT_HEAD,
    X_COMMITS,
    X_GRANT_TAIL,
    X_GRANTS,
    X_HEADER,
    X_LANE,
    X_LAST_RUNG,
    X_RING_MASK,
)
from penstock.pool.layout import (
    COMMIT_BYTES,
    GRANT_BYTES,
    H_SLEEPING,
    L_COMMIT_HEAD,
    L_COMMIT_TAIL,
    L_GRANT_HEAD,
    L_GRANT_TAIL,
    L_WAITING,
    L_WANT,
)

# `publish` returns this bit when the keeper sleeps and must be rung.
RING_BIT = 1 << 32


@kernel("int64(int64, int64[:, ::1])")
def take_grants(ctx: int, out: npt.NDArray[np.int64]) -> int:
    """Move what the keeper granted into `out` (rows of unit, class, generation). Returns how many."""
    lane, mask, grants = load(ctx + X_LANE), load(ctx + X_RING_MASK), load(ctx + X_GRANTS)
    tail = load(ctx + X_GRANT_TAIL)
    n = min(load_acquire(lane + L_GRANT_HEAD) - tail, len(out))
    for i in range(n):
        entry = grants + ((tail + i) & mask) * GRANT_BYTES
        word = load(entry)
        out[i, 0] = word & 0xFFFFFFFF
        out[i, 1] = word >> 32
        out[i, 2] = load(entry + 8)
    store(ctx + X_GRANT_TAIL, tail + n)
    store_release(lane + L_GRANT_TAIL, tail + n)
    return n


@kernel("int64(int64)")
def must_ring(ctx: int) -> int:
    """After a publication: fence, then 1 if the keeper sleeps and this client has not rung for this sleep yet."""
    fence_full()
    sleep = load(load(ctx + X_HEADER) + H_SLEEPING)
    if sleep == 0 or sleep == load(ctx + X_LAST_RUNG):
        return 0
    store(ctx + X_LAST_RUNG, sleep)
    return 1


@kernel("int64(int64, int64, int64)")
def publish(ctx: int, rows: int, n: int) -> int:
    """Put up to n entries (at address `rows`, in the ring's own layout) into the commit ring.

    Returns how many found room, | RING_BIT if the keeper must be rung.
    """
    lane, mask, ring = load(ctx + X_LANE), load(ctx + X_RING_MASK), load(ctx + X_COMMITS)
    head = load(ctx + X_COMMIT_HEAD)
    n = min(n, mask + 1 - (head - load_acquire(lane + L_COMMIT_TAIL)))
    for i in range(n):
        entry = ring + ((head + i) & mask) * COMMIT_BYTES
        for word in range(0, COMMIT_BYTES, 8):
            store(entry + word, load(rows + i * COMMIT_BYTES + word))
    store_fence_nt()
    store(ctx + X_COMMIT_HEAD, head + n)
    store_release(lane + L_COMMIT_HEAD, head + n)
    fence_full()
    sleep = load(load(ctx + X_HEADER) + H_SLEEPING)
    if n > 0 and sleep != 0 and sleep != load(ctx + X_LAST_RUNG):
        store(ctx + X_LAST_RUNG, sleep)
        return n | RING_BIT
    return n


@kernel("void(int64, int64, int64)")
def want(ctx: int, slot_class: int, n: int) -> None:
    """State how many unused grants of a class this client would like to hold."""
    store_release(load(ctx + X_LANE) + L_WANT + 8 * slot_class, n)


@kernel("int64(int64, int64)")
def set_waiting(ctx: int, flag: int) -> int:
    """Announce (1) or end (0) a wait for the keeper, fence, and return how many grants are there now."""
    lane = load(ctx + X_LANE)
    store_release(lane + L_WAITING, flag)
    fence_full()
    return load_acquire(lane + L_GRANT_HEAD) - load(ctx + X_GRANT_TAIL)


@kernel("int64(int64)")
def unapplied(ctx: int) -> int:
    """How many published entries the keeper has not applied yet."""
    return load(ctx + X_COMMIT_HEAD) - load_acquire(load(ctx + X_LANE) + L_COMMIT_TAIL)
