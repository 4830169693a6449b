"""How room is made: tail-first within a chain, slabs that change their slot size, damaged blocks that are dropped."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.identity import KeyChain
from penstock.pool.client import SpaceHandle
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
    target,
)
from penstock.types import Miss

SMALL, LARGE = make_space(), make_space("large", n_segments=3, segment_bytes=4096)


def store(site: Site, handle: SpaceHandle, path: list[int], wait_s: float = 5.0) -> KeyChain:
    keys = chain(handle.space, path)
    site.pool.store(handle, keys, source(handle, keys), wait_s=wait_s)
    assert site.pool.flush()
    assert_consistent(site.pool)
    return keys


def evictions(site: Site) -> dict[str, int]:
    return embedded_keeper(site.pool).authority.evictions()


def prefix(site: Site, keys: KeyChain) -> int:
    """How many blocks of the chain are there; and that there is no hole before them."""
    resident = resident_keys(site.pool)
    there = [bytes(key) in resident for key in keys]
    assert there == sorted(there, reverse=True), "a block without its parent"
    return sum(there)


def test_a_chain_goes_from_its_end(site: Site) -> None:
    handle = site.pool.space(SMALL)
    oldest = store(site, handle, [1] * 12)
    lengths = [prefix(site, oldest)]
    for number in range(2, 12):
        newest = store(site, handle, [number] * 8)
        assert prefix(site, newest) == 8
        lengths.append(prefix(site, oldest))
    assert lengths[0] == 12 and lengths[-1] == 0
    assert any(0 < length < 12 for length in lengths), "it went piece by piece"
    assert lengths == sorted(lengths, reverse=True)
    assert evictions(site)["capacity"] > 0


def test_what_is_used_stays(site: Site) -> None:
    handle = site.pool.space(SMALL)
    used, unused = store(site, handle, [1] * 6), store(site, handle, [2] * 6)
    for number in range(3, 13):
        with site.pool.match(handle, used) as lease:
            assert len(lease) == 6
        store(site, handle, [number] * 6)
    assert prefix(site, unused) == 0 and prefix(site, used) == 6


def test_a_shared_beginning_outlives_its_branches(site: Site) -> None:
    handle = site.pool.space(SMALL)
    one, other = store(site, handle, [1, 1, 1, 2, 2, 2]), store(site, handle, [1, 1, 1, 3, 3, 3])
    for number in range(10, 22):
        with site.pool.match(handle, other):
            pass
        store(site, handle, [number] * 6)
    assert prefix(site, one) == 3 and prefix(site, other) == 6


def slabs(site: Site, handle: SpaceHandle) -> int:
    return int((embedded_keeper(site.pool).authority.slab_classes() == handle.slot_class).sum())


def test_the_second_slot_size_gets_room_in_a_full_pool(site: Site) -> None:
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    for number in range(10):
        store(site, small, [number] * 8)
    assert slabs(site, small) == TINY.n_slabs
    site.pool.return_idle_grants()
    keys = store(site, large, [5] * 3)
    assert prefix(site, keys) == 3 and slabs(site, large) >= 1
    assert evictions(site)["slab"] > 0
    with site.pool.match(large, keys) as lease:
        check_lease(lease, keys)


def test_a_busy_slot_size_grows_into_what_nobody_uses(site: Site) -> None:
    """And back, when the other one is busy; it does not stay at the one slab that it needs to live."""
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    for busy, length in ((small, 8), (large, 3), (small, 8)):
        site.pool.return_idle_grants()
        for number in range(60):
            store(site, busy, [number] * length)
        assert slabs(site, busy) >= TINY.n_slabs - 1


def test_two_busy_slot_sizes_share(site: Site) -> None:
    """Neither takes from the other what is in use."""
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    for number in range(40):
        store(site, small, [number] * 8)
        store(site, large, [number] * 2)
        site.pool.return_idle_grants()
    assert slabs(site, small) >= 1 and slabs(site, large) >= 1
    assert slabs(site, small) + slabs(site, large) == TINY.n_slabs


def test_clearing_a_slab_takes_what_continues_its_chains(site: Site) -> None:
    """A chain that lies in two slabs; the slab with its beginning is the coldest."""
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    long = store(site, small, [1] * 20)
    store(site, small, [2] * 20)
    store(site, small, [3] * 16)
    site.pool.return_idle_grants()
    keys = store(site, large, [1] * 3)
    assert prefix(site, keys) == 3
    assert prefix(site, long) < 20


def test_a_leased_slab_is_not_cleared(site: Site) -> None:
    """Nor are the ancestors of what is leased, wherever they lie."""
    small, large = site.pool.space(SMALL), site.pool.space(LARGE)
    reader = site.client()
    chains = [store(site, small, [number] * 14) for number in range(3)]
    leases = [reader.match(reader.space(SMALL), keys) for keys in chains]
    assert all(len(lease) for lease in leases)
    store(site, small, [9] * 14)
    site.pool.return_idle_grants()
    store(site, large, [5] * 4, wait_s=0.01)
    assert_consistent(site.pool)
    for keys, lease in zip(chains, leases, strict=True):
        check_lease(lease, keys)
        assert prefix(site, keys) >= len(lease)
        lease.release()
    site.pool.return_idle_grants()
    assert prefix(site, store(site, large, [6] * 3)) == 3


# ---- damage


def flip(site: Site, key: bytes, table: bool) -> None:
    """One bit of a block's payload, or of its checksum table."""
    authority = embedded_keeper(site.pool).authority
    records = authority.records()
    unit = next(int(u) for u, row in enumerate(records) if row[2:4].tobytes() == key and int(row[1]) & 0xFF == 2)
    at = authority.slot_addresses(unit)[table] - authority.mapping.address
    authority.mapping.array[at] ^= 1


