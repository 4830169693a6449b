"""Slots on one side, paged tensors on the other, and where every byte has to be after a move: the NumPy oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from penstock import TensorMap
from penstock.connectors.cuda.pieces import Pieces

Bytes = npt.NDArray[np.uint8]


@dataclass
class Paged:
    """Random contents; slots and pages in random order, with bytes between and around them that nothing may touch."""

    n_blocks: int
    n_segments: int
    segment_bytes: int
    gap: int = 0
    """Bytes between pages."""
    offset: int = 0
    """The pages' distance from an aligned address."""
    device: str = "cpu"
    seed: int = 0
    pinned: bool = False
    host: torch.Tensor = field(init=False)
    pages: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        spare = 2
        self.slot_bytes = self.n_segments * self.segment_bytes + 64
        self.stride = self.segment_bytes + self.gap
        self.n_pages = self.n_blocks + spare
        self.layer_bytes = self.n_pages * self.stride
        host = rng.integers(0, 256, (self.n_blocks + spare) * self.slot_bytes, np.uint8)
        pages = rng.integers(0, 256, self.offset + self.n_segments * self.layer_bytes + 64, np.uint8)
        self.host = torch.from_numpy(host)
        if self.pinned:
            self.host = self.host.pin_memory()
        self.pages = torch.from_numpy(pages).to(self.device)
        self.slot_index = rng.permutation(self.n_blocks + spare)[: self.n_blocks]
        self.page_index = rng.permutation(self.n_pages)[: self.n_blocks].astype(np.int64)
        self.segs = rng.permutation(self.n_segments)[: max(1, self.n_segments - seed_bit(self.seed))].astype(np.int64)

    def pieces(self) -> Pieces:
        slots = (self.host.data_ptr() + self.slot_index * self.slot_bytes).astype(np.int64)
        bases = (self.pages.data_ptr() + self.offset + self.segs * self.layer_bytes).astype(np.int64)
        return Pieces(slots, self.segs, TensorMap(bases, self.page_index, self.stride), self.segment_bytes)

    def now(self) -> tuple[Bytes, Bytes]:
        """Both sides as they are."""
        return self.host.numpy().copy(), self.pages.cpu().numpy().copy()

    def after(self, *, to_pages: bool) -> tuple[Bytes, Bytes]:
        """Both sides as a move from now on has to leave them."""
        host, pages = self.now()
        for slot, page in zip(self.slot_index.tolist(), self.page_index.tolist()):
            for segment in self.segs.tolist():
                near = slot * self.slot_bytes + segment * self.segment_bytes
                far = self.offset + segment * self.layer_bytes + page * self.stride
                here, there = host[near : near + self.segment_bytes], pages[far : far + self.segment_bytes]
                if to_pages:
                    there[:] = here
                else:
                    here[:] = there
        return host, pages

    def assert_is(self, expected: tuple[Bytes, Bytes]) -> None:
        for name, found, wanted in zip(("slots", "pages"), self.now(), expected):
            wrong = np.flatnonzero(found != wanted)
            assert not len(wrong), f"{self}: {len(wrong)} bytes of the {name} are wrong, the first at {wrong[0]}"


def seed_bit(seed: int) -> int:
    """Every other seed leaves a segment out."""
    return seed % 2
