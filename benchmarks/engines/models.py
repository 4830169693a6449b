"""The model of the comparison: a Llama of 27.8 million random bf16 parameters, 8 KiB of KV a token.

What it says is noise; how long it takes is that of a model of its size. The same call writes the same files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["PARAMETERS", "VOCAB", "write_model"]

VOCAB = 4096
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 512, 8, 8, 4, 64, 1408
PARAMETERS = 2 * VOCAB * HIDDEN + LAYERS * (2 * HIDDEN * HEAD_DIM * (HEADS + KV_HEADS) + 3 * HIDDEN * INTERMEDIATE)


def write_model(folder: Path) -> Path:
    """Write the checkpoint to `folder`, or leave one that is there alone; returns the folder."""
    if (folder / "config.json").exists():
        return folder
    from safetensors.torch import save_file

    import penstock

    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    shipped = Path(penstock.__file__).parent / "assets" / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shipped / name, folder / name)
    # Last: its presence says that the folder is whole.
    (folder / "config.json").write_text(json.dumps(_config(), indent=1, sort_keys=True))
    return folder


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden_act": "silu",
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip


def _weights() -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(20)

    def random(n_out: int, n_in: int) -> torch.Tensor:
        return (torch.randn(n_out, n_in, generator=generator) * n_in**-0.5).bfloat16()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    weights: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": random(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            f"{at}input_layernorm.weight": ones.clone(),
            f"{at}post_attention_layernorm.weight": ones.clone(),
            f"{at}self_attn.q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{at}self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
            f"{at}mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
            f"{at}mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
            f"{at}mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
        }
    return weights
