"""The object tier over a directory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Tier
from penstock.tiers.registry import open_tier, parse_tier


class TestFile(TierSuite):
    survives_reopen = True

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.folders: dict[int, str] = {}

    def open_tier(self) -> Tier:
        return self._open(tempfile.mkdtemp(dir=self.folder))

    def reopen(self, tier: Tier) -> Tier:
        return self._open(self.folders[id(tier)])

    def _open(self, folder: str) -> Tier:
        tier = open_tier(parse_tier(f"file:{folder}"))
        self.folders[id(tier)] = folder
        return tier
