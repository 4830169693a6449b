"""Whether a fetch that runs is still worth waiting for: pure, for `below.py`.

A fetch was begun because it was expected to be faster than computing. Where it lags behind that, what is left of it is
expected to lag as much; it is given up as soon as that would take longer than computing what is lacking. While nothing
comes at all there is no pace to go by: then it may be late by a quarter of what it would save, so that a tier that
hangs costs its own estimate and a quarter of a prefill.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Pace"]

_LATE = 4.0
"""Seconds of computing that are worth one second of silence."""

Seconds = npt.NDArray[np.float64]


class Pace:
    """One fetch. Times are seconds since it began; blocks count from the first that it lacked."""

    def __init__(self, until: Seconds, lost: Seconds | None = None) -> None:
        """`until`: (n + 1,) when so many of the n blocks are expected. `lost`: (n + 1,) what computing would take for
        the blocks that lack then; None where that is not known, and nothing is given up."""
        self._until, self._lost = until, lost
        self._arrived = 0
        self._at_s = 0.0
        """When the last of those was seen."""

    @property
    def total_s(self) -> float:
        """When everything is expected."""
        return float(self._until[-1])

    def holds(self, arrived: int, now_s: float) -> bool:
        """Whether to go on waiting, with so many blocks there."""
        if self._lost is None:
            return True
        arrived = min(max(0, arrived), len(self._until) - 1)
        if arrived > self._arrived:
            self._arrived, self._at_s = arrived, now_s
        expected_s = float(self._until[self._arrived])
        lag = max(1.0, self._at_s / expected_s) if self._arrived and expected_s > 0 else 1.0
        due_s = self._at_s + lag * (self.total_s - expected_s) if self._arrived else self.total_s
        left_s = max(due_s - now_s, _LATE * (now_s - due_s))
        return left_s <= float(self._lost[self._arrived])
