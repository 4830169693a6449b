"""Reservations, commits and grants: what a writer gets, when it does not, and that nothing is lost either way."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import numpy as np
import pytest

from penstock.errors import ConfigError, PoolClosed, ViewsAlive
from penstock.pool.client import Pool
from penstock.pool.layout import plan_slots
from penstock.pool.reservation import Reservation
from penstock.runtime.keeper import GRANT_SHARE
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
from tests.support import unique_name

SPACE = make_space()


def fill(reservation: Reservation, keys) -> None:  # type: ignore[no-untyped-def]
    for i, key in enumerate(keys):
        view = reservation.view(i)
        view[:] = block_bytes(bytes(key), len(view))


def refused(pool: Pool, why: str) -> int:
    from penstock.runtime.report import stat_report

    counters: dict[str, int] = stat_report(embedded_keeper(pool), [])["counters"]["keeper"]
    return counters[f"refused.{why}"]


def test_filled_in_place(site: Site) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, [1, 2, 3])
    with site.pool.reserve(handle, 3, wait_s=5) as reservation:
        assert len(reservation) == 3 and reservation.drop is Drop.NONE
        fill(reservation, keys)
        assert reservation.commit(keys) == 3
        assert len(reservation) == 0
    assert site.pool.flush()
    with site.pool.match(handle, keys) as lease:
        assert len(lease) == 3
        check_lease(lease, keys)


def test_what_is_not_committed_is_used_again(site: Site) -> None:
    pool, handle, keys = site.pool, site.pool.space(SPACE), chain(SPACE, [1, 2, 3])
    with pool.reserve(handle, 3, wait_s=5) as reservation:
        fill(reservation, keys[:1])
        assert reservation.commit(keys[:1]) == 1
    with pool.reserve(handle, 4, wait_s=5):
        pass
    reservation = pool.reserve(handle, 2, wait_s=5)
    reservation.abort()
    reservation.abort()
    del reservation
    reservation = pool.reserve(handle, 2, wait_s=5)
    del reservation
    gc.collect()
    grants = pool.held()["grants"]
    assert grants >= 4
    returned = pool.return_idle_grants()
    assert returned >= grants
    assert pool.flush() and pool.held()["grants"] == 0
    assert embedded_keeper(pool).authority.n_granted == 0
    assert refused(pool, "aborted") == returned
    assert_consistent(pool)


def test_idle_grants_go_back_only_when_idle(site: Site) -> None:
    pool = site.pool
    pool.reserve(pool.space(SPACE), 2, wait_s=5).abort()
    held = pool.held()["grants"]
    pool.tidy(idle_s=3600)
    assert pool.held()["grants"] == held > 0
    pool.tidy(idle_s=0)
    assert pool.held()["grants"] == 0


def test_grants_are_bounded() -> None:
    """A 32nd of the pool for whoever comes first, and an equal part of as much for everybody else: 1/16 in all."""
    geometry = replace(TINY, slab_bytes=1 << 20, n_slabs=16, ring=1024, n_lanes=8)
    with Site.opened(unique_name("u"), geometry) as site:
        slots = plan_slots(geometry, SPACE.block_bytes, SPACE.n_segments).slots_per_slab * geometry.n_slabs
        assert slots // GRANT_SHARE > 64
        reservations = []
        for _ in range(4):
            pool = site.client()
            reservations.append(pool.reserve(pool.space(SPACE), 100, wait_s=0.01))
        limit, part = slots // GRANT_SHARE, slots // GRANT_SHARE // geometry.n_lanes
        assert limit <= embedded_keeper(site.pool).authority.n_granted <= limit + 4 * part
        assert all(len(each) >= part for each in reservations), "nobody is left without"
        assert reservations[-1].drop is Drop.NO_ROOM
        for each in reservations:
            each.abort()


def test_without_room_it_is_shorter_and_says_why(site: Site) -> None:
    """Every slot leased: nothing can go, nothing blocks beyond the wait, the difference is counted."""
    pool, reader = site.client(), site.client()
    handle = pool.space(SPACE)
    shape = plan_slots(TINY, SPACE.block_bytes, SPACE.n_segments)
    slots = TINY.n_slabs * shape.slots_per_slab
    leases = []
    for number in range(slots):
        pool.store(handle, keys := chain(SPACE, [number, 7]), source(handle, keys), wait_s=0.001)
        pool.flush()
        leases.append(reader.match(reader.space(SPACE), keys))
    before = pool.counters()["drop.no_room"]
    started = time.monotonic()
    reservation = pool.reserve(handle, 32, wait_s=0.05)
    assert time.monotonic() - started >= 0.05 or len(reservation) == 32
    assert len(reservation) < 32 and reservation.drop is Drop.NO_ROOM
    assert pool.counters()["drop.no_room"] == before + 32 - len(reservation)
    stored = pool.store(handle, keys := chain(SPACE, [9] * 32), source(handle, keys))
    assert stored.n_blocks < 32 and stored.drop is Drop.NO_ROOM
    reservation.abort()
    for lease in leases:
        lease.release()
    pool.return_idle_grants()
    assert pool.store(handle, keys[:4], source(handle, keys[:4]), wait_s=5).drop is Drop.NONE


def test_more_than_a_ring_is_cut(site: Site) -> None:
    reservation = site.pool.reserve(site.pool.space(SPACE), 10 * TINY.ring)
    assert len(reservation) <= TINY.ring and reservation.drop is not None
    with pytest.raises(ValueError, match="slots"):
        site.pool.reserve(site.pool.space(SPACE), -1)


def test_a_full_ring_is_counted_and_its_slots_are_kept(site: Site) -> None:
    """The keeper hears nothing: what is published stays in the ring until it is full."""
    pool = site.client()
    handle = pool.space(SPACE)
    first, second = pool.reserve(handle, 16, wait_s=5), pool.reserve(handle, 12, wait_s=0.3)
    assert len(first) == 16 and len(second) == 12
    site.deaf = True
    for _ in range(TINY.ring - 20):
        pool._put(pool._at, np.zeros((1, 16), np.int64))  # garbage fills a ring as well
    keys = chain(SPACE, list(range(16)))
    fill(first, keys)
    assert first.commit(keys) == 16
    other = chain(SPACE, list(range(50, 62)))
    fill(second, other)
    held = pool.held()["grants"]
    assert second.commit(other) == 4
    assert pool.counters()["drop.ring_full"] == 8
    assert pool.held()["grants"] == held + 8
    assert pool.counters()["blocks_committed"] == 20
    site.hear()
    assert pool.flush()
    assert refused(site.pool, "bad_entry") == TINY.ring - 20
    assert {bytes(key) for key in [*keys, *other[:4]]} <= set(resident_keys(site.pool))
    assert_consistent(site.pool)


def test_two_clients_of_one_key_leave_one_copy(site: Site) -> None:
    one, other = site.client(), site.client()
    keys = chain(SPACE, [1, 2, 3])
    site.deaf = False
    for pool in (one, other):
        with pool.reserve(pool.space(SPACE), 3, wait_s=5) as reservation:
            fill(reservation, keys)
            site.deaf = True
            assert reservation.commit(keys) == 3
            site.deaf = False
    site.hear()
    assert one.flush() and other.flush()
    assert len(resident_keys(site.pool)) == 3
    assert refused(site.pool, "duplicate") == 3
    assert_consistent(site.pool)


def test_an_orphan_is_refused(site: Site) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, [1, 2, 3])
    stored = site.pool.store(handle, keys[1:], source(handle, keys[1:]), wait_s=5)
    assert stored.n_blocks == 2 and site.pool.flush()
    assert resident_keys(site.pool) == {}
    assert refused(site.pool, "orphan") == 2
    assert_consistent(site.pool)


def test_a_parent_in_another_space_does_not_count(site: Site) -> None:
    other = make_space("other")
    handle, keys = site.pool.space(SPACE), chain(SPACE, [1, 2])
    site.pool.store(handle, keys[:1], source(handle, keys[:1]), wait_s=5)
    stranger = site.pool.space(other)
    site.pool.store(stranger, keys[1:], source(stranger, keys[1:]), wait_s=5)
    assert site.pool.flush()
    assert len(resident_keys(site.pool)) == 1 and refused(site.pool, "orphan") == 1


def test_views_of_slots(site: Site) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, [1])
    reservation = site.pool.reserve(handle, 2, wait_s=5)
    view = reservation.view(0)[5:]
    with pytest.raises(ViewsAlive, match="slot 0"):
        reservation.commit(keys)
    with pytest.raises(ViewsAlive, match="slot 0"):
        reservation.abort()
    with pytest.raises(IndexError):
        reservation.view(2)
    del view
    with pytest.raises(ValueError, match="3 keys for 2 slots"):
        reservation.commit(chain(SPACE, [1, 2, 3]))
    reservation.abort()


def test_a_map_that_does_not_fit(site: Site) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, [1, 2])
    with site.pool.reserve(handle, 2, wait_s=5) as reservation:
        with pytest.raises(ValueError, match="map has 1 blocks"):
            reservation.commit(keys, source(handle, keys[:1]))
        assert reservation.commit(keys, source(handle, keys)) == 2


def test_intent_is_carried_and_recorded(site: Site) -> None:
    from penstock.runtime.report import ls_report

    handle, keys = site.pool.space(SPACE, "label"), chain(SPACE, [1, 2])
    intent = Intent(session="talk", tenant="them", priority=-7, deadline_s=1e9, ttl_s=2.5)
    site.pool.store(handle, keys, source(handle, keys), wait_s=5, intent=intent)
    assert site.pool.flush()
    report = ls_report(embedded_keeper(site.pool))
    assert [(row["label"], row["blocks"]) for row in report["spaces"]] == [("label", 2)]
    (row,) = report["chains"]
    assert (row["blocks"], row["session"], row["tenant"], row["priority"]) == (2, "talk", "them", -7)
    record = embedded_keeper(site.pool).authority.records()
    assert (record[:, 13:15] == np.array([2500, 10**12], np.uint64)).all(axis=1).sum() == 2
    with pytest.raises(ConfigError, match="priority"):
        site.pool.store(handle, keys, source(handle, keys), wait_s=5, intent=Intent(priority=1 << 31))


def test_after_close(site: Site) -> None:
    pool = site.client()
    handle, keys = pool.space(SPACE), chain(SPACE, [1])
    reservation = pool.reserve(handle, 1, wait_s=5)
    pool.close()
    lane = pool._at.given.lane
    assert site.link.keeper.lane_alive(lane), "its slots may still be written to"
    with pytest.raises(PoolClosed):
        reservation.commit(keys)
    reservation.abort()
    assert not site.link.keeper.lane_alive(lane)
    late = pool.reserve(handle, 1)
    assert (len(late), late.drop) == (0, Drop.CLOSED)
    assert pool.store(handle, keys, source(handle, keys)).drop is Drop.CLOSED
    assert pool.match(handle, keys).miss is Miss.CLOSED
    assert site.link.keeper.reclaim_dead() == 1
    site.clients.remove(pool)
    assert_consistent(site.pool)


def test_segments_that_cannot_be_stored(site: Site) -> None:
    for size in (100, 64, 192):
        with pytest.raises(ConfigError, match="multiple of 64"):
            site.pool.space(make_space(segment_bytes=size))
    with pytest.raises(ConfigError, match="--slab"):
        site.pool.space(make_space(segment_bytes=TINY.slab_bytes))
