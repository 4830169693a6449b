"""The disk tier: what every tier must do, its options, and what it finds again after a restart."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import ConfigError, TierUnavailable
from penstock.testing.tier_blocks import tier_space
from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Found, Keys, Placed, Tier
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_device import System
from penstock.tiers.disk_format import HEADER_BYTES, ROW_BYTES, SPACES_NAME, check_rows, row_dtype, unpack_header
from penstock.tiers.registry import open_tier, parse_tier
from penstock.types import WriteRule
from tests.tiers.disk_support import (
    NEVER,
    ODD,
    SPACE,
    Faulty,
    chain,
    consistent,
    holds,
    open_disk,
    place_of,
    read,
    tear_row,
    write,
)

HERE, ABSENT = Found.HERE, Found.ABSENT
STORED, PRESENT, NO_ROOM = Placed.STORED, Placed.PRESENT, Placed.NO_ROOM


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


# ---- options and opening


def test_options(tmp_path: Path) -> None:
    config = parse_tier(f"disk:{tmp_path}/cache?size=8M&keep_free=0&slab=1M&direct=no&name=nvme")
    assert config.write is WriteRule.SECOND_USE
    tier = open_tier(config)
    assert (tier.name, tier.kind, tier.durable, tier.usage().capacity_bytes) == ("nvme", "disk", True, 8 << 20)
    tier.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("sise=1G", "did you mean 'size'"),
        ("direct=maybe", "direct"),
        ("size=lots", "size 'lots'"),
        ("size=1M&slab=2M", "larger size= or a smaller slab="),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_tier(parse_tier(f"disk:{tmp_path}?{options}"))


def test_a_path_that_is_not_whole() -> None:
    with pytest.raises(ConfigError, match="full path"):
        open_tier(parse_tier("disk:cache"))


def test_default_sizes(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    tier = DiskTier(tmp_path)
    capacity = tier.usage().capacity_bytes
    assert capacity is not None and 0.3 * free < capacity < 0.7 * free
    tier.close()


def test_one_owner(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    with pytest.raises(TierUnavailable, match="a directory of its own"):
        open_disk(tmp_path)
    tier.close()
    open_disk(tmp_path).close()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TierUnavailable, match="give a directory"):
        open_disk(tmp_path / "file" / "below")


def test_another_format_is_refused(tmp_path: Path) -> None:
    open_disk(tmp_path).close()
    spaces = tmp_path / SPACES_NAME
    spaces.write_text(spaces.read_text().replace('"format": 1', '"format": 2'))
    before = spaces.read_text()
    with pytest.raises(ConfigError, match=r"format 2.*give another directory, or delete"):
        open_disk(tmp_path)
    assert spaces.read_text() == before


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    foreign = {name: os.urandom(100) for name in ("notes.txt", "slab-1.data", "slab-000001.data.bak", "wear")}
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    for _ in range(2):
        tier = open_disk(tmp_path)
        for number in range(40):
            write(tier, chain(number, 10))
        tier.close()
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign


# ---- what is found again


def stored(folder: Path, n: int = 20) -> Keys:
    """A closed tier with a chain of n blocks."""
    tier = open_disk(folder)
    keys = chain(0, n)
    assert write(tier, keys) == [STORED] * n
    tier.close()
    return keys


def test_the_spaces_file_is_lost(tmp_path: Path) -> None:
    """Then rows speak of nothing: everything is gone, the slabs are used again, and old rows stay dead."""
    keys = stored(tmp_path)
    (tmp_path / SPACES_NAME).unlink()
    for _ in range(2):
        tier = open_disk(tmp_path)
        assert read(tier, keys) == [ABSENT] * 20
        assert write(tier, chain(1, 5)) in ([STORED] * 5, [PRESENT] * 5)
        consistent(tier)
        tier.close()


def test_the_spaces_file_of_another_store(tmp_path: Path) -> None:
    """It gives the rows' numbers to other spaces: the rows must not follow."""
    keys = stored(tmp_path / "one")
    tier = open_disk(tmp_path / "two")
    other = tier_space(5)
    write(tier, chain(0, 1, other), other)
    tier.close()
    shutil.copy(tmp_path / "two" / SPACES_NAME, tmp_path / "one" / SPACES_NAME)
    tier = open_disk(tmp_path / "one")
    assert tier.usage().blocks == 0
    assert holds(tier, keys, other) == [False] * 20
    tier.close()


