"""What clients and the mover say to each other, over a Unix socket of the mover's own. Frames as in `wire.py`.

One connection is one question at a time. A fetch is answered by any number of `Arrived` and one `Ended`; hanging up
before cancels it, unless it is a prefetch. The keeper is not asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from penstock.pool.wire import Error, Json, socket_path

__all__ = [
    "MAX_KEYS",
    "Answer",
    "Arrived",
    "Ended",
    "FetchOf",
    "LocateOf",
    "LocatedAt",
    "Question",
    "Report",
    "Run",
    "questions",
    "tier_socket",
]

MAX_KEYS = 32_768
"""Blocks that one question may be about: half a frame."""


class LocateOf(msgspec.Struct, frozen=True, tag="locate", forbid_unknown_fields=True):
    """Where are these blocks of a chain, from the first that is not in the pool?"""

    uuid: bytes
    """Of the segment that `space` is a number of."""
    space: int
    keys: bytes
    """16 bytes each, in the chain's order."""
    wait_s: float
    """How long stores on other machines may be asked."""


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that follow each other in the chain and lie in one tier."""

    tier: str
    n_blocks: int
    seconds: float
    """By when the last of them could be in the pool, from now, after the runs before it."""


class LocatedAt(msgspec.Struct, frozen=True, tag="located", forbid_unknown_fields=True):
    """`here` blocks are in the pool; then come the runs; what follows is nowhere, or was not found in time."""

    here: int
    runs: list[Run]


class FetchOf(msgspec.Struct, frozen=True, tag="fetch", forbid_unknown_fields=True):
    """Bring the blocks of a chain that are not in the pool; `parent` is the key before the first."""

    uuid: bytes
    space: int
    keys: bytes
    parent: bytes
    wait_s: float
    urgency: int
    intent: list[int]
    """session, tenant, priority, ttl_ms, deadline_ms, as a commit carries them."""
    start: int = 0
    """The asker itself puts the blocks before this one into the pool. The others are read meanwhile, and published
    behind those."""


class Arrived(msgspec.Struct, frozen=True, tag="arrived", forbid_unknown_fields=True):
    """The first `n` of the blocks that were asked for are in the pool now."""

    n: int


class Ended(msgspec.Struct, frozen=True, tag="ended", forbid_unknown_fields=True):
    """The fetch is over. `n` blocks, from the first, are in the pool; `why` (a FetchEnd) says why there are no more."""

    n: int
    why: int
    moved: int
    """Blocks that this fetch itself brought."""
    tier: str
    """Where the trouble was, if there was any."""


class Report(msgspec.Struct, frozen=True, tag="report", forbid_unknown_fields=True):
    """What does `penstock tiers` show?"""


Question = LocateOf | FetchOf | Report
Answer = LocatedAt | Arrived | Ended | Json | Error

questions: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Question)
answers: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Answer)


def tier_socket(name: str, *, create: bool = False) -> Path:
    """Where the mover of the pool `name` listens."""
    return socket_path(name, create=create, ending=".tiers.sock")
