"""The compiled steps of the tiering brain over the tables of `tier_table.py`.

Each step costs amortised constant time per event, answer or written block, whatever the pool's size; only a tier that
is forgotten costs a pass over all rows. `t` is the tuple of `TierTable.all()`, `n` a node, `k` a tier.

The rule that everything rests on: a (block, tier) pair is *wanted* when it is admitted and the tier does not have the
block, and is on the tier's list only while the tier has the block's parent. Admitting a block admits its resident
ancestors, so that a wanted block's ancestors are wanted or there, up to the first that must be used again first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core import tier_table as at
from penstock.jit import inline_kernel, kernel
from penstock.policies.ring import put_behind, unlink
from penstock.types import EventKind

__all__ = ["add_root", "clean", "drop", "forget", "land", "observe", "release", "take_run"]

TABLE = (
    "Tuple((uint64[:, ::1], uint32[:, ::1], uint32[:, :, ::1], int64[:, ::1], uint32[::1], uint32[::1], "
    "int64[:, :, ::1], int64[:, ::1], uint64[::1], int64[::1], int64[:, ::1], int64[::1]))"
)

USES_AGAIN = 2
"""Further uses after which a block is written again to a tier that dropped or refused it: the first may be the tail of
what made it fall out, the second says that it is wanted."""

FIRST_RETRY_MS = 250
"""Longer than a full tier needs to evict a batch; each further retry waits four times as long, the last 16 s."""

_COMMITTED = int(EventKind.COMMITTED)
_TOUCHED = int(EventKind.TOUCHED)
_EVICTED = int(EventKind.EVICTED)

# Words of an event seen as [n, 10] u64.
_HEAD, _KEY, _PARENT, _GENERATION, _WHERE, _TENANT, _BELOW = 0, 1, 3, 5, 6, 8, 9
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MIX = np.uint64(0x9E3779B97F4A7C15)


@inline_kernel
def _bit(k: Any) -> Any:
    return np.uint64(1) << np.uint64(k)


@inline_kernel
def _is(t: Any, n: Any, flag: Any) -> Any:
    return (np.int64(t[at.SLIM_][n, at.FLAGS]) & flag) != 0


@inline_kernel
def _set(t: Any, n: Any, flag: Any) -> None:
    t[at.SLIM_][n, at.FLAGS] = np.int64(t[at.SLIM_][n, at.FLAGS]) | flag


@inline_kernel
def _unset(t: Any, n: Any, flag: Any) -> None:
    t[at.SLIM_][n, at.FLAGS] = np.int64(t[at.SLIM_][n, at.FLAGS]) & ~flag


# Keys to nodes.


@inline_kernel
def _home(t: Any, key0: Any, key1: Any) -> Any:
    mixed = (key0 ^ (key1 * _MIX)) * _MIX
    return np.int64(mixed >> np.uint64(20)) & (len(t[at.INDEX_]) - 1)


@inline_kernel
def _find(t: Any, key0: Any, key1: Any) -> Any:
    """The node, or 0."""
    wide, index = t[at.WIDE_], t[at.INDEX_]
    spot = _home(t, key0, key1)
    while index[spot] != 0:
        n = np.int64(index[spot])
        if wide[n, at.KEY0] == key0 and wide[n, at.KEY1] == key1:
            return n
        spot = (spot + 1) & (len(index) - 1)
    return np.int64(0)


@inline_kernel
def _unindex(t: Any, n: Any) -> None:
    """Take the key out of the index, moving up what probed past it."""
    wide, index = t[at.WIDE_], t[at.INDEX_]
    last = len(index) - 1
    hole = _home(t, wide[n, at.KEY0], wide[n, at.KEY1])
    while np.int64(index[hole]) != n:
        hole = (hole + 1) & last
    spot = hole
    while True:
        spot = (spot + 1) & last
        other = np.int64(index[spot])
        if other == 0:
            break
        home = _home(t, wide[other, at.KEY0], wide[other, at.KEY1])
        if ((spot - home) & last) >= ((spot - hole) & last):
            index[hole] = other
            hole = spot
    index[hole] = 0


@inline_kernel
def _forget_node(t: Any, n: Any) -> None:
    _unindex(t, n)
    t[at.WIDE_][n, :] = 0
    t[at.SLIM_][n, :] = 0
    for k in range(len(t[at.LEGS_])):
        t[at.LEGS_][k, n, :] = 0
    t[at.SLIM_][n, at.NEXT] = t[at.TOTALS_][at.FREE]
    t[at.TOTALS_][at.FREE] = n


@inline_kernel
def _forget_oldest_ghost(t: Any) -> None:
    n = np.int64(t[at.SLIM_][len(t[at.WIDE_]), at.NEWER])
    unlink(t[at.SLIM_], n)
    t[at.TOTALS_][at.GHOSTS] -= 1
    _forget_node(t, n)


@inline_kernel
def _node(t: Any, key0: Any, key1: Any) -> Any:
    """The node of this key, a new one where there is none; 0 if no row is left."""
    n = _find(t, key0, key1)
    if n != 0:
        return n
    wide, index, totals = t[at.WIDE_], t[at.INDEX_], t[at.TOTALS_]
    if totals[at.FREE] == 0 and totals[at.HIGH] == len(wide) - 1 and totals[at.GHOSTS] > 0:
        _forget_oldest_ghost(t)
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
    spot = _home(t, key0, key1)
    while index[spot] != 0:
        spot = (spot + 1) & (len(index) - 1)
    index[spot] = n
    return n


@inline_kernel
def _settle(t: Any, n: Any) -> None:
    """Put a node that may have changed its state where it belongs: off or on the ghosts' ring, or away."""
    if n == 0:
        return
    slim, totals, ring = t[at.SLIM_], t[at.TOTALS_], len(t[at.WIDE_])
    held = _is(t, n, at.RESIDENT | at.ROOT) or slim[n, at.CHILDREN] != 0 or slim[n, at.FLYING] != 0
    if held:
        if _is(t, n, at.GHOST):
            unlink(slim, n)
            _unset(t, n, at.GHOST)
            totals[at.GHOSTS] -= 1
        return
    if _is(t, n, at.GHOST):
        return
    if totals[at.GHOST_LIMIT] == 0 or (slim[n, at.USES] == 0 and t[at.WIDE_][n, at.BELOW] == 0):
        _forget_node(t, n)
        return
    if slim[ring, at.NEWER] == 0:
        slim[ring, at.NEWER] = slim[ring, at.OLDER] = ring
    put_behind(slim, ring, n)
    _set(t, n, at.GHOST)
    totals[at.GHOSTS] += 1
    if totals[at.GHOSTS] > totals[at.GHOST_LIMIT]:
        _forget_oldest_ghost(t)


