"""The compiled loop that reads memory in pieces, each found only through the one before.

A kernel in a file of its own: every edit here makes all kernels compile again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.jit import kernel
from penstock.pool.vector import load_i64

__all__ = ["read_pieces"]


@kernel("int64(int64, int64[::1], int64, int64)")
def read_pieces(base: int, offsets: NDArray[np.int64], size: int, zero: int) -> int:
    """Read `size` bytes (a multiple of 8) at each base + offsets[i], and return the sum of their words.

    The address of each piece depends on what was read of the last: `zero` is 0, which the compiler cannot know, so
    the processor cannot begin the next piece early. With 64-byte pieces this is a pointer chase; it needs no
    pointers in the memory, so it may read what it must not write to. The offsets themselves are read ahead.
    """
    total = 0
    for i in range(offsets.shape[0]):
        at = base + offsets[i] + (total & zero)
        for word in range(0, size, 8):
            total += load_i64(at + word)
    return total
