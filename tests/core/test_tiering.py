"""When blocks are written below: each rule and promise by itself. Everything at once is in `test_tiering_model.py`."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core import tier_table as at
from penstock.core.tier_steps import FIRST_RETRY_MS
from penstock.core.tiering import RUN_BLOCKS, SHORT, Tiering, TierRule, tier_event_dtype
from penstock.errors import ConfigError
from penstock.policies.facts import ConsistencyError
from penstock.types import WriteRule
from tests.core.tier_events import (
    ROOT,
    ask,
    chain,
    committed,
    drain,
    evicted,
    named,
    refuse,
    root_bytes,
    row,
    store,
    tell,
    touched,
    words,
)

THROUGH, SECOND_USE, EVICTION, NEVER = WriteRule


def tiering(*rules: WriteRule, units: int = 64, ghosts: int = 64, replicas: dict[int, int] | int = 1) -> Tiering:
    made = Tiering(
        units, [TierRule(f"t{i}", rule) for i, rule in enumerate(rules)], replicas=replicas, ghosts=ghosts
    )  # fmt: skip
    made.add_root(root_bytes())
    return made


def test_through_orders_a_chain_as_one_run_at_commit() -> None:
    brain = tiering(THROUGH)
    tell(brain, *(committed(u, u + 1, u or ROOT, generation=u + 5, tenant=9, space=3) for u in range(5)))
    (order,) = ask(brain)
    assert (order.tier, order.space, order.tenant) == (0, 3, 9)
    assert order.units.tolist() == [0, 1, 2, 3, 4] and order.generations.tolist() == [5, 6, 7, 8, 9]
    assert order.keys.tolist() == words([1, 2, 3, 4, 5]).tolist()
    assert order.parents.tolist() == words([ROOT, 1, 2, 3, 4]).tolist()
    assert ask(brain) == [] and brain.counts()["in_flight"] == 5
    store(brain, [order])
    assert brain.below(np.arange(6)).tolist() == [1, 1, 1, 1, 1, 0]
    assert ask(brain) == [] and brain.counts()["waiting"] == brain.counts()["in_flight"] == 0


def test_second_use_is_a_touch() -> None:
    brain = tiering(SECOND_USE)
    tell(brain, *chain(0, 4))
    assert ask(brain) == []
    tell(brain, touched(1))
    assert drain(brain) == [(0, 1), (0, 2)], "its parent goes with it, what is behind it does not"


def test_second_use_is_a_commit_within_the_ghosts_memory() -> None:
    for ghosts, expected in ((8, [(0, 1)]), (2, [])):
        brain = tiering(SECOND_USE, ghosts=ghosts)
        tell(brain, committed(0, 1))
        tell(brain, evicted(0))
        for key in range(10, 13):
            tell(brain, committed(1, key), evicted(1))
        tell(brain, committed(2, 1, generation=2))
        assert drain(brain) == expected
        assert brain.counts()["ghosts"] <= ghosts


def test_one_time_blocks_never_reach_a_second_use_tier() -> None:
    brain = tiering(SECOND_USE, ghosts=1000)
    for key in range(1, 60):
        tell(brain, committed(key % 8, key, generation=key))
        assert ask(brain) == []
    assert brain.counts()["kept_off"] == 59 - 8 and brain.counts()["lost_unsaved"] == 0


def test_never_is_never_written_and_what_it_has_is_known() -> None:
    brain = tiering(NEVER, THROUGH)
    tell(brain, committed(0, 1, below=0b01), touched(0), touched(0))
    assert drain(brain) == [(1, 1)]
    assert brain.below(np.array([0])).tolist() == [0b11]


def test_what_a_tier_has_is_not_written_again() -> None:
    brain = tiering(THROUGH)
    tell(brain, committed(0, 1, below=1), committed(1, 2, 1))
    assert drain(brain) == [(0, 2)]


def test_parents_may_be_observed_after_their_children() -> None:
    brain = tiering(THROUGH)
    for unit in (3, 1, 4, 2):
        tell(brain, chain(0, 5)[unit])
        assert ask(brain) == [], "the chain has no head yet"
    tell(brain, chain(0, 5)[0])
    assert drain(brain) == [(0, key) for key in range(1, 6)]


def test_a_parent_that_comes_late_is_written_for_its_childs_sake() -> None:
    brain = tiering(SECOND_USE)
    tell(brain, committed(1, 2, 1), touched(1))
    tell(brain, committed(0, 1))
    assert drain(brain) == [(0, 1), (0, 2)]


def test_a_block_without_its_parent_is_not_written_unless_the_tier_has_the_parent() -> None:
    brain = tiering(THROUGH)
    tell(brain, committed(1, 2, 1))
    assert ask(brain) == []
    brain.stored(0, np.array([0]), np.array([1]), words([1]))
    brain.assert_consistent()
    assert drain(brain) == [(0, 2)], "another told us that the tier has it"


def test_a_parent_that_left_the_pool_is_remembered_to_be_below() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 2))
    drain(brain)
    tell(brain, evicted(1))
    tell(brain, evicted(0))
    tell(brain, committed(5, 3, 2))
    assert drain(brain) == [(0, 3)]


def test_roots_may_be_told_late_and_all_zeros_is_one() -> None:
    brain = Tiering(8, [TierRule("t", THROUGH)])
    tell(brain, committed(0, 1), committed(1, 7, 0))
    assert named(ask(brain)) == [(0, 7)]
    brain.add_root(root_bytes())
    brain.add_root(root_bytes())
    assert named(ask(brain)) == [(0, 1)]
    for wrong in (words([1]).tobytes(), b"short"):
        with pytest.raises(ConfigError, match="root"):
            brain.add_root(wrong)


def test_children_wait_until_the_parent_is_stored() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 3))
    first = ask(brain, max_blocks=1)
    assert named(first) == [(0, 1)]
    assert ask(brain) == []
    store(brain, first)
    assert named(ask(brain)) == [(0, 2), (0, 3)]


def test_a_refused_parent_holds_its_children_back_and_is_retried_later_and_later() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 2))
    now = 0
    for delay in (0, *(FIRST_RETRY_MS * 4**i for i in range(at.MAX_TRIES))):
        if delay:
            assert ask(brain, now_ms=now + delay - 1) == []
        now += delay
        orders = ask(brain, max_blocks=1, now_ms=now)
        assert named(orders) == [(0, 1)]
        refuse(brain, orders, now)
    assert ask(brain, now_ms=now + 10**9) == [] and brain.counts()["gave_up"] == 1
    tell(brain, touched(0), now_ms=now)
    assert ask(brain, now_ms=now + 10**9) == [], "one further use is not enough"
    tell(brain, touched(0), now_ms=now)
    assert drain(brain, now + 10**9) == [(0, 1), (0, 2)]


def test_a_clock_that_runs_backwards_only_delays() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 1), now_ms=1000)
    refuse(brain, ask(brain, now_ms=1000), now_ms=5)
    assert ask(brain, now_ms=1000 + FIRST_RETRY_MS - 1) == []
    assert named(ask(brain, now_ms=1000 + FIRST_RETRY_MS)) == [(0, 1)]


def test_what_a_tier_dropped_comes_back_only_after_two_further_uses() -> None:
    for rule in (THROUGH, SECOND_USE):
        brain = tiering(rule)
        tell(brain, committed(0, 1), touched(0))
        assert drain(brain) == [(0, 1)]
        brain.gone(0, words([1, 99]))
        brain.assert_consistent()
        assert brain.below(np.array([0])).tolist() == [0]
        assert ask(brain) == []
        tell(brain, touched(0))
        assert ask(brain) == []
        tell(brain, evicted(0))
        tell(brain, committed(3, 1, generation=2))
        assert drain(brain) == [(0, 1)], "coming back is a use, too"


def test_a_child_of_a_dropped_block_waits_for_it() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 2))
    drain(brain)
    tell(brain, committed(2, 9, 2))
    brain.gone(0, words([2]))
    brain.assert_consistent()
    assert ask(brain) == [], "it was listed while its parent was there"
    tell(brain, touched(1), touched(1))
    assert drain(brain) == [(0, 2), (0, 9)]


def test_a_write_that_ends_after_the_block_was_dropped_is_not_believed() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 1))
    orders = ask(brain)
    brain.gone(0, words([1]))
    store(brain, orders)
    assert brain.below(np.array([0])).tolist() == [0] and ask(brain) == []


def test_one_copy_of_a_block_is_in_flight_at_a_time() -> None:
    brain = tiering(THROUGH, THROUGH)
    tell(brain, *chain(0, 3))
    first = ask(brain)
    assert len(named(first)) == 3 and len({key for _, key in named(first)}) == 3
    store(brain, first)
    second = ask(brain)
    assert {tier for tier, _ in named(first + second)} == {0, 1} and len(named(second)) == 3
    store(brain, second)
    assert brain.below(np.arange(3)).tolist() == [3, 3, 3]


def test_a_block_that_leaves_and_comes_back_while_it_is_written_is_not_written_twice() -> None:
    brain = tiering(THROUGH, ghosts=0)
    tell(brain, *chain(0, 1))
    orders = ask(brain)
    tell(brain, evicted(0))
    tell(brain, committed(7, 1, generation=4))
    assert ask(brain) == []
    store(brain, orders)
    assert ask(brain) == [] and brain.below(np.array([7, 0])).tolist() == [1, 0]


def test_a_tier_that_is_down_gets_nothing_and_forgets_nothing() -> None:
    brain = tiering(THROUGH, THROUGH)
    tell(brain, *chain(0, 2))
    drain(brain)
    brain.set_up(1, False)
    tell(brain, *chain(2, 2, parent=2))
    assert drain(brain) == [(0, 3), (0, 4)]
    assert brain.below(np.arange(4)).tolist() == [3, 3, 1, 1]
    brain.set_up(1, True)
    assert drain(brain) == [(1, 3), (1, 4)]


def test_refusals_of_a_tier_that_is_down_do_not_count() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 1))
    orders = ask(brain)
    brain.set_up(0, False)
    refuse(brain, orders)
    assert ask(brain) == []
    brain.set_up(0, True)
    assert drain(brain) == [(0, 1)]


def test_a_tier_that_lost_everything_is_filled_again_from_the_pool() -> None:
    brain = tiering(THROUGH, SECOND_USE)
    tell(brain, *chain(0, 3), touched(0))
    drain(brain)
    brain.gone(0, words([3]))
    brain.forget_tier(0)
    brain.assert_consistent()
    assert brain.below(np.arange(3)).tolist() == [2, 0, 0]
    # What it had dropped before is not wanted, as no rule has admitted it since.
    assert drain(brain) == [(0, 1), (0, 2)]
    tell(brain, touched(2))
    assert (0, 3) in drain(brain)


def test_what_is_in_flight_when_a_tier_is_forgotten_is_written_again() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 2))
    orders = ask(brain)
    brain.forget_tier(0)
    store(brain, orders)
    assert brain.below(np.arange(2)).tolist() == [0, 0]
    assert drain(brain) == [(0, 1), (0, 2)]


def test_replicas_go_where_the_rule_is_cheapest() -> None:
    brain = tiering(NEVER, EVICTION, SECOND_USE, THROUGH, replicas=2)
    tell(brain, *chain(0, 2))
    assert sorted(drain(brain)) == [(2, 1), (2, 2), (3, 1), (3, 2)]


def test_replicas_by_tenant() -> None:
    brain = tiering(THROUGH, EVICTION, EVICTION, replicas={7: 3, 0: 1, 2: 0})
    for unit, tenant in enumerate((0, 7, 2, 8)):
        tell(brain, committed(unit, unit + 1, tenant=tenant))
    assert sorted(drain(brain)) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 2)]


def test_replicas_wait_for_the_first_rule_and_prefer_tiers_that_are_up() -> None:
    brain = tiering(SECOND_USE, EVICTION, EVICTION, replicas=2)
    brain.set_up(1, False)
    tell(brain, *chain(0, 1))
    assert drain(brain) == []
    tell(brain, touched(0))
    assert sorted(drain(brain)) == [(0, 1), (2, 1)]


def test_a_replica_that_is_lost_is_made_elsewhere() -> None:
    brain = tiering(THROUGH, EVICTION, EVICTION, replicas=2)
    tell(brain, *chain(0, 1))
    assert sorted(drain(brain)) == [(0, 1), (1, 1)]
    brain.gone(1, words([1]))
    brain.assert_consistent()
    assert drain(brain) == [(2, 1)]


def test_what_a_tier_has_counts_as_a_replica() -> None:
    brain = tiering(THROUGH, EVICTION, EVICTION, replicas=2)
    tell(brain, committed(0, 1, below=0b100))
    assert drain(brain) == [(0, 1)]


def fill(brain: Tiering, chains: int, length: int) -> None:
    """Equal chains, the first the coldest; each told head first, as the pool tells it."""
    for i in range(chains):
        parents = [ROOT, *range(i * length + 1, (i + 1) * length)]
        tell(brain, *(committed(i * length + j, i * length + j + 1, parents[j]) for j in range(length)))


def test_eviction_writes_nothing_while_there_is_room() -> None:
    brain = tiering(EVICTION)
    fill(brain, 8, 4)
    for share in (1.0, SHORT):
        brain.room(0, share)
        assert ask(brain) == []


def test_eviction_cleans_the_coldest_chain_as_a_run_from_its_head() -> None:
    brain = tiering(EVICTION)
    fill(brain, 8, 4)
    brain.room(0, 0.0)
    # An eighth of 32 slots: the coldest block is the first chain's tail, and its ancestors are needed for it.
    assert drain(brain) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert ask(brain) == []
    tell(brain, *(touched(unit) for unit in range(4)))
    assert drain(brain) == [(0, 5), (0, 6), (0, 7), (0, 8)], "now the second chain is the coldest"


def test_eviction_cleans_as_much_as_is_missing_to_an_eighth() -> None:
    brain = tiering(EVICTION)
    fill(brain, 32, 1)
    brain.room(0, 0.11)
    # 32 / 0.89 slots, of which 0.125 - 0.11 are missing: one block.
    assert drain(brain) == [(0, 1)]
    brain.room(0, 0.0)
    assert drain(brain) == [(0, 2), (0, 3), (0, 4)]
    for unit in range(4):
        tell(brain, evicted(unit))
    assert brain.counts()["lost_unsaved"] == 0
    assert drain(brain) == [(0, key) for key in range(5, 9)], "the hand moves on as they leave"


def test_eviction_starts_at_the_first_block_that_the_tier_lacks() -> None:
    brain = tiering(EVICTION)
    tell(brain, *(committed(u, u + 1, u or ROOT, below=int(u < 2)) for u in range(4)))
    fillers = [committed(10 + u, 100 + u) for u in range(28)]
    tell(brain, *fillers)
    brain.room(0, 0.0)
    assert drain(brain) == [(0, 3), (0, 4)]


def test_eviction_keeps_classes_apart() -> None:
    brain = tiering(EVICTION)
    tell(brain, *chain(0, 8), *chain(8, 8, slot_class=5))
    brain.room(5, 0.0)
    assert {key for _, key in drain(brain)} == set(range(9, 17))
    with pytest.raises(ConfigError):
        brain.room(at.MAX_CLASSES, 0.5)


def test_blocks_that_leave_unsaved_are_counted_where_a_rule_wanted_them() -> None:
    for rule, lost in ((THROUGH, 1), (EVICTION, 1), (SECOND_USE, 0), (NEVER, 0)):
        brain = tiering(rule)
        tell(brain, *chain(0, 1))
        tell(brain, evicted(0))
        assert brain.counts()["lost_unsaved"] == lost
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 1))
    orders = ask(brain)
    tell(brain, evicted(0))
    assert brain.counts()["lost_unsaved"] == 0, "it may still be saved"
    refuse(brain, orders)
    assert brain.counts()["lost_unsaved"] == 1


def test_runs_are_cut_and_orders_keep_to_their_number() -> None:
    brain = tiering(THROUGH, units=700)
    tell(brain, *chain(0, 600))
    sizes = []
    while orders := ask(brain, max_blocks=300):
        sizes.append([len(order.units) for order in orders])
        store(brain, orders)
    assert sizes == [[RUN_BLOCKS], [RUN_BLOCKS], [600 - 2 * RUN_BLOCKS]]
    tell(brain, *(committed(600 + i, 1000 + i) for i in range(20)))
    assert len(named(ask(brain, max_blocks=7))) == 7
    assert ask(brain, max_blocks=0) == []


def test_a_run_holds_one_tenant_and_one_space() -> None:
    brain = tiering(THROUGH)
    tell(brain, committed(0, 1), committed(1, 2, 1, tenant=5), committed(2, 3, 2, tenant=5, space=1))
    orders = []
    while new := ask(brain):
        orders += new
        store(brain, new)
    assert [(order.space, order.tenant, len(order.units)) for order in orders] == [(0, 0, 1), (0, 5, 1), (1, 5, 1)]


def test_a_slow_tier_does_not_take_all_that_may_be_in_flight() -> None:
    brain = tiering(THROUGH, THROUGH, units=200)
    tell(brain, *(committed(u, u + 1) for u in range(200)))
    answered = 0
    for _ in range(20):
        orders = ask(brain, max_blocks=20 - brain.counts()["in_flight"])
        quick = [order for order in orders if order.tier == 1]
        answered += len(quick)
        store(brain, quick)
    assert answered >= 100


def test_branches_are_all_written() -> None:
    brain = tiering(THROUGH)
    tell(brain, committed(0, 1), *(committed(u, u + 1, 1) for u in range(1, 20)), committed(30, 40, 7))
    assert sorted(drain(brain)) == sorted((0, key) for key in (*range(1, 21), 40))


def test_a_missed_eviction_is_taken_for_one() -> None:
    brain = tiering(THROUGH)
    tell(brain, *chain(0, 2))
    tell(brain, committed(1, 9, generation=2))
    assert brain.counts()["resident"] == 2
    assert sorted(drain(brain)) == [(0, 1), (0, 9)]
    # The same key in another unit: it has moved, and the old unit is empty.
    tell(brain, committed(5, 9, generation=2))
    assert brain.below(np.array([1, 5])).tolist() == [0, 1] and brain.counts()["resident"] == 2


def test_a_commit_that_is_told_twice_is_no_second_use() -> None:
    brain = tiering(SECOND_USE, NEVER)
    tell(brain, committed(0, 1), committed(0, 1, below=2))
    assert ask(brain) == [] and brain.below(np.array([0])).tolist() == [2]


def test_events_that_cannot_be_are_counted_and_left_out() -> None:
    brain = tiering(THROUGH, units=4)
    tell(brain, touched(0), evicted(1), committed(4, 1), touched(2**32 - 1), row(99, 0), committed(0, ROOT))  # type: ignore[arg-type]
    assert brain.counts()["unknown"] == 6 and brain.counts()["resident"] == 0
    tell(brain, committed(1, 5, slot_class=at.MAX_CLASSES), committed(2, 6, 6))
    assert brain.counts()["unknown"] == 7 and ask(brain) == [], "its own parent is no chain"
    brain.stored(0, np.array([3]), np.array([0]), words([777]))
    with pytest.raises(TypeError):
        brain.observe(np.zeros(1, np.uint32), 0)
    with pytest.raises(ValueError, match="agree"):
        brain.stored(0, np.array([3, 4]), np.array([0]), words([777]))


def test_what_cannot_be_is_refused() -> None:
    one = [TierRule("t", THROUGH)]
    for units, rules, ghosts, replicas in ((0, one, 1, 1), (1, one * 65, 1, 1), (1, one, -1, 1), (1, one, 1, {3: -1})):
        with pytest.raises(ConfigError):
            Tiering(units, rules, ghosts=ghosts, replicas=replicas)
    brain = tiering(THROUGH)
    with pytest.raises(ConfigError):
        brain.gone(1, words([1]))
    with pytest.raises(ConfigError):
        brain.set_up(-1, True)
    with pytest.raises(ConfigError):
        brain.forget_tier(9)


def test_sixty_four_tiers() -> None:
    brain = tiering(*[THROUGH] * 64, units=2, ghosts=2)
    tell(brain, *chain(0, 2))
    while orders := brain.orders(0, 10):
        for order in orders:
            brain.stored(order.tier, order.units, order.generations, order.keys)
    brain.assert_consistent()
    assert brain.below(np.arange(2)).tolist() == [2**64 - 1] * 2
    brain.gone(63, words([1, 2]))
    assert brain.below(np.arange(2)).tolist() == [2**63 - 1] * 2


def test_keys_that_share_a_word_are_different_blocks() -> None:
    brain = tiering(THROUGH)
    for unit, key in enumerate([(1, 0), (0, 1), (1, 1)]):
        event = committed(unit, 0)
        event["key"] = key
        tell(brain, event)
    assert sum(len(order.units) for order in ask(brain)) == 3


def test_a_broken_table_is_noticed() -> None:
    def broken(column: int, value: int) -> Tiering:
        brain = tiering(THROUGH)
        tell(brain, *chain(0, 3))
        n = int(brain._table.node_of[1])
        brain._table.slim[n, column] = value
        return brain

    for column, value in (
        (at.PARENT, 0), (at.CHILD, 0), (at.CHILDREN, 2), (at.UNIT, 1), (at.FLYING, 1), (at.FLAGS, 0),
        (at.FLAGS, at.RESIDENT | at.COLD), (at.CLASS, 3), (at.NEWER, 0), (at.OLDER, 1),
    ):  # fmt: skip
        with pytest.raises(ConsistencyError):
            broken(column, value).assert_consistent()
    for name, where in (("index", 0), ("node_of", 5), ("lists", (0, 0, at.LENGTH)), ("tiers", (0, at.WAITING))):
        brain = tiering(THROUGH)
        tell(brain, *chain(0, 3))
        array = getattr(brain._table, name)
        if name == "index":
            where = int(np.flatnonzero(array)[0])
            array[where] = 0
        else:
            array[where] += 1
        with pytest.raises(ConsistencyError):
            brain.assert_consistent()


def test_a_million_units_claim_memory_only_as_blocks_come() -> None:
    def resident_mib() -> float:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096 / 2**20

    before = resident_mib()
    brain = tiering(THROUGH, SECOND_USE, units=1_000_000)
    assert resident_mib() - before < 64
    events = np.zeros(50_000, tier_event_dtype)
    events["kind"], events["unit"] = 1, np.arange(0, 1_000_000, 20)
    events["key"][:, 0] = np.arange(1, 50_001)
    events["parent"][:, 0] = np.where(np.arange(50_000) % 100, np.arange(50_000), ROOT)
    brain.observe(events, 0)
    done = 0
    while orders := brain.orders(0, 8192):
        for order in orders:
            brain.stored(order.tier, order.units, order.generations, order.keys)
            done += len(order.units)
    assert done == 50_000
    assert brain.counts()["waiting"] == 0
    assert resident_mib() - before < 128
