"""What the keeper's kernels know: one private int64 array, like a client's context but over the whole segment.

Private columns (one int64 per unit, class, slab or lane x class) say what the segment does not: which slots are free,
who holds a grant, and each block's parent slot. All of them are rebuilt from the segment when a keeper starts.
"""

from __future__ import annotations

Y_HEADER = 0
Y_COUNTERS = 8
Y_SPACES = 16
Y_SLABS = 24
Y_RECORDS = 32
Y_DIRECTORY = 40
Y_LANES = 48
Y_MASK = 56
Y_N_UNITS = 64
Y_UNITS_PER_SLAB = 72
Y_UNIT_BYTES = 80
Y_LANE_BYTES = 88
Y_N_LANES = 96
Y_RING_MASK = 104
Y_LEASES_AT = 112  # offsets inside a lane
Y_COMMITS_AT = 120
Y_GRANTS_AT = 128
Y_HITS_AT = 136
Y_N_LEASES = 144
Y_MAX_SPACES = 152
Y_STAMP = 160
Y_NEXT_FREE = 168  # per unit
Y_HOLDER = 176  # per unit: lane + 1 while granted
Y_PARENT = 184  # per unit: parent's unit or -1
Y_FREE_HEAD = 192  # per class
Y_N_FREE = 200  # per class
Y_OUTSTANDING = 208  # per lane and class
Y_SLAB_USED = 216  # per slab: slots that are not FREE
Y_N_READY = 224
Y_N_GRANTED = 232
Y_SUSPECTS = 240  # units that readers found damaged
Y_N_SUSPECTS = 248
Y_MAX_SUSPECTS = 256
Y_REMOVALS = 264  # the ring of removals
Y_REMOVALS_MASK = 272
Y_WRITES_BACK = 280  # 1: what is published is written back to memory
Y_DATA = 288
Y_SLAB_BYTES = 296
KEEPER_CELLS = 40

# Counters page, u64 cells: the keeper's own, then what dead or departed clients had counted in their lanes.
G_APPLIED = 0
G_EVICTED = 1
G_KEPT = 2
G_GRANTED = 3
G_RECLAIMED_LANES = 4
G_RECLAIMED_SLOTS = 5
G_TOUCHES = 6
G_REPEATED = 7
"""Commits that had been applied before a crash."""
G_DAMAGED = 8
G_RELEARNED = 9
G_DROP = 32
G_EVICTION = 64
G_DEPARTED = 128
