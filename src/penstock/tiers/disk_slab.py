"""One slab: a preallocated file of equal slots, and the rows that say what is in them.

Covers opening, laying out and closing a slab's two files, its rows in memory, and writing rows back. Rows are kept in
private memory and written with pwrite, not mapped: a mapped file that somebody cuts short is a SIGBUS.

The rows in memory are what the rows on disk shall be. `flush` copies a range of them to disk, one flush at a time, so
that the disk never goes back to an older state; whoever changes rows calls it afterwards. Does not cover which rows may
be changed when (`disk_store.py`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penstock.tiers.disk_device import System
from penstock.tiers.disk_files import open_file
from penstock.tiers.disk_format import (
    HEADER_BYTES,
    MAX_STAMP,
    ROW_BYTES,
    ROW_USED,
    Header,
    check_rows,
    data_name,
    pack_header,
    row_dtype,
    rows_name,
    unpack_header,
)

__all__ = ["Slab", "create_slab", "load_slab", "open_data", "remove_slab_files", "slab_files_bytes"]


class Slab:
    """An open slab. All attributes but the files are guarded by the store's lock."""

    def __init__(self, header: Header, data_fd: int, rows_fd: int, rows: npt.NDArray[np.void], data_bytes: int) -> None:
        self.header = header
        self.number = header.slab
        self.stride = header.stride
        self.n_slots = header.n_slots
        self.data_fd = data_fd
        self.rows_fd = rows_fd
        self.data_bytes = data_bytes
        self.rows = rows
        """(n_slots,) of row_dtype."""
        self.words = rows.view(np.uint64).reshape(self.n_slots, ROW_BYTES // 8)
        self.free = np.zeros(self.n_slots, bool)
        """Slots that may be given to a writer."""
        self.n_free = 0
        self.bad = np.zeros(self.n_slots, bool)
        """Slots that the device could not read; they stay empty while this slab is open."""
        self.clean = np.zeros(self.n_slots, bool)
        """Slots whose row on disk is known to say free; any other is cleared there before its slot is overwritten."""
        self.base = -1
        """The number of its first unit, in the index."""
        self.slot_class = -1
        self.users = 0
        """Calls that may be using the descriptors."""
        self.retired = False
        self._flushing = threading.Lock()

    def used(self) -> npt.NDArray[np.bool_]:
        """(n_slots,), a new array: which rows hold a block."""
        found: npt.NDArray[np.bool_] = self.rows["state"] == ROW_USED
        return found

    def seal(self, slots: npt.NDArray[np.int64]) -> None:
        """Recompute the checks of these rows, in memory."""
        self.rows["check"][slots] = check_rows(self.words[slots], self.header.life, slots)

    def drop_torn(self) -> int:
        """Clear, in memory, every row that is not free and fails its check, or cannot be. Returns how many."""
        filled = np.flatnonzero(self.words.any(axis=1))
        good = self.rows["check"][filled] == check_rows(self.words[filled], self.header.life, filled)
        # Tampered with rather than torn: no tier counts that far.
        good &= self.rows["stamp"][filled] <= MAX_STAMP
        bad = filled[~(good & (self.rows["state"][filled] == ROW_USED))]
        self.words[bad] = 0
        self.clean = ~self.used()
        self.clean[bad] = False
        return len(bad)

    def drop_beyond(self, size: int) -> int:
        """Clear, in memory, the rows of slots that do not end within `size` bytes. Returns how many."""
        used = np.flatnonzero(self.used())
        beyond = used[(used + 1) * self.stride > size]
        self.words[beyond] = 0
        return len(beyond)

    def release_all(self) -> None:
        """Make every slot without a row free."""
        self.free = ~self.used()
        self.n_free = int(self.free.sum())

    def flush(self, system: System, lock: threading.Lock, first: int, stop: int) -> None:
        """Write rows first to stop - 1 to disk. Raises OSError; the disk then holds old or new rows, or torn ones."""
        with self._flushing:
            with lock:
                data = self.rows[first:stop].tobytes()
                empty = self.rows["state"][first:stop] == 0
                self.clean[first:stop] = False
            offset, left = HEADER_BYTES + first * ROW_BYTES, memoryview(data)
            while left:
                n = system.pwrite(self.rows_fd, left, offset)
                if n <= 0:
                    raise OSError(errno.EIO, "rows were not written")
                offset, left = offset + n, left[n:]
            with lock:
                self.clean[first:stop] = empty

    def vanished(self) -> bool:
        """Whether one of its files was deleted."""
        return os.fstat(self.data_fd).st_nlink == 0 or os.fstat(self.rows_fd).st_nlink == 0

    def close(self) -> None:
        """Close the files; nobody may be using them."""
        for fd in (self.data_fd, self.rows_fd):
            os.close(fd)


def open_data(path: Path, direct: bool) -> int:
    """Open a slab's data file, past the page cache if `direct`. Raises OSError."""
    return open_file(path, os.O_RDWR | (os.O_DIRECT if direct else 0))


def create_slab(system: System, folder: Path, header: Header, data_bytes: int, direct: bool) -> Slab:
    """Lay a slab out: its data file gets at least `data_bytes` bytes, its rows are all free.

    An old slab of that number must hold nothing that is still wanted: its rows file is replaced in one step, so that a
    kill leaves the old rows or the new ones. Raises OSError; what was there before is then as it was.
    """
    data_path, rows_path = folder / data_name(header.slab), folder / rows_name(header.slab)
    new_rows = rows_path.with_suffix(".rows.new")
    fds: list[int] = []
    was_there = data_path.exists()
    try:
        fds.append(open_file(data_path, os.O_RDWR | os.O_CREAT))
        if os.fstat(fds[0]).st_size < data_bytes:
            system.fallocate(fds[0], data_bytes)
        size = os.fstat(fds[0]).st_size
        fds.append(open_file(new_rows, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        system.fallocate(fds[1], HEADER_BYTES + header.n_slots * ROW_BYTES)
        system.pwrite(fds[1], pack_header(header), 0)
        data_fd = open_data(data_path, direct)
        os.close(fds[0])
        fds[0] = data_fd
        new_rows.rename(rows_path)
    except OSError:
        _close(fds)
        for path in (new_rows,) if was_there else (new_rows, data_path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    slab = Slab(header, fds[0], fds[1], np.zeros(header.n_slots, row_dtype), size)
    slab.clean[:] = True
    return slab


def load_slab(folder: Path, number: int, salt: int, direct: bool) -> tuple[Slab | None, int, int]:
    """Open a slab that is on disk: (slab, torn rows, rows beyond the data's end). Such rows are cleared in memory.

    The slab is None if its data is gone, or it has no index that belongs to this store: it is then to be laid out anew.
    Raises OSError.
    """
    fds: list[int] = []
    try:
        with contextlib.suppress(FileNotFoundError):
            fds.append(open_file(folder / rows_name(number), os.O_RDWR))
            header = unpack_header(_read(fds[0], 0, HEADER_BYTES))
            if header is not None and header.slab == number and header.salt == salt and _has_rows(fds[0], header):
                return _load(folder, header, fds, direct)
    except BaseException:
        _close(fds)
        raise
    _close(fds)
    return None, 0, 0


def _has_rows(fd: int, header: Header) -> bool:
    return os.fstat(fd).st_size >= HEADER_BYTES + header.n_slots * ROW_BYTES


def _load(folder: Path, header: Header, fds: list[int], direct: bool) -> tuple[Slab | None, int, int]:
    content = _read(fds[0], HEADER_BYTES, header.n_slots * ROW_BYTES)
    rows = np.zeros(header.n_slots, row_dtype)
    held = len(content) // ROW_BYTES
    rows[:held] = np.frombuffer(content, row_dtype, held)
    path = folder / data_name(header.slab)
    if not path.exists():
        _close(fds)
        return None, 0, int((rows["state"] == ROW_USED).sum())
    fds.append(open_data(path, direct))
    size = os.fstat(fds[1]).st_size
    slab = Slab(header, fds[1], fds[0], rows, size)
    torn = slab.drop_torn()
    return slab, torn, slab.drop_beyond(size)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _read(fd: int, offset: int, most: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        file.seek(offset)
        return file.read(most)


def slab_files_bytes(folder: Path, number: int) -> int:
    """What a slab's files take, as far as that can be known."""
    taken = 0
    for name in (rows_name(number), data_name(number)):
        with contextlib.suppress(OSError):
            taken += (folder / name).stat(follow_symlinks=False).st_size
    return taken


def remove_slab_files(folder: Path, number: int) -> None:
    """Delete a slab's files, the rows first. Those that are not there, or cannot be deleted, are left."""
    for name in (rows_name(number), data_name(number)):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
