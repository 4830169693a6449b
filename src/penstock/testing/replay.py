"""Replaying requests for chains of blocks through a brain, and the bound that no policy can beat.

A request is a list of block ids from head to tail. Its hits are the blocks present before the first absent
one; then all of its blocks are touched or inserted. Here is no engine, no time and no pool: only which
block leaves.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from penstock.core.brain import Brain
from penstock.types import NO_UNIT, EventKind, event_dtype

__all__ = ["Replay", "belady_hits"]

Request = Sequence[int]


class Replay:
    """Drives a brain of `capacity` one-unit slots like a keeper without readers; call it with one request
    at a time.

    With `chained` a block's parent is the block before it in the request, so the brain evicts tail-first;
    without it every block stands alone, as in a plain cache. The brain starts empty.
    """

    def __init__(self, capacity: int, policy: str = "lru", chained: bool = True, brain: Brain | None = None):
        self.brain = Brain(capacity, 1, policy) if brain is None else brain
        self.hits = 0
        self._chained = chained
        self._unit_of: dict[int, int] = {}
        self._block_in = [-1] * capacity
        self._free = list(range(capacity))[::-1]
        self._events = np.zeros(1024, event_dtype)
        self._pending = 0
        self._now = 0
        self._victim = np.zeros(1, np.uint32)

    def request(self, blocks: Request) -> int:
        """Replay one request; returns its hits. Stops storing where only the request's own blocks could
        leave.
        """
        self._now += 1
        hits = next((i for i, block in enumerate(blocks) if block not in self._unit_of), len(blocks))
        self.hits += hits
        parent = NO_UNIT
        wanted = set(blocks)
        for block in blocks:
            unit = self._unit_of.get(block)
            if unit is not None:
                self._push(EventKind.TOUCHED, unit, NO_UNIT)
            else:
                unit = self._make_room(wanted)
                if unit is None:
                    break
                self._unit_of[block], self._block_in[unit] = unit, block
                self._push(EventKind.COMMITTED, unit, parent)
            parent = unit if self._chained else NO_UNIT
        self._flush()
        return hits

    def run(self, requests: Sequence[Request]) -> int:
        """Replay them all; returns the hits so far."""
        for blocks in requests:
            self.request(blocks)
        return self.hits

    def _make_room(self, wanted: set[int]) -> int | None:
        if self._free:
            return self._free.pop()
        self._flush()
        if not self.brain.victims(0, 1, self._victim):
            return None
        unit = int(self._victim[0])
        if self._chained and self._block_in[unit] in wanted:
            self._push(EventKind.KEPT, unit, NO_UNIT)
            return None
        self._push(EventKind.EVICTED, unit, NO_UNIT)
        del self._unit_of[self._block_in[unit]]
        return unit

    def _push(self, kind: EventKind, unit: int, parent: int) -> None:
        if self._pending == len(self._events):
            self._flush()
        self._events[self._pending] = (kind, unit, parent, 0, 0, 0, 0, 0, 0, 0)
        self._pending += 1

    def _flush(self) -> None:
        self.brain.observe(self._events[: self._pending], self._now)
        self._pending = 0


def belady_hits(requests: Sequence[Request], capacity: int) -> int:
    """The most references that any cache of `capacity` blocks can serve, knowing the future.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer" (1966), MIN, here also
    free not to store a block. It counts every reference to a present block, so it bounds prefix hits under
    any eviction rule.
    """
    references = [block for blocks in requests for block in blocks]
    never = len(references)
    next_use, seen = [never] * never, dict[int, int]()
    for i in range(never - 1, -1, -1):
        next_use[i] = seen.get(references[i], never)
        seen[references[i]] = i
    present: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for i, block in enumerate(references):
        hits += block in present
        present[block] = next_use[i]
        heapq.heappush(farthest, (-next_use[i], block))
        while len(present) > capacity:
            use, candidate = heapq.heappop(farthest)
            if present.get(candidate) == -use:
                del present[candidate]
    return hits
