"""What the keeper writes back to memory for hosts that map a segment without coherence, as its kernels publish.

All of it is the keeper's: the clients' hosts are its own, and a line that any of its processors has is written back by
whichever asks. Each of these does nothing where `Y_WRITES_BACK` is 0. The order is the one that
`testing/model/incoherent.py` explores.
"""

from __future__ import annotations

from penstock.jit import inline_kernel
from penstock.pool.atomics import load
from penstock.pool.coherence import fence_written, write_back_lines
from penstock.pool.keeper_context import (
    Y_DATA,
    Y_DIRECTORY,
    Y_MASK,
    Y_RECORDS,
    Y_SLAB_BYTES,
    Y_SLABS,
    Y_UNIT_BYTES,
    Y_UNITS_PER_SLAB,
    Y_WRITES_BACK,
)
from penstock.pool.layout import B_SLOTS, B_STRIDE, B_TABLE, BUCKET_BYTES, RECORD_BYTES, SLAB_ROW_BYTES
from penstock.pool.slots import slot_number

__all__ = ["write_back_block", "write_back_published", "write_back_record"]


@inline_kernel
def write_back_block(ctx: int, unit: int, length: int) -> None:
    """A slot's payload and its checksum table, before its record says READY."""
    if load(ctx + Y_WRITES_BACK) == 0:
        return
    per_slab = load(ctx + Y_UNITS_PER_SLAB)
    slab = unit // per_slab
    row = load(ctx + Y_SLABS) + slab * SLAB_ROW_BYTES
    stride, table = load(row + B_STRIDE), load(row + B_TABLE)
    number = slot_number(unit % per_slab, load(ctx + Y_UNIT_BYTES), stride)
    base = load(ctx + Y_DATA) + slab * load(ctx + Y_SLAB_BYTES)
    write_back_lines(base + number * stride, length)
    write_back_lines(base + load(row + B_SLOTS) * stride + number * table, table)
    fence_written()


@inline_kernel
def write_back_published(ctx: int, unit: int, lo: int, hi: int) -> None:
    """A record that says READY, and its key's two buckets: whoever is told of the block finds it."""
    if load(ctx + Y_WRITES_BACK) == 0:
        return
    directory, mask = load(ctx + Y_DIRECTORY), load(ctx + Y_MASK)
    write_back_lines(load(ctx + Y_RECORDS) + unit * RECORD_BYTES, RECORD_BYTES)
    write_back_lines(directory + (lo & mask) * BUCKET_BYTES, BUCKET_BYTES)
    write_back_lines(directory + (hi & mask) * BUCKET_BYTES, BUCKET_BYTES)
    fence_written()


@inline_kernel
def write_back_record(ctx: int, unit: int) -> None:
    """A record alone. One that says GRANTED before anybody may write to its slot: a reader's second look sees that it
    changed. One of a block that was to leave and stays.
    """
    if load(ctx + Y_WRITES_BACK) != 0:
        write_back_lines(load(ctx + Y_RECORDS) + unit * RECORD_BYTES, RECORD_BYTES)
        fence_written()
