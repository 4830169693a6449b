"""What a starting keeper does with the segment it finds: records are the truth, everything else follows from them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import inline_kernel, kernel
from penstock.pool.apply import add, insert
from penstock.pool.atomics import load, store, store_release
from penstock.pool.keeper_context import (
    Y_DIRECTORY,
    Y_FREE_HEAD,
    Y_HOLDER,
    Y_MASK,
    Y_N_FREE,
    Y_N_GRANTED,
    Y_N_LANES,
    Y_N_READY,
    Y_N_UNITS,
    Y_NEXT_FREE,
    Y_OUTSTANDING,
    Y_PARENT,
    Y_RECORDS,
    Y_SLAB_USED,
    Y_SLABS,
    Y_SPACES,
    Y_STAMP,
    Y_UNIT_BYTES,
    Y_UNITS_PER_SLAB,
)
from penstock.pool.layout import (
    B_CLASS,
    B_SLOTS,
    B_STRIDE,
    BUCKET_ENTRIES,
    N_CLASSES,
    R_KEY,
    R_PARENT,
    R_STAMP,
    R_STATE,
    RECORD_BYTES,
    S_ROOT,
    SLAB_ROW_BYTES,
    SPACE_BYTES,
    SlotState,
)
from penstock.pool.lookup import LOW32, find

FREE, GRANTED = int(SlotState.FREE), int(SlotState.GRANTED)
READY, LEAVING = int(SlotState.READY), int(SlotState.LEAVING)


@inline_kernel
def _slot_unit(ctx: int, slab: int, number: int) -> int:
    stride = load(load(ctx + Y_SLABS) + slab * SLAB_ROW_BYTES + B_STRIDE)
    return slab * load(ctx + Y_UNITS_PER_SLAB) + number * stride // load(ctx + Y_UNIT_BYTES)


@kernel("void(int64, int64)")
def push_free_slab(ctx: int, slab: int) -> None:
    """Put every FREE slot of an assigned slab on its class's free list, and count the others as used."""
    row = load(ctx + Y_SLABS) + slab * SLAB_ROW_BYTES
    slot_class = load(row + B_CLASS) - 1
    head, n_free = load(ctx + Y_FREE_HEAD) + 8 * slot_class, load(ctx + Y_N_FREE) + 8 * slot_class
    slots = load(row + B_SLOTS)
    free = 0
    for back in range(slots):
        unit = _slot_unit(ctx, slab, slots - 1 - back)
        if load(load(ctx + Y_RECORDS) + unit * RECORD_BYTES + R_STATE) & 0xFF == FREE:
            store(load(ctx + Y_NEXT_FREE) + 8 * unit, load(head))
            store(head, unit)
            free += 1
    add(n_free, free)
    store(load(ctx + Y_SLAB_USED) + 8 * slab, slots - free)


@kernel("void(int64, int64)")
def pull_free_slab(ctx: int, slab: int) -> None:
    """Take every slot of a slab off its class's free list."""
    slot_class = load(load(ctx + Y_SLABS) + slab * SLAB_ROW_BYTES + B_CLASS) - 1
    link = load(ctx + Y_FREE_HEAD) + 8 * slot_class
    per_slab, following = load(ctx + Y_UNITS_PER_SLAB), load(ctx + Y_NEXT_FREE)
    taken = 0
    unit = load(link)
    while unit >= 0:
        after = load(following + 8 * unit)
        if unit // per_slab == slab:
            store(link, after)
            taken += 1
        else:
            link = following + 8 * unit
        unit = after
    add(load(ctx + Y_N_FREE) + 8 * slot_class, -taken)


