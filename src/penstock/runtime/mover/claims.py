"""What fetches share: which blocks are on their way, and how much may be read ahead of what it follows."""

from __future__ import annotations

import threading

from penstock.runtime.mover.workers import Transfer

__all__ = ["WAITING_AT_ONCE", "Ahead", "Claims"]

WAITING_AT_ONCE = 8
"""Fetches, each with a thread, that may wait for blocks that somebody else stores."""


class Claims:
    """Which blocks are on their way, so that nobody else reads them meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: dict[bytes, Transfer | None] = {}

    def take(self, keys: list[bytes]) -> int:
        """Claim these keys up to the first that another has; returns how many."""
        with self._changed:
            n = next((i for i, key in enumerate(keys) if key in self._taken), len(keys))
            self._taken.update(dict.fromkeys(keys[:n]))
            return n

    def carried(self, keys: list[bytes], transfer: Transfer) -> None:
        """This transfer brings them, if nobody gave them up meanwhile."""
        with self._changed:
            self._taken.update((key, transfer) for key in keys if key in self._taken)

    def carrier(self, key: bytes) -> Transfer | None:
        """What brings this key, as far as it is known."""
        with self._changed:
            return self._taken.get(key)

    def drop(self, keys: list[bytes]) -> None:
        """They arrived, or are given up."""
        with self._changed:
            for key in keys:
                self._taken.pop(key, None)
            self._changed.notify_all()

    def wait(self, key: bytes, timeout_s: float) -> None:
        """Wait until nobody has this key, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._taken, timeout_s)


class Ahead:
    """What may be read before the blocks that it follows are there, and how many fetches may wait for those."""

    def __init__(self, n_bytes: int) -> None:
        self._lock = threading.Lock()
        self._bytes, self._places = n_bytes, WAITING_AT_ONCE

    def enter(self) -> bool:
        """Take a place among those that wait; False where there is none."""
        with self._lock:
            there = self._places > 0
            self._places -= there
            return there

    def take(self, n: int, each: int) -> int:
        """Book room for up to n blocks of `each` bytes; for how many there was some."""
        with self._lock:
            n = min(n, self._bytes // each)
            self._bytes -= n * each
            return n

    def give(self, n_bytes: int) -> None:
        """Give room back."""
        with self._lock:
            self._bytes += n_bytes

    def leave(self) -> None:
        with self._lock:
            self._places += 1
