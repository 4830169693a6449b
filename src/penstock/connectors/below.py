"""Blocks that lie below the pool: whether a request fetches or recomputes them, and the fetch within its time.

For every connector. The decision compares what the tiers' measured speeds say with the engine's measured prefill speed
(`penstock.core.cost`), and gives the fetch no more time than recomputing would take: a tier that turns out slower than
it was costs at most that. Does not cover when an engine may wait (its connector does).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

from penstock import FetchEnd, Intent, KeyChain, Pool, SpaceHandle
from penstock.connectors.counters import Counters
from penstock.core.cost import Part, choose
from penstock.core.speed import PrefillMeter
from penstock.pool.below import Below, Run

__all__ = ["Bringer", "FetchMode"]

LOCATE_S = 0.05
"""How long stores on other machines may be asked where blocks are."""
_LOOK_S = 0.02
"""How often a fetch looks whether it is still wanted."""


class FetchMode(StrEnum):
    """What a request does about blocks below the pool."""

    AUTO = "auto"
    """Fetches what is expected to be faster to fetch than to compute."""
    ALWAYS = "always"
    NEVER = "never"


class Bringer:
    """Decides and fetches for one engine. Thread-safe; never raises because of the pool or its tiers."""

    def __init__(self, counters: Counters, deadline_s: float, prefill: PrefillMeter | None = None) -> None:
        """`deadline_s` bounds every fetch. `prefill` learns from `computed`."""
        self._counters = counters
        self._deadline_s = deadline_s
        self._prefill = prefill or PrefillMeter()
        self._lock = threading.Lock()

    def computed(self, n_tokens: int, before: int, seconds: float) -> None:
        """The engine computed this many tokens after `before` others in this time."""
        with self._lock:
            self._prefill.add(n_tokens, before, seconds)

    def prefill_s(self, n_tokens: int, before: int) -> float:
        """Seconds that the engine would take."""
        with self._lock:
            return float(self._prefill.estimate(n_tokens, before))

    def bring(
        self,
        pool: Pool,
        handle: SpaceHandle,
        keys: KeyChain,
        n_tokens: int,
        *,
        intent: Intent | None = None,
        mode: FetchMode = FetchMode.AUTO,
        give_up: Callable[[], bool] = lambda: False,
    ) -> int:
        """Bring what is worth it of `keys`, for a prompt of `n_tokens`; how many blocks of them are in the pool then.

        Waits for the tiers, as long as recomputing would take and `deadline_s` allows. 0 where nobody could be asked.
        """
        if mode is FetchMode.NEVER:
            return 0
        below = pool.locate(handle, keys, LOCATE_S)
        if not below.n_blocks:
            if below.why is not FetchEnd.NO_TIERS:
                self._counters.add("fetch.nothing_below")
            return below.here
        n, limit_s = self._worth(below, n_tokens, handle.block_tokens, mode)
        if n <= 0:
            self._counters.add("fetch.recomputed")
            return below.here
        return self._fetch(pool, handle, keys[: below.here + n], limit_s, intent, give_up)

    def _worth(self, below: Below, n_tokens: int, block_tokens: int, mode: FetchMode) -> tuple[int, float]:
        """How many blocks to fetch, and how long that may take."""
        if mode is FetchMode.ALWAYS:
            return below.n_blocks, self._deadline_s
        choice = choose(below.here, _parts(below.runs), n_tokens, block_tokens, self.prefill_s)
        n = choice.fetch_blocks
        rest = n_tokens - (below.here + n) * block_tokens
        saved_s = choice.recompute_s - self.prefill_s(rest, n_tokens - rest)
        return n, min(self._deadline_s, max(saved_s, 2 * (choice.expected_s - self.prefill_s(rest, n_tokens - rest))))

    def _fetch(
        self, pool: Pool, handle: SpaceHandle, keys: KeyChain, limit_s: float, intent: Intent | None,
        give_up: Callable[[], bool],
    ) -> int:  # fmt: skip
        started = time.perf_counter()
        with pool.fetch(handle, keys, limit_s, intent=intent) as fetch:
            while not fetch.done and not give_up():
                fetch.wait(_LOOK_S)
        self._counters.add("fetch.us", int(1e6 * (time.perf_counter() - started)))
        self._counters.add(f"fetch.{fetch.why.name.lower()}")
        self._counters.add("fetch.blocks", fetch.moved)
        return fetch.arrived


def _parts(runs: Sequence[Run]) -> list[Part]:
    """As the cost model wants them: each run's own time. What waits for the first byte is in it already."""
    parts, before = [], 0.0
    for number, run in enumerate(runs):
        seconds = max(0.0, run.seconds - before)
        before = run.seconds
        parts.append(Part(number, run.n_blocks, 0.0, seconds / run.n_blocks))
    return parts