@kernel("int64(int64)")
def settle_records(ctx: int) -> int:
    """LEAVING becomes READY again; grants are entered in the private columns. Returns the newest stamp of a block."""
    records, newest = load(ctx + Y_RECORDS), 0
    for unit in range(load(ctx + Y_N_UNITS)):
        record = records + unit * RECORD_BYTES
        word = load(record + R_STATE)
        state = word & 0xFF
        if state == LEAVING:
            store_release(record + R_STATE, (word & ~0xFF) | READY)
            state = READY
        if state == READY:
            newest = max(newest, load(record + R_STAMP))
            add(ctx + Y_N_READY, 1)
        elif state == GRANTED:
            lane = (word >> 8) & 0xFFFFFF
            if lane < load(ctx + Y_N_LANES):
                slot_class = load(load(ctx + Y_SLABS) + unit // load(ctx + Y_UNITS_PER_SLAB) * SLAB_ROW_BYTES) - 1
                store(load(ctx + Y_HOLDER) + 8 * unit, lane + 1)
                add(load(ctx + Y_OUTSTANDING) + 8 * (lane * N_CLASSES + slot_class), 1)
                add(ctx + Y_N_GRANTED, 1)
    store(ctx + Y_STAMP, newest)
    return newest


@inline_kernel
def _entry_is_true(ctx: int, bucket: int, entry: int) -> bool:
    unit = (entry & LOW32) - 1
    if unit < 0 or unit >= load(ctx + Y_N_UNITS):
        return False
    record = load(ctx + Y_RECORDS) + unit * RECORD_BYTES
    if load(record + R_STATE) & 0xFF != READY:
        return False
    lo, hi, mask = load(record + R_KEY), load(record + R_KEY + 8), load(ctx + Y_MASK)
    return (hi >> 32) & LOW32 == (entry >> 32) & LOW32 and (lo & mask == bucket or hi & mask == bucket)


@kernel("int64(int64, uint32[::1])")
def repair_directory(ctx: int, duplicates: npt.NDArray[np.uint32]) -> int:
    """In place, while readers read: clear entries that say nothing true, enter blocks that are not listed.

    A block whose key another unit is listed for already goes into `duplicates` (one place per unit). Returns how many.
    """
    directory, mask, records = load(ctx + Y_DIRECTORY), load(ctx + Y_MASK), load(ctx + Y_RECORDS)
    n_units = load(ctx + Y_N_UNITS)
    for cell in range((mask + 1) * BUCKET_ENTRIES):
        entry = load(directory + 8 * cell)
        if entry != 0 and not _entry_is_true(ctx, cell // BUCKET_ENTRIES, entry):
            store_release(directory + 8 * cell, 0)
    count = 0
    for unit in range(n_units):
        record = records + unit * RECORD_BYTES
        if load(record + R_STATE) & 0xFF == READY:
            lo, hi = load(record + R_KEY), load(record + R_KEY + 8)
            listed = find(directory, mask, records, n_units, lo, hi)
            if listed != unit and (listed >= 0 or insert(directory, mask, lo, hi, unit) == 0):
                duplicates[count] = unit
                count += 1
    return count


@kernel("int64(int64, uint32[::1], uint32[::1], uint32[::1], int64[::1])")
def list_blocks(
    ctx: int,
    units: npt.NDArray[np.uint32],
    parents: npt.NDArray[np.uint32],
    classes: npt.NDArray[np.uint32],
    stamps: npt.NDArray[np.int64],
) -> int:
    """Every READY block with its parent's unit (0xFFFFFFFF for none), class and stamp; fills the parent column."""
    directory, mask, records = load(ctx + Y_DIRECTORY), load(ctx + Y_MASK), load(ctx + Y_RECORDS)
    n_units, count = load(ctx + Y_N_UNITS), 0
    for unit in range(n_units):
        record = records + unit * RECORD_BYTES
        word = load(record + R_STATE)
        if word & 0xFF != READY:
            continue
        lo, hi = load(record + R_PARENT), load(record + R_PARENT + 8)
        row = load(ctx + Y_SPACES) + ((word >> 32) & LOW32) * SPACE_BYTES
        parent = -1
        if load(row + S_ROOT) != lo or load(row + S_ROOT + 8) != hi:
            parent = find(directory, mask, records, n_units, lo, hi)
        store(load(ctx + Y_PARENT) + 8 * unit, parent)
        units[count] = unit
        parents[count] = parent & LOW32
        classes[count] = load(load(ctx + Y_SLABS) + unit // load(ctx + Y_UNITS_PER_SLAB) * SLAB_ROW_BYTES) - 1
        stamps[count] = load(record + R_STAMP)
        count += 1
    return count
