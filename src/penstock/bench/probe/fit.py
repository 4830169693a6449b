"""A model of latency and bandwidth from points: seconds(bytes) = latency + bytes / bandwidth.

Least squares of the logarithms, so that 64 bytes in a microsecond and 64 MiB in ten milliseconds count alike. With the
ratio c of latency to seconds per byte fixed, the best scale is the mean of log(seconds / (c + bytes)); so the search is
over one number, on a grid that is refined, and finds the global minimum. c may be 0 (no latency to speak of).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from penstock.bench.probe.base import Timing
from penstock.profile import Direction, Model

__all__ = ["fit_model"]

Floats = npt.NDArray[np.float64]

_GRID = 256
_ROUNDS = 6


def fit_model(direction: Direction, points: Sequence[tuple[int, Timing]]) -> Model:
    """The model of (size, timing) points, single accesses and batches alike, a median of each. Raises ValueError for
    no points."""
    if not points:
        raise ValueError("no points to fit a model to")
    pairs = [pair for size, timing in points for pair in _medians(size, timing)]
    n_bytes, seconds = (np.array(column, np.float64) for column in zip(*pairs))
    if not points[0][1].moves:
        latency = float(np.exp(np.log(seconds).mean()))
        return Model(direction, latency, None, *_errors(np.full(len(seconds), latency), seconds))
    latency, per_byte = _fit(n_bytes, seconds)
    return Model(direction, latency, 1 / per_byte, *_errors(latency + n_bytes * per_byte, seconds))


def _medians(size: int, timing: Timing) -> list[tuple[int, float]]:
    pairs = [(size, float(np.median(timing.single)))]
    if timing.batches is not None:
        pairs.append((size * timing.batch, float(np.median(timing.batches))))
    return pairs


def _fit(n_bytes: Floats, seconds: Floats) -> tuple[float, float]:
    """(latency, seconds per byte)."""
    low, high = np.log(n_bytes.min() * 1e-3), np.log(n_bytes.max() * 1e3)
    best = 0.0
    for _ in range(_ROUNDS):
        grid = np.concatenate(([0.0], np.exp(np.linspace(low, high, _GRID))))
        residuals = np.log(seconds[None, :] / (grid[:, None] + n_bytes[None, :]))
        at = int(np.argmin(residuals.var(axis=1)))
        best = float(grid[at])
        if not at:
            break  # no latency that would explain more
        step = (high - low) / (_GRID - 1)
        low, high = np.log(best) - step, np.log(best) + step
    per_byte = float(np.exp(np.log(seconds / (best + n_bytes)).mean()))
    return best * per_byte, per_byte


def _errors(modelled: Floats, seconds: Floats) -> tuple[float, float]:
    """(typical, worst) error as factors less one."""
    off = np.abs(np.log(modelled / seconds))
    return float(np.expm1(np.sqrt(np.mean(off**2)))), float(np.expm1(off.max()))
