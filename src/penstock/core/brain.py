"""The brain: one pure state machine from batches of events to batches of victims.

Covers the facts about every slot and the policy that orders them, driven by arrays with time passed in.
Does not touch the pool: who leases a block, and what is really freed, the keeper finds out and reports as
events. The simulator drives the same class. Not thread-safe; one owner.

A round of eviction:

    n = brain.victims(slot_class, 64, out)      # out[:n] are out of the order, still resident
    keeper: READY -> LEAVING, fence, scan the lanes
    brain.observe(answers, now)                 # for each of out[:n], in that order: EVICTED or KEPT
    a block whose child is KEPT is KEPT as well: a child never outlives its parent
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError
from penstock.policies.facts import EVENT_WORDS, RESIDENT, ConsistencyError, Facts, Words, intent_dtype
from penstock.policies.registry import find
from penstock.types import NO_UNIT, EventKind, event_dtype

__all__ = ["Brain", "ConsistencyError"]

_MAX_UNITS = NO_UNIT - 2**16
"""The highest unit numbers are left to policies, for marks and list ends."""


class Brain:
    """State for `n_units` slots, indexed by a slot's first unit, in `n_classes` slot classes.

    Raises ConfigError for a size that cannot be or an unknown policy. Times are integers in milliseconds of
    any clock that does not run backwards.
    """

    def __init__(self, n_units: int, n_classes: int, policy: str = "lru") -> None:
        if not 1 <= n_units <= _MAX_UNITS or not 1 <= n_classes <= 2**15:
            raise ConfigError(
                f"a brain for {n_units} units in {n_classes} classes; use 1 to {_MAX_UNITS} units (a larger "
                "pool needs a larger smallest slot) and 1 to 32768 classes."
            )
        self.facts = Facts.empty(n_units, n_classes)
        self.policy = find(policy)(self.facts)

    def observe(self, events: NDArray[np.void], now: int | float) -> None:
        """Take in a batch ([n] of event_dtype), in order.

        Raises ConsistencyError at an event that cannot be (a commit into a resident slot or under an absent
        parent, an eviction of an absent block or one with children); the events before it are applied, it
        and the rest are not.
        """
        applied = self.policy.observe(_words(events), int(now))
        if applied < len(events):
            raise ConsistencyError(self._why_illegal(events[applied], applied))

    def admit(self, events: NDArray[np.void]) -> NDArray[np.bool_]:
        """[n]: which blocks, described as COMMITTED events but not committed yet, are worth a slot."""
        return self.policy.admit(events)

    def victims(self, slot_class: int, n: int, out: Words, exactly: bool = False) -> int:
        """Pick up to n blocks of the class into `out` in the order they must leave: children before parents.

        Returns how many: fewer than n only if the class holds no more; with `exactly`, n or 0, and 0
        changed nothing. Each picked block is out of the policy's order until EVICTED or KEPT answers it.
        Raises ConfigError for a class that is not there or an `out` that is too short.
        """
        if not 0 <= slot_class < self.facts.n_classes or n > len(out):
            raise ConfigError(
                f"{n} victims of class {slot_class} into room for {len(out)}; pass a larger array and one of "
                f"the {self.facts.n_classes} classes."
            )
        if exactly and n > self.evictable(slot_class):
            return 0
        return self.policy.victims(slot_class, n, out)

    def evictable(self, slot_class: int) -> int:
        """How many blocks of the class are resident and not picked; `victims` can pick exactly that many."""
        resident, picked = self.facts.counts[slot_class]
        return int(resident - picked)

    def restore(
        self,
        units: Words,
        parents: Words,
        classes: Words,
        stamps: NDArray[np.int64] | NDArray[np.uint64],
        intents: NDArray[np.void] | None = None,
    ) -> None:
        """Forget everything and take in the blocks that a segment holds, the smallest stamp as the oldest.

        All arrays are [n]; a parent is a unit or NO_UNIT; `intents` is of intent_dtype. `last_use` becomes
        the stamp and `hits` 0. Raises ConsistencyError, and is then empty, if a unit occurs twice or its
        parent is absent or of another class: leave such blocks out and restore again.
        """
        rows = self.facts.rows
        self.facts.clear()
        try:
            self._check_restore(units, parents, classes)
            rows["flags"][units] = RESIDENT
            rows["slot_class"][units] = classes
            rows["parent"][units] = parents
            rows["last_use"][units] = stamps
            self.facts.intents[units] = np.zeros((), intent_dtype) if intents is None else intents
            parent, children = np.unique(parents[parents != NO_UNIT], return_counts=True)
            rows["children"][parent] = rows["open"][parent] = children
            self.facts.counts[:, 0] = np.bincount(classes, minlength=self.facts.n_classes)
            self.facts.assert_consistent()
        except ConsistencyError:
            self.facts.clear()
            self.policy.restore(np.zeros(0, np.int64))
            raise
        self.policy.restore(units[np.argsort(stamps, kind="stable")].astype(np.int64))

    def assert_consistent(self) -> None:
        """Raise ConsistencyError naming what is wrong with the facts or the policy's order. Reads only."""
        self.facts.assert_consistent()
        self.policy.assert_consistent()

    def _check_restore(self, units: Words, parents: Words, classes: Words) -> None:
        """What NumPy could not index. That parents are there and of the same class the tables show."""
        n_units, n_classes = self.facts.n_units, self.facts.n_classes
        inner = parents[parents != NO_UNIT]
        for what, numbers, limit in (
            ("unit", units, n_units),
            ("parent", inner, n_units),
            ("class", classes, n_classes),
        ):
            if len(numbers) and int(numbers.max()) >= limit:
                raise ConsistencyError(f"{what} {int(numbers.max())} is given, but there are only {limit}")
        times = np.bincount(units, minlength=n_units)
        if times.max() > 1:
            raise ConsistencyError(f"unit {int(times.argmax())} is given {int(times.max())} times")

    def _why_illegal(self, event: np.void, at: int) -> str:
        unit, parent = int(event["unit"]), int(event["parent"])
        known = {int(kind): kind.name for kind in EventKind}
        what = f"event {at}, {known.get(int(event['kind']), 'of unknown kind')} of unit {unit}"
        if unit >= self.facts.n_units:
            return f"{what}: this pool has {self.facts.n_units} units"
        row = self.facts.rows[unit]
        state = "resident" if row["flags"] & RESIDENT else "not resident"
        if int(event["kind"]) == EventKind.COMMITTED:
            where = f"in class {int(event['slot_class'])} under {parent}"
            if row["flags"]:
                return f"{what} {where}: the slot holds a block that has not been evicted"
            return f"{what} {where}: no such class, or the parent is absent or of another class"
        return f"{what}: it is {state} with {int(row['children'])} resident children"


def _words(events: NDArray[np.void]) -> Words:
    if events.dtype != event_dtype or not events.flags.c_contiguous:
        raise TypeError(f"events are a contiguous array of event_dtype, not {events.dtype}")
    return events.view(np.uint32).reshape(len(events), EVENT_WORDS)
