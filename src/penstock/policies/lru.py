"""Least recently used, tail-first within a chain. Only the order; what is true of a block is in `facts.py`.

The block that leaves next is the one without resident children whose own last use is oldest. A doubly
linked ring per slot class holds the blocks from newest to oldest. A block that reaches the old end while it
still has children is passed over: it is taken off the ring, and when its last child leaves it goes back to
the old end, being older than all that was never passed over. So a chain's blocks leave one after the other
from its tail, a block is passed over at most once per use, and a victim costs amortised constant time
whatever the chains look like. (One call may pass over many blocks: as many as were used before the victim
and still have children.) Where evictions that this policy did not choose uncover several blocks, those go in
the reverse order of being uncovered.

Within a batch, a block that follows its parent is put right behind it, so that a chain reported from head
to tail lies with its head as the most recently used; a later chain is more recent than an earlier one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from penstock.jit import inline_kernel, kernel
from penstock.policies.base import Policy
from penstock.policies.facts import (
    ENTERED,
    EVENT_UNIT,
    ILLEGAL,
    LEFT,
    RETURNED,
    ROW_CLASS,
    ROW_OPEN,
    ROW_PARENT,
    USED,
    Facts,
    Words,
    apply_event,
    pick,
)
from penstock.policies.ring import (
    NEWER,
    OFF,
    PASSED,
    assert_rings,
    build_rings,
    empty_links,
    put_behind,
    unlink,
)

__all__ = ["Lru"]


@inline_kernel
def _uncover(rows: Any, links: Any, n_units: Any, unit: Any) -> Any:
    """A block lost a child: if it was the last one and the block had been passed over, it is the oldest
    again.
    """
    if unit != OFF and rows[unit, ROW_OPEN] == 0 and links[unit, NEWER] == PASSED:
        ring = n_units + rows[unit, ROW_CLASS]
        put_behind(links, links[ring, NEWER], unit)


@kernel("int64(uint32[:, ::1], uint32[:, ::1], int64[:, ::1], int64[::1], uint32[:, ::1], uint32[:, ::1], int64)")
def _observe(rows: Any, intents: Any, counts: Any, totals: Any, links: Any, events: Any, now: Any) -> Any:
    n_units = len(rows)
    previous = np.int64(OFF)
    for i in range(len(events)):
        did = apply_event(rows, intents, counts, totals, events, i, now)
        if did == ILLEGAL:
            return i
        unit = np.int64(events[i, EVENT_UNIT])
        parent = np.int64(rows[unit, ROW_PARENT])
        behind = np.int64(OFF)
        if did in (ENTERED, USED, RETURNED):
            follows = parent == previous and parent != OFF and did != RETURNED
            if links[unit, NEWER] < PASSED:
                unlink(links, unit)
            put_behind(links, parent if follows else n_units + np.int64(rows[unit, ROW_CLASS]), unit)
            behind = unit
        elif did == LEFT:
            if links[unit, NEWER] < PASSED:
                unlink(links, unit)
            links[unit, NEWER] = OFF
            _uncover(rows, links, n_units, parent)
        previous = behind
    return len(events)


@kernel("int64(uint32[:, ::1], int64[:, ::1], uint32[:, ::1], int64, int64, uint32[::1])")
def _victims(rows: Any, counts: Any, links: Any, slot_class: Any, n: Any, out: Any) -> Any:
    n_units = len(rows)
    ring = n_units + slot_class
    found = 0
    while found < n:
        unit = np.int64(links[ring, NEWER])
        if unit == ring:
            break
        unlink(links, unit)
        if rows[unit, ROW_OPEN] != 0:
            links[unit, NEWER] = PASSED
            continue
        links[unit, NEWER] = OFF
        out[found] = unit
        found += 1
        _uncover(rows, links, n_units, np.int64(pick(rows, counts, unit)))
    return found


class Lru(Policy):
    """8 bytes of links a unit, beside the facts."""

    name: ClassVar[str] = "lru"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._links: Words = empty_links(facts.n_units, facts.n_classes)

    def observe(self, events: Words, now: int) -> int:
        f = self.facts
        return int(_observe(f.row_words, f.intent_words, f.counts, f.totals, self._links, events, now))

    def victims(self, slot_class: int, n: int, out: Words) -> int:
        return int(_victims(self.facts.row_words, self.facts.counts, self._links, slot_class, n, out))

    def restore(self, units: NDArray[np.int64]) -> None:
        build_rings(self._links, self.facts, units)

    def assert_consistent(self) -> None:
        assert_rings(self._links, self.facts)
