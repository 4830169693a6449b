"""Parts of the mover by themselves: writes, whom to ask, threads, and what a client hears."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from penstock.core.speed import SpeedMeter
from penstock.core.tiering import Tiering, TierRule
from penstock.errors import TierTimeout, TierUnavailable
from penstock.pool.below import Fetch, TierLine
from penstock.pool.layout import Geometry
from penstock.pool.stage import Stage
from penstock.pool.tier_wire import Arrived
from penstock.pool.wire import encode
from penstock.runtime.mover import workers as workers_module
from penstock.runtime.mover.claims import Claims
from penstock.runtime.mover.fetches import Fetcher, FetchOrder
from penstock.runtime.mover.places import Places, TierPlace
from penstock.runtime.mover.watch import _without_overwritten
from penstock.runtime.mover.workers import Workers
from penstock.runtime.mover.writes import PART_BYTES, Writer
from penstock.runtime.shelf import Shelf
from penstock.testing.dict_tier import DictTier
from penstock.testing.pool import Site, make_space
from penstock.testing.tier_blocks import block_keys, empty, filled, tier_space
from penstock.tiers.base import Batch, BlockSpace, Keys, Placed
from penstock.tiers.registry import parse_tier
from penstock.types import EventKind, FetchEnd, Urgency, WriteRule
from tests.core.tier_events import ask, chain, root_bytes, tell
from tests.support import PATIENCE_S, unique_name, until

SPACE = tier_space()
C, E, T = EventKind.COMMITTED, EventKind.EVICTED, EventKind.TOUCHED


def place(number: int, tier: DictTier) -> TierPlace:
    return TierPlace(number, parse_tier(f"disk:/nowhere-{number}"), Shelf(tier), SpeedMeter(1e-4, 1e9))


# ---- writes


class DownStage:
    """Whatever is asked of it, the tier cannot be reached."""

    def space(self, number: int) -> Any:
        return SimpleNamespace(block_bytes=1)

    def lease(self, *asked: Any) -> Any:
        raise TierUnavailable("down")


def writer_over(brain: Tiering, stage: Any, places: Places) -> Writer:
    return Writer(stage, places, brain, threading.Lock())


def brain_with(n_blocks: int, n_tiers: int = 1) -> Tiering:
    brain = Tiering(64, [TierRule(f"t{i}", WriteRule.THROUGH) for i in range(n_tiers)])
    brain.add_root(root_bytes())
    tell(brain, *chain(0, n_blocks))
    return brain


def test_a_tier_that_cannot_be_reached_counts_against_no_block() -> None:
    brain = brain_with(5)
    workers = Workers([1])
    writer = writer_over(brain, DownStage(), Places([place(0, DictTier("d"))], workers))
    for attempt in range(20):
        brain.set_up(0, True)  # as with every look at the tiers
        (order,) = ask(brain, now_ms=attempt)
        writer.submit(order)
        until(lambda: brain.counts()["in_flight"] == 0, "it ended")
    assert (brain.counts()["gave_up"], brain.counts()["waiting"]) == (0, 5)
    workers.stop()


def test_a_tier_whose_writes_hang_is_given_up_and_another_gets_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "STUCK_S", 0.0)
    released, hung = threading.Event(), threading.Event()

    class HangingStage(DownStage):
        def lease(self, *asked: Any) -> Any:
            hung.set()
            assert released.wait(PATIENCE_S)
            raise TierUnavailable("late")

    brain = brain_with(5, 2)
    brain.set_up(1, False)
    workers = Workers([2, 2])
    places = Places([place(0, DictTier("a")), place(1, DictTier("b"))], workers)
    writer = writer_over(brain, HangingStage(), places)
    (order,) = ask(brain)
    writer.submit(order)
    assert hung.wait(PATIENCE_S)
    brain.set_up(1, True)
    assert ask(brain) == [], "a block is on its way to one tier at a time"
    assert workers.stuck(0, Urgency.WRITE_BACK) and not workers.stuck(0), "a place is kept for fetches"
    writer.give_up(0)
    (elsewhere,) = ask(brain)
    assert (elsewhere.tier, len(elsewhere.units)) == (1, 5)
    released.set()
    until(lambda: workers.running(0) == 0, "the call came back")
    assert brain.counts()["in_flight"] == 5, "what comes back late does not end another's flight"
    workers.stop()


class SlowTier(DictTier):
    """Takes what it can in time, and times out over more."""

    def __init__(self, most: int) -> None:
        super().__init__("slow")
        self.most, self.calls = most, list[int]()

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        self.calls.append(len(batch))
        if len(batch) > self.most:
            raise TierTimeout("too much")
        return super().write(batch, deadline)


def test_a_run_goes_in_parts_that_the_tier_takes_in_time() -> None:
    tier = SlowTier(3)
    slow = place(0, tier)
    writer = writer_over(brain_with(1), DownStage(), Places([slow], Workers([1])))
    writer._part_bytes[0] = 16 * SPACE.block_bytes
    batch, placed = filled(SPACE, block_keys(SPACE, 1, 32)), np.full(32, 255, np.uint8)
    for _ in range(4):
        slow.shelf = Shelf(tier)  # one that has not been left alone
        try:
            writer._write_parts(slow, batch, placed)
            break
        except TierTimeout:
            continue
    assert tier.calls[:4] == [16, 8, 4, 2]
    slow.shelf = Shelf(tier)
    tier.most = 1000
    writer._part_bytes[0] = SPACE.block_bytes
    writer._write_parts(slow, batch, placed)
    assert set(placed.tolist()) <= {int(Placed.STORED), int(Placed.PRESENT)}
    assert writer._part_bytes[0] == PART_BYTES or writer._part_bytes[0] > 16 * SPACE.block_bytes, "it grows again"


def test_a_full_pool_looks_full_whatever_its_slots_waste() -> None:
    """Else `write=eviction` would wait for the last eighth of a pool, which never comes."""
    geometry = Geometry(unit_bytes=4096, slab_bytes=1 << 20, n_slabs=4, n_lanes=4, leases=48, ring=32, max_spaces=8)
    with Site.opened(unique_name(), geometry) as site:
        stage = Stage(site.pool)
        for segment_bytes, slots in ((64 << 10, 7), (256 << 10, 1), (6 << 10, 84)):
            handle = site.pool.space(make_space(f"of {segment_bytes}", n_segments=2, segment_bytes=segment_bytes))
            space = stage.space(handle.id)
            assert space is not None
            assert 4 * slots * stage.slot_share(space) >= 0.999 * stage.data_bytes


# ---- whom to ask


class FarTier(DictTier):
    local = False

    def __init__(self, name: str, held: bool) -> None:
        super().__init__(name)
        self.held, self.left_s = held, 0.0

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        self.left_s = deadline - time.monotonic()
        return np.full(len(keys), self.held)


def test_a_short_question_leaves_time_for_every_tier() -> None:
    first, second = FarTier("first", False), FarTier("second", True)
    places = Places([place(0, first), place(1, second)], Workers([1, 1]))
    keys = block_keys(SPACE, 1, 3)
    found = places.where(SPACE, keys, time.monotonic() + 0.04, frozenset())
    assert first.left_s <= 0.02
    assert found.tiers.tolist() == [1, 1, 1]
    ((lacking, which),) = found.lacking
    assert lacking == 0 and np.array_equal(which, keys)


# ---- speed


def test_a_sample_counts_what_others_read_meanwhile() -> None:
    """A device that serves one after the other: the second read waits for the first."""

    class Nested(DictTier):
        inner: Any = nullcontext

        def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
            inner, self.inner = self.inner, nullcontext
            inner()
            return super().read(batch, deadline)

    tier = Nested("n")
    shelf = Shelf(tier)
    keys = block_keys(SPACE, 1, 6)
    shelf.write(filled(SPACE, keys), time.monotonic() + PATIENCE_S)
    tier.inner = lambda: shelf.read(empty(SPACE, keys[2:]), None, time.monotonic() + PATIENCE_S)
    shelf.read(empty(SPACE, keys[:2]), None, time.monotonic() + PATIENCE_S)
    assert [n_bytes // SPACE.block_bytes for n_bytes, _ in shelf.samples()] == [4, 6]


# ---- fetches


@pytest.mark.parametrize("brought", [5, 8])
def test_what_another_fetch_has_just_brought_is_not_read_again(brought: int) -> None:
    """It arrives, and nobody claims it any more, between this fetch's look at the pool and its own claim."""
    keys, there = block_keys(SPACE, 1, 8), set[bytes]()

    class Late(FarTier):
        def holds(self, space: BlockSpace, asked: Keys, deadline: float) -> npt.NDArray[np.bool_]:
            there.update(key.tobytes() for key in keys[:brought])
            return super().holds(space, asked, deadline)

    class NoRoom:
        """A pool in which every reservation is counted, and none is granted."""

        most_slots, bytes_ahead = 64, 0

        def slot_share(self, space: Any) -> int:
            return 1

        def __init__(self) -> None:
            self.asked: list[int] = []

        def resident(self, space: Any, keys: Keys) -> npt.NDArray[np.bool_]:
            return np.array([key.tobytes() in there for key in keys])

        def lease_key(self, space: Any, key: Keys) -> None:
            return None

        def reserve(self, space: Any, n: int, *rest: Any) -> list[int]:
            self.asked.append(n)
            return []

    stage, told = NoRoom(), list[int]()
    places = Places([place(0, Late("late", True))], Workers([1]))
    fetcher = Fetcher(cast(Stage, stage), places, Claims(), lambda *_: None, lambda *_: None)
    order = FetchOrder(cast(Any, SPACE), keys, keys, time.monotonic() + PATIENCE_S, Urgency.FETCH, [0] * 5)
    outcome = fetcher.fetch(order, told.append, lambda: False)
    assert (outcome.n, outcome.moved, told) == (brought, 0, [0, brought])
    assert stage.asked == ([] if brought == 8 else [3])
    assert outcome.why is (FetchEnd.DONE if brought == 8 else FetchEnd.NO_ROOM)
    places.workers.stop()


