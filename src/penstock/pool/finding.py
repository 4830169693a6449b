"""Where the keeper's blocks are, by key: for whoever asks the keeper about blocks that it does not lease."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import kernel
from penstock.pool.atomics import load
from penstock.pool.keeper_context import Y_DIRECTORY, Y_MASK, Y_N_UNITS, Y_RECORDS
from penstock.pool.layout import R_STATE, RECORD_BYTES
from penstock.pool.lookup import LOW32, find


@kernel("void(int64, uint64[:, ::1], int64, int64[::1])")
def find_units(ctx: int, key_array: npt.NDArray[np.uint64], space: int, units: npt.NDArray[np.int64]) -> None:
    """The unit of each of n keys, (n, 2) words, whose block is READY in this space; -1 for none."""
    keys, directory, mask = key_array.ctypes.data, load(ctx + Y_DIRECTORY), load(ctx + Y_MASK)
    records, n_units = load(ctx + Y_RECORDS), load(ctx + Y_N_UNITS)
    for i in range(key_array.shape[0]):
        unit = find(directory, mask, records, n_units, load(keys + 16 * i), load(keys + 16 * i + 8))
        if unit >= 0 and (load(records + unit * RECORD_BYTES + R_STATE) >> 32) & LOW32 != space:
            unit = -1
        units[i] = unit
