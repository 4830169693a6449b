"""Least recently used, tail-first within a chain. Only the order; what is true of a block is in `facts.py`.

The block that leaves next is the one without resident children whose own last use is oldest. A doubly linked
ring per slot class holds the blocks from newest to oldest. A block that reaches the old end while it still has
children is passed over: it is taken off the ring, and when its last child leaves it goes back to the old end,
being older than all that was never passed over. So a chain's blocks leave one after the other from its tail, a
block is passed over at most once per use, and a victim costs amortised constant time whatever the chains look
like. (One call may pass over many blocks: as many as were used before the victim and still have children.)
Where evictions that this policy did not choose uncover several blocks, those go in the order of uncovering.

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
    ConsistencyError,
    Facts,
    Words,
    apply_event,
    expect_none,
    pick,
)
from penstock.types import NO_UNIT

__all__ = ["Lru"]

NEWER, OLDER = 0, 1
# Values of a block's NEWER link while it is not on a ring. No unit can have these numbers.
OFF = NO_UNIT
PASSED = NO_UNIT - 1


@inline_kernel
def _unlink(links: Any, unit: Any) -> Any:
    newer, older = links[unit, NEWER], links[unit, OLDER]
    links[newer, OLDER] = older
    links[older, NEWER] = newer


@inline_kernel
def _put_behind(links: Any, newer: Any, unit: Any) -> Any:
    older = links[newer, OLDER]
    links[unit, NEWER] = newer
    links[unit, OLDER] = older
    links[newer, OLDER] = unit
    links[older, NEWER] = unit


@inline_kernel
def _uncover(rows: Any, links: Any, n_units: Any, unit: Any) -> Any:
    """A block lost a child: if it was the last one and the block had been passed over, it is the oldest
    again.
    """
    if unit != OFF and rows[unit, ROW_OPEN] == 0 and links[unit, NEWER] == PASSED:
        ring = n_units + rows[unit, ROW_CLASS]
        _put_behind(links, links[ring, NEWER], unit)


@kernel(
    "int64(uint32[:, ::1], uint32[:, ::1], int64[:, ::1], int64[::1], uint32[:, ::1], uint32[:, ::1], int64)"
)
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
                _unlink(links, unit)
            _put_behind(links, parent if follows else n_units + np.int64(rows[unit, ROW_CLASS]), unit)
            behind = unit
        elif did == LEFT:
            if links[unit, NEWER] < PASSED:
                _unlink(links, unit)
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
        _unlink(links, unit)
        if rows[unit, ROW_OPEN] != 0:
            links[unit, NEWER] = PASSED
            continue
        links[unit, NEWER] = OFF
        out[found] = unit
        found += 1
        _uncover(rows, links, n_units, np.int64(pick(rows, counts, unit)))
    return found


class Lru(Policy):
    """8 bytes of links a unit. `links[n_units + slot_class]` is the fixed node that closes the class's
    ring.
    """

    name: ClassVar[str] = "lru"

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._links: Words = np.empty((facts.n_units + facts.n_classes, 2), np.uint32)
        self._clear()

    def _clear(self) -> None:
        n_units = self.facts.n_units
        self._links[:n_units] = OFF
        self._links[n_units:] = np.arange(n_units, len(self._links))[:, None]

    def observe(self, events: Words, now: int) -> int:
        f = self.facts
        return int(_observe(f.row_words, f.intent_words, f.counts, f.totals, self._links, events, now))

    def victims(self, slot_class: int, n: int, out: Words) -> int:
        return int(_victims(self.facts.row_words, self.facts.counts, self._links, slot_class, n, out))

    def restore(self, units: NDArray[np.int64]) -> None:
        self._clear()
        classes = self.facts.rows["slot_class"][units]
        for slot_class in range(self.facts.n_classes):
            node = self.facts.n_units + slot_class
            ring = np.concatenate(([node], units[classes == slot_class], [node]))
            self._links[ring[:-1], NEWER] = ring[1:]
            self._links[ring[1:], OLDER] = ring[:-1]

    def assert_consistent(self) -> None:
        """Raise ConsistencyError naming a block that is not where it must be. Reads only; vectorised."""
        n_units, links = self.facts.n_units, self._links.astype(np.int64)
        expected = self.facts.resident() & ~self.facts.picked()
        linked = links[:n_units, NEWER] < PASSED
        passed = links[:n_units, NEWER] == PASSED
        expect_none("in the order and not in it", expected != (linked | passed))
        expect_none("passed over without children", passed & (self.facts.rows["open"] == 0))
        nodes = np.concatenate((np.flatnonzero(linked), np.arange(n_units, len(links))))
        if (links[nodes] >= len(links)).any():
            raise ConsistencyError("a ring's link points outside the pool")
        for there, back in ((NEWER, OLDER), (OLDER, NEWER)):
            expect_none("linked one way only", links[links[nodes, there], back] != nodes, nodes)
        expect_none(
            "on no ring or another class's", self._ring_of(links, nodes) != self._own_ring(nodes), nodes
        )

    def _own_ring(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        own = nodes.copy()
        blocks = nodes < self.facts.n_units
        own[blocks] = self.facts.n_units + self.facts.rows["slot_class"][nodes[blocks]]
        return own

    def _ring_of(self, links: NDArray[np.int64], nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        ahead = np.arange(len(links))
        blocks = nodes[nodes < self.facts.n_units]
        ahead[blocks] = links[blocks, OLDER]
        # Each round doubles the distance looked ahead; a ring's own node looks at itself.
        for _ in range(len(nodes).bit_length()):
            ahead = ahead[ahead]
        return ahead[nodes]
