"""Copying leased blocks into the engine's pages: at once, or on a thread beside the engine's steps.

Every load ends exactly once, within its deadline, with the number of leading blocks that are good; after that nothing
writes to its pages. Covers the copy, its pieces, deadline and calling off. Does not cover what the scheduler makes of
a load that came short (`recovery.py`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock import Lease, Miss, Pool
from penstock.connectors.counters import Counters
from penstock.connectors.vllm.layout import PagedCaches
from penstock.connectors.vllm.messages import LoadOrder, RankId
from penstock.errors import PenstockError

__all__ = ["Copier", "Loader"]

# What calling off and a deadline wait for at most: about 2 ms of copying.
_PIECE_BYTES = 16 << 20
# A speed measured on less than this says more about the call than about the copy.
_MEASURE_FROM_BYTES = 1 << 20


class Copier:
    """Does loads. Thread-safe; the speed is a running figure of all of them."""

    def __init__(
        self,
        rank: RankId,
        caches: PagedCaches,
        counters: Counters,
        ready: Callable[[LoadOrder], Pool | None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ready` gives the pool with the order's space opened in it, or None; it may wait until the deadline."""
        self._rank, self._caches, self._counters, self._ready, self._now_s = rank, caches, counters, ready, now_s
        self.bytes_per_s = 0.0

    def copy(self, order: LoadOrder, is_off: Callable[[], bool] = lambda: False) -> int:
        """Copy the order's blocks; how many, from the first, are good. Raises nothing."""
        started = time.perf_counter()
        good, why = 0, Miss.CLOSED
        try:
            good, why = self._copy(order, is_off)
        except (PenstockError, OSError) as error:
            self._counters.add(f"load.error.{type(error).__name__}")
        except Exception as error:  # noqa: BLE001 - the border to the pool: even its bugs cost only the hit
            self._counters.add(f"load.bug.{type(error).__name__}")
        self._counters.add("load.us", int(1e6 * (time.perf_counter() - started)))
        if good < len(order.pages):
            self._counters.add(f"load.failed.{why.name.lower()}", len(order.pages) - good)
        return good

    def _copy(self, order: LoadOrder, is_off: Callable[[], bool]) -> tuple[int, Miss]:
        pool, given = self._ready(order), order.leases.get(self._rank)
        if pool is None or given is None:
            return 0, Miss.NO_KEEPER
        with pool.adopt(given) as lease:
            n_blocks = min(len(lease), len(order.pages))
            block_bytes = lease._handle.block_bytes
            step = max(1, _PIECE_BYTES // block_bytes)
            good, started = 0, time.perf_counter()
            while good < n_blocks:
                if is_off():
                    return good, Miss.SKIPPED
                if self._now_s() > order.deadline_s:
                    return good, Miss.BUSY
                wanted = slice(good, min(n_blocks, good + step))
                copied = lease.gather(self._caches.map(order.pages[wanted]), blocks=wanted)
                good += copied
                if copied < wanted.stop - wanted.start:
                    break
            self._measure(good * block_bytes, time.perf_counter() - started)
            return good, _why(lease)

    def _measure(self, n_bytes: int, seconds: float) -> None:
        self._counters.add("load.bytes", n_bytes)
        if n_bytes >= _MEASURE_FROM_BYTES and seconds > 0:
            speed = n_bytes / seconds
            self.bytes_per_s = speed if not self.bytes_per_s else 0.7 * self.bytes_per_s + 0.3 * speed


def _why(lease: Lease) -> Miss:
    return lease.miss if lease.miss is not Miss.NONE else Miss.CHANGED


@dataclass(slots=True, eq=False)
class _Job:
    order: LoadOrder
    off: bool = False


class Loader:
    """Loads beside the steps: one thread and its queue. Thread-safe."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._now: _Job | None = None
        self._ended: list[tuple[LoadOrder, int]] = []
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="penstock-load", daemon=True)
        self._thread.start()

    def submit(self, order: LoadOrder) -> None:
        """Have the order's blocks copied; does not wait."""
        with self._changed:
            if self._closed:
                self._ended.append((order, 0))
                return
            self._queue.append(_Job(order))
            self._changed.notify_all()

    def call_off(self, requests: set[str]) -> None:
        """The loads of these requests are not wanted any more; they end soon, with what is there by then."""
        with self._changed:
            for job in [job for job in self._queue if job.order.request in requests]:
                self._queue.remove(job)
                self._ended.append((job.order, 0))
            if self._now is not None and self._now.order.request in requests:
                self._now.off = True
            self._changed.notify_all()

    def is_busy(self) -> bool:
        """Whether a load waits or runs."""
        with self._changed:
            return bool(self._queue) or self._now is not None

    def wait_some(self, timeout_s: float) -> None:
        """Wait until a load has ended, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ended) or not (self._queue or self._now), timeout_s)

    def take_ended(self) -> list[tuple[LoadOrder, int]]:
        """Loads that ended since the last call, each with how many leading blocks are good."""
        with self._changed:
            ended, self._ended = self._ended, []
            return ended

    def close(self, timeout_s: float) -> None:
        """Call everything off and end the thread: after that nothing writes to the pages."""
        with self._changed:
            self._closed = True
            self._ended.extend((job.order, 0) for job in self._queue)
            self._queue.clear()
            if self._now is not None:
                self._now.off = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = self._now = self._queue.popleft()
            good = self._copier.copy(job.order, lambda job=job: job.off)  # type: ignore[misc]
            with self._changed:
                self._now = None
                self._ended.append((job.order, good))
                self._changed.notify_all()
