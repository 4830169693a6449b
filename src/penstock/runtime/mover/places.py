"""The tiers of one pool as the mover holds them: each with its shelf, its measured speed and its settings."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.core.speed import SpeedMeter
from penstock.errors import TierError
from penstock.runtime.mover.workers import Workers
from penstock.runtime.shelf import Shelf
from penstock.tiers.base import BlockSpace
from penstock.tiers.registry import TierConfig

__all__ = ["Places", "TierPlace", "Whereabouts"]

Keys = npt.NDArray[np.uint64]

_FADE_S = 60.0
"""After so long in which engines were told an estimate and none was put to the test, it is half forgotten."""


@dataclass(slots=True, eq=False)
class TierPlace:
    """One tier. `number` is its bit in the brain's masks, and its place in every list."""

    number: int
    config: TierConfig
    shelf: Shelf
    meter: SpeedMeter
    lock: threading.Lock = field(default_factory=threading.Lock)
    _told_s: float | None = None
    """When an estimate was first given since the last sample."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def local(self) -> bool:
        """Whether it can say what it holds without I/O."""
        return self.shelf.tier.local

    def measured(self) -> SpeedMeter:
        """The meter, with the latest samples taken in."""
        with self.lock:
            for n_bytes, seconds in self.shelf.samples():
                self.meter.add(n_bytes, seconds)
                self._told_s = None
            return self.meter

    def estimate(self, n_bytes: int, queued_bytes: int, now: float) -> float:
        """Seconds until so many bytes have come, behind so many that wait before them.

        A tier that seems too slow is not used, and what is not used gives no sample that could correct it: so where
        estimates are given for a while and nothing comes of them, the meter fades.
        """
        meter = self.measured()
        with self.lock:
            if self._told_s is None:
                self._told_s = now
            elif now - self._told_s >= _FADE_S:
                meter.fade()
                self._told_s = now
            return meter.estimate(n_bytes, queued_bytes)


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What the tiers said about some blocks."""

    tiers: npt.NDArray[np.int64]
    """(n,): which tier has each; -1 for none that answered."""
    silent: str
    """A tier that could not be asked and may have what the others do not; "" if all answered."""
    lacking: tuple[tuple[int, Keys], ...] = ()
    """Tiers on other machines, and the blocks that each was asked for and does not have."""


@dataclass(frozen=True, slots=True)
class Places:
    """All tiers, the one that is asked first first."""

    tiers: list[TierPlace]
    workers: Workers

    def usable(self) -> list[TierPlace]:
        """Those that answer, as far as is known: not down, and not stuck in a call that does not return."""
        return [tier for tier in self.tiers if tier.shelf.up and not self.workers.stuck(tier.number)]

    def where(self, space: BlockSpace, keys: Keys, deadline: float, without: frozenset[int]) -> Whereabouts:
        """Find the first tier that holds each block; tiers numbered in `without` are not asked.

        Tiers on other machines are asked only for what no tier here has, from the first such block on, and none of them
        for so long that there is no time left for the next.
        """
        found = np.full(len(keys), -1, np.int64)
        usable = self.usable()
        silent = [tier for tier in self.tiers if tier not in usable and tier.number not in without]
        asked = sorted((tier for tier in usable if tier.number not in without), key=lambda each: not each.local)
        lacking: list[tuple[int, Keys]] = []
        for position, tier in enumerate(asked):
            missing = np.flatnonzero(found < 0)
            if not len(missing):
                break
            now = time.monotonic()
            until = now + min(tier.config.timeout_s, (deadline - now) / (len(asked) - position))
            try:
                holds = tier.shelf.holds(space, np.ascontiguousarray(keys[missing]), until)
            except TierError:
                silent.append(tier)
                continue
            found[missing[holds]] = tier.number
            if not tier.local and not holds.all():
                lacking.append((tier.number, np.ascontiguousarray(keys[missing[~holds]])))
        return Whereabouts(found, silent[0].name if silent else "", tuple(lacking))

    def seconds(self, tier: int, n_bytes: int) -> float:
        """How long it would take from now to bring this much from a tier, after what already waits for it."""
        return self.tiers[tier].estimate(n_bytes, self.workers.waiting_bytes(tier), time.monotonic())
