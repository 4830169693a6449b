"""The connector for transformers models: prefixes from the pool, new blocks into it.

    connector = Connector(model)                       # or Connector(model, penstock.open("name"))
    result = connector.generate(input_ids, 64, do_sample=False)

    loaded = connector.load(input_ids)                 # the same by hand, around any call of the model
    ones = torch.ones_like(input_ids)
    output = model.generate(input_ids, past_key_values=loaded.cache, attention_mask=ones)
    connector.save(output[0], loaded.cache)

One request at a time goes through a call; calls may come from several threads. Covers what one process does.
Does not cover which models are fit (`support.py`), what they may share (`spaces.py`), or how generated tokens
compare with an engine's own (`penstock.connectors.equality`).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from penstock import Intent, KeyChain, Lease, Miss, Pool, SpaceHandle, chain_keys
from penstock.connectors.below import Bringer, FetchMode, Wish
from penstock.connectors.counters import Counters
from penstock.connectors.transformers.attachment import Attachment
from penstock.connectors.transformers.cache import KvShape, ReservedCache, snapshot_of
from penstock.connectors.transformers.front import FrontOf
from penstock.connectors.transformers.generation import Watch, check_generation, fresh_kwargs
from penstock.connectors.transformers.saver import SaveJob, Saver
from penstock.connectors.transformers.spaces import SpaceSource
from penstock.connectors.transformers.support import check_mode, inspect_model, max_positions
from penstock.errors import ConfigError, Refused
from penstock.identity import Space

__all__ = ["Connector", "FetchMode", "GenerationResult", "Loaded", "RequestOptions"]

_log = logging.getLogger("penstock.connector")

# After these the block behind the hit needs storing; after others the pool may have it and is asked.
_SEEN_MISSING = frozenset({Miss.ABSENT, Miss.CHECKSUM, Miss.CHANGED})

# What a pool takes (`Pool.space`).
_SEGMENT_ALIGN = 64
_SEGMENT_LEAST = 256

TokenIds = torch.Tensor | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What one request asks of the pool."""

    skip_load: bool = False
    """Compute everything."""
    skip_save: bool = False
    """Leave nothing in the pool."""
    min_hit_tokens: int = 0
    """A shorter hit is not loaded."""
    fetch: FetchMode = FetchMode.AUTO
    """What to do about blocks that lie in a tier below the pool."""
    intent: Intent | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A cache that holds the first tokens of a request."""

    cache: ReservedCache
    hit_tokens: int
    """Tokens in it that came from the pool."""
    miss: Miss
    """Why the hit is not longer; NONE if it is as long as a hit can be (at least one token is always
    computed)."""
    fetched_blocks: int = 0
    """Blocks that were brought for it from a tier below the pool."""
    front_tokens: int = 0
    """Tokens in it that were computed while others came from below; `load` computes none."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What one request gave, and what the pool did for it."""

    tokens: list[int]
    """The new tokens, without the prompt."""
    prompt_tokens: int
    hit_tokens: int
    miss: Miss
    ttft_s: float
    """From the call to the first new token, loading and fetching included."""
    total_s: float
    fetched_blocks: int = 0
    """Blocks that were brought for it from a tier below the pool."""
    front_tokens: int = 0
    """The first tokens behind what the pool had, computed while those blocks came."""


@dataclass(slots=True)
class _Filling:
    """A cache being filled for one request."""

    cache: ReservedCache
    pool: Pool
    handle: SpaceHandle
    tokens: list[int]
    options: RequestOptions
    job: SaveJob | None
    """Where the front of the prompt may be computed: what stores it."""
    n_blocks: int = 0
    """Blocks that the cache holds."""
    n_leased: int = 0
    """Blocks that the pool had in the end."""
    front: FrontOf | None = None
    fetched: int = 0


