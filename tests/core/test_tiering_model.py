"""The tiering brain against a plain model: anything may happen at any moment, and both always agree.

The model knows the rules and nothing of tables, lists or rings: what may be written now it finds by looking at all it
knows. It has no EVICTION hand (no class is ever short here) and forgets no ghost.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.tier_steps import FIRST_RETRY_MS, USES_AGAIN
from penstock.core.tier_table import MAX_TRIES
from penstock.core.tiering import Tiering, TierRule, WriteOrder
from penstock.types import WriteRule
from tests.core.tier_events import ROOT, committed, evicted, root_bytes, touched, words

N_UNITS = 10
KEYS = range(1, 13)
PARENTS = {1: ROOT, 2: 1, 3: 2, 4: 3, 5: 2, 6: 5, 7: ROOT, 8: 7, 9: 8, 10: 8, 11: 99, 12: 11}
"""Three chains with branches; 99 is never seen."""
TENANTS = {key: 7 if key >= 7 else 0 for key in KEYS}
CHEAPEST = [WriteRule.THROUGH, WriteRule.SECOND_USE, WriteRule.EVICTION]


@dataclass
class Known:
    """What is remembered of a key."""

    uses: int = 0
    below: set[int] = field(default_factory=set)
    bars: dict[int, int] = field(default_factory=dict)
    unit: int | None = None
    generation: int = 0
    admitted: set[int] = field(default_factory=set)
    tries: dict[int, int] = field(default_factory=dict)
    due: dict[int, int] = field(default_factory=dict)
    flying: int | None = None
    stale: bool = False


@dataclass
class Model:
    rules: list[WriteRule]
    replicas: dict[int, int]
    keys: dict[int, Known] = field(default_factory=dict)
    down: set[int] = field(default_factory=set)
    lost: int = 0

    @property
    def tiers(self) -> range:
        return range(len(self.rules))

    def of(self, key: int) -> Known:
        return self.keys.setdefault(key, Known())

    def at(self, unit: int) -> int | None:
        return next((key for key, known in self.keys.items() if known.unit == unit), None)

    def wanted(self, key: int, tier: int) -> bool:
        known = self.keys.get(key)
        return known is not None and known.unit is not None and tier in known.admitted - known.below

    def has(self, key: int, tier: int) -> bool:
        return key == ROOT or (key in self.keys and tier in self.keys[key].below)

    def may_fly(self, key: int, tier: int) -> bool:
        known = self.keys[key]
        return self.wanted(key, tier) and known.flying is None and tier not in known.due

    def ready(self) -> set[tuple[int, int]]:
        """(tier, key) that may be written now as the first of a run."""
        return {
            (tier, key)
            for tier in self.tiers
            for key in self.keys
            if tier not in self.down and self.may_fly(key, tier) and self.has(PARENTS[key], tier)
        }

    def barred(self, key: int, tier: int) -> bool:
        return self.of(key).bars.get(tier, 0) > self.of(key).uses

    def admit(self, key: int, tier: int) -> None:
        known = self.keys.get(key)
        if known is None or known.unit is None or tier in known.admitted or self.barred(key, tier):
            return
        known.admitted.add(tier)
        known.bars.pop(tier, None)
        if tier not in known.below:
            self.admit(PARENTS[key], tier)

    def apply_rules(self, key: int, needed: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        known = self.of(key)
        wants = {tier for tier in self.tiers if self.rules[tier] == WriteRule.THROUGH} | needed
        if known.uses >= 2:
            wants |= {tier for tier in self.tiers if self.rules[tier] == WriteRule.SECOND_USE}
        wants = {tier for tier in wants if not self.barred(key, tier)}
        if known.admitted | wants:
            writable = [tier for tier in self.tiers if self.rules[tier] != WriteRule.NEVER]
            writable.sort(key=lambda tier: (tier in self.down, CHEAPEST.index(self.rules[tier]), tier))
            copies = self.replicas.get(TENANTS[key], self.replicas[0])
            for tier in writable:
                have = (known.admitted | wants | known.below) & set(writable)
                if len(have) < copies and tier not in have and not self.barred(key, tier):
                    wants.add(tier)
        for tier in wants:
            self.admit(key, tier)

    def have(self, key: int, tier: int) -> None:
        known = self.of(key)
        if tier not in known.below:
            known.below.add(tier)
            known.bars.pop(tier, None)
            self.unlist(known, tier)

    @staticmethod
    def unlist(known: Known, tier: int) -> None:
        known.tries.pop(tier, None)
        known.due.pop(tier, None)

    def bar(self, key: int, tier: int) -> None:
        known = self.of(key)
        known.admitted.discard(tier)
        self.unlist(known, tier)
        known.bars[tier] = known.uses + USES_AGAIN

    def evict(self, key: int) -> None:
        known = self.of(key)
        evicting = {tier for tier in self.tiers if self.rules[tier] == WriteRule.EVICTION}
        unbarred = {tier for tier in evicting if not self.barred(key, tier)}
        self.lost += bool(not known.below and known.flying is None and (known.admitted | unbarred))
        known.unit, known.admitted, known.tries, known.due = None, set(), {}, {}
        self.prune()

    def commit(self, unit: int, key: int, generation: int, below: set[int]) -> None:
        known = self.of(key)
        if not (known.unit == unit and known.generation == generation):
            here = self.at(unit)
            if here is not None:
                self.evict(here)
            if known.unit is not None:
                self.evict(key)
            known = self.of(key)
            known.unit, known.generation = unit, generation
            known.uses += 1
        for tier in below:
            self.have(key, tier)
        children = [each for each in self.keys if PARENTS[each] == key]
        self.apply_rules(key, {tier for child in children for tier in self.tiers if self.wanted(child, tier)})

    def drop(self, key: int, tier: int) -> None:
        if not self.remembered(key):
            return
        known = self.of(key)
        if tier not in known.below and known.flying != tier:
            return
        known.below.discard(tier)
        known.stale |= known.flying == tier
        self.bar(key, tier)
        if known.unit is not None:
            self.apply_rules(key)

    def land(self, key: int, tier: int, stored: bool, now: int) -> None:
        known = self.of(key)
        assert known.flying == tier
        stale, known.flying, known.stale = known.stale, None, False
        if stored and not stale:
            self.have(key, tier)
        elif not stale and tier not in self.down and self.wanted(key, tier):
            known.tries[tier] = known.tries.get(tier, 0) + 1
            if known.tries[tier] > MAX_TRIES:
                self.bar(key, tier)
            else:
                known.due[tier] = now + FIRST_RETRY_MS * 4 ** (known.tries[tier] - 1)
        if known.unit is None:
            self.lost += not known.below
            self.prune()

    def forget(self, tier: int) -> None:
        for known in self.keys.values():
            known.below.discard(tier)
            known.bars.pop(tier, None)
            self.unlist(known, tier)
            known.stale |= known.flying == tier
        for key in list(self.keys):
            if tier in self.keys[key].admitted:
                self.admit(PARENTS[key], tier)

    def remembered(self, key: int) -> bool:
        """Whether there is a row for it: also that of a resident block's parent that was never seen."""
        children = (each for each in self.keys if PARENTS[each] == key and self.keys[each].unit is not None)
        return key in self.keys or next(children, None) is not None

    def prune(self) -> None:
        """A key that was never used, is nowhere and nobody's parent is forgotten with what is held against it."""
        for key, known in list(self.keys.items()):
            idle = known.unit is None and known.flying is None and not known.uses and not known.below
            child = any(PARENTS[each] == key and other.unit is not None for each, other in self.keys.items())
            if idle and not child:
                del self.keys[key]


