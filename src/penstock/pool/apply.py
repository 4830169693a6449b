"""The keeper's intake: commits and hit reports out of the clients' rings, into records, directory and events.

Every entry is checked as if a stranger had written it. Applying one twice changes nothing, so a keeper that died
between applying and advancing just does it again.
"""

from __future__ import annotations

from penstock.jit import inline_kernel, kernel
from penstock.pool.atomics import fence_full, load, load_acquire, store, store32, store_release
from penstock.pool.keeper_context import (
    G_APPLIED,
    G_DROP,
    G_REPEATED,
    G_TOUCHES,
    Y_COMMITS_AT,
    Y_COUNTERS,
    Y_DIRECTORY,
    Y_FREE_HEAD,
    Y_HITS_AT,
    Y_HOLDER,
    Y_LANE_BYTES,
    Y_LANES,
    Y_MASK,
    Y_MAX_SPACES,
    Y_MAX_SUSPECTS,
    Y_N_FREE,
    Y_N_GRANTED,
    Y_N_READY,
    Y_N_SUSPECTS,
    Y_N_UNITS,
    Y_NEXT_FREE,
    Y_OUTSTANDING,
    Y_PARENT,
    Y_RECORDS,
    Y_RING_MASK,
    Y_SLAB_USED,
    Y_SLABS,
    Y_SPACES,
    Y_STAMP,
    Y_SUSPECTS,
    Y_UNITS_PER_SLAB,
)
from penstock.pool.layout import (
    B_CLASS,
    BUCKET_BYTES,
    BUCKET_ENTRIES,
    C_DEADLINE_MS,
    C_EPOCH,
    C_GENERATION,
    C_KEY,
    C_KIND,
    C_LENGTH,
    C_PARENT,
    C_PRIORITY,
    C_ROOT,
    C_SESSION,
    C_SPACE,
    C_TENANT,
    C_TTL_MS,
    C_UNIT,
    COMMIT_BYTES,
    HIT_BYTES,
    KIND_ABORT,
    KIND_COMMIT,
    KIND_SUSPECT,
    L_COMMIT_HEAD,
    L_COMMIT_TAIL,
    L_EPOCH,
    L_HIT_HEAD,
    L_HIT_TAIL,
    N_CLASSES,
    R_DEADLINE_MS,
    R_GENERATION,
    R_KEY,
    R_LENGTH,
    R_PARENT,
    R_PRIORITY,
    R_ROOT,
    R_SESSION,
    R_STAMP,
    R_STATE,
    R_TENANT,
    R_TIERS,
    R_TTL_MS,
    RECORD_BYTES,
    S_BLOCK_BYTES,
    S_CLASS,
    S_ROOT,
    S_STATE,
    SLAB_ROW_BYTES,
    SPACE_BYTES,
    SlotState,
)
from penstock.pool.lookup import LOW32, find
from penstock.pool.publishing import write_back_block, write_back_published
from penstock.types import NO_UNIT, Drop, EventKind, event_dtype

FREE, GRANTED, READY = int(SlotState.FREE), int(SlotState.GRANTED), int(SlotState.READY)

EVENT_BYTES = event_dtype.itemsize
_E_UNIT, _E_PARENT, _E_CLASS, _E_PRIORITY, _E_SPACE, _E_SESSION, _E_TENANT, _E_DEADLINE, _E_TTL = (
    int(event_dtype.fields[name][1])  # type: ignore[index]
    for name in ("unit", "parent", "slot_class", "priority", "space", "session", "tenant", "deadline_ms", "ttl_ms")
)
_COMMITTED, _TOUCHED = int(EventKind.COMMITTED), int(EventKind.TOUCHED)
_ORPHAN, _DUPLICATE, _STALE = int(Drop.ORPHAN), int(Drop.DUPLICATE), int(Drop.STALE)
_BAD_LENGTH, _BAD_SPACE, _BAD_SLOT = int(Drop.BAD_LENGTH), int(Drop.BAD_SPACE), int(Drop.BAD_SLOT)
_NOT_OWNER, _DIRECTORY_FULL = int(Drop.NOT_OWNER), int(Drop.DIRECTORY_FULL)
_BAD_ENTRY, _ABORTED = int(Drop.BAD_ENTRY), int(Drop.ABORTED)
# Not a drop: the entry had been applied before.
_REPEATED = -1
# Entries that a key's first bucket keeps free before its second one is considered.
SPARE_ENTRIES = 2


@inline_kernel
def add(cell: int, by: int) -> None:
    """Add to a cell that only the keeper writes."""
    store(cell, load(cell) + by)


