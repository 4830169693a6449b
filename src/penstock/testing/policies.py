"""The conformance suite of policies: what must hold whatever the order in which blocks leave.

    class TestMine(PolicySuite):
        policy = "mine"

A policy that is not in the registry, or that is wrapped, overrides `make` instead.
"""

from __future__ import annotations

import random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.core.actions import Committed, Event, Evict, Evicted, Kept, Touched, decode_victims, encode
from penstock.core.brain import Brain, ConsistencyError
from penstock.errors import ConfigError
from penstock.testing.policy_machine import PolicyMachine
from penstock.testing.replay import Replay, belady_hits
from penstock.types import NO_UNIT

__all__ = ["PolicySuite", "synthetic_requests"]


def synthetic_requests(n: int, seed: int = 0) -> list[list[int]]:
    """n requests of conversations that share prompts, return later and grow; the same for the same seed."""
    rng = random.Random(seed)
    prompts = [[1000 * p + i for i in range(rng.randint(2, 12))] for p in range(4)]
    talks: list[list[int]] = []
    fresh = 10_000
    requests = []
    for _ in range(n):
        if not talks or rng.random() < 0.4:
            talks.append(list(rng.choice(prompts)))
        talk = talks[-1 - min(int(rng.expovariate(0.2)), len(talks) - 1)]
        grow = rng.randint(1, 6)
        talk.extend(range(fresh, fresh + grow))
        fresh += grow
        requests.append(list(talk))
    return requests


