"""Random sequences of calls on one tier beside a model of what it may hold. `tiers.TierSuite` runs it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from penstock.testing.tier_blocks import Buffers, block_keys, empty, filled, parents_of, tier_space, version_of
from penstock.tiers.base import BlockSpace, Found, Keys, Placed

if TYPE_CHECKING:
    from penstock.testing.tiers import TierSuite

__all__ = ["TierMachine"]

CHAIN, VERSIONS = 5, range(3)
"""Few blocks, so that the same ones are written, removed and written again."""

spaces = st.integers(0, 2)
versions = st.sampled_from(VERSIONS)
picks = st.permutations(range(CHAIN)).flatmap(lambda order: st.integers(1, CHAIN).map(lambda n: order[:n]))


@dataclass
class _Known:
    """What a block may hold: its versions (none: it must be absent), and whether it must be there at all."""

    versions: set[int] = field(default_factory=set)
    sure: bool = True


class TierMachine(RuleBasedStateMachine):
    """A tier with room for everything keeps every block, never shows bytes that were not written under that key since
    it was last removed, and never a root of other bytes than those it shows."""

    suite: ClassVar[TierSuite]

    def __init__(self) -> None:
        super().__init__()
        sizes = [self.suite.sizes[i % len(self.suite.sizes)] for i in (0, 0, 1)]
        self.spaces = [tier_space(number, *size) for number, size in enumerate(sizes)]
        # The first two have the same size and the same keys.
        chains = [block_keys(self.spaces[max(number, 1)], 0, CHAIN) for number in range(len(sizes))]
        self.keys: list[Keys] = chains
        self.model = [[_Known() for _ in range(CHAIN)] for _ in sizes]
        self.n_replaced = 0
        self.tier = self.suite.open_tier()
        self.others = self.tier.usage().blocks

    def deadline(self) -> float:
        return time.monotonic() + self.suite.patience_s

    def chosen(self, space: int, pick: list[int]) -> tuple[BlockSpace, Keys, Keys, list[_Known]]:
        keys = self.keys[space]
        parents = parents_of(self.spaces[space], keys)
        return self.spaces[space], keys[pick], parents[pick], [self.model[space][i] for i in pick]

    @rule(space=spaces, pick=picks, version=versions)
    def write(self, space: int, pick: list[int], version: int) -> None:
        where, keys, parents, known = self.chosen(space, sorted(pick))
        buffers = Buffers(where, len(keys))
        placed = self.tier.write(filled(where, keys, version, parents=parents, buffers=buffers), self.deadline())
        buffers.scribble()
        for became, each in zip(placed.tolist(), known, strict=True):
            assert became in (Placed.STORED, Placed.PRESENT), f"{Placed(became).name} though there is room"
            if became == Placed.PRESENT:
                assert each.versions, "PRESENT, and it cannot be there"
            else:
                assert not (self.suite.counts_presence and each.versions and each.sure), "stored twice"
                each.versions = {version}
            each.sure = True

    @rule(space=spaces, pick=picks)
    def read(self, space: int, pick: list[int]) -> None:
        where, keys, parents, known = self.chosen(space, pick)
        held = self.tier.holds(where, keys, self.deadline())
        buffers = Buffers(where, len(keys))
        batch = empty(where, keys, parents=parents, buffers=buffers)
        found = self.tier.read(batch, self.deadline())
        buffers.assert_only_rooms_changed()
        assert (found == Found.HERE).tolist() == held.tolist(), "holds and read disagree"
        for i, each in enumerate(known):
            if found[i] == Found.HERE:
                version = version_of(batch, i, VERSIONS)
                assert version in each.versions, f"block {pick[i]} shows version {version}, may show {each.versions}"
            else:
                assert found[i] == Found.ABSENT, f"block {pick[i]} could not be read"
                assert not (each.sure and each.versions), f"block {pick[i]} is lost"
                each.versions = set()
        buffers.scribble()

    @rule(space=spaces, pick=picks)
    def remove(self, space: int, pick: list[int]) -> None:
        where, keys, _, known = self.chosen(space, pick)
        self.tier.remove(where, keys, self.deadline())
        for each in known:
            each.versions, each.sure = set(), True

    @rule(space=spaces, pick=picks)
    def come_again(self, space: int, pick: list[int]) -> None:
        """Removed and written with other bytes: chance alone would do it too rarely."""
        self.remove(space=space, pick=pick)
        self.n_replaced += 1
        self.write(space=space, pick=pick, version=VERSIONS[self.n_replaced % len(VERSIONS)])
        self.read(space=space, pick=pick)

    @rule(space=spaces, pick=picks)
    def touch_and_count(self, space: int, pick: list[int]) -> None:
        where, keys, _, _ = self.chosen(space, pick)
        self.tier.touch(where, keys)
        blocks = self.tier.usage().blocks
        known = [each for chain in self.model for each in chain]
        if blocks is not None and self.others is not None and all(each.sure for each in known):
            assert blocks - self.others == sum(bool(each.versions) for each in known)

    @precondition(lambda self: self.suite.can_reopen())
    @rule()
    def reopen(self) -> None:
        self.tier.close()
        self.tier = self.suite.reopen(self.tier)
        for each in (each for chain in self.model for each in chain):
            each.sure = each.sure and (self.suite.survives_reopen or not each.versions)

    def teardown(self) -> None:
        self.tier.close()
        super().teardown()