class Machine(RuleBasedStateMachine):
    @initialize(
        rules=st.lists(st.sampled_from(WriteRule), min_size=1, max_size=4),
        replicas=st.fixed_dictionaries({0: st.integers(0, 2), 7: st.integers(0, 3)}),
    )
    def start(self, rules: list[WriteRule], replicas: dict[int, int]) -> None:
        self.brain = Tiering(N_UNITS, [TierRule(rule, rule) for rule in rules], replicas=replicas, ghosts=100)
        self.brain.add_root(root_bytes())
        self.model = Model(rules, replicas)
        self.outstanding: list[WriteOrder] = []
        self.generation = self.now = 0

    def tier(self, number: int) -> int:
        return number % len(self.model.rules)

    @rule(unit=st.integers(0, N_UNITS - 1), key=st.sampled_from(KEYS), below=st.integers(0, 15), known=st.booleans())
    def commit(self, unit: int, key: int, below: int, known: bool) -> None:
        self.generation += 1
        below = below if known else 0
        event = committed(
            unit, key, PARENTS[key], generation=self.generation, below=below, tenant=TENANTS[key], space=key > 6
        )
        self.brain.observe(event, self.now)
        self.model.commit(unit, key, self.generation, {tier for tier in self.model.tiers if below >> tier & 1})

    @rule(units=st.permutations(range(N_UNITS)), key=st.sampled_from(KEYS))
    def commit_chain(self, units: list[int], key: int) -> None:
        """What the pool does: a block after its ancestors."""
        path = [key]
        while PARENTS[path[-1]] in PARENTS:
            path.append(PARENTS[path[-1]])
        for unit, each in zip(units, reversed(path), strict=False):
            known = self.model.keys.get(each)
            if known is None or known.unit is None:
                self.commit(unit=unit, key=each, below=0, known=False)

    @rule(unit=st.integers(0, N_UNITS - 1), below=st.integers(0, 15))
    def commit_again(self, unit: int, below: int) -> None:
        """The same event once more, from a scan."""
        key = self.model.at(unit)
        if key is not None:
            generation = self.model.keys[key].generation
            event = committed(unit, key, PARENTS[key], generation=generation, below=below, tenant=TENANTS[key])
            self.brain.observe(event, self.now)
            self.model.commit(unit, key, generation, {tier for tier in self.model.tiers if below >> tier & 1})

    @rule(units=st.lists(st.integers(0, N_UNITS - 1), min_size=1, max_size=4))
    def touch(self, units: list[int]) -> None:
        self.brain.observe(np.concatenate([touched(unit) for unit in units]), self.now)
        for unit in units:
            if (key := self.model.at(unit)) is not None:
                self.model.keys[key].uses += 1
                self.model.apply_rules(key)

    @rule(unit=st.integers(0, N_UNITS - 1))
    def evict(self, unit: int) -> None:
        self.brain.observe(evicted(unit), self.now)
        if (key := self.model.at(unit)) is not None:
            self.model.evict(key)

    @rule(max_blocks=st.integers(0, 6))
    def order(self, max_blocks: int) -> None:
        for known in self.model.keys.values():
            known.due = {tier: due for tier, due in known.due.items() if due > self.now}
        orders = self.brain.orders(self.now, max_blocks)
        self.outstanding += orders
        for each in orders:
            self.check(each)
        n = sum(len(each.units) for each in orders)
        assert n <= max_blocks
        assert n == max_blocks or not self.model.ready(), "something could be written and is not ordered"

    def check(self, order: WriteOrder) -> None:
        keys = order.keys[:, 0].tolist()
        assert len(keys) > 0 and order.keys[:, 1].tolist() == [0] * len(keys)
        assert (order.tier, keys[0]) in self.model.ready()
        assert order.parents[:, 0].tolist() == [PARENTS[key] for key in keys]
        assert order.parents[1:, 0].tolist() == keys[:-1], "a run of one chain"
        for key, unit, generation in zip(keys, order.units.tolist(), order.generations.tolist(), strict=True):
            known = self.model.keys[key]
            assert self.model.may_fly(key, order.tier)
            assert (known.unit, known.generation, TENANTS[key]) == (unit, generation, order.tenant)
            known.flying = order.tier

    @precondition(lambda self: self.outstanding)
    @rule(which=st.integers(0, 99), stored=st.integers(0, 3))
    def answer(self, which: int, stored: int) -> None:
        """The first `stored` blocks of a run are stored, the others refused."""
        order = self.outstanding.pop(which % len(self.outstanding))
        for part, good in ((slice(None, stored), True), (slice(stored, None), False)):
            units, generations, keys = order.units[part], order.generations[part], order.keys[part]
            if good:
                self.brain.stored(order.tier, units, generations, keys)
            else:
                self.brain.refused(order.tier, units, generations, keys, self.now)
            for key in keys[:, 0].tolist():
                self.model.land(key, order.tier, good, self.now)

    @rule(tier=st.integers(0, 3), keys=st.lists(st.sampled_from([*KEYS, 1000]), max_size=3, unique=True))
    def gone(self, tier: int, keys: list[int]) -> None:
        self.brain.gone(self.tier(tier), words(keys))
        for key in keys:
            self.model.drop(key, self.tier(tier))

    @rule(tier=st.integers(0, 3), up=st.booleans())
    def set_up(self, tier: int, up: bool) -> None:
        self.brain.set_up(self.tier(tier), up)
        (self.model.down.discard if up else self.model.down.add)(self.tier(tier))

    @rule(tier=st.integers(0, 3))
    def forget(self, tier: int) -> None:
        self.brain.forget_tier(self.tier(tier))
        self.model.forget(self.tier(tier))

    @rule(ms=st.sampled_from([1, FIRST_RETRY_MS, 10_000]))
    def wait(self, ms: int) -> None:
        self.now += ms

    @invariant()
    def agree(self) -> None:
        self.brain.assert_consistent()
        counts, known = self.brain.counts(), self.model.keys
        at = [self.model.at(unit) for unit in range(N_UNITS)]
        assert self.brain.below(np.arange(N_UNITS)).tolist() == [
            0 if key is None else sum(1 << tier for tier in known[key].below) for key in at
        ]
        assert counts["resident"] == sum(key is not None for key in at)
        assert counts["in_flight"] == sum(each.flying is not None for each in known.values())
        assert counts["waiting"] == sum(self.model.wanted(key, tier) for key in known for tier in self.model.tiers)
        assert counts["delayed"] == sum(len(each.due) for each in known.values())
        assert counts["lost_unsaved"] == self.model.lost
        assert counts["unknown"] >= 0


