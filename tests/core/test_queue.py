"""Which transfer runs next: against a plain model, and the promises on shares, places, caps and cancelling."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from penstock.core.queue import Job, TransferQueue
from penstock.errors import ConfigError
from penstock.types import Urgency

FETCH, PREFETCH, WRITE_BACK = Urgency


def job(
    number: int, urgency: Urgency = FETCH, *, tier: int = 0, tenant: int = 0, n_bytes: int = 10,
    deadline: float | None = None,
) -> Job:  # fmt: skip
    return Job(number, tier, urgency, tenant, n_bytes, deadline)


def run(queue: TransferQueue, n: int, tier: int = 0) -> list[Job]:
    """The next n jobs, one at a time."""
    jobs = []
    for _ in range(n):
        taken = queue.take(tier, 0.0)
        if taken is None:
            break
        jobs.append(taken)
        queue.done(taken.id, 0.0)
        queue.assert_consistent()
    return jobs


def ids(jobs: list[Job]) -> list[int]:
    return [each.id for each in jobs]


def test_the_more_urgent_goes_first() -> None:
    queue = TransferQueue(1, [1])
    for number, urgency in enumerate((WRITE_BACK, PREFETCH, FETCH, PREFETCH, FETCH)):
        queue.put(job(number, urgency))
    assert ids(run(queue, 9)) == [2, 4, 1, 3, 0]


def test_a_tenants_own_jobs_go_by_deadline_and_then_in_order() -> None:
    queue = TransferQueue(1, [1])
    for number, deadline in enumerate((None, 5.0, 1.0, None, 1.0)):
        queue.put(job(number, deadline=deadline))
    assert ids(run(queue, 9)) == [2, 4, 1, 0, 3]


def test_tiers_do_not_wait_for_each_other() -> None:
    queue = TransferQueue(2, [1, 1])
    queue.put(job(1, tier=1))
    assert queue.take(0, 0.0) is None
    taken = queue.take(1, 0.0)
    assert taken is not None and taken.id == 1 and queue.running(1) == 1 and queue.running(0) == 0


@pytest.mark.parametrize("urgency", list(Urgency))
def test_one_place_is_kept_for_fetches(urgency: Urgency) -> None:
    queue = TransferQueue(1, [3])
    for number in range(5):
        queue.put(job(number, urgency))
    taken = [queue.take(0, 0.0) for _ in range(5)]
    assert sum(each is not None for each in taken) == (3 if urgency == FETCH else 2)
    if urgency != FETCH:
        assert queue.next_time(0, 0.0) is None
        queue.put(job(9))
        assert queue.next_time(0, 0.0) == 0.0
        fetch = queue.take(0, 0.0)
        assert fetch is not None and fetch.id == 9
    queue.assert_consistent()


def test_the_only_place_serves_everything() -> None:
    queue = TransferQueue(1, [1])
    queue.put(job(1, WRITE_BACK))
    assert queue.take(0, 0.0) == job(1, WRITE_BACK)
    queue.put(job(2))
    assert queue.take(0, 0.0) is None and queue.next_time(0, 0.0) is None


def backlog(queue: TransferQueue, urgent_bytes: int, behind_bytes: int, n: int) -> Counter[Urgency]:
    """Bytes by urgency of n jobs, fetches and write-backs always waiting."""
    moved: Counter[Urgency] = Counter()
    queue.put(job(0, FETCH, n_bytes=urgent_bytes))
    queue.put(job(1, WRITE_BACK, n_bytes=behind_bytes))
    for number in range(2, 2 + n):
        taken = queue.take(0, 0.0)
        assert taken is not None
        queue.done(taken.id, 0.0)
        moved[taken.urgency] += taken.n_bytes
        queue.put(job(number, taken.urgency, n_bytes=taken.n_bytes))
    return moved


@pytest.mark.parametrize(
    ("urgent_bytes", "behind_bytes", "n"), [(10, 10, 1000), (1000, 10, 1000), (10, 1000, 20_000), (7, 13, 1000)]
)
def test_write_backs_get_a_sixteenth_while_fetches_wait(urgent_bytes: int, behind_bytes: int, n: int) -> None:
    moved = backlog(TransferQueue(1, [1]), urgent_bytes, behind_bytes, n)
    assert moved[WRITE_BACK] / moved.total() == pytest.approx(1 / 16, rel=0.1)


def test_write_backs_save_up_nothing_while_none_waits() -> None:
    queue = TransferQueue(1, [1])
    for number in range(1000):
        queue.put(job(number))
    run(queue, 900)
    for number in range(1000, 1100):
        queue.put(job(number, WRITE_BACK))
    assert {each.urgency for each in run(queue, 14)} == {FETCH}


def test_what_waits_without_a_place_saves_up_one_job() -> None:
    queue = TransferQueue(1, [2])
    queue.put(job(0, WRITE_BACK))
    assert queue.take(0, 0.0) is not None
    for number in range(1, 1000):
        queue.put(job(number, FETCH if number < 900 else WRITE_BACK))
    run(queue, 850)
    queue.done(0, 0.0)
    after = [each.urgency for each in run(queue, 32)]
    assert after.count(WRITE_BACK) in (2, 3), "850 fetches would have been worth 56"


def test_tenants_get_the_same_bytes_whatever_their_jobs_sizes() -> None:
    queue = TransferQueue(1, [1])
    sizes = {1: 10, 2: 70, 3: 3}
    for tenant, n_bytes in sizes.items():
        for number in range(200):
            queue.put(job(tenant * 10_000 + number, tenant=tenant, n_bytes=n_bytes))
    moved: Counter[int] = Counter()
    for taken in run(queue, 240):
        moved[taken.tenant] += taken.n_bytes
        # Goyal et al., theorem 1: two backlogged flows differ by at most one job of each.
        assert max(moved[t] for t in sizes) - min(moved[t] for t in sizes) <= 70 + 10


def test_who_was_idle_saves_up_nothing() -> None:
    queue = TransferQueue(1, [1])
    for number in range(1000):
        queue.put(job(number, tenant=1))
    run(queue, 500)
    for number in range(1000, 1100):
        queue.put(job(number, tenant=2))
    counts = Counter(each.tenant for each in run(queue, 20))
    assert counts == {1: 10, 2: 10}


def test_who_left_and_comes_again_is_not_ahead() -> None:
    queue = TransferQueue(1, [1])
    queue.put(job(0, tenant=1, n_bytes=100))
    queue.put(job(1, tenant=2, n_bytes=10))
    queue.put(job(2, tenant=2, n_bytes=10))
    assert ids(run(queue, 1)) == [0]
    queue.put(job(3, tenant=1, n_bytes=1))
    assert ids(run(queue, 3)) == [1, 2, 3]


def test_bytes_that_were_not_moved_are_not_held_against_the_tenant() -> None:
    for moved, order in ((None, [1, 2, 3]), (0, [3, 1, 2])):
        queue = TransferQueue(1, [1])
        queue.put(job(0, tenant=1, n_bytes=100))
        for number in (1, 2):
            queue.put(job(number, tenant=2, n_bytes=10))
        queue.put(job(3, tenant=1, n_bytes=10))
        first = queue.take(0, 0.0)
        assert first is not None and first.id == 0
        queue.done(0, 0.0, moved)
        expected = [1, 3, 2] if moved == 0 else order
        assert ids(run(queue, 3)) == expected


def test_an_endless_row_of_new_tenants_starves_nobody_and_is_forgotten() -> None:
    queue = TransferQueue(1, [1])
    for number in range(30):
        queue.put(job(number, tenant=0, n_bytes=100))
    mine = 0
    for number in range(100, 2100):
        queue.put(job(number, tenant=number))
        mine += run(queue, 1)[0].tenant == 0
    assert mine >= 10
    assert len(queue._lanes[0][FETCH].flows) < 100


def test_a_tiers_cap_bounds_the_bytes_of_any_interval() -> None:
    queue = TransferQueue(1, [4], caps={0: 1000.0})
    for number in range(100):
        queue.put(job(number, n_bytes=50))
    now = 10.0
    starts: list[float] = []
    while (at := queue.next_time(0, now)) is not None and len(starts) < 40:
        now = at
        taken = queue.take(0, now)
        assert taken is not None
        starts.append(now)
        queue.done(taken.id, now)
    for first in range(len(starts)):
        for last in range(first, len(starts)):
            assert 50 * (last - first + 1) <= 1000 * (starts[last] - starts[first] + 0.1) + 50 + 1e-6
    assert starts[-1] - starts[0] == pytest.approx(40 * 50 / 1000, abs=0.2)


def test_a_tenants_cap_holds_over_all_tiers_and_leaves_the_others_alone() -> None:
    queue = TransferQueue(2, [1, 1], tenant_caps={1: 100.0})
    for number in range(20):
        queue.put(job(number, tier=number % 2, tenant=1, n_bytes=100))
        queue.put(job(100 + number, tier=number % 2, tenant=2, n_bytes=100))
    mine = others = 0
    for tick in range(1000):
        now = tick / 100
        for tier in (0, 1):
            if (taken := queue.take(tier, now)) is not None:
                mine += taken.tenant == 1
                others += taken.tenant == 2
                queue.done(taken.id, now)
    assert others == 20 and 9 <= mine <= 12


def test_a_large_job_is_not_starved_by_small_ones_under_a_cap() -> None:
    queue = TransferQueue(1, [1], caps={0: 100.0})
    queue.put(job(0, n_bytes=100_000))
    queue.put(job(1, n_bytes=1))
    taken = queue.take(0, 0.0)
    assert taken is not None and taken.id == 0
    queue.done(0, 0.0)
    assert queue.take(0, 1.0) is None
    assert queue.next_time(0, 1.0) == pytest.approx(1000, abs=0.2)


def test_what_did_not_move_does_not_count_against_a_cap() -> None:
    queue = TransferQueue(1, [1], caps={0: 100.0}, tenant_caps={0: 50.0})
    for number in (0, 1):
        queue.put(job(number, n_bytes=1000))
    assert queue.take(0, 0.0) is not None
    queue.done(0, 0.0, moved_bytes=0)
    assert queue.next_time(0, 0.0) == 0.0


def test_cancel_tells_waiting_from_running_from_gone() -> None:
    queue = TransferQueue(1, [1])
    for number in range(3):
        queue.put(job(number, n_bytes=number + 1))
    assert queue.take(0, 0.0) is not None
    assert queue.waiting_bytes(0) == 5 and queue.waiting_bytes(0, FETCH) == 5 and queue.waiting_bytes(0, PREFETCH) == 0
    assert not queue.cancel(0), "it runs"
    assert queue.cancel(1)
    assert not queue.cancel(1) and not queue.cancel(77)
    queue.done(0, 0.0)
    assert not queue.cancel(0)
    with pytest.raises(KeyError):
        queue.done(0, 0.0)
    assert ids(run(queue, 5)) == [2]


def test_what_cannot_be_is_refused() -> None:
    for places, caps in (([1], {}), ([1, 0], {}), ([1, 1], {2: 1.0}), ([1, 1], {0: 0.0}), ([1, 1], {0: inf})):
        with pytest.raises(ConfigError):
            TransferQueue(2, places, caps=caps)
    with pytest.raises(ConfigError):
        TransferQueue(1, [1], tenant_caps={5: -1.0})
    queue = TransferQueue(1, [1])
    queue.put(job(1))
    for wrong in (job(1), job(2, tier=1), job(2, tier=-1), job(2, n_bytes=-1)):
        with pytest.raises(ConfigError):
            queue.put(wrong)
    queue.assert_consistent()


def by_deadline(each: Job) -> tuple[float, int]:
    return (inf if each.deadline is None else each.deadline, each.id)


@dataclass
class Model:
    """The same promises written down without any care for speed."""

    places: list[int]
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    due: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    tags: dict[tuple[int, Urgency, int], float] = field(default_factory=dict)
    time: dict[tuple[int, Urgency], float] = field(default_factory=lambda: defaultdict(float))

    def lane(self, tier: int, urgency: Urgency) -> list[Job]:
        return [each for each in self.waiting if (each.tier, each.urgency) == (tier, urgency)]

    def own(self, of: Job) -> list[Job]:
        return [each for each in self.lane(of.tier, of.urgency) if each.tenant == of.tenant]

    def put(self, new: Job) -> None:
        flow, lane = (new.tier, new.urgency, new.tenant), (new.tier, new.urgency)
        if not self.own(new):
            self.tags[flow] = max(self.tags.get(flow, 0.0), self.time[lane])
        self.waiting.append(new)

    def remove(self, old: Job) -> None:
        self.waiting.remove(old)
        if not self.lane(old.tier, old.urgency):
            self.time[old.tier, old.urgency] = 0.0
            self.tags = {flow: tag for flow, tag in self.tags.items() if flow[:2] != (old.tier, old.urgency)}

    def head(self, tier: int, urgency: Urgency) -> Job | None:
        mine = [each for each in self.running if each.tier == tier]
        behind = sum(each.urgency != FETCH for each in mine)
        places = self.places[tier]
        if len(mine) >= places or (urgency != FETCH and places > 1 and behind >= places - 1):
            return None
        lane = self.lane(tier, urgency)
        heads = [
            min(own, key=by_deadline)
            for tenant in {each.tenant for each in lane}
            if (own := [each for each in lane if each.tenant == tenant])
        ]
        return min(heads, key=lambda each: (self.tags[tier, urgency, each.tenant], each.id), default=None)

    def take(self, tier: int) -> Job | None:
        behind = self.head(tier, WRITE_BACK)
        best = self.head(tier, FETCH) or self.head(tier, PREFETCH)
        if best is None or (behind is not None and self.due[tier] >= behind.n_bytes):
            best = behind
        if best is None:
            return None
        if best.urgency == WRITE_BACK:
            self.due[tier] = max(0.0, self.due[tier] - best.n_bytes)
        elif waiting := self.lane(tier, WRITE_BACK):
            largest = max(min(self.own(each), key=by_deadline).n_bytes for each in waiting)
            share = best.n_bytes / 15
            self.due[tier] = min(self.due[tier] + share, largest + share)
        flow, lane = (tier, best.urgency, best.tenant), (tier, best.urgency)
        tenants = {each.tenant for each in self.lane(tier, best.urgency)}
        lowest = min(self.tags[tier, best.urgency, tenant] for tenant in tenants)
        self.time[lane] = max(self.time[lane] + best.n_bytes / len(tenants), lowest)
        self.tags[flow] += best.n_bytes
        self.remove(best)
        self.running.append(best)
        return best


class Queues(RuleBasedStateMachine):
    """Anything may happen at any moment; without caps the queue and the model always agree."""

    jobs: Bundle[int] = Bundle("jobs")

    @initialize(places=st.lists(st.integers(1, 3), min_size=1, max_size=2))
    def start(self, places: list[int]) -> None:
        self.queue, self.model = TransferQueue(len(places), places), Model(places)
        self.number = 0

    @rule(
        target=jobs, tier=st.integers(0, 1), urgency=st.sampled_from(Urgency), tenant=st.integers(0, 2),
        n_bytes=st.integers(0, 40), deadline=st.none() | st.sampled_from([1.0, 2.0]),
    )  # fmt: skip
    def put(self, tier: int, urgency: Urgency, tenant: int, n_bytes: int, deadline: float | None) -> int:
        self.number += 1
        new = Job(self.number, tier % len(self.model.places), urgency, tenant, n_bytes, deadline)
        self.queue.put(new)
        self.model.put(new)
        return self.number

    @rule(tier=st.integers(0, 1))
    def take(self, tier: int) -> None:
        tier %= len(self.model.places)
        can = self.queue.next_time(tier, 0.0)
        expected = self.model.take(tier)
        assert self.queue.take(tier, 0.0) == expected
        assert (can == 0.0) == (expected is not None)

    @rule(number=consumes(jobs))
    def end(self, number: int) -> None:
        """Cancel it, or let it end if it runs."""
        waits = [each for each in self.model.waiting if each.id == number]
        assert self.queue.cancel(number) == bool(waits)
        if waits:
            self.model.remove(waits[0])
        else:
            self.queue.done(number, 0.0)
            self.model.running = [each for each in self.model.running if each.id != number]

    @invariant()
    def agree(self) -> None:
        self.queue.assert_consistent()
        for tier in range(len(self.model.places)):
            assert self.queue.running(tier) == sum(each.tier == tier for each in self.model.running)
            for urgency in Urgency:
                expected = sum(each.n_bytes for each in self.model.lane(tier, urgency))
                assert self.queue.waiting_bytes(tier, urgency) == expected


TestQueues = Queues.TestCase
TestQueues.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 60)), min_size=1, max_size=60),
    tier_cap=st.none() | st.floats(10, 1000),
    tenant_cap=st.none() | st.floats(10, 1000),
    places=st.integers(1, 3),
    began=st.floats(0, 1e9),
)
def test_everything_that_waits_runs_at_the_time_that_was_told(
    jobs: list[tuple[int, int, int]], tier_cap: float | None, tenant_cap: float | None, places: int, began: float
) -> None:
    queue = TransferQueue(
        1, [places], caps={} if tier_cap is None else {0: tier_cap},
        tenant_caps={} if tenant_cap is None else {1: tenant_cap},
    )  # fmt: skip
    for number, (urgency, tenant, n_bytes) in enumerate(jobs):
        queue.put(job(number, Urgency(urgency), tenant=tenant, n_bytes=n_bytes))
    now = began
    seen: set[int] = set()
    running: list[int] = []
    while len(seen) < len(jobs):
        at = queue.next_time(0, now)
        if at is None:
            queue.done(running.pop(0), now)
            continue
        if at > now:
            assert queue.take(0, now) is None
        now = at
        taken = queue.take(0, now)
        assert taken is not None, "next_time promised it"
        seen.add(taken.id)
        running.append(taken.id)
        queue.assert_consistent()
    assert seen == set(range(len(jobs)))


def test_a_capped_tenant_keeps_a_tier_busy_with_one_job() -> None:
    """Else what waits for its cap would count as work that the tier is behind with."""
    queue = TransferQueue(1, [2], tenant_caps={7: 1.0})
    for number in range(5):
        queue.put(Job(number, 0, Urgency.WRITE_BACK, 7, 100, None))
    queue.put(Job(5, 0, Urgency.WRITE_BACK, 8, 30, None))
    assert queue.waiting_bytes(0, Urgency.WRITE_BACK) == 530
    assert queue.ready_bytes(0, Urgency.WRITE_BACK) == 130
    assert queue.ready_bytes(0, Urgency.FETCH) == 0
