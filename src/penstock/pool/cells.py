"""Single control words for Python code: the same atomic loads and stores that the kernels use, one call each."""

from __future__ import annotations

from penstock.jit import kernel
from penstock.pool.atomics import fence_full, load_acquire, store_release


@kernel("int64(int64)")
def peek(address: int) -> int:
    """Acquire one u64 cell (as a signed number)."""
    return load_acquire(address)


@kernel("void(int64, int64)")
def poke(address: int, value: int) -> None:
    """Release one u64 cell."""
    store_release(address, value)


@kernel("void(int64, int64)")
def poke_and_fence(address: int, value: int) -> None:
    """Store one u64 cell, then fence fully."""
    store_release(address, value)
    fence_full()


@kernel("void(int64, int64)")
def clear(address: int, n_bytes: int) -> None:
    """Zero n_bytes (a multiple of 8)."""
    for offset in range(0, n_bytes, 8):
        store_release(address + offset, 0)
