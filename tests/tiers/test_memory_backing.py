"""What a second memory may lie on: hugetlbfs, really mounted, and the rules of DAX devices as far as they can be had.

No machine that runs this has a DAX device: its sizes and alignment come from a sysfs made here, and a file stands in
for its memory. That the kernel maps one is not shown.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from penstock.errors import ConfigError, Damaged, NoSpaceLeft
from penstock.pool import backing, huge
from penstock.pool import segment as segments
from penstock.pool.layout import HUGE_PAGE, MIB, PAGE, plan_geometry
from penstock.testing.tier_blocks import assert_right, block_keys, empty, filled, tier_space
from penstock.tiers import registry
from tests.support import Keeper

PAGES = 16
SIZE = 24 * MIB
COUNT = Path("/proc/sys/vm/nr_hugepages")
GEOMETRY = plan_geometry(SIZE, unit_bytes=4096, slab_bytes=MIB, n_lanes=4)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs and pages for it; what was before is put back."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    before = int(COUNT.read_text())
    done = subprocess.run(["mount", "-t", "hugetlbfs", "none", str(tmp_path)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"hugetlbfs cannot be mounted here: {done.stderr.decode()}")
    try:
        COUNT.write_text(str(before + PAGES))
        if int(COUNT.read_text()) < before + PAGES:
            pytest.skip("no huge pages to be had")
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
        COUNT.write_text(str(before))


def test_a_tier_on_hugetlbfs(mounted: Path) -> None:
    """Lanes and tables lie at offsets that such a file does not map by themselves."""
    space = tier_space(0, 8, 8192)
    keys = block_keys(space, 0, 60)
    path = mounted / "segment"
    keeper = Keeper(GEOMETRY, path=path)
    free = backing.free_bytes(mounted)
    with keeper:
        tier = registry.open_tier(registry.parse_tier(f"memory:{path}?pool={keeper.name}"))
        assert set(tier.write(filled(space, keys), time.monotonic() + 30).tolist()) == {0}
        batch = empty(space, keys)
        assert_right(batch, tier.read(batch, time.monotonic() + 30))
        assert free - backing.free_bytes(mounted) >= GEOMETRY.total_bytes
        assert path.stat().st_size % HUGE_PAGE == 0
        keeper.fsck()
        keeper.stop()
        keeper.start()  # takes over what is there
        batch = empty(space, keys)
        assert_right(batch, tier.read(batch, time.monotonic() + 30))
        tier.close()


def test_too_few_huge_pages(mounted: Path) -> None:
    large = plan_geometry(PAGES * HUGE_PAGE + backing.free_bytes(mounted))
    with pytest.raises(NoSpaceLeft, match="room for"):
        segments.create(mounted / "large", large)
    assert not (mounted / "large").exists()


def test_ordinary_files_are_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert (backing.size_of(fd), backing.alignment_of(fd), backing.is_device(fd)) == (100, PAGE, False)
    finally:
        os.close(fd)
    status = os.statvfs(tmp_path)
    assert abs(backing.free_bytes(tmp_path) - status.f_bavail * status.f_frsize) < 1 << 30


def test_a_device_that_is_no_memory() -> None:
    with pytest.raises(ConfigError, match="not a DAX device"):
        segments.create(Path("/dev/zero"), GEOMETRY)
    with pytest.raises(ConfigError, match="not a DAX device"):
        segments.exists(Path("/dev/zero"))


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A file of 32 MiB, full of what was there before, that is taken for a DAX device which maps in 2 MiB."""
    path = tmp_path / "dax0.0"
    path.write_bytes(b"\0" * PAGE + b"old" * (10 * MIB))
    os.truncate(path, 32 * MIB)
    number = path.stat().st_rdev
    folder = tmp_path / "sys" / f"{os.major(number)}:{os.minor(number)}"
    folder.mkdir(parents=True)
    (tmp_path / "bus" / "dax").mkdir(parents=True)
    (folder / "subsystem").symlink_to(tmp_path / "bus" / "dax")
    (folder / "size").write_text(f"{32 * MIB}\n")
    (folder / "align").write_text(f"{HUGE_PAGE}\n")

    def refuse(*_: object) -> None:
        raise OSError("a device has neither")

    with (
        mock.patch.object(backing, "_DEVICES", tmp_path / "sys"),
        mock.patch.object(Path, "is_char_device", lambda self: self == path),
        mock.patch.object(os, "ftruncate", refuse),
        mock.patch.object(os, "posix_fallocate", refuse),
        mock.patch.object(os, "pwrite", refuse),
        mock.patch.object(os, "pread", refuse),
    ):
        for module in (backing, huge, segments):
            patch = mock.patch.object(module, "is_device", lambda fd: os.path.samestat(os.fstat(fd), path.stat()))
            patch.start()
        yield path
        mock.patch.stopall()


def test_a_segment_on_a_device(device: Path) -> None:
    """Made without allocation or write calls; its tables are zero whatever was there; it is found, and cleared."""
    assert not segments.exists(device)
    segments.create(device, GEOMETRY).close()
    segment = segments.open_existing(device)
    assert segment.geometry == GEOMETRY
    tables = segment.map(PAGE, GEOMETRY.data_offset - PAGE, writable=False)
    assert not tables.array.any()
    lane = segment.map(GEOMETRY.lanes_offset + GEOMETRY.lane_bytes, GEOMETRY.lane_bytes, writable=True, fork=False)
    lane.array[:] = 7
    assert np.count_nonzero(tables.array) == GEOMETRY.lane_bytes
    segment.close()
    segments.delete(device)
    assert device.exists()
    assert not segments.exists(device)


def test_a_device_that_is_too_small(device: Path) -> None:
    with pytest.raises(NoSpaceLeft, match="has 32 MiB"):
        segments.create(device, plan_geometry(64 * MIB))


def test_a_device_that_holds_something_else(device: Path) -> None:
    data = device.read_bytes()
    device.write_bytes(b"somebody's data " + data[16:])
    with pytest.raises(Damaged, match="clear"):
        segments.create(device, GEOMETRY)


def test_locks_of_devices_lie_in_shared_memory() -> None:
    assert segments.lock_path(Path("/dev/dax1.0")) == Path("/dev/shm/penstock-dax1.0.lock")
    assert segments.lock_path(Path("/dev/shm/a")) == Path("/dev/shm/a.lock")
