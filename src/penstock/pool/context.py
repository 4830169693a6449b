"""What a client's kernels know: one private int64 array of addresses and counters, passed by its address.

One integer argument costs 20 ns to pass, an array 100; a match has 4 us. Nothing in here is shared between processes.
The lease list: each lease cell in the lane has a private twin (next, unit, generation). Free cells form a list through
`next`, so a lease is a run of that list: a head cell and a count.
"""

from __future__ import annotations

X_HEADER = 0
X_RECORDS = 8
X_DIRECTORY = 16
X_MASK = 24
X_N_UNITS = 32
X_LANE = 40
X_LEASES = 48
X_COMMITS = 56
X_GRANTS = 64
X_HITS = 72
X_RING_MASK = 80
X_EPOCH = 88
X_DATA = 96
X_SLABS = 104
X_UNITS_PER_SLAB = 112
X_SLAB_BYTES = 120
X_UNIT_BYTES = 128
X_NEXT = 136  # int64 per lease cell
X_UNITS = 144
X_GENERATIONS = 152
X_FREE = 160  # first free lease cell
X_N_FREE = 168
X_HWM = 176
X_N_LEASES = 184
X_HIT_HEAD = 192
X_COMMIT_HEAD = 200
X_GRANT_TAIL = 208
X_LAST_RUNG = 216
CONTEXT_CELLS = 32

# Lane counters (index of u64 cells at L_COUNTERS); misses by reason follow, then drops by reason.
K_LOOKUPS = 0
K_KEYS = 1
K_HITS = 2
K_HITS_UNREPORTED = 3
K_RETRIES = 4
K_COMMITTED = 5
K_RUNG = 6
K_READ_BLOCKS = 7
K_READ_BYTES = 8
K_WRITTEN_BYTES = 9
K_MISS = 32
K_DROP = 64
