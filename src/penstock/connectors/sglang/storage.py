"""SGLang's storage interface over a pool.

    --enable-hierarchical-cache --page-size 64 --hicache-mem-layout page_first_direct
    --hicache-storage-backend dynamic
    --hicache-storage-backend-extra-config '{"backend_name": "penstock",
        "module_path": "penstock.connectors.sglang", "class_name": "PenstockStorage",
        "interface_v1": 1, "hicache_storage_pass_prefix_keys": true}'

A page is a block; its key is made from SGLang's own page hash, which stands for every token up to the page's end.
SGLang asks from threads of its own (one that looks up, one that loads, one that stores), so nothing here is on a
request's path, and nothing here raises once the backend is attached: what fails is a counted miss. Covers one rank.
Does not cover what a page's bytes are (`hostpool.py`) or who may share them (`spaces.py`).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from penstock import Drop, KeyChain, Miss, Pool, Space, SpaceHandle, TensorMap
from penstock.connectors.counters import Counters
from penstock.connectors.sglang.hostpool import HostPages, inspect_host_pool
from penstock.connectors.sglang.options import parse_options
from penstock.connectors.sglang.spaces import identify_model, space_of
from penstock.connectors.transformers.attachment import Attachment
from penstock.errors import Refused
from penstock.identity.foreign import foreign_chain

__all__ = ["PenstockStorage"]

_log = logging.getLogger("penstock.connector")

# Slots are granted ahead up to a sixteenth of the pool in all: more at once would come short in small pools.
_BATCH_BLOCKS = 16
# Pages looked up at once: each is leased meanwhile, and a client has a few thousand leases.
_FIND_BLOCKS = 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Bound:
    """The host pool's pages and the space that they are blocks of."""

    pages: HostPages
    space: Space


