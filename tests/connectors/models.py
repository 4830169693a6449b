"""Tiny models with random weights, made in the process from their configurations."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 256
MAX_POSITIONS = 512

# A wide initialisation spreads the logits: with the usual one every token is a near-tie of every other.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
GPT2: dict[str, Any] = {**COMMON, "n_positions": MAX_POSITIONS, "n_embd": 64, "n_layer": 3, "n_head": 4}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**{**ROPE, **kw})),
    "qwen2": lambda **kw: Qwen2ForCausalLM(Qwen2Config(**{**ROPE, **kw})),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**{**ROPE, "head_dim": 16, **kw})),
    "gpt2": lambda **kw: GPT2LMHeadModel(GPT2Config(**{**GPT2, **kw})),
}
SHAPES = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"num_key_value_heads": 4}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 1}),
    ("qwen3", {"num_key_value_heads": 4}),
    ("gpt2", {}),
]


def make_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A model in evaluation mode; the same arguments give the same weights."""
    torch.manual_seed(seed)
    if family != "gpt2":
        overrides.setdefault("num_key_value_heads", 2)
    return FAMILIES[family](**overrides).to(dtype).eval()


def make_prompt(n_tokens: int, *, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n_tokens,), generator=generator).tolist()


def alone(model: PreTrainedModel, prompt: list[int], n_tokens: int) -> list[int]:
    """What plain transformers generates, greedily."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def unique_name() -> str:
    return f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