class PolicySuite:
    """Subclass it in a test module and set `policy`."""

    policy: ClassVar[str]
    machine: ClassVar[type[PolicyMachine]] = PolicyMachine
    """A subclass with a model that predicts makes the machine check the exact order too."""
    examples: ClassVar[int] = 60

    def make(self, n_units: int, n_classes: int) -> Brain:
        """A fresh brain."""
        return Brain(n_units, n_classes, self.policy)

    def pick(self, brain: Brain, n: int, slot_class: int = 0, exactly: bool = False) -> list[Evict]:
        """Victims, decoded."""
        out = np.zeros(max(n, 1), np.uint32)
        return decode_victims(out[: brain.victims(slot_class, n, out, exactly)])

    def forest(self, brain: Brain, n: int, seed: int) -> dict[int, int | None]:
        """Commit n blocks into slots in random order, each under a random earlier one or none."""
        rng = random.Random(seed)
        units = rng.sample(range(brain.facts.n_units), n)
        parents: dict[int, int | None] = {}
        for i, unit in enumerate(units):
            parents[unit] = rng.choice(units[:i]) if i and rng.random() < 0.8 else None
            brain.observe(encode([Committed(unit, parents[unit])]), i)
        return parents

    def test_children_leave_before_their_parents(self) -> None:
        for seed in range(5):
            brain = self.make(300, 1)
            parents = self.forest(brain, 200, seed)
            gone: set[int] = set()
            while victims := self.pick(brain, 1 + seed * 7):
                for victim in victims:
                    assert all(child in gone for child, parent in parents.items() if parent == victim.unit)
                    gone.add(victim.unit)
                brain.assert_consistent()
            assert gone == set(parents)
            assert brain.evictable(0) == 0

    def test_a_long_chain_that_grew_block_by_block_leaves_from_its_tail(self) -> None:
        brain = self.make(1000, 1)
        for unit in range(1000):
            brain.observe(encode([Committed(unit, unit - 1 if unit else None)]), unit)
        assert self.pick(brain, 1000) == [Evict(unit) for unit in range(999, -1, -1)]

    def test_all_or_nothing(self) -> None:
        brain = self.make(8, 1)
        brain.observe(encode([Committed(1), Committed(2, 1), Committed(3, 2)]), 0)
        before = brain.facts.row_words.copy()
        assert self.pick(brain, 4, exactly=True) == []
        assert np.array_equal(brain.facts.row_words, before)
        assert self.pick(brain, 3, exactly=True) == [Evict(3), Evict(2), Evict(1)]
        assert self.pick(brain, 1) == []

    def test_classes_are_separate(self) -> None:
        brain = self.make(8, 3)
        brain.observe(encode([Committed(1, slot_class=0), Committed(2, slot_class=2)]), 0)
        assert self.pick(brain, 8, 1) == []
        assert self.pick(brain, 8, 2) == [Evict(2)]
        assert self.pick(brain, 8, 0) == [Evict(1)]

    def test_a_kept_block_can_be_picked_again_and_not_before(self) -> None:
        brain = self.make(8, 1)
        brain.observe(encode([Committed(1), Committed(2, 1)]), 0)
        assert self.pick(brain, 2) == [Evict(2), Evict(1)]
        brain.observe(encode([Touched(2), Touched(1)]), 1)
        assert self.pick(brain, 2) == []
        brain.observe(encode([Kept(2), Kept(1)]), 2)
        brain.assert_consistent()
        assert self.pick(brain, 2) == [Evict(2), Evict(1)]

    def test_a_parent_stays_while_its_child_was_kept(self) -> None:
        brain = self.make(8, 1)
        brain.observe(encode([Committed(1), Committed(2, 1), Committed(3, 1)]), 0)
        assert len(self.pick(brain, 3)) == 3
        with pytest.raises(ConsistencyError, match="EVICTED of unit 1: it is resident with 1 resident"):
            brain.observe(encode([Kept(2), Evicted(3), Evicted(1)]), 1)
        brain.observe(encode([Kept(1)]), 1)
        brain.assert_consistent()
        assert self.pick(brain, 3) == [Evict(2), Evict(1)]

    def test_a_slot_is_used_again(self) -> None:
        brain = self.make(4, 2)
        for _ in range(3):
            brain.observe(encode([Committed(0, session=7, ttl_ms=5), Touched(0)]), 1)
            assert brain.facts.rows["hits"][0] == 1 and brain.facts.intents["ttl_ms"][0] == 5
            brain.observe(encode([Evicted(0), Committed(0, slot_class=1), Evicted(0)]), 2**40)
            assert self.pick(brain, 4) == self.pick(brain, 4, 1) == []
            brain.assert_consistent()

    def test_what_cannot_be_is_named_and_what_came_before_it_counts(self) -> None:
        brain = self.make(8, 1)
        batch: list[Event] = [Committed(1), Committed(2, 5), Committed(3)]
        with pytest.raises(ConsistencyError, match=r"event 1, COMMITTED of unit 2 .*parent is absent"):
            brain.observe(encode(batch), 0)
        assert np.flatnonzero(brain.facts.resident()).tolist() == [1]
        brain.assert_consistent()

    def test_bad_requests_are_refused(self) -> None:
        brain = self.make(8, 1)
        for slot_class, n in ((1, 1), (-1, 1), (0, 9)):
            with pytest.raises(ConfigError):
                brain.victims(slot_class, n, np.zeros(8, np.uint32))
        with pytest.raises(TypeError):
            brain.observe(np.zeros(2, np.dtype([("kind", "u4")])), 0)

    def test_admits_a_mask_of_its_events(self) -> None:
        mask = self.make(8, 1).admit(encode([Committed(1), Committed(2, 1)]))
        assert mask.shape == (2,) and mask.dtype == np.bool_

    def test_restore_is_like_having_been_there(self) -> None:
        brain = self.make(300, 1)
        parents = self.forest(brain, 200, seed=1)
        units = np.array(list(parents), np.uint32)
        above = np.array([NO_UNIT if p is None else p for p in parents.values()], np.uint32)
        stamps = np.arange(200, dtype=np.uint64)
        again = self.make(300, 1)
        again.observe(encode([Committed(0), Committed(1, 0)]), 0)
        shuffle = np.random.default_rng(0).permutation(200)
        zeros = np.zeros(200, np.uint32)
        again.restore(units[shuffle], above[shuffle], zeros, stamps[shuffle])
        again.assert_consistent()
        for column in ("flags", "children", "open"):
            assert np.array_equal(again.facts.rows[column], brain.facts.rows[column])
        assert {v.unit for v in self.pick(again, 300)} == set(parents)

    def test_restore_refuses_what_cannot_be_and_is_then_empty(self) -> None:
        brain = self.make(8, 2)
        brain.observe(encode([Committed(1)]), 0)
        none = NO_UNIT
        for units, parents, classes in (
            ([1, 1], [none, none], [0, 0]), ([1, 2], [none, 3], [0, 0]), ([1, 2], [none, 1], [0, 1]),
            ([1, 2], [2, 1], [0, 0]), ([1, 8], [none, none], [0, 0]), ([1, 2], [none, none], [0, 2]),
            ([1, 2], [9, none], [0, 0]),
        ):  # fmt: skip
            given, above, sizes = (np.array(column, np.uint32) for column in (units, parents, classes))
            with pytest.raises(ConsistencyError):
                brain.restore(given, above, sizes, np.arange(2))
            brain.assert_consistent()
            assert not brain.facts.resident().any()

    def test_never_above_beladys_optimum(self) -> None:
        requests = synthetic_requests(400)
        for capacity in (30, 100, 300):
            replay = Replay(capacity, brain=self.make(capacity, 1))
            assert 0 < replay.run(requests) <= belady_hits(requests, capacity)
            replay.brain.assert_consistent()

    def test_against_the_model_in_any_order(self) -> None:
        machine = type("Machine", (self.machine,), {"make": staticmethod(self.make)})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
