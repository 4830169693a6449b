"""What the brain knows of each block, and the one place that changes it: a table row per slot, updated by
events.

Covers residency, chains (parent, children), use, intent, and the legality of events. Does not cover the
order in which blocks leave; that is a policy's own state (`base.py`, `lru.py`). A policy's kernels call the
inline kernels here for every event and every victim, so that each row is visited once while its cache line
is hot.

A slot's life, as flags see it (`open` counts a block's children that are resident and not picked):

    absent --COMMITTED--> RESIDENT --picked as victim--> RESIDENT|PICKED --EVICTED--> absent
                              ^                                |
                              +------------- KEPT -------------+
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import PenstockError
from penstock.jit import inline_kernel
from penstock.types import NO_UNIT, EventKind, event_dtype

__all__ = [
    "ENTERED",
    "EVENT_UNIT",
    "ILLEGAL",
    "LEFT",
    "NOTHING",
    "RETURNED",
    "ROW_OPEN",
    "ROW_PARENT",
    "USED",
    "ConsistencyError",
    "Facts",
    "apply_event",
    "expect_none",
    "intent_dtype",
    "pick",
    "row_dtype",
]


class ConsistencyError(PenstockError):
    """An event contradicts what the brain knows, or its state contradicts itself; the text says which unit.

    The remedy is always the same: `Brain.restore` from the segment's slot records.
    """


row_dtype = np.dtype(
    [
        ("flags", "<u4"),
        ("slot_class", "<u4"),
        ("parent", "<u4"),
        ("children", "<u4"),
        ("open", "<u4"),
        ("hits", "<u4"),
        ("last_use", "<u8"),
    ]
)
"""One slot, 32 bytes: half a cache line. `parent` and `slot_class` outlive the block until the slot is used
again.
"""

intent_dtype = np.dtype(
    [
        ("priority", "<i4"),
        ("space", "<u4"),
        ("session", "<u8"),
        ("tenant", "<u8"),
        ("deadline_ms", "<u8"),
        ("ttl_ms", "<u8"),
    ]
)
"""What the owner said at commit: the events' columns from `priority` on, in their order."""

# Kernels see both tables and the events as rows of 4-byte words; these are word numbers.
ROW_FLAGS, ROW_CLASS, ROW_PARENT, ROW_CHILDREN, ROW_OPEN, ROW_HITS, ROW_LAST_USE = range(7)
EVENT_KIND, EVENT_UNIT, EVENT_PARENT, EVENT_CLASS, EVENT_INTENT = range(5)
ROW_WORDS = row_dtype.itemsize // 4
EVENT_WORDS = event_dtype.itemsize // 4
INTENT_WORDS = intent_dtype.itemsize // 4

RESIDENT = 1
PICKED = 2

# Columns of Facts.counts.
COUNT_RESIDENT, COUNT_PICKED = 0, 1

# What an event did. A policy orders blocks by these, never by the event's kind.
ILLEGAL = -1
NOTHING = 0
"""A touch of a block that has left or is picked."""
ENTERED = 1
USED = 2
LEFT = 3
RETURNED = 4
"""It was picked and stays; it counts as used now."""

_COMMITTED = int(EventKind.COMMITTED)
_TOUCHED = int(EventKind.TOUCHED)
_EVICTED = int(EventKind.EVICTED)
_KEPT = int(EventKind.KEPT)
_NONE = NO_UNIT

