"""Following what leaves a pool that others fill: a reader that stops, a keeper that dies, a pool that is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

import penstock
from tests.support import MIB, SPACE, Client, Keeper, chain, must_store, small_geometry, until


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(6 * MIB, lanes=6)) as running:
        yield running


@pytest.fixture
def pool(keeper: Keeper) -> Iterator[penstock.Pool]:
    with keeper.open() as opened:
        yield opened


def fill(pool: penstock.Pool, handle: penstock.SpaceHandle, *seed: int, chains: int) -> list[bytes]:
    """Store that many chains of 16 blocks; the keys of all of them."""
    keys = [chain(*seed, number, blocks=16) for number in range(chains)]
    for each in keys:
        must_store(pool, handle, each)
    return [bytes(key) for each in keys for key in each]


def words(keys: list[bytes]) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    return np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2)


def follow(connection: Connection, name: str) -> None:
    """A reader in a process of its own: at each word from the parent it looks once, and says what it saw."""
    with penstock.open(name, client="reader") as pool:
        feed = pool.watch_removals(pool.space(SPACE))
        connection.send("ready")
        while connection.recv():
            removed = feed.take()
            connection.send((removed.keys.tobytes(), removed.gap))


def test_what_another_process_pushes_out(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    with Client(follow, keeper.name) as reader:
        assert reader.receive() == "ready"
        stored, told, gaps = [], [], 0
        for number in range(12):
            stored += fill(pool, handle, 1, number, chains=10)
            keys, gap = reader.ask(True)
            told += [keys[at : at + 16] for at in range(0, len(keys), 16)]
            gaps += gap
        there = pool.resident(handle, words(stored))
        assert not gaps and len(told) == len(set(told)) > 0
        assert set(told) == {key for key, is_there in zip(stored, there, strict=True) if not is_there}
        reader.send(False)
        reader.join()


def test_a_reader_that_stands_still_holds_nobody_up(keeper: Keeper, pool: penstock.Pool) -> None:
    """The keeper goes on, and no larger than before; the reader is told that it missed something, once."""
    handle = pool.space(SPACE)
    with Client(follow, keeper.name) as reader:
        assert reader.receive() == "ready"
        reader.stop()
        rounds = keeper.geometry.n_removals // 16 + 200
        fill(pool, handle, 2, chains=rounds)
        assert keeper.counters()["evicted"] > keeper.geometry.n_removals
        reader.go_on()
        assert reader.ask(True) == (b"", True)
        assert reader.ask(True) == (b"", False)
        reader.send(False)
        reader.join()


def test_another_keeper_is_a_gap(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    feed = pool.watch_removals(handle)
    stored = fill(pool, handle, 3, chains=60)
    assert not feed.take().gap
    for end in (keeper.kill, keeper.stop):
        end()
        assert not feed.take().gap, "nothing leaves a pool that has no keeper"
        keeper.start()
        keeper.wait_back(pool)
        assert feed.take().gap
        assert not feed.take().gap
    before = pool.resident(handle, words(stored))
    fill(pool, handle, 4, chains=100)
    after = pool.resident(handle, words(stored))
    told = {row.tobytes() for row in feed.take().keys}
    left = {key for key, was, still in zip(stored, before, after, strict=True) if was and not still}
    assert left and left == told & set(stored)


def test_another_segment_is_a_gap(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    stored = fill(pool, handle, 5, chains=4)
    feed = pool.watch_removals(handle)
    before = pool._at
    keeper.stop()
    keeper.remove()
    keeper.start()
    until(lambda: pool._at is not before, "it went over to the new segment")
    assert feed.take().gap
    assert not pool.resident(handle, words(stored)).any()
    assert not feed.take().gap
    fill(pool, handle, 6, chains=100)
    assert len(feed.take().keys)
