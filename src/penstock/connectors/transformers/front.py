"""Computing the front of a prompt while its back comes from a tier below the pool.

What arrives there can be published only behind the front, so the front is stored in the pool as soon as it is computed.
Does not decide whether that is worth it (`penstock.connectors.below`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from penstock.connectors.counters import Counters
from penstock.connectors.transformers.cache import KvShape, ReservedCache, snapshot_of
from penstock.connectors.transformers.generation import prefill
from penstock.connectors.transformers.saver import SaveJob, store

__all__ = ["FrontOf"]


class FrontOf:
    """The front of one request; called at most once (`penstock.connectors.below.Front`)."""

    def __init__(
        self,
        model: Any,
        shape: KvShape,
        cache: ReservedCache,
        job: SaveJob,
        have: Callable[[], int | None],
        computed: Callable[[int, int, float], None],
        counters: Counters,
        save_wait_s: float,
    ) -> None:
        """`have` copies what the pool has into the cache and says how many blocks that is, None if some of it is no
        good; `computed` is told of each prefill: tokens, tokens before them, seconds. Storing waits at most
        `save_wait_s` for room."""
        self._model, self._shape, self._cache, self._job = model, shape, cache, job
        self._have, self._computed, self._counters, self._save_wait_s = have, computed, counters, save_wait_s
        self.hit_blocks = 0
        """Blocks in the cache that came from the pool."""
        self.n_blocks = 0
        """Blocks in the cache: those, and what was computed behind them. 0 if nothing came of it."""
        self.error: Exception | None = None
        """What the model raised."""

    def __call__(self, n_blocks: int, until_s: float) -> bool:
        block_tokens = self._job.handle.space.block_tokens
        have = self._have()
        if have is None:
            return False
        have = min(have, n_blocks)
        before, n_tokens = have * block_tokens, n_blocks * block_tokens
        self._cache.show(before)
        if before < n_tokens and not self._compute(before, n_tokens):
            return False
        self.hit_blocks, self.n_blocks = have, n_blocks
        self._job.n_saved, self._job.look_first = have, False
        until_s = min(until_s, time.monotonic() + self._save_wait_s)
        store(self._job, snapshot_of(self._cache, self._shape), n_blocks, self._counters, self._save_wait_s, until_s)
        return self._job.n_saved == n_blocks

    def _compute(self, before: int, n_tokens: int) -> bool:
        started = time.perf_counter()
        try:
            prefill(self._model, self._job.tokens[before:n_tokens], self._cache)
        except Exception as error:  # noqa: BLE001 - it is meant for the caller of `generate`, not for the pool's border
            self.error = error
            return False
        self._computed(n_tokens - before, before, time.perf_counter() - started)
        self._counters.add("fetch.front_tokens", n_tokens - before)
        return True
