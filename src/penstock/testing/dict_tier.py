"""A tier that is a dict in this process: the smallest that keeps every promise, for tests that need some tier."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.errors import TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier, Usage

__all__ = ["DictTier", "Kept"]


class Kept(NamedTuple):
    """A block as it is kept."""

    payload: bytes
    root: int


class DictTier(Tier):
    """Keeps up to `capacity_bytes` of payloads, and forgets those first that were not used for longest.

    `content` may be given to another tier of this kind, which then has what this one stored.
    """

    kind = "dict"
    local = True
    shared = False
    durable = False

    def __init__(
        self,
        name: str = "dict",
        capacity_bytes: int = 1 << 30,
        content: OrderedDict[tuple[bytes, bytes], Kept] | None = None,
    ) -> None:
        super().__init__(name)
        self.capacity_bytes = capacity_bytes
        self.content: OrderedDict[tuple[bytes, bytes], Kept] = OrderedDict() if content is None else content
        self._used = sum(len(kept.payload) for kept in self.content.values())
        self._evictions = 0
        self._closed = False
        self._lock = threading.Lock()

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        with self._lock:
            self._check_open()
            return np.array([name in self.content for name in self._names(space, keys)], np.bool_)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        with self._lock:
            self._check_open()
            names = self._names(batch.space, batch.keys)
            return np.array([self._store(batch, i, name) for i, name in enumerate(names)], np.uint8)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        with self._lock:
            self._check_open()
            names = self._names(batch.space, batch.keys)
            return np.array([self._fill(batch, i, name) for i, name in enumerate(names)], np.uint8)

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        with self._lock:
            self._check_open()
            for name in self._names(space, keys):
                self._forget(name)

    def usage(self) -> Usage:
        with self._lock:
            return Usage(self.capacity_bytes, self._used, len(self.content))

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        with self._lock:
            for name in self._names(space, keys):
                if name in self.content:
                    self.content.move_to_end(name)

    def counters(self) -> dict[str, int]:
        with self._lock:
            return {"evictions": self._evictions}

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailable(f"tier {self.name} was closed; open it again")

    @staticmethod
    def _names(space: BlockSpace, keys: Keys) -> list[tuple[bytes, bytes]]:
        return [(space.digest, key.tobytes()) for key in keys]

    def _store(self, batch: Batch, i: int, name: tuple[bytes, bytes]) -> Placed:
        if name in self.content:
            return Placed.PRESENT
        size = batch.space.block_bytes
        if size > self.capacity_bytes:
            return Placed.NO_ROOM
        while self._used + size > self.capacity_bytes:
            self._forget(next(iter(self.content)))
            self._evictions += 1
        self.content[name] = Kept(bytes(batch.payloads[i]), int(batch.roots[i]))
        self._used += size
        return Placed.STORED

    def _fill(self, batch: Batch, i: int, name: tuple[bytes, bytes]) -> Found:
        kept = self.content.get(name)
        if kept is None:
            return Found.ABSENT
        self.content.move_to_end(name)
        batch.payloads[i][:] = kept.payload
        batch.roots[i] = kept.root
        return Found.HERE

    def _forget(self, name: tuple[bytes, bytes]) -> None:
        kept = self.content.pop(name, None)
        if kept is not None:
            self._used -= len(kept.payload)
