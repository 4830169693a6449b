"""A Hypothesis state machine that drives a brain beside a plain model and compares them after every step.

`FactsModel` knows residency and chains, which hold for every policy; a subclass that overrides `predict` also
says which blocks must leave, and in which order. `policies.PolicySuite` runs the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.actions import Committed, Event, Evicted, Kept, Touched, encode
from penstock.core.brain import Brain, ConsistencyError
from penstock.types import NO_UNIT

__all__ = ["FactsModel", "PolicyMachine"]

N_UNITS = 20
N_CLASSES = 2


class FactsModel:
    """What every policy must respect, in dicts. Events given to it are legal."""

    def __init__(self) -> None:
        self.parent: dict[int, int | None] = {}
        self.slot_class: dict[int, int] = {}
        self.hits: dict[int, int] = {}
        self.picked: list[int] = []
        """In the order in which they were picked, not answered yet."""

    def observe(self, events: list[Event]) -> None:
        """Take in one batch."""
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Take in one event."""
        unit = event.unit
        if isinstance(event, Committed):
            self.parent[unit], self.slot_class[unit], self.hits[unit] = event.parent, event.slot_class, 0
        elif isinstance(event, Touched):
            if unit in self.hits:
                self.hits[unit] += 1
        else:
            if unit in self.picked:
                self.picked.remove(unit)
            if isinstance(event, Evicted):
                del self.parent[unit], self.slot_class[unit], self.hits[unit]

    def predict(self, slot_class: int, n: int) -> list[int] | None:
        """The victims that must be picked now, or None where only the rules below count."""
        return None

    def pick(self, units: list[int], slot_class: int, n: int) -> None:
        """Check that these may be picked, children first and no fewer than possible, and note them."""
        possible = [u for u, c in self.slot_class.items() if c == slot_class and u not in self.picked]
        assert len(units) == min(n, len(possible)), f"{len(units)} picked of {len(possible)}, {n} wanted"
        for unit in units:
            assert unit in possible and unit not in self.picked, f"unit {unit} may not be picked"
            assert not self.open_children(unit), f"unit {unit} is picked before {self.open_children(unit)}"
            self.picked.append(unit)

    def children(self, unit: int) -> list[int]:
        """Resident children."""
        return [child for child, parent in self.parent.items() if parent == unit]

    def open_children(self, unit: int) -> list[int]:
        """Resident children that are not picked."""
        return [child for child in self.children(unit) if child not in self.picked]

    def path(self, unit: int) -> list[int]:
        """The chain from its head to this block."""
        above = self.parent[unit]
        return [*([] if above is None else self.path(above)), unit]


