"""What the keeper looks at between two batches: which lanes have something for it, who wants slots, who waits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import kernel
from penstock.pool.atomics import fence_full, load, load_acquire
from penstock.pool.keeper_context import Y_LANE_BYTES, Y_LANES, Y_N_LANES, Y_OUTSTANDING, Y_RING_MASK
from penstock.pool.layout import (
    L_COMMIT_HEAD,
    L_COMMIT_TAIL,
    L_HIT_HEAD,
    L_HIT_TAIL,
    L_STATE,
    L_WAITING,
    L_WANT,
    N_CLASSES,
    LaneState,
)

_USED = int(LaneState.USED)

# Columns of the survey, one row per lane.
V_COMMITS, V_HITS, V_WANTS, V_WAITING = 0, 1, 2, 3
SURVEY_COLUMNS = 4


@kernel("int64(int64, int64[:, ::1])")
def survey(ctx: int, rows: npt.NDArray[np.int64]) -> int:
    """Fill one row per lane: commits waiting, hits waiting, slots wanted and not granted, whether it waits.

    Fences first, so that what the keeper published before is seen by whoever is not seen waiting. Returns the number
    of lanes with commits or hits.
    """
    fence_full()
    busy, most = 0, load(ctx + Y_RING_MASK) + 1
    for index in range(load(ctx + Y_N_LANES)):
        lane = load(ctx + Y_LANES) + index * load(ctx + Y_LANE_BYTES)
        rows[index, :] = 0
        if load_acquire(lane + L_STATE) != _USED:
            continue
        commits = load_acquire(lane + L_COMMIT_HEAD) - load(lane + L_COMMIT_TAIL)
        hits = load_acquire(lane + L_HIT_HEAD) - load(lane + L_HIT_TAIL)
        rows[index, V_COMMITS] = commits if 0 < commits <= most else 0
        rows[index, V_HITS] = hits if 0 < hits <= most else 0
        rows[index, V_WAITING] = load(lane + L_WAITING)
        wants = 0
        for slot_class in range(N_CLASSES):
            missing = load(lane + L_WANT + 8 * slot_class) - load(
                load(ctx + Y_OUTSTANDING) + 8 * (index * N_CLASSES + slot_class)
            )
            if missing > 0:
                wants += min(missing, most)
        rows[index, V_WANTS] = wants
        if rows[index, V_COMMITS] + rows[index, V_HITS] > 0:
            busy += 1
    return busy


@kernel("void(int64, int64, int64[::1])")
def wants_of(ctx: int, index: int, out: npt.NDArray[np.int64]) -> None:
    """Slots of each class that one lane wants beyond what it has been granted."""
    lane = load(ctx + Y_LANES) + index * load(ctx + Y_LANE_BYTES)
    most = load(ctx + Y_RING_MASK) + 1
    for slot_class in range(N_CLASSES):
        missing = load(lane + L_WANT + 8 * slot_class) - load(
            load(ctx + Y_OUTSTANDING) + 8 * (index * N_CLASSES + slot_class)
        )
        out[slot_class] = min(max(missing, 0), most)
