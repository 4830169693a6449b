"""LRU: the shared suite, its exact order, golden hit counts, and proof that the suite catches what is broken."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.core.actions import Committed, Event, Evicted, Kept, Touched, decode_victims, encode
from penstock.core.brain import Brain, ConsistencyError
from penstock.errors import ConfigError
from penstock.policies.lru import Lru
from penstock.policies.registry import find, names
from penstock.policies.ring import NEWER, OLDER, PASSED
from penstock.testing.policies import PolicySuite, synthetic_requests
from penstock.testing.policy_machine import FactsModel, PolicyMachine
from penstock.testing.replay import Replay, belady_hits
from penstock.types import NO_UNIT, EventKind

TRACE = Path(__file__).parent.parent / "data" / "mooncake_head.json"


class LruModel(FactsModel):
    """The definition: of the blocks without open children, the one with the oldest use of its own leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.order: OrderedDict[int, None] = OrderedDict()
        """Unpicked blocks, oldest use first."""

    def observe(self, events: list[Event]) -> None:
        run: list[int] = []
        for event in events:
            returned = event.unit in self.picked and isinstance(event, Kept)
            self.apply(event)
            unit = event.unit
            used = unit in self.parent and unit not in self.picked
            if not used or returned or not run or self.parent[unit] != run[-1]:
                self.use(run)
                run = []
            if isinstance(event, Evicted):
                self.order.pop(unit, None)
            elif used:
                run.append(unit)
        self.use(run)

    def use(self, chain: list[int]) -> None:
        for unit in reversed(chain):
            self.order[unit] = None
            self.order.move_to_end(unit)

    def predict(self, slot_class: int, n: int) -> list[int]:
        found: list[int] = []
        while len(found) < n:
            for unit in self.order:
                covered = [child for child in self.open_children(unit) if child not in found]
                if self.slot_class[unit] == slot_class and unit not in found and not covered:
                    found.append(unit)
                    break
            else:
                break
        return found

    def pick(self, units: list[int], slot_class: int, n: int) -> None:
        super().pick(units, slot_class, n)
        for unit in units:
            del self.order[unit]


class LruMachine(PolicyMachine):
    model_type = LruModel
    foreign_evictions = False


class TestLru(PolicySuite):
    policy = "lru"


class TestLruOrder(PolicySuite):
    policy = "lru"
    machine = LruMachine
    examples: ClassVar[int] = 120


def victims(brain: Brain, n: int) -> list[int]:
    out = np.zeros(n, np.uint32)
    return [victim.unit for victim in decode_victims(out[: brain.victims(0, n, out)])]


def with_events(n_units: int, *batches: list[Event]) -> Brain:
    brain = Brain(n_units, 1)
    for now, batch in enumerate(batches):
        brain.observe(encode(batch), now)
    return brain


def test_a_chain_used_again_outlives_a_chain_that_was_not() -> None:
    chains: list[Event] = [Committed(0), Committed(1, 0), Committed(2), Committed(3, 2)]
    brain = with_events(8, chains, [Touched(0), Touched(1)])
    assert victims(brain, 4) == [3, 2, 1, 0]


def test_a_later_chain_of_a_batch_outlives_an_earlier_one() -> None:
    brain = with_events(8, [Committed(0), Committed(1, 0), Committed(2), Committed(3, 2)])
    assert victims(brain, 4) == [1, 0, 3, 2]


def test_a_shared_head_keeps_its_own_age() -> None:
    """0 is used by two chains; when one of them has gone, 0 is as young as its last use."""
    first: list[Event] = [Committed(0), Committed(1, 0)]
    brain = with_events(8, first, [Committed(2)], [Touched(0), Committed(3, 0)])
    assert victims(brain, 4) == [1, 2, 3, 0]


def test_a_touch_of_an_old_parent_alone_does_not_save_its_child() -> None:
    brain = with_events(8, [Committed(0), Committed(1, 0)], [Committed(2)], [Touched(0)])
    assert victims(brain, 3) == [1, 2, 0]


def test_restore_orders_by_stamp() -> None:
    brain = Brain(8, 1)
    units, parents = np.array([4, 2, 6, 0], np.uint32), np.array([NO_UNIT, 4, NO_UNIT, NO_UNIT], np.uint32)
    brain.restore(units, parents, np.zeros(4, np.uint32), np.array([1, 9, 5, 3]))
    assert victims(brain, 4) == [0, 6, 2, 4]


def test_picking_costs_constant_time_however_chains_grew() -> None:
    """Every pick passes over a covered block at most once a use: counted in blocks, not in seconds."""
    brain = with_events(2000, *([Committed(u, u - 1 if u else None)] for u in range(2000)))
    assert victims(brain, 1) == [1999]
    links = brain.policy._links  # type: ignore[attr-defined]
    passed = int((links[:, NEWER] == PASSED).sum())
    assert passed == 1998
    for unit in range(1998, 1990, -1):
        assert victims(brain, 1) == [unit]
        assert int((links[:, NEWER] == PASSED).sum()) == unit - 1


# ---- hit counts


