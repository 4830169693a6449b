"""What is refused while SGLang attaches the backend, each time with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError, PenstockError, Refused

pytest.importorskip("sglang", reason="needs SGLang's wheel (`make test-engines`)")
pools = pytest.importorskip("tests.connectors.sglang.pools")
options = pytest.importorskip("penstock.connectors.sglang.options")
storage = pytest.importorskip("penstock.connectors.sglang.storage")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    pools.forget_settings()


def attach(model: Path, **changes: Any) -> None:
    """As SGLang does, with no keeper: none is needed to be refused."""
    pools.SglangRank(pool="nobody", model=model, **changes).storage.close()


REFUSED: dict[str, tuple[type[PenstockError], str, dict[str, Any]]] = {
    "lora": (Refused, "LoRA", {"settings": {"enable_lora": True}}),
    "dummy weights": (Refused, "dummy", {"settings": {"load_format": "dummy"}}),
    "interface": (ConfigError, '"interface_v1": 1', {"extra": {"interface_v1": 0}}),
    "unknown key": (ConfigError, "did you mean 'save_wait_s'", {"extra": {"save_waits": 1}}),
    "strange key": (ConfigError, "known are pool", {"extra": {"qqqqq": 1}}),
    "wrong type": (ConfigError, "tenant", {"extra": {"tenant": 3}}),
    "wrong wait": (ConfigError, "0 to 60", {"extra": {"save_wait_s": -1}}),
    "layout": (Refused, "--hicache-mem-layout", {"layout": "page_head"}),
    "fp8": (ConfigError, "kv_scales", {"dtype": pools.torch.float8_e4m3fn}),
    "run-time scales": (ConfigError, "fixed scales", {"dtype": pools.torch.float8_e4m3fn, "extra": {"kv_scales": "x"}}),
    "scales of nothing": (ConfigError, "unquantised", {"extra": {"kv_scales": "unit"}}),
    "split heads": (Refused, "tp_lcm_size", {"should_split_heads": True}),
}


@pytest.mark.parametrize(("error", "says", "changes"), REFUSED.values(), ids=REFUSED)
def test_refused(model: Path, error: type[PenstockError], says: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=says):
        attach(model, **changes)


@pytest.mark.parametrize("scales", ["unit", "checkpoint", "sha256:" + "a" * 64])
def test_quantised_pages_with_known_scales_are_taken(model: Path, scales: str) -> None:
    attach(model, dtype=pools.torch.float8_e4m3fn, extra={"kv_scales": scales})


def test_multimodal_models_are_refused(tmp_path: Path) -> None:
    model = pools.make_model(tmp_path / "model", seed=1, vision_config={"hidden_size": 8})
    with pytest.raises(Refused, match="vision_config"):
        attach(model)


def test_a_host_pool_of_another_class_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(pools.MHATokenToKVPoolHost):  # type: ignore[misc]
        pass

    monkeypatch.setattr(pools, "MHATokenToKVPoolHost", Odd)
    with pytest.raises(Refused, match="Odd"):
        attach(model)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("layer_num", 3, "draft"),
        ("storage_format_tag", "unified", "unified"),
        ("dcp_size", 2, "context parallelism"),
        ("kv_buffer", pools.torch.zeros(5, 5), "shape"),
        ("kv_buffer", None, "contiguous"),
    ],
)
def test_a_host_pool_that_is_not_as_it_should_be_is_refused(model: Path, name: str, value: Any, says: str) -> None:
    pools.publish_settings(model_path=str(model))
    host = pools.host_pool()
    setattr(host, name, value)
    backend = storage.PenstockStorage(pools.storage_config({"pool": "nobody"}))
    with pytest.raises(Refused, match=says):
        backend.register_mem_pool_host(host)
    backend.close()


def test_models_with_more_than_one_pool_are_refused(model: Path) -> None:
    rank = pools.SglangRank(pool="nobody", model=model)
    rank.storage.register_mem_host_pool_v2(rank.host, "kv")
    rank.storage.on_host_pools_registered()
    rank.storage.register_mem_host_pool_v2(rank.host, "mamba")
    with pytest.raises(Refused, match="mamba"):
        rank.storage.on_host_pools_registered()
    rank.storage.close()


def test_without_published_settings_it_is_refused() -> None:
    with pytest.raises(Refused, match="published no settings"):
        storage.PenstockStorage(pools.storage_config({}))


def test_a_model_that_is_not_on_the_machine_needs_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pools.publish_settings(model_path="nobody/nothing-like-this")
    with pytest.raises(ConfigError, match='"weights": "sha256:'):
        storage.PenstockStorage(pools.storage_config({}))
    storage.PenstockStorage(pools.storage_config({"weights": "sha256:" + "0" * 64})).close()


@pytest.mark.parametrize("found", ["0.5.22", "0.4.9", "0.6.0", "1.0"])
def test_other_versions_of_sglang_are_refused(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(options, "version", lambda name: found)
    with pytest.raises(Refused, match=options.TESTED):
        options.engine_version()


def test_the_tested_version_is_the_one_that_is_installed() -> None:
    assert options.engine_version() == options.TESTED