class PenstockStorage(HiCacheStorage):  # type: ignore[misc,unused-ignore]
    """One rank's tie to a pool. Thread-safe after `register_mem_pool_host`.

    Without a keeper SGLang starts and runs without hits; the rank attaches when there is one. Raises ConfigError and
    Refused while it is being attached, and nothing afterwards.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        """Reads the model's weights for their digest, once per machine (about 1 GB/s and core). `kwargs` are SGLang's
        and not used."""
        self._config = storage_config
        self._options = parse_options(storage_config.extra_config)
        self._model = identify_model(self._options)
        self._counters = Counters()
        self._attachment = Attachment(None, self._options.pool, self._counters)
        self._label = str(storage_config.model_name or "sglang").rstrip("/").rsplit("/", 1)[-1]
        self._bound: _Bound | None = None
        self._others: list[str] = []
        self._told_of_prefix = False

    # ---- attaching

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the host pool whose pages are stored. Raises Refused or ConfigError for one that cannot be."""
        super().register_mem_pool_host(mem_pool_host)
        pages = inspect_host_pool(mem_pool_host)
        self._bound = _Bound(pages, space_of(self._model, pages, self._config, self._options, epoch=0))
        self._attachment.prepare(self._bound.space, self._label)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: str) -> None:
        """Remember a further host pool; `on_host_pools_registered` refuses all but the KV pool."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            self._others.append(str(host_pool_name))

    def on_host_pools_registered(self) -> None:
        """Raises Refused for a model with more state than one KV pool."""
        if self._others:
            raise Refused(
                f"this model keeps more than one kind of state ({', '.join(self._others)}): penstock stores plain "
                "attention KV only. Start SGLang without --hicache-storage-backend"
            )

    @property
    def space(self) -> Space | None:
        """The space of this rank's pages; None before the host pool was registered."""
        return None if self._bound is None else self._bound.space

    def counters(self) -> dict[str, int]:
        """Pages found, loaded and stored, and misses and drops by reason, so far."""
        return self._counters.read()

    def flush(self, timeout_s: float = 1.0) -> bool:
        """Wait until the keeper has taken in what was stored; False if that took longer or there is no keeper."""
        pool = self._attachment.pool
        return pool is not None and self._guarded(lambda: pool.flush(timeout_s), False)

    def clear(self) -> bool:
        """Never find again what was stored before, here: this process goes over to a space of its own until it is
        started anew. Other processes keep theirs. To be called after the weights were updated."""
        bound = self._bound
        if bound is not None:
            # Not a count: two processes that were both cleared once need not have the same weights.
            epoch = secrets.randbits(63) | 1
            space = space_of(self._model, bound.pages, self._config, self._options, epoch)
            self._bound = _Bound(bound.pages, space)
        return True

    def close(self) -> None:
        """Detach from the pool. Idempotent."""
        self._guarded(self._attachment.close, None)

    # ---- what SGLang asks with `interface_v1`

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages, from the first, are in the pool."""
        return self._guarded(lambda: self._find(keys), 0)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Copy pages into the host pool; True for those, from the first, that are good.

        Pages behind them may have been written with bytes that must not be used.
        """
        n_good = self._guarded(lambda: self._load(keys, host_indices), 0)
        return [i < n_good for i in range(len(keys))]

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages; True for those, from the first, that are in the pool or on their way."""
        prefix = None if extra_info is None else extra_info.prefix_keys
        n_stored = self._guarded(lambda: self._save(keys, host_indices, prefix), 0)
        return [i < n_stored for i in range(len(keys))]

    def exists(self, key: str) -> bool:
        """Whether the page is in the pool."""
        return self.batch_exists([key]) == 1

    # ---- what SGLang asks only for other pools, or without `interface_v1`

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """As `batch_exists`; nothing where the pages of a further pool are needed as well."""
        if pool_transfers:
            return PoolTransferResult.empty()
        return PoolTransferResult(self.batch_exists(keys, extra_info), {})

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """False for every page of a further pool."""
        self._counters.add("get.other_pool")
        return {transfer.name: [False] * len(transfer.keys or []) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """False for every page of a further pool."""
        self._counters.add("set.other_pool")
        return {transfer.name: [False] * len(transfer.keys or []) for transfer in transfers}

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        """Nothing: pages are copied by `batch_get_v1`."""
        self._counters.add("get.not_v1")

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[None]:
        """Nothing, as `get`."""
        self._counters.add("get.not_v1", len(keys))
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """False: pages are copied by `batch_set_v1`."""
        self._counters.add("set.not_v1")
        return False

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """False, as `set`."""
        self._counters.add("set.not_v1", len(keys))
        return False

    # ---- inside

    def _guarded(self, ask: Callable[[], T], otherwise: T) -> T:
        try:
            return ask()
        except Exception as error:  # noqa: BLE001 - the border to the engine: even our bugs cost only the hit
            self._attachment.failed(error)
            return otherwise

    def _tied(self, what: str) -> tuple[_Bound, Pool, SpaceHandle] | None:
        """What a call works on; None, counted, without a host pool or a pool."""
        bound = self._bound
        if bound is None:
            self._counters.add(f"{what}.not_registered")
            return None
        found = self._attachment.handle(bound.space, self._label)
        if isinstance(found, Miss):
            self._counters.add(f"{what}.{found.name.lower()}")
            return None
        return bound, *found

    def _find(self, keys: Sequence[str]) -> int:
        tied = self._tied("exists")
        if tied is None:
            return 0
        _, pool, handle = tied
        found = 0
        while found < len(keys):
            part = keys[found : found + _FIND_BLOCKS]
            with pool.match(handle, _chain(handle.space, part)) as lease:
                found += len(lease)
                if len(lease) < len(part):
                    self._counters.add(f"exists.{Miss(lease.miss).name.lower()}")
                    break
        self._counters.add("exists.pages", found)
        return found

    def _load(self, keys: Sequence[str], host_indices: torch.Tensor) -> int:
        tied = self._tied("get")
        if tied is None or (tensors := self._locate("get", tied[0], host_indices, len(keys))) is None:
            return 0
        _, pool, handle = tied
        with pool.match(handle, _chain(handle.space, keys)) as lease:
            n = len(lease)
            good = lease.gather(tensors.blocks(slice(n)), verify=self._options.verify) if n else 0
            self._counters.add("get.pages", good)
            if good < len(keys):
                self._counters.add(f"get.{Miss(lease.miss).name.lower()}")
            return good

    def _save(self, keys: Sequence[str], host_indices: torch.Tensor, prefix: Sequence[str] | None) -> int:
        tied = self._tied("set")
        if tied is None or (tensors := self._locate("set", tied[0], host_indices, len(keys))) is None:
            return 0
        _, pool, handle = tied
        if prefix is None:
            self._tell_of_prefix()
        # From the last page of the prefix on: where a block is, those before it are.
        n_before = 1 if prefix else 0
        names = [key.encode() for key in [*(prefix or ()), *keys]]
        start = len(names) - len(keys) - n_before
        chain = foreign_chain(handle.space, names[start:], before=names[:start])
        n_there = self._there(pool, handle, chain, n_before)
        if n_there < n_before:
            # The pool takes no block whose parent is not there: nobody could find it.
            self._counters.add("set.orphan", len(keys))
            return 0
        n_stored = n_there - n_before
        self._counters.add("set.known", n_stored)
        while n_stored < len(keys):
            last = min(len(keys), n_stored + _BATCH_BLOCKS)
            part = chain[n_before + n_stored : n_before + last]
            stored = pool.store(handle, part, tensors.blocks(slice(n_stored, last)), wait_s=self._options.save_wait_s)
            self._counters.add("set.pages", stored.n_blocks)
            n_stored += stored.n_blocks
            if n_stored < last:
                self._counters.add(f"set.{Drop(stored.drop).name.lower()}", len(keys) - n_stored)
                break
        return n_stored

    def _there(self, pool: Pool, handle: SpaceHandle, chain: KeyChain, n_before: int) -> int:
        """How many blocks, from the first, the pool has; asks again where `n_before` may be on their way."""
        with pool.match(handle, chain) as lease:
            found = len(lease)
        if found >= n_before or not pool.flush(self._options.save_wait_s):
            return found
        with pool.match(handle, chain) as lease:
            return len(lease)

    def _locate(self, what: str, bound: _Bound, host_indices: torch.Tensor, n_pages: int) -> TensorMap | None:
        tensors = bound.pages.tensor_map(host_indices, n_pages)
        if tensors is None:
            self._counters.add(f"{what}.no_whole_pages", n_pages)
        return tensors

    def _tell_of_prefix(self) -> None:
        self._counters.add("set.without_prefix")
        if not self._told_of_prefix:
            self._told_of_prefix = True
            _log.warning(
                "SGLang does not say which pages come before those it stores, so the pool cannot keep them together "
                '(said once): set "hicache_storage_pass_prefix_keys": true in --hicache-storage-backend-extra-config'
            )


def _chain(space: Space, keys: Sequence[str]) -> KeyChain:
    return foreign_chain(space, [key.encode() for key in keys])