def plain_lru_hits(requests: list[list[int]], capacity: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for blocks in requests:
        hits += next((i for i, block in enumerate(blocks) if block not in cache), len(blocks))
        for block in blocks:
            if block not in cache and len(cache) == capacity:
                cache.popitem(last=False)
            cache[block] = None
            cache.move_to_end(block)
    return hits


def mooncake_head() -> list[list[int]]:
    runs = json.loads(TRACE.read_text())["requests"]
    requests = []
    for request in runs:
        pairs = zip(request[::2], request[1::2], strict=True)
        requests.append([block for first, n in pairs for block in range(first, first + n)])
    return requests


@pytest.mark.parametrize(
    ("capacity", "plain", "tail_first"), [(500, 2055, 2055), (2000, 2646, 2652), (10000, 11409, 11409)]
)
def test_golden_hits_on_a_real_trace(capacity: int, plain: int, tail_first: int) -> None:
    requests = mooncake_head()
    alone, chained = Replay(capacity, chained=False), Replay(capacity)
    assert alone.run(requests) == plain_lru_hits(requests, capacity) == plain
    assert chained.run(requests) == tail_first
    assert max(plain, tail_first) <= belady_hits(requests, capacity)
    alone.brain.assert_consistent()
    chained.brain.assert_consistent()


def test_beladys_bound_on_a_case_done_by_hand() -> None:
    # Two places: 1 and 2 stay, 3 is not worth one; then 1 2 hit, 3 misses, 1 hits.
    assert belady_hits([[1, 2, 3], [1, 2, 3], [1]], 2) == 3
    assert belady_hits([[1, 2, 3], [1, 2, 3], [1]], 3) == 4
    assert belady_hits([[1], [2], [1]], 1) == 1


# ---- the checks themselves


class NoChildGuard(Lru):
    """Picks blocks whose children stay."""

    def victims(self, slot_class: int, n: int, out: Any) -> int:
        open_children = self.facts.rows["open"]
        before = open_children.copy()
        open_children[:] = 0
        found = super().victims(slot_class, n, out)
        open_children += before  # the picks have counted down from zero, modulo 2**32
        return found


class ForgetsKept(Lru):
    """A block that was kept is never put back into the order."""

    def observe(self, events: Any, now: int) -> int:
        before = self._links.copy()
        applied = super().observe(events, now)
        if len(events) and events[0, 0] == EventKind.KEPT:
            self._links[:] = before
        return applied


class PicksTwice(Lru):
    """The first victim comes twice."""

    def victims(self, slot_class: int, n: int, out: Any) -> int:
        found = super().victims(slot_class, n, out)
        if found > 1:
            out[found - 1] = out[0]
        return found


class FirstInFirstOut(Lru):
    """Touches change nothing: legal, but not LRU."""

    def observe(self, events: Any, now: int) -> int:
        before = self._links.copy()
        applied = super().observe(events, now)
        if len(events) and (events[:, 0] == EventKind.TOUCHED).all():
            self._links[:] = before
        return applied


def run(policy: type[Lru], machine: type[PolicyMachine]) -> None:
    def make(n_units: int, n_classes: int) -> Brain:
        brain = Brain(n_units, n_classes)
        brain.policy = policy(brain.facts)
        return brain

    mutant = type("Mutant", (machine,), {"make": staticmethod(make)})
    quick = settings(
        max_examples=60, derandomize=True, deadline=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(mutant, settings=quick)


@pytest.mark.parametrize("policy", [NoChildGuard, ForgetsKept, PicksTwice])
def test_the_suite_catches_a_broken_policy(policy: type[Lru]) -> None:
    with pytest.raises((AssertionError, ConsistencyError)):
        run(policy, PolicyMachine)


def test_the_exact_model_catches_a_wrong_order_that_the_suite_allows() -> None:
    run(FirstInFirstOut, PolicyMachine)
    with pytest.raises(AssertionError):
        run(FirstInFirstOut, LruMachine)


def broken_ring(links: Any) -> None:
    links[1, OLDER] = links[0, OLDER]


def lost_block(links: Any) -> None:
    newer, older = links[1]
    links[newer, OLDER], links[older, NEWER] = older, newer
    links[1] = NO_UNIT


def ring_of_its_own(links: Any) -> None:
    newer, older = links[1]
    links[newer, OLDER], links[older, NEWER] = older, newer
    links[1] = 1


def passed_without_children(links: Any) -> None:
    lost_block(links)
    links[1, NEWER] = PASSED


def link_outside(links: Any) -> None:
    links[1, OLDER] = 4000


@pytest.mark.parametrize("damage", [broken_ring, lost_block, ring_of_its_own, passed_without_children, link_outside])
def test_a_damaged_order_is_noticed(damage: Any) -> None:
    brain = with_events(4, [Committed(0), Committed(1), Committed(2)])
    brain.assert_consistent()
    damage(brain.policy._links)  # type: ignore[attr-defined]
    with pytest.raises(ConsistencyError):
        brain.assert_consistent()


# ---- the registry


def test_names_and_the_nearest_name() -> None:
    assert names() == ["lru"]
    assert find("lru") is Lru and Lru.name == "lru"
    with pytest.raises(ConfigError, match="did you mean 'lru'"):
        Brain(8, 1, "lruu")
    with pytest.raises(ConfigError, match="there are: lru"):
        find("belady")


def test_the_synthetic_trace_is_the_same_everywhere() -> None:
    requests = synthetic_requests(400)
    assert (len(requests), sum(map(len, requests)), Replay(100).run(requests)) == (400, 5448, 3725)
