"""The shelf: what is damaged is never good, everything is counted, and a tier that failed is left alone for a while."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import TierError, TierTimeout, TierUnavailable
from penstock.pool.copies import verify
from penstock.runtime.shelf import COUNTERS, LOGGED_KEYS, LONGEST_PAUSE_S, SAMPLES, Got, Shelf
from penstock.testing.dict_tier import DictTier
from penstock.testing.tier_blocks import (
    AWKWARD_KEYS,
    Buffers,
    assert_right,
    block_keys,
    contents,
    empty,
    filled,
    roots_of,
    tier_space,
)
from penstock.tiers.base import Batch, BlockSpace, Keys, Placed
from penstock.tiers.wrap import Fault, FaultKind, Faulty, Plan, Recorded, at, at_random

SPACE = tier_space(0, 13, 320)
KEYS = block_keys(SPACE, 0, 8)
EVER = float("inf")
GOOD, ABSENT, FAILED, DAMAGED = (int(each) for each in Got)


class FarDict(DictTier):
    local = False


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def shelf_with(plan: Plan, n: int = 8, clock: Clock | None = None) -> tuple[Shelf, Recorded]:
    """A shelf over a far, faulty, recorded dict that holds the first n blocks."""
    content = FarDict()
    content.write(filled(SPACE, KEYS[:n]), EVER)
    tier = Recorded(Faulty(content, plan))
    return Shelf(tier, clock or Clock()), tier


def counted(shelf: Shelf) -> dict[str, int]:
    return {name: n for name, n in shelf.counters().items() if n}


# ---- verification


def test_good_blocks_and_their_tables() -> None:
    shelf, _ = shelf_with(at({}), 5)
    tables = np.full((8, SPACE.n_segments + 1), 7, np.uint64)
    at_ = tables.ctypes.data + np.arange(8, dtype=np.int64) * tables.strides[0]
    buffers = Buffers(SPACE, 8)
    batch = empty(SPACE, KEYS, buffers=buffers)
    got = shelf.read(batch, at_, EVER)
    assert got.dtype == np.uint8 and got.tolist() == [GOOD] * 5 + [ABSENT] * 3
    assert_right(batch, got, np.arange(8) < 5)  # the two enums agree in these
    segments, bad = np.arange(SPACE.n_segments, dtype=np.int64), np.ones(5, np.uint8)
    verify(5, buffers.addresses, segments, 320, 13, at_, KEYS, roots_of(SPACE, KEYS), bad)
    assert not bad.any()
    assert (tables[:, -1] == 7).all() and (tables[5:] == 7).all()
    assert counted(shelf) == {"reads": 1, "good": 5, "absent": 3, "read_bytes": 5 * SPACE.block_bytes}


@pytest.mark.parametrize("fault", [FaultKind.FLIP, FaultKind.ROOT, FaultKind.SWAP])
@pytest.mark.parametrize("with_tables", [True, False])
def test_damaged_blocks_are_found_and_removed(fault: FaultKind, with_tables: bool) -> None:
    shelf, tier = shelf_with(at({("read", 0): Fault(fault, (1, 4, 6), 12345)}), 7)
    tables = np.zeros((8, SPACE.n_segments), np.uint64)
    at_ = tables.ctypes.data + np.arange(8, dtype=np.int64) * tables.strides[0] if with_tables else None
    got = shelf.read(empty(SPACE, KEYS), at_, EVER)
    damaged = np.isin(np.arange(8), (1, 4, 6))
    assert got.tolist() == [DAMAGED if d else ABSENT if i == 7 else GOOD for i, d in enumerate(damaged)]
    assert tier.holds(SPACE, KEYS, EVER).tolist() == (~damaged & (np.arange(8) < 7)).tolist()
    assert counted(shelf) == {
        "reads": 1, "good": 4, "absent": 1, "damaged": 3, "read_bytes": 7 * SPACE.block_bytes,
    }  # fmt: skip
    assert shelf.up


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 3), st.sampled_from([(4, 1024), (13, 320), (2, 8192), (1, 256)]))
def test_nothing_damaged_is_ever_good(seed: int, version: int, size: tuple[int, int]) -> None:
    """Whatever goes wrong in any call: what is GOOD has the bytes of a version that was written under its key."""
    kinds = [kind for kind in FaultKind if kind is not FaultKind.HANG]
    space = tier_space(1, *size)
    keys = block_keys(space, 0, 16)
    clock = Clock()
    shelf = Shelf(Faulty(FarDict(), at_random(seed, 0.6, kinds)), clock)
    right = [contents(keys, space.block_bytes, each) for each in (version, version + 1)]
    n_good = 0
    for step in range(6):
        clock.now += 10.0
        written = filled(space, keys, version + step % 2)
        got = np.full(16, FAILED, np.uint8)
        batch = empty(space, keys)
        with suppress(TierError):
            shelf.write(written, EVER)
        clock.now += 10.0
        with suppress(TierError):
            got = shelf.read(batch, None, EVER)
        for i in np.flatnonzero(got == GOOD):
            have = np.frombuffer(batch.payloads[i], np.uint8)
            assert any(np.array_equal(have, each[i]) for each in right)
            n_good += 1
    assert shelf.counters()["good"] == n_good


class Careless(DictTier):
    """Answers what no tier may."""

    def __init__(self, answer: int, fill: bool) -> None:
        super().__init__()
        self.answer, self.fill = answer, fill

    def read(self, batch: Batch, deadline: float) -> np.ndarray:
        if self.fill:
            super().read(batch, deadline)
        return np.full(len(batch), self.answer, np.uint8)


@pytest.mark.parametrize(("answer", "fill", "got"), [(0, False, DAMAGED), (7, True, FAILED), (0, True, GOOD)])
def test_answers_that_are_not_believed(answer: int, fill: bool, got: int) -> None:
    tier = Careless(answer, fill)
    tier.write(filled(SPACE, KEYS), EVER)
    assert Shelf(tier, Clock()).read(empty(SPACE, KEYS), None, EVER).tolist() == [got] * 8


def test_damage_is_logged_once_per_block(caplog: pytest.LogCaptureFixture) -> None:
    plan = at({("read", n): Fault(FaultKind.FLIP, (0,)) for n in range(3)})
    shelf, tier = shelf_with(plan)
    with caplog.at_level(logging.WARNING, "penstock.tiers"):
        for _ in range(3):
            tier.write(filled(SPACE, KEYS), EVER)
            assert shelf.read(empty(SPACE, KEYS), None, EVER)[0] == DAMAGED
    assert [record.getMessage() for record in caplog.records] == [
        f"tier dict: block {KEYS[0].tobytes().hex()} came back damaged; removed"
    ]
    assert shelf.counters()["damaged"] == 3


def test_what_was_logged_is_bounded() -> None:
    shelf, _ = shelf_with(at({}))
    keys = [n.to_bytes(16) for n in range(3 * LOGGED_KEYS)]
    assert all(shelf._first_time(key) for key in keys)
    assert len(shelf._logged) == LOGGED_KEYS and not shelf._first_time(keys[-1])


def test_damage_that_cannot_be_removed(caplog: pytest.LogCaptureFixture) -> None:
    shelf, _ = shelf_with(at({("read", 0): Fault(FaultKind.FLIP, (0,)), ("remove", 0): Fault(FaultKind.ERROR)}))
    with caplog.at_level(logging.WARNING, "penstock.tiers"):
        assert shelf.read(empty(SPACE, KEYS), None, EVER).tolist() == [DAMAGED] + [GOOD] * 7
    assert "not removed (tier dict: injected" in caplog.text
    assert shelf.counters()["remove_failed"] == 1 and shelf.up


def test_empty_batches() -> None:
    shelf, _ = shelf_with(at({}))
    assert shelf.read(empty(SPACE, KEYS[:0]), np.zeros(0, np.int64), EVER).shape == (0,)
    assert shelf.write(filled(SPACE, KEYS[:0]), EVER).shape == (0,)
    assert shelf.up and shelf.samples() == []


# ---- counting


def test_writes_are_counted() -> None:
    full = DictTier(capacity_bytes=4 * SPACE.block_bytes)
    shelf = Shelf(Faulty(full, at({("write", 2): Fault(FaultKind.SHORT, (0,))})))
    shelf.write(filled(SPACE, KEYS[:2]), EVER)
    shelf.write(filled(SPACE, KEYS[:4]), EVER)
    shelf.write(filled(SPACE, KEYS[3:5]), EVER)
    large = tier_space(9, 8, 8192)
    assert shelf.write(filled(large, KEYS[:1]), EVER).tolist() == [Placed.NO_ROOM]
    size = SPACE.block_bytes
    assert counted(shelf) == {
        "writes": 4, "written_bytes": 5 * size, "stored": 5, "present": 2, "no_room": 1, "write_failed": 1,
    }  # fmt: skip
    assert shelf.counters().keys() == set(COUNTERS)


def test_samples_are_of_what_came_and_drained() -> None:
    clock = Clock()

    class Timed(DictTier):
        def read(self, batch: Batch, deadline: float) -> np.ndarray:
            clock.now += 0.5
            return super().read(batch, deadline)

    tier = Timed()
    tier.write(filled(SPACE, KEYS[:3]), EVER)
    shelf = Shelf(tier, clock)
    shelf.read(empty(SPACE, KEYS), None, EVER)
    shelf.read(empty(SPACE, KEYS[3:]), None, EVER)
    assert shelf.samples() == [(3 * SPACE.block_bytes, 0.5)]
    assert shelf.samples() == []
    for _ in range(SAMPLES + 5):
        shelf.read(empty(SPACE, KEYS[:1]), None, EVER)
    assert len(shelf.samples()) == SAMPLES


# ---- health


def failing(kind: FaultKind, calls: int) -> Plan:
    return at({(call, n): Fault(kind) for call in ("holds", "read", "write") for n in range(calls)})


@pytest.mark.parametrize("kind", [FaultKind.ERROR, FaultKind.LATE, FaultKind.SHORT])
@pytest.mark.parametrize("call", ["read", "write"])
def test_a_failure_takes_it_down_and_a_call_that_works_brings_it_back(call: str, kind: FaultKind) -> None:
    clock = Clock()
    shelf, tier = shelf_with(at({(call, 0): Fault(kind)}), clock=clock)

    def attempt() -> None:
        shelf.read(empty(SPACE, KEYS), None, clock.now + 1) if call == "read" else shelf.write(
            filled(SPACE, KEYS), clock.now + 1
        )

    if kind is FaultKind.SHORT:
        attempt()
    else:
        with pytest.raises(TierError, match="injected"):
            attempt()
    n_calls = len(tier.calls)
    assert not shelf.up and shelf.why
    for refused in (attempt, lambda: shelf.holds(SPACE, KEYS, EVER), lambda: shelf.remove(SPACE, KEYS, EVER)):
        with pytest.raises(TierUnavailable, match="tier dict is down"):
            refused()
    assert len(tier.calls) == n_calls and shelf.counters()["left_alone"] == 3
    clock.now += 0.11
    assert shelf.up and shelf.why
    attempt()
    assert shelf.up and not shelf.why
    attempt()


def shelf_up_after(shelf: Shelf, clock: Clock, n: int) -> bool:
    """Whether it is up; passes 0.01 s more for each n but the first."""
    clock.now += 0.01 if n else 0.0
    return shelf.up


def test_pauses_grow_to_a_bound_and_start_small_again() -> None:
    clock = Clock()
    shelf, tier = shelf_with(failing(FaultKind.ERROR, 9), clock=clock)
    pauses = []
    for _ in range(9):
        with pytest.raises(TierUnavailable):
            shelf.holds(SPACE, KEYS, EVER)
        steps = next((n for n in range(1000) if shelf_up_after(shelf, clock, n)), 1000)
        pauses.append(0.01 * steps)
    expected = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert pauses == pytest.approx(expected, abs=0.02)
    shelf.holds(SPACE, KEYS, EVER)
    with pytest.raises(TierUnavailable):
        shelf.read(empty(SPACE, KEYS), None, EVER)
    clock.now += 0.11
    assert shelf.up
    assert len(tier.calls) == 11


def test_part_of_a_batch_failing_is_no_outage() -> None:
    shelf, _ = shelf_with(at({("read", 0): Fault(FaultKind.SHORT, (0, 1)), ("write", 0): Fault(FaultKind.SHORT, (0,))}))
    assert shelf.read(empty(SPACE, KEYS), None, EVER).tolist() == [FAILED] * 2 + [GOOD] * 6
    shelf.write(filled(SPACE, KEYS), EVER)
    assert shelf.up and not shelf.why


def test_one_call_at_a_time_tries_a_tier_that_is_down() -> None:
    clock = Clock()
    faults = {("read", 0): Fault(FaultKind.ERROR), ("read", 1): Fault(FaultKind.HANG)}
    content = FarDict()
    content.write(filled(SPACE, KEYS), EVER)
    tier = Faulty(content, at(faults))
    shelf = Shelf(tier, clock)
    with pytest.raises(TierUnavailable):
        shelf.read(empty(SPACE, KEYS), None, EVER)
    clock.now += 1
    got: list[np.ndarray] = []
    trial = threading.Thread(target=lambda: got.append(shelf.read(empty(SPACE, KEYS), None, EVER)))
    trial.start()
    assert tier.hanging.wait(60)
    assert not shelf.up
    with pytest.raises(TierUnavailable, match="being tried"):
        shelf.read(empty(SPACE, KEYS), None, EVER)
    tier.release()
    trial.join(60)
    assert got[0].tolist() == [GOOD] * 8 and shelf.up


def test_a_call_without_time_says_nothing_about_the_tier() -> None:
    clock = Clock()
    shelf, _ = shelf_with(failing(FaultKind.LATE, 2), clock=clock)
    with pytest.raises(TierTimeout):
        shelf.read(empty(SPACE, KEYS), None, clock.now + 0.01)
    assert shelf.up and not shelf.why and shelf.counters()["timeouts"] == 1
    with pytest.raises(TierTimeout):
        shelf.read(empty(SPACE, KEYS), None, clock.now + 1)
    assert not shelf.up


def test_what_a_local_tier_remembers_does_not_prove_its_device() -> None:
    clock = Clock()
    content = DictTier()
    content.write(filled(SPACE, KEYS), EVER)
    shelf = Shelf(Faulty(content, at({("read", 0): Fault(FaultKind.SHORT)})), clock)
    shelf.read(empty(SPACE, KEYS), None, EVER)
    with pytest.raises(TierUnavailable):
        shelf.holds(SPACE, KEYS, EVER)
    clock.now += 0.2
    assert shelf.holds(SPACE, KEYS, EVER).all()
    assert shelf.why
    assert shelf.read(empty(SPACE, KEYS), None, EVER).tolist() == [GOOD] * 8
    assert not shelf.why


class Broken(FarDict):
    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> np.ndarray:
        raise ZeroDivisionError


def test_a_defect_of_a_tier_is_not_hidden_and_leaves_no_trial_open() -> None:
    clock = Clock()
    shelf = Shelf(Broken(), clock)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            shelf.holds(SPACE, KEYS, EVER)
        assert not shelf.up
        clock.now += 5.1
        assert shelf.up


def test_threads() -> None:
    """Every block is counted once, whoever reads it; damaged ones are never good."""
    kinds = [FaultKind.FLIP, FaultKind.SWAP, FaultKind.ROOT, FaultKind.HIDDEN]
    content = FarDict()
    shelf = Shelf(Faulty(content, at_random(3, 0.5, kinds)))
    n, rounds = len(AWKWARD_KEYS), 20
    wrong: list[int] = []

    def work() -> None:
        for _ in range(rounds):
            content.write(filled(SPACE, AWKWARD_KEYS), EVER)
            batch = empty(SPACE, AWKWARD_KEYS)
            got = shelf.read(batch, None, EVER)
            right = contents(AWKWARD_KEYS, SPACE.block_bytes)
            wrong.extend(int(i) for i in np.flatnonzero(got == GOOD) if bytes(batch.payloads[i]) != right[i].tobytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    counts = shelf.counters()
    assert not wrong and counts["reads"] == 4 * rounds and counts["damaged"] > 0
    assert counts["good"] + counts["absent"] + counts["damaged"] + counts["failed"] == 4 * rounds * n
