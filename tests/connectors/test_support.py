"""Which models are refused, and that the reason is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from penstock.connectors.transformers.cache import KvShape
from penstock.connectors.transformers.support import inspect_model
from penstock.errors import Refused
from tests.connectors.models import ROPE, SHAPES, make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "overrides"), SHAPES)
def test_ordinary_models_are_taken(family: str, overrides: dict[str, Any], dtype: torch.dtype) -> None:
    heads = overrides.get("num_key_value_heads", 4)
    model = make_model(family, dtype=dtype, **overrides)
    assert inspect_model(model) == KvShape(n_layers=3, n_heads=heads, head_dim=16, dtype=dtype)


def test_a_window_that_is_switched_off_is_no_window() -> None:
    model = MistralForCausalLM(MistralConfig(**ROPE, num_key_value_heads=2, sliding_window=None)).eval()
    assert inspect_model(model).n_heads == 2


def rope(**parameters: Any) -> PreTrainedModel:
    return make_model("llama", rope_parameters={"rope_theta": 10000.0, **parameters})


def deepseek() -> PreTrainedModel:
    config = DeepseekV3Config(
        **{**ROPE, "num_hidden_layers": 2}, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=2, n_routed_experts=4,
        n_group=1, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config).eval()


def bamba() -> PreTrainedModel:
    config = BambaConfig(
        **{**ROPE, "num_hidden_layers": 2}, num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4,
        mamba_d_head=32, mamba_n_groups=1, mamba_d_state=8,
    )  # fmt: skip
    return BambaForCausalLM(config).eval()


def llama4() -> PreTrainedModel:
    config = Llama4TextConfig(
        **ROPE, num_key_value_heads=2, head_dim=16, attention_chunk_size=32, intermediate_size_mlp=96,
        num_local_experts=2,
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


MAMBA: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
REFUSED: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "encoder-decoder": (
        "encoder-decoder",
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ).eval(),
    ),
    "cross-attention": ("cross-attention", lambda: make_model("gpt2", add_cross_attention=True)),
    "sliding": (
        "sliding-window",
        lambda: MistralForCausalLM(MistralConfig(**ROPE, num_key_value_heads=2, sliding_window=32)).eval(),
    ),
    "alternating": (
        "sliding-window",
        lambda: Gemma2ForCausalLM(Gemma2Config(**ROPE, num_key_value_heads=2, head_dim=16, sliding_window=32)).eval(),
    ),
    "chunked": ("chunked", llama4),
    "qwen-window": (
        "sliding-window",
        lambda: make_model("qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1),
    ),
    "state-space": ("state-space", lambda: MambaForCausalLM(MambaConfig(**MAMBA)).eval()),
    "falcon-mamba": (
        "state-space",
        lambda: FalconMambaForCausalLM(FalconMambaConfig(**MAMBA)).eval(),
    ),
    "hybrid": ("state-space", bamba),
    "latent": ("latent attention", deepseek),
    "dynamic-rope": ("'dynamic'", lambda: rope(rope_type="dynamic", factor=2.0)),
    "longrope": (
        "'longrope'",
        lambda: rope(
            rope_type="longrope",
            short_factor=[1.0] * 8,
            long_factor=[2.0] * 8,
            original_max_position_embeddings=256,
            factor=2.0,
        ),
    ),
    "looks-ahead": ("looks ahead", lambda: make_model("llama", is_causal=False)),
    "training": ("training mode", lambda: make_model("llama").train()),
    "device": ("meta", lambda: make_model("llama").to("meta")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_blocks_are_refused_with_the_reason(name: str) -> None:
    reason, make = REFUSED[name]
    with pytest.raises(Refused, match=reason):
        inspect_model(make())


def test_a_rope_that_only_a_module_names_is_refused() -> None:
    model = make_model("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(Refused, match="'dynamic'"):
        inspect_model(model)


def test_what_the_rope_check_guards_against_is_real() -> None:
    """With frequencies that follow the total length, the same first tokens get other keys."""
    model = make_model(
        "llama",
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )
    ids = torch.arange(64).unsqueeze(0)
    with torch.inference_mode():
        long = model(ids, use_cache=True).past_key_values.layers[0].keys[:, :, :16]
        short = model(ids[:, :16], use_cache=True).past_key_values.layers[0].keys
    assert not torch.allclose(long, short, atol=1e-2)
