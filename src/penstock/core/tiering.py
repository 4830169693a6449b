"""Provisional."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.types import EventKind, WriteRule

tier_event_dtype = np.dtype(
    [
        ("kind", "<u4"),
        ("unit", "<u4"),
        ("key", "<u8", 2),
        ("parent", "<u8", 2),
        ("generation", "<i8"),
        ("space", "<u4"),
        ("slot_class", "<u4"),
        ("block_bytes", "<u4"),
        ("priority", "<i4"),
        ("tenant", "<u8"),
        ("below", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class TierRule:
    name: str
    write: WriteRule


@dataclass(frozen=True, slots=True)
class WriteOrder:
    tier: int
    space: int
    tenant: int
    units: npt.NDArray[np.int64]
    generations: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]
    parents: npt.NDArray[np.uint64]


class Tiering:
    def __init__(self, n_units: int, rules: Sequence[TierRule], *, replicas: Any = 1, ghosts: int = 65536) -> None:
        self.rules = list(rules)
        self.row = np.zeros(n_units, tier_event_dtype)
        self.live = np.zeros(n_units, bool)
        self.flying = np.zeros(n_units, np.uint64)
        self.uses = np.zeros(n_units, np.int32)
        self.stamp = np.zeros(n_units, np.int64)
        self.at: dict[bytes, int] = {}
        self.queue: list[deque[int]] = [deque() for _ in rules]
        self.up = [True] * len(rules)
        self.short: set[int] = set()
        self.ghost: OrderedDict[bytes, int] = OrderedDict()
        self.replicas = replicas
        self._tick = 0

    def observe(self, events: npt.NDArray[np.void], now_ms: int) -> None:
        for event in events:
            unit, kind = int(event["unit"]), int(event["kind"])
            self._tick += 1
            if kind == EventKind.COMMITTED:
                if self.live[unit]:
                    self._evict(unit)
                self.row[unit], self.live[unit], self.flying[unit] = event, True, 0
                key = event["key"].tobytes()
                self.uses[unit] = 1 + self.ghost.pop(key, 0)
                self.at[key] = unit
                self.stamp[unit] = self._tick
                for tier, rule in enumerate(self.rules):
                    if rule.write is WriteRule.THROUGH or (rule.write is WriteRule.SECOND_USE and self.uses[unit] >= 2):
                        self.queue[tier].append(unit)
            elif kind == EventKind.TOUCHED and self.live[unit]:
                self.uses[unit] += 1
                self.stamp[unit] = self._tick
                for tier, rule in enumerate(self.rules):
                    if rule.write is WriteRule.SECOND_USE and self.uses[unit] == 2:
                        self.queue[tier].append(unit)
            elif kind == EventKind.EVICTED and self.live[unit]:
                self._evict(unit)

    def _evict(self, unit: int) -> None:
        key = self.row["key"][unit].tobytes()
        self.live[unit] = False
        if self.at.get(key) == unit:
            del self.at[key]
        self.ghost[key] = int(self.uses[unit])
        while len(self.ghost) > 65536:
            self.ghost.popitem(last=False)

    def room(self, slot_class: int, share_free: float) -> None:
        (self.short.add if share_free < 0.3 else self.short.discard)(slot_class)

    def set_up(self, tier: int, up: bool) -> None:
        self.up[tier] = up

    def forget_tier(self, tier: int) -> None:
        self.row["below"] &= ~np.uint64(1 << tier)

    def below(self, units: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        return np.where(self.live[units], self.row["below"][units], 0).astype(np.uint64)

    def orders(self, now_ms: int, max_blocks: int) -> list[WriteOrder]:
        found: list[WriteOrder] = []
        for tier, rule in enumerate(self.rules):
            if rule.write is WriteRule.EVICTION and self.short and not self.queue[tier]:
                units = np.flatnonzero(self.live & (self.row["below"] & np.uint64(1 << tier) == 0) & (self.flying == 0))
                self.queue[tier].extend(units[np.argsort(self.stamp[units])][:max_blocks].tolist())
            if not self.up[tier]:
                continue
            run: list[int] = []
            while self.queue[tier] and max_blocks > 0:
                for unit in self._lineage(tier, self.queue[tier].popleft()):
                    if run and (
                        len(run) >= 256 or self.row["parent"][unit].tobytes() != self.row["key"][run[-1]].tobytes()
                    ):
                        found.append(self._order(tier, run))
                        run = []
                    run.append(unit)
                    self.flying[unit] |= np.uint64(1 << tier)
                    max_blocks -= 1
            if run:
                found.append(self._order(tier, run))
        return found

    def _lineage(self, tier: int, unit: int) -> list[int]:
        bit, line = np.uint64(1 << tier), []
        while True:
            if not self.live[unit] or (self.row["below"][unit] | self.flying[unit]) & bit:
                return line[::-1]
            line.append(unit)
            above = self.at.get(self.row["parent"][unit].tobytes())
            if above is None:
                return line[::-1]
            unit = above

    def _order(self, tier: int, run: list[int]) -> WriteOrder:
        units = np.array(run)
        row = self.row[units]
        return WriteOrder(
            tier,
            int(row["space"][0]),
            int(row["tenant"][0]),
            units,
            row["generation"].copy(),
            row["key"].copy(),
            row["parent"].copy(),
        )

    def stored(self, tier: int, units: Any, generations: Any, keys: Any) -> None:
        self.flying[units] &= ~np.uint64(1 << tier)
        self.row["below"][units] |= np.uint64(1 << tier)

    def refused(self, tier: int, units: Any, generations: Any, keys: Any, now_ms: int) -> None:
        self.flying[units] &= ~np.uint64(1 << tier)

    def gone(self, tier: int, keys: npt.NDArray[np.uint64]) -> None:
        for key in keys:
            if (unit := self.at.get(key.tobytes())) is not None:
                self.row["below"][unit] &= ~np.uint64(1 << tier)
                self.uses[unit] = 0

    def counts(self) -> dict[str, int]:
        return {"waiting": sum(map(len, self.queue)), "in_flight": int((self.flying != 0).sum())}
