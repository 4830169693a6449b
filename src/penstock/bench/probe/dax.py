"""A DAX device, mapped and read in place. Never written to: what lies on it is somebody's."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from penstock.bench.probe.base import CannotMeasure, Plan, Subject, Timing
from penstock.bench.probe.memory import read_timing
from penstock.profile import Direction

__all__ = ["DaxDevice"]

_SYSFS = Path("/sys/bus/dax/devices")
_ALIGN = 2 << 20
"""Devices are mapped in pieces of their alignment, which is at most this unless somebody chose 1 GiB pages."""


class DaxDevice(Subject):
    """A `/dev/dax*`, or a file that stands in for one."""

    directions = (Direction.READ,)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self.name = f"dax:{path}"
        self.notes.append("read only: what lies on a device is not overwritten to measure it")

    @contextmanager
    def opened(self, plan: Plan) -> Iterator[None]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CannotMeasure(f"{self._path} cannot be opened ({error.strerror}); allow this user to") from error
        try:
            span = min(_size(self._path, fd), -(-plan.memory_bytes // _ALIGN) * _ALIGN) // _ALIGN * _ALIGN
            if not span:
                raise CannotMeasure(f"{self._path} does not say its size, or is smaller than {_ALIGN >> 20} MiB")
            area = mmap.mmap(fd, span, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except OSError as error:
            raise CannotMeasure(f"{self._path} cannot be mapped ({error.strerror})") from error
        finally:
            os.close(fd)
        self._memory = np.frombuffer(area, np.uint8)
        try:
            self._memory[:: mmap.PAGESIZE].max()  # map every page
            yield
        finally:
            self._memory = np.empty(0, np.uint8)

    def time(self, direction: Direction, size: int, point_s: float) -> Timing | None:
        return read_timing(self._memory, size, point_s) if size <= len(self._memory) else None


def _size(path: Path, fd: int) -> int:
    try:
        return int((_SYSFS / path.name / "size").read_text())
    except (OSError, ValueError):
        return os.fstat(fd).st_size
