"""Several threads on one pool: what each of them is told and gets is right."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from penstock.pool.client import Pool
from penstock.testing.pool import (
    TINY,
    Site,
    assert_consistent,
    chain,
    check_lease,
    embedded_keeper,
    make_space,
    source,
)
from penstock.types import Miss
from tests.support import unique_name

N_THREADS = 8
ROUNDS = 150
SPACES = (make_space(), make_space("large", n_segments=3, segment_bytes=4096))


def work(pool: Pool, seed: int, start: threading.Barrier) -> int:
    """Store, match, read and hand over at random; every byte is checked. Returns how many blocks were read."""
    dice, read = random.Random(seed), 0
    handles = [pool.space(space) for space in SPACES]
    held = []
    start.wait()
    for _ in range(ROUNDS):
        handle = dice.choice(handles)
        keys = chain(handle.space, [dice.randint(0, 2) for _ in range(dice.randint(1, 8))])
        if dice.random() < 0.4:
            pool.store(handle, keys, source(handle, keys), wait_s=0.002)
        lease = pool.match(handle, keys)
        assert lease.miss in (Miss.NONE, Miss.ABSENT, Miss.BUSY, Miss.LEASE_TABLE_FULL)
        check_lease(lease, keys[: len(lease)])
        read += len(lease)
        if dice.random() < 0.2:
            taken = pool.adopt(lease.handover())
            check_lease(taken, keys[: len(taken)])
            held.append(taken)
        if dice.random() < 0.7:
            lease.release()
        if len(held) > 2:
            held.pop(0).release()
        if dice.random() < 0.05:
            pool.return_idle_grants()
    return read


@pytest.mark.parametrize("own_clients", [False, True])
def test_threads(own_clients: bool) -> None:
    """All on one pool, or each on a client of its own."""
    geometry = replace(TINY, n_slabs=6, n_lanes=N_THREADS + 1, leases=256)
    with Site.opened(unique_name("u"), geometry) as site:
        pools = [site.client() if own_clients else site.pool for _ in range(N_THREADS)]
        start = threading.Barrier(N_THREADS)
        with ThreadPoolExecutor(N_THREADS) as threads:
            read = list(threads.map(work, pools, range(N_THREADS), [start] * N_THREADS))
        assert sum(read) > 0
        for pool in set(pools):
            assert pool.flush()
            pool.return_idle_grants()
            assert pool.flush()
        assert_consistent(site.pool)
        assert embedded_keeper(site.pool).authority.n_granted == 0
        counters = [pool.counters() for pool in set(pools)]
        assert sum(each["blocks_read"] for each in counters) >= sum(read)
        assert sum(each["lookups"] for each in counters) == N_THREADS * ROUNDS


def test_a_space_is_registered_once(site: Site) -> None:
    """Threads that open the same spaces at the same time get the same ones."""
    spaces = [make_space(f"tenant {number}") for number in range(6)]
    start = threading.Barrier(N_THREADS)

    def register(_: int) -> list[int]:
        start.wait()
        return [site.pool.space(space).id for space in spaces]

    with ThreadPoolExecutor(N_THREADS) as threads:
        ids = list(threads.map(register, range(N_THREADS)))
    assert all(each == ids[0] for each in ids) and len(set(ids[0])) == len(spaces)
