"""What an engine says of its blocks, as five words that fit into a ring's entry."""

from __future__ import annotations

import hashlib

from penstock.errors import ConfigError
from penstock.pool.link import Link
from penstock.pool.wire import Names
from penstock.types import Intent

__all__ = ["IntentWords"]

# Session and tenant names: how much of one is told for display, and how many are remembered as told.
_MAX_NAME = 200
_MAX_NAMES = 10_000


class IntentWords:
    """Intents of one client. The keeper is told each session's and tenant's name once, through `link`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._told: set[int] = set()

    def of(self, intent: Intent | None) -> list[int]:
        """session, tenant, priority, ttl_ms, deadline_ms. Raises ConfigError for a priority beyond 32 bits."""
        if intent is None:
            return [0] * 5
        if not -(1 << 31) <= intent.priority < 1 << 31:
            raise ConfigError(f"priority {intent.priority} does not fit into 32 bits")
        ttl = 0 if intent.ttl_s is None else max(1, round(intent.ttl_s * 1000))
        deadline = 0 if intent.deadline_s is None else max(1, round(intent.deadline_s * 1000))
        return [self.digest(intent.session), self.digest(intent.tenant), intent.priority, ttl, deadline]

    def digest(self, name: str) -> int:
        """8 bytes that stand for a session's or tenant's name; 0 for none."""
        if not name:
            return 0
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
        if digest not in self._told:
            if len(self._told) == _MAX_NAMES:
                self._told.clear()
            self._told.add(digest)
            self._link.names(Names({digest: name[:_MAX_NAME]}))
        return digest
