"""What `penstock tiers` shows: each tier's state, size, speed, queue and counters; fetches; the brain's counts."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from penstock.runtime.mover.places import TierPlace
from penstock.types import Urgency

if TYPE_CHECKING:
    from penstock.runtime.mover.process import Mover

__all__ = ["report"]


def report(mover: Mover) -> dict[str, Any]:
    """Plain data; reads only."""
    with mover.lock:
        orders = mover.tiering.counts()
    return {
        "tiers": [_tier(mover, tier) for tier in mover.places.tiers],
        "fetches": mover.service.counters(),
        "orders": orders,
        "mover": {
            "pid": os.getpid(),
            "restarts": mover.restarts,
            "uptime_s": round(time.monotonic() - mover.started_s, 1),
            "looks": mover.watch.looks,
            "gaps": mover.watch.gaps,
            "failed_transfers": mover.places.workers.failed,
        },
    }


def _tier(mover: Mover, tier: TierPlace) -> dict[str, Any]:
    workers, usage, meter = mover.places.workers, tier.shelf.tier.usage(), tier.measured()
    stuck = workers.stuck(tier.number)
    return {
        "name": tier.name,
        "scheme": tier.config.scheme,
        "location": tier.config.location,
        "write": tier.config.write.value,
        "up": tier.shelf.up and not stuck,
        "why": "its calls do not return" if stuck else tier.shelf.why,
        "capacity_bytes": usage.capacity_bytes,
        "used_bytes": usage.used_bytes,
        "blocks": usage.blocks,
        "latency_s": meter.latency_s,
        "bytes_per_s": meter.bytes_per_s,
        "measured": meter.measured,
        "queue": {
            "fetch_bytes": workers.waiting_bytes(tier.number, Urgency.FETCH),
            "prefetch_bytes": workers.waiting_bytes(tier.number, Urgency.PREFETCH),
            "write_back_bytes": workers.waiting_bytes(tier.number, Urgency.WRITE_BACK),
            "running": workers.running(tier.number),
            "hanging": workers.hanging(tier.number),
        },
        "counters": tier.shelf.counters() | tier.shelf.tier.counters(),
    }
