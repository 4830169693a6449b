"""What the tiering brain knows, as tables: one row per key that it remembers, whether or not the pool holds the block.

Covers the columns, their memory and the lists that run through them. What changes them is `tier_steps.py`; what is
written when, `tiering.py`.

A row (node 1, 2, ..; 0 is none) is in one of these states:

    resident   the pool holds the block
    ghost      it left the pool; its uses and where it lies below are remembered, on a ring, oldest forgotten first
    pinned     not resident, but the parent of resident blocks or still being written: never forgotten
    root       the key before the first block of a space's chains: every tier "has" it

and, where resident, on a ring of its slot class from newest to oldest use, of which the old end may be marked COLD: as
far as the `EVICTION` rule's hand has come.

For each tier a node is besides on at most one of the tier's lists: 0 holds what can be written now, list k what waits
for its k-th retry. Only blocks whose parent the tier has are on one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_CLASSES", "MAX_TIERS", "MAX_TRIES", "TierTable"]

MAX_TIERS = 64
"""The bits of a u64."""
MAX_CLASSES = 2**15
"""As many slot classes as the brain takes."""
MAX_TRIES = 4
"""How often a refused write is tried again before the block has to be used again first."""
_SPARE = 2**10
"""Rows for roots beside all others: one per space ever seen; a segment has 256 at a time."""

# Columns of `wide`, [nodes, 6] u64.
KEY0, KEY1, BELOW, ADMITTED, TENANT, GENERATION = range(6)
WIDE_WORDS = 6

# Columns of `slim`, [nodes + 1 + MAX_CLASSES, 14] u32; the rows behind the nodes close the rings. NEWER and OLDER are
# where `policies/ring.py` has them. UNIT is the unit plus 1; FLYING the tier plus 1.
(
    NEWER, OLDER, UNIT, PARENT, CHILD, NEXT, PREVIOUS, CHILDREN, USES, SPACE, CLASS, FLAGS, FLYING, COPIES,
) = range(14)  # fmt: skip
SLIM_WORDS = 14

# Columns of `legs`, [tiers, nodes, 5] u32: a node's place on the tier's lists (0: on none, k + 1: on list k), refusals
# in a row, and how many uses it must have before it is written there again (0: no such condition).
AHEAD, BEHIND, PLACE, TRIES, BAR = range(5)
LEG_WORDS = 5

# Values of FLAGS.
RESIDENT, COLD, GHOST, ROOT, STALE = 1, 2, 4, 8, 16
"""STALE: what is being written will not be believed: the tier dropped the block, or lost everything, meanwhile."""

# Columns of `lists`, [tiers, 1 + MAX_TRIES, 3], and of `tiers`, [tiers, 2].
HEAD, TAIL, LENGTH = range(3)
IN_FLIGHT, WAITING = range(2)

# Entries of `masks`: tiers as bits.
THROUGH, SECOND_USE, EVICTION, WRITABLE, UP, ALL = range(6)

# Columns of `classes`, [MAX_CLASSES, 3]: the newest COLD node, how many there are, resident blocks.
HAND, COLD_COUNT, RESIDENTS = range(3)

# Entries of `totals`.
(
    FREE, HIGH, GHOSTS, GHOST_LIMIT, RESIDENT_COUNT, ADMITTED_TOTAL, STORED_TOTAL, REFUSED_TOTAL, GAVE_UP,
    KEPT_OFF, LOST, DROPPED, UNKNOWN,
) = range(13)  # fmt: skip

Table = tuple[Any, ...]


@dataclass(slots=True)
class TierTable:
    """The arrays by name, and as the tuple that compiled steps take (`WIDE_` .. `TOTALS_` are its indices)."""

    n_units: int
    n_tiers: int
    ghosts: int
    wide: NDArray[np.uint64] = field(init=False)
    slim: NDArray[np.uint32] = field(init=False)
    legs: NDArray[np.uint32] = field(init=False)
    due: NDArray[np.int64] = field(init=False)
    """[tiers, nodes]: when a retry is due, in milliseconds."""
    index: NDArray[np.uint32] = field(init=False)
    """Open addressing over the keys, a power of two of entries, linear probing."""
    node_of: NDArray[np.uint32] = field(init=False)
    """[n_units]."""
    lists: NDArray[np.int64] = field(init=False)
    tiers: NDArray[np.int64] = field(init=False)
    masks: NDArray[np.uint64] = field(init=False)
    order: NDArray[np.int64] = field(init=False)
    """The writable tiers, in the order in which further copies go to them."""
    classes: NDArray[np.int64] = field(init=False)
    totals: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        # Resident blocks, one absent parent for each, as many being written while they leave, ghosts, roots. Large
        # zeros are not claimed from the system before they are written to.
        nodes = 3 * self.n_units + self.ghosts + _SPARE
        self.wide = np.zeros((nodes, WIDE_WORDS), np.uint64)
        self.slim = np.zeros((nodes + 1 + MAX_CLASSES, SLIM_WORDS), np.uint32)
        self.legs = np.zeros((self.n_tiers, nodes, LEG_WORDS), np.uint32)
        self.due = np.zeros((self.n_tiers, nodes), np.int64)
        self.index = np.zeros(1 << (nodes + nodes // 3).bit_length(), np.uint32)
        self.node_of = np.zeros(self.n_units, np.uint32)
        self.lists = np.zeros((self.n_tiers, 1 + MAX_TRIES, 3), np.int64)
        self.tiers = np.zeros((self.n_tiers, 2), np.int64)
        self.masks = np.zeros(6, np.uint64)
        self.order = np.zeros(0, np.int64)
        self.classes = np.zeros((MAX_CLASSES, 3), np.int64)
        self.totals = np.zeros(13, np.int64)
        self.totals[GHOST_LIMIT] = self.ghosts

    def all(self) -> Table:
        return (
            self.wide, self.slim, self.legs, self.due, self.index, self.node_of, self.lists, self.tiers, self.masks,
            self.order, self.classes, self.totals,
        )  # fmt: skip


(
    WIDE_, SLIM_, LEGS_, DUE_, INDEX_, NODE_OF_, LISTS_, TIERS_, MASKS_, ORDER_, CLASSES_, TOTALS_,
) = range(12)  # fmt: skip
