"""The interface of a tier: a store of blocks below the pool's segment.

Covers what every tier can do and how it says what became of each block. Does not cover when blocks move (the brain,
`core/tiering.py`), who runs the calls (`runtime/mover.py`) or whether the bytes are right (`runtime/shelf.py` verifies
every block that comes back). The suite that every tier has to pass is `penstock.testing.tiers.TierSuite`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["Batch", "BlockSpace", "Found", "Placed", "Tier", "Usage"]

Keys = npt.NDArray[np.uint64]
"""(n, 2) words: bytes 0 to 7 and 8 to 15 of each key, little-endian; `tobytes()` is the keys one after the other."""


@dataclass(frozen=True, slots=True)
class BlockSpace:
    """What a tier knows of a space: enough to keep blocks of different spaces apart, and to say what they are."""

    digest: bytes
    """32 bytes: the space's identity, the same in every pool, process and host."""
    root: bytes
    """16 bytes: the parent key of every chain's first block."""
    block_bytes: int
    block_tokens: int
    n_segments: int
    segment_bytes: int
    label: str = ""


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks of one space that move together, usually a run of one chain, parents before children."""

    space: BlockSpace
    keys: Keys
    parents: Keys
    """(n, 2): each block's parent's key, or the space's root."""
    roots: npt.NDArray[np.uint64]
    """(n,): each block's checksum root. `write` stores it with the block; `read` fills it in, for who verifies."""
    payloads: list[memoryview]
    """n buffers of `space.block_bytes` bytes, each contiguous and at an address that is a multiple of 4096, followed by
    memory of the caller up to the next multiple of 4096 (so that O_DIRECT may write whole sectors). Read-only for
    `write`."""

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, first: int, stop: int) -> Batch:
        """Blocks first to stop - 1; `roots` and payloads are shared with this batch."""
        return Batch(
            self.space, self.keys[first:stop], self.parents[first:stop], self.roots[first:stop],
            self.payloads[first:stop],
        )  # fmt: skip


class Placed(IntEnum):
    """What became of a block that was written."""

    STORED = 0
    PRESENT = 1
    """It was there already."""
    NO_ROOM = 2
    """The tier is full and would not evict for it."""
    FAILED = 3
    """The write went wrong; the block is not there."""


class Found(IntEnum):
    """What became of a block that was to be read."""

    HERE = 0
    """Its payload and root are filled in, and not verified yet."""
    ABSENT = 1
    """The tier is sure that it does not have it."""
    FAILED = 2
    """It may be there, and could not be read; the buffer's content is worthless."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a tier is. None where the tier cannot know (a store that others fill, too)."""

    capacity_bytes: int | None
    used_bytes: int | None
    blocks: int | None


class Tier(ABC):
    """A store of blocks. Every method may be called by several threads at once.

    A call that cannot be answered raises a `TierError` (`TierUnavailable`: nobody is there, or it said no;
    `TierTimeout`: no answer by the deadline); it then changed nothing that would make a later read wrong. What concerns
    single blocks is told in the answer. `deadline` is a time of `time.monotonic()`: a tier behind a network answers or
    raises within 0.1 s of it; a local one may be held up by its device for longer.
    """

    kind: str
    """The scheme of its addresses."""
    local: bool
    """Whether `holds` is answered from this process's memory, without I/O."""
    shared: bool
    """Whether others, on other machines, may add and remove blocks."""
    durable: bool
    """Whether blocks outlive this machine's power (what was written last may be lost, never wrong)."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        """(n,): which of these blocks are here now. Does not count as a use."""

    @abstractmethod
    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Placed`. A block that is not STORED or PRESENT is not there; a reader never sees half of one."""

    @abstractmethod
    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Found`: fill the payloads and roots of what is here. Counts as a use."""

    @abstractmethod
    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        """Forget these blocks; those that are not here are ignored."""

    @abstractmethod
    def usage(self) -> Usage:
        """How full it is; answered from memory."""

    @abstractmethod
    def close(self) -> None:
        """Stop; what is stored stays. Idempotent. A call that runs meanwhile ends with TierUnavailable or normally."""

    def touch(self, space: BlockSpace, keys: Keys) -> None:  # noqa: B027
        """These blocks were used above: keep them longer. Does no I/O."""

    def counters(self) -> dict[str, int]:
        """What the tier itself counts (evictions, bytes written to the device, retries); names are its own."""
        return {}
