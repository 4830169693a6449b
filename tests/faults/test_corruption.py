"""Damage: flipped bytes, commits that claim what is not so, and garbage where a client may write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import penstock
from penstock.pool import layout
from penstock.pool.cells import poke
from penstock.pool.layout import COMMIT_BYTES, KIND_COMMIT, KIND_SUSPECT
from penstock.types import Drop, Miss
from tests.conftest import Scale
from tests.faults.load import WIDE
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
    until,
)

pytestmark = pytest.mark.faults


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(8 * MIB, lanes=6)) as running:
        yield running


@pytest.fixture
def pool(keeper: Keeper) -> Iterator[penstock.Pool]:
    with keeper.open() as opened:
        yield opened


# ---- flipped bytes


def place(lease: penstock.Lease, i: int, *, table: bool = False) -> int:
    """Where block i's payload (or its checksum table) begins in the segment's file."""
    at, slots = lease._at, lease._located()
    return int((slots.tables if table else slots.payloads)[i]) - at.data.address + at.geometry.data_offset


def flip(keeper: Keeper, offset: int) -> None:
    """Turn one bit of the segment's file, behind everybody's back."""
    fd = os.open(keeper.path, os.O_RDWR)
    try:
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
    finally:
        os.close(fd)


KEYS, OTHERS = chain(1, blocks=12), chain(2, blocks=4)


@pytest.mark.parametrize("table", [False, True], ids=["data", "checksum table"])
@pytest.mark.parametrize("where", [0, 7])
def test_a_flipped_byte_is_a_miss_never_data(keeper: Keeper, pool: penstock.Pool, table: bool, where: int) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    must_store(pool, handle, OTHERS)
    lease = pool.match(handle, KEYS)
    flip(keeper, place(lease, where, table=table) + 3)
    good = read(lease, handle)
    assert len(good) == where and np.array_equal(good, contents(KEYS.array)[:where])
    assert lease.miss is Miss.CHECKSUM
    assert pool.counters()["miss.checksum"] == 1
    # While the lease stands the block stays; then it goes, with all that continues it and nothing else.
    assert pool.flush(PATIENCE_S)
    assert keeper.counters()["damaged"] == 0
    lease.release()
    until(lambda: keeper.counters()["damaged"] == 1, "the damaged block is dropped")
    assert keeper.counters()["evicted.checksum"] == len(KEYS) - where
    with pool.match(handle, KEYS) as rest:
        assert (len(rest), rest.miss) == (where, Miss.ABSENT)
    keeper.fsck()
    assert_resident(pool, handle, OTHERS)
    must_store(pool, handle, KEYS[where:])
    assert_resident(pool, handle, KEYS)


def test_fsck_and_verify_find_a_flipped_byte(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    lease = pool.match(handle, KEYS)
    flip(keeper, place(lease, 4) + SPACE.block_bytes - 1)
    assert len(keeper.ask("fsck", 1)["problems"]) == 1
    assert keeper.ask("fsck", 0)["problems"] == []
    assert lease.verify() == 4
    assert lease.miss is Miss.CHECKSUM
    lease.release()
    until(lambda: keeper.counters()["damaged"] == 1, "the damaged block is dropped")
    keeper.fsck()


def test_without_verification_the_flipped_byte_would_have_been_data(keeper: Keeper, pool: penstock.Pool) -> None:
    """A check of the check: it is the checksum that keeps the wrong byte away."""
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    with pool.match(handle, KEYS) as lease:
        flip(keeper, place(lease, 4) + 100)
        blocks = read(lease, handle, verify=False)
        assert len(blocks) == len(KEYS)
        assert np.flatnonzero((blocks != contents(KEYS.array)).any(axis=1)).tolist() == [4]


def test_only_the_layers_that_are_read_are_verified(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    with pool.match(handle, KEYS) as lease:
        flip(keeper, place(lease, 4) + 2 * SPACE.segment_bytes)
        out = np.zeros((len(KEYS), SPACE.segment_bytes), np.uint8)
        index = np.arange(len(KEYS))
        for segment, good in ((0, len(KEYS)), (1, len(KEYS)), (2, 4), (3, len(KEYS))):
            to = penstock.TensorMap(np.array([out.ctypes.data]), index, SPACE.segment_bytes, keep_alive=out)
            assert lease.gather(to, segments=[segment]) == good


def test_a_false_report_of_damage_drops_nothing(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    row = np.zeros((1, COMMIT_BYTES // 8), np.int64)
    for unit in range(keeper.geometry.n_units):
        row[0, :2] = KIND_SUSPECT, unit
        until(lambda: pool._put(pool._at, row) == 1, "the ring has room")
    assert pool.flush(PATIENCE_S)
    assert keeper.counters()["damaged"] == 0
    assert_resident(pool, handle, KEYS)


# ---- commits that claim what is not so

NEVER = chain(3, blocks=1)
UNIT, GENERATION, EPOCH, KEY, PARENT, LENGTH, SPACE_ID = 1, 2, 3, 4, 6, 8, 9


def honest_row(pool: penstock.Pool, handle: penstock.SpaceHandle) -> npt.NDArray[np.int64]:
    """A commit of one filled slot, as the client would write it into the ring."""
    reservation = pool.reserve(handle, 1, PATIENCE_S)
    assert len(reservation) == 1
    reservation.view(0)[:] = contents(NEVER.array)[0]
    reservation._seal(NEVER, 1, None)
    row = np.zeros((1, COMMIT_BYTES // 8), np.int64)
    row[0, :4] = KIND_COMMIT, reservation._units[0], reservation._generations[0], pool._at.given.epoch
    row[0, KEY : KEY + 2] = NEVER.array.view(np.int64)[0]
    row[0, PARENT : PARENT + 2] = np.frombuffer(NEVER.parent, np.int64)
    row[0, LENGTH], row[0, SPACE_ID] = handle.block_bytes, handle.id
    row[0, 10] = reservation._roots.view(np.int64)[0]
    # The slot is the row's from here on.
    reservation._open = False
    pool._at.hold(-1)
    pool._grants.used(handle.slot_class, 1)
    return row


LIES: dict[str, tuple[int, int, bool, Drop]] = {
    # column, value, whether it is added to what is there, what it is refused for
    "kind": (0, 77, False, Drop.BAD_ENTRY),
    "slot beyond the pool": (UNIT, 1 << 40, False, Drop.BAD_SLOT),
    "negative slot": (UNIT, -1, False, Drop.BAD_SLOT),
    "later generation": (GENERATION, 1, True, Drop.STALE),
    "earlier generation": (GENERATION, -1, True, Drop.STALE),
    "later epoch": (EPOCH, 1, True, Drop.NOT_OWNER),
    "longer": (LENGTH, 64, True, Drop.BAD_LENGTH),
    "negative length": (LENGTH, -1, False, Drop.BAD_LENGTH),
    "unknown space": (SPACE_ID, 200, False, Drop.BAD_SPACE),
    "space beyond the table": (SPACE_ID, 1 << 20, False, Drop.BAD_SPACE),
    "negative space": (SPACE_ID, -1, False, Drop.BAD_SPACE),
    "space of another slot size": (SPACE_ID, 1, True, Drop.BAD_SLOT),
    "absent parent": (PARENT, 1, True, Drop.ORPHAN),
}


def send(keeper: Keeper, pool: penstock.Pool, row: npt.NDArray[np.int64]) -> dict[str, int]:
    """Put a row into the ring; the keeper's counters that changed, and by how much."""
    before = keeper.counters()
    assert pool._put(pool._at, row) == 1
    assert pool.flush(PATIENCE_S)
    after = keeper.counters()
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


