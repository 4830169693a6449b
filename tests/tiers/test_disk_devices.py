"""Devices that take no more writes, do not answer, or lose a file in the middle of a call."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.runtime.shelf import Shelf
from penstock.testing.tier_blocks import filled
from penstock.tiers import disk
from penstock.tiers.base import Found, Placed
from penstock.tiers.disk import DiskTier
from penstock.tiers.disk_folder import Folder
from tests.tiers.disk_support import NEVER, ODD, SPACE, Faulty, chain, consistent, error, holds, open_disk, read, write

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


# ---- no more writes


def test_a_read_only_disk_is_read_on(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes that it cannot take do not close it to reads."""
    keys = chain(0, 20)
    assert write(tier, keys) == [STORED] * 20
    shelf = Shelf(tier)
    monkeypatch.setattr(Folder, "read_only", lambda self: True)
    for number in range(1, 4):
        assert shelf.write(filled(SPACE, chain(number, 4)), NEVER).tolist() == [NO_ROOM] * 4
        assert shelf.write(filled(ODD, chain(number, 4, ODD)), NEVER).tolist() == [NO_ROOM] * 4
        assert shelf.up
    assert write(tier, keys) == [PRESENT] * 20
    assert read(tier, keys) == [HERE] * 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_space_that_cannot_be_saved(tier: DiskTier, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def save(self: Folder, file: object) -> None:
        raise error(number)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "_save", save)
        assert write(tier, chain(0, 4)) == [NO_ROOM] * 4
    assert tier.counters()["errors"] == 1
    assert write(tier, chain(0, 4)) == [STORED] * 4


def test_a_write_that_meets_a_read_only_disk(tier: DiskTier, system: Faulty) -> None:
    assert write(tier, chain(0, 4)) == [STORED] * 4

    def fail(name: str, offset: int, n: int) -> None:
        if name == "pwritev":
            raise error(errno.EROFS)

    system.fail = fail
    assert write(tier, chain(1, 4)) == [NO_ROOM] * 4
    assert read(tier, chain(0, 4)) == [HERE] * 4
    consistent(tier)


def test_a_block_that_cannot_be_read_fails_once(tier: DiskTier, system: Faulty) -> None:
    """Its neighbours are read on, and a later start tries its slot again."""
    keys = chain(0, 3)
    assert write(tier, keys) == [STORED] * 3

    def fail(name: str, offset: int, n: int) -> None:
        if name == "preadv" and offset <= 4096 < offset + n:
            raise error(errno.EIO)

    system.fail = fail
    assert read(tier, keys[1:2]) == [UNREADABLE]
    assert read(tier, keys) == [HERE, ABSENT, HERE]
    system.fail = lambda *_: None
    assert write(tier, chain(1, 13)) == [STORED] * 13
    assert tier.counters()["slabs"] == 1
    assert write(tier, chain(2, 1)) == [STORED]
    assert tier.counters()["slabs"] == 2, "the last free slot of the first slab is not used"
    consistent(tier)
    tier.close()
    again = open_disk(tier._path)
    assert read(again, keys) == [HERE, ABSENT, HERE]
    assert write(again, chain(3, 16)) == [STORED] * 16
    assert again.counters()["slabs"] == 2
    consistent(again)
    again.close()


# ---- files that disappear meanwhile


def test_a_slab_is_lost_while_its_writer_looks_for_more_room(tier: DiskTier, system: Faulty) -> None:
    assert write(tier, chain(0, 8)) == [STORED] * 8

    def fail(name: str, offset: int, n: int) -> None:
        if name == "fallocate":
            system.fail = lambda *_: None
            (tier._path / "slab-000000.data").unlink()
            reader = threading.Thread(target=lambda: read(tier, chain(0, 8)))
            reader.start()
            reader.join()

    system.fail = fail
    assert write(tier, chain(1, 20)) == [FAILED] * 8 + [STORED] * 12
    assert read(tier, chain(1, 20)) == [ABSENT] * 8 + [HERE] * 12
    consistent(tier)


def test_a_slab_is_lost_after_its_blocks_were_written(tier: DiskTier, system: Faulty) -> None:
    assert write(tier, chain(0, 8)) == [STORED] * 8

    def fail(name: str, offset: int, n: int) -> None:
        if name == "pwritev":
            system.fail = lambda *_: None
            (tier._path / "slab-000000.data").unlink()
            reader = threading.Thread(target=lambda: read(tier, chain(0, 8)))
            reader.start()
            reader.join()

    system.fail = fail
    assert write(tier, chain(1, 4)) == [FAILED] * 4
    assert read(tier, chain(1, 4)) == [ABSENT] * 4
    consistent(tier)


# ---- devices that do not answer


class Stuck:
    """A call that does not return until it is let go."""

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.entered.set()
        assert self.go_on.wait(60)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stuck = Stuck()
    yield stuck
    stuck.go_on.set()


def ends(call: Callable[[], object]) -> bool:
    """Whether it returns while the device does not answer."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def test_closing_does_not_wait_for_ever(
    tier: DiskTier, system: Faulty, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_CLOSE_S", 0.1)
    keys = chain(0, 5)
    assert write(tier, keys) == [STORED] * 5
    assert read(tier, keys) == [HERE] * 5
    system.fail = lambda name, *_: stuck.wait() if name == "pwrite" else None
    assert ends(tier.close)
    assert stuck.entered.is_set(), "uses are written down"
    assert ends(tier.usage) and ends(tier.counters) and ends(tier.close)
    stuck.go_on.set()
    monkeypatch.undo()
    tier.close()
    again = open_disk(tier._path)
    assert read(again, keys) == [HERE] * 5
    again.close()


def test_the_last_call_of_a_closed_tier_does_not_close_it_itself(
    tier: DiskTier, system: Faulty, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_CLOSE_S", 0.1)
    keys = chain(0, 5)
    assert write(tier, keys) == [STORED] * 5
    reading = Stuck()
    system.fail = lambda name, *_: reading.wait() if name == "preadv" else stuck.wait()
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(read(tier, keys)), daemon=True)
    reader.start()
    assert reading.entered.wait(60)
    assert ends(tier.close)
    reading.go_on.set()
    reader.join(20)
    assert found == [[HERE] * 5]
    assert ends(tier.usage)


def test_a_look_at_a_directory_that_does_not_answer_holds_up_one_call(
    tier: DiskTier, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = chain(0, 5)
    assert write(tier, keys) == [STORED] * 5

    def look(self: Folder) -> bool:
        stuck.wait()
        return True

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "is_there", look)
        patched.setattr(disk, "_LOOK_S", 0.0)
        looker = threading.Thread(target=lambda: holds(tier, keys))
        looker.start()
        assert stuck.entered.wait(60)
        assert ends(lambda: holds(tier, keys)) and ends(tier.usage) and ends(lambda: read(tier, keys))
        stuck.go_on.set()
        looker.join()
