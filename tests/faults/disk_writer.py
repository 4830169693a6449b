"""A process that writes to a disk tier until it is killed, from outside at any moment or by itself within a call."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from penstock.tiers.base import Placed
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_device import System
from tests.tiers.disk_support import NEVER, ODD, SPACE, chain, cut, write

CHAIN, N_CHAINS = 12, 20
SPACES = (SPACE, ODD)


class Dying(System):
    """Moves half of the bytes of the call with that number, and kills its process."""

    def __init__(self, at: int) -> None:
        self._left = at

    def _dies(self) -> bool:
        self._left -= 1
        return self._left == 0

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if self._dies():
            whole = sum(memoryview(each).nbytes for each in buffers)
            super().pwritev(fd, cut(buffers, max(4096, whole // 2 // 4096 * 4096)), offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pwritev(fd, buffers, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if self._dies():
            super().pwrite(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pwrite(fd, data, offset)

    def fallocate(self, fd: int, n_bytes: int) -> None:
        super().fallocate(fd, n_bytes)
        if self._dies():
            os.kill(os.getpid(), signal.SIGKILL)


def options(size: str) -> DiskOptions:
    return DiskOptions(size=size, slab="64K", keep_free="0")


def life(folder: str, size: str, seed: int, dies_at: int, report: Connection) -> None:
    """Write, read and remove chains for ever; tell what is begun and what is done.

    `dies_at` is the number of the call in which it kills itself; 0 for never.
    """
    tier = DiskTier(Path(folder), options(size), system=Dying(dies_at) if dies_at else None)
    random = np.random.default_rng(seed)
    report.send(("open", 0, 0))
    while True:
        space, number = int(random.integers(len(SPACES))), int(random.integers(N_CHAINS))
        keys = chain(number, CHAIN, SPACES[space])
        if random.integers(4):
            report.send(("writing", space, number))
            placed = write(tier, keys, SPACES[space])
            if set(placed) <= {Placed.STORED, Placed.PRESENT}:
                report.send(("stored", space, number))
        else:
            report.send(("removing", space, number))
            tier.remove(SPACES[space], keys, NEVER)
            report.send(("removed", space, number))
