"""The keeper's private columns, and the context that tells its kernels where they and the segment are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.pool import layout
from penstock.pool.keeper_context import (
    KEEPER_CELLS,
    Y_COMMITS_AT,
    Y_COUNTERS,
    Y_DATA,
    Y_DIRECTORY,
    Y_FREE_HEAD,
    Y_GRANTS_AT,
    Y_HEADER,
    Y_HITS_AT,
    Y_HOLDER,
    Y_LANE_BYTES,
    Y_LANES,
    Y_LEASES_AT,
    Y_MASK,
    Y_MAX_SPACES,
    Y_MAX_SUSPECTS,
    Y_N_FREE,
    Y_N_LANES,
    Y_N_LEASES,
    Y_N_UNITS,
    Y_NEXT_FREE,
    Y_OUTSTANDING,
    Y_PARENT,
    Y_RECORDS,
    Y_REMOVALS,
    Y_REMOVALS_MASK,
    Y_RING_MASK,
    Y_SLAB_BYTES,
    Y_SLAB_USED,
    Y_SLABS,
    Y_SPACES,
    Y_SUSPECTS,
    Y_UNIT_BYTES,
    Y_UNITS_PER_SLAB,
    Y_WRITES_BACK,
)
from penstock.pool.layout import N_CLASSES, Geometry

__all__ = ["Columns", "keeper_context", "private_columns"]

Columns = dict[str, npt.NDArray[np.int64]]

# Reports of damage kept at once; more are forgotten, and reported again by whoever reads the block next.
_MAX_SUSPECTS = 1024


def private_columns(geometry: Geometry) -> Columns:
    """Empty columns for a segment of this geometry."""
    return {
        "next_free": np.full(geometry.n_units, -1, np.int64),
        "holder": np.zeros(geometry.n_units, np.int64),
        "parent": np.full(geometry.n_units, -1, np.int64),
        "free_head": np.full(N_CLASSES, -1, np.int64),
        "n_free": np.zeros(N_CLASSES, np.int64),
        "outstanding": np.zeros(geometry.n_lanes * N_CLASSES, np.int64),
        "slab_used": np.zeros(geometry.n_slabs, np.int64),
        "suspects": np.zeros(_MAX_SUSPECTS, np.int64),
    }


def keeper_context(base: int, geometry: Geometry, private: Columns, writes_back: bool) -> npt.NDArray[np.int64]:
    """The cells that the keeper's kernels take, for a segment mapped at `base`. The columns must outlive them."""
    cells = np.zeros(KEEPER_CELLS, np.int64)
    values = {
        Y_HEADER: base,
        Y_COUNTERS: base + layout.COUNTERS_OFFSET,
        Y_SPACES: base + geometry.spaces_offset,
        Y_SLABS: base + geometry.slabs_offset,
        Y_RECORDS: base + geometry.records_offset,
        Y_DIRECTORY: base + geometry.directory_offset,
        Y_LANES: base + geometry.lanes_offset,
        Y_MASK: geometry.n_buckets - 1,
        Y_N_UNITS: geometry.n_units,
        Y_UNITS_PER_SLAB: geometry.units_per_slab,
        Y_UNIT_BYTES: geometry.unit_bytes,
        Y_LANE_BYTES: geometry.lane_bytes,
        Y_N_LANES: geometry.n_lanes,
        Y_RING_MASK: geometry.ring - 1,
        Y_LEASES_AT: geometry.lease_table_offset,
        Y_COMMITS_AT: geometry.commit_ring_offset,
        Y_GRANTS_AT: geometry.grant_ring_offset,
        Y_HITS_AT: geometry.hit_ring_offset,
        Y_N_LEASES: geometry.leases,
        Y_MAX_SPACES: geometry.max_spaces,
        Y_NEXT_FREE: private["next_free"].ctypes.data,
        Y_HOLDER: private["holder"].ctypes.data,
        Y_PARENT: private["parent"].ctypes.data,
        Y_FREE_HEAD: private["free_head"].ctypes.data,
        Y_N_FREE: private["n_free"].ctypes.data,
        Y_OUTSTANDING: private["outstanding"].ctypes.data,
        Y_SLAB_USED: private["slab_used"].ctypes.data,
        Y_SUSPECTS: private["suspects"].ctypes.data,
        Y_MAX_SUSPECTS: _MAX_SUSPECTS,
        Y_REMOVALS: base + geometry.removals_offset,
        Y_REMOVALS_MASK: geometry.n_removals - 1,
        Y_WRITES_BACK: int(writes_back),
        Y_DATA: base + geometry.data_offset,
        Y_SLAB_BYTES: geometry.slab_bytes,
    }
    for offset, value in values.items():
        cells[offset // 8] = value
    return cells
