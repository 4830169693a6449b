"""The compiled steps of the tiering brain over the tables of `tier_table.py`.

Each step costs amortised constant time per event, answer or written block, whatever the pool's size; only a tier that
is forgotten costs a pass over all rows. `t` is the tuple of `TierTable.all()`, `n` a node, `k` a tier.

The rule that everything rests on: a (block, tier) pair is *wanted* when it is admitted and the tier does not have the
block, and gets on the tier's list only when the tier has the block's parent. Admitting a block admits its resident
ancestors, so that a wanted block's ancestors are wanted or there, up to the first that must be used again first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from penstock.core import tier_table as at
from penstock.core.tier_rows import (
    adopt,
    bit_of,
    clear_flag,
    consider,
    consider_children,
    enlist,
    enter_order,
    find,
    has_flag,
    is_reachable,
    is_wanted,
    leave_order,
    node,
    orphan,
    set_flag,
    settle,
    unlist,
)
from penstock.jit import inline_kernel, kernel
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
_KEPT = int(EventKind.KEPT)

# Words of an event seen as [n, 10] u64.
_HEAD, _KEY, _PARENT, _GENERATION, _WHERE, _TENANT, _BELOW = 0, 1, 3, 5, 6, 8, 9
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


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
    if is_wanted(t, k, n):
        t[at.TIERS_][k, at.WAITING] -= 1
    t[at.WIDE_][n, at.ADMITTED] &= ~bit_of(k)
    unlist(t, k, n)
    t[at.LEGS_][k, n, at.TRIES] = 0
    t[at.LEGS_][k, n, at.BAR] = np.int64(t[at.SLIM_][n, at.USES]) + USES_AGAIN


@inline_kernel
def _admit(t: Any, k: Any, n: Any) -> None:
    """The block, and its ancestors as far as they are resident and not there."""
    wide, bit, top = t[at.WIDE_], bit_of(k), np.int64(0)
    while has_flag(t, n, at.RESIDENT) and (wide[n, at.ADMITTED] & bit) == 0 and not _barred(t, k, n):
        wide[n, at.ADMITTED] |= bit
        t[at.TOTALS_][at.ADMITTED_TOTAL] += 1
        if (wide[n, at.BELOW] & bit) != 0:
            break
        t[at.TIERS_][k, at.WAITING] += 1
        top = n
        n = np.int64(t[at.SLIM_][n, at.PARENT])
    if top != 0:
        consider(t, k, top)


@inline_kernel
def _count(t: Any, bits: Any) -> Any:
    n = 0
    for k in range(len(t[at.TIERS_])):
        if (bits & bit_of(k)) != 0:
            n += 1
    return n


@inline_kernel
def _further(t: Any, n: Any, wants: Any) -> Any:
    """Tiers that must have the block besides, if it is written at all: those that are up first."""
    have = t[at.WIDE_][n, at.ADMITTED]
    for k in range(len(t[at.TIERS_])):
        if (wants & bit_of(k)) != 0 and not _barred(t, k, n):
            have |= bit_of(k)
    further = np.uint64(0)
    if have == 0:
        return further
    have = (have | t[at.WIDE_][n, at.BELOW]) & t[at.MASKS_][at.WRITABLE]
    missing = np.int64(t[at.SLIM_][n, at.COPIES]) - _count(t, have)
    for down in range(2):
        for k in t[at.ORDER_]:
            up = (t[at.MASKS_][at.UP] & bit_of(k)) != 0
            if missing > 0 and up == (down == 0) and (have & bit_of(k)) == 0 and not _barred(t, k, n):
                further |= bit_of(k)
                missing -= 1
    return further


@inline_kernel
def _apply_rules(t: Any, n: Any, more: Any) -> None:
    """Admit the block where the rules say so now; `more` are tiers where it is needed besides."""
    wants = t[at.MASKS_][at.THROUGH] | more
    if t[at.SLIM_][n, at.USES] >= 2:
        wants |= t[at.MASKS_][at.SECOND_USE]
    if t[at.SLIM_][n, at.COPIES] > 1:
        wants |= _further(t, n, wants)
    missing = wants & ~t[at.WIDE_][n, at.ADMITTED]
    if missing != 0:
        for k in range(len(t[at.TIERS_])):
            if (missing & bit_of(k)) != 0:
                _admit(t, k, n)


@inline_kernel
def _have(t: Any, k: Any, n: Any) -> None:
    """The tier has the block."""
    wide = t[at.WIDE_]
    if (wide[n, at.BELOW] & bit_of(k)) != 0:
        return
    if is_wanted(t, k, n):
        t[at.TIERS_][k, at.WAITING] -= 1
    wide[n, at.BELOW] |= bit_of(k)
    unlist(t, k, n)
    t[at.LEGS_][k, n, at.TRIES] = t[at.LEGS_][k, n, at.BAR] = 0
    consider_children(t, k, n)


@inline_kernel
def _have_not(t: Any, k: Any, n: Any) -> None:
    """The tier does not have it any more, if it had; what is being written does not count either."""
    if (t[at.WIDE_][n, at.BELOW] & bit_of(k)) != 0:
        t[at.WIDE_][n, at.BELOW] &= ~bit_of(k)
        if is_wanted(t, k, n):
            t[at.TIERS_][k, at.WAITING] += 1
    if t[at.SLIM_][n, at.FLYING] == k + 1:
        set_flag(t, n, at.STALE)


# Events.


@inline_kernel
def _evict(t: Any, n: Any) -> None:
    wide, slim, totals, masks = t[at.WIDE_], t[at.SLIM_], t[at.TOTALS_], t[at.MASKS_]
    t[at.NODE_OF_][np.int64(slim[n, at.UNIT]) - 1] = 0
    slim[n, at.UNIT] = 0
    leave_order(t, n)
    t[at.CLASSES_][slim[n, at.CLASS], at.RESIDENTS] -= 1
    totals[at.RESIDENT_COUNT] -= 1
    if (masks[at.SECOND_USE] & ~(wide[n, at.ADMITTED] | wide[n, at.BELOW])) != 0:
        totals[at.KEPT_OFF] += 1
    wants = wide[n, at.ADMITTED]
    for k in range(len(t[at.TIERS_])):
        if (masks[at.EVICTION] & bit_of(k)) != 0 and not _barred(t, k, n):
            wants |= bit_of(k)
        if is_wanted(t, k, n):
            t[at.TIERS_][k, at.WAITING] -= 1
        unlist(t, k, n)
        t[at.LEGS_][k, n, at.TRIES] = 0
    if wide[n, at.BELOW] == 0 and slim[n, at.FLYING] == 0 and wants != 0:
        totals[at.LOST] += 1
    wide[n, at.ADMITTED] = 0
    clear_flag(t, n, at.RESIDENT)
    orphan(t, n)
    settle(t, n)


@inline_kernel
def _learn(t: Any, n: Any, below: Any) -> None:
    """A commit says that these tiers have it."""
    for k in range(len(t[at.TIERS_])):
        if (below & bit_of(k)) != 0:
            _have(t, k, n)


@inline_kernel
def _vacate(t: Any, unit: Any, event: Any, by_key: Any) -> None:
    """What is in this unit leaves; before a commit (`by_key`) also what we believe to be elsewhere under its key. If
    anything was there, we were not told of its end.
    """
    for attempt in range(1 + by_key):
        n = find(t, event[_KEY], event[_KEY + 1]) if attempt else np.int64(t[at.NODE_OF_][unit])
        if n != 0 and has_flag(t, n, at.RESIDENT):
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
    set_flag(t, n, at.RESIDENT)
    settle(t, n)


@inline_kernel
def _take_in(t: Any, unit: Any, event: Any, copies: Any) -> Any:
    """The new block's node, or 0 where there can be none."""
    n = node(t, event[_KEY], event[_KEY + 1])
    if n == 0 or has_flag(t, n, at.ROOT):
        return np.int64(0)
    _fill(t, n, unit, event, copies)
    parent = node(t, event[_PARENT], event[_PARENT + 1])
    adopt(t, np.int64(0) if parent == n else parent, n)
    return n


