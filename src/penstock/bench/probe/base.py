"""What a thing that is measured looks like, and how one size of it is timed.

A subject is opened, timed in each of its directions at each size, and closed, whatever happens in between; what it took
(memory, files, blocks in a tier) is given back then. Does not cover which subjects there are (`targets.py`).
"""

from __future__ import annotations

import contextlib
import mmap
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.pool.layout import HUGE_PAGE
from penstock.profile import Direction

__all__ = ["CannotMeasure", "Plan", "Seconds", "Subject", "Timing", "aligned", "positions", "sample"]

Seconds = npt.NDArray[np.float64]
Offsets = npt.NDArray[np.int64]

_MOST_MEMORY = 1 << 30
_LEAST_FILE = 16 << 20
_LEAST = 5
"""Samples of a point, however long each takes: a median of fewer says little."""
_MOST = 20_000
_PATIENCE = 8
"""How many times its share of time a point may take to get its least samples; then it makes do with fewer."""


class CannotMeasure(Exception):
    """This subject cannot be measured here, or no further; the text says why, for the profile."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]
    """Ascending."""
    point_s: float
    """Time for one size in one direction."""
    cache_bytes: int
    """The last-level cache: memory that is read must not fit into it."""

    @property
    def memory_bytes(self) -> int:
        """What accesses to memory are spread over."""
        return max(2 * self.sizes[-1], min(4 * self.cache_bytes, _MOST_MEMORY))

    @property
    def file_bytes(self) -> int:
        """What accesses to a file are spread over."""
        return max(2 * self.sizes[-1], _LEAST_FILE)


@dataclass(frozen=True, slots=True)
class Timing:
    """One size in one direction: seconds of single accesses, and of calls that made `batch` of them at once."""

    single: Seconds
    batch: int = 1
    batches: Seconds | None = None
    """None: single accesses are all there is."""
    moves: bool = True
    """Whether bytes move at all."""


class Subject(ABC):
    """One tier, device, folder or memory to be measured."""

    name: str
    directions: tuple[Direction, ...]

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def opened(self, plan: Plan) -> AbstractContextManager[None]:
        """Take what is needed, and give all of it back at the end. Raises CannotMeasure."""

    @abstractmethod
    def time(self, direction: Direction, size: int, point_s: float) -> Timing | None:
        """Time accesses of `size` bytes for about `point_s`. None: it cannot take this size. Raises CannotMeasure."""


def sample(call: Callable[[], object], budget_s: float, *, least: int = _LEAST, warm: bool = True) -> Seconds:
    """Seconds of each of as many calls as fit into the budget; at least `least`, unless those take far longer."""
    if warm:
        call()
    taken: list[float] = []
    clock = time.perf_counter
    started = now = clock()
    while len(taken) < _MOST and (now - started < budget_s or len(taken) < least):
        before = clock()
        call()
        now = clock()
        taken.append(now - before)
        if now - started > _PATIENCE * budget_s:
            break
    return np.array(taken)


def positions(span: int, size: int, seed: int, align: int = 64) -> Offsets:
    """Where pieces of `size` bytes begin that do not overlap, in random order: what was touched last comes last."""
    step = -(-size // align) * align
    count = max(1, min(span // step, 1 << 18))
    stride = span // count // align * align
    return np.random.default_rng(seed).permutation(count).astype(np.int64) * max(step, stride)


def aligned(n_bytes: int, prepare: Callable[[int, int], None] | None = None) -> npt.NDArray[np.uint8]:
    """Anonymous memory, every page written, in huge pages where the system gives them. `prepare` gets (address, bytes)
    before that.

    That is how a pool lies in memory, and it matters to devices, too: to read 1 MiB into scattered pages of 4 KiB took
    one virtual disk five times as long.
    """
    size = -(-n_bytes // HUGE_PAGE) * HUGE_PAGE
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(area, np.uint8)
    skip = -whole.ctypes.data % HUGE_PAGE
    if prepare is not None:
        prepare(whole.ctypes.data + skip, size)
    whole[skip : skip + size] = 1
    return whole[skip : skip + n_bytes]
