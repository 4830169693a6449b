"""A keeper inside the client's process: the same keeper, the same client, a function call where others have a bell.

For tests, scripts and single-process use. Whoever rings does the keeper's work, in its own thread.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from penstock.pool.locks import KEEPER_BYTE, ByteLock
from penstock.pool.segment import Segment
from penstock.pool.wire import Names, SpaceIs, SpaceOf
from penstock.runtime.keeper import Keeper

__all__ = ["EmbeddedLink"]


class EmbeddedLink:
    """A link to a keeper of one's own. The segment's files vanish with it."""

    def __init__(self, segment: Segment, lock_file: Path, *, policy: str = "lru") -> None:
        self._locks = ByteLock(lock_file)
        self._locks.try_acquire(KEEPER_BYTE)
        self._files = (segment.path, lock_file)
        self._segment = segment
        self._working = threading.RLock()
        self._busy = False
        self.keeper = Keeper(segment, self._locks, policy=policy)
        self.alive = True
        self._sleep()

    def ring(self) -> None:
        with self._working:
            if self._busy:  # a finalizer, in the middle of a step of this very thread: that looks again before it ends
                return
            self._busy = True
            try:
                self.keeper.announce_awake()
                self.keeper.step()
                self._sleep()
            finally:
                self._busy = False

    def _sleep(self) -> None:
        # Sleeping is what makes clients ring; work that came in while it was announced is done right here.
        while not self.keeper.announce_sleep():
            self.keeper.step()

    def wait(self, timeout_s: float) -> None:
        self.ring()

    def space(self, request: SpaceOf) -> SpaceIs:
        sizes = (request.block_bytes, request.block_tokens, request.n_segments, request.segment_bytes)
        with self._working:
            row = self.keeper.space(request.digest, request.root, sizes, request.label)
        return SpaceIs(row.id, row.slot_class)

    def names(self, request: Names) -> None:
        with self._working:
            self.keeper.learn_names(request.names)

    def close(self) -> None:
        if self.alive:
            self.alive = False
            self._locks.close()
            self._segment.close()
            for path in self._files:
                path.unlink(missing_ok=True)

    def abandon(self) -> None:
        self.alive = False
        self._locks.abandon()
        if self._segment.fd >= 0:
            os.close(self._segment.fd)
            self._segment.fd = -1
