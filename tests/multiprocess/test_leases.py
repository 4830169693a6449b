"""Leases between processes: a pool that is full of them, hand-over, and views that outlive the pool."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

import penstock
from penstock.errors import ConfigError, PoolClosed, ViewsAlive
from penstock.types import Drop, Miss
from tests.support import (
    MIB,
    PATIENCE_S,
    SPACE,
    Client,
    Keeper,
    assert_resident,
    chain,
    contents,
    must_store,
    read,
    small_geometry,
    store,
    until,
)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(6 * MIB, lanes=6)) as running:
        yield running


@pytest.fixture
def pool(keeper: Keeper) -> Iterator[penstock.Pool]:
    with keeper.open() as opened:
        yield opened


Hold = list[tuple[int, penstock.Lease]]


@contextlib.contextmanager
def full_of_leases(pool: penstock.Pool, handle: penstock.SpaceHandle) -> Iterator[Hold]:
    """A pool of which every slot is leased, but for a few that are reserved (see below)."""
    leases: Hold = []
    for number in range(1, 10_000):
        keys = chain(4, number, blocks=16)
        stored = store(pool, handle, keys, wait_s=0.05)
        assert pool.flush(PATIENCE_S)
        leases.append((number, pool.match(handle, keys)))
        if len(leases[-1][1]) < 16:  # what is not leased yet is evicted for the grants that come next
            break
        assert stored.n_blocks == 16
    with pool.reserve(handle, 64, 0.2) as rest:
        assert len(rest) < 64
        yield leases
        for _, lease in leases:
            lease.release()


def test_a_pool_full_of_leased_blocks_drops_and_loses_nothing(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    with full_of_leases(pool, handle) as leases:
        held = sum(len(lease) for _, lease in leases)
        assert held == keeper.stat()["blocks"] > keeper.geometry.n_units / 2
        evicted, dropped = keeper.counters()["evicted"], pool.counters()["drop.no_room"]
        for number in range(3):
            assert store(pool, handle, chain(5, number, blocks=4), wait_s=0.02) == penstock.Stored(0, Drop.NO_ROOM)
        assert pool.counters()["drop.no_room"] == dropped + 12
        assert keeper.counters()["evicted"] == evicted
        for number, lease in leases:
            assert np.array_equal(read(lease, handle), contents(chain(4, number, blocks=16).array)[: len(lease)])
        keeper.fsck()
    must_store(pool, handle, chain(6, blocks=16))
    assert_resident(pool, handle, chain(6, blocks=16))
    keeper.fsck()


def test_a_full_pool_keeps_a_writer_no_longer_than_it_allowed(keeper: Keeper, pool: penstock.Pool) -> None:
    """Dropped, not stuck: the bound is far above the wait, and far below for ever."""
    handle = pool.space(SPACE)
    with full_of_leases(pool, handle):
        started = time.monotonic()
        assert store(pool, handle, chain(5, blocks=4), wait_s=0.1).drop is Drop.NO_ROOM
        assert time.monotonic() - started < PATIENCE_S / 2


def test_a_waiting_writer_gets_the_room_that_another_client_makes(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    with contextlib.ExitStack() as stack:
        with full_of_leases(pool, handle):
            other = stack.enter_context(Client(_store_patiently, keeper.name))
            assert other.receive() == "about to wait"
        assert other.receive() == penstock.Stored(4, Drop.NONE)
        other.join()


def _store_patiently(connection: Connection, name: str) -> None:
    with penstock.open(name) as pool:
        handle = pool.space(SPACE)
        connection.send("about to wait")
        connection.send(store(pool, handle, chain(5, blocks=4), wait_s=PATIENCE_S))


# ---- hand-over

KEYS = chain(1, blocks=16)


def adopt(connection: Connection, name: str) -> None:
    """For every hand-over: take it, say what came of it and whether the bytes are right."""
    with penstock.open(name, client="adopter") as pool:
        handle = pool.space(SPACE)
        connection.send("ready")
        while (data := connection.recv()) is not None:
            with pool.adopt(data) as lease:
                same = np.array_equal(read(lease, handle), contents(KEYS.array)[: len(lease)])
                connection.send((len(lease), lease.miss, same))
                connection.recv()


def test_a_lease_is_handed_to_another_process(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    with Client(adopt, keeper.name) as adopter:
        assert adopter.receive() == "ready"
        lease = pool.match(handle, KEYS)
        assert adopter.ask(lease.handover()) == (len(KEYS), Miss.NONE, True)
        lease.release()
        # The adopter's own lease protects the blocks now.
        flood(keeper, pool, handle, 7)
        assert_resident(pool, handle, KEYS)
        adopter.send("release")
        adopter.send(None)
        adopter.join()
        flood(keeper, pool, handle, 8)
        assert len(pool.match(handle, KEYS)) == 0


def test_a_lease_handed_over_too_late_says_changed(keeper: Keeper, pool: penstock.Pool) -> None:
    """The giver released before the taker took: the blocks are gone, or their slots hold others."""
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    with Client(adopt, keeper.name) as adopter:
        assert adopter.receive() == "ready"
        with pool.match(handle, KEYS) as lease:
            data = lease.handover()
        flood(keeper, pool, handle, 7)
        assert adopter.ask(data) == (0, Miss.CHANGED, True)
        adopter.send("next")
        must_store(pool, handle, KEYS)  # the same keys again, in other slots or under other generations
        assert adopter.ask(data) == (0, Miss.CHANGED, True)
        adopter.send("next")
        adopter.send(None)
        adopter.join()


def test_what_is_no_hand_over_is_refused(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    with pool.match(handle, KEYS) as lease:
        data = lease.handover()
        for garbage in (b"", b"\xff" * 40, data[:-1], data + b"x"):
            with pytest.raises(ConfigError):
                pool.adopt(garbage)
        with keeper.open() as other, pytest.raises(ConfigError, match="space"):
            other.adopt(data)
    with Keeper() as elsewhere, elsewhere.open() as foreign, pytest.raises(ConfigError, match="another pool"):
        foreign.adopt(data)


def flood(keeper: Keeper, pool: penstock.Pool, handle: penstock.SpaceHandle, seed: int) -> None:
    """Store until everything that is not leased has been evicted."""
    for number in range(3 * keeper.geometry.n_units // 16):
        assert store(pool, handle, chain(seed, number, blocks=16), wait_s=PATIENCE_S).n_blocks == 16
    assert pool.flush(PATIENCE_S)


# ---- views


def test_a_view_keeps_its_blocks_after_the_pool_was_closed(keeper: Keeper) -> None:
    with keeper.open("other") as other:
        theirs = other.space(SPACE)
        pool = keeper.open("viewer")
        handle = pool.space(SPACE)
        must_store(pool, handle, KEYS)
        lease = pool.match(handle, KEYS)
        view = lease.views(9)
        derived = view[100:200].view(np.uint32)
        with pytest.raises(ViewsAlive, match="block 9"):
            lease.release()
        pool.close()
        with pytest.raises(PoolClosed):
            lease.views(0)
        assert pool.match(handle, KEYS).miss is Miss.CLOSED
        assert store(pool, handle, chain(2, blocks=1)) == penstock.Stored(0, Drop.CLOSED)
        del view, lease, pool, handle
        gc.collect()
        flood(keeper, other, theirs, 7)
        keeper.kill()
        keeper.start()
        keeper.wait_back(other)
        flood(keeper, other, theirs, 8)
        assert np.array_equal(derived, contents(KEYS.array)[9][100:200].view(np.uint32))
        assert_resident(other, theirs, KEYS)
        keeper.fsck()
        del derived
        gc.collect()
        until(lambda: len(keeper.stat()["clients"]) == 1, "the last view was all that kept the lane")
        flood(keeper, other, theirs, 9)
        assert len(other.match(theirs, KEYS)) == 0


def test_read_views_are_read_only_and_slots_with_views_are_not_committed(pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    with pool.match(handle, KEYS) as lease:
        view = lease.views(0)
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
        del view
    keys = chain(2, blocks=1)
    with pool.reserve(handle, 1, PATIENCE_S) as reservation:
        slot = reservation.view(0)
        slot[:] = contents(keys.array)[0]
        with pytest.raises(ViewsAlive, match="slot 0"):
            reservation.commit(keys)
        del slot
        assert reservation.commit(keys) == 1
    assert pool.flush(PATIENCE_S)
    assert_resident(pool, handle, keys)


def test_a_pool_that_is_forgotten_gives_its_lane_back_with_the_last_view(keeper: Keeper) -> None:
    pool = keeper.open("forgetful")
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    view = pool.match(handle, KEYS).views(2)
    del pool, handle
    gc.collect()
    assert [row["alive"] for row in keeper.stat()["clients"]] == [True]
    assert np.array_equal(view, contents(KEYS.array)[2])
    del view
    gc.collect()
    until(lambda: keeper.stat()["clients"] == [], "nobody holds the lane")
    assert keeper.fsck()["blocks"] == len(KEYS)
