"""A Hypothesis state machine that drives a whole pool in one process beside a plain model, and checks everything after
every step.

Clients store branching chains of several spaces into a pool far too small for them, match, hold leases and views over
evictions, hand leases over, reserve, commit, abort, go deaf, die; the keeper crashes and starts again. The model knows
which blocks were ever offered and what their bytes are; `resident_keys` says what is there now; what a match finds, and
why it stops, follows from the two.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.errors import ViewsAlive
from penstock.identity import KeyChain, Space
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.layout import Geometry
from penstock.pool.lease import Lease
from penstock.pool.reservation import Reservation
from penstock.runtime.keeper import RECENT_SHARE
from penstock.runtime.report import stat_report
from penstock.testing.pool import (
    TINY,
    Site,
    assert_consistent,
    block_bytes,
    chain,
    check_lease,
    embedded_keeper,
    make_space,
    resident_keys,
    source,
)
from penstock.types import Drop, Intent, Miss

__all__ = ["PoolMachine"]

_numbers = itertools.count()

# Few branches and short chains: the same blocks come again and again, and chains share beginnings.
paths = st.lists(st.integers(0, 2), min_size=1, max_size=14)
intents = st.sampled_from(
    [None, Intent(session="s"), Intent(tenant="t", priority=-3, ttl_s=1.5), Intent(priority=7, deadline_s=2e9)]
)
N_CLIENTS, N_SPACES = 2, 3
clients, spaces = st.integers(0, N_CLIENTS - 1), st.integers(0, N_SPACES - 1)


@dataclass(eq=False)
class _Held:
    """A lease somebody holds, with the keys it must show; or, without the lease, one of its views."""

    client: Pool
    keys: KeyChain
    lease: Lease


@dataclass(eq=False)
class _View:
    client: Pool
    key: bytes
    array: npt.NDArray[np.uint8]
    owner: _Held | None


@dataclass(eq=False)
class _Slots:
    client: Pool
    space: int
    reservation: Reservation


def _one(data: st.DataObject, among: list[Any]) -> Any:
    # By number: Hypothesis would keep a drawn object, and with it the views that a test lets go of.
    return among[data.draw(st.integers(0, len(among) - 1))]


class PoolMachine(RuleBasedStateMachine):
    """Subclass it for another geometry or other spaces. Its pool is closed at the end and must leave no file behind."""

    geometry: ClassVar[Geometry] = TINY
    all_spaces: ClassVar[tuple[Space, ...]] = (
        make_space(),
        make_space("other"),  # the same slot size, other keys
        make_space("large", block_tokens=8, n_segments=3, segment_bytes=4096),
    )

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        name = f"pm-{os.getpid()}-{next(_numbers)}"
        self.site = self.stack.enter_context(Site.opened(name, self.geometry))
        self.handles: dict[Pool, list[SpaceHandle]] = {}
        self.clients = [self.new_client() for _ in range(N_CLIENTS)]
        self.offered: set[bytes] = set()
        self.held: list[_Held] = []
        self.views: list[_View] = []
        self.slots: list[_Slots] = []

    def new_client(self) -> Pool:
        client = self.site.client()
        self.handles[client] = [client.space(space) for space in self.all_spaces]
        return client

    def chain(self, space: int, path: list[int]) -> KeyChain:
        return chain(self.all_spaces[space], path)

    # ---- writing

    @rule(client=clients, space=spaces, path=paths, wait=st.booleans(), intent=intents)
    def store(self, client: int, space: int, path: list[int], wait: bool, intent: Intent | None) -> None:
        pool, keys = self.clients[client], self.chain(space, path)
        handle = self.handles[pool][space]
        stored = pool.store(handle, keys, source(handle, keys), wait_s=0.003 if wait else 0.0, intent=intent)
        assert 0 <= stored.n_blocks <= len(keys)
        assert (stored.drop is Drop.NONE) == (stored.n_blocks == len(keys))
        self.offered.update(bytes(key) for key in keys[: stored.n_blocks])

    @rule(client=clients, space=spaces, seed=st.integers(0, 99))
    def flood(self, client: int, space: int, seed: int) -> None:
        """More than the pool holds, so that everything goes that nothing pins."""
        dice = random.Random(seed)
        for _ in range(6):
            path = [dice.randint(0, 2) for _ in range(14)]
            self.store(client=client, space=space, path=path, wait=True, intent=None)

    @precondition(lambda self: not self.held and not self.views and not self.slots and not self.site.deaf)
    @rule(client=clients, space=spaces, path=paths.map(lambda path: path[:3]))
    def store_with_nothing_pinned(self, client: int, space: int, path: list[int]) -> None:
        """There is room for a few blocks then, whatever the pool is full of."""
        for other in self.clients:
            other.return_idle_grants()
            assert other.flush()
        pool, keys = self.clients[client], self.chain(space, path)
        handle = self.handles[pool][space]
        stored = pool.store(handle, keys, source(handle, keys), wait_s=0.05)
        self.offered.update(bytes(key) for key in keys[: stored.n_blocks])
        assert pool.flush()
        # The keeper does not evict what was used a moment ago, nor what that continues: a few may find no room.
        assert stored.drop is Drop.NONE or (stored.drop is Drop.NO_ROOM and self.mostly_recent(handle))

    def mostly_recent(self, handle: SpaceHandle) -> bool:
        """Whether some block of this slot size was used so lately that it protects its chain."""
        keeper = self.site.link.keeper
        authority = keeper.authority
        slabs = np.flatnonzero(authority.slab_classes() == handle.slot_class)
        units = np.concatenate([authority.slab_blocks(int(slab)) for slab in slabs])
        recent = keeper.class_slots(handle.slot_class) // RECENT_SHARE
        return bool((authority.stamps(units) > authority.stamp - recent).any())

    @rule(client=clients, space=spaces, n=st.integers(1, 8))
    def reserve(self, client: int, space: int, n: int) -> None:
        pool = self.clients[client]
        reservation = pool.reserve(self.handles[pool][space], n)
        assert len(reservation) <= n
        assert (reservation.drop is Drop.NONE) == (len(reservation) == n)
        if len(reservation):
            self.slots.append(_Slots(pool, space, reservation))

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), path=paths, skip=st.integers(0, 3), intent=intents)
    def commit(self, data: st.DataObject, path: list[int], skip: int, intent: Intent | None) -> None:
        """Filled through views; with blocks of the chain skipped it may continue nothing (an orphan)."""
        slots = _one(data, self.slots)
        keys = self.chain(slots.space, path)[skip:]
        keys = keys[: len(slots.reservation)]
        for i, key in enumerate(keys):
            view = slots.reservation.view(i)
            view[:] = block_bytes(bytes(key), len(view))
            with pytest.raises(ViewsAlive, match=f"slot {i}"):
                slots.reservation.commit(keys)
            del view
        published = slots.reservation.commit(keys, intent=intent)
        assert 0 <= published <= len(keys)
        self.offered.update(bytes(key) for key in keys[:published])
        self.slots.remove(slots)

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), explicitly=st.booleans())
    def abort(self, data: st.DataObject, explicitly: bool) -> None:
        slots = _one(data, self.slots)
        self.slots.remove(slots)
        if explicitly:
            slots.reservation.abort()

    @rule(client=clients)
    def return_grants(self, client: int) -> None:
        self.clients[client].return_idle_grants()

    @rule(client=clients)
    def flush(self, client: int) -> None:
        assert self.clients[client].flush(0.0 if self.site.deaf else 1.0) or self.site.deaf

    # ---- reading

    @rule(client=clients, space=spaces, path=paths)
    def match(self, client: int, space: int, path: list[int]) -> None:
        pool, keys = self.clients[client], self.chain(space, path)
        length, reason = self.expected(pool, keys)
        lease = pool.match(self.handles[pool][space], keys)
        assert (len(lease), lease.miss) == (length, reason)
        if length:
            self.held.append(_Held(pool, keys[:length], lease))

    def expected(self, pool: Pool, keys: KeyChain) -> tuple[int, Miss]:
        """How long a match must be, and why it ends there."""
        resident = resident_keys(self.site.pool)
        free = self.geometry.leases - pool.held()["leases"]
        length = 0
        while length < len(keys) and bytes(keys[length]) in resident:
            length += 1
        if free <= length < len(keys) or free < length:
            return free, Miss.LEASE_TABLE_FULL
        return length, Miss.NONE if length == len(keys) else Miss.ABSENT

    @precondition(lambda self: self.held)
    @rule(data=st.data(), client=clients)
    def hand_over(self, data: st.DataObject, client: int) -> None:
        """To another client or to oneself; the first lease goes on or ends."""
        given, pool = _one(data, self.held), self.clients[client]
        free = self.geometry.leases - pool.held()["leases"]
        lease = pool.adopt(given.lease.handover())
        assert len(lease) == min(len(given.lease), free)
        assert lease.miss is (Miss.NONE if free >= len(given.lease) else Miss.LEASE_TABLE_FULL)
        if len(lease):
            self.held.append(_Held(pool, given.keys[: len(lease)], lease))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), pick=st.sets(st.integers(0, 2), min_size=1))
    def read(self, data: st.DataObject, pick: set[int]) -> None:
        held = _one(data, self.held)
        n_segments = held.lease._handle.n_segments
        check_lease(held.lease, held.keys, sorted(index % n_segments for index in pick))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def view(self, data: st.DataObject) -> None:
        """An array made from a view pins as the view itself does."""
        held = _one(data, self.held)
        i = data.draw(st.integers(0, len(held.lease) - 1))
        array = held.lease.views(i).reshape(-1, 4)
        assert not array.flags.writeable
        self.views.append(_View(held.client, bytes(held.keys[i]), array, held))

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def drop_view(self, data: st.DataObject) -> None:
        self.views.remove(_one(data, self.views))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = _one(data, self.held)
        if any(view.owner is held for view in self.views):
            with pytest.raises(ViewsAlive):
                held.lease.release()
            return
        held.lease.release()
        held.lease.release()
        assert not len(held.lease)
        self.held.remove(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), keep=st.integers(0, 4))
    def truncate(self, data: st.DataObject, keep: int) -> None:
        held = _one(data, self.held)
        if keep < len(held.lease) and any(view.owner is held for view in self.views):
            with pytest.raises(ViewsAlive):
                held.lease.truncate(keep)
            return
        held.lease.truncate(keep)
        held.keys = held.keys[: len(held.lease)]
        if not len(held.lease):
            self.held.remove(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """The lease is garbage; its views, if there are some, still pin it."""
        held = _one(data, self.held)
        self.held.remove(held)
        for view in self.views:
            if view.owner is held:
                view.owner = None

    # ---- death

    @rule()
    def deafen(self) -> None:
        """From here on nothing of what clients publish is taken in, until the keeper hears again or is replaced."""
        self.site.deaf = True

    @rule(at_once=st.booleans())
    def crash_keeper(self, at_once: bool) -> None:
        before = resident_keys(self.site.pool)
        self.site.crash_keeper()
        assert set(before) <= set(resident_keys(self.site.pool)), "a restart lost a block"
        if at_once:
            self.site.hear()

    @precondition(lambda self: self.site.deaf)
    @rule()
    def hear_again(self) -> None:
        self.site.hear()

    @rule(client=clients)
    def kill_client(self, client: int) -> None:
        """What it held is given to others; what it had published is taken in."""
        dead = self.clients[client]
        self.site.kill(dead)
        self.held = [held for held in self.held if held.client is not dead]
        self.views = [view for view in self.views if view.client is not dead]
        self.slots = [slots for slots in self.slots if slots.client is not dead]
        del self.handles[dead]
        self.clients[client] = self.new_client()

    # ---- after every step

    @invariant()
    def consistent(self) -> None:
        assert_consistent(self.site.pool)
        resident = resident_keys(self.site.pool)
        assert set(resident) <= self.offered, "a block that nobody offered"
        pinned = {bytes(key) for held in self.held for key in held.keys} | {view.key for view in self.views}
        assert pinned <= set(resident), "a leased block is gone"

    @invariant()
    def bytes_stay(self) -> None:
        for view in self.views:
            assert np.array_equal(view.array.reshape(-1), block_bytes(view.key, view.array.size))
        for held in self.held:
            i = len(held.keys) - 1
            size = held.lease._handle.block_bytes
            assert np.array_equal(held.lease.views(i), block_bytes(bytes(held.keys[i]), size))

    @invariant()
    def counted(self) -> None:
        """Every block that was ever committed is accounted for: applied, refused for a reason, or still in a ring."""
        keeper = embedded_keeper(self.site.pool)
        counters = stat_report(keeper, [])["counters"]
        refused: dict[str, Any] = {
            name: n for name, n in counters["keeper"].items() if name.startswith("refused.") and n
        }
        assert refused.keys() <= {"refused.orphan", "refused.duplicate", "refused.aborted"}, refused
        if not any(client.held()["unapplied"] for client in self.clients):
            settled = counters["keeper"]["applied"] + sum(refused.values()) - refused.get("refused.aborted", 0)
            assert counters["clients"]["blocks_committed"] == settled
        assert counters["keeper"]["applied"] - counters["keeper"]["evicted"] == keeper.authority.n_ready

    def teardown(self) -> None:
        files = self.site.link._files
        self.views.clear()
        self.held.clear()
        self.slots.clear()
        gc.collect()
        self.stack.close()
        assert not any(path.exists() for path in files)
        super().teardown()
