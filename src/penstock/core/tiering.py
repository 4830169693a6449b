"""When blocks are written to the tiers below the pool, and to which: one pure state machine.

Covers each tier's rule, replicas, what lies below as far as is known, what is in flight, retries and hysteresis. Does
not write anything and reads no clock: the mover (`runtime/mover.py`) feeds events and answers and carries out the
orders. Which transfer runs first is `core/queue.py`'s business, what leaves the pool the brain's. Not thread-safe.

    COMMITTED, TOUCHED --rule--> admitted --parent is below--> ready --orders--> in flight --stored--> below
                                    ^                            ^                   |
                                    |                            +-- after a while --+ refused
                                    +--- after two further uses -------- gone, or refused too often

A block is ordered for a tier only behind its parent in the same run, or once the tier has the parent: so a tier holds
chains from their heads, whatever is written when, and what one refusal breaks is mended from there. Admitting a block
therefore admits its ancestors in the pool. Chains begin at roots, which must be told (`add_root`); a parent of all
zeros counts as one.

Hysteresis: what a tier dropped, and what it refused so often that retrying ends, is written there again after two
further uses. Everything else that was admitted stays so until the block leaves the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from penstock.core import tier_steps as steps
from penstock.core import tier_table as at
from penstock.core.tier_checks import assert_table
from penstock.core.tier_table import TierTable
from penstock.errors import ConfigError
from penstock.types import NO_UNIT, WriteRule

__all__ = ["TierRule", "Tiering", "WriteOrder", "tier_event_dtype"]

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
"""One event. `kind` is an `EventKind`: COMMITTED fills all columns, TOUCHED, KEPT and EVICTED only `unit`; bit t of
`below` says that tier t is known to have the block. `block_bytes` and `priority` are not read by today's rules."""

RUN_BLOCKS = 256
"""The most blocks of one order: large enough to fill a device, small enough that urgent work soon gets its turn."""

SHORT = 1 / 8
"""The share of a class that EVICTION keeps free or clean. The pool evicts in batches far below it, so that a burst of
that size finds slots whose blocks are saved; and no more than it is written that may be used again."""

_EVENT_WORDS = tier_event_dtype.itemsize // 8
_MAX_GHOSTS = 2**26
_CHEAPEST_FIRST = (WriteRule.THROUGH, WriteRule.SECOND_USE, WriteRule.EVICTION)

