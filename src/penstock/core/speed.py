"""How fast a tier and an engine's prefill are, from what was measured: two small fits that forget.

Covers what `core/cost.py` and the mover ask before they fetch. Does not measure and reads no clock.

Both are least squares with exponentially fading samples. Each sample weighs by its *relative* error, so that a small
transfer says as much about the latency as a large one about the bandwidth. The very first sample scales all
coefficients alike, and every fit is held, by a small fraction of a sample, to the one before: where the samples cannot
tell the coefficients apart (they are all of one size), the proportions that the fit began with remain.

Outliers: from the ninth sample on, one further than four times from what was expected counts as four times; so one hang
of a minute moves the next estimate by a little and is gone after some dozens of samples. Before that errors count
relative to the sample itself, and a hang weighs next to nothing. The third outlier in a row, on one side, is believed:
the tier has changed, what came before is forgotten, and counting begins anew. That holds in both directions, so an
estimate spoilt by three hangs is mended by three normal samples. Where no sample comes because the estimate is so bad
that nobody dares to use the tier, `fade` brings it back to what it began with.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError

__all__ = ["PrefillMeter", "SpeedMeter"]

_KEEP = 0.97
"""What a sample's weight is worth one sample later: half after 23."""
_HOLD = 1e-4
"""The weight, in samples, of the coefficients before."""
_LEAST = 1e-3
"""A coefficient below this share of its scale is held as if it had it: one that was fitted to 0 can grow again."""
_FAR = 4.0
"""Ordinary jitter of disks and networks stays within; what does not is an outlier."""
_WARM = 8
"""From so many samples on there is an expectation to hold others against."""
_BELIEVED = 3
"""Outliers in a row, on one side, that are no accident."""

Floats = NDArray[np.float64]


class _Fit:
    """y = a . x with a >= 0, by fading relative least squares; `a` starts at `start`, all above 0."""

    def __init__(self, start: Floats) -> None:
        self.start = start
        self.factors = np.ones(len(start))
        """The coefficients, in multiples of the start's."""
        self.samples = 0
        self._clear()

    def _clear(self) -> None:
        self._products = np.zeros((len(self.start), len(self.start)))
        self._values = np.zeros(len(self.start))
        self._far = 0
        self._seen = 0

    @property
    def coefficients(self) -> Floats:
        return self.start * self.factors

    def add(self, x: Floats, y: float) -> None:
        if self._seen >= _WARM:
            y = self._believed(x, y)
        if self._seen == 0:
            self.factors = self.factors * (y / float(self.coefficients @ x))
        if self._seen < _WARM:
            # There is little to expect yet: errors are relative to the sample, so that a hang weighs next to nothing.
            row, value = self.start * x / y, 1.0
        else:
            expected = float(self.coefficients @ x)
            # Four times as much pulls as hard as a quarter: the weight falls with the root of y / expected.
            weight = (expected / y) ** 0.25
            row, value = self.start * x / expected * weight, y / expected * weight
        self._products = self._products * _KEEP + np.outer(row, row)
        self._values = self._values * _KEEP + row * value
        self._seen += 1
        self.samples += 1
        self._solve()

    def fade(self) -> None:
        """Half way back to the start, in orders of magnitude, and the samples are forgotten."""
        self.factors = np.sqrt(self._scales())
        self._clear()

    def _scales(self) -> Floats:
        scales: Floats = np.maximum(self.factors, _LEAST * self.factors.max())
        return scales

    def _believed(self, x: Floats, y: float) -> float:
        """y, or as far as it is believed; may forget everything before it."""
        expected = float(self.coefficients @ x)
        if expected / _FAR <= y <= expected * _FAR:
            self._far = 0
            return y
        side = 1 if y > expected else -1
        self._far = self._far + side if self._far * side > 0 else side
        if abs(self._far) >= _BELIEVED:
            # In the proportions that it began with, for nothing else is known of what it is now.
            self.factors = np.ones(len(x))
            self._clear()
            return y
        return expected * _FAR if side > 0 else expected / _FAR

    def _solve(self) -> None:
        """Least squares with no factor below 0: of the few sets of coefficients that may be above 0, the best."""
        n = len(self.start)
        # The second summand is rounding's: sums that differ by many orders of magnitude could not be solved.
        hold = _HOLD / self._scales() ** 2 + 1e-10 * self._products.max()
        left = self._products + np.diag(hold)
        right = self._values + hold * self.factors
        best, least = np.zeros(n), 0.0
        for chosen in range(1, 1 << n):
            used = [i for i in range(n) if chosen >> i & 1]
            solved = np.linalg.solve(left[np.ix_(used, used)], right[used])
            # What is left of the sum of squares, up to a constant.
            loss = -float(right[used] @ solved)
            if solved.min() >= 0 and loss < least:
                best, least = np.zeros(n), loss
                best[used] = solved
        self.factors = best


