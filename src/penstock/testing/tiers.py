"""The conformance suite of tiers: what must hold for whatever stores blocks, be it a disk, a memory or a server.

    class TestMine(TierSuite):
        @pytest.fixture(autouse=True)
        def _place(self, tmp_path):
            self.folder = tmp_path

        def open_tier(self):
            return MyTier(tempfile.mkdtemp(dir=self.folder))

`tier_blocks.py` has the blocks, `tier_machine.py` the random sequences of calls against a model. What only one tier
can do wrong (its files after a crash, its server stopped) is for its own tests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from penstock.errors import TierUnavailable
from penstock.testing.tier_blocks import Buffers, assert_right, block_keys, empty, filled, tier_space
from penstock.tiers.base import Batch, BlockSpace, Keys, Placed, Tier

__all__ = ["TierSuite"]

SIZES = ((4, 1024), (13, 320), (8, 8192), (1, 256))
"""(n_segments, segment_bytes): blocks of one page, of a page and 64 bytes, of 16 pages, and of less than a page."""
STORED, PRESENT = int(Placed.STORED), int(Placed.PRESENT)


class TierSuite:
    """Subclass it in a test module and give it `open_tier`. The suite needs room for 64 MiB in each tier it opens."""

    survives_reopen: ClassVar[bool] = False
    """Whether what was stored is still there after `close` and `reopen`."""
    counts_presence: ClassVar[bool] = True
    """Whether writing what is there answers PRESENT; otherwise STORED is right, too."""
    sizes: ClassVar[tuple[tuple[int, int], ...]] = SIZES
    patience_s: ClassVar[float] = 10.0
    """A guard against hangs, not a measure: a call that takes longer past its deadline hangs."""
    examples: ClassVar[int] = 15
    """How many random sequences are tried against the model."""

    def open_tier(self) -> Tier:
        """A fresh, empty tier; called several times within some tests."""
        raise NotImplementedError

    def reopen(self, tier: Tier) -> Tier:
        """Open again what `tier`, closed by now, stored in. Only for tiers whose content can survive."""
        raise NotImplementedError

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        """A fresh tier, closed at the end."""
        tier = self.open_tier()
        yield tier
        tier.close()

    # ---- calls with the checks that belong to every call

    def deadline(self) -> float:
        """Far enough for any call that does not hang."""
        return time.monotonic() + self.patience_s

    def write(self, tier: Tier, batch: Batch) -> list[int]:
        """What became of each block; also checks the answer's form."""
        placed = tier.write(batch, self.deadline())
        assert placed.dtype == np.uint8 and placed.shape == (len(batch),), (placed.dtype, placed.shape)
        assert set(placed.tolist()) <= {int(each) for each in Placed}
        return [int(each) for each in placed]

    def must_write(self, tier: Tier, space: BlockSpace, keys: Keys) -> None:
        """These blocks are stored, from memory that is used for something else afterwards."""
        buffers = Buffers(space, len(keys))
        assert self.write(tier, filled(space, keys, buffers=buffers)) == [STORED] * len(keys)
        buffers.scribble()

    def check_read(self, tier: Tier, space: BlockSpace, keys: Keys, here: npt.NDArray[np.bool_] | bool = True) -> None:
        """Exactly the blocks of `here` are there: `read` and `holds` say so, the bytes and roots are right."""
        held = tier.holds(space, keys, self.deadline())
        assert held.dtype == np.bool_ and held.shape == (len(keys),), (held.dtype, held.shape)
        assert held.tolist() == np.broadcast_to(here, len(keys)).tolist()
        batch = empty(space, keys)
        assert_right(batch, tier.read(batch, self.deadline()), here)

    # ---- storing and finding

    @pytest.mark.parametrize("n", [1, 2, 100])
    def test_what_was_written_is_read(self, tier: Tier, n: int) -> None:
        for number, size in enumerate(self.sizes):
            space = tier_space(number, *size)
            keys = block_keys(space, 0, n)
            self.must_write(tier, space, keys)
            self.check_read(tier, space, keys)

    def test_nothing_is_in_an_empty_tier(self, tier: Tier) -> None:
        space = tier_space()
        self.check_read(tier, space, block_keys(space, 0, 5), False)

    def test_an_empty_batch(self, tier: Tier) -> None:
        space = tier_space()
        none = block_keys(space, 0, 0)
        assert self.write(tier, filled(space, none)) == []
        self.check_read(tier, space, none)
        tier.remove(space, none, self.deadline())

    def test_a_batch_that_is_partly_there(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 24)
        there = np.arange(24) % 3 != 1
        self.must_write(tier, space, keys[there])
        self.check_read(tier, space, keys, there)

    def test_writing_again_is_harmless(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 8)
        self.must_write(tier, space, keys[:4])
        placed = self.write(tier, filled(space, keys))
        assert placed[4:] == [STORED] * 4
        assert set(placed[:4]) <= ({PRESENT} if self.counts_presence else {PRESENT, STORED})
        self.check_read(tier, space, keys)

    def test_removing(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 9)
        self.must_write(tier, space, keys)
        gone = np.arange(9) >= 5
        tier.remove(space, keys[gone], self.deadline())
        self.check_read(tier, space, keys, ~gone)
        tier.remove(space, block_keys(space, 1, 3), self.deadline())
        tier.remove(space, keys[gone], self.deadline())
        self.check_read(tier, space, keys, ~gone)
        self.must_write(tier, space, keys[gone])
        self.check_read(tier, space, keys)

    def test_closing(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 2)
        self.must_write(tier, space, keys)
        tier.close()
        tier.close()
        for call in (
            lambda: tier.holds(space, keys, self.deadline()),
            lambda: tier.write(filled(space, keys), self.deadline()),
            lambda: tier.read(empty(space, keys), self.deadline()),
            lambda: tier.remove(space, keys, self.deadline()),
        ):
            with pytest.raises(TierUnavailable):
                call()
