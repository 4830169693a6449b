"""vLLM's KV events for what this engine stored in the pool: published with vLLM's own block hashes, medium "CPU".

Each server publishes the blocks that it committed itself, their store once the pool has them, and their removal once
they left, whoever pushed them out. So each block of a shared pool is published by the one server that computed it (by
two, if both computed it at once). Where removals may have been missed, every published block is looked up again.

A block of several ranks is there while all ranks' parts are. A removal may be told of a block that comes back later;
never is a block left published that is gone, but for those removed since the last `take`. Covers what to publish; that
vLLM publishes only where its own events are enabled is the connector's to ask.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from penstock import Pool, SpaceHandle
from penstock.errors import PoolClosed
from penstock.pool.removals import Removals

__all__ = ["EngineEvents", "PoolEvents", "VllmEvents"]

Keys = npt.NDArray[np.uint64]

_MEDIUM = "CPU"
_GROUP = 0  # engines with several KV groups are refused
# How long a store may take from the worker's word to the pool's directory; the keeper needs milliseconds.
_CONFIRM_WITHIN_S = 5.0
# Blocks published at once, in about 0.4 KiB each. A pool of fewer slots never has so many.
_MAX_BLOCKS = 1 << 18


class EngineEvents(Protocol):
    """What is needed of the engine."""

    def hashes(self, request: Any, first: int, last: int) -> list[Any]:
        """The engine's hashes of the request's blocks [first, last), as its events have them; fewer if it has fewer."""

    def extra_keys(self, request: Any, first: int, last: int, block_size: int) -> list[Any] | None:
        """What those blocks' hashes depend on besides tokens, as the engine's events have it."""

    def stored(self, **fields: Any) -> Any:
        """A BlockStored."""

    def removed(self, **fields: Any) -> Any:
        """A BlockRemoved."""


class VllmEvents:
    """vLLM's own classes and hashes."""

    def __init__(self) -> None:
        from vllm.distributed.kv_events import BlockRemoved, BlockStored
        from vllm.v1.core import kv_cache_utils

        self._stored, self._removed, self._utils = BlockStored, BlockRemoved, kv_cache_utils

    def hashes(self, request: Any, first: int, last: int) -> list[Any]:
        return [self._utils.maybe_convert_block_hash(one) for one in request.block_hashes[first:last]]

    def extra_keys(self, request: Any, first: int, last: int, block_size: int) -> list[Any] | None:
        found, item = [], 0
        for block in range(first, last):
            keys, item = self._utils.generate_block_hash_extra_keys(
                request, block * block_size, (block + 1) * block_size, item
            )
            found.append(keys)
        extra: list[Any] | None = self._utils.to_event_extra_keys(found)
        return extra

    def stored(self, **fields: Any) -> Any:
        return self._stored(**fields)

    def removed(self, **fields: Any) -> Any:
        return self._removed(**fields)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One published block: the engine's hash, and in which space each rank has it under which key."""

    hash: Any
    handles: tuple[SpaceHandle, ...]
    keys: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class _Run:
    """Consecutive blocks of a request, stored but not seen in the pool yet."""

    blocks: list[_Block]
    parent: Any
    tokens: list[int]
    extra_keys: list[Any] | None
    about: dict[str, Any]
    since_s: float