@pytest.mark.parametrize("lie", LIES)
def test_a_commit_that_lies_is_refused(keeper: Keeper, pool: penstock.Pool, lie: str) -> None:
    handle, wide = pool.space(SPACE), pool.space(WIDE)
    assert wide.id == handle.id + 1
    must_store(pool, handle, KEYS)
    column, value, relative, reason = LIES[lie]
    row = honest_row(pool, handle)
    row[0, column] = row[0, column] + value if relative else value
    changed = send(keeper, pool, row)
    assert changed.pop(f"refused.{reason.name.lower()}") == 1
    assert changed.keys() <= {"granted"}, changed
    assert len(pool.match(handle, NEVER)) == 0
    assert keeper.fsck()["blocks"] == len(KEYS)
    assert_resident(pool, handle, KEYS)


def test_an_honest_row_is_taken(keeper: Keeper, pool: penstock.Pool) -> None:
    """A check of the check: the rows above are refused for their lie, not for how they are made."""
    handle = pool.space(SPACE)
    changed = send(keeper, pool, honest_row(pool, handle))
    assert changed.pop("applied") == 1 and changed.keys() <= {"granted"}
    assert_resident(pool, handle, NEVER)


def test_a_commit_of_a_slot_that_was_used_is_refused(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    row = honest_row(pool, handle)
    send(keeper, pool, row)
    assert send(keeper, pool, row).get("applied_before_crash") == 1  # the same again: what a restart may see
    row[0, KEY] += 1
    assert send(keeper, pool, row).get("refused.stale") == 1
    assert_resident(pool, handle, NEVER)
    assert keeper.fsck()["blocks"] == 1


def test_a_second_copy_of_a_key_is_dropped(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    send(keeper, pool, honest_row(pool, handle))
    assert send(keeper, pool, honest_row(pool, handle)).get("refused.duplicate") == 1
    assert keeper.fsck()["blocks"] == 1


def test_a_commit_of_another_clients_slot_is_refused(keeper: Keeper, pool: penstock.Pool) -> None:
    handle = pool.space(SPACE)
    with keeper.open("victim") as victim:
        theirs = victim.space(SPACE)
        row = honest_row(victim, theirs)
        stolen = row.copy()
        stolen[0, EPOCH] = pool._at.given.epoch
        assert send(keeper, pool, stolen).get("refused.not_owner") == 1
        assert len(pool.match(handle, NEVER)) == 0
        assert send(keeper, victim, row).get("applied") == 1
        assert_resident(pool, handle, NEVER)


# ---- garbage


def scribble(connection: Connection, name: str) -> None:
    """For each word: garbage of that sort into this client's own lane."""
    pool = penstock.open(name, client="scribbler")
    at = pool._at
    geometry, lane, memory = at.geometry, at.lane.address, at.lane.array

    def random_bytes(start: int, size: int) -> None:
        memory[start : start + size] = rng.integers(0, 256, size, dtype=np.uint8)

    connection.send("ready")
    while True:
        sort, seed = connection.recv()
        rng = np.random.default_rng(seed)
        word = int(rng.integers(-(1 << 63), 1 << 63))
        if sort == "commits":
            random_bytes(geometry.commit_ring_offset, geometry.ring * COMMIT_BYTES)
            entries = memory[geometry.commit_ring_offset :][: geometry.ring * COMMIT_BYTES].view(np.int64)
            rows = entries.reshape(-1, COMMIT_BYTES // 8)
            rows[:, 0] = rng.integers(0, 5, len(rows))  # else nothing gets past the first look
            rows[::2, UNIT] = rng.integers(-2, geometry.n_units + 2, len(rows[::2]))
            rows[::3, EPOCH] = at.given.epoch
            rows[::5, GENERATION] = rng.integers(0, 4, len(rows[::5]))
            poke(lane + layout.L_COMMIT_HEAD, _tail(memory, layout.L_COMMIT_TAIL) + geometry.ring)
        elif sort == "hits":
            random_bytes(geometry.hit_ring_offset, geometry.ring * layout.HIT_BYTES)
            poke(lane + layout.L_HIT_HEAD, _tail(memory, layout.L_HIT_TAIL) + geometry.ring)
        elif sort == "leases":
            random_bytes(geometry.lease_table_offset, geometry.leases * 8)
            poke(lane + layout.L_LEASE_HWM, word)
        elif sort == "heads":
            for cell in (layout.L_COMMIT_HEAD, layout.L_HIT_HEAD, layout.L_GRANT_TAIL, layout.L_LEASE_HWM):
                poke(lane + cell, int(rng.integers(-(1 << 63), 1 << 63)))
        elif sort == "counters":
            random_bytes(layout.L_COUNTERS, layout.LANE_COUNTERS * 8)
        elif sort == "wants":
            random_bytes(layout.L_WANT, layout.N_CLASSES * 8)
            poke(lane + layout.L_WAITING, word)
        elif sort == "everything":
            random_bytes(layout.L_COMMIT_HEAD, geometry.lane_bytes - layout.L_COMMIT_HEAD)
        connection.send("done")


SORTS = ["commits", "hits", "leases", "heads", "counters", "wants", "control", "everything"]


def _tail(memory: npt.NDArray[np.uint8], cell: int) -> int:
    return int(memory[cell : cell + 8].view(np.int64)[0])


@pytest.mark.parametrize("sort", SORTS)
def test_garbage_in_a_lane_harms_nobody_else(keeper: Keeper, pool: penstock.Pool, sort: str, scale: Scale) -> None:
    """The keeper lives, before, at and after the death of who wrote it, through a restart, and others' blocks stay."""
    handle = pool.space(SPACE)
    must_store(pool, handle, KEYS)
    number = 100
    for seed in range(scale.of(2, 20)):
        with Client(scribble, keeper.name) as vandal:
            assert vandal.receive() == "ready"
            for again in range(3):
                assert vandal.ask((sort, seed * 10 + again)) == "done"
                number += 1
                must_store(pool, handle, chain(number, blocks=2))
                if sort != "control":  # the lane is wrong then, and fsck says so
                    keeper.fsck()
            assert_resident(pool, handle, KEYS)
            if seed % 2:
                keeper.kill()
                keeper.start()
                keeper.wait_back(pool)
        until(lambda: len(keeper.stat()["clients"]) == 1, "the dead vandal's lane is free")
        keeper.fsck()
    assert_resident(pool, handle, KEYS)
    report: dict[str, Any] = keeper.stat()
    assert report["requests_failed"] == 0
    assert report["granted"] <= layout.N_CLASSES * 64