# ---- threads


def test_what_somebody_waits_for_is_hurried() -> None:
    workers, go, order = Workers([1]), threading.Event(), list[str]()
    entered = threading.Event()

    def first() -> None:
        entered.set()
        assert go.wait(PATIENCE_S)

    workers.submit(0, Urgency.FETCH, 0, 1, None, first)
    assert entered.wait(PATIENCE_S)
    wanted = workers.submit(0, Urgency.PREFETCH, 0, 1, None, lambda: order.append("wanted"))
    last = workers.submit(0, Urgency.PREFETCH, 1, 1, None, lambda: order.append("prefetch"))
    urgent = workers.submit(0, Urgency.FETCH, 0, 1, None, lambda: order.append("fetch"))
    workers.hurry(wanted)
    workers.hurry(urgent)
    go.set()
    assert last.wait(PATIENCE_S)
    assert set(order[:2]) == {"wanted", "fetch"} and order[2] == "prefetch"
    workers.hurry(wanted)  # it is over
    workers.stop()


# ---- events


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([(C, 1), (E, 1), (C, 1)], [(E, 1), (C, 1)]),
        ([(C, 1), (T, 1), (C, 2), (E, 1), (C, 1)], [(T, 1), (C, 2), (E, 1), (C, 1)]),
        ([(E, 1), (C, 1), (E, 1)], [(E, 1), (C, 1), (E, 1)]),
        ([(T, 3), (E, 2)], [(T, 3), (E, 2)]),
    ],
)
def test_a_slot_that_is_used_again_is_told_of_once(
    events: list[tuple[EventKind, int]], expected: list[tuple[EventKind, int]]
) -> None:
    kinds, units = np.array([kind for kind, _ in events], np.uint32), np.array([unit for _, unit in events], np.int64)
    kinds, units = _without_overwritten(kinds, units)
    assert list(zip(kinds.tolist(), units.tolist(), strict=True)) == expected


# ---- what a client hears


def test_one_poll_takes_in_all_there_is() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    line = SimpleNamespace(keep=lambda connection: connection.close())
    with theirs:
        fetch = Fetch(cast(TierLine, line), ours, time.monotonic() + PATIENCE_S, FetchEnd.DEADLINE)
        for n in itertools.chain(range(1, 11)):
            theirs.sendall(encode(Arrived(n)))
        assert not fetch.poll()
        assert fetch.arrived == 10
        assert not fetch.poll()
        fetch.cancel()
