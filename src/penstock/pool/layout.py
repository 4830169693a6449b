"""Where everything lies in a segment: the numbers that `docs/formats.md` freezes, and the geometry made from them.

Covers offsets, states and sizes. Does not touch memory; `segment.py` maps it, the kernels read and write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from penstock.errors import ConfigError

MAGIC = 0x4B434F54534E4550  # "PENSTOCK", little-endian
FORMAT_VERSION = 2

PAGE = 4096
LINE = 64
HUGE_PAGE = 2 << 20
MIB = 1 << 20

# ---- header page: u64 cells at these byte offsets. One writer each: the creator, the keeper, or the pre-toucher.
H_MAGIC = 0
H_VERSION = 8
H_UUID = 16  # 16 bytes
H_TOTAL_BYTES = 32
H_UNIT_BYTES = 40
H_SLAB_BYTES = 48
H_N_SLABS = 56
H_N_BUCKETS = 64
H_N_LANES = 72
H_LEASES = 80
H_RING = 88
H_MAX_SPACES = 96
H_CREATED_MS = 104
H_WRITES_BACK = 112  # 1: hosts map this without coherence, and the keeper writes back what it publishes
H_KEEPER_EPOCH = 512  # keeper
H_KEEPER_PID = 520
H_CLEAN = 528  # 1 after an orderly stop
H_STAMP = 536  # keeper's use counter, saved with every batch
H_SLEEPING = 1024  # keeper: number of the sleep it is in, 0 awake; a line of its own
H_REMOVED = 1536  # keeper: removals published; a line of its own, for readers look at it often
H_REMOVING = 1544  # keeper: removals whose entries it may be writing
H_REMOVALS_SINCE = 1552  # keeper: epoch of the keeper that publishes removals, from the end of its recovery on
H_TOUCHED = 2048  # bytes of data that are allocated and touched; written by the pre-toucher only

# ---- counters page: u64 cells, written by the keeper.
COUNTERS_OFFSET = PAGE
N_COUNTERS = 256

# ---- space row
SPACE_BYTES = 256
S_STATE = 0  # u64: 0 free, 1 used
S_DIGEST = 8  # 32 bytes
S_ROOT = 40  # 16 bytes: the key before the first block of any chain
S_BLOCK_BYTES = 56
S_BLOCK_TOKENS = 64
S_SEGMENTS = 72
S_SEGMENT_BYTES = 80
S_CLASS = 88
S_LABEL = 96  # 64 bytes, UTF-8, zero padded

# ---- slab row
SLAB_ROW_BYTES = 32
B_CLASS = 0  # u64: 0 unassigned, else class number + 1
B_STRIDE = 8
B_TABLE = 16
B_SLOTS = 24

# ---- slot record: two cache lines, written by the keeper only.
RECORD_BYTES = 128
R_GENERATION = 0
R_STATE = 8  # u64: state | lane << 8 | space << 32
R_KEY = 16  # 2 x u64
R_LENGTH = 32
R_ROOT = 40  # checksum over the slot's checksum table
R_TIERS = 48
R_EPOCH = 56  # lane epoch of the owner while granted
R_PARENT = 64  # 2 x u64
R_SESSION = 80
R_TENANT = 88
R_PRIORITY = 96  # i64
R_TTL_MS = 104
R_DEADLINE_MS = 112
R_STAMP = 120  # granted: sequence in the grant ring; ready: the keeper's use counter, for order after a restart

# ---- directory
BUCKET_BYTES = 64
BUCKET_ENTRIES = 8

# ---- removals: one ring, written by the keeper, read by whoever wants to know
REMOVAL_BYTES = 24  # 2 x u64 key, u64 space | eviction << 32
_MAX_REMOVALS = 1 << 16

# ---- lane: control lines, then tables
LANE_CONTROL_BYTES = PAGE
L_EPOCH = 0  # keeper
L_STATE = 8
L_COMMIT_TAIL = 64  # keeper
L_GRANT_HEAD = 128  # keeper
L_HIT_TAIL = 192  # keeper
L_COMMIT_HEAD = 256  # client
L_GRANT_TAIL = 320  # client
L_HIT_HEAD = 384  # client
L_LEASE_HWM = 448  # client
L_WAITING = 512  # client
L_WANT = 576  # client: u64 for each of N_CLASSES classes
L_COUNTERS = 1024  # client: u64 cells
LANE_COUNTERS = 128
N_CLASSES = 32

COMMIT_BYTES = 128
C_KIND = 0
C_UNIT = 8
C_GENERATION = 16
C_EPOCH = 24
C_KEY = 32
C_PARENT = 48
C_LENGTH = 64
C_SPACE = 72
C_ROOT = 80
C_SESSION = 88
C_TENANT = 96
C_PRIORITY = 104
C_TTL_MS = 112
C_DEADLINE_MS = 120
KIND_COMMIT = 1
KIND_ABORT = 2
KIND_SUSPECT = 3  # a reader found a wrong checksum in this slot

GRANT_BYTES = 16  # u64 unit | class << 32, u64 generation
HIT_BYTES = 8  # u32 unit, u32 low half of the generation


class SlotState(IntEnum):
    """The state byte of a slot record."""

    FREE = 0
    GRANTED = 1
    READY = 2
    LEAVING = 3


class LaneState(IntEnum):
    FREE = 0
    USED = 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and offsets of one segment, all in bytes unless named otherwise. Derived from six numbers in the header."""

    unit_bytes: int
    slab_bytes: int
    n_slabs: int
    n_lanes: int
    leases: int
    """Lease cells in a lane: what one client may hold at once."""
    ring: int
    """Entries in each of a lane's rings; a power of two."""
    max_spaces: int

    @property
    def units_per_slab(self) -> int:
        return self.slab_bytes // self.unit_bytes

    @property
    def n_units(self) -> int:
        return self.n_slabs * self.units_per_slab

    @property
    def n_buckets(self) -> int:
        return _power_of_two_at_least(max(8, self.n_units * 2 // BUCKET_ENTRIES))

    @property
    def spaces_offset(self) -> int:
        return 2 * PAGE

    @property
    def slabs_offset(self) -> int:
        return _round_up(self.spaces_offset + self.max_spaces * SPACE_BYTES, PAGE)

    @property
    def records_offset(self) -> int:
        return _round_up(self.slabs_offset + self.n_slabs * SLAB_ROW_BYTES, PAGE)

    @property
    def directory_offset(self) -> int:
        return _round_up(self.records_offset + self.n_units * RECORD_BYTES, PAGE)

    @property
    def n_removals(self) -> int:
        """Entries in the ring of removals. Twice what one batch of evictions can take, so that a reader may lag."""
        return min(_power_of_two_at_least(2 * self.n_units), _MAX_REMOVALS)

    @property
    def removals_offset(self) -> int:
        return _round_up(self.directory_offset + self.n_buckets * BUCKET_BYTES, PAGE)

    @property
    def lanes_offset(self) -> int:
        return _round_up(self.removals_offset + self.n_removals * REMOVAL_BYTES, PAGE)

    @property
    def lease_table_offset(self) -> int:
        return LANE_CONTROL_BYTES

    @property
    def commit_ring_offset(self) -> int:
        return _round_up(self.lease_table_offset + self.leases * 8, PAGE)

    @property
    def grant_ring_offset(self) -> int:
        return _round_up(self.commit_ring_offset + self.ring * COMMIT_BYTES, PAGE)

    @property
    def hit_ring_offset(self) -> int:
        return _round_up(self.grant_ring_offset + self.ring * GRANT_BYTES, PAGE)

    @property
    def lane_bytes(self) -> int:
        return _round_up(self.hit_ring_offset + self.ring * HIT_BYTES, PAGE)

    @property
    def data_offset(self) -> int:
        return _round_up(self.lanes_offset + self.n_lanes * self.lane_bytes, HUGE_PAGE)

    @property
    def total_bytes(self) -> int:
        return self.data_offset + self.n_slabs * self.slab_bytes


def plan_geometry(
    size_bytes: int, *, unit_bytes: int = 16 << 10, slab_bytes: int | None = None, n_lanes: int | None = None
) -> Geometry:
    """The geometry of a pool whose file takes at most `size_bytes`.

    Raises ConfigError where not even two slabs fit.
    """
    if unit_bytes < PAGE or unit_bytes & (unit_bytes - 1):
        raise ConfigError(f"unit size {unit_bytes} is not a power of two of at least {PAGE}; use 16384")
    if slab_bytes is None:
        slab_bytes = min(max(_power_of_two_at_least(size_bytes // 128 + 1), 1 * MIB), 64 * MIB)
    if slab_bytes < unit_bytes or slab_bytes % unit_bytes or slab_bytes % PAGE:
        raise ConfigError(f"slab size {slab_bytes} is not a multiple of the unit size {unit_bytes}")
    small = size_bytes < 512 * MIB
    shape = {
        "unit_bytes": unit_bytes,
        "slab_bytes": slab_bytes,
        "n_lanes": n_lanes or (16 if small else 64),
        "leases": 4096 if small else 16384,
        "ring": 1024 if small else 4096,
        "max_spaces": 256,
    }
    n_slabs = size_bytes // slab_bytes
    while n_slabs >= 2:
        geometry = Geometry(n_slabs=n_slabs, **shape)
        if geometry.total_bytes <= size_bytes:
            return geometry
        n_slabs -= max(1, (geometry.total_bytes - size_bytes) // slab_bytes)
    raise ConfigError(
        f"a pool of {size_bytes / MIB:.0f} MiB does not hold two slabs of {slab_bytes / MIB:.0f} MiB and its tables; "
        "ask for at least 32 MiB, or for a smaller slab"
    )


@dataclass(frozen=True, slots=True)
class SlotShape:
    """How slots of one class lie in a slab: payloads of `stride` bytes from its start, checksum tables behind them."""

    stride: int
    table_bytes: int
    slots_per_slab: int


def slot_share(geometry: Geometry, block_bytes: int, n_segments: int) -> int:
    """What a block takes of the pool, with its share of what is left over in a slab, in bytes."""
    return geometry.slab_bytes // plan_slots(geometry, block_bytes, n_segments).slots_per_slab


def bytes_ahead(geometry: Geometry) -> int:
    """How much of the pool may hold what was read before the blocks that it follows were there.

    Whoever stores those needs room, too, and of a class of slots only a thirty-second is granted at a time, twice what
    a client uses of that at once.
    """
    return geometry.n_slabs * geometry.slab_bytes // 128


def plan_slots(geometry: Geometry, block_bytes: int, n_segments: int) -> SlotShape:
    """The slot shape for blocks of `block_bytes` in `n_segments` layer segments.

    Raises ConfigError where no slot fits into a slab.
    """
    stride = max(_round_up(block_bytes, PAGE), geometry.unit_bytes)
    table_bytes = _round_up(n_segments * 8, LINE)
    slots = geometry.slab_bytes // (stride + table_bytes)
    if slots < 1:
        raise ConfigError(
            f"a block of {block_bytes} bytes does not fit into a slab of {geometry.slab_bytes} bytes; "
            "create the pool with a larger --slab"
        )
    return SlotShape(stride, table_bytes, slots)


def _round_up(value: int, to: int) -> int:
    return (value + to - 1) // to * to


def _power_of_two_at_least(value: int) -> int:
    return 1 << max(0, (value - 1).bit_length())
