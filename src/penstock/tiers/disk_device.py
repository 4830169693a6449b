"""Moving blocks between memory and slab files: neighbouring slots in one call, several calls at once.

Covers the system calls (`System`, which tests replace to inject faults), how a batch is cut into runs, short transfers,
and what became of each block. Does not cover which slots are used and what is recorded of them (`disk_store.py`).

O_DIRECT moves whole sectors, and a payload's memoryview ends with the block. The contract of `Batch.payloads` is that
the caller's memory goes on to the next multiple of 4096 and may be written, so a transfer always has the rounded
length: one call for many blocks, no copy. A bounce buffer for the last page would cost a second call for each block.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.tiers.disk_format import PAGE_BYTES

__all__ = ["DEPTH", "Lanes", "Run", "System", "cut_runs", "read_run", "whole_pages", "write_run"]

RUN_BYTES = 2 << 20
"""Bytes a call moves at most (a larger block goes alone). From here on a larger call was not faster (ext4 on a virtio
disk, 64 KiB to 4 MiB tried)."""
RUN_BLOCKS = 512
"""Below IOV_MAX, 1024."""
DEPTH = 4
"""Calls in flight for one batch. With 2 MiB a call, 2 reached the disk's speed, and 8 gave no more than 4."""


class System:
    """The system calls that touch blocks and rows; a test's subclass makes them fail."""

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """As os.preadv."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """As os.pwritev."""
        return os.pwritev(fd, buffers, offset)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """As os.pwrite; for rows."""
        return os.pwrite(fd, data, offset)

    def fallocate(self, fd: int, n_bytes: int) -> None:
        """Make a file of n_bytes whose blocks are the file's own."""
        os.posix_fallocate(fd, 0, n_bytes)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots of one slab file, and the blocks of the batch that belong there."""

    fd: int
    offset: int
    length: int
    """Bytes of a slot."""
    places: list[int]
    """Numbers in the batch, in the order of the slots."""


def cut_runs(fd: int, stride: int, slots: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> list[Run]:
    """Cut (slot, place) pairs, sorted by slot, into runs of neighbours."""
    most = max(1, min(RUN_BLOCKS, RUN_BYTES // stride))
    edges = [*np.flatnonzero(np.diff(slots, prepend=-2) != 1).tolist(), len(slots)]
    runs: list[Run] = []
    for start, stop in pairwise(edges):
        for first in range(start, stop, most):
            mine = places[first : min(first + most, stop)].tolist()
            runs.append(Run(fd, int(slots[first]) * stride, stride, mine))
    return runs


def whole_pages(payload: memoryview) -> Any:
    """The payload's memory up to the next multiple of 4096, as a buffer."""
    n_bytes = payload.nbytes
    if n_bytes % PAGE_BYTES == 0:
        return payload
    address = np.frombuffer(payload, np.uint8).ctypes.data
    return (ctypes.c_char * (n_bytes + -n_bytes % PAGE_BYTES)).from_address(address)


class Lanes:
    """A few threads that help callers with their runs. A caller works as well, so it never waits for a free thread."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        # Room for two batches at once: a read must not queue behind a write.
        self._pool = ThreadPoolExecutor(2 * (depth - 1), thread_name_prefix="penstock-disk")
        self._lock = threading.Lock()

    def each(self, work: Callable[[Run], None], runs: list[Run]) -> None:
        """Call `work` on every run, up to the depth at once; returns when all are done. `work` must not raise."""
        if len(runs) < 2:
            for run in runs:
                work(run)
            return
        left = iter(runs)

        def drain() -> None:
            while True:
                with self._lock:
                    run = next(left, None)
                if run is None:
                    return
                work(run)

        helpers = [self._pool.submit(drain) for _ in range(min(self._depth, len(runs)) - 1)]
        drain()
        wait(helpers)

    def close(self) -> None:
        """End the threads; nothing may be running."""
        self._pool.shutdown()


def read_run(system: System, run: Run, payloads: list[memoryview]) -> list[int]:
    """Fill the run's payloads. Returns an errno for each block: 0 it is there, ENODATA the file ended before it did."""
    return _transfer(system.preadv, run, payloads, errno.ENODATA)


def write_run(system: System, run: Run, payloads: list[memoryview]) -> list[int]:
    """Write the run's payloads. Returns an errno for each block: 0 it is written, EIO the device took no more."""
    return _transfer(system.pwritev, run, payloads, errno.EIO)


def _transfer(
    call: Callable[[int, Sequence[Any], int], int], run: Run, payloads: list[memoryview], at_end: int
) -> list[int]:
    buffers = [whole_pages(payloads[place]) for place in run.places]
    done, code = _all_of(call, run.fd, buffers, run.offset, run.length)
    whole = done // run.length
    if not code:
        return [0] * whole + [at_end] * (len(buffers) - whole)
    # One bad sector must not cost its neighbours: what is left goes block by block.
    codes = [0] * whole
    for i in range(whole, len(buffers)):
        if len(buffers) > 1:
            done, code = _all_of(call, run.fd, buffers[i : i + 1], run.offset + i * run.length, run.length)
        codes.append(code or (0 if done == run.length else at_end))
    return codes


def _all_of(
    call: Callable[[int, Sequence[Any], int], int], fd: int, buffers: list[Any], offset: int, length: int
) -> tuple[int, int]:
    """(bytes moved, errno): go on after short transfers until all is done, nothing moves or an error ends it."""
    done, total = 0, len(buffers) * length
    while done < total:
        # O_DIRECT goes on at a whole page only; what came of the page before is moved again.
        done -= done % PAGE_BYTES
        first, skip = divmod(done, length)
        left = buffers[first:]
        if skip:
            left[0] = np.frombuffer(left[0], np.uint8)[skip:]
        try:
            moved = call(fd, left, offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            return done, error.errno or errno.EIO
        if moved < PAGE_BYTES and moved < total - done:
            # The end of a file that was cut, or a device that is full.
            return done + moved, 0
        done += moved
    return done, 0
