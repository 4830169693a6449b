"""The directory: from a key to the slot record that holds it. Shared by readers and the keeper.

A bucket is one cache line of eight entries, `tag << 32 | unit + 1`, empty 0. A key may stand in two buckets, chosen by
its two halves (blake2b output is uniform, so no further mixing). Buckets never chain and leave no tombstones: at the
load the geometry allows (at most one half) two full buckets are so rare that the keeper just drops the block.
"""

from __future__ import annotations

from penstock.jit import inline_kernel
from penstock.pool.atomics import load, load_acquire
from penstock.pool.layout import BUCKET_BYTES, BUCKET_ENTRIES, R_GENERATION, R_KEY, R_STATE, RECORD_BYTES, SlotState

LOW32 = 0xFFFFFFFF
READY = int(SlotState.READY)
LEAVING = int(SlotState.LEAVING)

ABSENT = -1


@inline_kernel
def first_candidate(directory: int, mask: int, lo: int, hi: int) -> int:
    """The first unit whose directory entry carries the key's tag, or ABSENT. The record is not looked at."""
    tag = (hi >> 32) & LOW32
    bucket = lo & mask
    for _ in range(2):
        base = directory + bucket * BUCKET_BYTES
        for slot in range(BUCKET_ENTRIES):
            entry = load_acquire(base + 8 * slot)
            if (entry >> 32) & LOW32 == tag and entry & LOW32 != 0:
                return (entry & LOW32) - 1
        bucket = hi & mask
    return ABSENT


@inline_kernel
def ready_generation(record: int, lo: int, hi: int) -> int:
    """The generation under which this record holds the key, or 0.

    Generation before state before key. The model found what the other order does: the slot is reused in between, and
    the old key is read under the new generation. This way a READY that belongs to a later use comes with an earlier
    generation, which the validation after the lease refuses.
    """
    generation = load_acquire(record + R_GENERATION)
    if load_acquire(record + R_STATE) & 0xFF != READY:
        return 0
    if load(record + R_KEY) != lo or load(record + R_KEY + 8) != hi:
        return 0
    return generation


@inline_kernel
def find(directory: int, mask: int, records: int, n_units: int, lo: int, hi: int) -> int:
    """The unit whose READY record holds the key, or ABSENT; looks past equal tags of other keys."""
    tag = (hi >> 32) & LOW32
    bucket = lo & mask
    for _ in range(2):
        base = directory + bucket * BUCKET_BYTES
        for slot in range(BUCKET_ENTRIES):
            entry = load_acquire(base + 8 * slot)
            unit = (entry & LOW32) - 1
            if (entry >> 32) & LOW32 != tag or unit < 0 or unit >= n_units:
                continue
            if ready_generation(records + unit * RECORD_BYTES, lo, hi) != 0:
                return unit
        bucket = hi & mask
    return ABSENT
