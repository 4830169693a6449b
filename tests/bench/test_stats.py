"""Intervals and verdicts from fixed samples."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.bench.stats import estimate, paired_ratios, percentiles, windows


def test_the_interval_holds_the_median_and_repeats() -> None:
    samples = np.random.default_rng(0).normal(10, 1, 101)
    first, again = estimate(samples), estimate(samples)
    assert first == again
    assert first.value == np.median(samples)
    assert first.low < first.value < first.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    estimates = [estimate(rng.normal(0, 1, 30)) for _ in range(200)]
    covered = sum(e.low <= 0 <= e.high for e in estimates)
    assert 180 <= covered <= 200


def test_one_outlier_does_not_move_it() -> None:
    calm = [1.0] * 40
    assert estimate([*calm, 1000.0]) == estimate(calm)


def test_equal_samples_have_no_width() -> None:
    e = estimate([3.0, 3.0, 3.0])
    assert (e.value, e.low, e.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("samples", [[], [[1.0, 2.0]]])
def test_no_row_no_estimate(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples"):
        estimate(samples)


def test_pairs_cancel_a_drift_that_both_share() -> None:
    drift = np.linspace(1, 3, 50)
    ratios = paired_ratios(0.8 * drift, drift)
    assert estimate(ratios).low == pytest.approx(0.8)
    assert estimate(ratios).high == pytest.approx(0.8)
    assert estimate(0.8 * drift).high - estimate(0.8 * drift).low > 0.1


def test_what_is_not_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        paired_ratios([1.0, 2.0], [1.0])


def test_windows_are_equal_and_consecutive() -> None:
    parts = windows(range(11), 3)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert percentiles(parts, 50) == [1.0, 4.0, 7.0]
    with pytest.raises(ValueError, match="windows"):
        windows([1.0], 2)