# Chains.


@inline_kernel
def _adopt(t: Any, parent: Any, n: Any) -> None:
    slim = t[at.SLIM_]
    slim[n, at.PARENT] = parent
    if parent != 0:
        first = np.int64(slim[parent, at.CHILD])
        slim[n, at.NEXT], slim[n, at.PREVIOUS] = first, 0
        if first != 0:
            slim[first, at.PREVIOUS] = n
        slim[parent, at.CHILD] = n
        slim[parent, at.CHILDREN] += 1
        _settle(t, parent)


@inline_kernel
def _orphan(t: Any, n: Any) -> None:
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
        _settle(t, parent)


# Lists of what can be written.


@inline_kernel
def _unlist(t: Any, k: Any, n: Any) -> None:
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
def _enlist(t: Any, k: Any, n: Any, which: Any) -> None:
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
def _wanted(t: Any, k: Any, n: Any) -> Any:
    bit = _bit(k)
    return _is(t, n, at.RESIDENT) and (t[at.WIDE_][n, at.ADMITTED] & ~t[at.WIDE_][n, at.BELOW] & bit) != 0


@inline_kernel
def _reachable(t: Any, k: Any, n: Any) -> Any:
    """Whether the tier has the parent."""
    parent = np.int64(t[at.SLIM_][n, at.PARENT])
    return parent != 0 and (t[at.WIDE_][parent, at.BELOW] & _bit(k)) != 0


