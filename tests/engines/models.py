"""Models for the engine, written as checkpoint folders: tiny Llamas with random weights, and the model that is shipped.

All of them use the shipped model's tokenizer. The same arguments give the same files, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support import ROOT

SHIPPED = ROOT / "src" / "penstock" / "assets" / "model"
"""A trained Llama of 5.6 million parameters, bf16: 8 layers, 2 KV heads of 64, 16,384 positions. It writes text."""
VOCAB = 4096


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions. Query heads are twice the KV heads."""

    n_layers: int
    kv_heads: int
    head_dim: int
    max_position: int

    @property
    def query_size(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def hidden_size(self) -> int:
        return 2 * self.head_dim

    @property
    def intermediate_size(self) -> int:
        return 3 * self.head_dim


def tiny_llama(
    folder: Path,
    *,
    dtype: str = "float32",
    layers: int = 3,
    kv_heads: int = 2,
    head_dim: int = 32,
    max_position: int = 16384,
    seed: int = 0,
) -> Path:
    """Write a tiny Llama with random weights to `folder` (created, or left alone if it is there); returns it.

    Its greedy answers vary and depend on tokens all over the prompt, so that a block with wrong contents shows: the
    attention's projections are scaled up (each head looks at few positions, wherever they are) and the logits lie far
    apart. Answers have exactly `max_tokens` tokens, since requests ignore the end of a text.
    `dtype` is a torch dtype's name and is what the folder holds; the values behind it do not depend on it.
    """
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    shape = Shape(layers, kv_heads, head_dim, max_position)
    weights = {name: value.to(getattr(torch, dtype)) for name, value in _weights(shape, seed).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED / name, folder / name)
    # Last: its presence says that the folder is whole.
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=1, sort_keys=True))
    return folder


def shipped_float32(folder: Path) -> Path:
    """A copy of the shipped model in float32, where two ways to compute the same logits agree to the last token."""
    if (folder / "config.json").exists():
        return folder
    from safetensors.torch import load_file

    folder.mkdir(parents=True)
    weights = {name: value.float() for name, value in load_file(SHIPPED / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(SHIPPED / name, folder / name)
    config = {**json.loads((SHIPPED / "config.json").read_text()), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    return folder


def prompt_tokens(n_tokens: int, *seed: int) -> list[int]:
    """Token ids, none of them special; the same for the same arguments, and others from the first on for others."""
    generator = torch.Generator().manual_seed(hash((1, *seed)) & 0x7FFFFFFF)
    ids: list[int] = torch.randint(16, VOCAB - 16, (n_tokens,), generator=generator).tolist()
    return ids


def _config(shape: Shape, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": dtype,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position,
        "mlp_bias": False,
        "num_attention_heads": 2 * shape.kv_heads,
        "num_hidden_layers": shape.n_layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }


def _weights(shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(n_out: int, n_in: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(n_out, n_in, generator=generator) * (gain * n_in**-0.5)

    hidden = shape.hidden_size
    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": random(VOCAB, hidden, 4.0),
    }
    for layer in range(shape.n_layers):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": torch.ones(hidden),
            f"{at}post_attention_layernorm.weight": torch.ones(hidden),
            f"{at}self_attn.q_proj.weight": random(shape.query_size, hidden, 2.0),
            f"{at}self_attn.k_proj.weight": random(shape.kv_size, hidden, 2.0),
            f"{at}self_attn.v_proj.weight": random(shape.kv_size, hidden),
            f"{at}self_attn.o_proj.weight": random(hidden, shape.query_size, 2.0),
            f"{at}mlp.gate_proj.weight": random(shape.intermediate_size, hidden),
            f"{at}mlp.up_proj.weight": random(shape.intermediate_size, hidden),
            f"{at}mlp.down_proj.weight": random(hidden, shape.intermediate_size),
        }
    return weights
