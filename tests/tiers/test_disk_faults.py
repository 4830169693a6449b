"""Disks that fail, fill up, lie, become read-only or disappear: no wrong byte, and every answer says what happened."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import TierUnavailable
from penstock.testing.tier_blocks import Buffers, filled
from penstock.tiers.base import Found, Placed
from penstock.tiers.disk import DiskOptions, DiskTier
from tests.support import until
from tests.tiers.disk_support import (
    NEVER,
    ODD,
    SPACE,
    Faulty,
    chain,
    change,
    consistent,
    error,
    holds,
    mounted,
    open_disk,
    place_of,
    read,
    read_verified,
    small_ext4,
    write,
)

HERE, ABSENT, UNREADABLE = Found.HERE, Found.ABSENT, Found.FAILED
STORED, PRESENT, NO_ROOM, FAILED = Placed.STORED, Placed.PRESENT, Placed.NO_ROOM, Placed.FAILED


@pytest.fixture
def system() -> Faulty:
    return Faulty()


@pytest.fixture
def tier(tmp_path: Path, system: Faulty) -> Iterator[DiskTier]:
    tier = open_disk(tmp_path / "tier", system=system)
    yield tier
    tier.close()


# ---- calls that fail


def test_a_bad_sector_costs_its_block_only(tier: DiskTier, system: Faulty) -> None:
    keys = chain(0, 10)
    assert write(tier, keys) == [STORED] * 10
    bad = place_of(tier, keys[6])[2] * 4096

    def fail(name: str, offset: int, n: int) -> None:
        if name == "preadv" and offset <= bad < offset + n:
            raise error(errno.EIO)

    system.fail = fail
    assert read(tier, keys) == [HERE] * 6 + [UNREADABLE] + [HERE] * 3
    assert holds(tier, keys) == [True] * 6 + [False] + [True] * 3
    assert tier.counters()["errors"] == 1
    consistent(tier)
    # Written again it goes elsewhere.
    assert write(tier, keys) == [PRESENT] * 6 + [STORED] + [PRESENT] * 3
    assert read(tier, keys) == [HERE] * 10
    for number in range(1, 60):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    consistent(tier)


def test_a_bad_sector_in_a_write(tier: DiskTier, system: Faulty) -> None:
    keys = chain(0, 10)

    def fail(name: str, offset: int, n: int) -> None:
        if name == "pwritev" and offset <= 4 * 4096 < offset + n:
            raise error(errno.EIO)

    system.fail = fail
    assert write(tier, keys) == [STORED] * 4 + [FAILED] + [STORED] * 5
    assert read(tier, keys) == [HERE] * 4 + [ABSENT] + [HERE] * 5
    consistent(tier)
    system.fail = lambda *_: None
    assert write(tier, keys) == [PRESENT] * 4 + [STORED] + [PRESENT] * 5
    assert read(tier, keys) == [HERE] * 10


def test_a_full_device_is_no_room(tier: DiskTier, system: Faulty) -> None:
    """Also where space that was allocated turns out not to be there."""

    def fail(name: str, offset: int, n: int) -> None:
        if name == "pwritev":
            raise error(errno.ENOSPC)

    system.fail = fail
    assert write(tier, chain(0, 3)) == [NO_ROOM] * 3
    consistent(tier)


@pytest.mark.parametrize("space", [SPACE, ODD])
@pytest.mark.parametrize("most", [4096, 8192, 4096 + 512, 3 * 4096 + 1024])
def test_short_transfers_go_on(tmp_path: Path, system: Faulty, space: object, most: int) -> None:
    tier = open_disk(tmp_path, system=system, direct="no")
    system.fail = lambda name, offset, n: most if name in ("preadv", "pwritev") else None
    keys = chain(0, 7, space)
    assert write(tier, keys, space) == [STORED] * 7
    assert read(tier, keys, space) == [HERE] * 7
    tier.close()


def test_a_device_that_takes_no_more(tier: DiskTier, system: Faulty) -> None:
    """A write of nothing is a failure, not a loop."""
    system.fail = lambda name, offset, n: (0 if offset else 8192) if name == "pwritev" else None
    assert write(tier, chain(0, 4)) == [STORED] * 2 + [FAILED] * 2
    assert read(tier, chain(0, 4)) == [HERE] * 2 + [ABSENT] * 2
    consistent(tier)


def test_interrupted_calls_go_on(tier: DiskTier, system: Faulty) -> None:
    count = iter(range(100))

    def fail(name: str, offset: int, n: int) -> None:
        if name in ("preadv", "pwritev") and next(count) % 3 < 2:
            raise InterruptedError

    system.fail = fail
    assert write(tier, chain(0, 4)) == [STORED] * 4
    assert read(tier, chain(0, 4)) == [HERE] * 4


def test_a_row_that_cannot_be_cleared_keeps_its_slot(tmp_path: Path, system: Faulty) -> None:
    """Its old row would speak of the new block's bytes after a restart: nothing is written there."""
    tier = open_disk(tmp_path, system=system)
    old = [chain(number, 10) for number in range(24)]
    for keys in old:
        write(tier, keys)

    def fail(name: str, offset: int, n: int) -> None:
        if name == "pwrite":
            raise error(errno.EIO)

    system.fail = fail
    system.calls.clear()
    assert write(tier, chain(100, 10)) == [FAILED] * 10
    assert not [name for name, _, _ in system.calls if name == "pwritev"]
    consistent(tier)
    system.fail = lambda *_: None
    tier.close()
    tier = open_disk(tmp_path)
    for keys in old:
        assert set(read(tier, keys)) <= {HERE, ABSENT}
    assert write(tier, chain(100, 10)) == [STORED] * 10
    tier.close()