class PoolEvents:
    """Turns stores and removals into the engine's events. For one thread."""

    def __init__(
        self,
        pool: Callable[[], Pool | None],
        block_size: int,
        *,
        engine: EngineEvents | None = None,
        max_blocks: int = _MAX_BLOCKS,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pool` gives the pool that this process is attached to at the moment, if any. `block_size` in tokens.

        At most `max_blocks` blocks are published at a time; beyond that the oldest are told to be removed, though the
        pool may still have them.
        """
        self._pool = pool
        self._block_size = block_size
        self._engine = VllmEvents() if engine is None else engine
        self._max_blocks, self._now_s = max_blocks, now_s
        self._watched: Pool | None = None
        self._feed: Removals | None = None
        self._published: dict[bytes, _Block] = {}
        """By each of a block's keys; the oldest first."""
        self._n_published = 0
        self._pending: deque[_Run] = deque()
        self._gone: list[Any] = []
        """Hashes whose removal is still to be told."""
        self._events: list[Any] = []
        self.unconfirmed = 0
        """Blocks that were never seen in the pool, and so never published."""

    @property
    def n_published(self) -> int:
        """Blocks that are published."""
        return self._n_published

    def stored(self, request: Any, first_block: int, n_blocks: int, parts: Iterable[tuple[SpaceHandle, Keys]]) -> None:
        """Every rank has committed these blocks of a request. `parts`: each rank's space and its keys, (n, 2) words.

        Takes from the request what the events need; it may end. Blocks that the engine has no hash of are left out.
        """
        feed = self._attend()
        parts = [(handle, np.ascontiguousarray(keys, np.uint64)) for handle, keys in parts]
        hashes = self._engine.hashes(request, first_block, first_block + n_blocks)
        if feed is None or not hashes or not parts:
            return
        handles = tuple(handle for handle, _ in parts)
        for handle in handles:
            feed.add(handle)
        last = first_block + len(hashes)
        columns = [[row.tobytes() for row in keys[: len(hashes)]] for _, keys in parts]
        before = self._engine.hashes(request, first_block - 1, first_block) if first_block else []
        adapter, size = request.lora_request, self._block_size
        self._pending.append(
            _Run(
                blocks=[_Block(one, handles, keys) for one, keys in zip(hashes, zip(*columns), strict=True)],
                parent=before[0] if before else None,
                tokens=list(request.all_token_ids[first_block * size : last * size]),
                extra_keys=self._engine.extra_keys(request, first_block, last, size),
                about={
                    "lora_id": adapter.adapter_id if adapter else None,
                    "lora_name": adapter.name if adapter else None,
                    "session_id": getattr(request, "session_id", None),
                },
                since_s=self._now_s(),
            )
        )

    def take(self) -> list[Any]:
        """The events since the last call, in order. Does not wait; a few microseconds if nothing happened."""
        feed = self._attend()
        if feed is not None and self._watched is not None:
            try:
                self._follow(feed, self._watched)
                self._confirm(self._watched)
            except PoolClosed:
                self.reset()
        self._tell_removals()
        events, self._events = self._events, []
        return events

    def reset(self) -> None:
        """The pool has nothing for this engine any more, as after new weights: all that is published is removed."""
        for block in dict.fromkeys(self._published.values()):
            self._remove(block)
        self._pending.clear()
        self._watched = self._feed = None

    def _attend(self) -> Removals | None:
        """The feed of the present pool. What another pool had is as good as gone."""
        pool = self._pool()
        if pool is not self._watched:
            self.reset()
            if pool is not None:
                try:
                    self._feed, self._watched = pool.watch_removals(), pool
                except PoolClosed:
                    return None
        return self._feed

    # ---- removals

    def _follow(self, feed: Removals, pool: Pool) -> None:
        """Find out which published blocks left."""
        removed = feed.take()
        if removed.gap:
            doubtful = list(dict.fromkeys(self._published.values()))
        elif self._published and len(removed.keys):
            found = (self._published.get(key.tobytes()) for key in removed.keys)
            doubtful = list(dict.fromkeys(block for block in found if block is not None))
        else:
            return
        # What left may have come back since; the pool has the last word.
        for block, there in zip(doubtful, _resident(pool, doubtful), strict=True):
            if not there:
                self._remove(block)

    def _remove(self, block: _Block) -> None:
        for key in block.keys:
            del self._published[key]
        self._n_published -= 1
        self._gone.append(block.hash)

    def _tell_removals(self) -> None:
        if self._gone:
            self._events.append(self._engine.removed(block_hashes=self._gone, medium=_MEDIUM, group_idx=_GROUP))
            self._gone = []

    # ---- stores

    def _confirm(self, pool: Pool) -> None:
        """Publish the runs that are in the pool, from their beginning on as far as they are."""
        waiting: deque[_Run] = deque()
        while self._pending:
            run = self._pending.popleft()
            there = _resident(pool, run.blocks)
            n = len(run.blocks) if there.all() else int(there.argmin())
            self._publish(run, n)
            if n == len(run.blocks):
                continue
            if self._now_s() - run.since_s < _CONFIRM_WITHIN_S:
                waiting.append(self._rest(run, n))
            else:
                self.unconfirmed += len(run.blocks) - n
        self._pending = waiting

    def _publish(self, run: _Run, n: int) -> None:
        """Tell those of a run's first n blocks that are not published yet, one event for each stretch of them."""
        start = 0
        while start < n:
            end = start
            while end < n and end - start < self._max_blocks and not self._known(run.blocks[end]):
                end += 1
            if end > start:
                self._make_room(end - start)
                self._tell_removals()
                self._events.append(self._event(run, start, end))
                for block in run.blocks[start:end]:
                    self._published.update(dict.fromkeys(block.keys, block))
                self._n_published += end - start
            start = max(end, start + 1)

    def _known(self, block: _Block) -> bool:
        return any(key in self._published for key in block.keys)

    def _make_room(self, n: int) -> None:
        while self._n_published + n > self._max_blocks:
            self._remove(next(iter(self._published.values())))

    def _event(self, run: _Run, start: int, end: int) -> Any:
        return self._engine.stored(
            block_hashes=[block.hash for block in run.blocks[start:end]],
            parent_block_hash=run.blocks[start - 1].hash if start else run.parent,
            token_ids=run.tokens[start * self._block_size : end * self._block_size],
            block_size=self._block_size,
            medium=_MEDIUM,
            extra_keys=None if run.extra_keys is None else run.extra_keys[start:end],
            group_idx=_GROUP,
            **run.about,
        )

    def _rest(self, run: _Run, n: int) -> _Run:
        if not n:
            return run
        extra = None if run.extra_keys is None else run.extra_keys[n:]
        tokens = run.tokens[n * self._block_size :]
        return _Run(run.blocks[n:], run.blocks[n - 1].hash, tokens, extra, run.about, run.since_s)


def _resident(pool: Pool, blocks: Sequence[_Block]) -> npt.NDArray[np.bool_]:
    """[n]: which blocks are in the pool, every rank's part. Raises PoolClosed."""
    there = np.ones(len(blocks), np.bool_)
    by_handles: dict[tuple[SpaceHandle, ...], list[int]] = {}
    for number, block in enumerate(blocks):
        by_handles.setdefault(block.handles, []).append(number)
    for handles, numbers in by_handles.items():
        for rank, handle in enumerate(handles):
            keys = np.frombuffer(b"".join(blocks[number].keys[rank] for number in numbers), np.uint64)
            there[numbers] &= pool.resident(handle, keys.reshape(-1, 2))
    return there