class PolicyMachine(RuleBasedStateMachine):
    """Commits, touches, picks, answers and restarts in any order, on 20 slots of two classes."""

    make: ClassVar[Callable[[int, int], Brain]]
    """Set by the suite: a brain for so many units and classes."""
    model_type: ClassVar[type[FactsModel]] = FactsModel
    foreign_evictions: ClassVar[bool] = True
    """Whether blocks also leave that the policy did not pick (a slab is cleared)."""

    def __init__(self) -> None:
        super().__init__()
        self.brain = type(self).make(N_UNITS, N_CLASSES)
        self.model = self.model_type()
        self.now = 0

    def tell(self, events: list[Event]) -> None:
        """One batch to both."""
        self.now += 1
        self.brain.observe(encode(events), self.now)
        self.model.observe(events)

    @rule(data=st.data(), slot_class=st.integers(0, N_CLASSES - 1), length=st.integers(1, 6))
    def commit(self, data: st.DataObject, slot_class: int, length: int) -> None:
        free = [unit for unit in range(N_UNITS) if unit not in self.model.parent]
        under = [u for u, c in self.model.slot_class.items() if c == slot_class and u not in self.model.picked]
        parent = data.draw(st.sampled_from([None, *under]))
        events: list[Event] = []
        for unit in free[:length]:
            events.append(Committed(unit, parent, slot_class, session=self.now, priority=-unit))
            parent = unit
        self.split(data, events)

    @rule(data=st.data(), units=st.lists(st.integers(0, N_UNITS - 1), max_size=8))
    def touch_anything(self, data: st.DataObject, units: list[int]) -> None:
        self.split(data, [Touched(unit) for unit in units])

    @precondition(lambda self: self.model.parent)
    @rule(data=st.data())
    def touch_chains(self, data: st.DataObject) -> None:
        tails = data.draw(st.lists(st.sampled_from(sorted(self.model.parent)), min_size=1, max_size=3))
        self.split(data, [Touched(unit) for tail in tails for unit in self.model.path(tail)])

    def split(self, data: st.DataObject, events: list[Event]) -> None:
        """As one batch, or cut into two: what a batch means may not depend on more than its order."""
        cut = data.draw(st.integers(0, len(events)))
        for batch in (events[:cut], events[cut:]):
            self.tell(batch)

    @rule(
        data=st.data(),
        slot_class=st.integers(0, N_CLASSES - 1),
        n=st.integers(0, N_UNITS),
        exactly=st.booleans(),
        then_answer=st.booleans(),
    )
    def pick(self, data: st.DataObject, slot_class: int, n: int, exactly: bool, then_answer: bool) -> None:
        out = np.full(N_UNITS, NO_UNIT, np.uint32)
        if exactly and n > self.brain.evictable(slot_class):
            assert self.brain.victims(slot_class, n, out, exactly=True) == 0
            return
        expected = self.model.predict(slot_class, n)
        found = self.brain.victims(slot_class, n, out, exactly)
        units = [int(unit) for unit in out[:found]]
        self.model.pick(units, slot_class, n)
        assert expected is None or units == expected
        assert (out[found:] == NO_UNIT).all()
        if then_answer:
            self.agrees()
            self.give_answers(data)

    @precondition(lambda self: self.model.picked)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.give_answers(data)

    def give_answers(self, data: st.DataObject) -> None:
        """For everything picked so far, in that order; some of it is held, and what must stay with it stays."""
        picked = self.model.picked
        held = data.draw(st.sets(st.sampled_from(picked), max_size=3)) if picked else set()
        events: list[Event] = []
        kept: set[int] = set()
        for unit in picked:
            if unit in held or any(c in kept or c not in picked for c in self.model.children(unit)):
                kept.add(unit)
            events.append(Kept(unit) if unit in kept else Evicted(unit))
        self.tell(events)

    @precondition(lambda self: self.model.parent)
    @rule(data=st.data())
    def keep_unpicked(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.model.parent)))
        if unit not in self.model.picked:
            self.tell([Kept(unit)])

    @precondition(lambda self: self.foreign_evictions and self.model.parent)
    @rule(data=st.data())
    def evict_unpicked(self, data: st.DataObject) -> None:
        """A block and all that hangs on it, children first, picked or not."""
        doomed = [data.draw(st.sampled_from(sorted(self.model.parent)))]
        for unit in doomed:
            doomed.extend(self.model.children(unit))
        self.tell([Evicted(unit) for unit in reversed(doomed)])

    @rule(data=st.data())
    def illegal(self, data: st.DataObject) -> None:
        """An event that cannot be is named and changes nothing."""
        bad: list[Event] = [Committed(N_UNITS), Touched(N_UNITS), Evicted(NO_UNIT)]
        for unit in range(N_UNITS):
            if unit not in self.model.parent:
                bad += [Kept(unit), Evicted(unit), Committed(unit, unit), Committed(unit, None, N_CLASSES)]
            else:
                bad += [Committed(unit)] + [Evicted(unit)] * bool(self.model.children(unit))
        before = self.state()
        event = data.draw(st.sampled_from(bad))
        with pytest.raises(ConsistencyError, match=f"unit {event.unit}"):
            self.brain.observe(encode([event]), self.now + 1)
        assert all(np.array_equal(a, b) for a, b in zip(before, self.state(), strict=True))

    def state(self) -> list[Any]:
        facts = self.brain.facts
        return [facts.row_words.copy(), facts.intent_words.copy(), facts.counts.copy(), facts.totals.copy()]

    @invariant()
    def agrees(self) -> None:
        """Checked after every step."""
        self.brain.assert_consistent()
        facts, model = self.brain.facts, self.model
        assert set(np.flatnonzero(facts.resident()).tolist()) == set(model.parent)
        assert set(np.flatnonzero(facts.picked()).tolist()) == set(model.picked)
        for unit, parent in model.parent.items():
            row = facts.rows[unit]
            assert row["parent"] == (NO_UNIT if parent is None else parent)
            assert row["slot_class"] == model.slot_class[unit]
            assert row["hits"] == model.hits[unit]
            assert row["children"] == len(model.children(unit))
            assert row["open"] == len(model.open_children(unit))
            assert facts.intents[unit]["priority"] == -unit
