"""Blocks from the tiers below the pool, for requests that wait for them; the engine goes on with others meanwhile.

A fetch runs on a thread, for all ranks' spaces. The scheduler asks in each of its steps whether it is over, and then
looks the request up again; past its deadline a fetch is over whatever its thread does. Whether fetching is worth it is
decided in `penstock.connectors.below`.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from penstock import Pool
from penstock.connectors.below import NOTHING, Bringer, Brought, FetchMode, Wanted, Wish
from penstock.connectors.counters import Counters

__all__ = ["Fetches", "Fetching"]

_log = logging.getLogger("vllm.penstock")

_AT_ONCE = 8
_LOOK_AGAIN_S = 1.0
"""How often it is looked whether tiers came, where there are none."""


class Fetching:
    """One request's fetch."""

    def __init__(self, until_s: float) -> None:
        self._until_s = until_s
        self._ended = threading.Event()
        self._off = threading.Event()
        self.brought: Brought = NOTHING
        """What came of it, once it is over."""

    @property
    def over(self) -> bool:
        """Whether it ended; at its deadline it is called off."""
        if not self._ended.is_set() and time.monotonic() >= self._until_s:
            self._off.set()
        return self._ended.is_set() or self._off.is_set()

    def call_off(self) -> None:
        """Nobody wants it any more."""
        self._off.set()


class Fetches:
    """The fetches of one engine. Nothing here makes its caller wait, but for `close`."""

    def __init__(self, bringer: Bringer, counters: Counters, deadline_s: float) -> None:
        self._bringer, self._counters, self._deadline_s = bringer, counters, deadline_s
        self._threads = ThreadPoolExecutor(_AT_ONCE, "penstock-fetch")
        self._lock = threading.Lock()
        self._running: set[Fetching] = set()
        self._looked_at_s = float("-inf")
        self._looking = False

    def __len__(self) -> int:
        """Those whose threads have not ended."""
        return len(self._running)

    def look_ahead(self, pool: Pool | None) -> None:
        """A request came: see off this thread whether there are tiers, so that it is known when it is looked up."""
        now = time.monotonic()
        if pool is None or pool.has_tiers() or self._looking or now - self._looked_at_s < _LOOK_AGAIN_S:
            return
        self._looked_at_s = now
        if pool.may_have_tiers():
            self._looking = True
            self._threads.submit(self._look, pool)

    def start(self, pool: Pool, wanted: Wanted, wish: Wish) -> Fetching | None:
        """Have blocks brought; None where there are no tiers below this pool, as far as is known."""
        if wish.mode is FetchMode.NEVER or not (pool.has_tiers() or self._looking):
            return None
        until_s = time.monotonic() + self._deadline_s
        fetching = Fetching(until_s)
        with self._lock:
            self._running.add(fetching)
        self._threads.submit(self._bring, fetching, pool, wanted, wish, until_s)
        return fetching

    def close(self) -> None:
        """Call everything off and wait until the threads have ended, which takes some milliseconds."""
        with self._lock:
            running = list(self._running)
        for fetching in running:
            fetching.call_off()
        self._threads.shutdown(wait=True)

    def _look(self, pool: Pool) -> None:
        try:
            pool.has_tiers(look=True)
        finally:
            self._looking = False

    def _bring(self, fetching: Fetching, pool: Pool, wanted: Wanted, wish: Wish, until_s: float) -> None:
        try:
            if fetching.over:
                self._counters.add("fetch.end.called_off")
                return
            fetching.brought = self._bringer.bring(pool, wanted, wish, give_up=lambda: fetching.over, until_s=until_s)
        except Exception as error:  # noqa: BLE001 - the border to the pool: even its bugs cost only the hit
            self._counters.add(f"fetch.bug.{type(error).__name__}")
            _log.warning("a fetch failed: %s", error)
        finally:
            with self._lock:
                self._running.discard(fetching)
            fetching._ended.set()
