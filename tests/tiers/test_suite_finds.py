"""The suite of tiers passes an honest tier and finds what is wrong with every broken one."""

from __future__ import annotations

from penstock.testing.dict_tier import DictTier
from penstock.testing.tiers import TierSuite


class TestDictTier(TierSuite):
    survives_reopen = True

    def open_tier(self) -> DictTier:
        return DictTier()

    def reopen(self, tier: DictTier) -> DictTier:  # type: ignore[override]
        return DictTier(content=tier.content)

    def open_small(self, capacity_bytes: int) -> DictTier:
        return DictTier(capacity_bytes=capacity_bytes)
