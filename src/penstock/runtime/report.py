"""What people see of a pool: the answers behind `penstock stat`, `ls` and `fsck`. Read-only."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from penstock.errors import PenstockError
from penstock.pool import layout
from penstock.pool.cells import peek
from penstock.pool.counting import keeper_report, lane_counters, lane_report
from penstock.pool.fsck import check_segment, checksums
from penstock.pool.keeper_context import G_DEPARTED
from penstock.pool.layout import LANE_COUNTERS, LaneState, SlotState
from penstock.runtime.keeper import Keeper

__all__ = ["fsck_report", "ls_report", "stat_report"]

MAX_CHAINS = 200


def stat_report(keeper: Keeper, clients: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes, use, clients and every counter."""
    authority, geometry = keeper.authority, keeper.geometry
    sums = authority.counters()[G_DEPARTED : G_DEPARTED + LANE_COUNTERS].copy()
    lanes = []
    by_lane = {client["lane"]: client for client in clients}
    for lane in range(geometry.n_lanes):
        if authority.lane_state(lane) != LaneState.USED:
            continue
        counters = lane_counters(authority.mapping.array, geometry, lane)
        sums += counters
        lanes.append(_lane(keeper, lane, by_lane.get(lane)))
    return {
        "path": str(authority.segment.path),
        "uuid": authority.segment.uuid.hex(),
        "size_bytes": geometry.total_bytes,
        "touched_bytes": int(peek(authority.header(layout.H_TOUCHED))),
        "keeper_epoch": int(peek(authority.header(layout.H_KEEPER_EPOCH))),
        "blocks": authority.n_ready,
        "granted": authority.n_granted,
        "classes": _classes(keeper),
        "clients": lanes,
        "counters": {"clients": lane_report(sums), "keeper": keeper_report(authority.counters())},
    }


def _lane(keeper: Keeper, lane: int, client: dict[str, Any] | None) -> dict[str, Any]:
    authority, geometry = keeper.authority, keeper.geometry
    at = authority.lane(lane) + geometry.lease_table_offset - authority.mapping.address
    cells = authority.mapping.array[at : at + 8 * geometry.leases].view(np.uint64)
    return {
        "lane": lane,
        "pid": client["pid"] if client else 0,
        "name": client["name"] if client else "(not back yet)",
        "alive": keeper.lane_alive(lane),
        "leases": int(np.count_nonzero(cells)),
        "grants": int(authority.outstanding()[lane].sum()),
    }


def _classes(keeper: Keeper) -> list[dict[str, int]]:
    slabs = keeper.authority.slab_classes()
    return [
        {
            "slot_bytes": shape.stride,
            "slabs": int((slabs == number).sum()),
            "slots": int((slabs == number).sum()) * shape.slots_per_slab,
            "free": keeper.authority.n_free(number),
        }
        for number, shape in enumerate(keeper.authority.shapes)
    ]


def ls_report(keeper: Keeper) -> dict[str, Any]:
    """Spaces, and chains by their last blocks: length, age, hits, session, tenant. At most 200 chains, newest first."""
    authority, facts = keeper.authority, keeper.brain.facts
    records = authority.records()
    units = np.flatnonzero((records[:, layout.R_STATE // 8] & np.uint64(0xFF)) == SlotState.READY)
    ids = (records[units, layout.R_STATE // 8] >> np.uint64(32)).astype(np.int64)
    spaces = [
        {
            "id": row.id,
            "digest": row.digest.hex(),
            "label": row.label,
            "block_bytes": row.block_bytes,
            "block_tokens": row.block_tokens,
            "blocks": int((ids == row.id).sum()),
        }
        for row in sorted(authority.spaces.values(), key=lambda row: row.id)
    ]
    tails = units[facts.rows["children"][units] == 0]
    newest = tails[np.argsort(records[tails, layout.R_STAMP // 8])[::-1]][:MAX_CHAINS]
    now_ms = time.monotonic_ns() // 1_000_000
    chains = [_chain(keeper, int(unit), now_ms) for unit in newest]
    return {"spaces": spaces, "n_chains": len(tails), "chains": chains}


def _chain(keeper: Keeper, tail: int, now_ms: int) -> dict[str, Any]:
    authority, rows = keeper.authority, keeper.brain.facts.rows
    parents, record = authority.parents(), authority.records()[tail]
    blocks, unit = 0, tail
    while unit >= 0:
        blocks, unit = blocks + 1, int(parents[unit])
    session, tenant = (int(record[at // 8].astype(np.int64)) for at in (layout.R_SESSION, layout.R_TENANT))
    last = int(rows["last_use"][tail])
    return {
        "space": int(record[layout.R_STATE // 8]) >> 32,
        "tail": record[2:4].tobytes().hex(),
        "blocks": blocks,
        "idle_s": round((now_ms - last) / 1000, 1) if last >= keeper.started_ms else None,
        "hits": int(rows["hits"][tail]),
        "session": keeper.names.get(session, f"#{session & (1 << 64) - 1:016x}") if session else "",
        "tenant": keeper.names.get(tenant, f"#{tenant & (1 << 64) - 1:016x}") if tenant else "",
        "priority": int(record[layout.R_PRIORITY // 8].astype(np.int64)),
    }


def fsck_report(keeper: Keeper, *, bytes_too: bool = True) -> dict[str, Any]:
    """Every check there is, between two batches: the segment, the brain, and (unless told not to) all bytes."""
    authority = keeper.authority
    problems = check_segment(authority.mapping.array, keeper.geometry)
    problems += _private(keeper)
    checked = 0
    if bytes_too:
        checked, wrong = checksums(authority.mapping.array, keeper.geometry)
        problems += wrong
    return {"blocks": authority.n_ready, "checksums_verified": checked, "problems": problems}


def _private(keeper: Keeper) -> list[str]:
    """Whether the keeper's own columns say what the segment says."""
    authority = keeper.authority
    problems = []
    states = authority.records()[:, layout.R_STATE // 8] & np.uint64(0xFF)
    ready, granted = (int((states == state).sum()) for state in (SlotState.READY, SlotState.GRANTED))
    if ready != authority.n_ready or granted != authority.n_granted:
        problems.append(f"{ready} ready and {granted} granted; counted {authority.n_ready} and {authority.n_granted}")
    if granted != int(authority.outstanding().sum()):
        problems.append(f"{granted} granted, {int(authority.outstanding().sum())} outstanding by lane")
    slabs = authority.slab_classes()
    for number, shape in enumerate(authority.shapes):
        mine = np.flatnonzero(slabs == number)
        used = int(authority.slab_used()[mine].sum())
        if used + authority.n_free(number) != len(mine) * shape.slots_per_slab:
            problems.append(
                f"class {number}: {used} used and {authority.n_free(number)} free slots in {len(mine)} slabs"
            )
    resident = keeper.brain.facts.resident()
    if not np.array_equal(resident, states == SlotState.READY):
        problems.append(
            f"{int((resident != (states == SlotState.READY)).sum())} blocks differ between brain and segment"
        )
    try:
        keeper.brain.assert_consistent()
    except PenstockError as error:
        problems.append(f"brain: {error}")
    return problems
