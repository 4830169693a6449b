"""Memory of each NUMA node: copies by one thread, and reads whose addresses depend on what was read before.

Pages are bound to the node with `mbind(2)` where that is allowed. The thread stays where the scheduler puts it: the
figures are those of this process as it may run, not of the node's own processors.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penstock.bench.probe.base import CannotMeasure, Plan, Subject, Timing, aligned, positions, sample
from penstock.config import memory_limit_bytes
from penstock.pool.layout import PAGE
from penstock.profile import Direction

__all__ = ["MemoryNode", "last_level_cache_bytes", "nodes", "read_timing"]

_NODES = Path("/sys/devices/system/node")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MBIND = {"x86_64": 237, "aarch64": 235}
"""System call numbers: libnuma is seldom installed."""
_MPOL_BIND = 2
_MASK_WORDS = 16
_RUN_BYTES = 256 << 10
_RUN_PIECES = 1024
_COPY_LEAST = 256
"""The smallest segment that the pool's copy loop takes."""
_UNKNOWN_CACHE = 32 << 20


class MemoryNode(Subject):
    """The memory of one NUMA node; None: of wherever the system puts it."""

    directions = (Direction.READ, Direction.COPY, Direction.COPYTO)

    def __init__(self, node: int | None) -> None:
        super().__init__()
        self._node = node
        self.name = "memory" if node is None else f"memory:node{node}"

    @contextmanager
    def opened(self, plan: Plan) -> Iterator[None]:
        span = min(plan.memory_bytes, memory_limit_bytes() // 4) // PAGE * PAGE
        if span < plan.sizes[0]:
            raise CannotMeasure("too little memory is free; end something and probe again")
        bind = None if self._node is None else functools.partial(_bind, self._node)
        self._source, self._target = aligned(span, bind), aligned(span, bind)
        try:
            yield
        finally:
            # A traceback may still refer to their bytes: they go with the last reference.
            self._source = self._target = np.empty(0, np.uint8)

    def time(self, direction: Direction, size: int, point_s: float) -> Timing | None:
        if size > len(self._source):
            return None
        if direction is Direction.READ:
            return read_timing(self._source, size, point_s)
        return self._copy(size, point_s) if direction is Direction.COPY else self._copyto(size, point_s)

    def _copy(self, size: int, point_s: float) -> Timing | None:
        """The pool's loop, as a gather of slots into an engine's pages."""
        if size < _COPY_LEAST:
            return None
        from penstock.pool.copies import gather

        spots = positions(len(self._source), size, seed=1)
        run = min(_run_of(size), len(spots))
        starts, pages = self._source.ctypes.data + spots, np.arange(len(spots), dtype=np.int64)
        np.random.default_rng(2).shuffle(pages)
        first, target = np.zeros(1, np.int64), np.array([self._target.ctypes.data])
        turn = _Turns(len(spots), run)

        def call() -> None:
            now = turn.next()
            gather(run, starts[now], first, target, pages[now], size, 1, 0, size, True)

        return Timing(sample(call, point_s) / run)

    def _copyto(self, size: int, point_s: float) -> Timing:
        # An array object for each piece: more than these would themselves not fit into the cache.
        spots = positions(len(self._source), size, seed=3)[: 8 * _RUN_PIECES].tolist()
        pairs = [(self._target[at : at + size], self._source[at : at + size]) for at in spots]
        turn = _Turns(len(pairs), min(_run_of(size), len(pairs)))

        def call() -> None:
            for target, source in pairs[turn.next()]:
                np.copyto(target, source)

        return Timing(sample(call, point_s) / turn.length)


def _bind(node: int, address: int, size: int) -> None:
    """Have the pages there come from this node. Raises CannotMeasure where others could be meant."""
    mask = (ctypes.c_ulong * _MASK_WORDS)()
    mask[node // 64] = 1 << node % 64
    number = _MBIND.get(platform.machine())
    args = (
        ctypes.c_void_p(address),
        ctypes.c_ulong(size),
        ctypes.c_int(_MPOL_BIND),
        mask,
        ctypes.c_ulong(len(mask) * 64),
    )
    if number is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(ctypes.c_long(number), *args, ctypes.c_uint(0)) == 0:
            return
    if len(nodes()) > 1:  # else all memory is this node's anyway
        why = os.strerror(ctypes.get_errno()) if number else "its call is not known on this processor"
        raise CannotMeasure(f"memory cannot be bound to node {node} ({why}); allow mbind (CAP_SYS_NICE)")


class _Turns:
    """Slices of `length` out of `count`, one after the other, from the start again at the end."""

    def __init__(self, count: int, length: int) -> None:
        self.length, self._count, self._at = length, count, -length

    def next(self) -> slice:
        self._at += self.length
        if self._at + self.length > self._count:
            self._at = 0
        return slice(self._at, self._at + self.length)


def read_timing(memory: npt.NDArray[np.uint8], size: int, point_s: float) -> Timing:
    """Dependent reads of whole pieces at random places. Of short ones, a sample is the mean of a run."""
    from penstock.bench.probe.loops import read_pieces

    spots = positions(len(memory), size, seed=4)
    turn = _Turns(len(spots), min(_run_of(size), len(spots)))
    base = memory.ctypes.data

    def call() -> None:
        read_pieces(base, spots[turn.next()], size, 0)

    return Timing(sample(call, point_s) / turn.length)


def nodes() -> list[int | None]:
    """Every NUMA node that has memory; [None] where the system names none."""
    try:
        text = (_NODES / "has_memory").read_text().strip()
    except OSError:
        return [None]
    found: list[int | None] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found or [None]


def last_level_cache_bytes() -> int:
    """The largest cache of the first processor."""
    sizes = [0]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes) or _UNKNOWN_CACHE


def _run_of(size: int) -> int:
    """Pieces of one timed run: enough that the clock and the call cost next to nothing."""
    return max(1, min(_RUN_PIECES, _RUN_BYTES // size))