@inline_kernel
def _consider(t: Any, k: Any, n: Any) -> None:
    """Put the block on the tier's first list if it may be written now."""
    if _wanted(t, k, n) and t[at.SLIM_][n, at.FLYING] == 0 and t[at.LEGS_][k, n, at.PLACE] == 0 and _reachable(t, k, n):
        _enlist(t, k, n, 0)


@inline_kernel
def _consider_children(t: Any, k: Any, n: Any) -> None:
    child = np.int64(t[at.SLIM_][n, at.CHILD])
    while child != 0:
        _consider(t, k, child)
        child = np.int64(t[at.SLIM_][child, at.NEXT])


# What is admitted where, and what is there.


@inline_kernel
def _barred(t: Any, k: Any, n: Any) -> Any:
    leg = t[at.LEGS_][k, n]
    if leg[at.BAR] != 0 and t[at.SLIM_][n, at.USES] >= leg[at.BAR]:
        leg[at.BAR] = 0
    return leg[at.BAR] != 0


@inline_kernel
def _bar(t: Any, k: Any, n: Any) -> None:
    """Not wanted there until it has been used again."""
    if _wanted(t, k, n):
        t[at.TIERS_][k, at.WAITING] -= 1
    t[at.WIDE_][n, at.ADMITTED] &= ~_bit(k)
    _unlist(t, k, n)
    t[at.LEGS_][k, n, at.TRIES] = 0
    t[at.LEGS_][k, n, at.BAR] = np.int64(t[at.SLIM_][n, at.USES]) + USES_AGAIN


@inline_kernel
def _admit(t: Any, k: Any, n: Any) -> None:
    """The block, and its ancestors as far as they are resident and not there."""
    wide, bit, top = t[at.WIDE_], _bit(k), np.int64(0)
    while _is(t, n, at.RESIDENT) and (wide[n, at.ADMITTED] & bit) == 0 and not _barred(t, k, n):
        wide[n, at.ADMITTED] |= bit
        t[at.TOTALS_][at.ADMITTED_TOTAL] += 1
        if (wide[n, at.BELOW] & bit) != 0:
            break
        t[at.TIERS_][k, at.WAITING] += 1
        top = n
        n = np.int64(t[at.SLIM_][n, at.PARENT])
    if top != 0:
        _consider(t, k, top)


@inline_kernel
def _count(t: Any, bits: Any) -> Any:
    n = 0
    for k in range(len(t[at.TIERS_])):
        if (bits & _bit(k)) != 0:
            n += 1
    return n


@inline_kernel
def _replicate(t: Any, n: Any) -> None:
    """Admit to further tiers until enough have the block or will; to those that are up first."""
    wide, masks = t[at.WIDE_], t[at.MASKS_]
    have = (wide[n, at.ADMITTED] | wide[n, at.BELOW]) & masks[at.WRITABLE]
    missing = np.int64(t[at.SLIM_][n, at.COPIES]) - _count(t, have)
    for wanted_up in (True, False):
        for k in t[at.ORDER_]:
            if missing <= 0:
                return
            up = (masks[at.UP] & _bit(k)) != 0
            if up == wanted_up and (have & _bit(k)) == 0 and not _barred(t, k, n):
                _admit(t, k, n)
                missing -= 1


@inline_kernel
def _apply_rules(t: Any, n: Any, more: Any) -> None:
    """Admit the block where the rules say so now; `more` are tiers whose turn has come besides."""
    wide, masks = t[at.WIDE_], t[at.MASKS_]
    by_rule = masks[at.THROUGH] | more
    if t[at.SLIM_][n, at.USES] >= 2:
        by_rule |= masks[at.SECOND_USE]
    missing = by_rule & ~wide[n, at.ADMITTED]
    if missing != 0:
        for k in range(len(t[at.TIERS_])):
            if (missing & _bit(k)) != 0:
                _admit(t, k, n)
    if wide[n, at.ADMITTED] != 0 and t[at.SLIM_][n, at.COPIES] > 1:
        _replicate(t, n)


