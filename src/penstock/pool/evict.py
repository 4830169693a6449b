"""The keeper gives slots away and takes them back: grants, evictions, reclamation of the dead."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import inline_kernel, kernel
from penstock.pool.apply import EVENT_BYTES, add, class_of_unit, end_grant, free_slot, remove
from penstock.pool.atomics import fence_full, load, load_acquire, store, store32, store_release
from penstock.pool.keeper_context import (
    G_EVICTED,
    G_EVICTION,
    G_GRANTED,
    G_KEPT,
    Y_COUNTERS,
    Y_DIRECTORY,
    Y_FREE_HEAD,
    Y_GRANTS_AT,
    Y_HEADER,
    Y_HOLDER,
    Y_LANE_BYTES,
    Y_LANES,
    Y_LEASES_AT,
    Y_MASK,
    Y_N_FREE,
    Y_N_GRANTED,
    Y_N_LANES,
    Y_N_LEASES,
    Y_N_READY,
    Y_N_UNITS,
    Y_NEXT_FREE,
    Y_OUTSTANDING,
    Y_PARENT,
    Y_RECORDS,
    Y_REMOVALS,
    Y_REMOVALS_MASK,
    Y_RING_MASK,
    Y_SLAB_USED,
    Y_UNITS_PER_SLAB,
)
from penstock.pool.layout import (
    GRANT_BYTES,
    H_REMOVED,
    H_REMOVING,
    L_EPOCH,
    L_GRANT_HEAD,
    L_GRANT_TAIL,
    L_LEASE_HWM,
    L_STATE,
    N_CLASSES,
    R_EPOCH,
    R_GENERATION,
    R_KEY,
    R_STAMP,
    R_STATE,
    RECORD_BYTES,
    REMOVAL_BYTES,
    LaneState,
    SlotState,
)
from penstock.pool.lookup import LOW32
from penstock.pool.publishing import write_back_record
from penstock.types import EventKind, Eviction

GRANTED, LEAVING = int(SlotState.GRANTED), int(SlotState.LEAVING)
READY = int(SlotState.READY)
_LANE_USED = int(LaneState.USED)
_EVICTED, _KEPT = int(EventKind.EVICTED), int(EventKind.KEPT)
_DUPLICATE = int(Eviction.DUPLICATE)

VICTIM, HELD = 1, 2


@kernel("int64(int64, int64, int64, int64)")
def grant(ctx: int, lane_index: int, slot_class: int, n: int) -> int:
    """Grant up to n free slots of a class to a lane. Returns how many.

    The record says GRANTED, with the place in the ring where the grant will be published, before it is published: a
    restarted keeper thus tells a grant that nobody ever saw from one that a client holds.
    """
    lane = load(ctx + Y_LANES) + lane_index * load(ctx + Y_LANE_BYTES)
    ring, mask, records = lane + load(ctx + Y_GRANTS_AT), load(ctx + Y_RING_MASK), load(ctx + Y_RECORDS)
    head = load(lane + L_GRANT_HEAD)
    used = head - load_acquire(lane + L_GRANT_TAIL)
    free_head, n_free = load(ctx + Y_FREE_HEAD) + 8 * slot_class, load(ctx + Y_N_FREE) + 8 * slot_class
    if used < 0 or used > mask + 1:
        return 0
    n = min(n, min(load(n_free), mask + 1 - used))
    for i in range(n):
        unit = load(free_head)
        store(free_head, load(load(ctx + Y_NEXT_FREE) + 8 * unit))
        record = records + unit * RECORD_BYTES
        generation = load(record + R_GENERATION) + 1
        store(record + R_GENERATION, generation)
        store(record + R_EPOCH, load(lane + L_EPOCH))
        store(record + R_STAMP, head + i)
        store_release(record + R_STATE, GRANTED | lane_index << 8)
        write_back_record(ctx, unit)
        store(load(ctx + Y_HOLDER) + 8 * unit, lane_index + 1)
        add(load(ctx + Y_SLAB_USED) + 8 * (unit // load(ctx + Y_UNITS_PER_SLAB)), 1)
        entry = ring + ((head + i) & mask) * GRANT_BYTES
        store(entry, unit | slot_class << 32)
        store(entry + 8, generation)
    add(n_free, -n)
    add(ctx + Y_N_GRANTED, n)
    add(load(ctx + Y_OUTSTANDING) + 8 * (lane_index * N_CLASSES + slot_class), n)
    add(load(ctx + Y_COUNTERS) + 8 * G_GRANTED, n)
    store_release(lane + L_GRANT_HEAD, head + n)
    return n


@inline_kernel
def _scan_lanes(ctx: int, marks: npt.NDArray[np.uint8]) -> None:
    """Turn VICTIM into HELD for every unit that some lease cell names."""
    n_units = load(ctx + Y_N_UNITS)
    for index in range(load(ctx + Y_N_LANES)):
        lane = load(ctx + Y_LANES) + index * load(ctx + Y_LANE_BYTES)
        if load_acquire(lane + L_STATE) != _LANE_USED:
            continue
        cells = lane + load(ctx + Y_LEASES_AT)
        # A client that wrote nonsense as its mark is scanned whole.
        hwm = load_acquire(lane + L_LEASE_HWM)
        if hwm < 0 or hwm > load(ctx + Y_N_LEASES):
            hwm = load(ctx + Y_N_LEASES)
        for cell in range(hwm):
            unit = load(cells + 8 * cell) - 1
            if 0 <= unit < n_units and marks[unit] == VICTIM:
                marks[unit] = HELD


@inline_kernel
def _write_removal(ctx: int, number: int, record: int, why: int) -> None:
    """Entry `number` of the ring of removals, from a record that still says what it held."""
    at = load(ctx + Y_REMOVALS) + (number & load(ctx + Y_REMOVALS_MASK)) * REMOVAL_BYTES
    store(at, load(record + R_KEY))
    store(at + 8, load(record + R_KEY + 8))
    store(at + 16, (load(record + R_STATE) >> 32) & LOW32 | why << 32)


@kernel("int64(int64, uint32[::1], int64, uint8[::1], int64, int64, int64)")
def evict(
    ctx: int, victims: npt.NDArray[np.uint32], n: int, marks: npt.NDArray[np.uint8], events: int, why: int, newest: int
) -> int:
    """Evict those of n victims (children before parents) that no lease holds and whose stamp is at most `newest`.

    The others stay READY.
    `marks` has one zero byte per unit and is zero again afterwards. Writes n EVICTED or KEPT events at `events`, in the
    victims' order. Returns how many were evicted. `why` is an Eviction. The ring of removals tells what was evicted,
    once no lookup finds it; not so a duplicate, whose key stays.
    """
    records, directory, mask = load(ctx + Y_RECORDS), load(ctx + Y_DIRECTORY), load(ctx + Y_MASK)
    parents, counters, header = load(ctx + Y_PARENT), load(ctx + Y_COUNTERS), load(ctx + Y_HEADER)
    removed = load(header + H_REMOVED)
    # Ahead of the fence: whoever reads an entry that is being overwritten sees that it was about to be.
    store(header + H_REMOVING, removed + n)
    for i in range(n):
        cell = records + victims[i] * RECORD_BYTES + R_STATE
        store(cell, (load(cell) & ~0xFF) | LEAVING)
        marks[victims[i]] = VICTIM if load(records + victims[i] * RECORD_BYTES + R_STAMP) <= newest else HELD
    fence_full()
    _scan_lanes(ctx, marks)
    evicted = 0
    for i in range(n):
        unit: int = np.int64(victims[i])  # type: ignore[assignment]  # numba: uint32 + int64 stays an integer
        record = records + unit * RECORD_BYTES
        held = marks[unit] == HELD
        marks[unit] = 0
        if held:
            parent = load(parents + 8 * unit)
            if parent >= 0 and marks[parent] == VICTIM:
                marks[parent] = HELD
            cell = record + R_STATE
            store_release(cell, (load(cell) & ~0xFF) | READY)
            write_back_record(ctx, unit)  # memory may have seen that it was leaving
        else:
            if why != _DUPLICATE:
                _write_removal(ctx, removed, record, why)
                removed += 1
            remove(directory, mask, load(record + R_KEY), load(record + R_KEY + 8), unit)
            free_slot(ctx, unit)
            evicted += 1
        at = events + i * EVENT_BYTES
        store32(at, _KEPT if held else _EVICTED)
        store32(at + 4, unit)
        store32(at + 12, class_of_unit(ctx, unit))
    store_release(header + H_REMOVED, removed)
    add(ctx + Y_N_READY, -evicted)
    add(counters + 8 * G_EVICTED, evicted)
    add(counters + 8 * (G_EVICTION + why), evicted)
    add(counters + 8 * G_KEPT, n - evicted)
    return evicted


@kernel("void(int64, int64[::1])")
def free_granted(ctx: int, units: npt.NDArray[np.int64]) -> None:
    """Take back slots whose owner is proven dead, or which were never published."""
    for i in range(units.size):
        end_grant(ctx, units[i])
        free_slot(ctx, units[i])
