"""What a reader of the code broke once, by hand: each of these failed before the line it guards was written."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import penstock
from penstock import Intent, Miss
from penstock.errors import Damaged, NoKeeper, NotOurs, PenstockError
from penstock.pool import segment as segments
from penstock.pool.client import Pool
from penstock.pool.grants import GrantStore
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock
from penstock.pool.wire import Connection as ControlConnection
from penstock.pool.wire import Hello, Names, SpaceOf
from penstock.types import Drop
from tests.support import (
    MIB,
    PATIENCE_S,
    SPACE,
    Keeper,
    assert_resident,
    chain,
    contents,
    must_store,
    read,
    small_geometry,
    store,
    tensors,
    unique_name,
    until,
    wait_stopped,
)

pytestmark = pytest.mark.faults

# Far above what an engine may be held up, far below the control socket's timeout of 5 s.
BOUND_S = 2.5


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(6 * MIB, lanes=4)) as running:
        yield running


@pytest.fixture
def embedded() -> Iterator[Pool]:
    with penstock.open(unique_name(), embedded=6 * MIB, geometry=small_geometry(6 * MIB)) as pool:
        yield pool


@contextlib.contextmanager
def stopped(keeper: Keeper) -> Iterator[None]:
    """The keeper's process stands still meanwhile."""
    os.kill(keeper.pid, signal.SIGSTOP)
    wait_stopped(keeper.pid)
    try:
        yield
    finally:
        os.kill(keeper.pid, signal.SIGCONT)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


# ---- a keeper that stands still


def test_a_stopped_keeper_holds_no_engine_up(keeper: Keeper) -> None:
    """Not even a session's new name, which the keeper is told of: it used to be waited for, 5 s each."""
    pool = keeper.open()
    handle = pool.space(SPACE)
    must_store(pool, handle, chain(1, blocks=8))
    with stopped(keeper):
        rows = tensors(contents(chain(2, blocks=4).array))
        intent = Intent(session="never seen before")
        assert seconds(lambda: pool.store(handle, chain(2, blocks=4), rows, intent=intent)) < BOUND_S
        assert seconds(lambda: pool.match(handle, chain(1, blocks=8)).release()) < BOUND_S
        assert seconds(lambda: pool.reserve(handle, 4).abort()) < BOUND_S
        assert seconds(lambda: pool.flush(0.1)) < BOUND_S
        assert seconds(pool.close) < BOUND_S


