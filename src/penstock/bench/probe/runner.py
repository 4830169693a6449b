"""One subject after the other, into a profile. One that cannot be measured costs its own figures only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np

from penstock.bench.machine import describe_machine
from penstock.bench.probe.base import CannotMeasure, Plan, Subject, Timing
from penstock.bench.probe.fit import fit_model
from penstock.profile import Direction, LeftOut, Point, Profile, TierProfile

__all__ = ["measure", "point_of", "points_to_take", "share_of_time"]

_MOST_S = 1.0
_LEAST_S = 0.02


def points_to_take(subjects: Sequence[Subject], sizes: Sequence[int]) -> int:
    """How many points there are at most."""
    return sum(len(subject.directions) for subject in subjects) * len(sizes)


def share_of_time(total_s: float, points: int) -> float:
    """Seconds for each point, so that all of them take about `total_s`."""
    return min(_MOST_S, max(_LEAST_S, total_s / max(1, points)))


def measure(subjects: Sequence[Subject], plan: Plan, began: Callable[[str, int], None]) -> Profile:
    """Measure all of them. `began` is told each subject's name, and how many points were dealt with, as they are."""
    tiers, left_out = [], []
    done = 0
    for subject in subjects:
        began(subject.name, done)
        points: dict[Direction, list[tuple[int, Timing]]] = {direction: [] for direction in subject.directions}
        try:
            with subject.opened(plan):
                for n, (size, direction) in enumerate((s, d) for s in plan.sizes for d in subject.directions):
                    timing = subject.time(direction, size, plan.point_s)
                    if timing is not None:
                        points[direction].append((size, timing))
                    began(subject.name, done + n + 1)
        except CannotMeasure as error:
            subject.notes.append(str(error))
        done += len(plan.sizes) * len(subject.directions)
        if any(points.values()):
            tiers.append(_tier_profile(subject, points))
        else:
            left_out.append(LeftOut(subject.name, "; ".join(subject.notes) or "it takes none of the sizes"))
    made_at = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
    return Profile(made_at, describe_machine(), tiers, left_out)


def point_of(direction: Direction, size: int, timing: Timing) -> Point:
    """The figures of one size in one direction."""
    median, tail = (_rounded(1e6 * float(np.percentile(timing.single, q))) for q in (50, 99))
    moved, calls = size * timing.batch, timing.single if timing.batches is None else timing.batches
    gb_s = _rounded(moved * len(calls) / float(calls.sum()) / 1e9) if timing.moves else None
    return Point(direction, size, median, tail, gb_s, len(timing.single), timing.batch)


def _tier_profile(subject: Subject, points: dict[Direction, list[tuple[int, Timing]]]) -> TierProfile:
    measured = {direction: rows for direction, rows in points.items() if rows}
    return TierProfile(
        name=subject.name,
        kind=subject.name.partition(":")[0],
        models=[fit_model(direction, rows) for direction, rows in measured.items()],
        points=[point_of(direction, size, timing) for direction, rows in measured.items() for size, timing in rows],
        notes=list(subject.notes),
    )


def _rounded(value: float) -> float:
    """Four significant digits: more is noise."""
    return float(f"{value:.4g}")
