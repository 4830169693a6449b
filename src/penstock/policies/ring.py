"""Rings of blocks from newest to oldest use, one per slot class: what list-based policies are built from.

Links are [n_units + n_classes, 2] of unit numbers. Row n_units + c is the fixed node that closes the ring
of class c: its OLDER link is the newest block, its NEWER link the oldest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.jit import inline_kernel
from penstock.policies.facts import Facts, Words, expect_none
from penstock.types import NO_UNIT

__all__ = ["NEWER", "OFF", "OLDER", "PASSED", "assert_rings", "build_rings", "empty_links", "put_behind", "unlink"]

NEWER, OLDER = 0, 1
# Values of a block's NEWER link while it is not on a ring. No unit can have these numbers.
OFF = NO_UNIT
PASSED = NO_UNIT - 1
"""Off the ring for as long as it has children."""


@inline_kernel
def unlink(links: Any, unit: Any) -> Any:
    """Take a block off its ring; the caller says in its NEWER link what it is now."""
    newer, older = links[unit, NEWER], links[unit, OLDER]
    links[newer, OLDER] = older
    links[older, NEWER] = newer


@inline_kernel
def put_behind(links: Any, newer: Any, unit: Any) -> Any:
    """Put a block that is on no ring right behind a block or a ring's node, as the next older one."""
    older = links[newer, OLDER]
    links[unit, NEWER] = newer
    links[unit, OLDER] = older
    links[newer, OLDER] = unit
    links[older, NEWER] = unit


def empty_links(n_units: int, n_classes: int) -> Words:
    """No block on any ring."""
    links = np.full((n_units + n_classes, 2), OFF, np.uint32)
    links[n_units:] = np.arange(n_units, len(links))[:, None]
    return links


def build_rings(links: Words, facts: Facts, units: NDArray[np.int64]) -> None:
    """Put these blocks, given from oldest to newest and the only ones, on their classes' rings."""
    links[:] = empty_links(facts.n_units, facts.n_classes)
    classes = facts.rows["slot_class"][units]
    for slot_class in range(facts.n_classes):
        node = facts.n_units + slot_class
        ring = np.concatenate(([node], units[classes == slot_class], [node]))
        links[ring[:-1], NEWER] = ring[1:]
        links[ring[1:], OLDER] = ring[:-1]


def assert_rings(links: Words, facts: Facts) -> None:
    """Raise ConsistencyError unless each resident, unpicked block is on its class's ring or passed over.

    Reads only; vectorised.
    """
    wide = links.astype(np.int64)
    n_units = facts.n_units
    linked, passed = wide[:n_units, NEWER] < PASSED, wide[:n_units, NEWER] == PASSED
    expect_none("in the order and not in it", (facts.resident() & ~facts.picked()) != (linked | passed))
    expect_none("passed over without children", passed & (facts.rows["open"] == 0))
    nodes = np.concatenate((np.flatnonzero(linked), np.arange(n_units, len(wide))))
    expect_none("linked to outside the pool", wide[nodes].max(axis=1) >= len(wide), nodes)
    for there, back in ((NEWER, OLDER), (OLDER, NEWER)):
        expect_none("linked one way only", wide[wide[nodes, there], back] != nodes, nodes)
    blocks = nodes[nodes < n_units]
    own = n_units + facts.rows["slot_class"][blocks].astype(np.int64)
    expect_none("on no ring or another class's", _ring_of(wide, blocks) != own, blocks)


def _ring_of(links: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    ahead = np.arange(len(links))
    ahead[blocks] = links[blocks, OLDER]
    # Each round doubles the distance looked ahead; a ring's own node looks at itself.
    for _ in range(len(blocks).bit_length()):
        ahead = ahead[ahead]
    return ahead[blocks]
