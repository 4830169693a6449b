"""Measured speeds: what they converge to, and what a hang does to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.speed import PrefillMeter, SpeedMeter
from penstock.errors import ConfigError

MIB = 1 << 20
SIZES = [64 << 10, MIB, 16 * MIB, 256 * MIB]


def disk() -> SpeedMeter:
    return SpeedMeter(1e-4, 3e9)


def feed(meter: SpeedMeter, latency_s: float, bytes_per_s: float, n: int, sizes: list[int] | None = None) -> None:
    for i in range(n):
        n_bytes = (sizes or SIZES)[i % len(sizes or SIZES)]
        meter.add(n_bytes, latency_s + n_bytes / bytes_per_s)


def test_before_anything_was_measured_it_answers_with_what_it_was_given() -> None:
    meter = disk()
    assert (meter.measured, meter.samples) == (False, 0)
    assert meter.estimate(3 * 10**9) == pytest.approx(1.0001)
    assert meter.estimate(0, 3 * 10**9) == pytest.approx(1.0001)
    meter.add(0, 1.0)
    meter.add(10, 0.0)
    assert meter.samples == 0
    meter.add(MIB, 0.01)
    assert (meter.measured, meter.samples) == (True, 1)


@settings(max_examples=40, deadline=None)
@given(latency_s=st.floats(1e-6, 0.5), bytes_per_s=st.floats(1e7, 1e11), seed=st.integers(0, 99))
def test_it_learns_what_is_there_whatever_it_was_given(latency_s: float, bytes_per_s: float, seed: int) -> None:
    meter, rng = disk(), np.random.default_rng(seed)
    for _ in range(80):
        n_bytes = int(rng.choice(SIZES))
        meter.add(n_bytes, (latency_s + n_bytes / bytes_per_s) * float(rng.uniform(0.9, 1.1)))
    for n_bytes in SIZES:
        assert meter.estimate(n_bytes) == pytest.approx(latency_s + n_bytes / bytes_per_s, rel=0.15)


def test_latency_and_bandwidth_are_told_apart() -> None:
    meter = disk()
    feed(meter, 0.02, 5e8, 60)
    assert meter.latency_s == pytest.approx(0.02, rel=0.05)
    assert meter.bytes_per_s == pytest.approx(5e8, rel=0.05)


def test_samples_of_one_size_keep_the_known_proportions() -> None:
    meter = SpeedMeter(1e-3, 1e9)
    feed(meter, 1e-2, 1e8, 60, [MIB])
    assert meter.estimate(MIB) == pytest.approx(1e-2 + MIB / 1e8, rel=0.02)
    assert meter.latency_s == pytest.approx(1e-2, rel=0.1)
    assert meter.estimate(100 * MIB) == pytest.approx(1e-2 + 100 * MIB / 1e8, rel=0.1)


def test_transfers_that_share_the_tier_do_not_make_it_look_slower() -> None:
    meter = disk()
    for n_at_once in (1, 2, 4, 8) * 20:
        meter.add(16 * MIB * n_at_once, 1e-3 + 16 * MIB * n_at_once / 1e9)
    assert meter.bytes_per_s == pytest.approx(1e9, rel=0.02)


@pytest.mark.parametrize("at", range(12))
def test_a_hang_among_the_first_samples_is_soon_gone(at: int) -> None:
    meter = disk()
    for i in range(at + 12):
        meter.add(SIZES[i % 4], 60.0 if i == at else 1e-4 + SIZES[i % 4] / 3e9)
    for n_bytes in SIZES:
        assert meter.estimate(n_bytes) < 3 * (1e-4 + n_bytes / 3e9)


@pytest.mark.parametrize("hangs", [1, 2])
def test_a_hang_is_not_believed(hangs: int) -> None:
    meter = disk()
    feed(meter, 1e-4, 3e9, 50)
    for _ in range(hangs):
        meter.add(MIB, 60.0)
    assert meter.estimate(MIB) < 2 * (1e-4 + MIB / 3e9)
    feed(meter, 1e-4, 3e9, 100)
    assert meter.estimate(MIB) == pytest.approx(1e-4 + MIB / 3e9, rel=0.1)


def test_a_tier_that_became_slow_is_believed_at_the_third_sample_and_mended_as_quickly() -> None:
    meter = disk()
    feed(meter, 1e-4, 3e9, 50)
    for _ in range(3):
        meter.add(MIB, 60.0)
    assert meter.estimate(MIB) == pytest.approx(60, rel=0.05)
    for _ in range(3):
        meter.add(MIB, 1e-4 + MIB / 3e9)
    assert meter.estimate(MIB) == pytest.approx(1e-4 + MIB / 3e9, rel=0.05)


def test_outliers_on_both_sides_are_noise() -> None:
    meter = disk()
    feed(meter, 1e-4, 3e9, 50)
    before = meter.estimate(MIB)
    for seconds in (60.0, 1e-9) * 6:
        meter.add(MIB, seconds)
    assert before / 4 < meter.estimate(MIB) < before * 4


def test_a_tier_that_nobody_dares_to_use_is_tried_again() -> None:
    meter = disk()
    for _ in range(10):
        meter.add(MIB, 60.0)
    assert meter.estimate(MIB) > 50
    for _ in range(3):
        meter.fade()
    assert meter.estimate(MIB) < 0.1
    for _ in range(17):
        meter.fade()
    assert meter.estimate(MIB) == pytest.approx(1e-4 + MIB / 3e9, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**10), st.floats(1e-9, 1e4), st.integers(1, 16)), max_size=30))
def test_an_estimate_is_never_negative_and_grows_with_the_bytes(samples: list[tuple[int, float, int]]) -> None:
    meter = disk()
    for n_bytes, seconds, n_at_once in samples:
        meter.add(n_bytes * n_at_once, seconds)
        times = [meter.estimate(size) for size in (0, *SIZES)]
        assert times == sorted(times) and times[0] >= 0 and np.isfinite(times).all()
        assert times[-1] > 0 and meter.bytes_per_s > 0


def prefill(n: int, before: int) -> float:
    return 5e-3 + 2e-5 * n + 3e-9 * n * (before + n / 2)


def test_prefill_is_learned_from_chunks_of_any_size() -> None:
    meter, rng = PrefillMeter(), np.random.default_rng(1)
    assert (meter.measured, meter.samples) == (False, 0)
    for _ in range(150):
        n, before = int(rng.integers(16, 8192)), int(rng.integers(0, 100_000))
        meter.add(n, before, prefill(n, before) * float(rng.uniform(0.95, 1.05)))
    for n, before in ((512, 0), (8192, 0), (512, 64_000), (8192, 100_000)):
        assert meter.estimate(n, before) == pytest.approx(prefill(n, before), rel=0.1)
    assert (meter.measured, meter.samples) == (True, 150)
    assert meter.coefficients == pytest.approx((5e-3, 2e-5, 3e-9), rel=0.3)


def test_prefill_of_arrays_is_that_of_numbers_and_nothing_takes_no_time() -> None:
    meter = PrefillMeter()
    n, before = np.array([0, 1, 100, 5000]), np.array([7, 0, 30, 9000])
    alone = [meter.estimate(int(each), int(behind)) for each, behind in zip(n, before)]
    assert meter.estimate(n, before).tolist() == alone
    assert alone[0] == 0 and alone == sorted(alone)
    meter.add(0, 100, 1.0)
    assert meter.samples == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**5), st.integers(0, 10**6), st.floats(1e-6, 1e3)), max_size=30))
def test_prefill_coefficients_are_never_negative(samples: list[tuple[int, int, float]]) -> None:
    meter = PrefillMeter()
    for n, before, seconds in samples:
        meter.add(n, before, seconds)
        assert min(meter.coefficients) >= 0 and meter.estimate(100, 100) > 0


def test_what_cannot_be_is_refused() -> None:
    for latency_s, bytes_per_s in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ConfigError):
            SpeedMeter(latency_s, bytes_per_s)
    with pytest.raises(ConfigError):
        PrefillMeter(a=0.0)