@inline_kernel
def _needed(t: Any, n: Any) -> Any:
    """Where children that came before it are wanted: they cannot be written there without it."""
    needed, child = np.uint64(0), np.int64(t[at.SLIM_][n, at.CHILD])
    while child != 0:
        needed |= t[at.WIDE_][child, at.ADMITTED] & ~t[at.WIDE_][child, at.BELOW]
        child = np.int64(t[at.SLIM_][child, at.NEXT])
    return needed


@inline_kernel
def _used(t: Any, unit: Any, times: Any) -> Any:
    """The node of what this unit holds, `times` more used, and out of the order: it comes back as the newest."""
    n = np.int64(t[at.NODE_OF_][unit])
    if n != 0:
        t[at.SLIM_][n, at.USES] += times
        leave_order(t, n)
    return n


@kernel(f"void({TABLE}, uint64[:, ::1], uint32[::1])")
def observe(t: Any, events: Any, copies: Any) -> None:
    """Take in events ([n] of tier_event_dtype as words); `copies` is how many tiers must hold each."""
    # Compiling takes as long as the code is with every call written out, so each step is called in one place.
    previous = np.int64(0)
    for i in range(len(events)):
        kind = np.int64(events[i, _HEAD] & _LOW)
        unit = np.int64(events[i, _HEAD] >> _HALF)
        commits = kind == _COMMITTED
        behind, previous = previous, np.int64(0)
        if unit >= len(t[at.NODE_OF_]) or (commits and np.int64(events[i, _WHERE] >> _HALF) >= at.MAX_CLASSES):
            t[at.TOTALS_][at.UNKNOWN] += 1
            continue
        n = np.int64(t[at.NODE_OF_][unit])
        again = commits and _same(t, n, events[i])
        if not again and (commits or (kind == _EVICTED and n != 0)):
            _vacate(t, unit, events[i], 1 if commits else 0)
            if not commits:
                continue
            n = _take_in(t, unit, events[i], copies[i])
        elif kind in (_TOUCHED, _KEPT):
            # What a lease kept from leaving is the pool's newest, and nobody's use.
            n = _used(t, unit, 1 if kind == _TOUCHED else 0)
        elif not again:
            n = np.int64(0)
        if n == 0:
            t[at.TOTALS_][at.UNKNOWN] += 1
            continue
        if not again:
            enter_order(t, n, behind)
            previous = n
        if commits:
            _learn(t, n, events[i, _BELOW] & t[at.MASKS_][at.ALL])
        _apply_rules(t, n, _needed(t, n) if commits else np.uint64(0))


