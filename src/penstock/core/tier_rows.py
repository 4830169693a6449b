"""Rows of the tiering brain's tables and the lists through them: the inline kernels that `tier_steps.py` is made of.

Covers keys to rows and back to no row (ghosts, placeholders for parents), who is whose child, what is ready to be
written, and the order of use within a slot class. Does not decide anything. `t` is the tuple of `TierTable.all()`, `n`
a node, `k` a tier.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core import tier_table as at
from penstock.jit import inline_kernel
from penstock.policies.ring import put_behind, unlink

__all__ = [
    "adopt",
    "bit_of",
    "clear_flag",
    "consider",
    "consider_children",
    "enlist",
    "enter_order",
    "find",
    "has_flag",
    "is_reachable",
    "is_wanted",
    "leave_order",
    "node",
    "orphan",
    "set_flag",
    "settle",
    "unlist",
]

_MIX = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: keys are digests, but a test's or a foreign engine's need not be."""


@inline_kernel
def bit_of(k: Any) -> Any:
    return np.uint64(1) << np.uint64(k)


@inline_kernel
def has_flag(t: Any, n: Any, flag: Any) -> Any:
    return (np.int64(t[at.SLIM_][n, at.FLAGS]) & flag) != 0


@inline_kernel
def set_flag(t: Any, n: Any, flag: Any) -> None:
    t[at.SLIM_][n, at.FLAGS] = np.int64(t[at.SLIM_][n, at.FLAGS]) | flag


@inline_kernel
def clear_flag(t: Any, n: Any, flag: Any) -> None:
    t[at.SLIM_][n, at.FLAGS] = np.int64(t[at.SLIM_][n, at.FLAGS]) & ~flag


# Keys to nodes.


@inline_kernel
def home_of(t: Any, key0: Any, key1: Any) -> Any:
    mixed = (key0 ^ (key1 * _MIX)) * _MIX
    return np.int64(mixed >> np.uint64(20)) & (len(t[at.INDEX_]) - 1)


@inline_kernel
def find(t: Any, key0: Any, key1: Any) -> Any:
    """The node, or 0."""
    wide, index = t[at.WIDE_], t[at.INDEX_]
    spot = home_of(t, key0, key1)
    while index[spot] != 0:
        n = np.int64(index[spot])
        if wide[n, at.KEY0] == key0 and wide[n, at.KEY1] == key1:
            return n
        spot = (spot + 1) & (len(index) - 1)
    return np.int64(0)


@inline_kernel
def unindex(t: Any, n: Any) -> None:
    """Take the key out of the index, moving up what probed past it."""
    wide, index = t[at.WIDE_], t[at.INDEX_]
    last = len(index) - 1
    hole = home_of(t, wide[n, at.KEY0], wide[n, at.KEY1])
    while np.int64(index[hole]) != n:
        hole = (hole + 1) & last
    spot = hole
    while True:
        spot = (spot + 1) & last
        other = np.int64(index[spot])
        if other == 0:
            break
        home = home_of(t, wide[other, at.KEY0], wide[other, at.KEY1])
        if ((spot - home) & last) >= ((spot - hole) & last):
            index[hole] = other
            hole = spot
    index[hole] = 0


@inline_kernel
def forget_node(t: Any, n: Any) -> None:
    unindex(t, n)
    t[at.WIDE_][n, :] = 0
    t[at.SLIM_][n, :] = 0
    for k in range(len(t[at.LEGS_])):
        t[at.LEGS_][k, n, :] = 0
    t[at.SLIM_][n, at.NEXT] = t[at.TOTALS_][at.FREE]
    t[at.TOTALS_][at.FREE] = n


@inline_kernel
def forget_oldest_ghost(t: Any) -> None:
    n = np.int64(t[at.SLIM_][len(t[at.WIDE_]), at.NEWER])
    unlink(t[at.SLIM_], n)
    t[at.TOTALS_][at.GHOSTS] -= 1
    forget_node(t, n)


@inline_kernel
def node(t: Any, key0: Any, key1: Any) -> Any:
    """The node of this key, a new one where there is none; 0 if no row is left."""
    n = find(t, key0, key1)
    if n != 0:
        return n
    wide, index, totals = t[at.WIDE_], t[at.INDEX_], t[at.TOTALS_]
    if totals[at.FREE] == 0 and totals[at.HIGH] == len(wide) - 1 and totals[at.GHOSTS] > 0:
        forget_oldest_ghost(t)
    if totals[at.FREE] != 0:
        n = totals[at.FREE]
        totals[at.FREE] = t[at.SLIM_][n, at.NEXT]
        t[at.SLIM_][n, at.NEXT] = 0
    elif totals[at.HIGH] < len(wide) - 1:
        totals[at.HIGH] += 1
        n = totals[at.HIGH]
    else:
        return np.int64(0)
    wide[n, at.KEY0], wide[n, at.KEY1] = key0, key1
    spot = home_of(t, key0, key1)
    while index[spot] != 0:
        spot = (spot + 1) & (len(index) - 1)
    index[spot] = n
    return n


@inline_kernel
def settle(t: Any, n: Any) -> None:
    """Put a node that may have changed its state where it belongs: off or on the ghosts' ring, or away."""
    if n == 0:
        return
    slim, totals, ring = t[at.SLIM_], t[at.TOTALS_], len(t[at.WIDE_])
    held = has_flag(t, n, at.RESIDENT | at.ROOT) or slim[n, at.CHILDREN] != 0 or slim[n, at.FLYING] != 0
    if held:
        if has_flag(t, n, at.GHOST):
            unlink(slim, n)
            clear_flag(t, n, at.GHOST)
            totals[at.GHOSTS] -= 1
        return
    if has_flag(t, n, at.GHOST):
        return
    if totals[at.GHOST_LIMIT] == 0 or (slim[n, at.USES] == 0 and t[at.WIDE_][n, at.BELOW] == 0):
        forget_node(t, n)
        return
    if slim[ring, at.NEWER] == 0:
        slim[ring, at.NEWER] = slim[ring, at.OLDER] = ring
    put_behind(slim, ring, n)
    set_flag(t, n, at.GHOST)
    totals[at.GHOSTS] += 1
    if totals[at.GHOSTS] > totals[at.GHOST_LIMIT]:
        forget_oldest_ghost(t)


