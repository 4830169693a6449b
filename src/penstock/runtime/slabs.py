"""Which slab serves which slot size: fresh ones, empty ones, and one cleared for another class.

Rare work, so it is plain numpy. A slab changes hands only when it holds no block and no grant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penstock.pool.authority import Authority

__all__ = ["Turnover", "coldest_foreign_slab", "take_fresh_slab", "with_descendants"]

# A class whose wish for a slab was in vain waits for twice as many turnovers, at most this many.
_MAX_PATIENCE = 8


@dataclass(slots=True)
class Turnover:
    """How much of what a class holds it has evicted for itself: after all of it, others' slabs are worth a look."""

    evicted: int = 0
    since: int = 0
    """The keeper's use counter when counting began."""
    patience: int = 1

    def add(self, n: int, now: int) -> None:
        """n more blocks were evicted, at this use count."""
        if not self.evicted:
            self.since = now
        self.evicted += n

    def looked(self, taken: bool) -> None:
        """Begin anew after a look at the others' slabs."""
        self.evicted, self.patience = 0, 1 if taken else min(2 * self.patience, _MAX_PATIENCE)


def take_fresh_slab(authority: Authority, slot_class: int) -> bool:
    """Give a class an unassigned slab whose memory is ready, or an empty one of another class; False without one."""
    if not 0 <= slot_class < len(authority.shapes):
        return False
    classes = authority.slab_classes()
    ready = np.arange(len(classes)) < authority.touched_slabs()
    unassigned = np.flatnonzero((classes < 0) & ready)
    if len(unassigned):
        authority.assign_slab(int(unassigned[0]), slot_class)
        return True
    empty = np.flatnonzero((classes >= 0) & (classes != slot_class) & (authority.slab_used() == 0))
    if len(empty):
        authority.unassign_slab(int(empty[0]))
        authority.assign_slab(int(empty[0]), slot_class)
        return True
    return False


def coldest_foreign_slab(authority: Authority, slot_class: int, unused_since: int | None = None) -> int | None:
    """The slab of another class, without grants, whose most recently used block is the oldest; None if there is none.

    Only a class that holds more slabs than `slot_class` gives one up, so that two busy classes settle at equal shares;
    but any class a slab of which no block was used since the use count `unused_since`.
    """
    classes = authority.slab_classes()
    own = int((classes == slot_class).sum())
    best, best_use = None, None
    for slab in np.flatnonzero((classes >= 0) & (classes != slot_class)):
        poor = int((classes == classes[slab]).sum()) <= own + 1
        if (poor and unused_since is None) or authority.has_grants(int(slab)):
            continue
        blocks = authority.slab_blocks(int(slab))
        use = int(authority.stamps(blocks).max()) if len(blocks) else -1
        if (best_use is None or use < best_use) and (unused_since is None or use <= unused_since):
            best, best_use = int(slab), use
    return best


def with_descendants(
    authority: Authority, blocks: npt.NDArray[np.uint32], resident: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint32]:
    """Those blocks and every resident block that continues one of their chains, children before parents.

    Pointer jumping: after k rounds each block knows about its 2**k nearest ancestors.
    """
    parents = authority.parents().copy()
    units = np.flatnonzero(resident)
    doomed = np.zeros(len(parents) + 1, bool)
    doomed[blocks] = True
    jump = np.full(len(parents) + 1, len(parents), np.int64)
    jump[units] = np.where(parents[units] >= 0, parents[units], len(parents))
    depth = np.zeros(len(parents) + 1, np.int64)
    depth[units] = jump[units] < len(parents)
    while (jump[units] < len(parents)).any():
        doomed[units] |= doomed[jump[units]]
        depth[units] += depth[jump[units]]
        jump[units] = jump[jump[units]]
    chosen = units[doomed[units]]
    order = np.argsort(-depth[chosen], kind="stable")
    return chosen[order].astype(np.uint32)
