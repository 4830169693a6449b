"""What a connector counts, by name."""

from __future__ import annotations

import threading

__all__ = ["Counters"]


class Counters:
    """Named counts that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, n: int = 1) -> None:
        """Add `n` to the count of that name, which starts at 0."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + n

    def read(self) -> dict[str, int]:
        """A copy of the counts that are not 0."""
        with self._lock:
            return dict(sorted(self._counts.items()))
