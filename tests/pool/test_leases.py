"""Leases and views: what is pinned, for how long, and what a full lease table does."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import penstock
from penstock.errors import ConfigError, PoolClosed, ViewsAlive
from penstock.identity import KeyChain
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.layout import SlotState
from penstock.pool.lease import Lease
from penstock.testing.pool import (
    TINY,
    Site,
    assert_consistent,
    block_bytes,
    chain,
    check_lease,
    make_space,
    resident_keys,
    source,
    target,
)
from penstock.types import Miss
from tests.support import unique_name

SPACE = make_space()


def stored(pool: Pool, path: list[int]) -> tuple[SpaceHandle, KeyChain]:
    """A chain that is in the pool."""
    handle, keys = pool.space(SPACE), chain(SPACE, path)
    assert pool.store(handle, keys, source(handle, keys), wait_s=5).n_blocks == len(keys)
    assert pool.flush()
    return handle, keys


def flood(site: Site) -> None:
    """Store more than the pool holds, from another client, so that all goes that nothing pins."""
    pool = site.client()
    handle = pool.space(SPACE)
    for number in range(12):
        keys = chain(SPACE, [1000 + number] * 8)
        pool.store(handle, keys, source(handle, keys), wait_s=0.01)
        pool.flush()


def test_an_unleased_block_goes_and_a_leased_one_stays(site: Site) -> None:
    handle, kept = stored(site.pool, [1, 2, 3])
    _, lost = stored(site.pool, [4, 5, 6])
    lease = site.pool.match(handle, kept)
    flood(site)
    resident = resident_keys(site.pool)
    assert all(bytes(key) in resident for key in kept)
    assert not any(bytes(key) in resident for key in lost)
    check_lease(lease, kept)
    lease.release()
    flood(site)
    assert not set(resident_keys(site.pool)) & {bytes(key) for key in kept}
    assert_consistent(site.pool)


def test_misses_say_why(site: Site) -> None:
    pool = site.pool
    handle, keys = stored(pool, [1, 2, 3])
    with pool.match(handle, chain(SPACE, [1, 2, 3, 4])) as lease:
        assert (len(lease), lease.miss) == (3, Miss.ABSENT)
    with pool.match(handle, chain(SPACE, [9])) as lease:
        assert (len(lease), lease.miss) == (0, Miss.ABSENT)
    with pool.match(handle, keys[:0]) as lease:
        assert (len(lease), lease.miss) == (0, Miss.NONE)
    other = pool.space(make_space("other", n_segments=4))
    with pool.match(other, keys) as lease:
        assert (len(lease), lease.miss) == (0, Miss.SPACE), "the key is there, but under another space"
    counters = pool.counters()
    assert counters["miss.absent"] == 2 and counters["miss.space"] == 1
    assert counters["blocks_hit"] == 3 and counters["lookups"] == 4


def test_a_full_lease_table_is_a_miss_and_never_an_unleased_read(site: Site) -> None:
    pool = site.pool
    handle, keys = stored(pool, [0] * 20)
    leases = []
    while (lease := pool.match(handle, keys)).miss is Miss.NONE:
        leases.append(lease)
    leases.append(lease)
    assert lease.miss is Miss.LEASE_TABLE_FULL
    assert sum(len(lease) for lease in leases) == TINY.leases == pool.held()["leases"]
    more = pool.match(handle, keys)
    assert (len(more), more.miss) == (0, Miss.LEASE_TABLE_FULL)
    taken = pool.adopt(leases[0].handover())
    assert (len(taken), taken.miss) == (0, Miss.LEASE_TABLE_FULL)
    assert pool.counters()["miss.lease_table_full"] == 3
    for lease in leases:
        check_lease(lease, keys)
        lease.release()
    assert pool.held()["leases"] == 0
    with pool.match(handle, keys) as lease:
        assert (len(lease), lease.miss) == (20, Miss.NONE)


def test_one_request_leases_8192_blocks() -> None:
    """With an ordinary client's lease table (protocol item 10)."""
    geometry = replace(TINY, slab_bytes=2 << 20, n_slabs=18, leases=16384, ring=4096)
    with Site.opened(unique_name("u"), geometry) as site:
        pool = site.pool
        handle = pool.space(make_space(n_segments=1, segment_bytes=256))
        keys = chain(handle.space, list(range(8192)))
        memory = np.repeat(np.arange(8192, dtype=np.uint32), 64).view(np.uint8).reshape(8192, 256)
        base = np.array([memory.ctypes.data], np.int64)
        for at in range(0, 8192, 256):
            part = penstock.TensorMap(base, np.arange(at, at + 256), 256, keep_alive=memory)
            assert pool.store(handle, keys[at : at + 256], part, wait_s=10).n_blocks == 256
        assert pool.flush()
        with pool.match(handle, keys) as lease:
            assert (len(lease), lease.miss) == (8192, Miss.NONE)
            back, tensors = target(handle, 8192)
            assert lease.gather(tensors) == 8192
            assert np.array_equal(back, memory)
            assert_consistent(pool)
        assert pool.held()["leases"] == 0