@inline_kernel
def _have(t: Any, k: Any, n: Any) -> None:
    """The tier has the block."""
    wide = t[at.WIDE_]
    if (wide[n, at.BELOW] & _bit(k)) != 0:
        return
    if _wanted(t, k, n):
        t[at.TIERS_][k, at.WAITING] -= 1
    wide[n, at.BELOW] |= _bit(k)
    _unlist(t, k, n)
    t[at.LEGS_][k, n, at.TRIES] = t[at.LEGS_][k, n, at.BAR] = 0
    _consider_children(t, k, n)


@inline_kernel
def _have_not(t: Any, k: Any, n: Any) -> None:
    """The tier does not have it any more, if it had; what is being written does not count either."""
    if (t[at.WIDE_][n, at.BELOW] & _bit(k)) != 0:
        t[at.WIDE_][n, at.BELOW] &= ~_bit(k)
        if _wanted(t, k, n):
            t[at.TIERS_][k, at.WAITING] += 1
    if t[at.SLIM_][n, at.FLYING] == k + 1:
        _set(t, n, at.STALE)


# The order of use within a class.


@inline_kernel
def _use(t: Any, n: Any, behind: Any) -> None:
    """The newest of its class, or right behind its parent, as the pool's own order has it."""
    slim, ring = t[at.SLIM_], len(t[at.WIDE_]) + 1 + np.int64(t[at.SLIM_][n, at.CLASS])
    if slim[ring, at.NEWER] == 0:
        slim[ring, at.NEWER] = slim[ring, at.OLDER] = ring
    parent = np.int64(slim[n, at.PARENT])
    follows = (
        behind != 0 and parent == behind and _is(t, behind, at.RESIDENT) and slim[behind, at.CLASS] == slim[n, at.CLASS]
    )
    put_behind(slim, behind if follows else ring, n)


@inline_kernel
def _unuse(t: Any, n: Any) -> None:
    slim = t[at.SLIM_]
    ring = len(t[at.WIDE_]) + 1 + np.int64(slim[n, at.CLASS])
    if _is(t, n, at.COLD):
        of = t[at.CLASSES_][slim[n, at.CLASS]]
        of[at.COLD_COUNT] -= 1
        if of[at.HAND] == n:
            older = np.int64(slim[n, at.OLDER])
            of[at.HAND] = 0 if older == ring else older
        _unset(t, n, at.COLD)
    unlink(slim, n)


# Events.


@inline_kernel
def _evict(t: Any, n: Any) -> None:
    wide, slim, totals, masks = t[at.WIDE_], t[at.SLIM_], t[at.TOTALS_], t[at.MASKS_]
    t[at.NODE_OF_][np.int64(slim[n, at.UNIT]) - 1] = 0
    slim[n, at.UNIT] = 0
    _unuse(t, n)
    t[at.CLASSES_][slim[n, at.CLASS], at.RESIDENTS] -= 1
    totals[at.RESIDENT_COUNT] -= 1
    if (masks[at.SECOND_USE] & ~(wide[n, at.ADMITTED] | wide[n, at.BELOW])) != 0:
        totals[at.KEPT_OFF] += 1
    wants = wide[n, at.ADMITTED]
    for k in range(len(t[at.TIERS_])):
        if (masks[at.EVICTION] & _bit(k)) != 0 and not _barred(t, k, n):
            wants |= _bit(k)
        if _wanted(t, k, n):
            t[at.TIERS_][k, at.WAITING] -= 1
        _unlist(t, k, n)
        t[at.LEGS_][k, n, at.TRIES] = 0
    if wide[n, at.BELOW] == 0 and slim[n, at.FLYING] == 0 and wants != 0:
        totals[at.LOST] += 1
    wide[n, at.ADMITTED] = 0
    _unset(t, n, at.RESIDENT)
    _orphan(t, n)
    _settle(t, n)


