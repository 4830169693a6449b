"""The ring of removals: everything that leaves is told, in order, or there is a gap."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable

import numpy as np
import pytest

from penstock.errors import PoolClosed
from penstock.identity import KeyChain
from penstock.pool import layout, removals
from penstock.pool.cells import peek, poke
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.removals import Removals, Removed
from penstock.testing.pool import TINY, Site, chain, embedded_keeper, make_space, resident_keys, source
from penstock.types import Eviction

SMALL, LARGE = make_space(), make_space("large", n_segments=3, segment_bytes=4096)


def store(site: Site, handle: SpaceHandle, path: list[int]) -> KeyChain:
    keys = chain(handle.space, path)
    site.pool.store(handle, keys, source(handle, keys), wait_s=5.0)
    assert site.pool.flush()
    return keys


def names(removed: Removed) -> list[bytes]:
    return [row.tobytes() for row in removed.keys]


class Follower:
    """What a subscriber believes to be in the pool: told what is stored, it learns from the feed what left."""

    def __init__(self, pool: Pool, handle: SpaceHandle) -> None:
        self.pool, self.handle = pool, handle
        self.feed = pool.watch_removals(handle)
        self.believed: set[bytes] = set()
        self.gaps = 0

    def stored(self, keys: KeyChain) -> None:
        self.believed |= {bytes(key) for key in keys}

    def follow(self) -> None:
        removed = self.feed.take()
        self.gaps += removed.gap
        doubtful = self.believed if removed.gap else self.believed & set(names(removed))
        if doubtful:
            keys = np.frombuffer(b"".join(sorted(doubtful)), np.uint64).reshape(-1, 2)
            there = self.pool.resident(self.handle, keys)
            self.believed -= {key.tobytes() for key in keys[~there]}

    def assert_right(self) -> None:
        there = resident_keys(self.pool)
        assert self.believed == {key for key, space in there.items() if space == self.handle.id}


def churn(site: Site, followers: list[Follower], rounds: int, every: int) -> None:
    """Store chains of two sizes at random, so that capacity and slabs make blocks leave; look every so many stores."""
    chance = random.Random(rounds)
    for number in range(1, rounds + 1):
        which = chance.randrange(len(followers))
        follower = followers[which]
        path = [chance.randrange(4) for _ in range(chance.randrange(1, 8 >> which))]
        follower.stored(store(site, follower.handle, path))
        site.pool.return_idle_grants()
        if number % every == 0:
            for each in followers:
                each.follow()
                each.assert_right()


def test_everything_that_leaves_is_told(site: Site) -> None:
    followers = [Follower(site.pool, site.pool.space(SMALL)), Follower(site.pool, site.pool.space(LARGE))]
    churn(site, followers, 400, every=3)
    assert [follower.gaps for follower in followers] == [0, 0]
    counted = embedded_keeper(site.pool).authority.evictions()
    assert counted["capacity"] and counted["slab"]


def test_a_chain_is_told_from_its_end(site: Site) -> None:
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1] * 12)
    feed, told = site.pool.watch_removals(handle), []
    for number in range(2, 12):
        store(site, handle, [number] * 8)
        told += [key for key in names(feed.take()) if key in {bytes(key) for key in keys}]
    assert told == [bytes(key) for key in keys][::-1]


def test_only_the_spaces_asked_for(site: Site) -> None:
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    feeds = [site.pool.watch_removals(small), site.pool.watch_removals(large), site.pool.watch_removals(small, large)]
    for number in range(12):
        store(site, small, [number] * 6)
    site.pool.return_idle_grants()
    store(site, large, [1] * 3)
    some, none, both = (names(feed.take()) for feed in feeds)
    assert some and none == [] and both == some


def test_a_space_that_is_added_is_followed_from_the_last_look_on(site: Site) -> None:
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    feed, all_along = site.pool.watch_removals(large), site.pool.watch_removals(small, large)
    for number in range(12):
        store(site, small, [number] * 6)
    feed.add(small)
    feed.add(small)
    assert names(feed.take()) == names(all_along.take()) != []


def test_damaged_blocks_and_what_continues_them(site: Site) -> None:
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1] * 6)
    feed = site.pool.watch_removals(handle)
    authority = embedded_keeper(site.pool).authority
    unit = next(u for u, row in enumerate(authority.records()) if row[2:4].tobytes() == bytes(keys[2]))
    authority.mapping.array[authority.slot_addresses(unit)[0] - authority.mapping.address] ^= 1
    with site.pool.match(handle, keys) as lease:
        assert lease.verify() == 2
    assert site.pool.flush()
    embedded_keeper(site.pool)._damaged_again_ms = 0
    site.link.ring()
    assert names(feed.take()) == [bytes(key) for key in keys[2:]][::-1]


def test_a_lost_copy_of_a_block_is_no_removal(site: Site) -> None:
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1])
    feed = site.pool.watch_removals(handle)
    authority = embedded_keeper(site.pool).authority
    unit = next(u for u, row in enumerate(authority.records()) if row[2:4].tobytes() == bytes(keys[0]))
    authority.evict(np.array([unit], np.uint32), Eviction.DUPLICATE)
    assert names(feed.take()) == []


def test_what_is_held_stays_and_is_not_told(site: Site) -> None:
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1] * 4)
    feed = site.pool.watch_removals(handle)
    with site.pool.match(handle, keys):
        for number in range(2, 20):
            store(site, handle, [number] * 4)
        assert not {bytes(key) for key in keys} & set(names(feed.take()))
        assert site.pool.resident(handle, keys.array).all()


def test_resident_looks_in_one_space_and_at_any_order(site: Site) -> None:
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    keys, absent = store(site, small, [1, 2, 3]), chain(SMALL, [9, 9])
    mixed = np.concatenate([absent.array[:1], keys.array[::-1], absent.array[1:]])
    assert site.pool.resident(small, mixed).tolist() == [False, True, True, True, False]
    assert not site.pool.resident(large, mixed).any()
    assert site.pool.resident(small, mixed[:0]).tolist() == []


def test_leaving_counts_as_resident(site: Site) -> None:
    """The keeper may let it be; if it does not, it says so afterwards."""
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1])
    records = embedded_keeper(site.pool).authority.records()
    row = next(row for row in records if row[2:4].tobytes() == bytes(keys[0]))
    row[1] += layout.SlotState.LEAVING - layout.SlotState.READY
    assert site.pool.resident(handle, keys.array).all()
    row[1] -= layout.SlotState.LEAVING - layout.SlotState.READY


def test_a_closed_pool_says_so(site: Site) -> None:
    client = site.client()
    handle = client.space(SMALL)
    feed = client.watch_removals(handle)
    client.close()
    for call in (feed.take, client.watch_removals, lambda: client.resident(handle, np.zeros((1, 2), np.uint64))):
        with pytest.raises(PoolClosed):
            call()


# ---- gaps


def overtaken(site: Site, followers: list[Follower]) -> None:
    """Nobody looks until the ring has gone round."""
    churn(site, followers, 300, every=300)


def restarted(site: Site, followers: list[Follower]) -> None:
    """A keeper dies after blocks went and before it told; what the ring says now is right, but not all."""
    follower = followers[0]
    follower.stored(store(site, follower.handle, [1] * 4))
    follower.follow()
    cell = embedded_keeper(site.pool).authority.header(layout.H_REMOVED)
    before = peek(cell)
    for number in range(2, 12):
        follower.stored(store(site, follower.handle, [number] * 8))
    assert peek(cell) > before
    poke(cell, before)
    site.crash_keeper()
    site.hear()
    follower.follow()
    follower.assert_right()


LOSSES = [overtaken, restarted]


@pytest.mark.parametrize("lose", LOSSES)
def test_what_cannot_be_told_is_a_gap(site: Site, lose: Callable[[Site, list[Follower]], None]) -> None:
    followers = [Follower(site.pool, site.pool.space(SMALL)), Follower(site.pool, site.pool.space(LARGE))]
    lose(site, followers)
    assert followers[0].gaps == 1
    churn(site, followers, 60, every=3)
    assert followers[0].gaps == 1, "once"


@pytest.mark.parametrize("lose", LOSSES)
def test_the_tests_see_a_gap_that_is_not_told(
    site: Site, lose: Callable[[Site, list[Follower]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hush(self: Removals) -> Removed:
        self._begin()
        return Removed(np.zeros((0, 2), np.uint64), False)

    monkeypatch.setattr(Removals, "_gap", hush)
    followers = [Follower(site.pool, site.pool.space(SMALL)), Follower(site.pool, site.pool.space(LARGE))]
    with pytest.raises(AssertionError):
        lose(site, followers)


def overtake(site: Site, monkeypatch: pytest.MonkeyPatch, *, checked: bool) -> tuple[Removed, set[bytes]]:
    """The keeper goes round between a reader's look at the head and its copy. Also the keys that were to be read."""
    handle = site.pool.space(SMALL)
    feed = site.pool.watch_removals(handle)
    head = embedded_keeper(site.pool).authority.header(layout.H_REMOVED)
    numbers = iter(range(1, 10_000))
    while not peek(head):
        store(site, handle, [next(numbers)] * 6)
    first = set(names(feed.take()))
    assert first
    feed._read = 0
    copy = removals.copy_removals

    def late(*arguments: object) -> int:
        while peek(head) <= TINY.n_removals + len(first):
            store(site, handle, [next(numbers)] * 6)
        behind = int(copy(*arguments))
        return behind if checked else 0

    monkeypatch.setattr(removals, "copy_removals", late)
    return feed.take(), first


def test_entries_that_were_overwritten_meanwhile_are_a_gap(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, _ = overtake(site, monkeypatch, checked=True)
    assert removed.gap and not len(removed.keys)


def test_without_the_second_look_they_would_be_wrong(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    removed, right = overtake(site, monkeypatch, checked=False)
    assert not removed.gap and set(names(removed)) != right


def test_the_keeper_announces_before_it_overwrites(site: Site) -> None:
    """`H_REMOVING` is never behind what may be written, and what it announced is enough for the batch."""
    header = embedded_keeper(site.pool).authority.header
    handle = site.pool.space(SMALL)
    for number in range(40):
        store(site, handle, [number] * 6)
        assert peek(header(layout.H_REMOVING)) >= peek(header(layout.H_REMOVED))
    assert TINY.n_removals >= 2 * TINY.n_units
    gc.collect()