class Connector:
    """Ties one model to one pool.

    `pool=None` attaches to the keeper of `name` when there is one, without ever serving a pool itself.
    Raises Refused for a model that cannot be stored block by block. Reads the weights once, for their digest
    (about 1 GB/s and core), and loads the pool's kernels, so that no request waits for either.
    """

    def __init__(
        self,
        model: Any,
        pool: Pool | None = None,
        name: str = "default",
        *,
        block_tokens: int = 16,
        tenant: bytes = b"",
        epoch: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        label: str = "",
        max_saving: int = 8,
        save_wait_s: float = 0.05,
        fetch_deadline_s: float = 10.0,
    ) -> None:
        """`tenant`, `epoch` and `checkpoint` as in `Space` and `SpaceSource`. At most `max_saving` requests
        wait for their blocks to be stored (each keeps its cache in memory), and storing waits at most
        `save_wait_s` for room, off the request's path unless more is being fetched behind them. A request waits
        at most `fetch_deadline_s` for blocks from a tier below the pool, and no longer than computing them is
        expected to take."""
        self._model = model
        self._shape = inspect_model(model)
        _check_block(block_tokens, self._shape)
        self._max_positions = max_positions(model)
        self._block_tokens = block_tokens
        self._label = label or str(getattr(model.config, "model_type", ""))
        self._counters = Counters()
        self._spaces = SpaceSource(
            model, self._shape, block_tokens=block_tokens, tenant=tenant, epoch=epoch, checkpoint=checkpoint
        )
        self._bringer = Bringer(self._counters, fetch_deadline_s)
        self._attachment = Attachment(pool, name, self._counters)
        self._save_wait_s = save_wait_s
        self._saver = Saver(self._counters, max_requests=max_saving, wait_s=save_wait_s)
        self._attachment.prepare(self._spaces.current(), self._label)

    @property
    def space(self) -> Space:
        """The space of the model as it is now."""
        return self._spaces.current()

    def counters(self) -> dict[str, int]:
        """Requests, tokens, misses and drops so far, by name. A block that found no room is counted again
        when it is tried again."""
        return self._counters.read()

    def weights_changed(self) -> None:
        """Say that the weights were written in a way that PyTorch does not count (through `.data`)."""
        self._spaces.refresh()

    def generate(
        self,
        input_ids: TokenIds,
        max_new_tokens: int,
        *,
        options: RequestOptions = RequestOptions(),
        **generate_kwargs: Any,
    ) -> GenerationResult:
        """`model.generate` of one prompt, [n] or [1, n], with the pool's prefix.

        Further arguments go to `model.generate`. Raises Refused for what cannot go through one plain cache:
        batches, masked or padded prompts, beams, assistants, inputs other than tokens, more tokens than the
        model has positions for. Never fails because of the pool.
        """
        started = time.perf_counter()
        tokens = _one_request(input_ids)
        check_generation(self._model, len(tokens), max_new_tokens, self._max_positions, generate_kwargs)
        loaded, job = self._load(tokens, len(tokens) + max_new_tokens, options, may_compute=True)
        filled = time.perf_counter()
        watch = Watch(len(tokens), lambda ids: self._watched(job, loaded.cache, ids))
        prompt = torch.tensor([tokens])
        output = self._model.generate(
            prompt,
            past_key_values=loaded.cache,
            max_new_tokens=max_new_tokens,
            **fresh_kwargs(prompt, watch, generate_kwargs),
        )
        ended = time.perf_counter()
        there = loaded.hit_tokens + loaded.front_tokens
        self._bringer.computed(len(tokens) - there, there, (watch.first_s or ended) - filled)
        result = GenerationResult(
            tokens=output[0, len(tokens) :].tolist(),
            prompt_tokens=len(tokens),
            hit_tokens=loaded.hit_tokens,
            miss=loaded.miss,
            ttft_s=(watch.first_s or ended) - started,
            total_s=ended - started,
            fetched_blocks=loaded.fetched_blocks,
            front_tokens=loaded.front_tokens,
        )
        self._report(result, job)
        return result

    def load(
        self,
        input_ids: TokenIds,
        options: RequestOptions = RequestOptions(),
        *,
        max_new_tokens: int = 0,
        attention_mask: torch.Tensor | None = None,
    ) -> Loaded:
        """A cache with the longest prefix that the pool has, for the model's own `generate` or `forward`.

        Give those the whole prompt and a mask of ones: they compute what the cache lacks. `max_new_tokens`
        reserves room, the cache grows without it. Raises as `generate` does.
        """
        tokens = _one_request(input_ids, attention_mask)
        check_generation(self._model, len(tokens), max_new_tokens, self._max_positions, {})
        loaded, _ = self._load(tokens, len(tokens) + max_new_tokens, options)
        return loaded

    def save(self, token_ids: TokenIds, cache: Any, options: RequestOptions = RequestOptions()) -> int:
        """Store the full blocks of a cache whose tokens are `token_ids` (it may lack the last of them), off
        the caller's path: the number of blocks asked for; `flush` waits for them.

        The tensors of the cache must not be written in place meanwhile: transformers' own caches and the one
        that `load` returns never do. Raises Refused for a cache of another kind or shape.
        """
        tokens = _one_request(token_ids)
        snapshot = snapshot_of(cache, self._shape)
        if options.skip_save:
            self._counters.add("save_skipped")
            return 0
        n_blocks = min(len(tokens), snapshot.n_tokens) // self._block_tokens
        found = self._attachment.handle(self._spaces.current(), self._label)
        if isinstance(found, Miss) or not n_blocks:
            return 0
        job = SaveJob(*found, options.intent, tokens, n_saved=0, look_first=True)
        return n_blocks if self._saver.submit(job, snapshot, n_blocks) else 0

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until all blocks asked for were stored or dropped, and the keeper has taken them in; False if
        that took longer."""
        deadline = time.monotonic() + timeout_s
        if not self._saver.flush(timeout_s):
            return False
        pool = self._attachment.pool
        try:
            return pool is None or pool.flush(max(0.0, deadline - time.monotonic()))
        except Exception as error:  # noqa: BLE001 - the border to the pool, as in `_fill`
            self._attachment.failed(error)
            return False

    def close(self, timeout_s: float = 1.0) -> None:
        """Store what is queued, within `timeout_s`, and end; closes the pool if the connector opened it."""
        self._saver.close(timeout_s)
        self._attachment.close()

    def __enter__(self) -> Connector:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _load(
        self, tokens: list[int], capacity: int, options: RequestOptions, *, may_compute: bool = False
    ) -> tuple[Loaded, SaveJob | None]:
        """The loaded cache, and the job that saves what is computed into it."""
        check_mode(self._model)
        cache = ReservedCache(self._shape, _round_up(capacity, self._block_tokens))
        if options.skip_load and options.skip_save:
            return self._loaded(cache, Miss.SKIPPED), None
        space = self._spaces.current()
        found = self._attachment.handle(space, self._label)
        if isinstance(found, Miss):
            return self._loaded(cache, found), None
        job = None if options.skip_save else SaveJob(*found, options.intent, list(tokens), n_saved=0, look_first=True)
        # Where a hit is wanted long or not at all, it is not made shorter.
        may_split = may_compute and not options.min_hit_tokens
        filling = _Filling(cache, *found, tokens, options, job if may_split else None)
        miss = self._fill(filling)
        n_blocks = filling.n_blocks
        front = filling.front
        if front is not None and front.error is not None:
            raise front.error
        if job is not None and front is not None and front.n_blocks:
            # What of the front found no room, or left the pool again, is tried again.
            job.n_saved, job.n_wanted, job.look_first = min(n_blocks, filling.n_leased), n_blocks, True
        elif job is not None:
            job.n_saved, job.n_wanted, job.look_first = n_blocks, n_blocks, miss not in _SEEN_MISSING
        front_blocks = 0 if front is None else front.n_blocks - front.hit_blocks
        return self._loaded(cache, miss, n_blocks - front_blocks, filling.fetched, front_blocks), job

    def _fill(self, filling: _Filling) -> Miss:
        """Copy the prefix into the cache; says why not more."""
        options = filling.options
        if options.skip_load:
            return Miss.SKIPPED
        pool, handle, cache, tokens = filling.pool, filling.handle, filling.cache, filling.tokens
        # The last token is always computed: its logits are what the first new token is drawn from.
        keys = chain_keys(handle.space, tokens[: len(tokens) - 1])
        try:
            lease = pool.match(handle, keys, intent=options.intent)
            if len(lease) < len(keys) and lease.miss is Miss.ABSENT:
                lease = self._bring(filling, keys, lease)
            with lease:
                filling.n_leased = len(lease)
                if len(lease) * self._block_tokens < options.min_hit_tokens:
                    return Miss.SKIPPED
                n_blocks, miss = self._gather(cache, lease, filling.n_blocks)
        except Exception as error:  # noqa: BLE001 - the border to the pool: even its bugs cost only the hit
            cache.show(filling.n_blocks * self._block_tokens)
            return self._attachment.failed(error)
        if n_blocks * self._block_tokens < options.min_hit_tokens:
            return miss
        filling.n_blocks = n_blocks
        cache.show(n_blocks * self._block_tokens)
        return miss

    def _bring(self, filling: _Filling, keys: KeyChain, lease: Lease) -> Lease:
        """The same lease, or a longer one after blocks came from below. What is leased stays so meanwhile."""
        options, pool, handle = filling.options, filling.pool, filling.handle
        wish = Wish(
            n_tokens=len(filling.tokens), mode=options.fetch, min_hit_tokens=options.min_hit_tokens,
            intent=options.intent,
        )  # fmt: skip
        if filling.job is not None:
            filling.front = FrontOf(
                self._model, self._shape, filling.cache, filling.job, lambda: self._gather_all(filling.cache, lease),
                self._bringer.computed, self._counters, self._save_wait_s,
            )  # fmt: skip
        try:
            brought = self._bringer.bring(pool, [(handle, keys)], wish, front=filling.front)
        except BaseException:
            lease.release()
            raise
        finally:
            filling.n_blocks = 0 if filling.front is None else filling.front.n_blocks
        filling.fetched = brought.moved
        if brought.n_blocks <= len(lease):
            return lease
        with lease:
            return pool.match(handle, keys, intent=options.intent)

    def _gather_all(self, cache: ReservedCache, lease: Lease) -> int | None:
        """Copy all that is leased: how many blocks that is, None if some of it is no good."""
        n_blocks, _ = self._gather(cache, lease)
        return n_blocks if n_blocks == len(lease) else None

    def _gather(self, cache: ReservedCache, lease: Lease, first: int = 0) -> tuple[int, Miss]:
        """Copy what is leased into the cache, but for the first blocks, which it holds: how many it holds then, and
        why not more. A short copy leaves garbage behind the blocks that are good; it is never shown."""
        n_blocks = first
        if len(lease) > first:
            wanted = cache.reserved().tensor_map(first, len(lease), self._block_tokens)
            n_blocks += lease.gather(wanted, blocks=slice(first, None))
        return n_blocks, Miss(lease.miss)

    def _loaded(
        self, cache: ReservedCache, miss: Miss, n_blocks: int = 0, fetched: int = 0, front_blocks: int = 0
    ) -> Loaded:
        """A cache with `n_blocks` blocks from the pool and `front_blocks` that were computed."""
        self._counters.add("requests")
        self._counters.add("hit_tokens", n_blocks * self._block_tokens)
        self._counters.add(f"miss.{miss.name.lower()}")
        return Loaded(cache, n_blocks * self._block_tokens, miss, fetched, front_blocks * self._block_tokens)

    def _watched(self, job: SaveJob | None, cache: ReservedCache, ids: torch.Tensor) -> None:
        """After every new token: ask for the blocks that became full."""
        if job is None:
            return
        n_blocks = cache.get_seq_length() // self._block_tokens
        if n_blocks > job.n_wanted:
            job.tokens.extend(ids[len(job.tokens) :].tolist())
            self._saver.submit(job, snapshot_of(cache, self._shape), n_blocks)

    def _report(self, result: GenerationResult, job: SaveJob | None) -> None:
        _log.info(
            "prompt_tokens=%d hit_tokens=%d miss=%s fetched_blocks=%d front_tokens=%d new_tokens=%d save_blocks=%d "
            "ttft_ms=%.1f",
            result.prompt_tokens,
            result.hit_tokens,
            result.miss.name.lower(),
            result.fetched_blocks,
            result.front_tokens,
            len(result.tokens),
            0 if job is None else job.n_wanted - result.hit_tokens // self._block_tokens,
            1e3 * result.ttft_s,
        )


def _one_request(ids: TokenIds, attention_mask: torch.Tensor | None = None) -> list[int]:
    """The token ids of one sequence; Refused for several, none, or one with masked tokens."""
    if isinstance(ids, torch.Tensor):
        if ids.dim() == 2 and ids.shape[0] != 1:
            raise Refused(f"a batch of {ids.shape[0]} sequences: send one request at a time")
        if ids.dim() > 2 or ids.is_floating_point():
            raise Refused(f"token ids must be integers of shape [n] or [1, n], not {ids.dtype} {list(ids.shape)}")
        ids = ids.reshape(-1).tolist()
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        raise Refused("the attention mask hides tokens: leave padding out, one request needs none")
    if not ids:
        raise Refused("an empty prompt: there is nothing to compute")
    return list(ids)


def _check_block(block_tokens: int, shape: KvShape) -> None:
    """ConfigError for blocks whose segments the pool cannot hold."""
    segment_bytes = block_tokens * shape.token_bytes
    if block_tokens < 1 or segment_bytes % _SEGMENT_ALIGN or segment_bytes < _SEGMENT_LEAST:
        raise ConfigError(
            f"block_tokens={block_tokens} makes layer segments of {segment_bytes} bytes; they must be "
            f"multiples of {_SEGMENT_ALIGN} of at least {_SEGMENT_LEAST}: choose another number of tokens"
        )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
