"""The wrappers: slower by what was asked for, faulty where the plan says, and recorded as it was."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from penstock.errors import TierTimeout, TierUnavailable
from penstock.testing.dict_tier import DictTier
from penstock.testing.tier_blocks import assert_right, block_keys, contents, empty, filled, roots_of, tier_space
from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Batch, Found, Placed, Tier
from penstock.tiers.wrap import Call, Fault, FaultKind, Faulty, Recorded, Slow, at, at_random

SPACE = tier_space()
KEYS = block_keys(SPACE, 0, 6)
EVER = float("inf")


class FarTier(DictTier):
    """A dict that says that it is not here."""

    local = False


class Clock:
    """A time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class TestSlow(TierSuite):
    """It keeps every promise of the tier in it."""

    survives_reopen = True
    examples = 5

    def open_tier(self) -> Tier:
        return Slow(FarTier(), 0.0002, 2e9)

    def reopen(self, tier: Tier) -> Tier:
        assert isinstance(tier, Slow) and isinstance(tier.tier, DictTier)
        return Slow(FarTier(content=tier.tier.content), 0.0002)

    def open_small(self, capacity_bytes: int) -> Tier:
        return Slow(FarTier(capacity_bytes=capacity_bytes), 0.0002)


class TestFaultless(TierSuite):
    """A plan without faults, recorded."""

    examples = 5

    def open_tier(self) -> Tier:
        return Recorded(Faulty(DictTier(), at({})))


def slow(clock: Clock, tier: DictTier | None = None) -> Slow:
    return Slow(tier or FarTier(), 0.25, SPACE.block_bytes * 10.0, sleep=clock.sleep, clock=clock)


def test_slow_takes_the_latency_and_the_time_of_the_bytes() -> None:
    clock = Clock()
    tier = slow(clock)
    tier.write(filled(SPACE, KEYS[:5]), EVER)
    assert clock.slept == [pytest.approx(0.75)]
    tier.read(empty(SPACE, KEYS), EVER)  # five of the six are there
    assert clock.slept[1:] == [pytest.approx(0.75)]
    tier.read(empty(SPACE, KEYS[5:]), EVER)
    tier.holds(SPACE, KEYS, EVER)
    tier.remove(SPACE, KEYS, EVER)
    assert clock.slept[2:] == [pytest.approx(0.25)] * 3
    tier.touch(SPACE, KEYS)
    tier.usage()
    tier.counters()
    assert len(clock.slept) == 5


def test_slow_asks_a_local_tier_for_free() -> None:
    clock = Clock()
    tier = slow(clock, DictTier())
    tier.holds(SPACE, KEYS, EVER)
    tier.remove(SPACE, KEYS, EVER)
    assert clock.slept == []


def test_slow_calls_share_the_bandwidth() -> None:
    """A call that begins while another's bytes still move waits for them."""
    clock = Clock()
    tier = slow(clock)
    batch = filled(SPACE, KEYS[:5])

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        if len(clock.slept) == 1:
            tier.read(empty(SPACE, KEYS[:5]), EVER)  # while the first one waits
            clock.now += seconds

    tier._sleep = sleep
    tier.tier.write(batch, EVER)
    tier.read(empty(SPACE, KEYS[:5]), EVER)
    assert clock.slept == [pytest.approx(0.75), pytest.approx(1.25)]


def test_slow_and_late() -> None:
    """It waits until the deadline, not longer; what is late was not stored and takes no bandwidth from others."""
    clock = Clock()
    tier = slow(clock)
    with pytest.raises(TierTimeout):
        tier.write(filled(SPACE, KEYS), clock.now + 0.5)
    assert clock.now == pytest.approx(100.5)
    assert not tier.tier.holds(SPACE, KEYS, EVER).any()
    tier.write(filled(SPACE, KEYS), clock.now + 0.9)
    for call in (lambda: tier.read(empty(SPACE, KEYS), 0.0), lambda: tier.holds(SPACE, KEYS, 0.0)):
        with pytest.raises(TierTimeout):
            call()
    assert len(clock.slept) == 2


# ---- faults


def read_with(*faults: Fault) -> tuple[Batch, list[int]]:
    """Four of six blocks are there; read all with this fault."""
    tier = Faulty(DictTier(), at({("read", n): fault for n, fault in enumerate(faults)}))
    tier.write(filled(SPACE, KEYS[:4]), EVER)
    batch = empty(SPACE, KEYS)
    found = tier.read(batch, EVER).tolist()
    again = empty(SPACE, KEYS)
    assert_right(again, tier.read(again, EVER), np.arange(6) < 4)
    return batch, found


def wrong_bits(batch: Batch, i: int) -> int:
    diff = np.frombuffer(batch.payloads[i], np.uint8) ^ contents(KEYS[i : i + 1], SPACE.block_bytes)[0]
    return int(np.unpackbits(diff).sum())


