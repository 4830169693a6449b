"""Further models for the tests on the engine: layers with sliding windows, and LoRA adapters with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engines.models import tiny_llama

WINDOW = 64
LORA_RANK = 4


def windowed_llama(folder: Path, *, seed: int = 3) -> Path:
    """A tiny Llama in which every other layer sees only the last WINDOW tokens; returns its folder."""
    tiny_llama(folder, layers=4, seed=seed)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config["sliding_window"] = WINDOW
    path.write_text(json.dumps(config, indent=1, sort_keys=True))
    return folder


def lora_adapter(folder: Path, *, layers: int = 3, hidden: int = 64, kv_size: int = 64, seed: int = 0) -> Path:
    """Write an adapter for `tiny_llama`'s key and value projections, strong enough to change answers; returns its
    folder. The same arguments give the same files; others are written over what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name in ("k_proj", "v_proj"):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(LORA_RANK, hidden, generator=generator) * hidden**-0.5
            tensors[f"{at}.lora_B.weight"] = torch.randn(kv_size, LORA_RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": 2 * LORA_RANK,
        "lora_dropout": 0.0,
        "r": LORA_RANK,
        "target_modules": ["k_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    return folder
