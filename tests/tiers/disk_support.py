"""What the disk tier's tests share: a small tier, chains in it, damage to its files, and system calls that fail."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.pool.copies import seal
from penstock.testing.tier_blocks import Buffers, block_keys, empty, filled, parents_of, tier_space, version_of
from penstock.tiers.base import Batch, BlockSpace, Found, Keys
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_device import System
from penstock.tiers.disk_format import HEADER_BYTES, ROW_BYTES

NEVER = float("inf")
SPACE = tier_space(0, 4, 1024)
"""Blocks of one page."""
ODD = tier_space(1, 13, 320)
"""Blocks of a page and 64 bytes: strides of two pages."""


def open_disk(
    folder: Path, size: str = "1060000", slab: str = "64K", system: System | None = None, **more: Any
) -> DiskTier:
    """A tier of 15 slabs of 16 pages each."""
    return DiskTier(folder, DiskOptions(size=size, slab=slab, keep_free="0", **more), system=system)


def chain(number: int, n: int, space: BlockSpace = SPACE) -> Keys:
    return block_keys(space, number, n)


def write(tier: DiskTier, keys: Keys, space: BlockSpace = SPACE, version: int = 0, first: int = 0) -> list[int]:
    """Write blocks `first` on of a chain; what became of them."""
    parents = parents_of(space, keys)
    batch = filled(space, keys[first:], version, parents=parents[first:])
    return [int(each) for each in tier.write(batch, NEVER)]


def holds(tier: DiskTier, keys: Keys, space: BlockSpace = SPACE) -> list[bool]:
    return [bool(each) for each in tier.holds(space, keys, NEVER)]


def read(tier: DiskTier, keys: Keys, space: BlockSpace = SPACE) -> list[int]:
    """Read blocks; what is found has the right bytes and root."""
    batch = empty(space, keys)
    found = tier.read(batch, NEVER)
    for i in np.flatnonzero(found == Found.HERE):
        assert version_of(batch, int(i), range(3)) is not None, f"block {i} is wrong"
    return [int(each) for each in found]


def read_verified(tier: DiskTier, keys: Keys, space: BlockSpace = SPACE) -> list[int]:
    """Read blocks as the tiers' caller does: one whose root does not fit its bytes counts as FAILED."""
    buffers = Buffers(space, len(keys))
    batch = empty(space, keys, buffers=buffers)
    found = tier.read(batch, NEVER)
    found[(found == Found.HERE) & (_roots(batch, buffers) != batch.roots)] = Found.FAILED
    for i in np.flatnonzero(found == Found.HERE):
        assert version_of(batch, int(i), range(3)) is not None, f"block {i} is wrong, and its root says it is right"
    return [int(each) for each in found]


def _roots(batch: Batch, buffers: Buffers) -> npt.NDArray[np.uint64]:
    space, n = batch.space, len(batch)
    tables = np.zeros((n, space.n_segments), np.uint64)
    at = tables.ctypes.data + np.arange(n, dtype=np.int64) * tables.strides[0]
    roots = np.zeros(n, np.uint64)
    segments = np.arange(space.n_segments, dtype=np.int64)
    keys = np.ascontiguousarray(batch.keys)
    seal(n, buffers.addresses, segments, space.segment_bytes, space.n_segments, at, keys, roots)
    return roots


# ---- files


def place_of(tier: DiskTier, key: npt.NDArray[np.uint64], space: BlockSpace = SPACE) -> tuple[Path, Path, int, int]:
    """(data file, rows file, slot, stride) of a block."""
    store = tier._store
    assert store is not None
    number = store.folder.find(space)
    assert number is not None
    slab, slot = store.index.slots.where(store.index.keys[number][key.tobytes()])
    name = tier._path / f"slab-{slab.number:06d}"
    return name.with_suffix(".data"), name.with_suffix(".rows"), slot, slab.stride


def change(path: Path, offset: int, with_byte: Callable[[int], int]) -> None:
    """Change one byte of a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([with_byte(byte)]))


def tear_row(path: Path, slot: int, byte: int = 20) -> None:
    """Flip a bit of a slot's row."""
    change(path, HEADER_BYTES + slot * ROW_BYTES + byte, lambda old: old ^ 4)


def consistent(tier: DiskTier) -> None:
    """What is known in memory does not contradict itself, and every row says what the keys say."""
    store = tier._store
    assert store is not None
    index = store.index
    index.brain.assert_consistent()
    known = {unit: (space, key) for space, keys in index.keys.items() for key, unit in keys.items()}
    rows = {}
    n_taken = 0
    for slab in index.slots.slabs:
        used = np.flatnonzero(slab.used())
        assert not slab.free[used].any()
        assert slab.n_free == slab.free.sum()
        assert not slab.free[slab.bad].any()
        empty_bad = [slot for slot in np.flatnonzero(slab.bad & ~slab.used()) if slab.base + slot not in index._ghosts]
        n_taken += slab.n_slots - slab.n_free - len(empty_bad)
        for slot in used.tolist():
            row = slab.rows[slot]
            rows[slab.base + slot] = (int(row["space"]), row["key"].tobytes())
    assert rows == known
    assert not index._pins
    assert n_taken == len(known) + len(index._ghosts), "a slot is lost"
    resident = set(np.flatnonzero(index.brain.facts.resident()).tolist())
    assert resident == known.keys() | index._ghosts.keys()


# ---- system calls that fail


class Faulty(System):
    """Fails where a test says so: `fail` gets the name of the call, its offset and its bytes, and raises or returns how
    many bytes may be moved (None: all of them)."""

    def __init__(self) -> None:
        self.fail: Callable[[str, int, int], int | None] = lambda name, offset, n: None
        self.calls: list[tuple[str, int, int]] = []

    def _ask(self, name: str, offset: int, n: int) -> int | None:
        self.calls.append((name, offset, n))
        return self.fail(name, offset, n)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        most = self._ask("preadv", offset, sum(memoryview(each).nbytes for each in buffers))
        return super().preadv(fd, buffers if most is None else cut(buffers, most), offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        most = self._ask("pwritev", offset, sum(memoryview(each).nbytes for each in buffers))
        return super().pwritev(fd, buffers if most is None else cut(buffers, most), offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        most = self._ask("pwrite", offset, len(data))
        return super().pwrite(fd, data if most is None else data[:most], offset)

    def fallocate(self, fd: int, n_bytes: int) -> None:
        self._ask("fallocate", 0, n_bytes)
        super().fallocate(fd, n_bytes)


def cut(buffers: Sequence[Any], most: int) -> list[Any]:
    """The first `most` bytes of the buffers."""
    short: list[Any] = []
    for each in buffers:
        part = np.frombuffer(each, np.uint8)[:most]
        short.append(part)
        most -= len(part)
        if not most:
            break
    return short


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


# ---- file systems of their own


@contextlib.contextmanager
def mounted(folder: Path, *how: str) -> Iterator[Path]:
    """`mount HOW folder`; skips the test visibly where that is not allowed."""
    import pytest

    folder.mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(["mount", *how, str(folder)], capture_output=True).returncode:
        pytest.skip(f"this user cannot mount {' '.join(how)}")
    try:
        yield folder
    finally:
        # Lazily: a test that failed has its tier open still.
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def small_ext4(folder: Path, size_bytes: int, *options: str) -> Iterator[Path]:
    """An ext4 of that size on a loop device."""
    import pytest

    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size_bytes)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mkfs.ext4 is not here")
    with mounted(folder / "mount", "-o", ",".join(["loop", *options]), str(image)) as mount:
        yield mount


NO_SPACE, IO_ERROR = errno.ENOSPC, errno.EIO