Words = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Facts:
    """The tables, as named columns (`rows`, `intents`) and as the words that kernels take; both are the
    same memory.
    """

    rows: NDArray[np.void]
    """[n_units] of row_dtype."""
    intents: NDArray[np.void]
    """[n_units] of intent_dtype; meaningful while the block is resident."""
    row_words: Words
    intent_words: Words
    counts: NDArray[np.int64]
    """[n_classes, 2]: resident blocks, picked blocks."""
    totals: NDArray[np.int64]
    """[5], by EventKind: events taken in; [0] counts touches of blocks that had left."""

    @classmethod
    def empty(cls, n_units: int, n_classes: int) -> Facts:
        """No block resident. Memory is 72 bytes a unit, claimed from the system as slots are used."""
        row_words = _aligned_zeros(n_units, ROW_WORDS)
        intent_words = _aligned_zeros(n_units, INTENT_WORDS)
        return cls(
            rows=row_words.view(row_dtype).reshape(n_units),
            intents=intent_words.view(intent_dtype).reshape(n_units),
            row_words=row_words,
            intent_words=intent_words,
            counts=np.zeros((n_classes, 2), np.int64),
            totals=np.zeros(len(EventKind) + 1, np.int64),
        )

    @property
    def n_units(self) -> int:
        return len(self.rows)

    @property
    def n_classes(self) -> int:
        return len(self.counts)

    def resident(self) -> NDArray[np.bool_]:
        """[n_units], a new array."""
        found: NDArray[np.bool_] = (self.rows["flags"] & RESIDENT) != 0
        return found

    def picked(self) -> NDArray[np.bool_]:
        """[n_units], a new array: chosen as victims and not answered yet."""
        found: NDArray[np.bool_] = (self.rows["flags"] & PICKED) != 0
        return found

    def clear(self) -> None:
        """Forget every block; the totals stay."""
        # Rows that were never used are left alone: writing zeros would claim their memory.
        rows = self.rows
        self.rows[(rows["flags"] | rows["children"] | rows["open"]) != 0] = 0
        self.counts[:] = 0

    def assert_consistent(self) -> None:
        """Raise ConsistencyError naming the first unit or class that contradicts another. Reads only;
        vectorised.
        """
        resident, picked = self.resident(), self.picked()
        parent, classes = self.rows["parent"], self.rows["slot_class"]
        expect_none("picked but not resident", ~resident & (self.rows["flags"] != 0))
        expect_none("class out of range", resident & (classes >= self.n_classes))
        for column, members in ((COUNT_RESIDENT, resident), (COUNT_PICKED, picked)):
            counted = np.bincount(classes[members], minlength=self.n_classes)
            if not np.array_equal(counted, self.counts[:, column]):
                raise ConsistencyError(f"blocks per class are {counted}, but counted as {self.counts[:, column]}")
        child = np.flatnonzero(resident & (parent != NO_UNIT))
        of = parent[child].astype(np.int64)
        expect_none("parent out of range", of >= self.n_units, child)
        expect_none("parent not resident", ~resident[of], child)
        expect_none("parent of another class", classes[of] != classes[child], child)
        children = np.bincount(of, minlength=self.n_units)
        still_open = np.bincount(of[~picked[child]], minlength=self.n_units)
        expect_none("children miscounted", children != self.rows["children"])
        expect_none("open children miscounted", still_open != self.rows["open"])
        self._assert_acyclic(child, of)

    def _assert_acyclic(self, child: NDArray[np.int64], of: NDArray[np.int64]) -> None:
        ancestor = np.full(self.n_units + 1, self.n_units)
        ancestor[child] = of
        # Each round doubles the distance; a path longer than all blocks never ends.
        for _ in range(len(child).bit_length()):
            ancestor = ancestor[ancestor]
        expect_none("its own ancestor", ancestor[:-1] != self.n_units)


def expect_none(what: str, wrong: NDArray[np.bool_], units: NDArray[np.int64] | None = None) -> None:
    """Raise ConsistencyError naming the first unit for which `wrong` holds; `units` are the units it speaks
    of.
    """
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise ConsistencyError(f"unit {at if units is None else int(units[at])}: {what}")


def _aligned_zeros(n_rows: int, words: int) -> Words:
    # NumPy's large arrays start 16 bytes into a cache line: every second row of 32 bytes would lie in two.
    raw = np.zeros(n_rows * words + 16, np.uint32)
    skip = (-raw.ctypes.data % 64) // 4
    return raw[skip : skip + n_rows * words].reshape(n_rows, words)


