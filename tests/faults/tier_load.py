"""What the fault tests of tiers share: small pools over disks, blocks that are below only, clients that fetch."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import penstock
from penstock import KeyChain, SpaceHandle
from penstock.errors import KeeperError, PoolClosed
from penstock.types import FetchEnd
from tests.support import PATIENCE_S, SPACE, Keeper, chain, contents, read, store, until
from tests.support import must_store as must_store_part

FETCH_S = 30.0
"""Time for a fetch that is to succeed; a guard against hangs."""
GRACE_S = 3.0
"""What a wait may take beyond its deadline before it counts as blocked, on a machine that has other work."""
WAIT_S = 0.05
PACE_S = 0.0005
STEPS = 50


def disk(path: Path, scheme: str = "disk", **options: str) -> str:
    """The address of a small tier; blocks are written to it at once."""
    every = {"size": "64M", "slab": "1M", "write": "through", "keep_free": "0"} | options
    return f"{scheme}:{path}?" + "&".join(f"{name}={value}" for name, value in every.items())


def must_store(pool: penstock.Pool, handle: SpaceHandle, keys: KeyChain) -> None:
    """Store a chain of any length; a small pool grants few slots at once."""
    for first in range(0, len(keys), 64):
        must_store_part(pool, handle, keys[first : first + 64])


def on_tier(keeper: Keeper, n: int, tier: str = "disk") -> None:
    """Wait until a tier has this many blocks."""
    until(lambda: (keeper.tier(tier)["blocks"] or 0) >= n, f"{n} blocks in {tier}")


def displace(pool: penstock.Pool, handle: SpaceHandle, keys: KeyChain, seed: int) -> None:
    """Store other blocks until none of these is in the pool any more."""
    number = 0
    while pool.resident(handle, keys.array).any():
        number += 1
        assert number < 1000
        store(pool, handle, chain(seed, number, blocks=64), wait_s=PATIENCE_S)
        pool.flush(PATIENCE_S)
    pool.return_idle_grants()  # a small pool gives few to everybody together


def fetch(pool: penstock.Pool, handle: SpaceHandle, keys: KeyChain, seconds: float = FETCH_S) -> FetchEnd:
    """Fetch, and check that it ended in time and that everything there is right."""
    started = time.monotonic()
    with pool.fetch(handle, keys, seconds) as fetched:
        why = fetched.wait()
    took = time.monotonic() - started
    assert took < seconds + GRACE_S, f"blocked for {took:.2f} s instead of {seconds:.2f}"
    check(pool, handle, keys)
    return why


def check(pool: penstock.Pool, handle: SpaceHandle, keys: KeyChain) -> int:
    """Whatever of this chain is in the pool is what belongs there; how much that is."""
    with pool.match(handle, keys) as lease:
        found = len(lease)
        assert np.array_equal(read(lease, handle), contents(keys.array, handle.block_bytes)[:found])
    return found


# ---- clients


@dataclass
class Lived:
    """What a client has to say at its end."""

    written: list[tuple[tuple[int, ...], int]]
    """Seeds of chains, and how many of their blocks were acknowledged."""
    longest_s: float
    """The longest wait beyond its deadline."""
    ends: Counter[str]
    checked: int
    """Blocks whose bytes were compared."""


class TierLoad:
    """A client that writes, fetches and reads at random from a seed, whatever becomes of the keeper, the mover and the
    pool's memory. `budget` bounds the blocks that it writes."""

    def __init__(self, name: str, seed: int, budget: int) -> None:
        self.rng = np.random.default_rng([seed, 2])
        self.seed, self.budget, self.number = seed, budget, 0
        self.lived = Lived([], 0.0, Counter(), 0)
        self.pool: penstock.Pool = until(lambda: _attached(name, seed), "attached")
        self.handle: SpaceHandle = until(lambda: _registered(self.pool), "registered")

    def step(self) -> None:
        """One random thing, timed."""
        dice = self.rng.random()
        started = time.monotonic()
        if dice < 0.3 and self.budget > 0:
            allowed_s = self.write()
        elif dice < 0.75:
            allowed_s = self.fetch()
        else:
            allowed_s = self.look()
        self.lived.longest_s = max(self.lived.longest_s, time.monotonic() - started - allowed_s)

    def write(self) -> float:
        self.number += 1
        seed = (self.seed, self.number)
        keys = chain(*seed, blocks=int(self.rng.integers(1, 17)))
        try:
            stored = store(self.pool, self.handle, keys, wait_s=WAIT_S)
        except PoolClosed:  # the pool's memory was replaced in between
            return WAIT_S
        self.budget -= stored.n_blocks
        if stored.n_blocks:
            self.lived.written.append((seed, stored.n_blocks))
        return WAIT_S

    def fetch(self) -> float:
        keys = self._some()
        wait_s = float(self.rng.choice([0.0, 0.02, 0.3]))
        with self.pool.fetch(self.handle, keys, wait_s) as fetched:
            if self.rng.random() < 0.8:
                self.lived.ends[fetched.wait().name] += 1
        self._check(keys)
        return wait_s

    def look(self) -> float:
        keys = self._some()
        self.pool.locate(self.handle, keys, wait_s=WAIT_S)
        self._check(keys)
        return WAIT_S

    def _some(self) -> KeyChain:
        """A chain that this client, or another one, may have written."""
        seed = self.seed if self.rng.random() < 0.5 else int(self.rng.integers(1, 3))
        length = int(self.rng.integers(1, 17))
        return chain(seed, int(self.rng.integers(1, self.number + 2)), blocks=16)[:length]

    def _check(self, keys: KeyChain) -> None:
        with contextlib.suppress(PoolClosed):
            self.lived.checked += check(self.pool, self.handle, keys)

    def pulse(self) -> None:
        """By itself, and without a restart of this client: a block goes in, the mover answers a fetch of it, and this
        client works on with that mover for a while. Between deaths there is none for most of the time."""

        def through() -> bool:
            self.number += 1
            keys = chain(self.seed, self.number, blocks=1)
            try:
                store(self.pool, self.handle, keys, wait_s=WAIT_S)
            except PoolClosed:
                return False
            with self.pool.fetch(self.handle, keys, 1.0) as fetched:
                return fetched.wait() is FetchEnd.DONE

        until(through, f"client {self.seed} stores and fetches again")
        for _ in range(STEPS):
            self.step()


def _attached(name: str, seed: int) -> penstock.Pool | None:
    try:
        return penstock.open(name, client=f"load-{seed}")
    except (KeeperError, penstock.errors.SegmentError):  # being killed, or replaced
        return None


def _registered(pool: penstock.Pool) -> SpaceHandle | None:
    try:
        return pool.space(SPACE)
    except KeeperError:
        return None


def run(connection: Connection, name: str, seed: int, budget: int) -> None:
    """Work until told "end", then tell what was lived through; on "pulse", show that all is well again."""
    load = TierLoad(name, seed, budget)
    connection.send("working")
    while True:
        if not connection.poll(PACE_S):
            load.step()
        elif connection.recv() == "end":
            break
        else:
            load.pulse()
            connection.send("back")
    load.pool.close()
    connection.send(load.lived)