def test_what_is_on_disk_while_it_is_open(tmp_path: Path) -> None:
    """What a process that is killed now would leave: every call that was answered is in the files."""
    tier = open_disk(tmp_path / "tier")
    keys = chain(0, 20)
    write(tier, keys)
    tier.remove(SPACE, keys[3:5], NEVER)
    tier.remove(SPACE, keys[15:], NEVER)
    shutil.copytree(tmp_path / "tier", tmp_path / "copy")
    copy = open_disk(tmp_path / "copy")
    assert read(copy, keys) == [HERE] * 3 + [ABSENT] * 2 + [HERE] * 10 + [ABSENT] * 5
    consistent(copy)
    copy.close()
    tier.close()


def test_a_damaged_spaces_file_is_a_lost_one(tmp_path: Path) -> None:
    keys = stored(tmp_path)
    (tmp_path / SPACES_NAME).write_bytes(b"{")
    tier = open_disk(tmp_path)
    assert holds(tier, keys) == [False] * 20
    tier.close()


def test_rows_are_lost_and_the_slabs_are_there(tmp_path: Path) -> None:
    keys = stored(tmp_path)
    (tmp_path / "slab-000000.rows").unlink()
    tier = open_disk(tmp_path)
    assert read(tier, keys) == [ABSENT] * 16 + [HERE] * 4
    assert write(tier, keys) == [STORED] * 16 + [PRESENT] * 4
    assert read(tier, keys) == [HERE] * 20
    consistent(tier)
    tier.close()


def test_slabs_are_lost_and_the_rows_are_there(tmp_path: Path) -> None:
    keys = stored(tmp_path)
    (tmp_path / "slab-000000.data").unlink()
    tier = open_disk(tmp_path)
    assert tier.counters()["dropped_rows"] == 16
    assert read(tier, keys) == [ABSENT] * 16 + [HERE] * 4
    assert write(tier, keys) == [STORED] * 16 + [PRESENT] * 4
    consistent(tier)
    tier.close()


def test_a_slab_that_is_shorter_than_its_rows_say(tmp_path: Path) -> None:
    keys = stored(tmp_path)
    os.truncate(tmp_path / "slab-000000.data", 5 * 4096 + 100)
    for dropped in (11, 0):
        tier = open_disk(tmp_path)
        assert tier.counters()["dropped_rows"] == dropped
        assert read(tier, keys) == [HERE] * 5 + [ABSENT] * 11 + [HERE] * 4
        tier.close()
        os.truncate(tmp_path / "slab-000000.data", 16 * 4096)


def test_a_rows_file_of_another_slab(tmp_path: Path) -> None:
    """It is not taken for this slab's: each row would speak of another block's bytes."""
    keys = stored(tmp_path)
    (tmp_path / "slab-000001.rows").write_bytes((tmp_path / "slab-000000.rows").read_bytes())
    tier = open_disk(tmp_path)
    assert read(tier, keys) == [HERE] * 16 + [ABSENT] * 4
    tier.close()


@pytest.mark.parametrize("byte", range(0, 64, 7))
def test_torn_rows_are_free(tmp_path: Path, byte: int) -> None:
    keys = stored(tmp_path)
    tier = open_disk(tmp_path)
    _, rows, slot, _ = place_of(tier, keys[3])
    tier.close()
    tear_row(rows, slot, byte)
    tier = open_disk(tmp_path)
    assert tier.counters()["torn_rows"] == 1
    assert read(tier, keys) == [HERE] * 3 + [ABSENT] + [HERE] * 16
    assert write(tier, keys) == [PRESENT] * 3 + [STORED] + [PRESENT] * 16
    consistent(tier)
    tier.close()


