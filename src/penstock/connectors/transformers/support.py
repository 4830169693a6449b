"""Which models can be stored block by block, and the shape of what they store.

A block holds the keys and values of its tokens, and may be used wherever the same tokens come first. That is
true of causal attention over all earlier tokens with positions counted from the start; whatever else a model
does is refused here, with the reason. Covers the model's configuration and a forward pass over a few tokens.
Does not cover requests (`connector.py`), nor what makes two models equal (`spaces.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from penstock.connectors.transformers.cache import KvShape
from penstock.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # by this name since transformers 5

__all__ = ["inspect_model", "max_positions", "text_config"]

# Rope kinds whose frequencies follow from the configuration alone. "dynamic" and "longrope" choose theirs by
# the total length of the request (transformers, modeling_rope_utils.dynamic_rope_update).
_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})

_LAYER_REASONS = {
    "sliding": "sliding-window or chunked attention keeps only the last tokens",
    "linear": "linear attention, convolutions and state-space layers keep a running state instead of tokens",
    "quantized": "a quantised cache keeps some tokens in another form",
    "indexed": "sparse attention keeps index keys besides keys and values",
    "dummy": "layers that share another layer's keys and values, or keep none, have no block of their own",
    "static": "a static cache is not filled token by token",
}
_PROBE_TOKENS = 8
_PROBE_PREFIX = 5
# How far keys of the same tokens may be apart when computed in other pieces, relative to the largest one.
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_PROBE_TOLERANCE_HALF = 0.06
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def inspect_model(model: Any) -> KvShape:
    """The shape of what `model` stores. Runs two forward passes over a few tokens.

    Raises Refused, naming the reason, for a model that cannot be stored block by block.
    """
    config = model.config
    check_mode(model)
    _check_kind(config)
    for section in _sections(text_config(model)):
        _check_rope(section)
    _check_rope_modules(model)
    _check_planned_layers(text_config(model))
    full = _probe(model, _PROBE_TOKENS)
    shape = _shape_of(full)
    _check_causal(full, _probe(model, _PROBE_PREFIX), shape)
    return shape


def check_mode(model: Any) -> None:
    """Refused for a model that is not on the CPU, or that is in training mode. Cheap."""
    if model.training:
        raise Refused("the model is in training mode, where dropout makes every pass different: call model.eval()")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise Refused(
            f"the model is on {', '.join(sorted(devices)) or 'no device'}: this connector serves models on "
            "the CPU, load it there"
        )


def text_config(model: Any) -> PreTrainedConfig:
    """The part of the configuration that speaks of the decoder."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    return config


def max_positions(model: Any) -> int | None:
    """Tokens that the model has positions for; None where it does not say."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _check_kind(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise Refused("an encoder-decoder model: its cache depends on the encoder's input besides the tokens before")
    if getattr(config, "add_cross_attention", False):
        raise Refused("cross-attention: its keys come from another model's states, not from the tokens before")


def _check_rope(rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _FIXED_ROPE:
        raise Refused(
            f"rope type {kind!r}: only {', '.join(sorted(_FIXED_ROPE))} are known to give a token the same "
            "keys in requests of every length. Load the model with one of those"
        )


def _sections(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rope settings of a configuration: one mapping, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        if isinstance(rope, Mapping):
            nested = [value for value in rope.values() if isinstance(value, Mapping)]
            yield from nested or [rope]


def _check_rope_modules(model: Any) -> None:
    """The modules too: remote code and older configurations name their rope only there."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, Mapping) else [kind]
        for one in kinds:
            if isinstance(one, str):
                _check_rope({"rope_type": one})


def _check_planned_layers(config: PreTrainedConfig) -> None:
    """The layers that transformers itself would plan for this configuration."""
    try:
        cache = DynamicCache(config=config)
    except (KeyError, ValueError, AttributeError) as error:
        raise Refused(f"transformers plans no plain cache for this configuration ({error})") from error
    _check_layers(cache)


def _check_layers(cache: Any) -> None:
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is not DynamicLayer:
            name = type(layer).__name__
            reasons = [reason for word, reason in _LAYER_REASONS.items() if word in name.lower()]
            raise Refused(f"layer {index} keeps a {name}: {'; '.join(reasons) or 'not plain keys and values'}")


def _probe(model: Any, n_tokens: int) -> Any:
    """The cache that the model itself makes for the first few token ids."""
    ids = (torch.arange(n_tokens) % text_config(model).vocab_size).unsqueeze(0)
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=True)
    cache = output.get("past_key_values")
    if cache is None:
        raise Refused(
            f"{type(model).__name__} returns no past_key_values: models that keep a running state (state-"
            "space, recurrent) have no blocks"
        )
    if type(cache) is not DynamicCache:
        raise Refused(f"{type(model).__name__} keeps a {type(cache).__name__}: only a DynamicCache has plain layers")
    _check_layers(cache)
    return cache


def _shape_of(cache: Any) -> KvShape:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if not tensors or any(tensor is None or tensor.dim() != 4 for tensor in tensors):
        raise Refused("some layers keep no keys and values of [batch, heads, tokens, size]")
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
    if len(shapes) > 1:
        found = ", ".join(sorted(f"{list(shape)} {dtype}" for shape, dtype in shapes))
        raise Refused(
            f"keys and values of different shapes ({found}): latent attention (MLA) and layers of different "
            "sizes have no common block"
        )
    (((batch, n_heads, n_tokens, head_dim), dtype),) = shapes
    if (batch, n_tokens) != (1, _PROBE_TOKENS) or dtype not in _DTYPES:
        raise Refused(f"{_PROBE_TOKENS} tokens left keys of {[batch, n_heads, n_tokens, head_dim]} {dtype}")
    return KvShape(len(cache.layers), n_heads, head_dim, dtype)


def _check_causal(full: Any, prefix: Any, shape: KvShape) -> None:
    """Keys and values of the first tokens must not depend on the tokens that follow."""
    tolerance = _PROBE_TOLERANCE.get(shape.dtype, _PROBE_TOLERANCE_HALF)
    for index, (long, short) in enumerate(zip(full.layers, prefix.layers, strict=True)):
        for a, b in ((long.keys, short.keys), (long.values, short.values)):
            apart = (a[:, :, :_PROBE_PREFIX].float() - b.float()).abs().max().item()
            # Written so that a NaN is refused too.
            if not apart <= tolerance * max(b.float().abs().max().item(), 1e-6):
                raise Refused(
                    f"keys or values of layer {index} change by {apart:.3g} when more tokens follow: "
                    "attention that looks ahead (is_causal=False, prefix models), or random computation"
                )