@inline_kernel
def _learn(t: Any, n: Any, below: Any) -> None:
    """A commit says that these tiers have it."""
    for k in range(len(t[at.TIERS_])):
        if (below & _bit(k)) != 0:
            _have(t, k, n)


@inline_kernel
def _make_room(t: Any, unit: Any, key0: Any, key1: Any) -> None:
    """Whatever we believe to be in this unit, or under this key elsewhere, has left without our being told."""
    if t[at.NODE_OF_][unit] != 0:
        _evict(t, np.int64(t[at.NODE_OF_][unit]))
    n = _find(t, key0, key1)
    if n != 0 and _is(t, n, at.RESIDENT):
        _evict(t, n)


@inline_kernel
def _same(t: Any, n: Any, event: Any) -> Any:
    """Whether this commit was taken in before: a restart's scan and the events after it may overlap."""
    wide = t[at.WIDE_]
    if n == 0 or wide[n, at.KEY0] != event[_KEY] or wide[n, at.KEY1] != event[_KEY + 1]:
        return False
    return wide[n, at.GENERATION] == event[_GENERATION]


@inline_kernel
def _fill(t: Any, n: Any, unit: Any, event: Any, copies: Any) -> None:
    slim = t[at.SLIM_]
    slim[n, at.UNIT] = unit + 1
    slim[n, at.SPACE] = event[_WHERE] & _LOW
    slim[n, at.CLASS] = event[_WHERE] >> _HALF
    slim[n, at.COPIES] = copies
    slim[n, at.USES] += 1
    t[at.WIDE_][n, at.TENANT] = event[_TENANT]
    t[at.WIDE_][n, at.GENERATION] = event[_GENERATION]
    t[at.NODE_OF_][unit] = n
    t[at.CLASSES_][slim[n, at.CLASS], at.RESIDENTS] += 1
    t[at.TOTALS_][at.RESIDENT_COUNT] += 1
    _set(t, n, at.RESIDENT)
    _settle(t, n)


@inline_kernel
def _commit(t: Any, unit: Any, event: Any, copies: Any, behind: Any) -> Any:
    """The block's node, or 0 where it cannot be taken in."""
    below = event[_BELOW] & t[at.MASKS_][at.ALL]
    known = np.int64(t[at.NODE_OF_][unit])
    if _same(t, known, event):
        _learn(t, known, below)
        return behind
    _make_room(t, unit, event[_KEY], event[_KEY + 1])
    n = _node(t, event[_KEY], event[_KEY + 1])
    if n == 0 or _is(t, n, at.ROOT):
        t[at.TOTALS_][at.UNKNOWN] += 1
        return np.int64(0)
    _fill(t, n, unit, event, copies)
    parent = _node(t, event[_PARENT], event[_PARENT + 1])
    _adopt(t, np.int64(0) if parent == n else parent, n)
    _use(t, n, behind)
    _learn(t, n, below)
    _apply_rules(t, n, np.uint64(0))
    _lead(t, n)
    return n


@inline_kernel
def _lead(t: Any, n: Any) -> None:
    """Children that came before it and are wanted somewhere cannot be written there without it."""
    needed, child = np.uint64(0), np.int64(t[at.SLIM_][n, at.CHILD])
    while child != 0:
        needed |= t[at.WIDE_][child, at.ADMITTED] & ~t[at.WIDE_][child, at.BELOW]
        child = np.int64(t[at.SLIM_][child, at.NEXT])
    for k in range(len(t[at.TIERS_])):
        if (needed & _bit(k)) != 0:
            _admit(t, k, n)


