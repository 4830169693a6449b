"""Space rows: the spaces that a segment knows, as its header's table has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.pool import layout
from penstock.pool.layout import Geometry

__all__ = ["SpaceRow", "read_space", "read_spaces"]


@dataclass(frozen=True, slots=True)
class SpaceRow:
    """A space as the segment records it."""

    id: int
    digest: bytes
    root: bytes
    block_bytes: int
    block_tokens: int
    n_segments: int
    segment_bytes: int
    slot_class: int
    label: str


def read_spaces(array: npt.NDArray[np.uint8], geometry: Geometry) -> list[SpaceRow]:
    """The registered spaces of a segment mapped from its start."""
    rows = (read_space(array, geometry, index) for index in range(geometry.max_spaces))
    return [row for row in rows if row is not None]


def read_space(array: npt.NDArray[np.uint8], geometry: Geometry, index: int) -> SpaceRow | None:
    """The space that has this number; None if none has."""
    at = geometry.spaces_offset + index * layout.SPACE_BYTES
    row = array[at : at + layout.SPACE_BYTES]
    words = row.view(np.uint64)
    if words[0] != 1:
        return None
    sizes = (int(words[cell // 8]) for cell in (layout.S_BLOCK_BYTES, layout.S_BLOCK_TOKENS, layout.S_SEGMENTS))
    block_bytes, block_tokens, n_segments = sizes
    return SpaceRow(
        index,
        row[layout.S_DIGEST : layout.S_DIGEST + 32].tobytes(),
        row[layout.S_ROOT : layout.S_ROOT + 16].tobytes(),
        block_bytes,
        block_tokens,
        n_segments,
        int(words[layout.S_SEGMENT_BYTES // 8]),
        int(words[layout.S_CLASS // 8]),
        row[layout.S_LABEL : layout.S_LABEL + 64].tobytes().rstrip(b"\0").decode(errors="replace"),
    )