class SpeedMeter:
    """One direction of one tier: `seconds = latency + bytes that came / bandwidth`.

    Until the first sample it answers with what it is given, and `measured` is False. Raises ConfigError for numbers
    that are not above 0.
    """

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        if not latency_s > 0 or not bytes_per_s > 0:
            raise ConfigError(f"a tier with {latency_s} s latency and {bytes_per_s} bytes/s; give numbers above 0.")
        self._fit = _Fit(np.array([latency_s, 1 / bytes_per_s]))

    @property
    def measured(self) -> bool:
        return self._fit.samples > 0

    @property
    def samples(self) -> int:
        """How many were taken in, ever."""
        return self._fit.samples

    @property
    def latency_s(self) -> float:
        return float(self._fit.coefficients[0])

    @property
    def bytes_per_s(self) -> float:
        """Of all transfers together; infinite where the samples show no dependence on the size."""
        per_byte = float(self._fit.coefficients[1])
        return 1 / per_byte if per_byte > 0 else float("inf")

    def add(self, n_bytes: int, seconds: float) -> None:
        """A transfer took so long, in which so many bytes came, its own and those of others.

        One without bytes or time says nothing and is left out.
        """
        if n_bytes > 0 and seconds > 0:
            self._fit.add(np.array([1.0, float(n_bytes)]), seconds)

    def estimate(self, n_bytes: int, queued_bytes: int = 0) -> float:
        """Seconds until so many bytes have come, behind so many that wait before them."""
        latency_s, per_byte = self._fit.coefficients
        return float(latency_s + per_byte * (n_bytes + queued_bytes))

    def fade(self) -> None:
        """Half way back, in orders of magnitude, to what it began with. It still counts as measured."""
        self._fit.fade()


class PrefillMeter:
    """An engine's prefill of n tokens behind `before` others: a + b n + c n (before + n / 2) seconds.

    b is what every token costs, c what each pair that attends costs. Until the first sample it answers with what it is
    given. Raises ConfigError for numbers that are not above 0.
    """

    def __init__(self, a: float = 2e-3, b: float = 1e-4, c: float = 1e-9) -> None:
        if not min(a, b, c) > 0:
            raise ConfigError(f"a prefill of {a}, {b}, {c} seconds; give numbers above 0.")
        self._fit = _Fit(np.array([a, b, c]))

    @property
    def measured(self) -> bool:
        return self._fit.samples > 0

    @property
    def samples(self) -> int:
        return self._fit.samples

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """a, b and c."""
        a, b, c = self._fit.coefficients.tolist()
        return a, b, c

    def add(self, n_tokens: int, before: int, seconds: float) -> None:
        """So many tokens were computed behind so many others, in one prefill. Nothing computed says nothing."""
        if n_tokens > 0 and seconds > 0:
            self._fit.add(np.array([1.0, n_tokens, n_tokens * (before + n_tokens / 2)]), seconds)

    @overload
    def estimate(self, n_tokens: int, before: int) -> float: ...
    @overload
    def estimate(self, n_tokens: NDArray[np.int64], before: NDArray[np.int64]) -> Floats: ...
    def estimate(self, n_tokens: int | NDArray[np.int64], before: int | NDArray[np.int64]) -> float | Floats:
        """Seconds; 0 for no tokens. Numbers, or arrays of one shape."""
        a, b, c = self._fit.coefficients.tolist()
        n = np.asarray(n_tokens, np.float64)
        seconds = np.where(n > 0, a + b * n + c * n * (np.asarray(before) + n / 2), 0.0)
        return float(seconds) if isinstance(n_tokens, int) else seconds