@pytest.mark.parametrize("table", [False, True])
def test_a_flipped_bit_is_a_miss_and_never_data(site: Site, table: bool) -> None:
    handle = site.pool.space(SMALL)
    keys, other = store(site, handle, [1] * 6), store(site, handle, [1, 1, 1, 1, 5])
    flip(site, bytes(keys[2]), table)
    lease = site.pool.match(handle, keys)
    assert len(lease) == 6
    memory, tensors = target(handle, 6)
    assert lease.gather(tensors) == 2
    assert lease.miss is Miss.CHECKSUM
    assert np.array_equal(memory[1], block_bytes(bytes(keys[1]), handle.block_bytes))
    assert lease.verify() == 2
    lease.release()
    assert site.pool.flush()
    embedded_keeper(site.pool)._damaged_again_ms = 0
    site.link.ring()
    assert prefix(site, keys) == 2 and prefix(site, other) == 2
    assert evictions(site)["checksum"] == 5, "the block, and all that continued it"
    assert site.pool.counters()["miss.checksum"] == 2
    assert_consistent(site.pool)
    assert prefix(site, store(site, handle, [1] * 6)) == 6


def test_a_damaged_block_that_is_leased_goes_later(site: Site) -> None:
    handle, reader = site.pool.space(SMALL), site.client()
    keys = store(site, handle, [1] * 3)
    holding = reader.match(reader.space(SMALL), keys)
    flip(site, bytes(keys[1]), False)
    with site.pool.match(handle, keys) as lease:
        assert lease.verify() == 1
    assert site.pool.flush()
    assert len(resident_keys(site.pool)) == 3
    holding.release()
    embedded_keeper(site.pool)._damaged_again_ms = 0
    site.link.ring()
    assert len(resident_keys(site.pool)) == 1


def test_a_false_report_changes_nothing(site: Site) -> None:
    handle = site.pool.space(SMALL)
    store(site, handle, [1] * 3)
    records = embedded_keeper(site.pool).authority.records()
    for unit in np.flatnonzero((records[:, 1] & np.uint64(0xFF)) == 2):
        site.pool._report_damage(site.pool._at, int(unit), int(records[unit, 0]), b"")
    for nonsense in (-1, TINY.n_units, 1 << 40):
        site.pool._report_damage(site.pool._at, nonsense, 1, b"")
    assert site.pool.flush()
    assert len(resident_keys(site.pool)) == 3


def test_unverified_reads_are_on_request_only(site: Site) -> None:
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1, 2])
    flip(site, bytes(keys[0]), False)
    with site.pool.match(handle, keys) as lease:
        _, tensors = target(handle, 2)
        assert lease.gather(tensors, verify=False) == 2
        assert lease.gather(tensors) == 0
        site.pool.verify = False
        assert lease.gather(tensors) == 2


def test_fsck_sees_what_is_wrong(site: Site) -> None:
    """The check behind every other test."""
    handle = site.pool.space(SMALL)
    keys = store(site, handle, [1] * 3)
    authority = embedded_keeper(site.pool).authority
    records = authority.records()
    units = np.flatnonzero((records[:, 1] & np.uint64(0xFF)) == 2)
    flip(site, bytes(keys[0]), False)
    with pytest.raises(AssertionError, match="wrong checksum"):
        assert_consistent(site.pool)
    flip(site, bytes(keys[0]), False)
    for word, value, problem in ((1, 3, "leaving"), (2, 99, "another key"), (4, 1, "1 bytes"), (8, 5, "parent")):
        before = records[units[1]].copy()
        records[units[1], word] = (int(before[1]) & ~0xFF) | value if word == 1 else value
        with pytest.raises(AssertionError, match=problem):
            assert_consistent(site.pool)
        records[units[1]] = before
    directory = authority.geometry.directory_offset
    cells = authority.mapping.array[directory : authority.geometry.lanes_offset].view(np.uint64)
    cell = int(np.flatnonzero(cells)[0])
    entry, cells[cell] = cells[cell].copy(), 0
    with pytest.raises(AssertionError, match="listed 0 times"):
        assert_consistent(site.pool)
    cells[cell] = entry
    assert_consistent(site.pool)
