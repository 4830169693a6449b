"""What the keeper tells about the pool, turned into the tiering brain's events, and its orders into transfers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from penstock.core.tiering import Tiering, tier_event_dtype
from penstock.errors import TierError
from penstock.pool.handles import PlacedSpace
from penstock.pool.stage import Stage
from penstock.runtime.mover.audit import Audit
from penstock.runtime.mover.feed import GAP, FeedReader
from penstock.runtime.mover.places import Places
from penstock.runtime.mover.spaces import as_tiers_know_it
from penstock.runtime.mover.writes import Writer
from penstock.types import EventKind, Urgency

__all__ = ["Watch"]

log = logging.getLogger("penstock.mover")

PAUSE_S = 0.004
"""Between two looks at the feed while there is news: a batch of many events costs hardly more than one event."""
IDLE_S = 0.5
ORDER_BLOCKS = 512
WAITING_BYTES = 64 << 20
"""Write-backs that wait for a tier; beyond, blocks are left where they are until it has caught up."""
BROUGHT = 65536
"""Blocks that a fetch brought and whose commits were not seen yet."""


class Watch:
    """One thread: feed in, orders out. `lock` guards `tiering`."""

    def __init__(
        self, stage: Stage, places: Places, feed: FeedReader, tiering: Tiering, writer: Writer, lock: threading.Lock
    ) -> None:
        self._stage, self._places, self._feed = stage, places, feed
        self._tiering, self._writer, self._lock = tiering, writer, lock
        self._sizes = np.zeros(stage.n_units, np.int64)
        """What each block takes of the pool, with its share of what is left over in its slab; 0 where none is."""
        self._generations = np.zeros(stage.n_units, np.int64)
        self._classes: set[int] = set()
        self._roots: set[bytes] = set()
        self._resident_bytes = 0
        self._brought: dict[bytes, int] = {}
        self._audit = Audit(stage, places, tiering, lock)
        self.looks = 0
        """How often the feed was looked at, with all that follows from it."""
        self.gaps = 0
        """How often everything had to be looked at again."""

    def run(self, ended: Callable[[], None]) -> None:
        """Until the keeper is gone; then calls `ended`."""
        try:
            while (rows := self._feed.take()) is not None:
                self._take_in(rows)
                self._order()
                self._audit.look(self._sizes > 0)
                self.looks += 1
                if len(rows):
                    time.sleep(PAUSE_S)
                else:
                    self._feed.wait(IDLE_S)
        finally:
            ended()

    # ---- events

    def _take_in(self, rows: npt.NDArray[np.void]) -> None:
        gaps = np.flatnonzero(rows["kind"] == GAP)
        if len(gaps):
            # What came before the gap is in the records, too.
            self._start_over()
            rows = rows[gaps[-1] + 1 :]
        if len(rows):
            self._tell(rows["kind"], rows["unit"].astype(np.int64))

    def _start_over(self) -> None:
        """Events were lost: what the records say is told, as far as it is new."""
        self.gaps += 1
        there = self._stage.scan()
        gone = np.setdiff1d(np.flatnonzero(self._sizes), there)
        self._tell(np.full(len(gone), EventKind.EVICTED, np.uint32), gone)
        self._tell(np.full(len(there), EventKind.COMMITTED, np.uint32), there)

    def _tell(self, kinds: npt.NDArray[np.uint32], units: npt.NDArray[np.int64]) -> None:
        """Pass events on, runs of one kind at a time, so that sizes can be counted along."""
        kinds, units = _without_overwritten(kinds, units)
        bounds = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
        for first, stop in itertools.pairwise(bounds):
            if stop == first:
                continue
            part = units[first:stop]
            if kinds[first] == EventKind.COMMITTED:
                self._committed(part)
            else:
                if kinds[first] == EventKind.EVICTED:
                    self._left(part)
                events = np.zeros(len(part), tier_event_dtype)
                events["kind"], events["unit"] = kinds[first], part
                self._observe(events)

    def _left(self, units: npt.NDArray[np.int64]) -> None:
        units = np.unique(units)
        self._resident_bytes -= int(self._sizes[units].sum())
        self._sizes[units] = 0

    def _committed(self, units: npt.NDArray[np.int64]) -> None:
        """Slots may have been used again since: what stands there now is what counts, unless it is known already."""
        units = np.unique(units)
        records = self._stage.records(units)
        units = units[records.index]
        fresh = (self._sizes[units] == 0) | (self._generations[units] != records.generations)
        units, records = units[fresh], records.part(fresh)
        events = np.zeros(len(records), tier_event_dtype)
        events["kind"], events["unit"] = EventKind.COMMITTED, units
        events["key"], events["parent"] = records.keys, records.parents
        events["generation"], events["space"] = records.generations, records.spaces
        events["priority"], events["tenant"] = records.priorities, records.tenants.view(np.uint64)
        known, sizes = np.ones(len(events), bool), np.zeros(len(events), np.int64)
        for number in np.unique(records.spaces):
            chosen = records.spaces == number
            space = self._stage.space(int(number))
            if space is None:
                known[chosen] = False
                continue
            self._add_root(space.root)
            events["slot_class"][chosen], events["block_bytes"][chosen] = space.slot_class, space.block_bytes
            events["below"][chosen] = self._known_below(space, records.keys[chosen])
            sizes[chosen] = self._stage.slot_share(space)
        events, sizes = events[known], sizes[known]
        self._left(events["unit"].astype(np.int64))
        self._sizes[events["unit"]] = sizes
        self._generations[events["unit"]] = events["generation"]
        self._classes.update(np.unique(events["slot_class"]).tolist())
        self._resident_bytes += int(sizes.sum())
        self._observe(events)

    def _add_root(self, root: bytes) -> None:
        """Chains of a space begin behind its root; the brain has to be told."""
        if root not in self._roots:
            self._roots.add(root)
            with self._lock:
                self._tiering.add_root(root)

    def _known_below(self, space: PlacedSpace, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Which tiers have these blocks already, a bit for each: those of this machine say it without I/O, and what
        was just brought up from another is there."""
        bits = np.array([self._brought.pop(key.tobytes(), 0) for key in keys], np.uint64)
        for tier in self._places.usable():
            if tier.local:
                try:
                    holds = tier.shelf.holds(as_tiers_know_it(space), np.ascontiguousarray(keys), time.monotonic() + 1)
                except TierError:
                    continue
                bits[holds] |= np.uint64(1 << tier.number)
        return bits

    def brings(self, tier: int, keys: npt.NDArray[np.uint64]) -> None:
        """These blocks come from that tier, and will be committed. From any thread."""
        for key in keys:
            self._brought[key.tobytes()] = 1 << tier
        while len(self._brought) > BROUGHT:
            with contextlib.suppress(KeyError, RuntimeError):  # others take out of it, too
                del self._brought[next(iter(self._brought))]

    def _observe(self, events: npt.NDArray[np.void]) -> None:
        if len(events):
            with self._lock:
                self._tiering.observe(events, _now_ms())

    # ---- orders

    def _order(self) -> None:
        free = 1.0 - self._resident_bytes / self._stage.data_bytes
        workers = self._places.workers
        usable = {tier.number for tier in self._places.usable()}
        hanging = {tier.number for tier in self._places.tiers if workers.stuck(tier.number, Urgency.WRITE_BACK)}
        for number in hanging:
            self._writer.give_up(number)
        with self._lock:
            for slot_class in self._classes:
                self._tiering.room(slot_class, max(0.0, free))
            for tier in self._places.tiers:
                # One that has enough to do gets nothing new for now, like one that is down.
                n_bytes = workers.ready_bytes(tier.number, Urgency.WRITE_BACK)
                up = tier.number in usable - hanging and n_bytes < WAITING_BYTES
                self._tiering.set_up(tier.number, up)
            orders = self._tiering.orders(_now_ms(), ORDER_BLOCKS)
        for order in orders:
            self._writer.submit(order)


def _without_overwritten(
    kinds: npt.NDArray[np.uint32], units: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Leave out a commit whose slot was committed to again later on: its record is gone, and what stands there now
    would be told twice, as if it had been used twice."""
    commits = np.flatnonzero(kinds == EventKind.COMMITTED)
    _, last = np.unique(units[commits][::-1], return_index=True)
    overwritten = np.ones(len(commits), bool)
    overwritten[len(commits) - 1 - last] = False
    keep = np.ones(len(kinds), bool)
    keep[commits[overwritten]] = False
    return kinds[keep], units[keep]


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