def test_a_row_that_was_not_written_is_a_block_lost_at_the_restart(tmp_path: Path, system: Faulty) -> None:
    tier = open_disk(tmp_path, system=system)

    def fail(name: str, offset: int, n: int) -> None:
        if name == "pwrite" and offset:
            raise error(errno.EIO)

    keys = chain(0, 5)
    write(tier, chain(1, 1))
    system.fail = fail
    write(tier, keys)
    assert tier.counters()["errors"] == 1
    assert read(tier, keys) == [HERE] * 5
    tier.close()
    tier = open_disk(tmp_path)
    assert read(tier, keys) == [ABSENT] * 5
    consistent(tier)
    tier.close()


# ---- wrong bytes


def test_flipped_bits_are_found(tier: DiskTier) -> None:
    for space in (SPACE, ODD):
        keys = chain(0, 12, space)
        assert write(tier, keys, space) == [STORED] * 12
        for i in (0, 5, 11):
            data, _, slot, stride = place_of(tier, keys[i], space)
            change(data, slot * stride + 97 * i, lambda byte: byte ^ 0x10)
        found = read_verified(tier, keys, space)
        assert [i for i in range(12) if found[i] == UNREADABLE] == [0, 5, 11]
        assert found.count(HERE) == 9


def test_rows_that_survived_their_blocks_are_found(tmp_path: Path) -> None:
    """A power loss: the rows reached the disk, half of the data did not."""
    tier = open_disk(tmp_path)
    keys = chain(0, 16)
    assert write(tier, keys) == [STORED] * 16
    tier.close()
    with (tmp_path / "slab-000000.data").open("r+b") as file:
        for slot in range(0, 16, 2):
            file.seek(slot * 4096 + 2048)
            file.write(bytes(2048))
    tier = open_disk(tmp_path)
    assert read_verified(tier, keys) == [UNREADABLE, HERE] * 8
    tier.close()


def test_reading_past_the_end_is_failed_and_forgotten(tier: DiskTier) -> None:
    keys = chain(0, 10)
    assert write(tier, keys) == [STORED] * 10
    data, _, slot, _ = place_of(tier, keys[0])
    os.truncate(data, (slot + 4) * 4096 + 512)
    assert read(tier, keys) == [HERE] * 4 + [UNREADABLE] * 6
    assert read(tier, keys) == [HERE] * 4 + [ABSENT] * 6
    assert tier.counters()["short_reads"] == 6
    consistent(tier)
    assert write(tier, keys) == [PRESENT] * 4 + [STORED] * 6
    assert read(tier, keys) == [HERE] * 10
    consistent(tier)


# ---- files and directories that disappear


