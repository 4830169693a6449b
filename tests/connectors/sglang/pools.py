"""One SGLang rank without an engine: its real configuration, host pool, storage factory and page hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, HiCacheStorageExtraInfo
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.base import HostKVCache, host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.runtime_context import get_context, reset_context
from sglang.srt.server_args import ServerArgs

from penstock.connectors.sglang import PenstockStorage

PAGE = 64
LAYERS = 2
DYNAMIC = {
    "backend_name": "penstock",
    "module_path": "penstock.connectors.sglang",
    "class_name": "PenstockStorage",
    "interface_v1": 1,
}


def make_model(folder: Path, seed: int, **config: Any) -> Path:
    """A model's folder as far as its identity goes: a configuration and a file of weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 10000.0} | config))
    (folder / "model.safetensors").write_bytes(np.random.default_rng(seed).bytes(1000))
    return folder


def publish_settings(**settings: Any) -> None:
    """What SGLang's scheduler does at its start."""
    get_context().set_server_args(ServerArgs(**settings))


def forget_settings() -> None:
    reset_context()


def host_pool(
    layout: str = "page_first_direct", kind: str = "mha", dtype: torch.dtype = torch.bfloat16, pages: int = 16
) -> HostKVCache:
    """A real host pool of `pages` pages and one that SGLang adds, for a small device pool."""
    common: dict[str, Any] = {"size": PAGE, "page_size": PAGE, "dtype": dtype, "layer_num": LAYERS, "device": "cpu"}
    common["enable_memory_saver"] = False
    mine: dict[str, Any] = {"device_capacity_tokens": PAGE, "start_layer": 0, "end_layer": LAYERS, "pin_memory": False}
    # The real check wants 10 GB to stay free on the machine.
    with host_memory_budget_scope(1 << 28):
        if kind == "mha":
            info = MHATokenToKVPool(head_num=1, head_dim=16, **common)._mha_buffer_info()
            return MHATokenToKVPoolHost(info, float(pages), 0, PAGE, layout, **mine)
        info = MLATokenToKVPool(kv_lora_rank=24, qk_rope_head_dim=8, **common)._mla_buffer_info()
        return MLATokenToKVPoolHost(info, float(pages), 0, PAGE, layout, target_layer_num=LAYERS, **mine)


def storage_config(extra: dict[str, Any], **changes: Any) -> HiCacheStorageConfig:
    values: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "tiny",
    }
    return HiCacheStorageConfig(**(values | changes), extra_config=DYNAMIC | extra)


def page_hashes(seed: int, n_pages: int) -> list[str]:
    """SGLang's hashes of the pages of a sequence of tokens."""
    tokens = np.random.default_rng(seed).integers(0, 32_000, n_pages * PAGE).tolist()
    hashes: list[str] = get_hash_str(tokens, None, PAGE)
    return hashes


def page_content(like: torch.Tensor, key: str) -> torch.Tensor:
    """The page that belongs to a hash, of the type and length of `like`: the same in every process and layout."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    bits = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, like.nbytes, dtype=np.uint8))
    return bits.view(like.dtype)


class SglangRank:
    """A storage backend, made by SGLang's factory, with a host pool of its own."""

    def __init__(
        self,
        *,
        pool: str,
        model: Path,
        layout: str = "page_first_direct",
        kind: str = "mha",
        dtype: torch.dtype = torch.bfloat16,
        pages: int = 16,
        settings: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        publish_settings(model_path=str(model), **(settings or {}))
        self.host = host_pool(layout, kind, dtype, pages)
        self.host.kv_buffer.zero_()
        given = {"pool": pool, "save_wait_s": 10.0} | (extra or {})
        full = storage_config(given, **({"is_mla_model": kind == "mla"} | config))
        self.storage: PenstockStorage = StorageBackendFactory.create_backend("dynamic", full, self.host)
        self.storage.register_mem_pool_host(self.host)
        self.storage.on_host_pools_registered()

    def indices(self, n_pages: int) -> torch.Tensor:
        """The host pool's last pages, the last one first, so that place and order are not those of the sequence."""
        pages = torch.arange(self.host.page_num - 1, self.host.page_num - 1 - n_pages, -1)
        return (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def set(self, keys: list[str], prefix: list[str] | None) -> list[bool]:
        """Fill host pages with what belongs to these hashes, and store them."""
        indices = self.indices(len(keys))
        for i, key in enumerate(keys):
            page = page_content(self.host.get_dummy_flat_data_page(), key)
            self.host.set_from_flat_data_page(int(indices[i * PAGE]), page)
        stored: list[bool] = self.storage.batch_set_v1(keys, indices, HiCacheStorageExtraInfo(prefix_keys=prefix))
        self.host.kv_buffer.zero_()
        self.storage.flush(10.0)
        return stored

    def get(self, keys: list[str]) -> list[bool]:
        """Load pages; True where SGLang would use them. Fails if one of those is not what belongs to its hash."""
        indices = self.indices(len(keys))
        found: list[bool] = self.storage.batch_get_v1(keys, indices, HiCacheStorageExtraInfo())
        for i, key in enumerate(keys):
            page = self.host.get_data_page(int(indices[i * PAGE]))
            assert not found[i] or torch.equal(page.view(torch.uint8), page_content(page, key).view(torch.uint8)), i
        return found

    def exists(self, keys: list[str]) -> int:
        """How many leading pages the storage says it has."""
        return self.storage.batch_exists(keys, HiCacheStorageExtraInfo())