@kernel(f"boolean({TABLE}, uint64, uint64)")
def add_root(t: Any, key0: Any, key1: Any) -> Any:
    """Every tier has what comes before a chain's first block. False if the key is a block's or no row is left."""
    n = node(t, key0, key1)
    if n == 0 or has_flag(t, n, at.RESIDENT):
        return False
    set_flag(t, n, at.ROOT)
    settle(t, n)
    t[at.WIDE_][n, at.BELOW] = ~np.uint64(0)
    for k in range(len(t[at.TIERS_])):
        consider_children(t, k, n)
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
        set_flag(t, n, at.COLD)
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
                unlist(t, k, n)
                consider(t, k, n)
                n = t[at.LISTS_][k, which, at.HEAD]


@inline_kernel
def _launch(t: Any, k: Any, n: Any) -> None:
    """One write at a time: it is on no tier's list until this one has ended."""
    t[at.SLIM_][n, at.FLYING] = k + 1
    t[at.TIERS_][k, at.IN_FLIGHT] += 1
    for other in range(len(t[at.TIERS_])):
        if t[at.LEGS_][other, n, at.PLACE] == 1:
            unlist(t, other, n)


@inline_kernel
def _next_in_chain(t: Any, k: Any, n: Any) -> Any:
    """A child that can be written right behind it, or 0."""
    slim, wide = t[at.SLIM_], t[at.WIDE_]
    child = np.int64(slim[n, at.CHILD])
    while child != 0:
        waits = t[at.LEGS_][k, child, at.PLACE] > 1
        alike = slim[child, at.SPACE] == slim[n, at.SPACE] and wide[child, at.TENANT] == wide[n, at.TENANT]
        if alike and is_wanted(t, k, child) and slim[child, at.FLYING] == 0 and not waits:
            return child
        child = np.int64(slim[child, at.NEXT])
    return np.int64(0)


