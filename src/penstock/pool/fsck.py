"""Whether a segment agrees with itself: the checks behind `penstock fsck` and `assert_consistent`.

Covers the segment alone, read plainly; the caller makes sure that nobody writes meanwhile (it is the keeper, or holds
the keeper's lock). Repairs nothing: a starting keeper does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from penstock.pool import layout
from penstock.pool.layout import BUCKET_ENTRIES, Geometry, LaneState, SlotState
from penstock.pool.spaces import SpaceRow, read_spaces

__all__ = ["check_segment", "checksums"]

_WORDS = layout.RECORD_BYTES // 8
MAX_PROBLEMS = 50


def check_segment(array: npt.NDArray[np.uint8], geometry: Geometry) -> list[str]:
    """What is wrong in a segment mapped from its start, in words; at most 50 lines."""
    found: list[str] = []
    for problem in _problems(array, geometry):
        found.append(problem)
        if len(found) == MAX_PROBLEMS:
            found.append("... and more")
            break
    return found


def _problems(array: npt.NDArray[np.uint8], geometry: Geometry) -> Iterator[str]:
    records = _records(array, geometry)
    spaces = {row.id: row for row in read_spaces(array, geometry)}
    yield from _slabs(array, geometry, records, spaces)
    yield from _directory(array, geometry, records)
    yield from _blocks(records, spaces)
    yield from _lanes(array, geometry, records)


def _records(array: npt.NDArray[np.uint8], geometry: Geometry) -> npt.NDArray[np.uint64]:
    at = geometry.records_offset
    return array[at : at + geometry.n_units * layout.RECORD_BYTES].view(np.uint64).reshape(-1, _WORDS)


def _states(records: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return records[:, layout.R_STATE // 8] & np.uint64(0xFF)


def _slabs(
    array: npt.NDArray[np.uint8], geometry: Geometry, records: npt.NDArray[np.uint64], spaces: dict[int, SpaceRow]
) -> Iterator[str]:
    """Only the first units of slots may be in use, only in assigned slabs, and only with known states."""
    words = array[geometry.slabs_offset : geometry.slabs_offset + geometry.n_slabs * layout.SLAB_ROW_BYTES]
    rows = words.view(np.uint64).reshape(-1, layout.SLAB_ROW_BYTES // 8).astype(np.int64)
    allowed = np.zeros(geometry.n_units, bool)
    for slab, (slot_class, stride, table, slots) in enumerate(rows):
        if not slot_class:
            continue
        if slots * (stride + table) > geometry.slab_bytes or slots < 1 or stride < geometry.unit_bytes:
            yield f"slab {slab}: {slots} slots of {stride}+{table} bytes do not fit"
            continue
        starts = np.arange(slots) * stride // geometry.unit_bytes
        allowed[slab * geometry.units_per_slab + starts] = True
    states = _states(records)
    for unit in np.flatnonzero((states != SlotState.FREE) & ~allowed):
        yield f"unit {unit}: state {states[unit]} where no slot begins"
    for unit in np.flatnonzero(states > SlotState.LEAVING):
        yield f"unit {unit}: unknown state {states[unit]}"
    for unit in np.flatnonzero(states == SlotState.LEAVING):
        yield f"unit {unit}: still leaving"


def _directory(array: npt.NDArray[np.uint8], geometry: Geometry, records: npt.NDArray[np.uint64]) -> Iterator[str]:
    """Every entry names a READY block whose key belongs there, and every READY block has exactly one entry."""
    at = geometry.directory_offset
    entries = array[at : at + geometry.n_buckets * layout.BUCKET_BYTES].view(np.uint64).astype(np.int64)
    cells = np.flatnonzero(entries)
    units = (entries[cells] & 0xFFFFFFFF) - 1
    for cell in cells[(units < 0) | (units >= geometry.n_units)]:
        yield f"directory cell {cell}: no such unit"
    valid = (units >= 0) & (units < geometry.n_units)
    cells, units = cells[valid], units[valid]
    ready = _states(records) == SlotState.READY
    for unit in units[~ready[units]]:
        yield f"unit {unit}: listed but not ready"
    lo, hi = (records[units, layout.R_KEY // 8 + i].astype(np.int64) for i in (0, 1))
    bucket, mask = cells // BUCKET_ENTRIES, geometry.n_buckets - 1
    tag_right = (entries[cells] >> 32) & 0xFFFFFFFF == (hi >> 32) & 0xFFFFFFFF
    place_right = (bucket == lo & mask) | (bucket == hi & mask)
    for unit in units[~(tag_right & place_right)]:
        yield f"unit {unit}: listed under another key's tag or bucket"
    times = np.bincount(units, minlength=geometry.n_units)
    for unit in np.flatnonzero(ready & (times != 1)):
        yield f"unit {unit}: ready and listed {times[unit]} times"


def _blocks(records: npt.NDArray[np.uint64], spaces: dict[int, SpaceRow]) -> Iterator[str]:
    """Spaces, lengths and parents of READY blocks; no key twice."""
    units = np.flatnonzero(_states(records) == SlotState.READY)
    rows = records[units]
    keys = rows[:, layout.R_KEY // 8 : layout.R_KEY // 8 + 2]
    _, counts = np.unique(keys, axis=0, return_counts=True)
    if (counts > 1).any():
        yield f"{int((counts > 1).sum())} keys are there more than once"
    present = {key.tobytes() for key in keys}
    for unit, row in zip(units, rows):
        space = spaces.get(int(row[layout.R_STATE // 8]) >> 32)
        if space is None:
            yield f"unit {unit}: block of an unknown space"
            continue
        if int(row[layout.R_LENGTH // 8]) != space.block_bytes:
            yield f"unit {unit}: {row[layout.R_LENGTH // 8]} bytes in a space of {space.block_bytes}"
        parent = row[layout.R_PARENT // 8 : layout.R_PARENT // 8 + 2].tobytes()
        if parent != space.root and parent not in present:
            yield f"unit {unit}: its parent is not here"


def _lanes(array: npt.NDArray[np.uint8], geometry: Geometry, records: npt.NDArray[np.uint64]) -> Iterator[str]:
    """Grants belong to lanes in use under their present epoch."""
    used = {}
    for lane in range(geometry.n_lanes):
        at = geometry.lanes_offset + lane * geometry.lane_bytes
        control = array[at : at + 16].view(np.uint64)
        if control[1] == LaneState.USED:
            used[lane] = int(control[0])
    for unit in np.flatnonzero(_states(records) == SlotState.GRANTED):
        lane = int(records[unit, layout.R_STATE // 8] >> np.uint64(8)) & 0xFFFFFF
        if used.get(lane) != int(records[unit, layout.R_EPOCH // 8]):
            yield f"unit {unit}: granted to lane {lane}, which is not in use under that epoch"


def checksums(array: npt.NDArray[np.uint8], geometry: Geometry) -> tuple[int, list[str]]:
    """Verify the bytes of every READY block. Returns how many were checked, and what is wrong."""
    from penstock.pool.copies import verify

    records, base = _records(array, geometry), int(array.ctypes.data)
    spaces = {row.id: row for row in read_spaces(array, geometry)}
    slabs = array[geometry.slabs_offset : geometry.slabs_offset + geometry.n_slabs * layout.SLAB_ROW_BYTES]
    rows = slabs.view(np.uint64).reshape(-1, layout.SLAB_ROW_BYTES // 8).astype(np.int64)
    units = np.flatnonzero(_states(records) == SlotState.READY)
    ids = (records[units, layout.R_STATE // 8] >> np.uint64(32)).astype(np.int64)
    wrong: list[str] = []
    for space_id in np.unique(ids):
        space, mine = spaces[int(space_id)], units[ids == space_id]
        slab, rel = np.divmod(mine, geometry.units_per_slab)
        _, stride, table, slots = rows[slab].T
        number = -(-rel * geometry.unit_bytes // stride)
        start = base + geometry.data_offset + slab * geometry.slab_bytes
        bad = np.zeros(len(mine), np.uint8)
        verify(
            len(mine), start + number * stride, np.arange(space.n_segments), space.segment_bytes, space.n_segments,
            start + slots * stride + number * table, np.ascontiguousarray(records[mine, 2:4]),
            np.ascontiguousarray(records[mine, layout.R_ROOT // 8]), bad,
        )  # fmt: skip
        wrong += [f"unit {unit}: wrong checksum" for unit in mine[bad.astype(bool)]]
    return len(units), wrong[:MAX_PROBLEMS]
