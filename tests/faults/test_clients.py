"""Engines that die or stand still: what they held comes back once the kernel proves them gone, and not before."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

import penstock
from penstock.types import Drop
from tests.conftest import Scale
from tests.faults.load import run
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

pytestmark = pytest.mark.faults

LEASED, GRANTED = chain(1, blocks=32), chain(2, blocks=4)


def hold(connection: Connection, name: str) -> None:
    """Lease a chain, fill half of each of four reserved slots, then wait; on a word, finish and commit."""
    pool = penstock.open(name, client="holder")
    handle = pool.space(SPACE)
    lease = pool.match(handle, LEASED)
    view = lease.views(5)
    reservation = pool.reserve(handle, len(GRANTED), PATIENCE_S)
    rows, half = contents(GRANTED.array), SPACE.block_bytes // 2
    for i in range(len(reservation)):
        reservation.view(i)[:half] = rows[i, :half]
    connection.send((len(lease), len(reservation)))
    for i in range(len(reservation)):
        connection.recv()
        reservation.view(i)[half:] = rows[i, half:]
    same = np.array_equal(view, contents(LEASED.array)[5]) and np.array_equal(
        read(lease, handle), contents(LEASED.array)
    )
    published = reservation.commit(GRANTED)
    connection.send((same, published, bool(until(lambda: pool.flush(1.0), "taken in"))))
    connection.recv()
    del view
    lease.release()
    pool.close()


def fill(keeper: Keeper, pool: penstock.Pool, handle: penstock.SpaceHandle, seed: int, *, evictions: int) -> None:
    """Store new chains until the keeper has evicted that many blocks more; every one is taken."""
    goal, number = keeper.counters()["evicted"] + evictions, 0
    while keeper.counters()["evicted"] < goal:
        number += 1
        stored = store(pool, handle, chain(seed, number, blocks=16), wait_s=PATIENCE_S)
        assert stored == penstock.Stored(16, Drop.NONE), stored


def client_row(keeper: Keeper, name: str) -> dict[str, Any] | None:
    return next((row for row in keeper.stat()["clients"] if row["name"] == name), None)


@pytest.fixture
def keeper() -> Any:
    with Keeper(small_geometry(6 * MIB, lanes=8)) as running:
        yield running


def test_a_killed_engines_leases_and_slots_come_back(keeper: Keeper) -> None:
    """Killed between reserve and commit, with leases held: nothing half-written is seen, all of it is usable again."""
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, LEASED)
        with Client(hold, keeper.name) as holder:
            assert holder.receive() == (len(LEASED), 4)
            before = keeper.counters()
            row = client_row(keeper, "holder")
            assert row is not None and row["leases"] == len(LEASED) and row["grants"] >= 4
            holder.kill()
        until(lambda: client_row(keeper, "holder") is None, "its lane is free")
        counted = keeper.counters()
        assert counted["lanes_reclaimed"] == before["lanes_reclaimed"] + 1
        assert counted["slots_reclaimed"] == before["slots_reclaimed"] + row["grants"]
        assert len(pool.match(handle, GRANTED)) == 0
        keeper.fsck()
        fill(keeper, pool, handle, 5, evictions=2 * keeper.geometry.n_units)
        assert len(pool.match(handle, LEASED)) == 0, "what a dead client leased is still not evictable"
        pool.return_idle_grants()
        assert pool.flush(PATIENCE_S)
        assert keeper.stat()["granted"] == 0
        keeper.fsck()


def test_a_stopped_engine_stalls_nobody_keeps_what_it_holds_and_wakes_harmlessly(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, LEASED)
        with Client(hold, keeper.name) as holder:
            assert holder.receive() == (len(LEASED), len(GRANTED))
            holder.send("one slot")
            holder.stop()
            fill(keeper, pool, handle, 6, evictions=2 * keeper.geometry.n_units)
            keeper.kill()
            keeper.start()
            keeper.wait_back(pool)
            fill(keeper, pool, handle, 8, evictions=keeper.geometry.n_units)
            row = client_row(keeper, "(not back yet)")
            assert row is not None and row["alive"] and row["leases"] == len(LEASED)
            assert row["grants"] >= len(GRANTED)
            assert_resident(pool, handle, LEASED)
            keeper.fsck()
            holder.go_on()
            for _ in range(len(GRANTED) - 1):
                holder.send("the next")
            assert holder.receive() == (True, len(GRANTED), True)
            assert_resident(pool, handle, GRANTED)
            keeper.fsck()
            holder.send("end")
            holder.join()


def take_all(connection: Connection, name: str) -> None:
    """Reserve as many slots as the keeper gives."""
    pool = penstock.open(name, client="greedy")
    reservation = pool.reserve(pool.space(SPACE), 1000, 1.0)
    connection.send(len(reservation))
    connection.recv()


def test_an_engine_that_is_stopped_with_every_grant_stalls_nobody(keeper: Keeper) -> None:
    with keeper.open() as pool, Client(take_all, keeper.name) as greedy:
        handle = pool.space(SPACE)
        assert greedy.receive() >= 32
        greedy.stop()
        for number in range(600):
            must_store(pool, handle, chain(20, number, blocks=2))
        assert keeper.counters()["evicted"] > 0
        keeper.fsck()


def test_what_a_stopped_engine_held_is_free_once_it_is_kicked(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, LEASED)
        with Client(hold, keeper.name) as holder:
            holder.receive()
            holder.stop()
            row = client_row(keeper, "holder")
            assert row is not None
            answer = keeper.ask("kick", row["lane"])
            assert answer["exited"] and answer["pid"] == holder.pid and answer["reclaimed"] == 1
            assert client_row(keeper, "holder") is None
            fill(keeper, pool, handle, 9, evictions=2 * keeper.geometry.n_units)
            assert len(pool.match(handle, LEASED)) == 0


def test_engines_stopped_at_random_moments_stall_nobody(keeper: Keeper, scale: Scale) -> None:
    rng = np.random.default_rng(11)
    with Client(run, keeper.name, 91, 1 << 40) as sleeper, Client(run, keeper.name, 92, 1 << 40) as worker:
        assert sleeper.receive() == worker.receive() == "working"
        for _ in range(scale.of(10, 200)):
            sleeper.process.join(float(rng.uniform(0, 0.02)))
            sleeper.stop()
            for _ in range(3):
                assert worker.ask("pulse") == "back"
            keeper.fsck()
            sleeper.go_on()
            assert sleeper.ask("pulse") == "back"
        for client in (sleeper, worker):
            written, _ = client.ask("end")
            assert written
            client.join()
        keeper.fsck()


def die_in(connection: Connection, name: str, seed: int) -> None:
    """Lease and half fill until somebody kills this."""
    pool = penstock.open(name, client="mortal")
    handle = pool.space(SPACE)
    connection.send("working")
    number = 0
    while True:
        number += 1
        with pool.match(handle, LEASED):
            reservation = pool.reserve(handle, 4, 0.05)
            for i in range(len(reservation)):
                reservation.view(i)[:] = 255  # not yet what belongs to the key
            keys = chain(seed, number, blocks=4)
            for i in range(len(reservation)):
                reservation.view(i)[:] = contents(keys.array)[i]
            reservation.commit(keys[: len(reservation)])


def test_engines_killed_at_random_moments_leave_nothing_torn(keeper: Keeper, scale: Scale) -> None:
    rng = np.random.default_rng(12)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, LEASED)
        for seed in range(scale.of(10, 200)):
            with Client(die_in, keeper.name, seed) as mortal:
                assert mortal.receive() == "working"
                mortal.process.join(float(rng.uniform(0, 0.01)))
                os.kill(mortal.pid, signal.SIGKILL)
                for number in range(1, 30):
                    keys = chain(seed, number, blocks=4)
                    with pool.match(handle, keys) as lease:
                        assert np.array_equal(read(lease, handle), contents(keys.array)[: len(lease)])
            until(lambda: client_row(keeper, "mortal") is None, "its lane is free")
            keeper.fsck()
        pool.return_idle_grants()
        assert pool.flush(PATIENCE_S)
        assert keeper.stat()["granted"] == 0
