"""Engines on one pool, and what must be true of them: the tokens of a clean run, and nothing else in the pool."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import penstock
from penstock import KeyChain, Pool, Space, SpaceHandle, TensorMap
from penstock.connectors.vllm.messages import Variant
from tests.engines.sim.engine import Engine
from tests.engines.sim.model import Course, answer
from tests.engines.sim.runner import BLOCK, Setup
from tests.support import PATIENCE_S, Keeper, until

__all__ = ["House", "prompt"]


def prompt(seed: int, n: int) -> list[int]:
    """A prompt of n tokens, the same in every run. A longer one with the same seed begins with a shorter one."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 40, 2000)[:n]]


class House:
    """A keeper and its engines."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.engines: list[Engine] = []
        self.asked: list[tuple[Engine, str, list[int]]] = []
        self.blocks: dict[bytes, bytes] = {}
        """What every block that may be stored must hold, by key."""
        self.chains: list[KeyChain] = []
        self.poisoned: list[str] = []
        """Stores of something else."""
        self.before_store: Callable[[], None] = lambda: None
        """Called by the thread that stores, before each piece."""
        self.keeper_pool = keeper.open("oracle")

    # ---- engines

    def open(self, name: str, **options: Any) -> Pool:
        """A pool whose stores are looked at."""
        pool = penstock.open(name, **options)
        store = pool.store

        def looked_at(handle: SpaceHandle, keys: KeyChain, tensors: TensorMap, **more: Any) -> Any:
            self.before_store()
            for at in range(len(keys)):
                self._look(keys.array[at].tobytes(), _bytes_of(tensors, at, handle))
            return store(handle, keys, tensors, **more)

        pool.store = looked_at  # type: ignore[method-assign]
        return pool

    def _look(self, key: bytes, data: bytes) -> None:
        expected = self.blocks.get(key)
        if expected is None:
            self.poisoned.append("a key that belongs to no request")
        elif expected != data:
            self.poisoned.append("bytes that no clean run makes")

    def engine(self, *, seed: int = 0, open_pool: Callable[..., Pool] | None = None, **settings: Any) -> Engine:
        made = Engine(Setup(**{"pool": self.keeper.name, **settings}), seed=seed, open_pool=open_pool or self.open)
        self.engines.append(made)
        return made

    # ---- requests

    def expect(
        self, engine: Engine, tokens: Sequence[int], extras: Sequence[int] = (), variant: Variant | None = None,
        block_extras: dict[int, bytes] | None = None,
    ) -> None:  # fmt: skip
        """These tokens' blocks may be stored."""
        course = Course(tokens, extras)
        n_full = len(tokens) // BLOCK * BLOCK
        for rank, space in enumerate(engine.half._ranks.spaces(variant or Variant()).values()):
            chain = _chain(space, course.tokens[:n_full], block_extras)
            self.chains.append(chain)
            for at in range(len(chain)):
                self.blocks[chain.array[at].tobytes()] = course.block(at, BLOCK, rank)

    def add(self, engine: Engine, tokens: Sequence[int], n: int = 8, **more: Any) -> str:
        """Have an engine answer, and check the answer at the end."""
        right = answer(tokens, n)
        self.expect(engine, [*tokens, *right])
        name = engine.add(tokens, n, **more)
        self.asked.append((engine, name, right))
        return name

    def ask(self, engine: Engine, tokens: Sequence[int], n: int = 8, **more: Any) -> str:
        """`add`, and run until all is done and stored."""
        name = self.add(engine, tokens, n, **more)
        engine.settle()
        return name

    def hit(self, engine: Engine, tokens: Sequence[int], n: int = 1, **more: Any) -> int:
        """How many tokens an engine gets from the pool for a prompt."""
        before = engine.counter("hit_tokens")
        self.ask(engine, tokens, n, **more)
        return engine.counter("hit_tokens") - before

    # ---- damage

    def chain(self, engine: Engine, tokens: Sequence[int], rank: int = 0) -> KeyChain:
        spaces = list(engine.half._ranks.spaces(Variant()).values())
        return _chain(spaces[rank], list(tokens)[: len(tokens) // BLOCK * BLOCK], None)

    def damage(self, engine: Engine, tokens: Sequence[int], block: int, rank: int = 0) -> None:
        """Flip a bit of a block in the pool, behind everybody's back."""
        pool = engine.pools[0]
        with pool.match(engine.handles()[rank], self.chain(engine, tokens, rank)[block : block + 1]) as lease:
            assert len(lease) == 1, "nothing there to damage"
            at = lease._at
            offset = int(lease._located().payloads[0]) - at.data.address + at.geometry.data_offset
            fd = os.open(self.keeper.path, os.O_RDWR)
            try:
                (byte,) = os.pread(fd, 1, offset + 77)
                os.pwrite(fd, bytes([byte ^ 0x10]), offset + 77)
            finally:
                os.close(fd)

    def resident(self, engine: Engine, tokens: Sequence[int], rank: int = 0) -> list[bool]:
        """Which of a sequence's blocks the pool has."""
        chain = self.chain(engine, tokens, rank)
        return [bool(there) for there in engine.pools[0].resident(engine.handles()[rank], chain.array)]

    # ---- what must be true

    def look(self) -> int:
        """Everything in the pool that any request may have stored is what a clean run keeps; how many blocks."""
        assert not self.poisoned, self.poisoned
        seen: set[bytes] = set()
        for chain in self.chains:
            handle = self.keeper_pool.space(chain.space)
            for at in np.flatnonzero(self.keeper_pool.resident(handle, chain.array)):
                key = chain.array[at].tobytes()
                if key in seen:
                    continue
                seen.add(key)
                with self.keeper_pool.match(handle, chain[int(at) : int(at) + 1]) as lease:
                    if len(lease) and lease.verify():
                        assert bytes(lease.views(0)) == self.blocks[key], "a block that no clean run makes"
        return len(seen)

    def tokens_right(self) -> None:
        for engine, name, right in self.asked:
            got = engine.tokens[name]
            if name in engine.aborted:
                assert got == right[: len(got)], name
            else:
                assert got == right, name

    def finish(self) -> None:
        """Run every engine until nothing is left, and check everything."""
        for engine in self.engines:
            engine.settle()
        self.tokens_right()
        for engine in self.engines:
            until(lambda e=engine: not any(pool.held()["leases"] for pool in e.pools), "leases are back", timeout_s=5)
            engine.assert_nothing_held()
        self.look()

    def end_engines(self) -> None:
        """Close them, and forget what was asked of them."""
        for engine in self.engines:
            engine.close()
        self.engines.clear()
        self.asked.clear()

    def close(self) -> None:
        self.end_engines()
        self.keeper_pool.close()

    def wait_dropped(self, n: int = 1) -> None:
        """Wait until the keeper has dropped n damaged blocks."""
        until(lambda: self.keeper.counters().get("damaged", 0) >= n, "damaged", timeout_s=PATIENCE_S)


def _chain(space: Space, tokens: list[int], extras: dict[int, bytes] | None) -> KeyChain:
    chain = KeyChain(space)
    n_full = len(tokens) // BLOCK
    wanted = {at: extra for at, extra in (extras or {}).items() if at < n_full}
    chain.extend(tokens, extras=wanted or None)
    return chain


def _bytes_of(tensors: TensorMap, at: int, handle: SpaceHandle) -> bytes:
    """What lies in the engine's pages for one block of a map."""
    offset = int(tensors.block_index[at]) * int(tensors.block_stride)
    return b"".join(ctypes.string_at(int(base) + offset, handle.segment_bytes) for base in tensors.seg_base)