# Chains.


@inline_kernel
def adopt(t: Any, parent: Any, n: Any) -> None:
    slim = t[at.SLIM_]
    slim[n, at.PARENT] = parent
    if parent != 0:
        first = np.int64(slim[parent, at.CHILD])
        slim[n, at.NEXT], slim[n, at.PREVIOUS] = first, 0
        if first != 0:
            slim[first, at.PREVIOUS] = n
        slim[parent, at.CHILD] = n
        slim[parent, at.CHILDREN] += 1
        settle(t, parent)


@inline_kernel
def orphan(t: Any, n: Any) -> None:
    slim = t[at.SLIM_]
    parent, after, before = np.int64(slim[n, at.PARENT]), np.int64(slim[n, at.NEXT]), np.int64(slim[n, at.PREVIOUS])
    slim[n, at.PARENT] = slim[n, at.NEXT] = slim[n, at.PREVIOUS] = 0
    if parent != 0:
        if before != 0:
            slim[before, at.NEXT] = after
        else:
            slim[parent, at.CHILD] = after
        if after != 0:
            slim[after, at.PREVIOUS] = before
        slim[parent, at.CHILDREN] -= 1
        settle(t, parent)


# Lists of what can be written.


@inline_kernel
def unlist(t: Any, k: Any, n: Any) -> None:
    leg, legs = t[at.LEGS_][k, n], t[at.LEGS_][k]
    if leg[at.PLACE] == 0:
        return
    of = t[at.LISTS_][k, np.int64(leg[at.PLACE]) - 1]
    ahead, behind = np.int64(leg[at.AHEAD]), np.int64(leg[at.BEHIND])
    if ahead != 0:
        legs[ahead, at.BEHIND] = behind
    else:
        of[at.HEAD] = behind
    if behind != 0:
        legs[behind, at.AHEAD] = ahead
    else:
        of[at.TAIL] = ahead
    of[at.LENGTH] -= 1
    leg[at.AHEAD] = leg[at.BEHIND] = leg[at.PLACE] = 0


@inline_kernel
def enlist(t: Any, k: Any, n: Any, which: Any) -> None:
    """Put it at the end of one of the tier's lists; it is on none."""
    leg, of = t[at.LEGS_][k, n], t[at.LISTS_][k, which]
    tail = of[at.TAIL]
    leg[at.AHEAD], leg[at.BEHIND], leg[at.PLACE] = tail, 0, which + 1
    if tail != 0:
        t[at.LEGS_][k, tail, at.BEHIND] = n
    else:
        of[at.HEAD] = n
    of[at.TAIL] = n
    of[at.LENGTH] += 1


@inline_kernel
def is_wanted(t: Any, k: Any, n: Any) -> Any:
    bit = bit_of(k)
    return has_flag(t, n, at.RESIDENT) and (t[at.WIDE_][n, at.ADMITTED] & ~t[at.WIDE_][n, at.BELOW] & bit) != 0


@inline_kernel
def is_reachable(t: Any, k: Any, n: Any) -> Any:
    """Whether the tier has the parent."""
    parent = np.int64(t[at.SLIM_][n, at.PARENT])
    return parent != 0 and (t[at.WIDE_][parent, at.BELOW] & bit_of(k)) != 0


@inline_kernel
def consider(t: Any, k: Any, n: Any) -> None:
    """Put the block on the tier's first list if it may be written now."""
    if (
        is_wanted(t, k, n)
        and t[at.SLIM_][n, at.FLYING] == 0
        and t[at.LEGS_][k, n, at.PLACE] == 0
        and is_reachable(t, k, n)
    ):
        enlist(t, k, n, 0)


@inline_kernel
def consider_children(t: Any, k: Any, n: Any) -> None:
    child = np.int64(t[at.SLIM_][n, at.CHILD])
    while child != 0:
        consider(t, k, child)
        child = np.int64(t[at.SLIM_][child, at.NEXT])


# The order of use within a class.


@inline_kernel
def enter_order(t: Any, n: Any, behind: Any) -> None:
    """The newest of its class, or right behind its parent, as the pool's own order has it."""
    slim, ring = t[at.SLIM_], len(t[at.WIDE_]) + 1 + np.int64(t[at.SLIM_][n, at.CLASS])
    if slim[ring, at.NEWER] == 0:
        slim[ring, at.NEWER] = slim[ring, at.OLDER] = ring
    follows = behind != 0 and np.int64(slim[n, at.PARENT]) == behind and has_flag(t, behind, at.RESIDENT)
    if follows and slim[behind, at.CLASS] != slim[n, at.CLASS]:
        follows = False
    put_behind(slim, behind if follows else ring, n)


@inline_kernel
def leave_order(t: Any, n: Any) -> None:
    slim = t[at.SLIM_]
    ring = len(t[at.WIDE_]) + 1 + np.int64(slim[n, at.CLASS])
    if has_flag(t, n, at.COLD):
        of = t[at.CLASSES_][slim[n, at.CLASS]]
        of[at.COLD_COUNT] -= 1
        if of[at.HAND] == n:
            older = np.int64(slim[n, at.OLDER])
            of[at.HAND] = 0 if older == ring else older
        clear_flag(t, n, at.COLD)
    unlink(slim, n)
