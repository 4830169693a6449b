"""The loop of the remote reader: find, copy out, look again, with every line dropped before it is loaded.

Nothing here trusts what it reads: lines come from different moments, so every number is checked against the geometry
before it becomes an address. The order is the one that `testing/model/incoherent.py` explores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import inline_kernel, kernel
from penstock.pool.atomics import load, load_acquire, store
from penstock.pool.coherence import drop_lines, fence_dropped
from penstock.pool.context import (
    X_DATA,
    X_DIRECTORY,
    X_MASK,
    X_N_UNITS,
    X_RECORDS,
    X_SLAB_BYTES,
    X_SLABS,
    X_UNIT_BYTES,
    X_UNITS_PER_SLAB,
)
from penstock.pool.layout import (
    B_CLASS,
    B_SLOTS,
    B_STRIDE,
    B_TABLE,
    BUCKET_BYTES,
    BUCKET_ENTRIES,
    LINE,
    R_LENGTH,
    R_ROOT,
    R_STATE,
    RECORD_BYTES,
    SLAB_ROW_BYTES,
)
from penstock.pool.lookup import LOW32, ready_generation
from penstock.pool.slots import slot_number
from penstock.pool.vector import copy_bytes
from penstock.types import Miss

__all__ = ["copy_out"]

_ABSENT, _CHANGED, _SPACE = int(Miss.ABSENT), int(Miss.CHANGED), int(Miss.SPACE)
_NOWHERE = -1


@inline_kernel
def _drop(address: int, n_bytes: int) -> None:
    drop_lines(address, n_bytes)
    fence_dropped()


@inline_kernel
def _find(ctx: int, lo: int, hi: int) -> int:
    """The unit whose record holds the key, as memory has it now; -1 if none does. Its record's line is fresh then."""
    mask, n_units = load(ctx + X_MASK), load(ctx + X_N_UNITS)
    for bucket in (lo & mask, hi & mask):
        base = load(ctx + X_DIRECTORY) + bucket * BUCKET_BYTES
        _drop(base, BUCKET_BYTES)
        for slot in range(BUCKET_ENTRIES):
            entry = load_acquire(base + 8 * slot)
            unit = (entry & LOW32) - 1
            if (entry >> 32) & LOW32 != (hi >> 32) & LOW32 or unit < 0 or unit >= n_units:
                continue
            record = load(ctx + X_RECORDS) + unit * RECORD_BYTES
            _drop(record, LINE)
            if ready_generation(record, lo, hi) != 0:
                return unit
    return _NOWHERE


@inline_kernel
def _place(ctx: int, unit: int, length: int, table_bytes: int) -> tuple[int, int]:
    """Addresses of a slot's payload and checksum table; (-1, -1) if its slab's row, as it is now, has no such slot."""
    per_slab, slab_bytes = load(ctx + X_UNITS_PER_SLAB), load(ctx + X_SLAB_BYTES)
    slab = unit // per_slab
    row = load(ctx + X_SLABS) + slab * SLAB_ROW_BYTES
    _drop(row, SLAB_ROW_BYTES)
    assigned, stride = load_acquire(row + B_CLASS), load(row + B_STRIDE)
    table, slots = load(row + B_TABLE), load(row + B_SLOTS)
    if assigned == 0 or stride < length or table < table_bytes or slots < 1:
        return _NOWHERE, _NOWHERE
    if max(stride, table) > slab_bytes or slots > slab_bytes // stride or slots * (stride + table) > slab_bytes:
        return _NOWHERE, _NOWHERE
    number = slot_number(unit % per_slab, load(ctx + X_UNIT_BYTES), stride)
    if number >= slots:
        return _NOWHERE, _NOWHERE
    base = load(ctx + X_DATA) + slab * slab_bytes
    return base + number * stride, base + slots * stride + number * table


@inline_kernel
def _unchanged(record: int, lo: int, hi: int, generation: int) -> bool:
    """Whether, after all that was loaded before, the record still holds the key under this generation."""
    fence_dropped()  # a drop may overtake loads ahead of it
    _drop(record, LINE)
    return ready_generation(record, lo, hi) == generation


@inline_kernel
def _drop_payload(payload: int, length: int, sums: int, table_bytes: int) -> None:
    drop_lines(payload, length)
    drop_lines(sums, table_bytes)
    fence_dropped()


@inline_kernel
def _copy_one(ctx: int, key: int, shape: int, table_bytes: int, target: int, table: int, root: int) -> int:
    """Copy one block. Returns 0 or a Miss; the target's bytes are worthless then."""
    lo, hi, length = load(key), load(key + 8), shape >> 32
    unit = _find(ctx, lo, hi)
    if unit < 0:
        return _ABSENT
    record = load(ctx + X_RECORDS) + unit * RECORD_BYTES
    generation = ready_generation(record, lo, hi)
    if generation == 0:
        return _CHANGED
    if (load(record + R_STATE) >> 32) & LOW32 != shape & LOW32 or load(record + R_LENGTH) != length:
        return _SPACE
    store(root, load(record + R_ROOT))
    payload, sums = _place(ctx, unit, length, table_bytes)
    if payload < 0:
        return _CHANGED
    _drop_payload(payload, length, sums, table_bytes)
    copy_bytes(target, payload, length)
    copy_bytes(table, sums, table_bytes)
    return 0 if _unchanged(record, lo, hi, generation) else _CHANGED


@kernel("int64(int64, uint64[:, ::1], int64, int64, int64, int64, uint64[::1])")
def copy_out(
    ctx: int,
    key_array: npt.NDArray[np.uint64],
    shape: int,
    table_bytes: int,
    targets: int,
    tables: int,
    roots: npt.NDArray[np.uint64],
) -> int:
    """Copy the blocks of n keys, (n, 2) words, one behind the other to `targets`, their checksum tables to `tables`.

    `shape` is space id | block bytes << 32. Stops at the first block that is not there. Returns how many were copied |
    miss reason << 48; whether they are what their roots say is for the caller to check.
    """
    keys, n, length, root = key_array.ctypes.data, len(key_array), shape >> 32, roots.ctypes.data
    for i in range(n):
        to, table = targets + i * length, tables + i * table_bytes
        why = _copy_one(ctx, keys + 16 * i, shape, table_bytes, to, table, root + 8 * i)
        if why != 0:
            return i | why << 48
    return n
