"""Clients that do everything at once, at random from a seed, and remember what they were told is committed."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import penstock
from penstock.errors import KeeperError
from penstock.types import Drop, Miss
from tests.support import PATIENCE_S, SPACE, chain, contents, read, store, until

# Bigger slots, so that slabs change hands when the pool is full.
WIDE = replace(SPACE, layout="wide", segment_bytes=4096)
WAIT_S = 0.05
# What a wait may take beyond what was allowed before it counts as blocked; generous, for a machine with other work.
GRACE_S = 10.0

# A breath between two steps, so that a test machine with two processors can also run the keeper.
PACE_S = 0.0005

MISSES = {Miss.NONE, Miss.ABSENT, Miss.BUSY, Miss.LEASE_TABLE_FULL}
DROPS = {Drop.NONE, Drop.NO_ROOM, Drop.NO_KEEPER, Drop.RING_FULL}
MAX_EXTRA_SPACES = 40


@dataclass
class Written:
    """Blocks that were acknowledged: the first `n` of `chain(*seed)` in a space."""

    space: penstock.Space
    seed: tuple[int, ...]
    blocks: int
    n: int


@dataclass
class Load:
    """One client's life. `budget` bounds the blocks it writes, so that a pool may be kept from filling up."""

    name: str
    seed: int
    budget: int
    written: list[Written] = field(default_factory=list)
    longest_s: float = 0.0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.seed, 1])
        self.number = 0
        self.held: list[tuple[penstock.Lease, Any, Any, Any]] = []
        self.pool = self._open()
        self.extra_spaces = 0

    def _open(self) -> penstock.Pool:
        def attach() -> penstock.Pool | None:
            try:
                return penstock.open(self.name, client=f"load-{self.seed}")
            except KeeperError:  # the keeper is being killed and restarted; or its lane was just handed on
                return None

        pool: penstock.Pool = until(attach, "attached")
        return pool

    def _space(self, space: penstock.Space) -> penstock.SpaceHandle:
        """Registering asks the keeper, which may be dead just now."""

        def ask() -> penstock.SpaceHandle | None:
            try:
                return self.pool.space(space, space.layout)
            except KeeperError:
                return None

        handle: penstock.SpaceHandle = until(ask, "space registered")
        return handle

    # ---- what it does

    def step(self) -> None:
        """One random thing, timed."""
        started = time.monotonic()
        likely = {
            self.write: 0.45,
            self.read_back: 0.15,
            self.read_foreign: 0.1,
            self.hold: 0.1,
            self.let_go: 0.09,
            self.abort: 0.08,
            self.leave: 0.015,
            self.register: 0.015,
        }
        what = self.rng.choice(list(likely), p=list(likely.values()))  # type: ignore[arg-type]
        what()
        if what not in (self.leave, self.register):
            self.longest_s = max(self.longest_s, time.monotonic() - started)

    def write(self) -> None:
        """A new chain, in one piece or two, by scatter or through views."""
        if self.budget <= 0:
            return self.read_back()
        self.number += 1
        space = WIDE if self.rng.random() < 0.2 else SPACE
        self._write(space, (self.seed, self.number), int(self.rng.integers(1, 9)))

    def _write(self, space: penstock.Space, seed: tuple[int, ...], blocks: int) -> int:
        handle, keys = self._space(space), chain(*seed, blocks=blocks, space=space)
        cut = int(self.rng.integers(1, blocks + 1))
        n = self._store(handle, keys[:cut])
        if n == cut < blocks:
            n += self._store(handle, keys[cut:])
        self.budget -= n
        if n:
            self.written.append(Written(space, seed, blocks, n))
        return n

    def _store(self, handle: penstock.SpaceHandle, keys: penstock.KeyChain) -> int:
        if self.rng.random() < 0.5:
            stored = store(self.pool, handle, keys, wait_s=WAIT_S)
            assert stored.drop in DROPS, stored
            return stored.n_blocks
        with self.pool.reserve(handle, len(keys), WAIT_S) as reservation:
            assert reservation.drop in DROPS, reservation
            rows = contents(keys.array, handle.block_bytes)
            for i in range(len(reservation)):
                reservation.view(i)[:] = rows[i]
            return reservation.commit(keys[: len(reservation)])

    def read_back(self) -> None:
        if self.written:
            one = self.written[int(self.rng.integers(len(self.written)))]
            self._check(self._space(one.space), chain(*one.seed, blocks=one.blocks, space=one.space))

    def read_foreign(self) -> None:
        """Whatever another client may have written."""
        seed = (int(self.rng.integers(0, 3)), int(self.rng.integers(1, self.number + 2)))
        self._check(self._space(SPACE), chain(*seed, blocks=8))

    def _check(self, handle: penstock.SpaceHandle, keys: penstock.KeyChain) -> None:
        with self.pool.match(handle, keys) as lease:
            assert lease.miss in MISSES, lease
            found = len(lease)
            assert np.array_equal(read(lease, handle), contents(keys.array, handle.block_bytes)[:found])

    def hold(self) -> None:
        """Keep a lease and a view over it for a while."""
        if len(self.held) < 4 and self.written:
            one = self.written[int(self.rng.integers(len(self.written)))]
            handle = self._space(one.space)
            keys = chain(*one.seed, blocks=one.blocks, space=one.space)
            lease = self.pool.match(handle, keys)
            view = lease.views(len(lease) - 1) if len(lease) else None
            self.held.append((lease, view, handle, keys))

    def let_go(self) -> None:
        """What was held has not changed, whatever became of the keeper."""
        if self.held:
            lease, view, handle, keys = self.held.pop(int(self.rng.integers(len(self.held))))
            expected = contents(keys.array, handle.block_bytes)[: len(lease)]
            if view is not None:
                assert np.array_equal(view, expected[-1])
                del view
            assert np.array_equal(read(lease, handle), expected)
            lease.release()

    def abort(self) -> None:
        with self.pool.reserve(self._space(SPACE), int(self.rng.integers(1, 5)), WAIT_S) as reservation:
            for i in range(len(reservation)):
                reservation.view(i)[:] = 255

    def leave(self) -> None:
        """Close, and attach again as somebody new."""
        while self.held:
            self.let_go()
        self.pool.close()
        self.pool = self._open()

    def register(self) -> None:
        """A space that nobody had before."""
        if self.extra_spaces < MAX_EXTRA_SPACES:
            self.extra_spaces += 1
            self._space(replace(SPACE, layout=f"extra-{self.seed}-{self.extra_spaces}"))

    def pulse(self) -> None:
        """Back with the keeper: a block goes in and is taken in. By itself, within a bounded time."""

        def through() -> bool:
            self.number += 1
            wrote = self._write(SPACE, (self.seed, self.number), 1)
            return bool(wrote) and self.pool.flush(1.0) and self.pool._link.alive

        until(through, f"client {self.seed} writes again after the keeper's restart")