@kernel(f"void({TABLE}, uint64[:, ::1], uint32[::1])")
def observe(t: Any, events: Any, copies: Any) -> None:
    """Take in events ([n] of tier_event_dtype as words); `copies` is how many tiers must hold each."""
    previous = np.int64(0)
    for i in range(len(events)):
        kind = np.int64(events[i, _HEAD] & _LOW)
        unit = np.int64(events[i, _HEAD] >> _HALF)
        slot_class = np.int64(events[i, _WHERE] >> _HALF)
        if unit >= len(t[at.NODE_OF_]) or (kind == _COMMITTED and slot_class >= at.MAX_CLASSES):
            t[at.TOTALS_][at.UNKNOWN] += 1
            continue
        n = np.int64(t[at.NODE_OF_][unit])
        if kind == _COMMITTED:
            previous = _commit(t, unit, events[i], copies[i], previous)
        elif n == 0 or (kind != _TOUCHED and kind != _EVICTED):
            t[at.TOTALS_][at.UNKNOWN] += 1
        elif kind == _TOUCHED:
            t[at.SLIM_][n, at.USES] += 1
            _unuse(t, n)
            _use(t, n, previous)
            _apply_rules(t, n, np.uint64(0))
            previous = n
        else:
            # The node may be freed and used again within this batch.
            _evict(t, n)
            previous = np.int64(0)


@kernel(f"boolean({TABLE}, uint64, uint64)")
def add_root(t: Any, key0: Any, key1: Any) -> Any:
    """Every tier has what comes before a chain's first block. False if the key is a block's or no row is left."""
    n = _node(t, key0, key1)
    if n == 0 or _is(t, n, at.RESIDENT):
        return False
    _set(t, n, at.ROOT)
    _settle(t, n)
    t[at.WIDE_][n, at.BELOW] = ~np.uint64(0)
    for k in range(len(t[at.TIERS_])):
        _consider_children(t, k, n)
    return True


# Writing.


@kernel(f"void({TABLE}, int64, int64, int64)")
def clean(t: Any, slot_class: Any, target: Any, limit: Any) -> None:
    """Move the class's hand until the `target` coldest blocks are admitted, by at most `limit` blocks."""
    slim, ring, of = t[at.SLIM_], len(t[at.WIDE_]) + 1 + slot_class, t[at.CLASSES_][slot_class]
    while of[at.COLD_COUNT] < target and limit > 0:
        n = np.int64(slim[of[at.HAND] if of[at.HAND] != 0 else ring, at.NEWER])
        if n == 0 or n == ring:
            break
        _set(t, n, at.COLD)
        of[at.HAND] = n
        of[at.COLD_COUNT] += 1
        limit -= 1
        _apply_rules(t, n, t[at.MASKS_][at.EVICTION])


@kernel(f"void({TABLE}, int64)")
def release(t: Any, now: Any) -> None:
    """Whatever waited long enough for its retry may be written."""
    for k in range(len(t[at.TIERS_])):
        for which in range(1, at.MAX_TRIES + 1):
            n = t[at.LISTS_][k, which, at.HEAD]
            while n != 0 and t[at.DUE_][k, n] <= now:
                _unlist(t, k, n)
                _consider(t, k, n)
                n = t[at.LISTS_][k, which, at.HEAD]


@inline_kernel
def _launch(t: Any, k: Any, n: Any) -> None:
    """One write at a time: it is on no tier's list until this one has ended."""
    t[at.SLIM_][n, at.FLYING] = k + 1
    t[at.TIERS_][k, at.IN_FLIGHT] += 1
    for other in range(len(t[at.TIERS_])):
        if t[at.LEGS_][other, n, at.PLACE] == 1:
            _unlist(t, other, n)


@inline_kernel
def _next_in_chain(t: Any, k: Any, n: Any) -> Any:
    """A child that can be written right behind it, or 0."""
    slim, wide = t[at.SLIM_], t[at.WIDE_]
    child = np.int64(slim[n, at.CHILD])
    while child != 0:
        waits = t[at.LEGS_][k, child, at.PLACE] > 1
        alike = slim[child, at.SPACE] == slim[n, at.SPACE] and wide[child, at.TENANT] == wide[n, at.TENANT]
        if alike and _wanted(t, k, child) and slim[child, at.FLYING] == 0 and not waits:
            return child
        child = np.int64(slim[child, at.NEXT])
    return np.int64(0)