def test_a_slab_is_deleted(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    keys = chain(0, 40)
    assert write(tier, keys) == [STORED] * 40
    (tmp_path / "slab-000001.data").unlink()
    assert read(tier, keys) == [HERE] * 16 + [UNREADABLE] * 16 + [HERE] * 8
    assert read(tier, keys) == [HERE] * 16 + [ABSENT] * 16 + [HERE] * 8
    assert (tier.counters()["lost_slabs"], tier.counters()["dropped_rows"]) == (1, 16)
    consistent(tier)
    assert write(tier, keys) == [PRESENT] * 16 + [STORED] * 16 + [PRESENT] * 8
    tier.close()
    tier = open_disk(tmp_path)
    assert read(tier, keys) == [HERE] * 40
    consistent(tier)
    tier.close()


def test_a_slab_is_deleted_while_it_is_written_to(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    assert write(tier, chain(0, 8)) == [STORED] * 8
    (tmp_path / "slab-000000.rows").unlink()
    assert write(tier, chain(1, 8)) == [FAILED] * 8
    consistent(tier)
    assert write(tier, chain(1, 8)) == [STORED] * 8
    assert read(tier, chain(1, 8)) == [HERE] * 8
    tier.close()


def test_the_directory_is_removed_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    tier = open_disk(folder)
    keys = chain(0, 20)
    write(tier, keys)
    shutil.rmtree(folder)

    def unavailable() -> bool:
        try:
            assert set(read(tier, keys)) <= {HERE, ABSENT, UNREADABLE}
        except TierUnavailable:
            return True
        return False

    until(unavailable, "the loss is noticed")
    for call in (lambda: holds(tier, keys), lambda: write(tier, keys), lambda: tier.remove(SPACE, keys, NEVER)):
        with pytest.raises(TierUnavailable, match="is gone"):
            call()
    assert tier.usage().blocks == 0
    assert not folder.exists(), "a mount point that is empty is not filled"
    folder.mkdir()
    until(lambda: not unavailable(), "the directory is used again")
    assert holds(tier, keys) == [False] * 20
    assert write(tier, keys) == [STORED] * 20
    assert read(tier, keys) == [HERE] * 20
    assert tier.counters()["reopened"] == 1
    consistent(tier)
    tier.close()


def test_the_directory_comes_back_with_another_owner(tmp_path: Path) -> None:
    folder = tmp_path / "tier"
    tier = open_disk(folder)
    write(tier, chain(0, 5))
    folder.rename(tmp_path / "away")
    other = open_disk(folder)
    write(other, chain(1, 5))

    def unavailable() -> bool:
        try:
            write(tier, chain(2, 5))
        except TierUnavailable:
            return True
        return False

    until(unavailable)
    tier.close()
    assert read(other, chain(1, 5)) == [HERE] * 5
    other.close()


# ---- real file systems


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with small_ext4(tmp_path, 8 << 20) as mount:
        tier = open_disk(mount / "tier", size="64M", slab="1M")
        for number in range(40):
            assert set(write(tier, chain(number, 50))) <= {STORED, NO_ROOM}
        assert read(tier, chain(39, 50)) == [HERE] * 50, "what is new takes the place of what is old"
        (mount / "rest").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize - 65536))
        with pytest.raises(OSError, match="space"), (mount / "more").open("wb", 0) as file:
            while True:
                file.write(bytes(4096))
        for number in range(40, 60):
            assert write(tier, chain(number, 50)) == [STORED] * 50
        assert read(tier, chain(59, 50)) == [HERE] * 50
        consistent(tier)
        tier.close()


def test_what_is_to_stay_free_stays_free(tmp_path: Path) -> None:
    with mounted(tmp_path / "mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs") as mount:
        tier = DiskTier(mount / "tier", DiskOptions(size="64M", slab="256K", keep_free="3M"))
        for number in range(40):
            assert write(tier, chain(number, 50)) == [STORED] * 50
        status = os.statvfs(mount)
        assert status.f_bavail * status.f_frsize >= 3 << 20
        assert tier.counters()["slabs"] > 15
        consistent(tier)
        tier.close()


def test_a_disk_without_room_for_one_slab(tmp_path: Path) -> None:
    with mounted(tmp_path / "mount", "-t", "tmpfs", "-o", "size=256K", "tmpfs") as mount:
        tier = open_disk(mount / "tier", size="64M", slab="1M")
        assert write(tier, chain(0, 5)) == [NO_ROOM] * 5
        assert not list((mount / "tier").glob("slab-*")), "what could not be made is not left"
        tier.close()