def test_a_row_in_another_place_is_torn(tmp_path: Path) -> None:
    keys = stored(tmp_path)
    data = bytearray((tmp_path / "slab-000000.rows").read_bytes())
    first, second = (slice(HEADER_BYTES + i * ROW_BYTES, HEADER_BYTES + (i + 1) * ROW_BYTES) for i in (0, 1))
    data[first], data[second] = data[second], data[first]
    (tmp_path / "slab-000000.rows").write_bytes(data)
    tier = open_disk(tmp_path)
    assert tier.counters()["torn_rows"] == 2
    assert read(tier, keys) == [ABSENT] * 2 + [HERE] * 18
    tier.close()


def test_two_rows_with_one_key(tmp_path: Path) -> None:
    """What a kill between two writers' steps can leave: one of them stays, and a removal removes both."""
    keys = stored(tmp_path)
    path = tmp_path / "slab-000001.rows"
    header = unpack_header(path.read_bytes()[:HEADER_BYTES])
    assert header is not None
    tier = open_disk(tmp_path)
    _, _, _, stride = place_of(tier, keys[0])
    tier.close()
    row = np.frombuffer((tmp_path / "slab-000000.rows").read_bytes(), row_dtype, 1, HEADER_BYTES).copy()
    row["check"] = check_rows(row.view(np.uint64).reshape(1, 8), header.life, np.array([9]))
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 9 * ROW_BYTES)
        file.write(row.tobytes())
    block = (tmp_path / "slab-000000.data").read_bytes()[:stride]
    with (tmp_path / "slab-000001.data").open("r+b") as file:
        file.seek(9 * stride)
        file.write(block)
    for _ in range(2):
        tier = open_disk(tmp_path)
        assert read(tier, keys) == [HERE] * 20
        consistent(tier)
        tier.remove(SPACE, keys[:1], NEVER)
        tier.close()
        tier = open_disk(tmp_path)
        assert holds(tier, keys) == [False] + [True] * 19
        write(tier, keys[:1])
        tier.close()