def test_names_are_told_once_the_keeper_goes_on(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle, keys = pool.space(SPACE), chain(3, blocks=4)
        must_store(pool, handle, chain(1, blocks=1))
        with stopped(keeper):
            stored = pool.store(handle, keys, tensors(contents(keys.array)), wait_s=0.1, intent=Intent(session="talk"))
        assert pool.flush(PATIENCE_S)
        if stored.n_blocks:
            until(lambda: "talk" in {row["session"] for row in keeper.ask("ls")["chains"]}, "the name is there")


def test_an_answer_that_came_too_late_answers_no_later_question(keeper: Keeper) -> None:
    connection = ControlConnection(keeper.name, timeout_s=0.2)
    try:
        connection.ask(Hello(1, "late"), n_fds=2)
        with stopped(keeper), pytest.raises(NoKeeper):
            connection.ask(Names({1: "one"}))
        with pytest.raises(NoKeeper):  # not: the answer to the names
            connection.ask(SpaceOf(bytes(32), bytes(16), 4096, 16, 4, 1024))
    finally:
        connection.close()


# ---- what the keeper is sent


def test_a_session_as_long_as_a_book_does_not_end_the_keeper(keeper: Keeper) -> None:
    """The answer to `ls` grew beyond a frame, and the error was nobody's."""
    connection = ControlConnection(keeper.name)
    try:
        for fd in connection.ask(Hello(1, "writer"), n_fds=2)[1]:
            os.close(fd)
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            for number in range(8):
                keys, session = chain(number, blocks=1), f"{number}" * 200_000
                pool.store(handle, keys, tensors(contents(keys.array)), wait_s=5.0, intent=Intent(session=session))
                with contextlib.suppress(PenstockError):
                    connection.ask(Names({pool._intents.digest(session): session}))
            assert pool.flush(PATIENCE_S)
            assert len(keeper.ask("ls")["chains"]) == 8
            assert keeper.fsck()["blocks"] == 8
    finally:
        connection.close()


def test_a_client_that_fills_its_own_bell_does_not_end_the_keeper(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, chain(1, blocks=1))
        with stopped(keeper):
            os.eventfd_write(pool._link._own_bell, (1 << 64) - 2)  # type: ignore[attr-defined]
            store(pool, handle, chain(2, blocks=4), wait_s=0.0)
            from penstock.pool.writer import set_waiting

            set_waiting(pool._at.ctx, 1)
        until(lambda: keeper.stat()["blocks"] >= 1, "it answers")
        keeper.fsck()


def test_a_space_of_odd_segments_is_refused_by_the_keeper_too(keeper: Keeper) -> None:
    with keeper.open() as pool, pytest.raises(PenstockError, match="64"):
        pool._link.space(SpaceOf(bytes(32), bytes(16), 400, 16, 4, 100))


def test_hits_that_keep_coming_do_not_keep_the_keeper_at_one_lane(
    embedded: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, keys = embedded.space(SPACE), chain(1, blocks=8)
    must_store(embedded, handle, keys)
    keeper = embedded._link.keeper  # type: ignore[attr-defined]
    taken, rounds = keeper.authority.touched, 0

    def while_a_reader_reads(lane: int) -> Any:
        nonlocal rounds
        rounds += 1
        if rounds < 1000:
            embedded.match(handle, keys).release()
        return taken(lane)

    monkeypatch.setattr(keeper.authority, "touched", while_a_reader_reads)
    embedded.match(handle, keys).release()
    keeper.step()
    assert rounds == 1


# ---- files that are not ours


def test_a_file_that_is_no_segment_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights, weeks of work" * 1000)
    before = file.read_bytes()
    with pytest.raises(Damaged):
        segments.create(file, small_geometry(6 * MIB))
    with pytest.raises(PenstockError):
        penstock.open(unique_name(), path=file, embedded=6 * MIB, geometry=small_geometry(6 * MIB))
    assert file.read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to own files as somebody else")
def test_another_users_file_is_not_filled(tmp_path: Path) -> None:
    file = tmp_path / "segment"
    file.touch(mode=0o666)
    os.chown(file, 65534, 65534)
    with pytest.raises(NotOurs):
        segments.create(file, small_geometry(6 * MIB))
    with pytest.raises(NotOurs):
        ByteLock(file)


# ---- threads of one client


def test_close_in_the_middle_of_a_match_leaves_the_lane_alone(embedded: Pool) -> None:
    """A thread that had passed the first check leased into a lane that was somebody else's by then."""
    handle, keys = embedded.space(SPACE), chain(1, blocks=8)
    must_store(embedded, handle, keys)
    at, found = embedded._at, []
    at.lease_lock.acquire()
    thread = threading.Thread(target=lambda: found.append(embedded.match(handle, keys)))
    thread.start()
    until(lambda: _waits_for(at.lease_lock, thread), "the thread is at the lock")
    embedded.close()  # this thread holds the lock: close goes first
    before = at.lane.array.copy()
    at.lease_lock.release()
    thread.join(PATIENCE_S)
    assert (len(found[0]), found[0].miss) == (0, Miss.CLOSED)
    assert np.array_equal(at.lane.array, before), "it wrote into a lane that is not its own any more"


def test_close_in_the_middle_of_returning_grants_leaves_the_lane_alone(embedded: Pool) -> None:
    handle = embedded.space(SPACE)
    embedded.reserve(handle, 4, 1.0).abort()
    at = embedded._at
    embedded._at.end()
    before = at.lane.array[:4096].copy()
    assert not len(embedded._grants.drain())
    assert np.array_equal(at.lane.array[:4096], before)


def _waits_for(lock: Any, thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "match"


def test_garbage_collected_inside_a_locked_region_neither_loses_slots_nor_waits(
    embedded: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run a reservation's finalizer while this very thread changes the list that it returns to."""
    handle = embedded.space(SPACE)
    rest = embedded.reserve(handle, 8, 1.0)
    assert len(rest) == 8
    rest.abort()
    held = embedded._grants.count()
    lost: list[Any] = [embedded.reserve(handle, 2)]
    take, interrupted = GrantStore._take, []

    def collects(store: GrantStore) -> None:
        take(store)
        if lost:
            lost.clear()  # the last reference: its finalizer runs here, with the lock held
            interrupted.append(len(store._free[handle.slot_class]))

    before = embedded._grants._free[handle.slot_class].copy()
    monkeypatch.setattr(GrantStore, "_take", collects)
    embedded._grants.pop(handle.slot_class, 1 << 9)
    assert interrupted == [len(before)], "the finalizer changed the list in the middle of the region"
    monkeypatch.undo()
    assert held >= 8
    assert embedded.held()["grants"] == 2, "what the finalizer left is done at the next call"


def test_a_lease_collected_while_another_thread_has_the_other_lock_does_not_deadlock(embedded: Pool) -> None:
    handle, keys = embedded.space(SPACE), chain(1, blocks=4)
    must_store(embedded, handle, keys)
    at, here, there = embedded._at, threading.Event(), threading.Event()
    garbage: list[Any] = [embedded.match(handle, keys), embedded.reserve(handle, 1, 1.0)]
    assert len(garbage[1]) == 1

    def other() -> None:
        with at.write_lock:
            here.set()
            there.wait(PATIENCE_S)
            garbage.pop(0)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    here.wait(PATIENCE_S)

    def mine() -> None:
        with at.lease_lock:
            there.set()
            del garbage[-1]

    second = threading.Thread(target=mine, daemon=True)
    second.start()
    second.join(5.0)
    thread.join(5.0)
    assert not thread.is_alive() and not second.is_alive()
    assert embedded.held()["leases"] == 0


def test_a_pool_that_is_forgotten_gives_its_lane_back(keeper: Keeper) -> None:
    """More often than there are lanes."""
    for _ in range(keeper.geometry.n_lanes + 2):
        pool = keeper.open()
        pool.space(SPACE)
        del pool
        gc.collect()
        until(lambda: not keeper.stat()["clients"], "its lane is free")


def test_a_close_that_meets_a_return_stays_closed(keeper: Keeper) -> None:
    """The thread that greets the next keeper used to bring a closed pool back, with a lane that nobody ever freed."""
    pool = keeper.open()
    pool.space(SPACE)
    at = pool._at
    fresh = _second_attachment(keeper)
    pool.close()
    with contextlib.suppress(PenstockError):
        pool.replace(fresh)
    assert pool.closed and pool._at is at
    fresh.locks.close()


def _second_attachment(keeper: Keeper) -> Any:
    from penstock.pool.attaching import _new_attachment
    from penstock.pool.link import SocketLink

    link = SocketLink(keeper.name)
    at = _new_attachment(link, "second")
    link.close()
    return at


# ---- a replaced segment


def _replace(keeper: Keeper) -> None:
    keeper.kill()
    keeper.path.unlink()
    keeper.start()
    keeper.wait_touched()


def test_a_lease_outlives_its_segments_replacement(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle, keys = pool.space(SPACE), chain(1, blocks=8)
        must_store(pool, handle, keys)
        lease, uuid = pool.match(handle, keys), pool._at.uuid
        _replace(keeper)
        until(lambda: pool._at.uuid != uuid and pool._link.alive, "it is back")
        assert np.array_equal(read(lease, handle), contents(keys.array))
        lease.release()
        must_store(pool, handle, keys)
        assert_resident(pool, handle, keys)


def test_slots_of_a_replaced_segment_are_never_used_in_the_new_one(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced while a commit copies: what found no ring went back to the new segment's stock of free slots."""
    with keeper.open() as pool:
        handle, keys, uuid = pool.space(SPACE), chain(1, blocks=8), pool._at.uuid
        publish = Pool._publish

        def late(self: Pool, *args: Any) -> int:
            _replace(keeper)
            until(lambda: pool._at.uuid != uuid and pool._link.alive, "it is back")
            return publish(self, *args)

        monkeypatch.setattr(Pool, "_publish", late)
        stored = store(pool, handle, keys)
        monkeypatch.undo()
        assert stored.n_blocks == 0 and stored.drop is not Drop.NONE
        assert pool._grants.count() == 0
        must_store(pool, handle, keys)
        assert_resident(pool, handle, keys)
        keeper.fsck()


def test_a_store_across_a_replacement_is_a_drop(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    with keeper.open() as pool:
        handle, uuid = pool.space(SPACE), pool._at.uuid
        reserve = Pool.reserve

        def late(self: Pool, *args: Any, **options: Any) -> Any:
            reservation = reserve(self, *args, **options)
            _replace(keeper)
            until(lambda: pool._at.uuid != uuid and pool._link.alive, "it is back")
            return reservation

        monkeypatch.setattr(Pool, "reserve", late)
        stored = store(pool, handle, chain(1, blocks=4))
        assert stored.n_blocks == 0 and stored.drop is not Drop.NONE


def test_a_return_that_fails_half_way_is_tried_again(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept the new lane and let go of its lock, so that two clients could have the same lane."""
    with keeper.open() as pool:
        handle, uuid = pool.space(SPACE), pool._at.uuid
        register = pool._link.space
        failures: list[int] = []

        def fails_once(request: SpaceOf) -> Any:
            if not failures:
                failures.append(1)
                raise NoKeeper("it went again")
            return register(request)

        monkeypatch.setattr(pool._link, "space", fails_once)
        _replace(keeper)
        until(lambda: pool._at.uuid != uuid and pool._link.alive, "it is back")
        assert failures
        assert keeper.stat()["clients"][0]["alive"]
        lock = ByteLock(segments.lock_path(keeper.path))
        assert lock.held_by_other(FIRST_LANE_BYTE + pool._at.given.lane)
        lock.close()
        must_store(pool, handle, chain(1, blocks=4))


# ---- descriptors


def test_waiting_on_a_closed_link_returns(keeper: Keeper) -> None:
    pool = keeper.open()
    pool.close()
    pool._link.wait(0.01)
    pool._link.ring()


def test_a_client_that_never_confirms_does_not_keep_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hello without a confirmation: the lane went with it for as long as the connection stood."""
    import types

    from penstock.runtime import guests as guests_module

    ended: list[int] = []
    silent = guests_module.Guest(types.SimpleNamespace(), lane=3, since_s=0.0)  # type: ignore[arg-type]
    busy = guests_module.Guest(types.SimpleNamespace(), lane=4, since_s=0.0)  # type: ignore[arg-type]
    fresh = guests_module.Guest(types.SimpleNamespace(), lane=5, since_s=1e12)  # type: ignore[arg-type]
    guests = guests_module.Guests.__new__(guests_module.Guests)
    guests._guests = {silent, busy, fresh}
    guests._keeper = types.SimpleNamespace(opening={3, 5})  # type: ignore[assignment]
    monkeypatch.setattr(guests_module.Guests, "_leave", lambda self, guest: ended.append(guest.lane))
    guests.dismiss_silent()
    assert ended == [3]
