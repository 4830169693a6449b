"""What the scheduler's half knows of each request: its keys, what it may load, what it has stored.

Covers the identity of a request's blocks: adapters, images, salts, and what is left alone. Does not cover when things
happen (`scheduler.py`).
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock import Intent, KeyChain, Lease, Miss, Space
from penstock.connectors.below import FetchMode
from penstock.connectors.vllm.fetches import Fetching
from penstock.connectors.vllm.messages import RankId, Variant

__all__ = ["Lookup", "Tracked", "chain_extras", "left_alone"]

# vLLM lets clients name images themselves. Such a name says nothing about the content, and may look like a hash.
_CONTENT_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class Lookup:
    """Leases on blocks that a request may load: one for each rank, all of the same blocks."""

    first_block: int
    n_blocks: int
    leases: dict[RankId, Lease]
    at_s: float
    miss: Miss
    stale: bool = False
    """Blocks came since."""

    def release(self) -> None:
        """Give all blocks back. Idempotent."""
        for lease in self.leases.values():
            lease.release()


@dataclass(slots=True, eq=False)
class Tracked:
    """One request, from its arrival to its end."""

    request: Any
    variant: Variant
    intent: Intent | None
    may_load: bool
    may_save: bool
    min_hit_tokens: int
    wait_s: float
    """How long the first lookup may wait for blocks on their way."""
    extras: dict[int, bytes]
    fetch: FetchMode = FetchMode.AUTO
    """What to do about blocks below the pool."""
    chains: dict[RankId, KeyChain] = field(default_factory=dict)
    n_hashed: int = 0
    """Tokens that are in the chains."""
    lookup: Lookup | None = None
    wait_until_s: float | None = None
    fetching: Fetching | None = None
    """Blocks on their way from below the pool."""
    may_fetch: bool = True
    """Whether none were asked for yet."""
    fetched_blocks: int = 0
    """Blocks that came from below for it, all ranks."""
    loading: int = 0
    """Number of the load in flight, 0 for none."""
    beside: bool = False
    """Whether that load runs beside the steps."""
    admitted: int = -1
    """The step in which it last got its pages."""
    n_failed_loads: int = 0
    n_saved: int | None = None
    """Leading blocks that need no storing; None: not known, look in the pool."""
    n_planned: int = 0
    """Leading blocks of which storing was considered."""
    saving: set[int] = field(default_factory=set)
    """Numbers of the saves in flight."""
    hit_tokens: int = 0
    local_tokens: int = 0
    """Tokens that the engine's own prefix cache had."""
    miss: Miss = Miss.NONE

    def extend(self, spaces: Mapping[RankId, Space], n_tokens: int) -> None:
        """Derive the keys of all full blocks among the first `n_tokens` tokens."""
        if n_tokens <= self.n_hashed:
            return
        tokens = self._tokens(self.n_hashed, n_tokens)
        for rank, space in spaces.items():
            chain = self.chains.get(rank)
            if chain is None:
                chain = self.chains[rank] = KeyChain(space)
            block = space.block_tokens
            wanted = {
                at: extra for at, extra in self.extras.items() if self.n_hashed <= at * block + block - 1 < n_tokens
            }
            chain.extend(tokens, extras=wanted or None)
        self.n_hashed = n_tokens

    def _tokens(self, first: int, last: int) -> Sequence[int]:
        prompt: list[int] = self.request.prompt_token_ids
        n_prompt = len(prompt)
        if last <= n_prompt:
            return prompt if first == 0 and last == n_prompt else prompt[first:last]
        tokens: list[int] = self.request.all_token_ids[first:last]
        return tokens

    @property
    def n_settled(self) -> int:
        """Tokens that are accepted and known, and whose KV was computed by steps that are over."""
        if self.loading and self.beside:
            return 0
        settled: int = min(
            self.request.num_computed_tokens - self.request.num_in_flight_tokens, self.request.num_tokens
        )
        return settled

    def call_off_fetch(self) -> None:
        """It does not wait for blocks from below any more. Idempotent."""
        if self.fetching is not None:
            self.fetching.call_off()
            self.fetching = None

    def save_anew(self) -> None:
        """What is stored of this request is not known any more, or not there."""
        self.n_saved, self.n_planned = None, 0

    def forget_keys(self) -> None:
        """The spaces changed."""
        self.chains.clear()
        self.n_hashed = 0
        self.save_anew()


def left_alone(request: Any, trust_item_hashes: bool) -> str:
    """Why a request neither loads nor saves; empty if it may. `trust_item_hashes` as in the settings."""
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None:
        return "prompt_embeds"
    if request.prompt_token_ids is None:
        return "no_token_ids"
    if request.pooling_params is not None:
        return "pooling"
    if getattr(request, "resumable", False):
        return "streaming_input"
    hashes = [feature.mm_hash or "" for feature in request.mm_features]
    if hashes and not trust_item_hashes:
        return "multimodal"
    if not all(_CONTENT_HASH.fullmatch(one) for one in hashes):
        return "item_without_content_hash"
    return ""


def chain_extras(request: Any, block_tokens: int) -> dict[int, bytes]:
    """What blocks depend on besides tokens, by the block's index: the request's salt (first block), and each image or
    sound by its content hash and where it lies in the block."""
    parts: dict[int, list[bytes]] = {}
    if request.cache_salt:
        parts[0] = [b"salt" + _sized(request.cache_salt.encode())]
    for feature in request.mm_features:
        first, length = feature.mm_position.offset, feature.mm_position.length
        for block in range(first // block_tokens, -(-(first + length) // block_tokens)):
            place = struct.pack("<qq", first - block * block_tokens, length)
            parts.setdefault(block, []).append(b"item" + place + _sized(feature.mm_hash.encode()))
    return {block: hashlib.blake2b(b"".join(part), digest_size=32).digest() for block, part in parts.items()}


def _sized(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data
