"""The mover's socket against whatever a client may say, and whatever it may leave out."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import penstock
from penstock import SpaceHandle
from penstock.pool.below import TierLine
from penstock.pool.tier_wire import MAX_KEYS, answers, tier_socket
from penstock.pool.wire import Connection, Error, FrameReader, Query, socket_path
from penstock.types import FetchEnd, Urgency
from tests.support import (
    PATIENCE_S,
    SPACE,
    Keeper,
    assert_resident,
    chain,
    must_store,
    small_geometry,
    store,
    until,
)

HALF = 1 << 63
N_BLOCKS = 24


class World:
    """One pool with a disk below it for all tests here; its blocks lie on the disk only."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.keys = chain(1, blocks=N_BLOCKS)
        with keeper.open() as pool:
            must_store(pool, pool.space(SPACE), self.keys)
        until(lambda: keeper.tier("disk")["blocks"] == N_BLOCKS, "it is on the disk")
        keeper.stop()
        keeper.remove()
        keeper.start()
        keeper.wait_touched()
        self.pid = keeper.tier_report()["mover"]["pid"]
        self.pool = keeper.open()
        self.handle = self.pool.space(SPACE)

    @property
    def path(self) -> Path:
        return tier_socket(self.keeper.name)

    def connect(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.settimeout(PATIENCE_S)
            link.connect(os.fspath(self.path))
        except BaseException:
            link.close()
            raise
        return link

    def locate(self, **other: Any) -> dict[str, Any]:
        """A good question, but for what is given."""
        good = {
            "type": "locate", "uuid": self.pool.uuid, "space": self.handle.id, "keys": self.keys.array.tobytes(),
            "wait_s": 0.1,
        }  # fmt: skip
        return good | other

    def fetch(self, **other: Any) -> dict[str, Any]:
        good = {
            "type": "fetch", "uuid": self.pool.uuid, "space": self.handle.id, "keys": self.keys.array.tobytes(),
            "parent": bytes(self.keys.parent), "wait_s": 0.1, "urgency": 0, "intent": [0] * 5,
        }  # fmt: skip
        return good | other

    def ask(self, question: dict[str, Any]) -> Any:
        """The last answer to a question."""
        with self.connect() as link:
            link.sendall(frame(question))
            return last_answer(link)

    def counters(self) -> dict[str, int]:
        counted: dict[str, int] = self.keeper.tier_report()["fetches"]
        return counted

    def still_serves(self) -> None:
        """The same mover answers, and nothing of what was asked is left."""
        assert self.keeper.tier_report()["mover"]["pid"] == self.pid, "the mover died"
        until(lambda: self.counters()["running"] == 0, "no fetch is left")
        assert self.pool.locate(self.handle, self.keys, wait_s=PATIENCE_S).why is FetchEnd.DONE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tier = f"disk:{tmp_path_factory.mktemp('below') / 'disk'}?size=64M&slab=1M&write=through"
    with Keeper(small_geometry(), tiers=[tier]) as keeper:
        one = World(keeper)
        yield one
        with one.pool.fetch(one.handle, one.keys, PATIENCE_S) as fetched:
            assert fetched.wait() is FetchEnd.DONE
        assert_resident(one.pool, one.handle, one.keys)
        one.pool.close()
        keeper.fsck()


def frame(body: Any) -> bytes:
    return framed(msgspec.msgpack.encode(body))


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def last_answer(link: socket.socket) -> Any:
    """What comes last before the mover waits for the next question; None if it hangs up instead."""
    reader = FrameReader(answers)
    with contextlib.suppress(ConnectionError):
        while data := link.recv(1 << 16):
            for answer in reader.feed(data):
                if type(answer).__name__ != "Arrived":
                    return answer
    return None


# ---- what is no question

NESTED = b"\x91" * 200_000 + b"\xc0"
GARBAGE = {
    "zeros": bytes(64),
    "a frame that is too long": struct.pack("<I", 0xFFFFFFFF),
    "no msgpack": framed(b"\xc1\xc1\xc1"),
    "an empty frame": framed(b""),
    "a number": frame(7),
    "no type": frame({}),
    "another type": frame({"type": "hello"}),
    "an answer": frame({"type": "ended", "n": 1, "why": 0, "moved": 1, "tier": ""}),
    "an unknown field": frame({"type": "report", "x": 1}),
    "missing fields": frame({"type": "fetch"}),
    "text that is not UTF-8": framed(b"\x81\xa4type\xa3\xff\xfe\xfd"),
    "a name that is not UTF-8": framed(b"\x82\xa2\xff\xfe\x01\xa4type\xa6report"),
    "nested before its type": framed(b"\x82\xa1a" + NESTED + b"\xa4type\xa6report"),
    "nested keys": framed(b"\x82\xa4type\xa6locate\xa4keys" + NESTED),
    "an infinite number of keys": framed(b"\x82\xa4type\xa6locate\xa4keys\xc6\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_ends_its_own_connection_and_nothing_else(world: World, name: str) -> None:
    before = world.counters()["refused_connections"]
    with world.connect() as other, world.connect() as link:
        link.sendall(GARBAGE[name])
        assert last_answer(link) is None, "it is hung up on"
        other.sendall(frame(world.locate()))
        assert last_answer(other).here + sum(run.n_blocks for run in last_runs(world)) >= N_BLOCKS
    assert world.counters()["refused_connections"] == before + 1
    world.still_serves()


def last_runs(world: World) -> list[Any]:
    return list(world.ask(world.locate()).runs)


@pytest.mark.parametrize("name", ["text that is not UTF-8", "a name that is not UTF-8", "nested before its type"])
def test_the_keeper_survives_the_same(world: World, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(PATIENCE_S)
        link.connect(os.fspath(socket_path(world.keeper.name)))
        link.sendall(GARBAGE[name])
        with contextlib.suppress(ConnectionError):
            while link.recv(1 << 16):
                pass
    line = Connection(world.keeper.name)
    line.ask(Query("stat"))
    line.close()


def test_random_bytes_and_damaged_questions_never_end_the_mover(world: World) -> None:
    rng = np.random.default_rng(4)
    whole = frame(world.fetch(wait_s=0.0))
    for number in range(150):
        damaged = bytearray(whole)
        for _ in range(int(rng.integers(1, 5))):
            damaged[int(rng.integers(4 if number % 2 else 0, len(damaged)))] = int(rng.integers(256))
        with world.connect() as link:
            link.sendall(damaged)
            link.shutdown(socket.SHUT_WR)
            last_answer(link)
    world.still_serves()


def test_half_frames_and_silence_hold_nobody_up(world: World) -> None:
    whole = frame(world.fetch(wait_s=5.0))
    with contextlib.ExitStack() as stack:
        for cut in (0, 1, 3, 4, 5, len(whole) // 2, len(whole) - 1):
            stack.enter_context(world.connect()).sendall(whole[:cut])
        world.still_serves()
        slow = stack.enter_context(world.connect())
        for at in range(0, len(whole), 97):
            slow.sendall(whole[at : at + 97])
        assert FetchEnd(last_answer(slow).why) is FetchEnd.DONE


def test_a_question_before_the_answer_ends_the_connection(world: World) -> None:
    absent = chain(77, blocks=4)
    with world.connect() as link:
        link.sendall(frame(world.fetch(keys=absent.array.tobytes(), parent=bytes(absent.parent))) * 3)
        answers_seen = last_answer(link)
        assert answers_seen is None or FetchEnd(answers_seen.why) is FetchEnd.ABSENT
    world.still_serves()


# ---- questions that no client of ours asks


def refused(**other: Any) -> Callable[[World], dict[str, Any]]:
    return lambda world: world.fetch(**other)


WRONG = {
    "another uuid": refused(uuid=bytes(16)),
    "no uuid": refused(uuid=b""),
    "a space that is not there": refused(space=17),
    "a negative space": refused(space=-1),
    "a huge space": refused(space=2**64 - 1),
    "no keys": refused(keys=b""),
    "half a key": refused(keys=bytes(24)),
    "too many keys": refused(keys=bytes(16 * (MAX_KEYS + 1))),
    "no parent": refused(parent=b""),
    "two parents": refused(parent=bytes(32)),
    "half a parent": refused(parent=bytes(9)),
    "a short intent": refused(intent=[0] * 4),
    "an intent beyond 64 bits": refused(intent=[HALF, 0, 0, 0, 0]),
    "another such intent": refused(intent=[0, 0, 0, 0, 2**64 - 1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_with_a_reason(world: World, name: str) -> None:
    before = world.counters()
    answer = world.ask(WRONG[name](world))
    assert isinstance(answer, Error) and "failed at this question" not in answer.text, answer
    after = world.counters()
    assert after["refused_questions"] == before["refused_questions"] + 1
    assert after["failed"] == before["failed"], "it was foreseen"
    world.still_serves()


@pytest.mark.parametrize("wait_s", [math.nan, -1.0, -math.inf, 0.0])
def test_a_wait_that_is_none_ends_at_once(world: World, wait_s: float) -> None:
    assert FetchEnd(world.ask(world.fetch(wait_s=wait_s, keys=chain(5, blocks=3).array.tobytes())).why) in (
        FetchEnd.DEADLINE,
        FetchEnd.ABSENT,
    )
    world.ask(world.locate(wait_s=wait_s))
    world.still_serves()


@pytest.mark.parametrize("wait_s", [math.inf, 1e300, 2**64 - 1])
def test_a_wait_for_ever_is_answered_when_there_is_an_answer(world: World, wait_s: float) -> None:
    keys = chain(6, blocks=3)
    question = world.fetch(wait_s=wait_s, keys=keys.array.tobytes(), parent=bytes(keys.parent))
    assert FetchEnd(world.ask(question).why) is FetchEnd.ABSENT
    assert world.ask(world.locate(wait_s=wait_s)).here >= 0
    world.still_serves()


@pytest.mark.parametrize("intent", [[-1] * 5, [-HALF] * 5, [HALF - 1] * 5, [0, 0, 2**40, -5, -7]])
def test_an_intent_of_any_numbers_is_carried_or_ignored(world: World, intent: list[int]) -> None:
    assert FetchEnd(world.ask(world.fetch(intent=intent, wait_s=PATIENCE_S)).why) is FetchEnd.DONE
    world.keeper.fsck()
    world.still_serves()


@pytest.mark.parametrize("urgency", [-1, 2, 3, 2**40])
def test_another_urgency_is_a_fetch(world: World, urgency: int) -> None:
    assert FetchEnd(world.ask(world.fetch(urgency=urgency, wait_s=PATIENCE_S)).why) is FetchEnd.DONE
    world.still_serves()


def test_keys_out_of_order_and_twice_bring_nothing_wrong(world: World) -> None:
    """A chain that is none: the pool takes in only what hangs on its parent."""
    keys = chain(1, blocks=N_BLOCKS).array
    for rows in (keys[::-1], np.repeat(keys, 3, axis=0), keys[:1].repeat(50, axis=0), np.zeros((9, 2), np.uint64)):
        world.ask(world.fetch(keys=np.ascontiguousarray(rows).tobytes(), wait_s=2.0))
    world.keeper.fsck()
    world.still_serves()


# ---- clients that go, do not read, or are many


def test_who_hangs_up_is_not_worked_for(world: World) -> None:
    """The answer would come in an hour; the fetch ends with its client."""
    before = world.counters()
    with full(world), world.connect() as link:
        link.sendall(frame(world.fetch(wait_s=3600.0, keys=MORE.array.tobytes())))
        until(lambda: world.counters()["running"] == 1, "it waits for room")
        link.close()
        until(lambda: world.counters()["running"] == 0, "it ended")
    assert world.counters()["ended.cancelled"] == before["ended.cancelled"] + 1


def test_prefetches_that_wait_hold_up_no_fetch(world: World) -> None:
    """Prefetches that find no room wait long, with nobody behind them; those who wait for a fetch go on."""
    prefetch = frame(world.fetch(wait_s=60.0, urgency=int(Urgency.PREFETCH), keys=MORE.array.tobytes()))
    with full(world):
        for _ in range(32):
            with world.connect() as link:
                link.sendall(prefetch)
        until(lambda: world.counters()["running"] == 32, "they wait")
        assert FetchEnd(world.ask(world.fetch(wait_s=5.0)).why) is FetchEnd.DONE
        assert world.counters()["running"] == 32
    until(lambda: world.counters()["running"] == 0, "there is room again, and they are done")
    assert_resident(world.pool, world.handle, MORE)


MORE = chain(2, blocks=8)
FILLERS = itertools.count(100_000)


@contextlib.contextmanager
def full(world: World) -> Iterator[None]:
    """A pool in which everything is leased, with `world.keys` and without `MORE`, which the disk has, too."""
    pool, handle = world.pool, world.handle
    if not pool.locate(handle, MORE, wait_s=PATIENCE_S).n_blocks:
        must_store(pool, handle, MORE)
        until(lambda: world.keeper.tier("disk")["counters"]["stored"] >= len(MORE), "it is on the disk, too")
    with pool.fetch(handle, world.keys, PATIENCE_S) as fetched:
        assert fetched.wait() is FetchEnd.DONE
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(pool.match(handle, world.keys))
        assert len(held) == len(world.keys)
        while fill(pool, handle, stack) or pool.resident(handle, MORE.array).any():
            pass
        until(lambda: world.keeper.tier_report()["orders"]["in_flight"] == 0, "the mover holds nothing")
        yield


def fill(pool: penstock.Pool, handle: SpaceHandle, stack: contextlib.ExitStack) -> int:
    """Store blocks that nobody has and hold them; how many found room."""
    found = 0
    # Room is made for all or none of those that are asked for, and recent blocks are evicted only after a while.
    for n, wait_s in ((64, 0.3), (8, 0.3), (1, 3.0)):
        keys = chain(next(FILLERS), blocks=n)
        stored = store(pool, handle, keys, wait_s=wait_s).n_blocks
        assert pool.flush(PATIENCE_S)
        stack.enter_context(pool.match(handle, keys[:stored]))
        found += stored
    return found


def test_two_hundred_fetches_at_once(world: World) -> None:
    keys = [world.keys, *(chain(300 + i, blocks=2) for i in range(3))]
    running = [world.pool.fetch(world.handle, keys[i % 4], PATIENCE_S) for i in range(200)]
    ends = [fetch.wait() for fetch in running]
    assert set(ends[0::4]) == {FetchEnd.DONE}
    assert set(ends[1::4] + ends[2::4] + ends[3::4]) == {FetchEnd.ABSENT}
    world.still_serves()


def test_one_too_many_is_told_so_and_more_connections_than_files_do_no_harm(world: World) -> None:
    """1100 connections that ask nothing: the rest is refused at once, and served when these are gone."""
    links = []
    try:
        for _ in range(1100):
            try:
                links.append(world.connect())
            except (BlockingIOError, TimeoutError):
                break
        used = cpu_seconds(world.pid)
        with contextlib.suppress(OSError):
            world.pool.locate(world.handle, world.keys, wait_s=0.5)
        assert cpu_seconds(world.pid) - used < 0.45, "it spins"
    finally:
        for link in links:
            link.close()
    until(lambda: world.pool.locate(world.handle, world.keys, wait_s=1.0).why is FetchEnd.DONE, "it serves again")
    world.still_serves()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the client's own end: it never raises and never hangs, whatever it is asked for


@pytest.mark.parametrize("wait_s", [math.nan, math.inf, -1.0, 1e300, 0.0])
def test_no_wait_makes_the_client_raise_or_hang(world: World, wait_s: float) -> None:
    keys = chain(8, blocks=3)
    fetched = world.pool.fetch(world.handle, keys, wait_s)
    assert fetched.wait(wait_s) in (FetchEnd.ABSENT, FetchEnd.DEADLINE, FetchEnd.BUSY, FetchEnd.DONE)
    fetched.cancel()
    assert world.pool.locate(world.handle, keys, wait_s=wait_s).n_blocks == 0


def test_a_client_survives_a_mover_that_talks_nonsense(world: World, tmp_path: Path) -> None:
    """Something else behind the socket: every answer is nonsense, and the pool goes on."""
    name = f"x{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(tier_socket(name)))
    listener.listen(8)
    try:
        for said in (b"\xff" * 64, GARBAGE["text that is not UTF-8"], GARBAGE["nested before its type"], b""):
            line = TierLine(name)
            fetched = line.fetch(world.pool.uuid, 0, world.keys.array, bytes(16), 5.0, Urgency.FETCH, [0] * 5)
            with listener.accept()[0] as link:
                link.sendall(said)
                link.shutdown(socket.SHUT_WR)
                assert fetched.wait() is FetchEnd.NO_TIERS
            line.close()
    finally:
        listener.close()
        tier_socket(name).unlink()
