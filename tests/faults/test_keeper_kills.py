"""`kill -9` of the keeper, at random moments and at exact points, under clients that do everything."""

from __future__ import annotations

import signal
import time
from collections import Counter

import numpy as np
import pytest

from tests.conftest import Scale
from tests.faults.load import GRACE_S, SPACE, WAIT_S, Written, run, run_and_die
from tests.faults.points import POINTS, die_at
from tests.support import (
    MIB,
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

KILLS_IN_A_POOL = 13
# How long a keeper that should die at a point that is never reached may live.
LIFE_S = 0.25


class Ordeal:
    """One pool, two lasting clients, one that dies in each of the keeper's lives, and this process as a client."""

    def __init__(self, keeper: Keeper, seed: int, *, evicting: bool) -> None:
        self.keeper, self.evicting = keeper, evicting
        self.rng = np.random.default_rng([seed, 0])
        self.pool = keeper.open("witness")
        self.handle = self.pool.space(SPACE)
        self.anchor = chain(seed, 7, 7, blocks=32)
        must_store(self.pool, self.handle, self.anchor)
        self.held = self.pool.match(self.handle, self.anchor)
        assert len(self.held) == 32
        if evicting:
            self._fill_up(seed)
        budget = 1 << 40 if evicting else 2500
        self.clients = [Client(run, keeper.name, seed * 10 + k, budget) for k in (1, 2)]
        for client in self.clients:
            assert client.receive() == "working"
        self.acknowledged: list[Written] = []
        self.lives = 0
        self.seed = seed
        self.reached: Counter[str] = Counter()
        self.applied = 0

    def _fill_up(self, seed: int) -> None:
        number = 0
        while self.keeper.counters()["evicted"] == 0:
            number += 1
            store(self.pool, self.handle, chain(seed, 8, number, blocks=64))
        assert number > 5

    def life(self, point: tuple[str, str, bool, int] | None) -> None:
        """Load, death, what must go on without a keeper, restart, and what must be true then."""
        self.lives += 1
        budget = 1 << 40 if self.evicting else 60
        mayfly = Client(run_and_die, self.keeper.name, self.seed * 10_000 + self.lives, budget)
        try:
            assert self.keeper.process is not None
            self.keeper.process.join(float(self.rng.uniform(0, 0.03)) if point is None else LIFE_S)
            if self.keeper.process.exitcode is not None:
                assert self.keeper.process.exitcode == -signal.SIGKILL, "the keeper ended by itself"
                self.reached[point[1] if point else "?"] += 1
            self.keeper.kill()
            self._without_keeper()
            if self.rng.random() < 0.5:
                mayfly.kill()
            self._restart()
        finally:
            self._last_words(mayfly)

    def _last_words(self, mayfly: Client) -> None:
        mayfly.kill()
        while mayfly.connection.poll(0):
            try:
                said = mayfly.connection.recv()
            except EOFError:
                break
            if said != "dying":
                self.acknowledged.append(said)
        mayfly.connection.close()

    def _without_keeper(self) -> None:
        """Reads go on; writes are dropped or published, never late."""
        assert np.array_equal(read(self.held, self.handle), contents(self.anchor.array))
        assert_resident(self.pool, self.handle, self.anchor)
        started = time.monotonic()
        keys = chain(self.seed, 9, self.lives, blocks=2)
        stored = store(self.pool, self.handle, keys, wait_s=0.01)
        assert time.monotonic() - started < 0.01 + GRACE_S
        if stored.n_blocks:
            self.acknowledged.append(Written(SPACE, (self.seed, 9, self.lives), 2, stored.n_blocks))

    def _restart(self) -> None:
        """Start keepers until one lives long enough to serve: some are to die while they recover."""
        self.keeper.start()
        self.keeper.fsck()
        applied = self.keeper.counters()["applied"]
        assert applied >= self.applied
        self.applied = applied
        self._pulse()
        for client in self.clients:
            client.send("pulse")
        for client in self.clients:
            assert client.receive() == "back"
        self.keeper.fsck()

    def _pulse(self) -> None:
        """This process is back with the keeper by itself: a block goes in and is taken in."""
        number = 0

        self.keeper.wait_back(self.pool)

        def through() -> bool:
            nonlocal number
            number += 1
            seed = (self.seed, 6, self.lives, number)
            stored = store(self.pool, self.handle, chain(*seed, blocks=1), wait_s=WAIT_S)
            if stored.n_blocks:
                self.acknowledged.append(Written(SPACE, seed, 1, 1))
            return bool(stored.n_blocks) and self.pool.flush(1.0)

        until(through, "this client writes again after the keeper's restart")

    def next_keeper_dies_at(self, point: tuple[str, str, bool, int]) -> None:
        """Replace the serving keeper by one that will die at that point, perhaps before it serves."""
        self.keeper.kill()
        self.keeper.launch(die_at, *point)
        if not self.keeper.wait_ready():
            assert self.keeper.process is not None
            self.keeper.process.join(10)
            assert self.keeper.process.exitcode == -signal.SIGKILL, "it was to die at a point, and failed otherwise"
            self.reached[point[1]] += 1

    def end(self) -> None:
        """Stop all; then what was acknowledged is there (unless blocks are evicted), and everything is what it says."""
        for client in self.clients:
            client.send("end")
        for client in self.clients:
            written, longest_s = client.receive()
            assert longest_s < 2 * WAIT_S + GRACE_S
            assert len(written) > self.lives / 2, "the clients did nothing"
            self.acknowledged += written
            client.join()
        self.keeper.fsck()
        lost = looked_at = 0
        for one in self.acknowledged:
            handle, keys = self.pool.space(one.space), chain(*one.seed, blocks=one.blocks, space=one.space)
            with self.pool.match(handle, keys) as lease:
                lost += max(0, one.n - len(lease))
                looked_at += len(lease)
                expected = contents(keys.array, handle.block_bytes)[: len(lease)]
                assert np.array_equal(read(lease, handle), expected)
        counted = self.keeper.counters()
        assert looked_at > 0
        if self.evicting:
            assert counted["evicted"] > 0
        else:
            assert (counted["evicted"], lost) == (0, 0)
        self.held.release()
        self.pool.close()


def ordeal(scale: Scale, seed: int, kills: int, *, evicting: bool) -> None:
    """`kills` keepers killed in pools of `KILLS_IN_A_POOL` lives each; every other one at an exact point."""
    reached: Counter[str] = Counter()
    rng = np.random.default_rng(seed)
    points = [(owner, step, after, most) for owner, step, most in POINTS for after in (False, True)]
    rng.shuffle(points)  # type: ignore[arg-type]
    done = 0
    while done < kills:
        with Keeper(small_geometry(8 * MIB if evicting else 48 * MIB, lanes=8)) as keeper:
            one = Ordeal(keeper, seed + done, evicting=evicting)
            try:
                for _ in range(min(KILLS_IN_A_POOL, kills - done)):
                    point = None
                    if done % 2:
                        owner, step, after, most = points[done // 2 % len(points)]
                        point = (str(owner), str(step), bool(after), 1 + int(rng.random() ** 2 * int(most)))
                        one.next_keeper_dies_at(point)
                    one.life(point)
                    done += 1
                one.end()
            finally:
                for client in one.clients:
                    client.__exit__()
            reached += one.reached
    print(f"{kills} keepers killed; points reached: {dict(reached)}")
    assert len(reached) >= scale.of(1, 15), reached


def test_kill_9_of_the_keeper_loses_no_committed_block(scale: Scale) -> None:
    ordeal(scale, 100, scale.of(12, 250), evicting=False)


def test_kill_9_of_an_evicting_keeper_leaves_every_block_byte_equal(scale: Scale) -> None:
    ordeal(scale, 500_000, scale.of(13, 250), evicting=True)


def test_a_keeper_killed_while_it_makes_memory_ready_goes_on_where_it_was(scale: Scale) -> None:
    rng = np.random.default_rng(13)
    keeper = Keeper(small_geometry(256 * MIB, slab=4 * MIB))
    try:
        for _ in range(scale.of(4, 40)):
            keeper.start()
            assert keeper.process is not None
            keeper.process.join(float(rng.uniform(0, 0.1)))
            keeper.kill()
        keeper.start()
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            must_store(pool, handle, chain(1, blocks=16))
            keeper.wait_touched()
            assert_resident(pool, handle, chain(1, blocks=16))
        keeper.fsck()
    finally:
        keeper.__exit__()


def test_the_check_would_notice_a_lost_commit() -> None:
    """A check of the check: a keeper that skips what lies in the ring when it starts loses acknowledged blocks."""
    with Keeper() as keeper, keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, chain(1, blocks=8))
        keeper.kill()
        keys = chain(2, blocks=4)
        stored = store(pool, handle, keys, wait_s=0)
        assert stored.n_blocks == 4  # from slots that were granted ahead
        keeper.start(_forget_rings)
        keeper.wait_back(pool)
        assert len(pool.match(handle, keys)) == 0


def _forget_rings() -> None:
    from penstock.pool import layout
    from penstock.pool.cells import peek, poke
    from penstock.runtime.keeper import Keeper as Real

    def skip(self: Real, lane: int) -> None:
        at = self.authority.lane(lane)
        poke(at + layout.L_COMMIT_TAIL, peek(at + layout.L_COMMIT_HEAD))

    Real._drain = skip  # type: ignore[method-assign]
