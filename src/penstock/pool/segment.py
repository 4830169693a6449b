"""A segment: the file that processes map, its header, and who may map what how.

Covers names and paths, creation, opening with every check that can be made before the first load, and the mappings.
Does not interpret slots, lanes or rings; the kernels do that.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
import time
import uuid as uuid_module
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, Damaged, FormatMismatch, NoPool, NoSpaceLeft, NotOurs
from penstock.pool import layout
from penstock.pool.backing import alignment_of, free_bytes, is_device, size_of
from penstock.pool.huge import allocate, map_for_huge_pages
from penstock.pool.layout import Geometry

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}\Z")
_HEADER_WORDS = (
    (layout.H_UNIT_BYTES, "unit_bytes"),
    (layout.H_SLAB_BYTES, "slab_bytes"),
    (layout.H_N_SLABS, "n_slabs"),
    (layout.H_N_LANES, "n_lanes"),
    (layout.H_LEASES, "leases"),
    (layout.H_RING, "ring"),
    (layout.H_MAX_SPACES, "max_spaces"),
)


def check_name(name: str) -> str:
    """The name itself if a pool can have it, else ConfigError."""
    if not _NAME.match(name):
        raise ConfigError(f"pool name {name!r}: use 1 to 40 letters, digits, '.', '_' or '-', a letter or digit first")
    return name


def default_path(name: str) -> Path:
    """Where a pool of this name lies unless a path is given: in shared memory, one namespace per user."""
    return Path("/dev/shm") / f"penstock-{os.geteuid()}-{check_name(name)}"


def lock_path(path: Path) -> Path:
    """The lock file beside a segment: byte 0 is the keeper's, byte 1 + k lane k's. It is never unlinked.

    A device's lies in shared memory, beside which no files belong.
    """
    if path.parent == Path("/dev"):
        return Path("/dev/shm") / f"penstock-{path.name}.lock"
    return path.with_name(path.name + ".lock")


@dataclass(slots=True)
class Mapping:
    """A mapped range of the segment. `array` keeps it mapped; so does every view made from it."""

    array: npt.NDArray[np.uint8]
    address: int


@dataclass(slots=True)
class Segment:
    """An open segment file and its checked header. The caller maps what it needs and closes the file."""

    path: Path
    fd: int
    geometry: Geometry
    uuid: bytes
    writes_back: bool = False
    """Whether the keeper writes back to memory what it publishes, for hosts that map it without coherence."""

    def map(self, offset: int, size: int, *, writable: bool, fork: bool = True) -> Mapping:
        """Map a range (page-aligned). Left out of core dumps; with fork=False also of forked children."""
        mapped, start = map_for_huge_pages(self.fd, offset, size, writable=writable)
        mapped.madvise(mmap.MADV_DONTDUMP)
        if not fork:
            mapped.madvise(mmap.MADV_DONTFORK)
        array = np.frombuffer(mapped, np.uint8)[start : start + size]
        array.flags.writeable = writable
        return Mapping(array, array.ctypes.data)

    def close(self) -> None:
        """Close the file; mappings stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def create(path: Path, geometry: Geometry, *, writes_back: bool = False) -> Segment:
    """Make a new segment. The caller holds the keeper's lock. `writes_back`: as in `Segment`, for good.

    Raises NoSpaceLeft if the file system or device cannot hold it, before anything is written. The tables are allocated
    here, the slabs later, piece by piece. What an interrupted creation left (a zero where the magic number belongs) is
    replaced. NotOurs for another user's file, Damaged for one that was never a segment, ConfigError for a device that
    is no memory.
    """
    check_room(path, geometry.total_bytes)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _check_replaceable(path, fd)
    except BaseException:
        os.close(fd)
        raise
    try:
        _make_tables(fd, geometry)
        identity = uuid_module.uuid4().bytes
        page = bytearray(layout.PAGE)
        for offset, field in _HEADER_WORDS:
            struct.pack_into("<Q", page, offset, getattr(geometry, field))
        struct.pack_into("<Q", page, layout.H_TOTAL_BYTES, geometry.total_bytes)
        struct.pack_into("<Q", page, layout.H_N_BUCKETS, geometry.n_buckets)
        struct.pack_into("<Q", page, layout.H_CREATED_MS, time.time_ns() // 1_000_000)
        struct.pack_into("<Q", page, layout.H_WRITES_BACK, int(writes_back))
        struct.pack_into("<Q", page, layout.H_VERSION, layout.FORMAT_VERSION)
        page[layout.H_UUID : layout.H_UUID + 16] = identity
        _write(fd, page, 0)
        # Last: a segment without it does not exist.
        _write(fd, struct.pack("<Q", layout.MAGIC), layout.H_MAGIC)
    except OSError as error:
        os.close(fd)
        raise NoSpaceLeft(f"{path}: {error.strerror}; ask for a smaller --size or another --path") from error
    return Segment(path, fd, geometry, identity, writes_back)


def _make_tables(fd: int, geometry: Geometry) -> None:
    """Everything before the data: allocated, and zero."""
    if not is_device(fd):
        page = alignment_of(fd)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, -(-geometry.total_bytes // page) * page)
        allocate(fd, 0, geometry.data_offset)
        return
    _write(fd, bytes(8), layout.H_MAGIC)
    for start in range(0, geometry.data_offset, layout.HUGE_PAGE):
        _write(fd, bytes(min(layout.HUGE_PAGE, geometry.data_offset - start)), start)


def _write(fd: int, data: bytes | bytearray, offset: int) -> None:
    if alignment_of(fd) == layout.PAGE:
        os.pwrite(fd, data, offset)
        return
    mapped, at = map_for_huge_pages(fd, offset, len(data), writable=True)
    with mapped:
        mapped[at : at + len(data)] = data


def _read(fd: int, size: int) -> bytes:
    """The first bytes; fewer where there are no more."""
    if not is_device(fd):
        return os.pread(fd, size, 0)
    mapped, at = map_for_huge_pages(fd, 0, size, writable=False)
    with mapped:
        return mapped[at : at + size]


def _check_replaceable(path: Path, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise NotOurs(f"{path} belongs to user {status.st_uid}; choose another --name or --path")
    usable = stat.S_ISREG(status.st_mode) or is_device(fd)
    if not usable or _read(fd, 8) not in (b"", bytes(8), struct.pack("<Q", layout.MAGIC)):
        raise Damaged(f"{path} is not a Penstock segment; remove (a device: clear) it or choose another --path")


def open_existing(path: Path, *, check_owner: bool = True, writable: bool = True) -> Segment:
    """Open a segment that is there; not to be written to unless `writable`.

    Raises NoPool, NotOurs, FormatMismatch or Damaged; the text names the remedy.
    """
    fd = _open_file(path, writable)
    try:
        return _checked(path, fd, check_owner)
    except BaseException:
        os.close(fd)
        raise


def exists(path: Path) -> bool:
    """Whether there is a completely created segment (of any version)."""
    try:
        fd = _open_file(path)
    except NoPool:
        return False
    try:
        return _read(fd, 8) == struct.pack("<Q", layout.MAGIC)
    finally:
        os.close(fd)


def delete(path: Path) -> None:
    """Remove a segment's file; a device is cleared so far that no segment is found on it."""
    if not path.is_char_device():
        path.unlink()
        return
    fd = _open_file(path)
    try:
        _write(fd, bytes(8), layout.H_MAGIC)
    finally:
        os.close(fd)


def _open_file(path: Path, writable: bool = True) -> int:
    try:
        return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise NoPool(f"no segment at {path}; start one with `penstock serve`") from error
    except PermissionError as error:
        raise NotOurs(f"{path} belongs to another user; choose another --name or --path") from error
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}; it is not a segment") from error


def _checked(path: Path, fd: int, check_owner: bool) -> Segment:
    status = os.fstat(fd)
    if check_owner and status.st_uid != os.geteuid():
        raise NotOurs(f"{path} belongs to user {status.st_uid}; choose another --name or --path")
    page = _read(fd, layout.PAGE)
    if len(page) < layout.PAGE:
        raise Damaged(f"{path} is shorter than a header; remove it with `penstock rm`")
    magic, version = struct.unpack_from("<QQ", page, 0)
    if magic != layout.MAGIC:
        raise Damaged(f"{path} is not a Penstock segment; remove it or choose another --path")
    if version != layout.FORMAT_VERSION:
        raise FormatMismatch(
            f"{path} has format {version}, this Penstock reads {layout.FORMAT_VERSION}; "
            "stop its keeper and remove it with `penstock rm`, or run the matching version"
        )
    geometry = Geometry(**{field: struct.unpack_from("<Q", page, offset)[0] for offset, field in _HEADER_WORDS})
    total, buckets = struct.unpack_from("<Q", page, layout.H_TOTAL_BYTES)[0], struct.unpack_from("<Q", page, 64)[0]
    if not _plausible(geometry, total, buckets):
        raise Damaged(f"{path}: the header contradicts itself; remove it with `penstock rm`")
    if (size := size_of(fd)) < total:
        raise Damaged(f"{path} has {size} of {total} bytes: it was truncated; remove it with `penstock rm`")
    (writes_back,) = struct.unpack_from("<Q", page, layout.H_WRITES_BACK)
    return Segment(path, fd, geometry, page[layout.H_UUID : layout.H_UUID + 16], bool(writes_back))


def _plausible(geometry: Geometry, total: int, buckets: int) -> bool:
    small_enough = all(0 < getattr(geometry, field) < 1 << 48 for _, field in _HEADER_WORDS)
    if not small_enough or geometry.unit_bytes < layout.PAGE or geometry.slab_bytes % geometry.unit_bytes:
        return False
    if geometry.n_slabs > 1 << 24 or geometry.n_units > 1 << 31 or geometry.ring & (geometry.ring - 1):
        return False
    return total == geometry.total_bytes and buckets == geometry.n_buckets


def check_room(path: Path, size_bytes: int) -> None:
    """Raise NoSpaceLeft, naming the remedy, if the file system of `path` cannot hold a file of this size, or the device
    there has less."""
    if path.is_char_device():
        if size_bytes > (size := device_bytes(path)):
            raise NoSpaceLeft(
                f"{path} has {size >> 20} MiB, the pool needs {size_bytes >> 20}; ask for a smaller --size"
            )
        return
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; give a --path whose folder exists")
    free = room_bytes(folder) + (path.stat().st_blocks * 512 if path.exists() else 0)
    if size_bytes > free:
        raise NoSpaceLeft(
            f"{folder} has room for {free >> 20} MiB, the pool needs {size_bytes >> 20} MiB. Ask for a smaller --size, "
            "give a --path on another file system, or enlarge it (`docker run --shm-size=...`, "
            "`mount -o remount,size=... /dev/shm`)."
        )


def room_bytes(folder: Path) -> int:
    """Bytes that the file system of a folder can still take."""
    return free_bytes(folder)


def device_bytes(path: Path) -> int:
    """The size of a DAX device. Raises ConfigError for other devices, NoPool and NotOurs."""
    fd = _open_file(path)
    try:
        return size_of(fd)
    finally:
        os.close(fd)