Keys = NDArray[np.uint64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TierRule:
    """A tier and when blocks are written to it; its number is its place in the sequence."""

    name: str
    write: WriteRule


@dataclass(frozen=True, slots=True)
class WriteOrder:
    """Write these blocks, a run of one chain of one space, to this tier; each block's parent is the one before it, but
    for the first. They are in flight until `stored`, or `refused`, has named each of them."""

    tier: int
    space: int
    tenant: int
    units: Numbers
    """(n,)"""
    generations: Numbers
    """(n,)"""
    keys: Keys
    """(n, 2)"""
    parents: Keys
    """(n, 2)"""


class Tiering:
    """What lies where below a pool of `n_units` units, and what to write next.

    `replicas` is the number of tiers, of those that are written to at all, that must hold a block as soon as one rule
    admits it; by tenant (its 8-byte digest, 0 for all others) or for all. Further copies go where the rule is cheapest:
    THROUGH, SECOND_USE, EVICTION, then in the order of `rules`; to tiers that are up before those that are not.
    `ghosts` is of how many keys that left the pool the uses are remembered. Times are milliseconds of any clock; one
    that runs backwards is taken to stand. Raises ConfigError for sizes that cannot be.

    Memory is about 130 bytes a block and 28 a block and tier, claimed from the system as blocks come.
    """

    def __init__(
        self,
        n_units: int,
        rules: Sequence[TierRule],
        *,
        replicas: Mapping[int, int] | int = 1,
        ghosts: int = 65536,
    ) -> None:
        if not 1 <= n_units < NO_UNIT or not 0 <= ghosts <= _MAX_GHOSTS or len(rules) > at.MAX_TIERS:
            raise ConfigError(
                f"tiering for {n_units} units, {len(rules)} tiers and {ghosts} ghosts; use 1 to {NO_UNIT - 1} units, "
                f"at most {at.MAX_TIERS} tiers and {_MAX_GHOSTS} ghosts."
            )
        self.rules = tuple(rules)
        self._table = TierTable(n_units, len(rules), ghosts)
        self._set_masks()
        self._all = self._table.all()
        self._tenants, self._copies, self._default_copies = _copies(replicas)
        self._short: dict[int, float] = {}
        self._now_ms = 0
        self._run = np.zeros(RUN_BLOCKS, np.int64)
        steps.add_root(self._all, 0, 0)

    def add_root(self, key: bytes) -> None:
        """Chains begin behind this key (16 bytes, a space's root). May come after the first blocks; idempotent.

        Raises ConfigError if it is a block's key, or no key at all.
        """
        words = np.frombuffer(key, "<u8") if len(key) == 16 else None
        if words is None or not steps.add_root(self._all, words[0], words[1]):
            raise ConfigError(f"{key.hex()} cannot be a space's root: give 16 bytes that are not a block's key.")

    def observe(self, events: NDArray[np.void], now_ms: int) -> None:
        """Take in a batch ([n] of tier_event_dtype), in order.

        What cannot be (an event of a unit that we do not know or that is not there) is counted as `unknown` and left
        out: events may be lost, and a lost block is only written later or never. Raises TypeError for another dtype.
        """
        if events.dtype != tier_event_dtype or not events.flags.c_contiguous:
            raise TypeError(f"events are a contiguous array of tier_event_dtype, not {events.dtype}")
        self._advance(now_ms)
        copies = np.full(len(events), self._default_copies, np.uint32)
        if len(self._tenants):
            found = np.minimum(np.searchsorted(self._tenants, events["tenant"]), len(self._tenants) - 1)
            named = self._tenants[found] == events["tenant"]
            copies[named] = self._copies[found[named]]
        steps.observe(self._all, events.view(np.uint64).reshape(len(events), _EVENT_WORDS), copies)

    def room(self, slot_class: int, share_free: float) -> None:
        """How much of a class's slots are free now, 0 to 1; below an eighth, EVICTION tiers get its coldest blocks."""
        if not 0 <= slot_class < at.MAX_CLASSES:
            raise ConfigError(f"slot class {slot_class}; there are at most {at.MAX_CLASSES}.")
        if share_free < SHORT:
            self._short[slot_class] = max(0.0, share_free)
        else:
            self._short.pop(slot_class, None)

    def orders(self, now_ms: int, max_blocks: int) -> list[WriteOrder]:
        """What to write now, at most `max_blocks` blocks; they are in flight from now on.

        Where several tiers wait, the one with the fewest blocks in flight gets the next run, so that a slow tier does
        not keep the others waiting.
        """
        self._advance(now_ms)
        steps.release(self._all, self._now_ms)
        self._clean(max_blocks)
        orders: list[WriteOrder] = []
        while max_blocks > 0 and (tier := self._next_tier()) is not None:
            n = int(steps.take_run(self._all, tier, self._run[: min(RUN_BLOCKS, max_blocks)]))
            if n:
                orders.append(self._order(tier, self._run[:n]))
                max_blocks -= n
        return orders

    def stored(self, tier: int, units: Numbers, generations: Numbers, keys: Keys) -> None:
        """The tier has these blocks: writing them succeeded, or they were there already. Keys alone say which."""
        self._land(tier, units, generations, keys, True)

    def refused(self, tier: int, units: Numbers, generations: Numbers, keys: Keys, now_ms: int) -> None:
        """Writing these blocks ended, and they are not there. They are tried again after 0.25, 1, 4 and 16 s, and then
        only after two further uses; while the tier is down none of that counts."""
        self._advance(now_ms)
        self._land(tier, units, generations, keys, False)

    def gone(self, tier: int, keys: Keys) -> None:
        """The tier dropped or lost these blocks, those of them that it is thought to have. A write of one that is in
        flight will not be believed."""
        steps.drop(self._all, self._checked(tier), _words(keys))

    def set_up(self, tier: int, up: bool) -> None:
        """Whether the tier can be reached. One that cannot gets no orders; what it has stays known."""
        bit = np.uint64(1) << np.uint64(self._checked(tier))
        masks = self._table.masks
        masks[at.UP] = masks[at.UP] | bit if up else masks[at.UP] & ~bit

    def forget_tier(self, tier: int) -> None:
        """The tier has nothing, or nobody knows what: everything that was admitted there is wanted again, and nothing
        that is in flight there will be believed. The only step whose time grows with all that is remembered."""
        steps.forget(self._all, self._checked(tier))

    def below(self, units: NDArray[np.integer]) -> NDArray[np.uint64]:
        """(n,): bit t is set where tier t is known to have the block that this unit holds; 0 for no such block."""
        found: NDArray[np.uint64] = self._table.wide[self._table.node_of[units], at.BELOW]
        return found

    def counts(self) -> dict[str, int]:
        """Now: `resident` blocks, `ghosts`; (block, tier) pairs that are `waiting`, those in flight included, of which
        `ready` to be ordered as the first of a run and `delayed` until a retry; blocks `in_flight`. Since the start:
        pairs `admitted`, `stored`, `refused`, `gave_up` (refused too often), `dropped` by a tier; blocks `kept_off`
        (left the pool before SECOND_USE admitted them), `lost_unsaved` (left the pool while no tier had them and a rule
        wanted them); `unknown` events."""
        table, totals = self._table, self._table.totals
        named = {
            "resident": at.RESIDENT_COUNT, "ghosts": at.GHOSTS, "admitted": at.ADMITTED_TOTAL,
            "stored": at.STORED_TOTAL, "refused": at.REFUSED_TOTAL, "gave_up": at.GAVE_UP, "dropped": at.DROPPED,
            "kept_off": at.KEPT_OFF, "lost_unsaved": at.LOST, "unknown": at.UNKNOWN,
        }  # fmt: skip
        return {
            "waiting": int(table.tiers[:, at.WAITING].sum()),
            "ready": int(table.lists[:, 0, at.LENGTH].sum()),
            "delayed": int(table.lists[:, 1:, at.LENGTH].sum()),
            "in_flight": int(table.tiers[:, at.IN_FLIGHT].sum()),
        } | {name: int(totals[entry]) for name, entry in named.items()}

    def assert_consistent(self) -> None:
        """Raise ConsistencyError naming what is wrong with the tables. Reads only; looks at every row."""
        assert_table(self._table)

    def _set_masks(self) -> None:
        masks = self._table.masks
        by_rule = {rule: sum(1 << tier for tier, of in enumerate(self.rules) if of.write == rule) for rule in WriteRule}
        masks[at.THROUGH] = by_rule[WriteRule.THROUGH]
        masks[at.SECOND_USE] = by_rule[WriteRule.SECOND_USE]
        masks[at.EVICTION] = by_rule[WriteRule.EVICTION]
        masks[at.ALL] = masks[at.UP] = sum(by_rule.values())
        masks[at.WRITABLE] = sum(by_rule[rule] for rule in _CHEAPEST_FIRST)
        self._table.order = np.array(
            [tier for rule in _CHEAPEST_FIRST for tier, of in enumerate(self.rules) if of.write == rule], np.int64
        )

    def _advance(self, now_ms: int) -> None:
        self._now_ms = max(self._now_ms, int(now_ms))

    def _checked(self, tier: int) -> int:
        if not 0 <= tier < len(self.rules):
            raise ConfigError(f"tier {tier}; there are {len(self.rules)}.")
        return tier

    def _clean(self, max_blocks: int) -> None:
        """Let EVICTION admit the coldest blocks of each short class: as many as the free slots lack to an eighth."""
        if not self._table.masks[at.EVICTION]:
            return
        for slot_class, free in self._short.items():
            slots = int(self._table.classes[slot_class, at.RESIDENTS]) / (1 - free)
            steps.clean(self._all, slot_class, ceil(slots * (SHORT - free)), max_blocks)

    def _next_tier(self) -> int | None:
        table = self._table
        waiting = [
            tier
            for tier in range(len(self.rules))
            if table.lists[tier, 0, at.LENGTH] and int(table.masks[at.UP]) >> tier & 1
        ]
        return min(waiting, key=lambda tier: int(table.tiers[tier, at.IN_FLIGHT]), default=None)

    def _order(self, tier: int, nodes: Numbers) -> WriteOrder:
        wide, slim = self._table.wide, self._table.slim
        return WriteOrder(
            tier,
            int(slim[nodes[0], at.SPACE]),
            int(wide[nodes[0], at.TENANT]),
            slim[nodes, at.UNIT].astype(np.int64) - 1,
            wide[nodes, at.GENERATION].view(np.int64),
            wide[nodes, : at.KEY1 + 1],
            wide[slim[nodes, at.PARENT], : at.KEY1 + 1],
        )

    def _land(self, tier: int, units: Numbers, generations: Numbers, keys: Keys, stored: bool) -> None:
        words = _words(keys)
        if not len(units) == len(generations) == len(words):
            raise ValueError(f"{len(units)} units, {len(generations)} generations and {len(words)} keys do not agree")
        steps.land(self._all, self._checked(tier), words, stored, self._now_ms)


def _words(keys: Keys) -> Keys:
    return np.ascontiguousarray(keys, np.uint64).reshape(-1, 2)


def _copies(replicas: Mapping[int, int] | int) -> tuple[NDArray[np.uint64], NDArray[np.uint32], int]:
    """Tenants in ascending order, the number for each, and the number for all others."""
    by_tenant = {0: replicas} if isinstance(replicas, int) else dict(replicas)
    if any(not 0 <= copies <= at.MAX_TIERS for copies in by_tenant.values()):
        raise ConfigError(f"replicas {by_tenant}; give each tenant 0 to {at.MAX_TIERS}.")
    default = by_tenant.pop(0, 1)
    tenants = sorted(by_tenant)
    copies = np.array([by_tenant[tenant] for tenant in tenants], np.uint32)
    return np.array(tenants, np.uint64), copies, default
