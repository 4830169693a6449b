"""How long a tier would take, as the mover tells engines: a tier that nobody dares to use is given another chance."""

from __future__ import annotations

import pytest

from penstock.core.speed import SpeedMeter
from penstock.runtime.mover.places import TierPlace
from penstock.runtime.shelf import Shelf
from penstock.testing.dict_tier import DictTier
from penstock.tiers.registry import parse_tier

MIB = 1 << 20
START = (1e-4, 1e9)


def place() -> TierPlace:
    return TierPlace(0, parse_tier("disk:/nowhere"), Shelf(DictTier("d")), SpeedMeter(*START))


def test_an_estimate_that_nothing_corrects_fades() -> None:
    tier, usual = place(), SpeedMeter(*START).estimate(MIB)
    tier.meter.add(MIB, 3600.0)
    for minute in range(30):
        last = tier.estimate(MIB, 0, 60.0 * minute)
    assert last == pytest.approx(usual, rel=0.1)


def test_one_that_nobody_asks_for_or_that_is_used_does_not() -> None:
    tier = place()
    tier.meter.add(MIB, 1.0)
    first = tier.estimate(MIB, 0, 0.0)
    assert tier.estimate(MIB, 0, 59.0) == first
    tier = place()
    for hour in range(10):
        tier.shelf._samples.append((MIB, 1.0))  # as after a read
        assert tier.estimate(MIB, 0, 3600.0 * hour) == pytest.approx(1.0)
