"""The disk tier: what every tier must do, its options, and what it finds again after a restart."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Tier
from penstock.tiers.disk import DiskOptions, DiskTier


class TestDisk(TierSuite):
    survives_reopen = True
    options = DiskOptions(size="96M")

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def open_tier(self) -> DiskTier:
        return DiskTier(Path(tempfile.mkdtemp(dir=self.folder)), self.options)

    def reopen(self, tier: Tier) -> DiskTier:
        assert isinstance(tier, DiskTier)
        return DiskTier(tier._path, self.options)

    def open_small(self, capacity_bytes: int) -> DiskTier:
        return DiskTier(Path(tempfile.mkdtemp(dir=self.folder)), DiskOptions(size=str(capacity_bytes)))


class TestDiskThroughTheCache(TestDisk):
    options = DiskOptions(size="96M", direct="no")
