"""Slabs that are added, given to another stride and deleted, also in a directory that is somebody else's by now."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from penstock.errors import TierUnavailable
from penstock.testing.tier_blocks import tier_space
from penstock.tiers.base import Found, Placed
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_store import Store
from tests.tiers.disk_support import NEVER, ODD, SPACE, chain, consistent, holds, open_disk, read, write

HERE, ABSENT, UNREADABLE = Found.HERE, Found.ABSENT, Found.FAILED
STORED, NO_ROOM, FAILED = Placed.STORED, Placed.NO_ROOM, Placed.FAILED
SHORT = tier_space(7, 4, 3 << 10)
"""Five blocks in a slab, which is 60 KiB: too short for 16 pages."""
WIDE = tier_space(8, 4, 5 << 10)
"""Three blocks in a slab."""
LONG = tier_space(9, 4, 30 << 10)
"""One block in a slab, which is longer than the others."""


def store_of(tier: DiskTier) -> Store:
    assert tier._store is not None
    return tier._store


def short_slabs(folder: Path, gives_back: bool) -> DiskTier:
    """A tier of 20 slabs of another stride, on a file system at `keep_free`, which gets back what is deleted or not."""
    tier = DiskTier(folder, DiskOptions(size="64M", slab="64K", keep_free="1M"))
    for number in range(20):
        assert write(tier, chain(number, 5, SHORT), SHORT) == [STORED] * 5

    def taken() -> int:
        return sum(path.stat().st_size for path in folder.glob("slab-*"))

    all_taken = taken()
    store_of(tier).folder.free_bytes = lambda: (1 << 20) + (all_taken - taken() if gives_back else 0)  # type: ignore[method-assign]
    assert write(tier, chain(20, 5, SHORT), SHORT) == [STORED] * 5, "in the room of the oldest: growth was refused"
    return tier


def test_slabs_that_are_too_short_make_room_for_one(tmp_path: Path) -> None:
    """Also right after the file system had no room."""
    tier = short_slabs(tmp_path, gives_back=True)
    assert write(tier, chain(0, 1)) == [STORED]
    assert tier.counters()["slabs"] == 19
    assert sum(sum(holds(tier, chain(number, 5, SHORT), SHORT)) for number in range(21)) == 18 * 5
    consistent(tier)
    tier.close()


def test_a_file_system_that_gives_nothing_back(tmp_path: Path) -> None:
    """What makes no room is not deleted on and on, in this write or the next."""
    tier = short_slabs(tmp_path, gives_back=False)
    for number in range(3):
        assert write(tier, chain(number, 1)) == [NO_ROOM]
    assert tier.counters()["slabs"] == 18
    consistent(tier)
    tier.close()


def test_a_removed_block_stays_removed_where_another_stride_took_its_chains_beginning(tmp_path: Path) -> None:
    """The chain's end leaves another slab with it, and its row there must not outlive a second copy."""
    tier = open_disk(tmp_path)
    keys = chain(0, 20)
    assert write(tier, keys) == [STORED] * 20
    assert write(tier, chain(1, 12)) == [STORED] * 12
    for number in range(2, 15):
        assert write(tier, chain(number, 16)) == [STORED] * 16
    assert write(tier, chain(0, 1, WIDE), WIDE) == [STORED]
    assert holds(tier, keys) == [False] * 20
    # A slab with more free slots: the second copies do not go where the first ones were.
    tier.remove(SPACE, chain(5, 16), NEVER)
    assert write(tier, keys, first=16) == [STORED] * 4
    tier.remove(SPACE, keys, NEVER)
    tier.close()
    tier = open_disk(tmp_path)
    assert holds(tier, keys) == [False] * 20
    consistent(tier)
    tier.close()


# ---- a directory that is somebody else's


def other_in_its_place(folder: Path, tier: DiskTier) -> DiskTier:
    """Another tier where the directory was; ours has looked just before, and does not know."""
    folder.rename(folder.with_name("away"))
    other = open_disk(folder)
    for number in range(100, 124):
        assert write(other, chain(number, 10)) == [STORED] * 10
    tier._looked_at = time.monotonic() + 3600
    return other


def test_a_new_space_is_not_written_into_a_directory_that_replaced_ours(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    tier = open_disk(folder)
    assert write(tier, chain(0, 5)) == [STORED] * 5
    other = other_in_its_place(folder, tier)
    before = (folder / "penstock.spaces").read_bytes()
    with pytest.raises(TierUnavailable, match="cannot write"):
        write(tier, chain(2, 3, ODD), ODD)
    assert (folder / "penstock.spaces").read_bytes() == before
    tier.close()
    other.close()


def test_no_slab_is_deleted_in_a_directory_that_replaced_ours(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    tier = open_disk(folder)
    assert write(tier, chain(500, 1, LONG), LONG) == [STORED]
    for number in range(24):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    other = other_in_its_place(folder, tier)
    before = sorted(path.name for path in folder.iterdir())
    for number in range(5):
        write(tier, chain(number, 3, LONG), LONG)
    assert sorted(path.name for path in folder.iterdir()) == before
    tier.close()
    for number in range(110, 124):
        assert read(other, chain(number, 10)) == [HERE] * 10
    other.close()


def test_closing_writes_no_row_where_another_owner_writes_his(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    for number in range(24):
        assert write(tier, chain(number, 10)) == [STORED] * 10
        assert read(tier, chain(number, 10)) == [HERE] * 10
    (tmp_path / "penstock.lock").unlink()
    other = open_disk(tmp_path)
    for number in range(100, 124):
        assert write(other, chain(number, 10)) == [STORED] * 10
    rows = {path.name: path.read_bytes() for path in tmp_path.glob("*.rows")}
    tier.close()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.rows")} == rows
    other.close()
