"""Whether the tiering brain's tables agree with themselves. Reads only; looks at every row, for tests and fsck."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.core import tier_table as at
from penstock.core.tier_table import TierTable
from penstock.policies.facts import ConsistencyError

__all__ = ["assert_table"]

Nodes = NDArray[np.int64]


def assert_table(table: TierTable) -> None:
    """Raise ConsistencyError naming the first node that contradicts another."""
    live = _live(table)
    flags = table.slim[live, at.FLAGS]
    resident = live[flags & at.RESIDENT != 0]
    _assert_units(table, live, resident)
    _assert_families(table, live)
    _assert_rings(table, live, resident)
    for tier in range(table.n_tiers):
        _assert_tier(table, tier, live, resident)


def _none(what: str, nodes: Nodes, wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        raise ConsistencyError(f"node {int(nodes[np.flatnonzero(wrong)[0]])}: {what}")


def _same(what: str, counted: object, kept: object) -> None:
    if counted != kept:
        raise ConsistencyError(f"{what}: {counted}, but kept as {kept}")


def _live(table: TierTable) -> Nodes:
    """The rows in use: what the index names, once each, and all but the free ones."""
    live = np.sort(table.index[table.index != 0].astype(np.int64))
    _none("indexed twice", live[1:], live[1:] == live[:-1])
    free, at_row = set(), int(table.totals[at.FREE])
    while at_row and at_row not in free:
        free.add(at_row)
        at_row = int(table.slim[at_row, at.NEXT])
    _same("rows in use and free", sorted(free | set(live.tolist())), list(range(1, int(table.totals[at.HIGH]) + 1)))
    _same("rows in use and free at once", free & set(live.tolist()), set())
    keys = table.wide[live, : at.KEY1 + 1]
    _same("different keys", len(np.unique(keys, axis=0)), len(keys))
    return live


def _assert_units(table: TierTable, live: Nodes, resident: Nodes) -> None:
    units = table.slim[resident, at.UNIT].astype(np.int64) - 1
    _none("its unit holds another", resident, table.node_of[units] != resident)
    _same("units that hold blocks", int(np.count_nonzero(table.node_of)), len(resident))
    _same("resident blocks", len(resident), int(table.totals[at.RESIDENT_COUNT]))
    left = np.setdiff1d(live, resident)
    _none("left, and still admitted", left, table.wide[left, at.ADMITTED] != 0)
    _none("left, and still a child", left, table.slim[left, at.PARENT] != 0)
    flags, slim = table.slim[left, at.FLAGS], table.slim
    held = (flags & at.ROOT != 0) | (slim[left, at.CHILDREN] != 0) | (slim[left, at.FLYING] != 0)
    _none("a ghost that is held, or neither", left, held == (flags & at.GHOST != 0))


def _assert_families(table: TierTable, live: Nodes) -> None:
    slim = table.slim[: len(table.wide)].astype(np.int64)
    child = live[slim[live, at.PARENT] != 0]
    of = slim[child, at.PARENT]
    _none("its parent is no row", child, ~np.isin(of, live))
    counted = np.bincount(of, minlength=len(table.wide))
    _none("children miscounted", live, counted[live] != slim[live, at.CHILDREN])
    for parent in live[slim[live, at.CHILDREN] != 0].tolist():
        before, n, seen = 0, int(slim[parent, at.CHILD]), 0
        while n and seen <= counted[parent]:
            if slim[n, at.PARENT] != parent or slim[n, at.PREVIOUS] != before:
                raise ConsistencyError(f"node {n}: not where its parent {parent} has it")
            before, n, seen = n, int(slim[n, at.NEXT]), seen + 1
        _same(f"node {parent}: children found", seen, int(counted[parent]))


def _ring(table: TierTable, ring: int) -> list[int]:
    """From the oldest on; checks both directions."""
    nodes: list[int] = []
    before, n = ring, int(table.slim[ring, at.NEWER])
    while n not in (0, ring) and len(nodes) <= len(table.wide):
        if int(table.slim[n, at.OLDER]) != before:
            raise ConsistencyError(f"node {n}: linked one way only")
        nodes.append(n)
        before, n = n, int(table.slim[n, at.NEWER])
    return nodes


def _assert_rings(table: TierTable, live: Nodes, resident: Nodes) -> None:
    ghosts = _ring(table, len(table.wide))
    flags = table.slim[:, at.FLAGS]
    _same("ghosts", sorted(ghosts), live[flags[live] & at.GHOST != 0].tolist())
    _same("ghosts' number", len(ghosts), int(table.totals[at.GHOSTS]))
    classes = table.slim[resident, at.CLASS]
    _same("resident by class", int(table.classes[:, at.RESIDENTS].sum()), len(resident))
    for slot_class in np.unique(classes).tolist():
        ring = _ring(table, len(table.wide) + 1 + slot_class)
        _same(f"class {slot_class}", sorted(ring), resident[classes == slot_class].tolist())
        of = table.classes[slot_class].tolist()
        _same(f"class {slot_class}, residents", len(ring), of[at.RESIDENTS])
        cold = [n for n in ring if flags[n] & at.COLD]
        _same(f"class {slot_class}, cold end", ring[: len(cold)], cold)
        _same(f"class {slot_class}, hand", [cold[-1] if cold else 0, len(cold)], [of[at.HAND], of[at.COLD_COUNT]])


def _assert_tier(table: TierTable, tier: int, live: Nodes, resident: Nodes) -> None:
    wide, slim, leg = table.wide, table.slim, table.legs[tier]
    bit, what = np.uint64(1 << tier), f"tier {tier}"
    wanted = resident[(wide[resident, at.ADMITTED] & ~wide[resident, at.BELOW] & bit) != 0]
    _same(f"{what}: wanted blocks", len(wanted), int(table.tiers[tier, at.WAITING]))
    flying = live[slim[live, at.FLYING] == tier + 1]
    _same(f"{what}: in flight", len(flying), int(table.tiers[tier, at.IN_FLIGHT]))
    listed = live[leg[live, at.PLACE] != 0]
    _none(f"{what}: listed, and not wanted", listed, ~np.isin(listed, wanted))
    first = listed[leg[listed, at.PLACE] == 1]
    _none(f"{what}: to be written while it is being written", first, slim[first, at.FLYING] != 0)
    _none(f"{what}: admitted and barred", wanted, leg[wanted, at.BAR] != 0)
    _assert_lists(table, tier, listed)
    # What can be written is on a list: else it would wait for ever.
    parents = slim[wanted, at.PARENT]
    can = (wide[parents, at.BELOW] & bit != 0) & (parents != 0) & (slim[wanted, at.FLYING] == 0)
    _none(f"{what}: could be written, and is on no list", wanted, can & (leg[wanted, at.PLACE] == 0))
    # And what cannot, waits for a parent that is wanted there itself, or cannot be.
    admitted = (wide[parents, at.ADMITTED] | wide[parents, at.BELOW]) & bit != 0
    excused = (slim[parents, at.FLAGS] & at.RESIDENT == 0) | (leg[parents, at.BAR] != 0)
    _none(f"{what}: wanted there without its parent", wanted, ~admitted & ~excused)


def _assert_lists(table: TierTable, tier: int, listed: Nodes) -> None:
    leg, found = table.legs[tier].astype(np.int64), []
    for place in range(table.lists.shape[1]):
        head, tail, length = (int(value) for value in table.lists[tier, place])
        nodes: list[int] = []
        before, n = 0, head
        while n and len(nodes) <= length:
            if leg[n, at.AHEAD] != before or leg[n, at.PLACE] != place + 1:
                raise ConsistencyError(f"node {n}: not where list {place} of tier {tier} has it")
            nodes.append(n)
            before, n = n, int(leg[n, at.BEHIND])
        _same(f"tier {tier}, list {place}", [len(nodes), before], [length, tail])
        found += nodes
    _same(f"tier {tier}: listed blocks", sorted(found), listed.tolist())
