"""A folder: reads and writes at random places of one file, past the page cache where the file system can.

The file has no name from the moment it exists (`O_TMPFILE`, or unlinked at once), so nothing is left behind, however
this process ends. One access at a time: a device that is faster with many in flight is not shown at its best below
some MiB. Writes are timed until the device took them, which with a write cache of its own is not until they are safe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from penstock.bench.probe.base import CannotMeasure, Plan, Subject, Timing, aligned, positions, sample
from penstock.config import memory_limit_bytes
from penstock.profile import Direction

__all__ = ["Directory"]

_SECTOR = 4096
"""What O_DIRECT wants of size, place and memory; some devices take 512."""
_PIECE = 1 << 20
_SHARE = 0.5
"""Of what is free in the file system."""
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


class Directory(Subject):
    """A folder, on whatever file system it is."""

    directions = (Direction.READ, Direction.WRITE)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.name = f"dir:{path}"

    @contextmanager
    def opened(self, plan: Plan) -> Iterator[None]:
        system = file_system(self._path)
        span = self._room(plan, system)
        with self._file() as file:
            self._fd, self._span = file.fileno(), span
            # Noise: some devices and file systems store zeros as nothing.
            area = aligned(max(plan.sizes[-1], _PIECE))
            area[:] = np.random.default_rng(5).integers(0, 256, len(area), np.uint8)
            self._buffer = memoryview(area.data)
            self._direct = self._set_direct(system)
            self._fill()
            yield

    def time(self, direction: Direction, size: int, point_s: float) -> Timing | None:
        if size > self._span or (self._direct and size % _SECTOR):
            return None
        spots = positions(self._span, size, seed=6, align=_SECTOR if self._direct else 64).tolist()
        piece, fd = self._buffer[:size], self._fd
        at = iter(_round_and_round(spots))
        move: Callable[[int, list[memoryview], int], int] = os.preadv if direction is Direction.READ else os.pwritev

        def call() -> None:
            if move(fd, [piece], next(at)) != size:
                raise OSError(errno.EIO, f"{size} bytes were not moved whole")

        try:
            return Timing(sample(call, point_s))
        except OSError as error:
            raise CannotMeasure(f"{direction} of {size} bytes failed ({error.strerror})") from error

    def _file(self) -> IO[bytes]:
        try:
            return tempfile.TemporaryFile(dir=self._path, prefix="penstock-probe-", buffering=0)
        except OSError as error:
            raise CannotMeasure(f"no file can be made in {self._path} ({error.strerror})") from error

    def _room(self, plan: Plan, system: str) -> int:
        """Bytes of the file: what the plan wants, half of what is free if that is less."""
        if not self._path.is_dir():
            raise CannotMeasure(f"{self._path} is no folder; make it, or name another with --dir")
        if not os.access(self._path, os.W_OK | os.X_OK):
            raise CannotMeasure(f"{self._path} may not be written to; choose another with --dir")
        status = os.statvfs(self._path)
        free = status.f_bavail * status.f_frsize
        if system in _IN_MEMORY:
            free = min(free, memory_limit_bytes())
        span = min(plan.file_bytes, int(free * _SHARE)) // _PIECE * _PIECE
        if not span:
            raise CannotMeasure(f"{self._path} has {free >> 20} MiB free, too little to measure in")
        if span < plan.file_bytes:
            self.notes.append(f"only {free >> 20} MiB are free: sizes over {span >> 20} MiB are left out")
        return span

    def _set_direct(self, system: str) -> bool:
        """Go past the page cache, and find out whether that works."""
        if system in _IN_MEMORY:
            self.notes.append(f"{system}: this is memory, through system calls")
            return False
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            os.pwritev(self._fd, [self._buffer[:_SECTOR]], 0)
        except OSError:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            self.notes.append(f"{system} has no O_DIRECT: this is the page cache, not the device")
            return False
        self.notes.append(f"{system}, O_DIRECT: sizes that are no multiple of {_SECTOR} bytes are left out")
        return True

    def _fill(self) -> None:
        """Write the whole file: a hole, or room that was only set aside, is read without a device."""
        try:
            for at in range(0, self._span, _PIECE):
                done = os.pwritev(self._fd, [self._buffer[:_PIECE]], at)
                if done != _PIECE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fdatasync(self._fd)
        except OSError as error:
            raise CannotMeasure(f"a file of {self._span >> 20} MiB cannot be written ({error.strerror})") from error


def file_system(path: Path) -> str:
    """What the folder's file system is called, "this file system" if that cannot be told."""
    try:
        device = os.stat(path).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "this file system"
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == wanted]
    return kinds[-1] if kinds else "this file system"


def _round_and_round(spots: list[int]) -> Iterator[int]:
    while True:
        yield from spots