def test_truncate_keeps_the_first(site: Site) -> None:
    handle, keys = stored(site.pool, [1, 2, 3, 4, 5])
    lease = site.pool.match(handle, keys)
    lease.truncate(9)
    assert len(lease) == 5
    lease.truncate(2)
    assert len(lease) == 2 == site.pool.held()["leases"]
    flood(site)
    check_lease(lease, keys[:2])
    with pytest.raises(IndexError):
        lease.views(2)
    lease.truncate(-1)
    assert len(lease) == 0 == site.pool.held()["leases"]


def test_release_is_idempotent_and_collection_releases(site: Site) -> None:
    handle, keys = stored(site.pool, [1, 2])
    lease = site.pool.match(handle, keys)
    lease.release()
    lease.release()
    with site.pool.match(handle, keys) as lease:
        lease.release()
    lease = site.pool.match(handle, keys)
    assert site.pool.held()["leases"] == 2
    del lease
    gc.collect()
    assert site.pool.held()["leases"] == 0


# ---- views

DERIVED: dict[str, Any] = {
    "itself": lambda array: array,
    "slice": lambda array: array[100:200],
    "reshaped": lambda array: array.reshape(2, -1),
    "other type": lambda array: array.view(np.int32),
    "transposed": lambda array: array.reshape(2, -1).T,
    "memoryview": lambda array: memoryview(array),
    "of a memoryview": lambda array: np.frombuffer(memoryview(array), np.uint16),
    "of a view of a view": lambda array: array[64:][::2].reshape(-1, 2),
}


@pytest.mark.parametrize("name", list(DERIVED))
def test_whatever_is_made_from_a_view_pins(site: Site, name: str) -> None:
    handle, keys = stored(site.pool, [1, 2])
    lease = site.pool.match(handle, keys)
    derived = DERIVED[name](lease.views(1))
    gc.collect()
    with pytest.raises(ViewsAlive, match="block 1"):
        lease.release()
    with pytest.raises(ViewsAlive, match="block 1"):
        lease.truncate(1)
    flood(site)
    again = DERIVED[name](block_bytes(bytes(keys[1]), handle.block_bytes))
    assert np.array_equal(np.asarray(derived), np.asarray(again))
    del derived
    lease.release()


def test_a_tensor_pins() -> None:
    torch = pytest.importorskip("torch")
    with Site.opened(unique_name("u")) as site:
        handle, keys = stored(site.pool, [1])
        lease = site.pool.match(handle, keys)
        # torch has no read-only tensors and says so; it is the caller's to know.
        with pytest.warns(UserWarning, match="not writable"):
            tensor = torch.from_numpy(lease.views(0)).view(torch.float32).reshape(2, -1)[0]
        with pytest.raises(ViewsAlive, match="block 0"):
            lease.release()
        expected = block_bytes(bytes(keys[0]), handle.block_bytes)[: tensor.numel() * 4]
        assert tensor.numpy().tobytes() == expected.tobytes()
        del tensor
        lease.release()


def test_views_are_read_only(site: Site) -> None:
    handle, keys = stored(site.pool, [1])
    with site.pool.match(handle, keys) as lease:
        view = lease.views(0)
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match=r"WRITEABLE|writeable"):
            view.flags.writeable = True
        del view


def test_a_view_outlives_its_lease_and_its_pool() -> None:
    with Site.opened(unique_name("u")) as site:
        handle, keys = stored(site.pool, [1])
        expected = block_bytes(bytes(keys[0]), handle.block_bytes)
        view = site.pool.match(handle, keys).views(0)
        gc.collect()
        assert site.pool.held()["leases"] == 1
        flood(site)
        assert np.array_equal(view, expected)
    assert np.array_equal(view, expected), "the memory stays mapped"
    del view


def test_closing_keeps_the_lane_while_a_view_lives(site: Site) -> None:
    """What the keeper would otherwise take for the proof of this client's death."""
    pool = site.client()
    handle, keys = stored(pool, [1, 2])
    view = pool.match(handle, keys).views(1)
    lane = pool._at.given.lane
    pool.close()
    assert site.link.keeper.reclaim_dead() == 0 and site.link.keeper.lane_alive(lane)
    flood(site)
    assert np.array_equal(view, block_bytes(bytes(keys[1]), handle.block_bytes))
    del view
    gc.collect()
    assert site.link.keeper.reclaim_dead() == 1
    site.clients.remove(pool)
    assert_consistent(site.pool)


def test_after_close(site: Site) -> None:
    pool = site.client()
    handle, keys = stored(pool, [1])
    lease = pool.match(handle, keys)
    pool.close()
    pool.close()
    assert pool.closed
    missed = pool.match(handle, keys)
    assert (len(missed), missed.miss) == (0, Miss.CLOSED)
    for call in (lambda: lease.views(0), lambda: lease.handover(), lambda: pool.space(make_space("new"))):
        with pytest.raises(PoolClosed):
            call()
    lease.release()


# ---- gathering


