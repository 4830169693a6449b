"""What the keeper tells about the pool, turned into the tiering brain's events, and its orders into transfers."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from penstock.core.tiering import Tiering, tier_event_dtype
from penstock.errors import TierError
from penstock.pool.stage import Stage
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
AUDIT_UNITS = 4096
"""Blocks a second, about, whose copies in local tiers are looked after: a tier drops what it has no room for."""


class Watch:
    """One thread: feed in, orders out. `lock` guards `tiering`."""

    def __init__(
        self, stage: Stage, places: Places, feed: FeedReader, tiering: Tiering, writer: Writer, lock: threading.Lock
    ) -> None:
        self._stage, self._places, self._feed = stage, places, feed
        self._tiering, self._writer, self._lock = tiering, writer, lock
        self._sizes = np.zeros(stage.n_units, np.int64)
        self._generations = np.zeros(stage.n_units, np.int64)
        self._classes: set[int] = set()
        self._roots: set[bytes] = set()
        self._resident_bytes = 0
        self._audited = 0
        self._next_audit = 0.0
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
                self._audit()
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
        known = np.ones(len(events), bool)
        for number in np.unique(records.spaces):
            chosen = records.spaces == number
            space = self._stage.space(int(number))
            if space is None:
                known[chosen] = False
                continue
            self._add_root(space.root)
            events["slot_class"][chosen], events["block_bytes"][chosen] = space.slot_class, space.block_bytes
            events["below"][chosen] = self._below(number, records.keys[chosen])
        events = events[known]
        self._left(events["unit"].astype(np.int64))
        self._sizes[events["unit"]] = events["block_bytes"]
        self._generations[events["unit"]] = events["generation"]
        self._classes.update(np.unique(events["slot_class"]).tolist())
        self._resident_bytes += int(events["block_bytes"].sum())
        self._observe(events)

    def _add_root(self, root: bytes) -> None:
        """Chains of a space begin behind its root; the brain has to be told."""
        if root not in self._roots:
            self._roots.add(root)
            with self._lock:
                self._tiering.add_root(root)

    def _below(self, number: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Which tiers of this machine have these blocks already, a bit for each."""
        bits = np.zeros(len(keys), np.uint64)
        space = self._stage.space(int(number))
        for tier in self._places.usable():
            if tier.local and space is not None:
                try:
                    holds = tier.shelf.holds(as_tiers_know_it(space), np.ascontiguousarray(keys), time.monotonic() + 1)
                except TierError:
                    continue
                bits[holds] |= np.uint64(1 << tier.number)
        return bits

    def _observe(self, events: npt.NDArray[np.void]) -> None:
        if len(events):
            with self._lock:
                self._tiering.observe(events, _now_ms())

    # ---- orders

    def _order(self) -> None:
        free = 1.0 - self._resident_bytes / self._stage.data_bytes
        usable = {tier.number for tier in self._places.usable()}
        with self._lock:
            for slot_class in self._classes:
                self._tiering.room(slot_class, max(0.0, free))
            for tier in self._places.tiers:
                # One that has enough to do gets nothing new for now, like one that is down.
                self._tiering.set_up(tier.number, tier.number in usable and self._has_room(tier.number))
            orders = self._tiering.orders(_now_ms(), ORDER_BLOCKS)
        for order in orders:
            self._writer.submit(order)

    def _has_room(self, tier: int) -> bool:
        return self._places.workers.waiting_bytes(tier, Urgency.WRITE_BACK) < WAITING_BYTES

    def _audit(self) -> None:
        """Look whether local tiers still have what they are believed to have; a part of all blocks at a time."""
        now = time.monotonic()
        if now < self._next_audit:
            return
        self._next_audit = now + 1.0
        stop = min(self._audited + AUDIT_UNITS, self._stage.n_units)
        units = np.arange(self._audited, stop)[self._sizes[self._audited : stop] > 0]
        self._audited = 0 if stop >= self._stage.n_units else stop
        records = self._stage.records(units)
        with self._lock:
            believed = self._tiering.below(units[records.index])
        for number in np.unique(records.spaces):
            chosen = records.spaces == number
            keys, bits = records.keys[chosen], believed[chosen]
            really = self._below(int(number), keys)
            for tier in self._places.usable():
                bit = np.uint64(1 << tier.number)
                lost = (bits & bit != 0) & (really & bit == 0)
                if tier.local and lost.any():
                    with self._lock:
                        self._tiering.gone(tier.number, np.ascontiguousarray(keys[lost]))


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000
