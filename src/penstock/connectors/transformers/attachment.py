"""A connector's tie to its pool: attached, not yet attached, or lost.

A connector starts without a keeper and attaches when one is there; whatever the pool raises becomes a counted
miss, because the pool may never stop an inference. Covers attaching and the handle of a space. Does not cover
what is loaded or saved (`connector.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import penstock
from penstock import Miss, Pool, Space, SpaceHandle
from penstock.connectors.counters import Counters
from penstock.errors import KeeperError, PenstockError, PoolClosed, SegmentError

__all__ = ["Attachment", "miss_of"]

_log = logging.getLogger("penstock.connector")

_RETRY_S = 1.0
_MAX_HANDLES = 64


def miss_of(error: Exception) -> Miss:
    """The reason that stands for an error of the pool."""
    if isinstance(error, (KeeperError, SegmentError)):
        return Miss.NO_KEEPER
    return Miss.CLOSED


class Attachment:
    """The pool of a connector. Thread-safe."""

    def __init__(
        self,
        pool: Pool | None,
        name: str,
        counters: Counters,
        *,
        open_pool: Callable[[str], Pool] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._owned = pool is None
        self._name = name
        self._counters = counters
        self._open = open_pool or penstock.open
        self._now_s = now_s
        self._lock = threading.Lock()
        self._next_try_s = float("-inf")
        self._warned = False
        self._told: set[str] = set()
        self._closed = False
        self._handles: dict[bytes, SpaceHandle] = {}

    def handle(self, space: Space, label: str) -> tuple[Pool, SpaceHandle] | Miss:
        """The pool and its handle of `space`, or why there is none, counted. Tries to attach at most once a
        second; raises nothing."""
        found = self.prepare(space, label)
        if found is Miss.NO_KEEPER:
            self._counters.add("no_keeper")
        return found

    def prepare(self, space: Space, label: str) -> tuple[Pool, SpaceHandle] | Miss:
        """As `handle`, for no request: without a keeper it counts nothing."""
        with self._lock:
            pool = self._attached()
            if pool is None:
                return Miss.CLOSED if self._closed else Miss.NO_KEEPER
            handle = self._handles.get(space.digest())
            if handle is None:
                try:
                    handle = pool.space(space, label)
                except Exception as error:  # noqa: BLE001 - the border to the pool, as in `connector.py`
                    return self.failed(error)
                if len(self._handles) >= _MAX_HANDLES:
                    self._handles.clear()
                self._handles[space.digest()] = handle
            return pool, handle

    def failed(self, error: Exception) -> Miss:
        """Count an error that the pool raised; the reason that stands for it."""
        miss = miss_of(error)
        kind = type(error).__name__
        self._counters.add(f"pool_error.{kind}")
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        known = isinstance(error, (PenstockError, OSError))
        _log.log(level, "the pool failed, computing instead (said once): %s", error, exc_info=not known)
        if isinstance(error, PoolClosed) and self._owned:
            # Ours, closed behind our back: attach anew.
            self._pool = None
            self._handles.clear()
        return miss

    def close(self) -> None:
        """Detach; closes the pool if this opened it."""
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
            self._handles.clear()
        if pool is not None and self._owned:
            pool.close()

    @property
    def pool(self) -> Pool | None:
        """The pool, if attached."""
        return self._pool

    def _attached(self) -> Pool | None:
        if self._pool is not None or self._closed or self._now_s() < self._next_try_s:
            return self._pool
        self._next_try_s = self._now_s() + _RETRY_S
        try:
            self._pool = self._open(self._name)
        except (PenstockError, OSError) as error:
            if not self._warned:
                self._warned = True
                _log.warning(
                    "no pool %r (%s): computing everything until there is one. Start it with: penstock serve --name %s",
                    self._name,
                    error,
                    self._name,
                )
            return None
        _log.info("attached to pool %r", self._name)
        return self._pool