def run(connection: Connection, name: str, seed: int, budget: int) -> None:
    """Work until told "end"; on "pulse", show that the keeper takes commits."""
    load = Load(name, seed, budget)
    connection.send("working")
    while True:
        if not connection.poll(PACE_S):
            load.step()
            continue
        if connection.recv() == "end":
            break
        load.pulse()
        connection.send("back")
    while load.held:
        load.let_go()
    assert load.pool.flush(PATIENCE_S)
    load.pool.close()
    connection.send((load.written, load.longest_s))


def run_and_die(connection: Connection, name: str, seed: int, budget: int) -> None:
    """The same, but it tells every acknowledged commit at once, and dies at some point between reserve and commit."""
    load = Load(name, seed, budget)
    steps = int(load.rng.integers(1, 40))
    for _ in range(steps):
        before = len(load.written)
        load.step()
        for one in load.written[before:]:
            connection.send(one)
    handle, keys = load._space(SPACE), chain(seed, 1 << 20, blocks=4)
    load.hold()
    reservation = load.pool.reserve(handle, 4, WAIT_S)
    for i in range(len(reservation)):
        reservation.view(i)[: SPACE.block_bytes // 2] = contents(keys.array)[i, : SPACE.block_bytes // 2]
    connection.send("dying")
    os.kill(os.getpid(), signal.SIGKILL)


__all__ = ["DROPS", "GRACE_S", "SPACE", "WAIT_S", "WIDE", "Written", "run", "run_and_die"]