def test_a_smaller_size_gives_the_coldest_slabs_back(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    chains = [chain(number, 16) for number in range(8)]
    for keys in chains:
        assert write(tier, keys) == [STORED] * 16
    tier.touch(SPACE, chains[0])
    tier.close()
    tier = open_disk(tmp_path, size="300K")
    kept = [sum(holds(tier, keys)) for keys in chains]
    assert kept == [16] + [0] * 4 + [16] * 3
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 300 << 10
    consistent(tier)
    tier.close()


def test_wear_is_remembered(tmp_path: Path) -> None:
    for turn in range(1, 4):
        tier = open_disk(tmp_path)
        write(tier, chain(turn, 10))
        write(tier, chain(turn, 10))
        counters = tier.counters()
        assert (counters["written_bytes"], counters["lifetime_written_bytes"]) == (40960, turn * 40960)
        tier.close()


# ---- room


def full(folder: Path, system: System | None = None) -> tuple[DiskTier, list[Keys]]:
    """A full tier: chains of ten blocks, the oldest first."""
    tier = open_disk(folder, system=system)
    chains = [chain(number, 10) for number in range(24)]
    for keys in chains:
        assert write(tier, keys) == [STORED] * 10
    assert tier.counters()["slabs"] == 15 and tier.counters()["evictions"] == 0
    return tier, chains


@pytest.mark.parametrize("restart", [False, True])
def test_the_least_recently_used_leaves_tail_first(tmp_path: Path, restart: bool) -> None:
    tier, chains = full(tmp_path)
    tier.touch(SPACE, chains[0])
    read(tier, chains[1])
    if restart:
        tier.close()
        tier = open_disk(tmp_path)
    assert write(tier, chain(100, 14)) == [STORED] * 14
    assert [sum(holds(tier, keys)) for keys in chains[:5]] == [10, 10, 0, 6, 10]
    assert holds(tier, chains[3]) == [True] * 6 + [False] * 4
    assert tier.counters()["evictions"] == 14
    consistent(tier)
    tier.close()


def test_what_a_chain_continues_does_not_leave_for_it(tmp_path: Path) -> None:
    tier, _ = full(tmp_path)
    longer = chain(0, 40)
    assert write(tier, longer, first=10) == [STORED] * 30
    assert holds(tier, longer) == [True] * 40
    consistent(tier)
    tier.close()


def test_a_chain_that_is_larger_than_the_disk(tmp_path: Path) -> None:
    tier, _ = full(tmp_path)
    keys = chain(200, 300)
    placed = write(tier, keys)
    assert placed == [STORED] * 240 + [NO_ROOM] * 60
    assert read(tier, keys) == [HERE] * 240 + [ABSENT] * 60
    consistent(tier)
    tier.close()


def test_a_removed_block_in_the_middle_frees_its_room_in_the_end(tmp_path: Path) -> None:
    tier, chains = full(tmp_path)
    for keys in chains:
        tier.remove(SPACE, keys[4:5], NEVER)
    assert tier.usage().blocks == 216
    assert write(tier, chains[0]) == [PRESENT] * 4 + [STORED] + [PRESENT] * 5
    consistent(tier)
    for number in range(100, 124):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    consistent(tier)
    assert tier.usage().blocks == 240
    tier.close()


def test_strides_share_the_disk_by_use(tmp_path: Path) -> None:
    tier, chains = full(tmp_path)
    wide = [chain(number, 8, ODD) for number in range(4)]
    for keys in wide:
        assert write(tier, keys, ODD) == [STORED] * 8
        assert read(tier, keys, ODD) == [HERE] * 8
        consistent(tier)
    assert holds(tier, chains[-1]) == [True] * 10
    # And back: what is used takes the slabs of what is not.
    for number in range(100, 130):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    assert sum(sum(holds(tier, keys, ODD)) for keys in wide) == 0
    consistent(tier)
    tier.close()
    tier = open_disk(tmp_path)
    assert read(tier, chain(129, 10)) == [HERE] * 10
    consistent(tier)
    tier.close()


def test_a_stride_larger_than_a_slab(tmp_path: Path) -> None:
    tier, _ = full(tmp_path)
    space = tier_space(9, 2, 80 << 10)
    keys = chain(0, 3, space)
    assert write(tier, keys, space) == [STORED] * 3
    assert read(tier, keys, space) == [HERE] * 3
    larger = tier_space(10, 2, 1 << 20)
    assert write(tier, chain(0, 2, larger), larger) == [NO_ROOM] * 2
    assert read(tier, keys, space) == [HERE] * 3
    consistent(tier)
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 1060000
    tier.close()


def test_neighbours_are_one_call(tmp_path: Path) -> None:
    system = Faulty()
    tier, _ = full(tmp_path, system)
    system.calls.clear()
    keys = chain(300, 10)
    write(tier, keys)
    read(tier, keys)
    moves = [(name, n) for name, _, n in system.calls if name != "pwrite"]
    assert moves == [("pwritev", 40960), ("preadv", 40960)]
    tier.close()


def test_uses_are_written_down_in_batches(tmp_path: Path) -> None:
    system = Faulty()
    tier, chains = full(tmp_path, system)
    system.calls.clear()
    for _ in range(10):
        for keys in chains:
            tier.touch(SPACE, keys)
            read(tier, keys)
    assert not [name for name, _, _ in system.calls if name == "pwrite"]
    tier.close()
    assert len([name for name, _, _ in system.calls if name == "pwrite"]) <= 15
