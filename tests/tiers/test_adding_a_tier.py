"""The tier of docs/adding-a-tier.md, built from that page: it passes the suite, and it works under a shelf."""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from penstock.errors import ConfigError, TierError, TierTimeout, TierUnavailable
from penstock.runtime.shelf import Got, Shelf
from penstock.testing.tier_blocks import block_keys, empty, filled, tier_space
from penstock.tiers import registry
from penstock.tiers.base import Tier
from tests.support import ROOT

PAGE = ROOT / "docs" / "adding-a-tier.md"
TIER, LINE, PROOF = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
SPACE = tier_space(0, 13, 320)
KEYS = block_keys(SPACE, 0, 6)


def module_of(code: str, name: str) -> ModuleType:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, f"{PAGE.name}:{name}", "exec"), vars(module))
    return module


TestSqlite = module_of(PROOF, "sqlite_proof").TestSqlite


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    before = dict(registry._TIERS)
    module_of(TIER, "sqlite_tier")
    module_of(LINE, "sqlite_line")
    yield
    registry._TIERS.clear()
    registry._TIERS.update(before)
    for name in ("sqlite_tier", "sqlite_line", "sqlite_proof"):
        del sys.modules[name]


def opened(path: Path, query: str = "") -> Any:
    return registry.open_tier(registry.parse_tier(f"sqlite:{path}{query}"))


def deadline() -> float:
    return time.monotonic() + 30


def test_it_has_the_whole_interface_and_no_more_than_a_file() -> None:
    assert TIER.startswith('"""sqlite_tier.py') and TIER.count("\n") < 200
    tier = sys.modules["sqlite_tier"].SqliteTier
    assert issubclass(tier, Tier) and not tier.__abstractmethods__


def test_an_address_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        opened(tmp_path / "a.db", "?siez=1G")
    with pytest.raises(TierUnavailable, match="unable to open"):
        opened(tmp_path / "nowhere" / "a.db")


def test_damage_in_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    tier = opened(path)
    tier.write(filled(SPACE, KEYS), deadline())
    tier.close()
    with sqlite3.connect(path) as db:
        row = db.execute("SELECT rowid, payload FROM blocks WHERE key = ?", (KEYS[2].tobytes(),)).fetchone()
        wrong = bytearray(row[1])
        wrong[1000] ^= 4
        db.execute("UPDATE blocks SET payload = ? WHERE rowid = ?", (bytes(wrong), row[0]))
        db.execute("UPDATE blocks SET payload = x'00' WHERE key = ?", (KEYS[4].tobytes(),))
    db.close()
    tier = opened(path)
    got = Shelf(tier).read(empty(SPACE, KEYS), None, deadline())
    assert [Got(each).name for each in got] == ["GOOD", "GOOD", "DAMAGED", "GOOD", "FAILED", "GOOD"]
    assert tier.holds(SPACE, KEYS, deadline()).tolist() == [True, True, False, True, True, True]
    tier.close()


def test_a_file_that_is_locked_or_garbage(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    tier = opened(path)
    tier._db.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TierUnavailable, match="locked"):
        tier.write(filled(SPACE, KEYS), deadline())
    other.execute("ROLLBACK")
    other.close()
    assert tier.usage().blocks == 0
    assert not tier.write(filled(SPACE, KEYS), deadline()).any()
    tier.close()
    path.write_bytes(b"\xff" * 8192)
    with pytest.raises(TierError):
        opened(path)


def test_a_busy_tier_is_late_not_stuck(tmp_path: Path) -> None:
    tier = opened(tmp_path / "a.db")
    with tier._lock, pytest.raises(TierTimeout):
        tier.read(empty(SPACE, KEYS), time.monotonic())
    tier.close()


def test_what_was_used_stays_longest(tmp_path: Path) -> None:
    tier = opened(tmp_path / "a.db", f"?size={4 * SPACE.block_bytes}")
    tier.write(filled(SPACE, KEYS[:4]), deadline())
    tier.read(empty(SPACE, KEYS[:1]), deadline())
    tier.touch(SPACE, KEYS[1:2])
    tier.write(filled(SPACE, KEYS[4:]), deadline())
    assert tier.holds(SPACE, KEYS, deadline()).tolist() == [True, True, False, False, True, True]
    assert np.array_equal(tier.usage().used_bytes, 4 * SPACE.block_bytes)
    tier.close()
