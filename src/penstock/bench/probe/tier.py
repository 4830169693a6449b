"""A tier of blocks, through its own interface: one block for latency, a run of a chain for bandwidth.

What is written belongs to a space that nobody else has, and is removed at the end. A tier that is full makes room for
it, as for any other block: what it evicts for a probe is gone. What comes back is compared, so that a tier that answers
quickly and wrongly gets no figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from penstock.bench.probe.base import CannotMeasure, Plan, Seconds, Subject, Timing, aligned, sample
from penstock.errors import PenstockError, TierError
from penstock.pool.layout import PAGE
from penstock.profile import Direction
from penstock.tiers.base import Batch, BlockSpace, Found, Placed
from penstock.tiers.registry import TierConfig, open_tier

__all__ = ["TierSubject"]

_RUN_BLOCKS = 32
_RUN_BYTES = 32 << 20
_CALL_S = 30.0
"""Deadline of a call. A store that is slower than this is not worth a figure."""
_MOST_BYTES = 512 << 20
"""What one size in one direction may write: disks wear and stores have room for more than a probe."""
_SHARE = 8
"""What may lie in a tier at a time, as a part of its capacity."""


class TierSubject(Subject):
    """A tier by its configuration."""

    directions = (Direction.WRITE, Direction.READ, Direction.HOLDS)

    def __init__(self, config: TierConfig) -> None:
        super().__init__()
        self._config = config
        self.name = f"{config.scheme}:{config.location}"

    @contextmanager
    def opened(self, plan: Plan) -> Iterator[None]:
        try:
            self._tier = open_tier(self._config)
        except PenstockError as error:
            raise CannotMeasure(str(error)) from error
        self._blocks: _Blocks | None = None
        try:
            capacity = self._tier.usage().capacity_bytes
            self._room = min(_RUN_BYTES, capacity // _SHARE) if capacity else _RUN_BYTES
            yield
        finally:
            try:
                self._leave()
            finally:
                self._tier.close()

    def time(self, direction: Direction, size: int, point_s: float) -> Timing | None:
        try:
            if direction is Direction.WRITE:
                return self._write(size, point_s)
            blocks = self._blocks
            if blocks is None or blocks.space.block_bytes != size:
                return None  # it did not take them
            return self._read(blocks, point_s) if direction is Direction.READ else self._holds(blocks, point_s)
        except TierError as error:
            raise CannotMeasure(f"{direction} of {size} bytes: {error}") from error

    def _write(self, size: int, point_s: float) -> Timing | None:
        self._leave()
        count = max(1, min(_RUN_BLOCKS, self._room // size))
        blocks = self._blocks = _Blocks(size, count)
        if not self._taken(blocks.batch):
            self._leave()
            self.notes.append(f"it does not take blocks of {size} bytes")
            return None
        most = max(1, _MOST_BYTES // (2 * size))
        single = _repeated(lambda: self._rewrite(blocks, 1), point_s / 2, most)
        batches = _repeated(lambda: self._rewrite(blocks, count), point_s / 2, max(1, most // count))
        if single is None or batches is None:
            self._leave()
            self.notes.append(f"it took some blocks of {size} bytes, and then no more")
            return None
        return Timing(single, count, batches)

    def _rewrite(self, blocks: _Blocks, count: int) -> float | None:
        """Write `count` new blocks in place of the last ones; only the write is timed. None: they were not taken."""
        self._remove(blocks)
        batch = blocks.fresh().part(0, count)
        started = time.perf_counter()
        placed = self._tier.write(batch, _deadline())
        took = time.perf_counter() - started
        return took if bool((placed == Placed.STORED).all()) else None

    def _read(self, blocks: _Blocks, point_s: float) -> Timing:
        count = len(blocks.batch)
        self._verify(blocks)
        turn = iter(_turns(count))

        def one() -> None:
            at = next(turn)
            self._expect_here(blocks.back.part(at, at + 1))

        single = sample(one, point_s / 2)
        return Timing(single, count, sample(lambda: self._expect_here(blocks.back), point_s / 2))

    def _holds(self, blocks: _Blocks, point_s: float) -> Timing:
        def ask(count: int) -> Callable[[], None]:
            keys = blocks.batch.keys[:count]

            def call() -> None:
                if not self._tier.holds(blocks.space, keys, _deadline()).all():
                    raise CannotMeasure("it does not hold what was just stored; is it too small, or shared and full?")

            return call

        count = len(blocks.batch)
        return Timing(sample(ask(1), point_s / 2), count, sample(ask(count), point_s / 2), moves=False)

    def _taken(self, batch: Batch) -> bool:
        placed = self._tier.write(batch, _deadline())
        return bool(((placed == Placed.STORED) | (placed == Placed.PRESENT)).all())

    def _verify(self, blocks: _Blocks) -> None:
        """Read all of them once and compare."""
        blocks.forget()
        self._expect_here(blocks.back)
        if not blocks.agree():
            raise CannotMeasure("it returned other bytes than were stored")

    def _expect_here(self, batch: Batch) -> None:
        found = self._tier.read(batch, _deadline())
        if not (found == Found.HERE).all():
            worst = Found(int(found.max()))
            raise CannotMeasure(f"a block that was just stored is {worst.name}; is it too small, or shared and full?")

    def _remove(self, blocks: _Blocks) -> None:
        self._tier.remove(blocks.space, blocks.batch.keys, _deadline())

    def _leave(self) -> None:
        """Take what was stored out again."""
        if self._blocks is not None:
            try:
                self._remove(self._blocks)
            except PenstockError as error:
                self.notes.append(f"what was stored could not be removed ({error})")
            self._blocks = None


class _Blocks:
    """A chain of blocks of one size, what to write and where to read to."""

    def __init__(self, size: int, count: int) -> None:
        digest, root = os.urandom(32), os.urandom(16)
        self.space = BlockSpace(digest, root, size, 16, 1, size, "penstock probe")
        self._size, self._count = size, count
        self._out, self._in = (_buffers(size, count) for _ in range(2))
        noise = np.random.default_rng(8)
        for buffer in self._out:
            np.frombuffer(buffer, np.uint8)[:] = noise.integers(0, 256, size, np.uint8)
        self.fresh()

    def fresh(self) -> Batch:
        """New keys over the same bytes."""
        keys = np.frombuffer(os.urandom(16 * self._count), np.uint64).reshape(-1, 2)
        parents = np.vstack([np.frombuffer(self.space.root, np.uint64)[None, :], keys[:-1]])
        roots = np.frombuffer(os.urandom(8 * self._count), np.uint64)
        self.batch = Batch(self.space, keys, parents, roots, [buffer.toreadonly() for buffer in self._out])
        self.back = Batch(self.space, keys, parents, np.zeros(self._count, np.uint64), self._in)
        return self.batch

    def forget(self) -> None:
        """Nothing of what was read before is left to be mistaken for an answer."""
        self.back.roots[:] = 0
        for buffer in self._in:
            np.frombuffer(buffer, np.uint8)[:] = 0

    def agree(self) -> bool:
        """Whether what was read is what was written."""
        same = all(out == into for out, into in zip(self._out, self._in, strict=True))
        return same and bool((self.back.roots == self.batch.roots).all())


def _buffers(size: int, count: int) -> list[memoryview]:
    step = -(-size // PAGE) * PAGE
    view = aligned(step * count).data
    return [view[at : at + size] for at in range(0, step * count, step)]


def _repeated(call: Callable[[], float | None], budget_s: float, most: int) -> Seconds | None:
    """What `call` says that it took, again and again. None if it ever says None."""
    taken: list[float] = []
    end = time.perf_counter() + budget_s
    while len(taken) < most and (not taken or time.perf_counter() < end):
        took = call()
        if took is None:
            return None
        taken.append(took)
    return np.array(taken)


def _turns(count: int) -> Iterator[int]:
    order: npt.NDArray[np.int64] = np.random.default_rng(9).permutation(count)
    while True:
        yield from order.tolist()


def _deadline() -> float:
    return time.monotonic() + _CALL_S
