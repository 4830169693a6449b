"""The one writer of a segment: every change to spaces, slabs, records, directory and lane states is made here.

Covers what a keeper may do to a segment and what it rebuilds when it starts. Does not decide (that is the brain), wait,
or talk to clients (that is `runtime/keeper.py`). Not thread-safe: one keeper, one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, KeeperError
from penstock.pool import layout
from penstock.pool.apply import apply_commits, take_hits
from penstock.pool.cells import clear, peek, poke, poke_and_fence
from penstock.pool.coherence import need_instructions, write_back
from penstock.pool.counting import keeper_counters, lane_counters
from penstock.pool.evict import evict, free_granted, grant
from penstock.pool.finding import find_units
from penstock.pool.keeper_columns import keeper_context, private_columns
from penstock.pool.keeper_context import (
    G_DEPARTED,
    G_EVICTION,
    G_RECLAIMED_LANES,
    G_RECLAIMED_SLOTS,
    Y_N_GRANTED,
    Y_N_READY,
    Y_N_SUSPECTS,
    Y_STAMP,
)
from penstock.pool.layout import N_CLASSES, LaneState, SlotShape, plan_slots
from penstock.pool.recover import list_blocks, pull_free_slab, push_free_slab, repair_directory, settle_records
from penstock.pool.segment import Segment
from penstock.pool.spaces import SpaceRow, read_spaces
from penstock.types import Eviction, event_dtype

__all__ = ["Authority", "Events", "Survivors"]

Events = npt.NDArray[np.void]

_MOST_COUNTED = 1 << 60
_LOW63 = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Survivors:
    """The blocks a starting keeper found: parallel arrays, one row a block."""

    units: npt.NDArray[np.uint32]
    parents: npt.NDArray[np.uint32]
    classes: npt.NDArray[np.uint32]
    stamps: npt.NDArray[np.int64]


class Authority:
    """Exclusive write access to a mapped segment. The caller holds the keeper's lock for as long as this exists.

    Raises ConfigError where what it publishes has to be written back and the processor cannot.
    """

    def __init__(self, segment: Segment) -> None:
        if segment.writes_back:
            need_instructions()
        self.segment = segment
        self.geometry = geometry = segment.geometry
        self.mapping = segment.map(0, geometry.total_bytes, writable=True)
        # Asked for at every turn, and each is the sum of all that lies before.
        self._lanes_at = self.mapping.address + geometry.lanes_offset
        self._lane_bytes = geometry.lane_bytes
        self._slabs_at = self.mapping.address + geometry.slabs_offset
        self._private = private_columns(geometry)
        self._cells = keeper_context(self.mapping.address, geometry, self._private, segment.writes_back)
        self.ctx = int(self._cells.ctypes.data)
        self._marks = np.zeros(geometry.n_units, np.uint8)
        self.events = np.zeros(max(geometry.ring, 4096), event_dtype)
        self._events_at = int(self.events.ctypes.data)
        self.shapes: list[SlotShape] = []
        self.spaces: dict[bytes, SpaceRow] = {}

    # ---- addresses

    def header(self, offset: int) -> int:
        return self.mapping.address + offset

    def lane(self, index: int) -> int:
        """Address of a lane's control block."""
        return self._lanes_at + index * self._lane_bytes

    def _slab_row(self, slab: int) -> int:
        return self._slabs_at + slab * layout.SLAB_ROW_BYTES

    def _written(self, address: int, n_bytes: int) -> None:
        """Hosts without coherence see what was stored there before what is stored next."""
        if self.segment.writes_back:
            write_back(address, n_bytes)

    # ---- start

    def recover(self) -> Survivors:
        """Bring a segment into order before anything is granted or evicted: records first, then what follows.

        A new segment passes through the same steps. Afterwards the rings must be drained, the dead reclaimed and
        unpublished grants freed, in that order.
        """
        poke(self.header(layout.H_KEEPER_EPOCH), peek(self.header(layout.H_KEEPER_EPOCH)) + 1)
        poke(self.header(layout.H_CLEAN), 0)
        self._read_spaces()
        self._read_shapes()
        settle_records(self.ctx)
        duplicates = np.zeros(self.geometry.n_units, np.uint32)
        n_duplicates = repair_directory(self.ctx, duplicates)
        if n_duplicates:
            self.evict(duplicates[:n_duplicates], Eviction.DUPLICATE)
        for slab in range(self.geometry.n_slabs):
            if peek(self._slab_row(slab)) != 0:
                self._rebuild_slab(slab)
        # A keeper that died may have published and not written back.
        self._written(self.mapping.address, self.geometry.removals_offset)
        return self.survivors()

    def _rebuild_slab(self, slab: int) -> None:
        # Evicted duplicates are on the free list already; start this slab's part of it afresh.
        pull_free_slab(self.ctx, slab)
        push_free_slab(self.ctx, slab)

    def survivors(self) -> Survivors:
        """Every block in the segment, as the brain wants to know of it."""
        n = int(self._cells[Y_N_READY // 8])
        units, parents, classes = (np.zeros(n, np.uint32) for _ in range(3))
        stamps = np.zeros(n, np.int64)
        list_blocks(self.ctx, units, parents, classes, stamps)
        return Survivors(units, parents, classes, stamps)

    def free_unpublished_grants(self) -> int:
        """Free slots that a dead keeper had granted in the record but not yet in the ring. Returns how many."""
        units = np.flatnonzero(self._private["holder"])
        lanes = self._private["holder"][units] - 1
        heads = np.array([peek(self.lane(k) + layout.L_GRANT_HEAD) for k in range(self.geometry.n_lanes)], np.int64)
        records = self.mapping.address + self.geometry.records_offset
        stamps = np.array([peek(records + int(u) * layout.RECORD_BYTES + layout.R_STAMP) for u in units], np.int64)
        lost = units[stamps >= heads[lanes]] if len(units) else units
        free_granted(self.ctx, np.ascontiguousarray(lost))
        return len(lost)

    # ---- intake

    def apply(self, lane: int) -> Events:
        """Apply one batch of a lane's commits; the events (a view that the next call overwrites)."""
        packed = apply_commits(self.ctx, lane, self._events_at, len(self.events))
        return self.events[: packed & 0xFFFFFFFF]

    def touched(self, lane: int) -> Events:
        """One batch of a lane's hit reports as events (a view that the next call overwrites)."""
        packed = take_hits(self.ctx, lane, self._events_at, len(self.events))
        return self.events[: packed & 0xFFFFFFFF]

    def take_suspects(self) -> npt.NDArray[np.int64]:
        """Units that readers reported as damaged since the last call."""
        n = int(self._cells[Y_N_SUSPECTS // 8])
        self._cells[Y_N_SUSPECTS // 8] = 0
        return np.unique(self._private["suspects"][:n])

    def pending(self, lane: int) -> int:
        """Commit entries that wait in a lane's ring."""
        at = self.lane(lane)
        return int(peek(at + layout.L_COMMIT_HEAD) - peek(at + layout.L_COMMIT_TAIL))

    # ---- room

    def grant(self, lane: int, slot_class: int, n: int) -> int:
        return int(grant(self.ctx, lane, slot_class, n))

    def evict(self, victims: npt.NDArray[np.uint32], why: Eviction, newest: int = 1 << 62) -> Events:
        """Evict those victims (children before parents) that nobody leases and whose last use was at most the use count
        `newest`. Events EVICTED or KEPT, in order."""
        if len(victims) > len(self.events):
            raise ValueError(f"{len(victims)} victims at once; at most {len(self.events)}")
        evict(self.ctx, victims, len(victims), self._marks, self._events_at, int(why), newest)
        return self.events[: len(victims)]

    def n_free(self, slot_class: int) -> int:
        return int(self._private["n_free"][slot_class])

    def outstanding(self) -> npt.NDArray[np.int64]:
        """Grants not used up yet, (n_lanes, N_CLASSES)."""
        return self._private["outstanding"].reshape(self.geometry.n_lanes, N_CLASSES)

    @property
    def n_ready(self) -> int:
        return int(self._cells[Y_N_READY // 8])

    @property
    def n_granted(self) -> int:
        return int(self._cells[Y_N_GRANTED // 8])

    @property
    def stamp(self) -> int:
        """The use count: commits and touches so far."""
        return int(self._cells[Y_STAMP // 8])

    def save_stamp(self) -> None:
        poke(self.header(layout.H_STAMP), self.stamp)

    def tell_removals(self) -> None:
        """Say that recovery is over: what a keeper that died had removed without telling is gone by now.

        Whoever follows the removals takes it as a gap.
        """
        poke(self.header(layout.H_REMOVALS_SINCE), peek(self.header(layout.H_KEEPER_EPOCH)))

    # ---- slabs

    def slab_classes(self) -> npt.NDArray[np.int64]:
        """Class of each slab, -1 for none."""
        return np.array([peek(self._slab_row(slab)) - 1 for slab in range(self.geometry.n_slabs)], np.int64)

    def slab_used(self) -> npt.NDArray[np.int64]:
        """Slots of each slab that are not free."""
        return self._private["slab_used"]

    def touched_slabs(self) -> int:
        """Slabs, from the first, whose memory is allocated and touched: only those are given to a class."""
        return self.touched_bytes // self.geometry.slab_bytes

    @property
    def touched_bytes(self) -> int:
        """Bytes of the data, from the first, that are allocated and touched."""
        return int(peek(self.header(layout.H_TOUCHED)))

    def set_touched(self, n_bytes: int) -> None:
        poke(self.header(layout.H_TOUCHED), n_bytes)

    def sign(self, pid: int) -> None:
        """Say in the header which process serves."""
        poke(self.header(layout.H_KEEPER_PID), pid)

    def assign_slab(self, slab: int, slot_class: int) -> None:
        """Give an unassigned slab to a class and put its slots on the free list."""
        row, shape = self._slab_row(slab), self.shapes[slot_class]
        poke(row + layout.B_STRIDE, shape.stride)
        poke(row + layout.B_TABLE, shape.table_bytes)
        poke(row + layout.B_SLOTS, shape.slots_per_slab)
        poke(row + layout.B_CLASS, slot_class + 1)
        self._written(row, layout.SLAB_ROW_BYTES)
        push_free_slab(self.ctx, slab)

    def unassign_slab(self, slab: int) -> None:
        """Take an empty slab (no block, no grant) from its class."""
        if self._private["slab_used"][slab]:
            raise ValueError(f"slab {slab} is in use")
        pull_free_slab(self.ctx, slab)
        # Before its slots lie elsewhere, nothing in it is a block to anybody.
        units, row = self.geometry.units_per_slab, self._slab_row(slab)
        records = self.mapping.address + self.geometry.records_offset
        self._written(records + slab * units * layout.RECORD_BYTES, units * layout.RECORD_BYTES)
        poke(row + layout.B_CLASS, 0)
        self._written(row, layout.SLAB_ROW_BYTES)

    def slab_blocks(self, slab: int) -> npt.NDArray[np.uint32]:
        """Units of the READY blocks in a slab."""
        units, records = self.geometry.units_per_slab, self.records()
        part = records[slab * units : (slab + 1) * units]
        ready = np.flatnonzero((part[:, layout.R_STATE // 8] & 0xFF) == layout.SlotState.READY)
        return (ready + slab * units).astype(np.uint32)

    def units_of(self, space: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
        """Units of the READY blocks of a space that have one of these keys, (n, 2) words; each once."""
        units = np.empty(len(keys), np.int64)
        find_units(self.ctx, keys, space, units)
        return np.unique(units[units >= 0]).astype(np.uint32)

    def stamps(self, units: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
        """When blocks were last used, on the keeper's own counter."""
        stamps: npt.NDArray[np.uint64] = self.records()[units, layout.R_STAMP // 8]
        return stamps

    def has_grants(self, slab: int) -> bool:
        units = self.geometry.units_per_slab
        return bool(self._private["holder"][slab * units : (slab + 1) * units].any())

    def is_damaged(self, unit: int) -> bool:
        """Whether a READY block's bytes do not give the checksum that its record has."""
        from penstock.pool.copies import verify

        if not 0 <= unit < self.geometry.n_units:
            return False
        record = self.records()[unit]
        word = int(record[layout.R_STATE // 8])
        row = next((row for row in self.spaces.values() if row.id == word >> 32), None)
        if word & 0xFF != layout.SlotState.READY or row is None:
            return False
        payload, table = self.slot_addresses(unit)
        bad = np.zeros(1, np.uint8)
        verify(
            1, np.array([payload]), np.arange(row.n_segments), row.segment_bytes, row.n_segments, np.array([table]),
            np.ascontiguousarray(record[None, 2:4]), record[layout.R_ROOT // 8 : layout.R_ROOT // 8 + 1].copy(), bad,
        )  # fmt: skip
        return bool(bad[0])

    def slot_addresses(self, unit: int) -> tuple[int, int]:
        """Addresses of a slot's payload and of its checksum table."""
        geometry = self.geometry
        slab, rel = divmod(unit, geometry.units_per_slab)
        row = self._slab_row(slab)
        stride, table, slots = (int(peek(row + at)) for at in (layout.B_STRIDE, layout.B_TABLE, layout.B_SLOTS))
        number = -(-rel * geometry.unit_bytes // stride)
        base = self.mapping.address + geometry.data_offset + slab * geometry.slab_bytes
        return base + number * stride, base + slots * stride + number * table

    def parents(self) -> npt.NDArray[np.int64]:
        """Parent unit of each unit's block, -1 for none."""
        return self._private["parent"]

    def records(self) -> npt.NDArray[np.uint64]:
        """All slot records as words, (n_units, 16). Only the keeper writes them, so it may read them plainly."""
        start = self.geometry.records_offset
        raw = self.mapping.array[start : start + self.geometry.n_units * layout.RECORD_BYTES]
        return raw.view(np.uint64).reshape(-1, layout.RECORD_BYTES // 8)

    # ---- spaces

    def space(self, digest: bytes, root: bytes, sizes: tuple[int, int, int, int], label: str) -> SpaceRow:
        """The row of a space, made if need be. `sizes`: block_bytes, block_tokens, n_segments, segment_bytes.

        Raises ConfigError for sizes that cannot be stored and KeeperError when the tables are full.
        """
        if digest in self.spaces:
            row = self.spaces[digest]
            if (row.block_bytes, row.block_tokens, row.n_segments, row.segment_bytes) != sizes or row.root != root:
                raise ConfigError("a space of this digest is registered with other sizes")
            return row
        block_bytes, _, n_segments, segment_bytes = sizes
        if min(sizes) < 1 or n_segments * segment_bytes != block_bytes or len(digest) != 32 or len(root) != 16:
            raise ConfigError(f"{n_segments} segments of {segment_bytes} bytes are not a block of {block_bytes}")
        if segment_bytes % 64 or segment_bytes < 256:
            raise ConfigError(f"segments of {segment_bytes} bytes: use a multiple of 64 of at least 256")
        slot_class = self._class_for(plan_slots(self.geometry, block_bytes, n_segments))
        free = self._free_space_row()
        row = SpaceRow(free, digest, root, *sizes, slot_class, label[:60])
        self._write_space(row)
        self.spaces[digest] = row
        return row

    def _free_space_row(self) -> int:
        """A row without a space; if there is none, that of a space without blocks.

        A client that still has the old space open cannot do harm with its number: its chains grow from another root, so
        whatever it commits is refused as an orphan.
        """
        for index in range(self.geometry.max_spaces):
            if peek(self._space_at(index)) == 0:
                return index
        words = self.records()[:, layout.R_STATE // 8]
        ready = words[(words & np.uint64(0xFF)) == layout.SlotState.READY]
        in_use = {int(number) for number in np.unique(ready >> np.uint64(32))}
        for row in self.spaces.values():  # in the order they were registered
            if row.id not in in_use:
                poke(self._space_at(row.id), 0)
                self._written(self._space_at(row.id), layout.SPACE_BYTES)
                del self.spaces[row.digest]
                return row.id
        raise KeeperError(f"all {self.geometry.max_spaces} spaces of this pool hold blocks; recreate it")

    def _class_for(self, shape: SlotShape) -> int:
        if shape in self.shapes:
            return self.shapes.index(shape)
        if len(self.shapes) == N_CLASSES:
            raise KeeperError(f"this pool has {N_CLASSES} different slot sizes already; recreate it")
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _space_at(self, index: int) -> int:
        return self.mapping.address + self.geometry.spaces_offset + index * layout.SPACE_BYTES

    def _write_space(self, row: SpaceRow) -> None:
        at = self.geometry.spaces_offset + row.id * layout.SPACE_BYTES
        array = self.mapping.array
        array[at + layout.S_DIGEST : at + layout.S_DIGEST + 32] = np.frombuffer(row.digest, np.uint8)
        array[at + layout.S_ROOT : at + layout.S_ROOT + 16] = np.frombuffer(row.root, np.uint8)
        label = row.label.encode()[:63].ljust(64, b"\0")
        array[at + layout.S_LABEL : at + layout.S_LABEL + 64] = np.frombuffer(label, np.uint8)
        address = self._space_at(row.id)
        for offset, value in (
            (layout.S_BLOCK_BYTES, row.block_bytes),
            (layout.S_BLOCK_TOKENS, row.block_tokens),
            (layout.S_SEGMENTS, row.n_segments),
            (layout.S_SEGMENT_BYTES, row.segment_bytes),
            (layout.S_CLASS, row.slot_class),
        ):
            poke(address + offset, value)
        self._written(address, layout.SPACE_BYTES)  # all of it, before any of it counts
        poke(address + layout.S_STATE, 1)
        self._written(address, layout.LINE)

    def _read_spaces(self) -> None:
        self.spaces = {row.digest: row for row in read_spaces(self.mapping.array, self.geometry)}

    def _read_shapes(self) -> None:
        """Classes are numbered as they were first needed; spaces and slabs say which sizes they have."""
        found = {
            row.slot_class: plan_slots(self.geometry, row.block_bytes, row.n_segments) for row in self.spaces.values()
        }
        for slab in range(self.geometry.n_slabs):
            row = self._slab_row(slab)
            number = peek(row + layout.B_CLASS) - 1
            if number >= 0:
                stride, table, slots = (peek(row + at) for at in (layout.B_STRIDE, layout.B_TABLE, layout.B_SLOTS))
                found[number] = SlotShape(stride, table, slots)
        # A number that neither uses any more is free for any size; the smallest will do.
        unused = plan_slots(self.geometry, self.geometry.unit_bytes, 1)
        self.shapes = [found.get(number, unused) for number in range(max(found, default=-1) + 1)]

    # ---- lanes

    def lane_state(self, index: int) -> LaneState:
        # A client maps its whole lane: whatever it may have scribbled there, the lane is in use until it is closed.
        return LaneState.FREE if peek(self.lane(index) + layout.L_STATE) == LaneState.FREE else LaneState.USED

    def open_lane(self, locked: Callable[[int], bool] = lambda _: False) -> tuple[int, int] | None:
        """A free lane that is not `locked`, now in use, and its epoch; None if all are taken.

        A client that still reads a segment which this one replaced holds a lane's lock, and no lane here.
        """
        for index in range(self.geometry.n_lanes):
            at = self.lane(index)
            if peek(at + layout.L_STATE) == LaneState.FREE and not locked(index):
                epoch = (peek(at + layout.L_EPOCH) + 1) & _LOW63
                poke(at + layout.L_EPOCH, epoch)
                poke_and_fence(at + layout.L_STATE, int(LaneState.USED))
                return index, epoch
        return None

    def close_lane(self, index: int) -> int:
        """Take everything back from a lane whose client is proven dead. Its ring must have been drained.

        Returns the number of slots that were granted to it.
        """
        units = np.flatnonzero(self._private["holder"] == index + 1)
        free_granted(self.ctx, units)
        self._keep_counters(index)
        at = self.lane(index)
        # The epoch first: whatever is read of the old owner's ring from here on, even after a crash, is refused by it.
        poke(at + layout.L_EPOCH, (peek(at + layout.L_EPOCH) + 1) & _LOW63)
        clear(at + self.geometry.lease_table_offset, self.geometry.leases * 8)
        clear(at + layout.L_COMMIT_TAIL, layout.LANE_CONTROL_BYTES - layout.L_COMMIT_TAIL)
        poke(at + layout.L_STATE, int(LaneState.FREE))
        self.count(G_RECLAIMED_LANES, 1)
        self.count(G_RECLAIMED_SLOTS, len(units))
        return len(units)

    def _keep_counters(self, index: int) -> None:
        counters = lane_counters(self.mapping.array, self.geometry, index)
        # The client wrote them; what nobody can have counted up to is garbage.
        for number in np.flatnonzero((counters > 0) & (counters < _MOST_COUNTED)):
            self.count(G_DEPARTED + int(number), int(counters[number]))

    def count(self, counter: int, by: int) -> None:
        cell = self.header(layout.COUNTERS_OFFSET) + 8 * counter
        poke(cell, (peek(cell) + by) & _LOW63)

    def counters(self) -> npt.NDArray[np.uint64]:
        return keeper_counters(self.mapping.array)

    def evictions(self) -> dict[str, int]:
        counters = self.counters()
        return {why.name.lower(): int(counters[G_EVICTION + why]) for why in Eviction}