@kernel(f"int64({TABLE}, int64, int64[::1])")
def take_run(t: Any, k: Any, out: Any) -> Any:
    """Fill `out` with the tier's next run, which is in flight from now on; how many blocks it has."""
    of, n = t[at.LISTS_][k, 0], np.int64(0)
    while of[at.HEAD] != 0:
        n = of[at.HEAD]
        unlist(t, k, n)
        # The parent may have been dropped below since the block was listed; it will be considered again with it.
        if is_reachable(t, k, n):
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
    enlist(t, k, n, tries)


@inline_kernel
def _end_flight(t: Any, k: Any, n: Any, stored: Any, now: Any) -> None:
    stale = has_flag(t, n, at.STALE)
    clear_flag(t, n, at.STALE)
    t[at.SLIM_][n, at.FLYING] = 0
    t[at.TIERS_][k, at.IN_FLIGHT] -= 1
    up = (t[at.MASKS_][at.UP] & bit_of(k)) != 0
    if stored and not stale:
        _have(t, k, n)
    elif not stale and up and is_wanted(t, k, n):
        _retry(t, k, n, now)
    for other in range(len(t[at.TIERS_])):
        consider(t, other, n)
    if not has_flag(t, n, at.RESIDENT):
        if t[at.WIDE_][n, at.BELOW] == 0:
            t[at.TOTALS_][at.LOST] += 1
        settle(t, n)


@kernel(f"void({TABLE}, int64, uint64[:, ::1], boolean, int64)")
def land(t: Any, k: Any, keys: Any, stored: Any, now: Any) -> None:
    """The answer to writes: they are stored, or refused."""
    for i in range(len(keys)):
        n = find(t, keys[i, 0], keys[i, 1])
        if n == 0 or has_flag(t, n, at.ROOT):
            continue
        t[at.TOTALS_][at.STORED_TOTAL if stored else at.REFUSED_TOTAL] += 1
        if t[at.SLIM_][n, at.FLYING] == k + 1:
            _end_flight(t, k, n, stored, now)
        elif stored:
            _have(t, k, n)


@kernel(f"void({TABLE}, int64, uint64[:, ::1])")
def drop(t: Any, k: Any, keys: Any) -> None:
    """The tier does not have these blocks any more; those that nobody thinks are there, or on their way, stay as they
    are.
    """
    for i in range(len(keys)):
        n = find(t, keys[i, 0], keys[i, 1])
        if n == 0 or has_flag(t, n, at.ROOT):
            continue
        if (t[at.WIDE_][n, at.BELOW] & bit_of(k)) == 0 and t[at.SLIM_][n, at.FLYING] != k + 1:
            continue
        t[at.TOTALS_][at.DROPPED] += 1
        _have_not(t, k, n)
        _bar(t, k, n)
        if has_flag(t, n, at.RESIDENT):
            _apply_rules(t, n, np.uint64(0))


@kernel(f"void({TABLE}, int64)")
def forget(t: Any, k: Any) -> None:
    """The tier has nothing as far as we know; what was admitted there is wanted again, and nothing is held against
    a block.
    """
    high, bit = t[at.TOTALS_][at.HIGH] + 1, bit_of(k)
    for n in range(1, high):
        if not has_flag(t, n, at.ROOT):
            unlist(t, k, n)
            t[at.LEGS_][k, n, at.TRIES] = t[at.LEGS_][k, n, at.BAR] = 0
            _have_not(t, k, n)
    for n in range(1, high):
        if (t[at.WIDE_][n, at.ADMITTED] & bit) != 0:
            _admit(t, k, np.int64(t[at.SLIM_][n, at.PARENT]))
    for n in range(1, high):
        consider(t, k, n)
