"""The cache in reserved storage: equal to DynamicCache, and never written where a snapshot may be read."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from penstock.connectors.transformers.cache import KvShape, ReservedCache, snapshot_of
from penstock.errors import Refused
from tests.connectors.models import make_prompt

SHAPE = KvShape(n_layers=3, n_heads=2, head_dim=16, dtype=torch.float32)


def append(cache: DynamicCache, n_tokens: int, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for layer in range(SHAPE.n_layers):
        # As models give them: a transposed view.
        states = torch.randn(2, 1, n_tokens, SHAPE.n_heads, SHAPE.head_dim).transpose(2, 3)
        cache.update(states[0], states[1], layer)


def content(cache: DynamicCache) -> torch.Tensor:
    return torch.stack([half for layer in cache.layers for half in (layer.keys, layer.values)])


def filled(n_tokens: int, capacity: int = 32) -> ReservedCache:
    cache = ReservedCache(SHAPE, capacity)
    append(cache, n_tokens)
    return cache


@pytest.mark.parametrize("capacity", [4, 16, 64])
def test_appending_equals_dynamic_cache_also_when_storage_grows(capacity: int) -> None:
    ours, theirs = ReservedCache(SHAPE, capacity), DynamicCache()
    for step, n_tokens in enumerate((9, 1, 1, 20, 1)):
        append(ours, n_tokens, step)
        append(theirs, n_tokens, step)
        assert torch.equal(content(ours), content(theirs))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)


def test_appending_within_capacity_moves_nothing() -> None:
    cache = filled(10)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    append(cache, 22)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    append(cache, 1)
    assert [layer.keys.data_ptr() for layer in cache.layers] != before


@pytest.mark.parametrize("change", ["crop", "reset", "reorder", "select", "grow"])
def test_a_snapshot_keeps_its_bytes_whatever_the_cache_does(change: str) -> None:
    cache = filled(20, capacity=20 if change == "grow" else 64)
    snapshot = snapshot_of(cache, SHAPE)
    before = [tensor.clone() for tensor in snapshot.tensors]
    if change == "crop":
        cache.crop(-15)
    elif change == "reset":
        cache.reset()
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([0]))
    elif change == "select":
        cache.batch_select_indices(torch.tensor([0]))
    kept = cache.get_seq_length()
    assert kept == {"crop": 5, "reset": 0}.get(change, 20)
    append(cache, 30, seed=7)
    for tensor, copy in zip(snapshot.tensors, before, strict=True):
        assert torch.equal(tensor, copy)
    assert cache.get_seq_length() == kept + 30


def test_an_expanded_batch_is_refused() -> None:
    with pytest.raises(Refused, match="one request at a time"):
        filled(4).batch_repeat_interleave(2)
    with pytest.raises(Refused, match="a batch of 2"):
        cache = filled(4)
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)


def test_another_dtype_is_refused_and_changes_nothing() -> None:
    cache = filled(4)
    states = torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(Refused, match="autocast"):
        cache.update(states, states, 0)
    assert cache.get_seq_length() == 4


def test_maps_name_the_bytes_of_every_run() -> None:
    cache = filled(30)
    blocks = snapshot_of(cache, SHAPE).tensor_map(0, 3, 8)
    run_bytes = 8 * SHAPE.head_dim * 4
    base = cache.layers[2].values.data_ptr()
    found = blocks.seg_base[5] + blocks.block_index[2] * blocks.block_stride + 1 * blocks.run_stride
    assert found == base + (1 * 32 + 16) * SHAPE.head_dim * 4
    assert blocks.block_stride == run_bytes
    assert blocks.runs == SHAPE.n_heads


def test_snapshots_of_plain_caches_copy_only_what_kernels_cannot_walk(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.inference_mode():
        llama(input_ids=torch.tensor([make_prompt(20)]), past_key_values=cache)
        llama(input_ids=torch.tensor([make_prompt(2)]), past_key_values=cache)
    assert snapshot_of(cache, SHAPE).seg_base[0] == cache.layers[0].keys.data_ptr()
    for layer in cache.layers:
        layer.keys = layer.keys.transpose(2, 3).contiguous().transpose(2, 3)
    snapshot = snapshot_of(cache, SHAPE)
    assert snapshot.seg_base[0] != cache.layers[0].keys.data_ptr()
    assert torch.equal(snapshot.tensors[0], cache.layers[0].keys)


def test_caches_of_other_kinds_and_shapes_are_refused(llama: PreTrainedModel) -> None:
    other = KvShape(n_layers=3, n_heads=4, head_dim=16, dtype=torch.float32)
    half = KvShape(n_layers=3, n_heads=2, head_dim=16, dtype=torch.bfloat16)
    sliding = DynamicCache(config=llama.config)
    append(sliding, 3)
    sliding.layers[1].__class__ = type("OddLayer", (type(sliding.layers[1]),), {})
    cases: list[tuple[str, object, KvShape]] = [
        ("StaticCache", StaticCache(llama.config, 8), SHAPE),
        ("not a DynamicCache of 3", DynamicCache(), SHAPE),
        ("holds nothing", DynamicCache(config=llama.config), SHAPE),
        ("OddLayer", sliding, SHAPE),
        ("4, tokens, 16", filled(3), other),
        ("bfloat16", filled(3), half),
    ]
    for reason, cache, shape in cases:
        with pytest.raises(Refused, match=reason):
            snapshot_of(cache, shape)


def test_quantised_caches_are_refused(llama: PreTrainedModel) -> None:
    cache = QuantizedCache("fp8", llama.config)
    with pytest.raises(Refused, match="QuantizedCache"):
        snapshot_of(cache, SHAPE)