FULL = os.environ.get("PENSTOCK_TEST_SCALE") == "full"

TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=200 if FULL else 15, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class Walk(Machine):
    """A machine that is walked at random with steps in the proportions of a busy pool, which reaches what Hypothesis's
    even choice of steps hardly ever does; it counts what it reached."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.reached: Counter[str] = Counter()
        rules = self.random.choices(list(WriteRule), k=self.random.randint(0, 3))
        rules.insert(0, self.random.choice([WriteRule.THROUGH, WriteRule.SECOND_USE]))
        self.start(rules=rules, replicas={0: self.random.randint(0, 2), 7: self.random.randint(0, 3)})

    def check(self, order: WriteOrder) -> None:
        super().check(order)
        self.reached["ordered"] += len(order.units)
        self.reached["runs"] += len(order.units) > 1
        self.reached["retried"] += sum(self.model.keys[key].tries != {} for key in order.keys[:, 0].tolist())

    def step(self) -> None:
        draw = self.random
        unit, key, tier = draw.randrange(N_UNITS), draw.choice(KEYS), draw.randrange(4)
        steps: dict[str, tuple[int, Callable[[], object]]] = {
            "commit": (2, lambda: self.commit(unit=unit, key=key, below=draw.randrange(16), known=draw.random() < 0.1)),
            "chain": (6, lambda: self.commit_chain(units=draw.sample(range(N_UNITS), N_UNITS), key=key)),
            "again": (1, lambda: self.commit_again(unit=unit, below=draw.randrange(16))),
            "touch": (9, lambda: self.touch(units=draw.choices(range(N_UNITS), k=3))),
            "evict": (3, lambda: self.evict(unit=unit)),
            "order": (12, lambda: self.order(max_blocks=draw.randrange(7))),
            "answer": (12, lambda: self.answer_any(draw.randrange(99), draw.choice([0, 0, 1, 9, 9, 9]))),
            "gone": (1, lambda: self.gone(tier=tier, keys=draw.sample(KEYS, 1))),
            "set_up": (1, lambda: self.set_up(tier=tier, up=draw.random() < 0.8)),
            "forget": (2, lambda: self.forget(tier=tier)),
            "wait": (5, lambda: self.wait(ms=draw.choice([1, FIRST_RETRY_MS, 10_000]))),
        }
        name = draw.choices(list(steps), [weight for weight, _ in steps.values()])[0]
        steps[name][1]()
        self.agree()

    def answer_any(self, which: int, stored: int) -> None:
        if not self.outstanding:
            return
        order = self.outstanding[which % len(self.outstanding)]
        for place, key in enumerate(order.keys[:, 0].tolist()):
            known = self.model.keys[key]
            self.reached["stale and stored"] += known.stale and place < stored
            self.reached["left meanwhile"] += known.unit is None
        self.answer(which=which, stored=stored)


def test_a_busy_pool_agrees_with_the_model() -> None:
    reached: Counter[str] = Counter()
    for seed in range(200 if FULL else 16):
        walk = Walk(seed)
        for _ in range(150):
            walk.step()
        reached += walk.reached
        reached["gave up"] += walk.brain.counts()["gave_up"]
        reached["lost"] += walk.model.lost
    # A walk that reaches nothing proves nothing.
    least = {"ordered": 300, "runs": 60, "retried": 30, "stale and stored": 10, "left meanwhile": 10, "lost": 50}
    assert {name: n for name, n in least.items() if reached[name] < n} == {}, reached
