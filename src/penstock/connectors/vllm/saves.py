"""Storing blocks from the engine's pages, on a thread of its own.

Pages stay as they are until the thread has ended with them: the scheduler keeps those of requests that end, and of a
preempted request the saves are called off before its pages are given away. Covers the queue, calling off and what is
told to the scheduler. Does not cover which blocks are stored (`scheduler.py`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from penstock import Drop, Pool, SpaceHandle
from penstock.connectors.counters import Counters
from penstock.connectors.vllm.layout import PagedCaches
from penstock.connectors.vllm.messages import RankId, SaveOrder
from penstock.identity import KEY_BYTES, Key, KeyChain

__all__ = ["Saver"]

# One piece: what calling off waits for at most. Slots are granted ahead up to a sixteenth of the pool in all, so that
# more at once would come short in small pools.
_PIECE_BLOCKS = 16
# After a wait in vain, none for this many times as long.
_HURRY_FACTOR = 1


@dataclass(slots=True, eq=False)
class _Job:
    order: SaveOrder
    pool: Pool | None
    handle: SpaceHandle | None
    off: bool = False


class Saver:
    """One thread and its queue. Thread-safe."""

    def __init__(self, rank: RankId, caches: PagedCaches, counters: Counters, *, wait_s: float) -> None:
        self._rank, self._caches, self._counters, self._wait_s = rank, caches, counters, wait_s
        self._changed = threading.Condition()
        self._queue: deque[_Job] = deque()
        self._now: _Job | None = None
        self._ended: dict[int, Drop] = {}
        self._open: dict[str, int] = {}
        """Request -> its saves that have not ended."""
        self._hurry_until_s = 0.0
        """A save waited for room in vain: until then none waits, or ended requests' pages would pile up behind it."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="penstock-save", daemon=True)
        self._thread.start()

    def submit(self, order: SaveOrder, pool: Pool | None, handle: SpaceHandle | None) -> None:
        """Have the blocks stored; does not wait. Without a pool they are dropped, and told as such."""
        with self._changed:
            self._open[order.request] = self._open.get(order.request, 0) + 1
            job = _Job(order, pool, handle)
            if self._closed:
                self._end(job, Drop.CLOSED)
                return
            self._queue.append(job)
            self._changed.notify_all()

    def call_off(self, requests: set[str]) -> None:
        """End all saves of these requests: drop what waits, and wait for the piece in hand. After that nothing reads
        their pages."""
        with self._changed:
            for job in [job for job in self._queue if job.order.request in requests]:
                self._queue.remove(job)
                self._end(job, Drop.ABORTED)
            now = self._now
            if now is None or now.order.request not in requests:
                return
            now.off = True
            self._changed.wait_for(lambda: self._now is not now)

    def is_idle(self, request: str) -> bool:
        """Whether no save of this request is open."""
        with self._changed:
            return request not in self._open

    def wait_some(self, timeout_s: float) -> None:
        """Wait until a save ends, all have, or the time is over."""
        with self._changed:
            n_ended = len(self._ended)
            self._changed.wait_for(lambda: len(self._ended) > n_ended or not self._open, timeout_s)

    def take_ended(self) -> dict[int, Drop]:
        """Saves that ended since the last call, by number; Drop.NONE for those that are whole."""
        with self._changed:
            ended, self._ended = self._ended, {}
            return ended

    def close(self, timeout_s: float) -> None:
        """Drop what waits and end the thread."""
        with self._changed:
            self._closed = True
            while self._queue:
                self._end(self._queue.popleft(), Drop.CLOSED)
            if self._now is not None:
                self._now.off = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _end(self, job: _Job, drop: Drop) -> None:
        """Under the lock."""
        request = job.order.request
        left = self._open[request] - 1
        if left:
            self._open[request] = left
        else:
            del self._open[request]
        self._ended[job.order.number] = drop
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                job = self._now = self._queue.popleft()
            drop = Drop.CLOSED
            started = time.perf_counter()
            try:
                drop = self._store(job)
            except Exception:  # noqa: BLE001 - the thread's boundary: a bug costs this save, not all to come
                self._counters.add("save.errors")
            finally:
                self._counters.add("save.us", int(1e6 * (time.perf_counter() - started)))
                with self._changed:
                    self._now = None
                    self._end(job, drop)

    def _store(self, job: _Job) -> Drop:
        order, pool, handle = job.order, job.pool, job.handle
        n_blocks = len(order.pages)
        if pool is None or handle is None:
            return self._dropped(Drop.NO_KEEPER, n_blocks)
        chain = _chain(handle, order, self._rank)
        for first in range(0, n_blocks, _PIECE_BLOCKS):
            if job.off:
                return self._dropped(Drop.ABORTED, n_blocks - first)
            last = min(n_blocks, first + _PIECE_BLOCKS)
            tensors = self._caches.map(order.pages[first:last])
            wait_s = self._wait_s if time.monotonic() >= self._hurry_until_s else 0.0
            stored = pool.store(
                handle, chain[first:last], tensors, wait_s=wait_s, intent=order.intent, give_up=lambda: job.off
            )
            if stored.drop is not Drop.NO_ROOM:
                self._hurry_until_s = 0.0
            elif wait_s:
                self._hurry_until_s = time.monotonic() + _HURRY_FACTOR * wait_s
            self._counters.add("save.blocks", stored.n_blocks)
            self._counters.add("save.bytes", stored.n_blocks * handle.block_bytes)
            if stored.n_blocks < last - first:
                # Going on would leave a hole, and push out this request's own first blocks.
                return self._dropped(Drop(stored.drop), n_blocks - first - stored.n_blocks)
        return Drop.NONE

    def _dropped(self, why: Drop, n_blocks: int) -> Drop:
        self._counters.add(f"drop.{why.name.lower()}", n_blocks)
        return why


def _chain(handle: SpaceHandle, order: SaveOrder, rank: RankId) -> KeyChain:
    data = order.keys[rank]
    keys = np.frombuffer(bytearray(data[KEY_BYTES:]), np.uint64).reshape(-1, 2)
    return KeyChain.known(handle.space, keys, parent=Key(data[:KEY_BYTES]), start_block=order.first_block)
