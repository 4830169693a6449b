"""The object tier over a directory."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from penstock.errors import ConfigError, TierTimeout, TierUnavailable
from penstock.testing.tier_blocks import Buffers, assert_right, block_keys, empty, filled, tier_space
from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Placed, Tier
from penstock.tiers.envelope import header_at, object_name, pack
from penstock.tiers.objects import ObjectTier
from penstock.tiers.registry import open_tier, parse_tier
from tests.support import until

pytest.importorskip("obstore", reason="obstore is not installed (extra `objects`)")


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


SPACE = tier_space()
KEYS = block_keys(SPACE, 0, 4)


def soon() -> float:
    return time.monotonic() + 20.0


def stored(folder: Path) -> Tier:
    tier = open_tier(parse_tier(f"file:{folder}"))
    assert tier.write(filled(SPACE, KEYS), soon()).tolist() == [Placed.STORED] * 4
    return tier


def path_of(folder: Path, index: int) -> Path:
    return folder / object_name(SPACE, KEYS[index].tobytes())


def test_an_object_is_the_header_and_the_payload(tmp_path: Path) -> None:
    stored(tmp_path).close()
    batch = filled(SPACE, KEYS)
    for i in range(4):
        assert path_of(tmp_path, i).read_bytes() == pack(header_at(batch, i)) + bytes(batch.payloads[i])


def test_a_file_system_that_hangs(tmp_path: Path) -> None:
    """A pipe in an object's place: opening it hangs until somebody writes."""
    tier = stored(tmp_path)
    path = path_of(tmp_path, 2)
    path.unlink()
    os.mkfifo(path)
    buffers = Buffers(SPACE, 4)
    batch = empty(SPACE, KEYS, buffers=buffers)
    before = time.monotonic()
    with pytest.raises(TierTimeout):
        tier.read(batch, before + 0.2)
    assert time.monotonic() - before < 1.2
    buffers.scribble()
    after = buffers.snapshot()
    os.close(os.open(path, os.O_WRONLY))
    assert isinstance(tier, ObjectTier)
    until(lambda: tier._crew.left == 0, "the request that hung has ended")
    assert buffers.snapshot() == after
    tier.close()


def test_a_directory_that_was_unmounted_is_not_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    tier = stored(folder)
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    with pytest.raises(TierUnavailable, match="no longer the directory"):
        tier.write(filled(SPACE, KEYS), soon())
    assert list(folder.iterdir()) == []
    assert not tier.holds(SPACE, KEYS, soon()).any()
    tier.close()


def test_a_full_file_system(tmp_path: Path) -> None:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        tier = open_tier(parse_tier(f"file:{folder}"))
        keys = block_keys(SPACE, 0, 100)
        placed = tier.write(filled(SPACE, keys), soon())
        assert set(placed.tolist()) == {Placed.STORED, Placed.NO_ROOM}
        batch = empty(SPACE, keys)
        assert_right(batch, tier.read(batch, soon()), placed == Placed.STORED)
        tier.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_locations_that_are_none(tmp_path: Path) -> None:
    for location in ("", "relative", str(tmp_path / "missing")):
        with pytest.raises(ConfigError, match="create or mount it"):
            open_tier(parse_tier(f"file:{location}"))
