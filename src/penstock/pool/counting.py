"""Counters by name: what the numbers in a lane and on the counters page mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.pool import context, keeper_context, layout
from penstock.types import Drop, Eviction, Miss

__all__ = ["keeper_counters", "keeper_report", "lane_counters", "lane_report"]

_LANE = {
    "lookups": context.K_LOOKUPS,
    "keys_looked_up": context.K_KEYS,
    "blocks_hit": context.K_HITS,
    "hits_not_reported": context.K_HITS_UNREPORTED,
    "lookup_retries": context.K_RETRIES,
    "blocks_committed": context.K_COMMITTED,
    "keeper_rung": context.K_RUNG,
    "blocks_read": context.K_READ_BLOCKS,
    "bytes_read": context.K_READ_BYTES,
    "bytes_written": context.K_WRITTEN_BYTES,
}
_KEEPER = {
    "applied": keeper_context.G_APPLIED,
    "applied_before_crash": keeper_context.G_REPEATED,
    "evicted": keeper_context.G_EVICTED,
    "kept_by_leases": keeper_context.G_KEPT,
    "granted": keeper_context.G_GRANTED,
    "touches": keeper_context.G_TOUCHES,
    "lanes_reclaimed": keeper_context.G_RECLAIMED_LANES,
    "slots_reclaimed": keeper_context.G_RECLAIMED_SLOTS,
    "damaged": keeper_context.G_DAMAGED,
    "brain_rebuilt": keeper_context.G_RELEARNED,
}


def lane_report(counters: npt.NDArray[np.uint64]) -> dict[str, int]:
    """A lane's counters (or a sum of several lanes'): names, then `miss.REASON` and `drop.REASON`."""
    report = {name: int(counters[at]) for name, at in _LANE.items()}
    report |= {f"miss.{why.name.lower()}": int(counters[context.K_MISS + why]) for why in Miss if why}
    report |= {f"drop.{why.name.lower()}": int(counters[context.K_DROP + why]) for why in Drop if why}
    return report


def keeper_report(counters: npt.NDArray[np.uint64]) -> dict[str, int]:
    """The keeper's counters: names, then `refused.REASON` (commits) and `evicted.REASON`."""
    report = {name: int(counters[at]) for name, at in _KEEPER.items()}
    report |= {f"refused.{why.name.lower()}": int(counters[keeper_context.G_DROP + why]) for why in Drop if why}
    report |= {f"evicted.{why.name.lower()}": int(counters[keeper_context.G_EVICTION + why]) for why in Eviction}
    return report


def keeper_counters(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The counters page of a mapped segment. A reader may see counts of a batch that is still being applied."""
    at = layout.COUNTERS_OFFSET
    return array[at : at + 8 * layout.N_COUNTERS].view(np.uint64)


def lane_counters(array: npt.NDArray[np.uint8], geometry: layout.Geometry, index: int) -> npt.NDArray[np.uint64]:
    """A lane's counters in a segment mapped from its start."""
    at = geometry.lanes_offset + index * geometry.lane_bytes + layout.L_COUNTERS
    return array[at : at + 8 * layout.LANE_COUNTERS].view(np.uint64)
