"""Where a slot's bytes are, and the facts of its record, as arrays for the copy kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import inline_kernel, kernel
from penstock.pool.atomics import load, load_acquire
from penstock.pool.context import (
    X_DATA,
    X_GENERATIONS,
    X_NEXT,
    X_RECORDS,
    X_SLAB_BYTES,
    X_SLABS,
    X_UNIT_BYTES,
    X_UNITS,
    X_UNITS_PER_SLAB,
)
from penstock.pool.layout import (
    B_CLASS,
    B_SLOTS,
    B_STRIDE,
    B_TABLE,
    R_KEY,
    R_ROOT,
    RECORD_BYTES,
    SLAB_ROW_BYTES,
)


@inline_kernel
def slot_number(rel_unit: int, unit_bytes: int, stride: int) -> int:
    """The slot of a slab whose first byte lies in this unit (the caller knows that there is one)."""
    return (rel_unit * unit_bytes + stride - 1) // stride


@inline_kernel
def _payload_and_table(ctx: int, unit: int) -> tuple[int, int]:
    per_slab = load(ctx + X_UNITS_PER_SLAB)
    slab = unit // per_slab
    row = load(ctx + X_SLABS) + slab * SLAB_ROW_BYTES
    load_acquire(row + B_CLASS)
    stride = load(row + B_STRIDE)
    number = slot_number(unit % per_slab, load(ctx + X_UNIT_BYTES), stride)
    base = load(ctx + X_DATA) + slab * load(ctx + X_SLAB_BYTES)
    return base + number * stride, base + load(row + B_SLOTS) * stride + number * load(row + B_TABLE)


@kernel("void(int64, int64, int64, int64[::1], int64[::1], uint64[::1], uint64[:, ::1])")
def lease_slots(
    ctx: int,
    cell: int,
    n: int,
    payloads: npt.NDArray[np.int64],
    tables: npt.NDArray[np.int64],
    roots: npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint64],
) -> None:
    """Addresses, checksum roots and keys of n leased blocks from `cell` on."""
    units, following, records = load(ctx + X_UNITS), load(ctx + X_NEXT), load(ctx + X_RECORDS)
    for i in range(n):
        unit = load(units + 8 * cell)
        payloads[i], tables[i] = _payload_and_table(ctx, unit)
        record = records + unit * RECORD_BYTES
        roots[i] = load(record + R_ROOT)
        keys[i, 0] = load(record + R_KEY)
        keys[i, 1] = load(record + R_KEY + 8)
        cell = load(following + 8 * cell)


@kernel("void(int64, int64, int64, int64[:, ::1], uint64[:, ::1])")
def lease_handles(ctx: int, cell: int, n: int, handles: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64]) -> None:
    """(unit, generation) and key of n leased blocks from `cell` on."""
    units, following, records = load(ctx + X_UNITS), load(ctx + X_NEXT), load(ctx + X_RECORDS)
    generations = load(ctx + X_GENERATIONS)
    for i in range(n):
        unit = load(units + 8 * cell)
        handles[i, 0] = unit
        handles[i, 1] = load(generations + 8 * cell)
        record = records + unit * RECORD_BYTES
        keys[i, 0] = load(record + R_KEY)
        keys[i, 1] = load(record + R_KEY + 8)
        cell = load(following + 8 * cell)


@kernel("void(int64, int64[::1], int64[::1], int64[::1])")
def unit_slots(
    ctx: int, units: npt.NDArray[np.int64], payloads: npt.NDArray[np.int64], tables: npt.NDArray[np.int64]
) -> None:
    """Addresses of slots named by their first units."""
    for i in range(units.size):
        payloads[i], tables[i] = _payload_and_table(ctx, units[i])
