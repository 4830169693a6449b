"""Storing blocks on a thread of its own, so that a request never waits for the pool.

A request's blocks are stored in order, each job from where the last one ended: what found no room is tried
again when the next block fills. Covers the queue, its bound and its counters. Does not cover which tokens are
stored (`connector.py`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass, field

from penstock import Drop, Intent, Pool, SpaceHandle, chain_keys
from penstock.connectors.counters import Counters
from penstock.connectors.transformers.cache import Snapshot
from penstock.errors import PenstockError
from penstock.identity import KeyChain

__all__ = ["SaveJob", "Saver", "store"]

_log = logging.getLogger("penstock.connector")

# Slots are granted ahead up to a sixteenth of the pool in all: more at once would come short in small pools.
_BATCH_BLOCKS = 16


@dataclass(slots=True, eq=False)
class SaveJob:
    """The blocks of one request that are stored or to be stored.

    The engine's thread appends to `tokens` and hands over snapshots; the saver's thread owns `keys` and
    `n_saved`.
    """

    pool: Pool
    handle: SpaceHandle
    intent: Intent | None
    tokens: list[int]
    n_saved: int
    """Leading blocks that need no storing any more."""
    look_first: bool
    """Whether the pool may hold more leading blocks than `n_saved`: nobody looked."""
    snapshot: Snapshot | None = None
    n_wanted: int = 0
    queued: bool = False
    keys: KeyChain | None = field(default=None, repr=False)


class Saver:
    """One worker thread and a bounded queue of requests. Thread-safe."""

    def __init__(self, counters: Counters, *, max_requests: int, wait_s: float) -> None:
        self._counters = counters
        self._queue = _Queue(max_requests)
        self._wait_s = wait_s
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _Queue.stop, self._queue)

    def submit(self, job: SaveJob, snapshot: Snapshot, n_blocks: int) -> bool:
        """Ask for the first `n_blocks` blocks of the request to be stored from `snapshot`; does not wait.

        False, counted, if the queue is full or closed: what was asked for before stays asked for.
        """
        if os.getpid() != self._pid:
            # The worker and perhaps a held lock stayed in the parent.
            self._counters.add("save_dropped.forked", n_blocks - job.n_wanted)
            return False
        missed = n_blocks - job.n_wanted
        if not self._queue.put(job, snapshot, n_blocks):
            self._counters.add("save_dropped.queue_full", missed)
            return False
        if self._thread is None:
            self._start()
        return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything asked for was stored or dropped; False if that took longer."""
        return os.getpid() == self._pid and self._queue.wait_idle(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Store what is queued, as long as it takes no longer than `timeout_s`, and end the thread."""
        done = self.flush(timeout_s)
        self._finalizer()
        if self._thread is not None and os.getpid() == self._pid:
            self._thread.join(timeout_s)
        return done

    def _start(self) -> None:
        # The thread holds no reference to the saver, so that one that is forgotten ends with its owner.
        self._thread = threading.Thread(
            target=_run, args=(self._queue, self._counters, self._wait_s), name="penstock-save", daemon=True
        )
        self._thread.start()


class _Queue:
    """Requests that wait for the worker, each once, however many of its blocks do."""

    def __init__(self, max_requests: int) -> None:
        self._max = max_requests
        self._changed = threading.Condition()
        self._jobs: deque[SaveJob] = deque()
        self._busy = False
        self._stopped = False

    def put(self, job: SaveJob, snapshot: Snapshot, n_blocks: int) -> bool:
        with self._changed:
            if self._stopped or (not job.queued and len(self._jobs) >= self._max):
                return False
            job.snapshot, job.n_wanted = snapshot, n_blocks
            if not job.queued:
                job.queued = True
                self._jobs.append(job)
                self._changed.notify_all()
            return True

    def take(self) -> tuple[SaveJob, Snapshot, int] | None:
        """The next job with what it asks for by now; waits; None when stopped."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            while not self._jobs and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            self._busy = True
            job = self._jobs.popleft()
            snapshot, job.snapshot, job.queued = job.snapshot, None, False
            assert snapshot is not None
            return job, snapshot, job.n_wanted

    def wait_idle(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._jobs.clear()
            self._changed.notify_all()


def _run(queue: _Queue, counters: Counters, wait_s: float) -> None:
    while (taken := queue.take()) is not None:
        job, snapshot, n_blocks = taken
        started = time.perf_counter()
        try:
            store(job, snapshot, n_blocks, counters, wait_s)
        except PenstockError as error:
            _give_up(counters, n_blocks - job.n_saved, error)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: a bug must not end all saving
            _log.exception("storing blocks failed")
            _give_up(counters, n_blocks - job.n_saved, error)
        counters.add("save_us", int(1e6 * (time.perf_counter() - started)))
        del taken, job, snapshot


def _give_up(counters: Counters, n_blocks: int, error: Exception) -> None:
    counters.add("save_dropped.error", n_blocks)
    _log.debug("%d blocks were not stored: %s", n_blocks, error)


def store(
    job: SaveJob, snapshot: Snapshot, n_blocks: int, counters: Counters, wait_s: float, until_s: float = float("inf")
) -> None:
    """Store what is not stored of a request's first `n_blocks` blocks, in this thread: the saver's, or that of who has
    not given it this job yet. Waits at most `wait_s` for room for a batch, and not after `until_s` on the monotonic
    clock. Raises PenstockError."""
    keys = _keys(job, n_blocks)
    if job.look_first:
        with job.pool.match(job.handle, keys[:n_blocks], intent=job.intent) as lease:
            job.n_saved = max(job.n_saved, len(lease))
            # Where all that was asked for is there, more may be.
            job.look_first = len(lease) >= n_blocks
    while job.n_saved < n_blocks:
        first, last = job.n_saved, min(n_blocks, job.n_saved + _BATCH_BLOCKS)
        blocks = snapshot.tensor_map(first, last, job.handle.space.block_tokens)
        wait_s = max(0.0, min(wait_s, until_s - time.monotonic()))
        stored = job.pool.store(job.handle, keys[first:last], blocks, wait_s=wait_s, intent=job.intent)
        job.n_saved += stored.n_blocks
        counters.add("saved_blocks", stored.n_blocks)
        if stored.n_blocks < last - first:
            # No room within the wait. Going on would push this request's own first blocks out again, the only
            # ones that nobody uses.
            counters.add(f"save_dropped.{Drop(stored.drop).name.lower()}", n_blocks - job.n_saved)
            return


def _keys(job: SaveJob, n_blocks: int) -> KeyChain:
    """The chain of at least the first `n_blocks` blocks."""
    space = job.handle.space
    if job.keys is None:
        job.keys = chain_keys(space, job.tokens[: n_blocks * space.block_tokens])
    elif len(job.keys) < n_blocks:
        known = len(job.keys) * space.block_tokens
        job.keys.extend(job.tokens[known : n_blocks * space.block_tokens])
    return job.keys
