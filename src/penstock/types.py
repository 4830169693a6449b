"""The nouns that every layer shares: reasons, intent, and the events and actions of the brain.

Imports the standard library, numpy and msgspec only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np

__all__ = [
    "NO_UNIT",
    "Drop",
    "EventKind",
    "Eviction",
    "FetchEnd",
    "Intent",
    "Miss",
    "Urgency",
    "WriteRule",
    "event_dtype",
]

NO_UNIT = 0xFFFFFFFF
"""No slot: the parent of the first block of a chain, the end of a list."""


class Miss(IntEnum):
    """Why a lookup stopped, or why a block that was found was not used. The values are part of the segment's format."""

    NONE = 0
    """Nothing was missed: every block asked for was found."""
    ABSENT = 1
    BUSY = 2
    """Found, but leaving again and again while it was being leased."""
    LEASE_TABLE_FULL = 3
    CHECKSUM = 4
    CHANGED = 5
    """The slot's generation changed between lease and read."""
    SPACE = 6
    """The key is there, but recorded for another space or length."""
    FORKED = 7
    NO_KEEPER = 8
    SKIPPED = 9
    """The request asked not to load, or the hit was shorter than its minimum."""
    CLOSED = 10


class Drop(IntEnum):
    """Why a block that was offered is not in the pool. The values are part of the segment's format."""

    NONE = 0
    NO_ROOM = 1
    ORPHAN = 2
    """The parent block is not in the pool."""
    DUPLICATE = 3
    """Another copy of the same key is already there; the block is in the pool."""
    STALE = 4
    """Wrong generation: the grant was already used or taken back."""
    BAD_LENGTH = 5
    BAD_SPACE = 6
    BAD_SLOT = 7
    """Not a slot, or not of the space's class."""
    NOT_OWNER = 8
    """Granted to another client, or the lane's epoch is over."""
    RING_FULL = 9
    DIRECTORY_FULL = 10
    FORKED = 11
    NO_KEEPER = 12
    SKIPPED = 13
    CLOSED = 14
    BAD_ENTRY = 15
    """Garbage in a ring."""
    ABORTED = 16


class Eviction(IntEnum):
    """Why a block left the pool."""

    CAPACITY = 0
    SLAB = 1
    """Its whole slab was given to another slot size."""
    DUPLICATE = 2
    """A restart found two copies of one key."""
    CHECKSUM = 3
    """Its bytes were damaged, or it continues a chain of such a block."""
    FORGOTTEN = 4
    """A client asked for it, or it continues a chain of such a block."""


class WriteRule(StrEnum):
    """When blocks are written to a tier below the pool."""

    THROUGH = "through"
    """As soon as they are committed."""
    SECOND_USE = "second-use"
    """Once they were used again: keeps what is used once off a disk that wears."""
    EVICTION = "eviction"
    """When they are about to leave the tier above."""
    NEVER = "never"
    """Read only."""


class Urgency(IntEnum):
    """What a move is for; the smaller goes first."""

    FETCH = 0
    """Somebody waits for it."""
    PREFETCH = 1
    WRITE_BACK = 2


class FetchEnd(IntEnum):
    """Why a fetch ended where it did."""

    DONE = 0
    """Every block that was asked for is in the pool."""
    ABSENT = 1
    """No tier has the next block."""
    DEADLINE = 2
    NO_ROOM = 3
    """The pool made no room in time."""
    READ_FAILED = 4
    """A tier has the block, or may have it, and could not be read."""
    DAMAGED = 5
    """Every copy of the next block had a wrong checksum; they were dropped."""
    CANCELLED = 6
    NO_TIERS = 7
    """This pool has no tiers below it, or what moves their blocks is not running."""
    BUSY = 8
    """Too many fetches at once."""


class EventKind(IntEnum):
    """What the brain is told (one row each, in batches)."""

    COMMITTED = 1
    TOUCHED = 2
    EVICTED = 3
    KEPT = 4
    """A victim that a lease still protects: it stays, and counts as used now."""


event_dtype = np.dtype(
    [
        ("kind", "<u4"),
        ("unit", "<u4"),
        ("parent", "<u4"),
        ("slot_class", "<u4"),
        ("priority", "<i4"),
        ("space", "<u4"),
        ("session", "<u8"),
        ("tenant", "<u8"),
        ("deadline_ms", "<u8"),
        ("ttl_ms", "<u8"),
    ],
    align=True,
)
"""One event. `unit` names the slot by its first unit; `parent` is the parent's slot or NO_UNIT; `session` and `tenant`
are 8-byte digests of the names; `deadline_ms` is Unix time, 0 for none. All but kind, unit, parent and slot_class are
set for COMMITTED only."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What an owner says about its blocks. Accepted and recorded with every block; today's policy (LRU) reads none."""

    session: str = ""
    tenant: str = ""
    priority: int = 0
    """Higher is more valuable; -2**31 .. 2**31 - 1."""
    deadline_s: float | None = None
    """Unix time by which the blocks are wanted."""
    ttl_s: float | None = None
    """Seconds after the last use after which the blocks are worthless."""