@kernel(f"int64({TABLE}, int64, int64[::1])")
def take_run(t: Any, k: Any, out: Any) -> Any:
    """Fill `out` with the tier's next run, which is in flight from now on; how many blocks it has."""
    of, n = t[at.LISTS_][k, 0], np.int64(0)
    while of[at.HEAD] != 0:
        n = of[at.HEAD]
        _unlist(t, k, n)
        # The parent may have been dropped below since the block was listed; it will be considered again with it.
        if _reachable(t, k, n):
            break
        n = np.int64(0)
    length = 0
    while n != 0 and length < len(out):
        _launch(t, k, n)
        out[length] = n
        length += 1
        n = _next_in_chain(t, k, n)
    return length


@inline_kernel
def _retry(t: Any, k: Any, n: Any, now: Any) -> None:
    leg = t[at.LEGS_][k, n]
    leg[at.TRIES] += 1
    if leg[at.TRIES] > at.MAX_TRIES:
        t[at.TOTALS_][at.GAVE_UP] += 1
        _bar(t, k, n)
        return
    tries = np.int64(leg[at.TRIES])
    t[at.DUE_][k, n] = now + (FIRST_RETRY_MS << (2 * (tries - 1)))
    _enlist(t, k, n, tries)


@inline_kernel
def _end_flight(t: Any, k: Any, n: Any, stored: Any, now: Any) -> None:
    stale = _is(t, n, at.STALE)
    _unset(t, n, at.STALE)
    t[at.SLIM_][n, at.FLYING] = 0
    t[at.TIERS_][k, at.IN_FLIGHT] -= 1
    up = (t[at.MASKS_][at.UP] & _bit(k)) != 0
    if stored and not stale:
        _have(t, k, n)
    elif not stale and up and _wanted(t, k, n):
        _retry(t, k, n, now)
    for other in range(len(t[at.TIERS_])):
        _consider(t, other, n)
    if not _is(t, n, at.RESIDENT):
        if t[at.WIDE_][n, at.BELOW] == 0:
            t[at.TOTALS_][at.LOST] += 1
        _settle(t, n)


@kernel(f"void({TABLE}, int64, uint64[:, ::1], boolean, int64)")
def land(t: Any, k: Any, keys: Any, stored: Any, now: Any) -> None:
    """The answer to writes: they are stored, or refused."""
    for i in range(len(keys)):
        n = _find(t, keys[i, 0], keys[i, 1])
        if n == 0 or _is(t, n, at.ROOT):
            continue
        t[at.TOTALS_][at.STORED_TOTAL if stored else at.REFUSED_TOTAL] += 1
        if t[at.SLIM_][n, at.FLYING] == k + 1:
            _end_flight(t, k, n, stored, now)
        elif stored:
            _have(t, k, n)


@kernel(f"void({TABLE}, int64, uint64[:, ::1])")
def drop(t: Any, k: Any, keys: Any) -> None:
    """The tier does not have these blocks any more."""
    for i in range(len(keys)):
        n = _find(t, keys[i, 0], keys[i, 1])
        if n == 0 or _is(t, n, at.ROOT):
            continue
        t[at.TOTALS_][at.DROPPED] += 1
        _have_not(t, k, n)
        _bar(t, k, n)
        if _is(t, n, at.RESIDENT):
            _apply_rules(t, n, np.uint64(0))


@kernel(f"void({TABLE}, int64)")
def forget(t: Any, k: Any) -> None:
    """The tier has nothing as far as we know; what was admitted there is wanted again, and nothing is held against
    a block.
    """
    high, bit = t[at.TOTALS_][at.HIGH] + 1, _bit(k)
    for n in range(1, high):
        if not _is(t, n, at.ROOT):
            _unlist(t, k, n)
            t[at.LEGS_][k, n, at.TRIES] = t[at.LEGS_][k, n, at.BAR] = 0
            _have_not(t, k, n)
    for n in range(1, high):
        if (t[at.WIDE_][n, at.ADMITTED] & bit) != 0:
            _admit(t, k, np.int64(t[at.SLIM_][n, at.PARENT]))
    for n in range(1, high):
        _consider(t, k, n)
