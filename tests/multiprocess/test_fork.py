"""A process that forks after it attached: the child's pool is dead, the parent's is untouched."""

from __future__ import annotations

import gc
import os
import select
import signal
import traceback
from multiprocessing.connection import Connection

import numpy as np
import pytest

import penstock
from penstock.errors import PoolClosed
from penstock.pool.link import SocketLink
from penstock.types import Drop, Miss
from tests.support import (
    PATIENCE_S,
    SPACE,
    Client,
    Keeper,
    assert_resident,
    chain,
    contents,
    must_store,
    read,
    store,
    until,
)

HELD, CHILDS = chain(1, blocks=8), chain(2, blocks=4)


def _in_child(pool: penstock.Pool, handle: penstock.SpaceHandle, lease: penstock.Lease, name: str) -> None:
    assert pool.match(handle, HELD).miss is Miss.FORKED
    assert len(pool.match(handle, HELD)) == 0
    assert store(pool, handle, CHILDS, wait_s=1.0) == penstock.Stored(0, Drop.FORKED)
    assert pool.reserve(handle, 3, 1.0).drop is Drop.FORKED
    with pytest.raises(PoolClosed):
        read(lease, handle)
    with pytest.raises(PoolClosed):
        pool.counters()
    assert not pool.flush(0.0)
    with penstock.open(name, client="child") as own:
        own_handle = own.space(SPACE)
        assert_resident(own, own_handle, HELD)
        must_store(own, own_handle, CHILDS)
    pool.close()


def _parent(connection: Connection, name: str) -> None:
    """Attach, hold a lease, a view, a reservation; fork; the child does what it may and leaves in some way."""
    pool = penstock.open(name, client="parent")
    handle = pool.space(SPACE)
    must_store(pool, handle, HELD)
    lease = pool.match(handle, HELD)
    view = lease.views(3)
    reservation = pool.reserve(handle, 2, PATIENCE_S)
    keys = chain(3, blocks=2)
    reservation.view(0)[:] = contents(keys.array)[0]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _in_child(pool, handle, lease, name)
            del pool, lease, view, reservation
            gc.collect()
            status = 0
        except BaseException:  # noqa: BLE001 - the child must end here, whatever it met
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    connection.send(os.waitstatus_to_exitcode(status))
    assert connection.recv() == "go on"
    assert _watcher_is_quiet(pool)
    assert np.array_equal(view, contents(HELD.array)[3])
    assert np.array_equal(read(lease, handle), contents(HELD.array))
    reservation.view(1)[:] = contents(keys.array)[1]
    assert reservation.commit(keys) == 2
    assert pool.flush(PATIENCE_S)
    assert_resident(pool, handle, keys)
    assert_resident(pool, handle, CHILDS)
    del view
    lease.release()
    pool.close()
    connection.send("done")


def _watcher_is_quiet(pool: penstock.Pool) -> bool:
    """Nobody rang the bell that ends the thread which looks after the pool."""
    assert isinstance(pool._link, SocketLink) and pool._link.errands >= 0
    poll = select.poll()
    poll.register(pool._link.errands, select.POLLIN)
    return poll.poll(0) == []


def test_a_forked_childs_pool_is_dead_and_the_parents_lives_on() -> None:
    with Keeper() as keeper, Client(_parent, keeper.name) as parent:
        assert parent.receive() == 0
        until(lambda: len(keeper.stat()["clients"]) == 1, "the lane of the child's own pool is free")
        (client,) = keeper.stat()["clients"]
        assert client["alive"] and client["leases"] == len(HELD)
        assert parent.ask("go on") == "done"
        parent.join()
        until(lambda: keeper.stat()["clients"] == [], "the parent's lane is free")
        keeper.fsck()


def _parent_that_dies_first(connection: Connection, name: str) -> None:
    pool = penstock.open(name)
    lease = pool.match(pool.space(SPACE), HELD)
    child = os.fork()
    if child == 0:
        signal.pause()
    connection.send((child, len(lease)))
    connection.recv()


def test_a_child_that_outlives_its_parent_keeps_nothing() -> None:
    """The child closed its copy of the lock's descriptor, so the lane is free when the parent is gone."""
    with Keeper() as keeper, keeper.open() as pool:
        must_store(pool, pool.space(SPACE), HELD)
        with Client(_parent_that_dies_first, keeper.name) as parent:
            child, held = parent.receive()
            try:
                assert held == len(HELD)
                assert len(keeper.stat()["clients"]) == 2
                parent.kill()
                until(lambda: len(keeper.stat()["clients"]) == 1, "the dead parent's lane is free")
            finally:
                os.kill(child, signal.SIGKILL)
