"""Events and victims one by one: what tests compare and people read. Never used while serving.

`encode` and `decode` are inverse for every event whose columns mean something (`types.event_dtype`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.policies.facts import Words
from penstock.types import NO_UNIT, EventKind, event_dtype

__all__ = ["Committed", "Event", "Evict", "Evicted", "Kept", "Touched", "decode", "decode_victims", "encode"]


@dataclass(frozen=True, slots=True)
class Committed:
    """A block became resident; `parent` is None for the first block of a chain."""

    unit: int
    parent: int | None = None
    slot_class: int = 0
    priority: int = 0
    space: int = 0
    session: int = 0
    tenant: int = 0
    deadline_ms: int = 0
    ttl_ms: int = 0


@dataclass(frozen=True, slots=True)
class Touched:
    """A reader used the block, or what it used has left since."""

    unit: int


@dataclass(frozen=True, slots=True)
class Evicted:
    """The block is gone; its slot is free."""

    unit: int


@dataclass(frozen=True, slots=True)
class Kept:
    """The block was to leave and stays."""

    unit: int


@dataclass(frozen=True, slots=True)
class Evict:
    """What the brain asks for: free this slot, or answer that it is kept."""

    unit: int


Event = Committed | Touched | Evicted | Kept

_KINDS: dict[type, EventKind] = {
    Committed: EventKind.COMMITTED,
    Touched: EventKind.TOUCHED,
    Evicted: EventKind.EVICTED,
    Kept: EventKind.KEPT,
}
_CLASSES: dict[int, type[Touched] | type[Evicted] | type[Kept]] = {
    EventKind.TOUCHED: Touched,
    EventKind.EVICTED: Evicted,
    EventKind.KEPT: Kept,
}
_INTENT = ("priority", "space", "session", "tenant", "deadline_ms", "ttl_ms")


def encode(events: Iterable[Event]) -> NDArray[np.void]:
    """[n] of event_dtype, in the same order."""
    decoded = list(events)
    rows = np.zeros(len(decoded), event_dtype)
    rows["parent"] = NO_UNIT
    for row, event in zip(rows, decoded, strict=True):
        row["kind"], row["unit"] = _KINDS[type(event)], event.unit
        if isinstance(event, Committed):
            row["parent"] = NO_UNIT if event.parent is None else event.parent
            row["slot_class"] = event.slot_class
            for name in _INTENT:
                row[name] = getattr(event, name)
    return rows


def decode(events: NDArray[np.void]) -> list[Event]:
    """The events, in the same order. Raises ValueError for a kind that does not exist."""
    return [_decode_one(row) for row in events]


def decode_victims(units: Words) -> list[Evict]:
    """What `Brain.victims` wrote, in the same order; pass exactly the part that it filled."""
    return [Evict(int(unit)) for unit in units]


def _decode_one(row: np.void) -> Event:
    kind = EventKind(int(row["kind"]))
    unit = int(row["unit"])
    if kind != EventKind.COMMITTED:
        return _CLASSES[kind](unit)
    parent = int(row["parent"])
    intent = {name: int(row[name]) for name in _INTENT}
    return Committed(unit, None if parent == NO_UNIT else parent, int(row["slot_class"]), **intent)