@inline_kernel
def class_of_unit(ctx: int, unit: int) -> int:
    """The class number of the slab that holds this unit, -1 if none."""
    slab = unit // load(ctx + Y_UNITS_PER_SLAB)
    return load(load(ctx + Y_SLABS) + slab * SLAB_ROW_BYTES + B_CLASS) - 1


@inline_kernel
def free_slot(ctx: int, unit: int) -> None:
    """State FREE, and onto the private free list of its class. Its generation stays until it is granted again."""
    store_release(load(ctx + Y_RECORDS) + unit * RECORD_BYTES + R_STATE, FREE)
    slot_class = class_of_unit(ctx, unit)
    head = load(ctx + Y_FREE_HEAD) + 8 * slot_class
    store(load(ctx + Y_NEXT_FREE) + 8 * unit, load(head))
    store(head, unit)
    add(load(ctx + Y_N_FREE) + 8 * slot_class, 1)
    add(load(ctx + Y_SLAB_USED) + 8 * (unit // load(ctx + Y_UNITS_PER_SLAB)), -1)


@inline_kernel
def end_grant(ctx: int, unit: int) -> None:
    """The grant of this unit is used up, whatever became of it."""
    holder = load(ctx + Y_HOLDER) + 8 * unit
    lane = load(holder) - 1
    store(holder, 0)
    add(load(ctx + Y_OUTSTANDING) + 8 * (lane * N_CLASSES + class_of_unit(ctx, unit)), -1)
    add(ctx + Y_N_GRANTED, -1)


@inline_kernel
def _room(directory: int, bucket: int) -> int:
    free = 0
    for slot in range(BUCKET_ENTRIES):
        if load(directory + bucket * BUCKET_BYTES + 8 * slot) == 0:
            free += 1
    return free


@inline_kernel
def insert(directory: int, mask: int, lo: int, hi: int, unit: int) -> int:
    """Enter a key that is not there yet. 1 if done, 0 if both of its buckets are full.

    It goes into its first bucket, the one that readers fetch ahead, while that has room to spare, and then into the
    emptier of the two. At the fullest that the geometry allows, one key in twenty is in its second bucket.
    """
    bucket, other = lo & mask, hi & mask
    room = _room(directory, bucket)
    if room <= SPARE_ENTRIES and _room(directory, other) > room:
        bucket = other
    for slot in range(BUCKET_ENTRIES):
        cell = directory + bucket * BUCKET_BYTES + 8 * slot
        if load(cell) == 0:
            store_release(cell, ((hi >> 32) & LOW32) << 32 | (unit + 1))
            return 1
    return 0


@inline_kernel
def remove(directory: int, mask: int, lo: int, hi: int, unit: int) -> None:
    """Take the entry of this unit out of its key's buckets."""
    bucket = lo & mask
    for _ in range(2):
        for slot in range(BUCKET_ENTRIES):
            cell = directory + bucket * BUCKET_BYTES + 8 * slot
            if load(cell) & LOW32 == unit + 1:
                store_release(cell, 0)
        bucket = hi & mask


@inline_kernel
def _refusal(ctx: int, lane_index: int, lane: int, entry: int) -> int:
    """Why this entry's slot is not the client's to commit: a Drop, 0 for none, or _REPEATED."""
    kind, unit, generation = load(entry + C_KIND), load(entry + C_UNIT), load(entry + C_GENERATION)
    if kind != KIND_COMMIT and kind != KIND_ABORT:
        return _BAD_ENTRY
    if unit < 0 or unit >= load(ctx + Y_N_UNITS) or class_of_unit(ctx, unit) < 0:
        return _BAD_SLOT
    if load(entry + C_EPOCH) != load(lane + L_EPOCH):
        return _NOT_OWNER
    record = load(ctx + Y_RECORDS) + unit * RECORD_BYTES
    state = load(record + R_STATE)
    if load(record + R_GENERATION) != generation:
        return _STALE
    if state & 0xFF == READY:
        same = load(record + R_KEY) == load(entry + C_KEY) and load(record + R_KEY + 8) == load(entry + C_KEY + 8)
        return _REPEATED if same and kind == KIND_COMMIT else _STALE
    if state & 0xFF != GRANTED:
        return _STALE
    if (state >> 8) & 0xFFFFFF != lane_index:
        return _NOT_OWNER
    return 0


@inline_kernel
def _objection(ctx: int, entry: int, parent_unit: int) -> int:
    """Why the block itself cannot be taken: a Drop or 0. `parent_unit` is what `_parent` found."""
    space, unit = load(entry + C_SPACE), load(entry + C_UNIT)
    if space < 0 or space >= load(ctx + Y_MAX_SPACES):
        return _BAD_SPACE
    row = load(ctx + Y_SPACES) + space * SPACE_BYTES
    if load(row + S_STATE) != 1:
        return _BAD_SPACE
    if load(row + S_CLASS) != class_of_unit(ctx, unit):
        return _BAD_SLOT
    if load(entry + C_LENGTH) != load(row + S_BLOCK_BYTES):
        return _BAD_LENGTH
    if parent_unit == -2:
        return _ORPHAN
    lo, hi = load(entry + C_KEY), load(entry + C_KEY + 8)
    if find(load(ctx + Y_DIRECTORY), load(ctx + Y_MASK), load(ctx + Y_RECORDS), load(ctx + Y_N_UNITS), lo, hi) >= 0:
        return _DUPLICATE
    return 0


@inline_kernel
def _parent(ctx: int, entry: int) -> int:
    """The parent's unit; -1 for the first block of a chain, -2 if the parent is not here (or in another space)."""
    space = load(entry + C_SPACE)
    if space < 0 or space >= load(ctx + Y_MAX_SPACES):
        return -2
    lo, hi = load(entry + C_PARENT), load(entry + C_PARENT + 8)
    row = load(ctx + Y_SPACES) + space * SPACE_BYTES
    if load(row + S_ROOT) == lo and load(row + S_ROOT + 8) == hi:
        return -1
    records = load(ctx + Y_RECORDS)
    unit = find(load(ctx + Y_DIRECTORY), load(ctx + Y_MASK), records, load(ctx + Y_N_UNITS), lo, hi)
    if unit < 0 or (load(records + unit * RECORD_BYTES + R_STATE) >> 32) & LOW32 != space:
        return -2
    return unit


@inline_kernel
def _fill_record(ctx: int, entry: int, record: int) -> None:
    """Everything but the state; a reader looks at none of it before the state says READY."""
    store(record + R_KEY, load(entry + C_KEY))
    store(record + R_KEY + 8, load(entry + C_KEY + 8))
    store(record + R_LENGTH, load(entry + C_LENGTH))
    store(record + R_ROOT, load(entry + C_ROOT))
    store(record + R_TIERS, 1)
    store(record + R_PARENT, load(entry + C_PARENT))
    store(record + R_PARENT + 8, load(entry + C_PARENT + 8))
    store(record + R_SESSION, load(entry + C_SESSION))
    store(record + R_TENANT, load(entry + C_TENANT))
    store(record + R_PRIORITY, load(entry + C_PRIORITY))
    store(record + R_TTL_MS, load(entry + C_TTL_MS))
    store(record + R_DEADLINE_MS, load(entry + C_DEADLINE_MS))
    stamp = load(ctx + Y_STAMP) + 1
    store(ctx + Y_STAMP, stamp)
    store(record + R_STAMP, stamp)


@inline_kernel
def _emit(at: int, kind: int, unit: int, parent: int, slot_class: int) -> None:
    store32(at, kind)
    store32(at + _E_UNIT, unit)
    store32(at + _E_PARENT, parent)
    store32(at + _E_CLASS, slot_class)


@inline_kernel
def _apply_one(ctx: int, entry: int, at: int) -> int:
    """Make a granted slot a READY block. Returns 0 and writes an event at `at`, or returns the Drop."""
    parent = _parent(ctx, entry)
    objection = _objection(ctx, entry, parent)
    if objection != 0:
        return objection
    unit = load(entry + C_UNIT)
    record = load(ctx + Y_RECORDS) + unit * RECORD_BYTES
    lo, hi = load(entry + C_KEY), load(entry + C_KEY + 8)
    directory, mask = load(ctx + Y_DIRECTORY), load(ctx + Y_MASK)
    if _room(directory, lo & mask) + _room(directory, hi & mask) == 0:
        return _DIRECTORY_FULL
    write_back_block(ctx, unit, load(entry + C_LENGTH))
    _fill_record(ctx, entry, record)
    store_release(record + R_STATE, READY | load(entry + C_SPACE) << 32)
    insert(directory, mask, lo, hi, unit)
    write_back_published(ctx, unit, lo, hi)
    store(load(ctx + Y_PARENT) + 8 * unit, parent)
    _emit(at, _COMMITTED, unit, parent if parent >= 0 else NO_UNIT, class_of_unit(ctx, unit))
    store32(at + _E_PRIORITY, load(entry + C_PRIORITY))
    store32(at + _E_SPACE, load(entry + C_SPACE))
    store(at + _E_SESSION, load(entry + C_SESSION))
    store(at + _E_TENANT, load(entry + C_TENANT))
    store(at + _E_DEADLINE, load(entry + C_DEADLINE_MS))
    store(at + _E_TTL, load(entry + C_TTL_MS))
    return 0


@inline_kernel
def _note_suspect(ctx: int, entry: int) -> None:
    """A reader found a wrong checksum: remember the slot, for the keeper to verify. Forgotten when the list is full."""
    n, unit = load(ctx + Y_N_SUSPECTS), load(entry + C_UNIT)
    if n < load(ctx + Y_MAX_SUSPECTS) and 0 <= unit < load(ctx + Y_N_UNITS):
        store(load(ctx + Y_SUSPECTS) + 8 * n, unit)
        store(ctx + Y_N_SUSPECTS, n + 1)


@kernel("int64(int64, int64, int64, int64)")
def apply_commits(ctx: int, lane_index: int, events: int, room: int) -> int:
    """Apply at most `room` entries of one lane's commit ring. Writes COMMITTED events at address `events`.

    Returns events written | entries consumed << 32. The tail moves only after everything is applied and fenced.
    """
    lane = load(ctx + Y_LANES) + lane_index * load(ctx + Y_LANE_BYTES)
    ring, mask, counters = lane + load(ctx + Y_COMMITS_AT), load(ctx + Y_RING_MASK), load(ctx + Y_COUNTERS)
    tail = load(lane + L_COMMIT_TAIL)
    n = load_acquire(lane + L_COMMIT_HEAD) - tail
    if n < 0 or n > mask + 1:  # a client that wrote nonsense as its head gets nothing applied
        return 0
    n = min(n, room)
    written = 0
    for i in range(n):
        entry = ring + ((tail + i) & mask) * COMMIT_BYTES
        if load(entry + C_KIND) == KIND_SUSPECT:
            _note_suspect(ctx, entry)
            continue
        drop = _refusal(ctx, lane_index, lane, entry)
        if drop == 0:
            unit = load(entry + C_UNIT)
            drop = _ABORTED
            if load(entry + C_KIND) == KIND_COMMIT:
                drop = _apply_one(ctx, entry, events + written * EVENT_BYTES)
            end_grant(ctx, unit)
            if drop == 0:
                written += 1
            else:
                free_slot(ctx, unit)
        if drop == _REPEATED:
            add(counters + 8 * G_REPEATED, 1)
        elif drop != 0:
            add(counters + 8 * (G_DROP + drop), 1)
    add(counters + 8 * G_APPLIED, written)
    add(ctx + Y_N_READY, written)
    fence_full()
    store_release(lane + L_COMMIT_TAIL, tail + n)
    return written | n << 32


@kernel("int64(int64, int64, int64, int64)")
def take_hits(ctx: int, lane_index: int, events: int, room: int) -> int:
    """Turn at most `room` hit reports of one lane into TOUCHED events. Returns events written | consumed << 32."""
    lane = load(ctx + Y_LANES) + lane_index * load(ctx + Y_LANE_BYTES)
    ring, mask, records = lane + load(ctx + Y_HITS_AT), load(ctx + Y_RING_MASK), load(ctx + Y_RECORDS)
    tail = load(lane + L_HIT_TAIL)
    n = load_acquire(lane + L_HIT_HEAD) - tail
    if n < 0 or n > mask + 1:
        return 0
    n = min(n, room)
    written = 0
    stamp = load(ctx + Y_STAMP)
    for i in range(n):
        entry = load(ring + ((tail + i) & mask) * HIT_BYTES)
        unit = entry & LOW32
        if unit < load(ctx + Y_N_UNITS):
            record = records + unit * RECORD_BYTES
            same = load(record + R_GENERATION) & LOW32 == (entry >> 32) & LOW32
            if same and load(record + R_STATE) & 0xFF == READY:
                # Head to tail in the ring, and the head must come out newest.
                store(record + R_STAMP, stamp + n - i)
                at = events + written * EVENT_BYTES
                _emit(at, _TOUCHED, unit, NO_UNIT, class_of_unit(ctx, unit))
                written += 1
    store(ctx + Y_STAMP, stamp + n)
    add(load(ctx + Y_COUNTERS) + 8 * G_TOUCHES, written)
    store_release(lane + L_HIT_TAIL, tail + n)
    return written | n << 32