def test_gather_parts(site: Site) -> None:
    handle, keys = stored(site.pool, [1, 2, 3, 4])
    expected = np.stack([block_bytes(bytes(key), handle.block_bytes) for key in keys])
    with site.pool.match(handle, keys) as lease:
        memory, tensors = target(handle, 2, [1])
        assert lease.gather(tensors, blocks=slice(1, 3), segments=[1]) == 2
        assert np.array_equal(memory, expected[1:3, handle.segment_bytes :])
        memory, tensors = target(handle, 4)
        assert lease.gather(tensors, verify=False) == 4
        assert np.array_equal(memory, expected)
        _, tensors = target(handle, 0)
        assert lease.gather(tensors, blocks=slice(4, 9)) == 0
        assert lease.verify() == 4


def test_gather_refuses_what_does_not_fit(site: Site) -> None:
    handle, keys = stored(site.pool, [1, 2, 3, 4])
    with site.pool.match(handle, keys) as lease:
        _, tensors = target(handle, 3)
        for arguments in ({}, {"blocks": slice(0, 4, 2)}, {"blocks": slice(3), "segments": [0]}):
            with pytest.raises(ValueError, match=r"map has|step"):
                lease.gather(tensors, **arguments)
        with pytest.raises(ValueError, match="segments"):
            lease.gather(tensors, blocks=slice(3), segments=[0, 2])
        ragged = replace(tensors, runs=7, run_stride=200)
        with pytest.raises(ValueError, match="equal runs"):
            lease.gather(ragged, blocks=slice(3))


# ---- hand-over


def test_hand_over_to_another_client(site: Site) -> None:
    handle, keys = stored(site.pool, [1, 2, 3])
    other = site.client()
    other.space(SPACE)
    given = site.pool.match(handle, keys)
    taken = other.adopt(given.handover())
    assert (len(taken), taken.miss) == (3, Miss.NONE)
    given.release()
    flood(site)
    check_lease(taken, keys)


def test_hand_over_of_what_is_gone(site: Site) -> None:
    handle, keys = stored(site.pool, [1, 2, 3])
    other = site.client()
    other.space(SPACE)
    lease = site.pool.match(handle, keys)
    data = lease.handover()
    lease.release()
    flood(site)
    taken = other.adopt(data)
    assert (len(taken), taken.miss) == (0, Miss.CHANGED)


def test_hand_over_that_is_none(site: Site) -> None:
    handle, keys = stored(site.pool, [1])
    data = site.pool.match(handle, keys).handover()
    stranger = site.client()
    for bad in (b"", b"\xc1", data[:-1], data + b"x"):
        with pytest.raises(ConfigError, match="not a lease hand-over"):
            site.pool.adopt(bad)
    with pytest.raises(ConfigError, match="call `space` first"):
        stranger.adopt(data)
    with Site.opened(unique_name("u")) as elsewhere:
        elsewhere.pool.space(SPACE)
        with pytest.raises(ConfigError, match="another pool"):
            elsewhere.pool.adopt(data)


def test_adopting_nonsense_units_reads_nothing(site: Site) -> None:
    import msgspec

    from penstock.pool.lease import Handover

    handle, keys = stored(site.pool, [1])
    given = msgspec.msgpack.decode(site.pool.match(handle, keys).handover(), type=Handover)
    for unit, generation in ((-1, 1), (TINY.n_units, 1), (1 << 62, 1), (0, 0), (0, -5)):
        bad = msgspec.structs.replace(given, handles=np.array([unit, generation], np.int64).tobytes())
        lease = site.pool.adopt(msgspec.msgpack.encode(bad))
        assert (len(lease), lease.miss) == (0, Miss.CHANGED)


def test_a_block_that_the_keeper_tries_to_evict_is_read_on(site: Site) -> None:
    """Between the mark and the scan that finds the lease, a copy that ends is as good as any."""
    handle, keys = stored(site.pool, [1, 2])
    lease = site.pool.match(handle, keys)
    records = site.link.keeper.authority.records()
    ready = np.flatnonzero((records[:, 1] & np.uint64(0xFF)) == SlotState.READY)
    records[ready, 1] += np.uint64(SlotState.LEAVING - SlotState.READY)
    check_lease(lease, keys)
    assert lease.miss is Miss.NONE
    with site.pool.match(handle, keys) as late:
        assert (len(late), late.miss) == (0, Miss.BUSY), "nobody else gets it meanwhile"
    records[ready, 1] -= np.uint64(SlotState.LEAVING - SlotState.READY)
    lease.release()


def test_a_slot_that_leaves_under_a_lease_is_never_read(site: Site) -> None:
    """The second look: what a copy brought is discarded when the generation moved (it never does under a lease)."""
    handle, keys = stored(site.pool, [1, 2])
    lease = site.pool.match(handle, keys)
    records = site.link.keeper.authority.records()
    unit = int(np.flatnonzero((records[:, 1] & np.uint64(0xFF)) == SlotState.READY)[1])
    records[unit, 0] += np.uint64(1)
    _, tensors = target(handle, 2)
    good = lease.gather(tensors, verify=False)
    assert good < 2 and lease.miss is Miss.CHANGED
    assert site.pool.counters()["miss.changed"] == 1
    assert isinstance(lease, Lease)
    lease.release()
    records[unit, 0] -= np.uint64(1)