@inline_kernel
def apply_event(rows: Any, intents: Any, counts: Any, totals: Any, events: Any, i: Any, now: Any) -> Any:
    """Apply event `i`; returns what it did. ILLEGAL changed nothing."""
    kind = events[i, EVENT_KIND]
    unit = events[i, EVENT_UNIT]
    if unit >= len(rows):
        return ILLEGAL
    flags = rows[unit, ROW_FLAGS]
    if kind == _TOUCHED:
        did = NOTHING
        if flags & RESIDENT:
            rows[unit, ROW_HITS] += 1
            _use(rows, unit, now)
            if flags == RESIDENT:
                did = USED
        else:
            totals[0] += 1
    elif kind == _COMMITTED:
        did = _commit(rows, intents, counts, events, i, unit, now)
    elif kind == _EVICTED:
        did = _evict(rows, counts, unit, flags)
    elif kind == _KEPT and flags & RESIDENT:
        did = _keep(rows, counts, unit, flags, now)
    else:
        did = ILLEGAL
    if did != ILLEGAL:
        totals[kind] += 1
    return did


@inline_kernel
def pick(rows: Any, counts: Any, unit: Any) -> Any:
    """Mark a victim. The caller has checked that it has no open children. Returns its parent's unit or
    NO_UNIT.
    """
    rows[unit, ROW_FLAGS] |= PICKED
    counts[rows[unit, ROW_CLASS], COUNT_PICKED] += 1
    parent = rows[unit, ROW_PARENT]
    if parent != _NONE:
        rows[parent, ROW_OPEN] -= 1
    return parent


@inline_kernel
def _commit(rows: Any, intents: Any, counts: Any, events: Any, i: Any, unit: Any, now: Any) -> Any:
    parent = events[i, EVENT_PARENT]
    slot_class = events[i, EVENT_CLASS]
    if rows[unit, ROW_FLAGS] != 0 or slot_class >= len(counts):
        return ILLEGAL
    if parent != _NONE:
        if parent >= len(rows) or parent == unit or rows[parent, ROW_FLAGS] & RESIDENT == 0:
            return ILLEGAL
        if rows[parent, ROW_CLASS] != slot_class:
            return ILLEGAL
        rows[parent, ROW_CHILDREN] += 1
        rows[parent, ROW_OPEN] += 1
    rows[unit, ROW_FLAGS] = RESIDENT
    rows[unit, ROW_CLASS] = slot_class
    rows[unit, ROW_PARENT] = parent
    rows[unit, ROW_CHILDREN] = 0
    rows[unit, ROW_OPEN] = 0
    rows[unit, ROW_HITS] = 0
    _use(rows, unit, now)
    for word in range(INTENT_WORDS):
        intents[unit, word] = events[i, EVENT_INTENT + word]
    counts[slot_class, COUNT_RESIDENT] += 1
    return ENTERED


@inline_kernel
def _evict(rows: Any, counts: Any, unit: Any, flags: Any) -> Any:
    if flags & RESIDENT == 0 or rows[unit, ROW_CHILDREN] != 0:
        return ILLEGAL
    slot_class = rows[unit, ROW_CLASS]
    parent = rows[unit, ROW_PARENT]
    counts[slot_class, COUNT_RESIDENT] -= 1
    if flags & PICKED:
        counts[slot_class, COUNT_PICKED] -= 1
    elif parent != _NONE:
        rows[parent, ROW_OPEN] -= 1
    if parent != _NONE:
        rows[parent, ROW_CHILDREN] -= 1
    rows[unit, ROW_FLAGS] = 0
    return LEFT


@inline_kernel
def _keep(rows: Any, counts: Any, unit: Any, flags: Any, now: Any) -> Any:
    _use(rows, unit, now)
    if flags & PICKED == 0:
        return USED
    parent = rows[unit, ROW_PARENT]
    if parent != _NONE:
        rows[parent, ROW_OPEN] += 1
    counts[rows[unit, ROW_CLASS], COUNT_PICKED] -= 1
    rows[unit, ROW_FLAGS] = RESIDENT
    return RETURNED


@inline_kernel
def _use(rows: Any, unit: Any, now: Any) -> None:
    rows[unit, ROW_LAST_USE] = now & 0xFFFFFFFF
    rows[unit, ROW_LAST_USE + 1] = now >> 32
