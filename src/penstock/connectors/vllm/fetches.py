"""Blocks from the tiers below the pool, for requests that wait for them; the engine goes on with others meanwhile.

A fetch runs on a thread, for every rank's space in turn. The scheduler asks in each of its steps whether it is over,
and then looks the request up again. Whether fetching is worth it is decided in `penstock.connectors.below`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from penstock import Intent, KeyChain, Pool, SpaceHandle
from penstock.connectors.below import Bringer, FetchMode
from penstock.connectors.counters import Counters

__all__ = ["Fetches", "Fetching"]

_log = logging.getLogger("vllm.penstock")

_AT_ONCE = 8


@dataclass(slots=True, eq=False)
class Fetching:
    """One request's fetch."""

    over: threading.Event = field(default_factory=threading.Event)
    off: threading.Event = field(default_factory=threading.Event)
    """Nobody wants it any more."""


class Fetches:
    """The fetches of one engine. `start` is for the engine's thread; nothing here makes it wait."""

    def __init__(self, bringer: Bringer, counters: Counters, mode: FetchMode) -> None:
        self._bringer, self._counters, self._mode = bringer, counters, mode
        self._threads = ThreadPoolExecutor(_AT_ONCE, "penstock-fetch")
        self._looking: threading.Event | None = None

    def start(
        self, pool: Pool, wanted: Mapping[SpaceHandle, KeyChain], n_tokens: int, intent: Intent | None
    ) -> Fetching | None:
        """Have blocks brought, by rank; None where there are no tiers below this pool, as far as is known."""
        if self._mode is FetchMode.NEVER:
            return None
        if not pool.has_tiers():
            self._look(pool)
            return None
        fetching = Fetching()
        self._threads.submit(self._bring, fetching, pool, dict(wanted), n_tokens, intent)
        return fetching

    def close(self) -> None:
        """Start nothing more. What runs ends at its deadline, and nobody is told."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look(self, pool: Pool) -> None:
        """See whether a keeper with tiers came, off the engine's thread and once at a time."""
        if self._looking is None or self._looking.is_set():
            self._looking = over = threading.Event()
            self._threads.submit(self._look_now, pool, over)

    def _look_now(self, pool: Pool, over: threading.Event) -> None:
        try:
            pool.has_tiers(look=True)
        finally:
            over.set()

    def _bring(
        self, fetching: Fetching, pool: Pool, wanted: Mapping[SpaceHandle, KeyChain], n_tokens: int,
        intent: Intent | None,
    ) -> None:  # fmt: skip
        try:
            n_blocks: int | None = None
            for handle, keys in wanted.items():
                # What one rank lacks is of no use to the others.
                part = keys if n_blocks is None else keys[:n_blocks]
                n_blocks = self._bringer.bring(
                    pool, handle, part, n_tokens, intent=intent, mode=self._mode, give_up=fetching.off.is_set
                )
        except Exception as error:  # noqa: BLE001 - the border to the pool: even its bugs cost only the hit
            self._counters.add(f"fetch.bug.{type(error).__name__}")
            _log.warning("a fetch failed: %s", error)
        finally:
            fetching.over.set()