@pytest.mark.parametrize("bit", [0, 7, 8, SPACE.block_bytes * 8 - 1])
def test_a_flipped_bit(bit: int) -> None:
    batch, found = read_with(Fault(FaultKind.FLIP, (1, 3, 5, 9), bit))
    assert found == [0, 0, 0, 0, 1, 1]
    assert [wrong_bits(batch, i) for i in range(4)] == [0, 1, 0, 1]
    good, bad = (np.frombuffer(batch.payloads[i], np.uint8)[bit // 8] for i in (0, 1))
    assert bad == contents(KEYS[1:2], SPACE.block_bytes)[0][bit // 8] ^ (1 << bit % 8)
    assert good == contents(KEYS[:1], SPACE.block_bytes)[0][bit // 8]


def test_other_faults_of_a_read() -> None:
    batch, found = read_with(Fault(FaultKind.ROOT, (2,), 63))
    assert (batch.roots[:4] ^ roots_of(SPACE, KEYS[:4])).tolist() == [0, 0, 1 << 63, 0]
    batch, found = read_with(Fault(FaultKind.SWAP))
    assert found == [0, 0, 0, 0, 1, 1]
    assert batch.roots[:4].tolist() == np.roll(roots_of(SPACE, KEYS[:4]), -1).tolist()
    assert bytes(batch.payloads[3]) == contents(KEYS[:1], SPACE.block_bytes)[0].tobytes()
    batch, found = read_with(Fault(FaultKind.SHORT, (0,)))
    assert found == [Found.FAILED, 0, 0, 0, 1, 1] and wrong_bits(batch, 0) > 1000
    assert read_with(Fault(FaultKind.HIDDEN))[1] == [Found.ABSENT] * 6
    assert read_with(Fault(FaultKind.UNSURE))[1] == [0, 0, 0, 0, Found.FAILED, Found.FAILED]


def test_faults_of_a_write() -> None:
    tier = Faulty(
        DictTier(),
        at({("write", 0): Fault(FaultKind.LOST, (0, 2)), ("write", 1): Fault(FaultKind.SHORT, (0, 1)),
            ("write", 2): Fault(FaultKind.LATE)}),
    )  # fmt: skip
    assert tier.write(filled(SPACE, KEYS[:3]), EVER).tolist() == [Placed.STORED] * 3
    assert tier.holds(SPACE, KEYS, EVER).tolist() == [False, True, False, False, False, False]
    placed = tier.write(filled(SPACE, KEYS[:4]), EVER)
    assert placed.tolist() == [Placed.FAILED, Placed.FAILED, Placed.STORED, Placed.STORED]
    with pytest.raises(TierTimeout):
        tier.write(filled(SPACE, KEYS), EVER)
    batch = empty(SPACE, KEYS)
    assert_right(batch, tier.read(batch, EVER))


@pytest.mark.parametrize("call", ["holds", "write", "read", "remove"])
@pytest.mark.parametrize(("kind", "error"), [(FaultKind.ERROR, TierUnavailable), (FaultKind.LATE, TierTimeout)])
def test_the_nth_call_raises(call: str, kind: FaultKind, error: type[Exception]) -> None:
    tier = Faulty(DictTier(), at({(call, 1): Fault(kind)}))
    calls = {
        "holds": lambda: tier.holds(SPACE, KEYS, EVER),
        "write": lambda: tier.write(filled(SPACE, KEYS), EVER),
        "read": lambda: tier.read(empty(SPACE, KEYS), EVER),
        "remove": lambda: tier.remove(SPACE, KEYS, EVER),
    }
    for other in calls.values():
        other()
    with pytest.raises(error):
        calls[call]()
    calls[call]()


def test_hanging_until_released() -> None:
    tier = Faulty(DictTier(), at({("read", 0): Fault(FaultKind.HANG)}))
    tier.write(filled(SPACE, KEYS), EVER)
    batch = empty(SPACE, KEYS)
    answers: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: answers.append(tier.read(batch, time.monotonic())))
    thread.start()
    assert tier.hanging.wait(60)
    assert not answers
    tier.release()
    thread.join(60)
    assert_right(batch, answers[0])


def test_chance_is_the_same_for_the_same_seed() -> None:
    kinds = [FaultKind.FLIP, FaultKind.ERROR]
    first, again, other = (at_random(seed, 0.3, kinds) for seed in (1, 1, 2))
    one = [first("read", n) for n in range(300)]
    assert one == [again("read", n) for n in reversed(range(300))][::-1]
    assert one != [other("read", n) for n in range(300)]
    hit = [fault for fault in one if fault]
    assert 60 < len(hit) < 120 and {fault.kind for fault in hit} == set(kinds)


def test_recorded() -> None:
    tier = Recorded(Faulty(DictTier(), at({("read", 1): Fault(FaultKind.ERROR)})))
    size = SPACE.block_bytes
    tier.write(filled(SPACE, KEYS[:2]), EVER)
    tier.read(empty(SPACE, KEYS[:3]), EVER)
    with pytest.raises(TierUnavailable):
        tier.read(empty(SPACE, KEYS[:3]), EVER)
    tier.holds(SPACE, KEYS[1:3], EVER)
    tier.touch(SPACE, KEYS[:1])
    tier.remove(SPACE, KEYS, EVER)
    assert tier.calls == [
        Call("write", 2, 2 * size, (0, 0), ""),
        Call("read", 3, 2 * size, (0, 0, 1), ""),
        Call("read", 3, 0, (), "TierUnavailable"),
        Call("holds", 2, 0, (1, 0), ""),
        Call("touch", 1, 0, (), ""),
        Call("remove", 6, 0, (), ""),
    ]
