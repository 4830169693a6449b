"""The probe's figures of a GPU's links."""

from __future__ import annotations

import numpy as np

from penstock.bench.probe.base import Plan
from penstock.bench.probe.runner import measure
from penstock.bench.probe.targets import machine_subjects
from penstock.profile import Direction


def test_links_are_measured() -> None:
    links = [subject for subject in machine_subjects() if subject.name.startswith("gpu:")]
    assert links, "torch sees a device, so the probe does"
    (tier,) = measure(links[:1], Plan((64, 1 << 20), 0.02, 1 << 20), lambda name, done: None).tiers
    assert {model.direction for model in tier.models} == {
        Direction.TO_DEVICE, Direction.FROM_DEVICE, Direction.COPY,
    }  # fmt: skip
    figures = [(point.latency_us_p50, point.latency_us_p99, point.gb_s) for point in tier.points]
    assert len(figures) == 6 and np.isfinite(figures).all() and np.min(figures) > 0
