"""A reader on another host, of memory that is not coherent between hosts: it copies out, and holds nothing.

Covers looking keys up and copying their blocks out of a segment that is mapped read-only. There is no lane and no
lease, so nothing is pinned: a block that leaves while it is copied is a miss, never wrong bytes. No block is handed out
in place, and nothing can be written. What the keeper's host must write back for this: `testing/model/incoherent.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penstock.pool import segment as segments
from penstock.pool.coherence import invalidate, need_instructions
from penstock.pool.context import (
    CONTEXT_CELLS,
    X_DATA,
    X_DIRECTORY,
    X_MASK,
    X_N_UNITS,
    X_RECORDS,
    X_SLAB_BYTES,
    X_SLABS,
    X_UNIT_BYTES,
    X_UNITS_PER_SLAB,
)
from penstock.pool.copies import verify
from penstock.pool.layout import SPACE_BYTES
from penstock.pool.remote_copy import copy_out
from penstock.pool.segment import Segment
from penstock.pool.spaces import SpaceRow, read_space, read_spaces
from penstock.types import Miss

__all__ = ["Copied", "RemoteReader"]

_COUNT_MASK = (1 << 48) - 1


@dataclass(frozen=True, slots=True)
class Copied:
    """How many blocks, from the first, were copied and verified, and why there are no more."""

    n_blocks: int
    miss: Miss


class RemoteReader:
    """Copies blocks out of the segment at `path`. For one thread at a time.

    Raises NoPool, NotOurs, FormatMismatch or Damaged, and ConfigError on a processor that cannot drop cache lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        need_instructions()
        self.path = Path(path)
        segment = segments.open_existing(self.path, check_owner=False, writable=False)
        try:
            self._geometry = segment.geometry
            self._mapping = segment.map(0, segment.geometry.total_bytes, writable=False)
            self._cells = _context(self._mapping.address, segment)
        finally:
            segment.close()
        self._spaces: dict[bytes, SpaceRow] = {}

    def read(self, space: bytes, keys: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> Copied:
        """Copy the longest prefix of `keys`, (n, 2) words, of the space with this 32-byte digest into `out`.

        `out` is C-contiguous, (n, block_bytes); what lies behind the blocks that were copied is worthless. Every block
        is checked against its checksum root (CHECKSUM ends the prefix). Raises ValueError for an `out` of another form.
        """
        row = self._space(space)
        if row is None:
            return Copied(0, Miss.SPACE)
        keys = np.array(keys, np.uint64, order="C").reshape(-1, 2)
        n = len(keys)
        if out.shape != (n, row.block_bytes) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous uint8 array of shape ({n}, {row.block_bytes})")
        if not out.flags.writeable:
            raise ValueError("out must be writable")
        tables, roots = np.zeros((n, row.n_segments), np.uint64), np.zeros(n, np.uint64)
        packed = copy_out(
            int(self._cells.ctypes.data), keys, row.id | row.block_bytes << 32, 8 * row.n_segments, out.ctypes.data,
            tables.ctypes.data, roots,
        )  # fmt: skip
        count, reason = packed & _COUNT_MASK, Miss(packed >> 48)
        good = _verified(row, out[:count], tables, keys, roots)
        return Copied(good, reason if good == count else Miss.CHECKSUM)

    def _space(self, digest: bytes) -> SpaceRow | None:
        """The space's row, as memory has it now."""
        geometry, known = self._geometry, self._spaces.get(digest)
        if known is not None:
            at = geometry.spaces_offset + known.id * SPACE_BYTES
            invalidate(self._mapping.address + at, SPACE_BYTES)
            row = read_space(self._mapping.array, geometry, known.id)
            if row is not None and row.digest == digest:
                return row
        invalidate(self._mapping.address + geometry.spaces_offset, geometry.max_spaces * SPACE_BYTES)
        self._spaces = {row.digest: row for row in read_spaces(self._mapping.array, geometry)}
        return self._spaces.get(digest)


def _verified(
    row: SpaceRow,
    out: npt.NDArray[np.uint8],
    tables: npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint64],
    roots: npt.NDArray[np.uint64],
) -> int:
    """How many of the copies, from the first, are what their roots say."""
    n = len(out)
    if not n:
        return 0
    bad = np.zeros(n, np.uint8)
    steps = np.arange(n, dtype=np.int64)
    wrong = verify(
        n, out.ctypes.data + steps * row.block_bytes, np.arange(row.n_segments, dtype=np.int64), row.segment_bytes,
        row.n_segments, tables.ctypes.data + steps * 8 * row.n_segments, keys[:n], roots[:n], bad,
    )  # fmt: skip
    return int(bad.argmax()) if wrong else n


def _context(base: int, segment: Segment) -> npt.NDArray[np.int64]:
    """What a client's kernels know, as far as the segment's own parts go."""
    geometry = segment.geometry
    cells = np.zeros(CONTEXT_CELLS, np.int64)
    values = {
        X_RECORDS: base + geometry.records_offset,
        X_DIRECTORY: base + geometry.directory_offset,
        X_MASK: geometry.n_buckets - 1,
        X_N_UNITS: geometry.n_units,
        X_DATA: base + geometry.data_offset,
        X_SLABS: base + geometry.slabs_offset,
        X_UNITS_PER_SLAB: geometry.units_per_slab,
        X_SLAB_BYTES: geometry.slab_bytes,
        X_UNIT_BYTES: geometry.unit_bytes,
    }
    for offset, value in values.items():
        cells[offset // 8] = value
    return cells
