"""Events of the tiering brain, one by one: what its tests are written in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.core.tiering import Tiering, WriteOrder, tier_event_dtype
from penstock.types import EventKind

ROOT = 1 << 40
"""Keys are small numbers here; this one comes before the first block of every chain."""


def words(keys: Sequence[int]) -> NDArray[np.uint64]:
    return np.array([[key, 0] for key in keys], np.uint64).reshape(-1, 2)


def root_bytes(root: int = ROOT) -> bytes:
    return words([root]).tobytes()


def row(kind: EventKind, unit: int, **columns: object) -> NDArray[np.void]:
    """(1,): what is not named is 0."""
    event = np.zeros(1, tier_event_dtype)
    event["kind"], event["unit"] = kind, unit
    for name, value in columns.items():
        event[name] = value
    return event


def committed(
    unit: int, key: int, parent: int = ROOT, *, generation: int = 1, below: int = 0, tenant: int = 0,
    slot_class: int = 0, space: int = 0,
) -> NDArray[np.void]:  # fmt: skip
    return row(
        EventKind.COMMITTED, unit, key=(key, 0), parent=(parent, 0), generation=generation, below=below, tenant=tenant,
        slot_class=slot_class, space=space, block_bytes=4096,
    )  # fmt: skip


def touched(unit: int) -> NDArray[np.void]:
    return row(EventKind.TOUCHED, unit)


def evicted(unit: int) -> NDArray[np.void]:
    return row(EventKind.EVICTED, unit)


def chain(first: int, n: int, parent: int = ROOT, *, slot_class: int = 0, tenant: int = 0) -> list[NDArray[np.void]]:
    """n blocks in units first .. first + n - 1 with keys of the same numbers plus 1."""
    parents = [parent, *range(first + 1, first + n)]
    return [committed(first + i, first + i + 1, parents[i], slot_class=slot_class, tenant=tenant) for i in range(n)]


def tell(tiering: Tiering, *events: NDArray[np.void], now_ms: int = 0) -> None:
    """One batch; the tables are checked after it."""
    tiering.observe(np.concatenate(events), now_ms)
    tiering.assert_consistent()


def ask(tiering: Tiering, max_blocks: int = 1000, now_ms: int = 0) -> list[WriteOrder]:
    orders = tiering.orders(now_ms, max_blocks)
    tiering.assert_consistent()
    return orders


def store(tiering: Tiering, orders: list[WriteOrder]) -> None:
    for order in orders:
        tiering.stored(order.tier, order.units, order.generations, order.keys)
        tiering.assert_consistent()


def refuse(tiering: Tiering, orders: list[WriteOrder], now_ms: int = 0) -> None:
    for order in orders:
        tiering.refused(order.tier, order.units, order.generations, order.keys, now_ms)
        tiering.assert_consistent()


def drain(tiering: Tiering, now_ms: int = 0) -> list[tuple[int, int]]:
    """Store whatever is ordered until nothing is; (tier, key) in order."""
    done: list[tuple[int, int]] = []
    while orders := ask(tiering, now_ms=now_ms):
        done += named(orders)
        store(tiering, orders)
    return done


def named(orders: list[WriteOrder]) -> list[tuple[int, int]]:
    return [(order.tier, int(key)) for order in orders for key in order.keys[:, 0]]
