"""Death of the keeper before every store it makes: what it leaves is recovered and checked, each time.

One run goes through all that a keeper does. Before a store, the segment is copied; the copy is what `kill -9` at that
instant leaves. Another keeper recovers the copy and everything must hold there: no committed block lost, no leased
block moved, no grant lost or given twice, and `fsck` finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import numpy.typing as npt
import pytest

import penstock
from penstock.errors import PenstockError
from penstock.pool import layout
from penstock.pool import segment as segments
from penstock.pool.layout import COMMIT_BYTES, GRANT_BYTES, KIND_ABORT, KIND_COMMIT, Geometry, LaneState, SlotState
from penstock.pool.locks import FIRST_LANE_BYTE
from penstock.pool.segment import Mapping
from penstock.pool.slots import lease_handles
from penstock.runtime.keeper import Keeper
from penstock.runtime.report import fsck_report
from penstock.testing.pool import Site
from tests.conftest import Scale
from tests.faults.load import WIDE
from tests.faults.stepwise import Stepwise
from tests.support import SPACE, chain, contents, store, tensors, unique_name

pytestmark = pytest.mark.faults

# 60 small slots, or 12 wide ones; rings that do not wrap in one run, so that they tell the whole story.
GEOMETRY = Geometry(
    unit_bytes=4096, slab_bytes=64 << 10, n_slabs=4, n_lanes=3, leases=64, ring=1024, max_spaces=4
)  # fmt: skip
Key = tuple[int, int]


class Alive:
    """Locks as they were when the keeper died."""

    def __init__(self, lanes: list[int]) -> None:
        self._bytes = {FIRST_LANE_BYTE + lane for lane in lanes}

    def held_by_other(self, byte: int) -> bool:
        return byte in self._bytes


class Autopsy:
    """Recovers copies of the segment in a file of its own, and says what a crash must not have changed."""

    def __init__(self, site: Site, every: int, again_every: int = 0) -> None:
        self.site, self.every, self.again_every = site, every, again_every
        self.stores = self.checked = self.checked_again = 0
        self.evicting = False
        self.committed: set[Key] = set()
        self.refused: set[Key] = set()
        self.leased: dict[Key, tuple[int, int]] = {}
        path = segments.default_path(unique_name("autopsy"))
        self.segment = segments.create(path, GEOMETRY)
        self.copy = self.segment.map(0, GEOMETRY.total_bytes, writable=True)
        self.steps = Stepwise(self.before_store)
        self.recover_slowly = False
        """Recover with the (edited) Python kernels as well."""
        self._examining = False

    def close(self) -> None:
        self.segment.close()
        self.segment.path.unlink()

    # ---- before every store

    def before_store(self, mapping: Mapping) -> None:
        if self._examining:
            return
        self.stores += 1
        if self.stores % self.every == 0:
            self._examining = True
            with nullcontext() if self.recover_slowly else self.steps.paused():
                self.examine(mapping.array.copy())
            self._examining = False

    def examine(self, image: npt.NDArray[np.uint8]) -> None:
        """Recover this image. Every `again_every`-th time, also what a keeper leaves that dies while recovering it."""
        self.checked += 1
        lanes = [lane for lane in range(GEOMETRY.n_lanes) if self._lock_held(lane)]
        granted, committed = self._told(image, lanes)
        self.committed |= committed
        self._recover(image, lanes, granted)
        if self.again_every and self.checked % self.again_every == 0:
            images: list[npt.NDArray[np.uint8]] = []
            second = Stepwise(lambda mapping: images.append(mapping.array.copy()))
            self.copy.array[:] = image
            with second.running():
                Keeper(self.segment, Alive(lanes))  # type: ignore[arg-type]
            for left in images[:: max(1, len(images) // 50)]:
                self.checked_again += 1
                self._recover(left, lanes, granted)

    def _lock_held(self, lane: int) -> bool:
        return self.site.link._locks.held_by_other(FIRST_LANE_BYTE + lane)

    def _told(self, image: npt.NDArray[np.uint8], alive: list[int]) -> tuple[set[tuple[int, int]], set[Key]]:
        """What rings say: (unit, generation) that live clients were granted and have not used; keys committed."""
        granted: set[tuple[int, int]] = set()
        used: set[tuple[int, int]] = set()
        committed: set[Key] = set()
        for lane in range(GEOMETRY.n_lanes):
            at = GEOMETRY.lanes_offset + lane * GEOMETRY.lane_bytes
            words = image[at : at + GEOMETRY.lane_bytes].view(np.int64)
            if words[layout.L_STATE // 8] != LaneState.USED:
                continue
            n = int(words[layout.L_COMMIT_HEAD // 8])
            rows = words[GEOMETRY.commit_ring_offset // 8 :][: n * COMMIT_BYTES // 8].reshape(n, COMMIT_BYTES // 8)
            used |= {(int(row[1]), int(row[2])) for row in rows if row[0] in (KIND_COMMIT, KIND_ABORT)}
            committed |= {(int(row[4]), int(row[5])) for row in rows if row[0] == KIND_COMMIT}
            if lane in alive:
                n = int(words[layout.L_GRANT_HEAD // 8])
                rows = words[GEOMETRY.grant_ring_offset // 8 :][: n * GRANT_BYTES // 8].reshape(n, 2)
                granted |= {(int(row[0]) & 0xFFFFFFFF, int(row[1])) for row in rows}
        return granted - used, committed

    def _recover(self, image: npt.NDArray[np.uint8], lanes: list[int], granted: set[tuple[int, int]]) -> None:
        self.copy.array[:] = image
        keeper = Keeper(self.segment, Alive(lanes))  # type: ignore[arg-type]
        report = fsck_report(keeper)
        assert report["problems"] == []
        records = keeper.authority.records().astype(np.int64)
        states = records[:, layout.R_STATE // 8] & 0xFF
        found: dict[Key, tuple[int, int]] = {}
        for unit in np.flatnonzero(states == SlotState.READY):
            row = records[unit]
            key = int(row[layout.R_KEY // 8]), int(row[layout.R_KEY // 8 + 1])
            found[key] = int(unit), int(row[0])
            at = keeper.authority.slot_addresses(int(unit))[0] - keeper.authority.mapping.address
            size = int(row[layout.R_LENGTH // 8])
            words = row[layout.R_KEY // 8 : layout.R_KEY // 8 + 2].view(np.uint64)
            assert np.array_equal(keeper.authority.mapping.array[at : at + size], contents(words, size)[0])
        for key, place in self.leased.items():
            assert found.get(key) == place, "a leased block moved or went"
        if not self.evicting:
            assert self.committed - self.refused <= found.keys(), "a committed block is gone"
        kept = {(int(unit), int(records[unit, 0])) for unit in np.flatnonzero(states == SlotState.GRANTED)}
        assert kept == granted, "grants were lost, or kept although nobody has them"

    # ---- what clients hold

    @contextmanager
    def leasing(self, lease: penstock.Lease) -> Iterator[None]:
        """These blocks must stay where they are."""
        n = len(lease)
        handles, keys = np.zeros((n, 2), np.int64), np.zeros((n, 2), np.uint64)
        lease_handles(lease._at.ctx, lease._cell, n, handles, keys)
        mine = {
            (int(key[0]), int(key[1])): (int(place[0]), int(place[1]))
            for key, place in zip(keys.view(np.int64), handles, strict=True)
        }
        self.leased |= mine
        yield
        for key in mine:
            del self.leased[key]


def go_through_everything(site: Site, autopsy: Autopsy) -> None:
    """Spaces, slabs, grants, commits of every outcome, hits, a death, eviction under leases, another slot size."""
    pool, keeper = site.pool, site.link.keeper
    handle = pool.space(SPACE)
    for number in range(3):
        assert store(pool, handle, chain(number, blocks=4)).n_blocks == 4
    with pool.match(handle, chain(0, blocks=4)):
        site.link.ring()
    store(pool, handle, chain(0, blocks=2))  # there already
    orphan = chain(9, blocks=3)
    autopsy.refused |= {(int(key[0]), int(key[1])) for key in orphan[2:].array.view(np.int64)}
    store(pool, handle, orphan[2:])  # its parent never was
    with pool.reserve(handle, 3, 1.0):
        pass
    pool.return_idle_grants()
    site.link.ring()

    mortal = site.client()
    theirs = mortal.space(SPACE)
    assert store(mortal, theirs, chain(10, blocks=4)).n_blocks == 4
    site.deaf = True
    with mortal.reserve(theirs, 2, 0.0) as reservation:
        keys = chain(11, blocks=len(reservation))
        reservation.commit(keys, tensors(contents(keys.array)) if len(keys) else None)
    site.deaf = False
    site.kill(mortal)
    assert keeper.authority.n_ready >= 16

    autopsy.evicting = True
    held = pool.match(handle, chain(1, blocks=4))
    with autopsy.leasing(held):
        for number in range(20, 40):
            store(pool, handle, chain(number, blocks=4), wait_s=1.0)
        pool.return_idle_grants()
        site.link.ring()
        wide = pool.space(WIDE)
        for number in range(3):
            assert store(pool, wide, chain(50, number, blocks=1, space=WIDE), wait_s=1.0).n_blocks == 1
        pool.return_idle_grants()
        site.link.ring()
    held.release()
    for number in range(60, 65):
        store(pool, handle, chain(number, blocks=4), wait_s=1.0)
    keeper.stop()


def dissect(every: int, again_every: int = 0, edits: dict[tuple[str, str], tuple[str, str]] | None = None) -> Autopsy:
    with Site.opened(unique_name(), GEOMETRY) as site:
        autopsy = Autopsy(site, every, again_every)
        autopsy.steps = Stepwise(autopsy.before_store, edits)
        autopsy.recover_slowly = any(module == "recover" for module, _ in edits or ())
        autopsy.steps._mappings.append(site.link.keeper.authority.mapping)
        try:
            with autopsy.steps.running():
                go_through_everything(site, autopsy)
        finally:
            autopsy.close()
    return autopsy


def test_death_before_any_store_loses_nothing(scale: Scale) -> None:
    autopsy = dissect(every=scale.of(17, 1), again_every=scale.of(40, 40))
    print(f"{autopsy.stores} stores, {autopsy.checked} recoveries, {autopsy.checked_again} of them twice")
    assert autopsy.stores > 3000 and autopsy.checked > 150 and autopsy.checked_again > 100
    assert len(autopsy.committed) > 30


EDITS: dict[str, tuple[str, str, str, str]] = {
    # what is broken: module, function, text, replacement
    "a grant does not say its place in the ring": ("evict", "grant", "store(record + R_STAMP, head + i)", "pass"),
    "grants are published before they are made": (
        "evict",
        "grant",
        "    for i in range(n):\n",
        "    store_release(lane + L_GRANT_HEAD, head + n)\n    for i in range(n):\n",
    ),
    "commits are consumed before they are applied": (
        "apply",
        "apply_commits",
        "    written = 0\n",
        "    written = 0\n    store_release(lane + L_COMMIT_TAIL, tail + n)\n",
    ),
    "a record is ready before it is filled": (
        "apply",
        "_apply_one",
        "    _fill_record(ctx, entry, record)\n",
        "    store_release(record + R_STATE, READY)\n    _fill_record(ctx, entry, record)\n",
    ),
    "leases are not looked at": ("evict", "evict", "_scan_lanes(ctx, marks)", "pass"),
    "what was leaving stays so": ("recover", "settle_records", "if state == LEAVING:", "if False:"),
    "blocks without an entry get none": (
        "recover",
        "repair_directory",
        "if listed != unit and (listed",
        "if False and (listed",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_the_autopsy_notices(what: str) -> None:
    module, function, old, new = EDITS[what]
    with pytest.raises((AssertionError, PenstockError)):
        dissect(every=5, edits={(module, function): (old, new)})
