"""From samples to a value with an interval.

Intervals are percentile bootstraps of the median (Efron and Tibshirani 1993, ch. 13) at 95%, seeded: the same samples
give the same interval. Samples that belong together are paired before they get here: machines drift more between two
runs than the things compared differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "estimate", "paired_ratios", "percentiles", "windows"]

_RESAMPLES = 2000
_SEED = 20
_TAIL = 2.5

Samples = npt.ArrayLike


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and its 95% interval."""

    value: float
    low: float
    high: float


def estimate(samples: Samples) -> Estimate:
    """The median of one-dimensional samples with its interval. Raises ValueError if there are none."""
    row = np.asarray(samples, np.float64)
    if row.ndim != 1 or not len(row):
        raise ValueError(f"samples of shape {row.shape}; pass a row of at least one")
    picks = np.random.default_rng(_SEED).integers(0, len(row), (_RESAMPLES, len(row)))
    medians = np.median(row[picks], axis=1)
    low, high = np.percentile(medians, (_TAIL, 100 - _TAIL))
    return Estimate(float(np.median(row)), float(low), float(high))


def paired_ratios(above: Samples, below: Samples) -> npt.NDArray[np.float64]:
    """above[i] / below[i]. Raises ValueError where the two are not pairs."""
    one, other = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if one.shape != other.shape:
        raise ValueError(f"{one.shape} samples against {other.shape}: they must be pairs")
    return one / other


def windows(samples: Samples, n: int) -> list[npt.NDArray[np.float64]]:
    """n consecutive windows of equal length; what is left over at the end is dropped."""
    row = np.asarray(samples, np.float64)
    size = len(row) // n
    if size < 1:
        raise ValueError(f"{len(row)} samples do not fill {n} windows")
    return [row[i * size : (i + 1) * size] for i in range(n)]


def percentiles(parts: Iterable[Sequence[float] | npt.NDArray[np.float64]], q: float) -> list[float]:
    """The q-th percentile of each window."""
    return [float(np.percentile(part, q)) for part in parts]