def test_a_disk_becomes_read_only(tmp_path: Path) -> None:
    """What ext4 does at an error that it cannot repair."""
    with small_ext4(tmp_path, 16 << 20, "errors=remount-ro") as mount:
        tier = open_disk(mount / "tier")
        keys = chain(0, 20)
        assert write(tier, keys) == [STORED] * 20
        if subprocess.run(["mount", "-o", "remount,abort", str(mount)], capture_output=True).returncode:
            tier.close()
            pytest.skip("this kernel does not let an ext4 be aborted")

        def no_room() -> bool:
            placed = write(tier, chain(1, 5))
            assert set(placed) <= {FAILED, NO_ROOM}
            return placed == [NO_ROOM] * 5

        until(no_room, "it is known to be read-only")
        assert write(tier, keys) == [PRESENT] * 20
        assert read(tier, keys) == [HERE] * 20
        tier.remove(SPACE, keys[:1], NEVER)
        assert read(tier, keys) == [ABSENT] + [HERE] * 19
        assert tier.counters()["errors"] > 0
        consistent(tier)
        tier.close()


def test_a_disk_that_is_read_only_from_the_start(tmp_path: Path) -> None:
    tmpfs = ("-t", "tmpfs", "-o", "ro,size=1M", "tmpfs")
    with mounted(tmp_path / "mount", *tmpfs) as mount, pytest.raises(TierUnavailable, match="Read-only"):
        open_disk(mount)


# ---- threads


def test_closing_waits_for_calls_that_run(tmp_path: Path, system: Faulty) -> None:
    tier = open_disk(tmp_path, system=system)
    keys = chain(0, 5)
    write(tier, keys)
    reading, go_on = threading.Event(), threading.Event()

    def hold(name: str, offset: int, n: int) -> None:
        if name == "preadv":
            reading.set()
            assert go_on.wait(60)

    system.fail = hold
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(read(tier, keys)))
    reader.start()
    assert reading.wait(60)
    closer = threading.Thread(target=tier.close)
    closer.start()
    until(lambda: tier._closed)
    with pytest.raises(TierUnavailable, match="closed"):
        holds(tier, keys)
    go_on.set()
    reader.join()
    closer.join()
    assert found == [[HERE] * 5]


def test_what_is_read_is_not_overwritten(tmp_path: Path, system: Faulty) -> None:
    """While one thread reads the oldest chain, others need its slots: it stays until it was read."""
    tier = open_disk(tmp_path, system=system)
    chains = [chain(number, 10) for number in range(24)]
    for keys in chains:
        write(tier, keys)
    reading, go_on = threading.Event(), threading.Event()

    def hold(name: str, offset: int, n: int) -> None:
        if name == "preadv" and not reading.is_set():
            reading.set()
            assert go_on.wait(60)

    system.fail = hold
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(read(tier, chains[0])))
    reader.start()
    assert reading.wait(60)
    tier.remove(SPACE, chains[0][5:], NEVER)
    for number in range(100, 150):
        assert write(tier, chain(number, 10)) == [STORED] * 10
    assert holds(tier, chains[0]) == [True] * 5 + [False] * 5
    go_on.set()
    reader.join()
    assert found == [[HERE] * 10]
    consistent(tier)
    tier.close()


def test_the_lock_is_free_during_transfers(tmp_path: Path, system: Faulty) -> None:
    tier = open_disk(tmp_path, system=system)
    write(tier, chain(0, 5))
    seen: list[int | None] = []

    def ask(name: str, offset: int, n: int) -> None:
        asked = threading.Thread(target=lambda: seen.append(tier.usage().blocks))
        asked.start()
        asked.join(5)
        if asked.is_alive():
            held.append(name)

    held: list[str] = []
    system.fail = ask
    write(tier, chain(1, 5))
    read(tier, chain(1, 5))
    system.fail = lambda *_: None
    assert not held and len(seen) >= 3
    tier.close()


def test_many_threads_on_a_full_disk(tmp_path: Path) -> None:
    tier = open_disk(tmp_path)
    wrong: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(60):
            space = ODD if random.integers(5) == 0 else SPACE
            keys = chain(int(random.integers(40)), 10, space)
            first = int(random.integers(9))
            kind = random.integers(10)
            if kind < 5:
                buffers = Buffers(space, 10)
                placed = tier.write(filled(space, keys, buffers=buffers), NEVER)
                buffers.scribble()
                wrong.extend("write" for each in placed if each == FAILED)
            elif kind < 9:
                wrong.extend("read" for each in read(tier, keys[first:], space) if each == UNREADABLE)
            else:
                tier.remove(space, keys[first:], NEVER)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    consistent(tier)
    tier.close()
    tier = open_disk(tmp_path)
    consistent(tier)
    tier.close()
