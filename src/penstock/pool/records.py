"""Slot records read by who does not own them: what a block is, by the slot that an event named.

The keeper may change a record at any moment. The generation is loaded first and looked at last, as a reader's lookup
does; what changed meanwhile is left out. Nothing is leased: whoever wants the bytes leases and is checked again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import kernel
from penstock.pool.atomics import fence_full, load, load_acquire
from penstock.pool.context import X_N_UNITS, X_RECORDS
from penstock.pool.layout import R_GENERATION, R_KEY, R_PARENT, R_PRIORITY, R_STATE, R_TENANT, RECORD_BYTES
from penstock.pool.lookup import LOW32, READY

__all__ = ["RECORD_COLUMNS", "read_records"]

RECORD_COLUMNS = 8
"""Words of a row: generation, space, key (2), parent (2), priority, tenant."""


@kernel("int64(int64, int64[::1], int64[::1], int64[:, ::1])")
def read_records(
    ctx: int, units: npt.NDArray[np.int64], found: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> int:
    """Read the records of these units, [n], that hold a READY block: its index in `units` goes to `found`, its row
    (`RECORD_COLUMNS` words) to `rows`, both with room for n. Returns how many."""
    records, n_units = load(ctx + X_RECORDS), load(ctx + X_N_UNITS)
    n = 0
    for i in range(units.size):
        unit = units[i]
        if unit < 0 or unit >= n_units:
            continue
        record = records + unit * RECORD_BYTES
        generation = load_acquire(record + R_GENERATION)
        state = load_acquire(record + R_STATE)
        if state & 0xFF != READY:
            continue
        rows[n, 0] = generation
        rows[n, 1] = (state >> 32) & LOW32
        rows[n, 2] = load(record + R_KEY)
        rows[n, 3] = load(record + R_KEY + 8)
        rows[n, 4] = load(record + R_PARENT)
        rows[n, 5] = load(record + R_PARENT + 8)
        rows[n, 6] = load(record + R_PRIORITY)
        rows[n, 7] = load(record + R_TENANT)
        fence_full()
        if load(record + R_GENERATION) == generation and load(record + R_STATE) == state:
            found[n] = i
            n += 1
    return n
