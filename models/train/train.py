"""Train the demo model on one CPU thread, exporting a usable bf16 checkpoint every few minutes.

    python train.py --work DIR --out MODEL_DIR --minutes 50

Reads `train.npy` and `heldout.npy` from DIR (see tokenizer.py). Writes `config.json`,
`generation_config.json`, `model.safetensors` (bf16) and `training_log.jsonl` into MODEL_DIR; each file is
replaced whole.

The schedule follows the clock, not a step count, so that a slow or shared machine still ends in time; a
rerun is therefore close to, but not bit-equal with, the shipped weights. Three stages: windows of 256
tokens, then 512, then 4,096. In the last two half of the windows skip positions in their middle (PoSE, Zhu
et al. 2023, section 3), which shows the model rotary distances up to its 16,384 positions at no cost.
Matrices learn by Muon (Jordan et al. 2024; `torch.optim.Muon`), the embedding and the norms by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

POSITIONS = 16384
# (window length, windows a step, share of the time, share of windows with skipped positions)
STAGES = ((256, 32, 0.62, 0.0), (512, 16, 0.22, 0.5), (4096, 1, 0.16, 0.5))
LONG = 1024  # windows longer than this use the fused kernel, which needs no memory for the weights of attention
MUON_LR, ADAM_LR, WARMUP_STEPS, FINAL_LR = 0.02, 0.004, 60, 0.08
CHECKPOINT_S = 240


def model_config() -> LlamaConfig:
    """5.6 M parameters: narrow and deep with many query heads, so that prefill costs more than the weights
    suggest."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def grouped_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of (batch, heads, tokens, dim) as plain matrix products.

    On CPUs with bf16 instructions this is several times faster to train than the fused kernel at short
    windows; the query heads of one key/value head are stacked into one tall matrix.
    """
    b, h, t, d = q.shape
    g = k.shape[1]
    tall = (q * scaling).reshape(b * g, h // g * t, d)
    scores = torch.bmm(tall, k.reshape(b * g, t, d).transpose(1, 2)).view(b * g, h // g, t, t)
    ahead = torch.full((t, t), -30000.0, dtype=scores.dtype).triu(1)
    weights = torch.softmax(scores + ahead, -1, dtype=scores.dtype).view(b * g, h // g * t, t)
    return torch.bmm(weights, v.reshape(b * g, t, d)).view(b, h, t, d).transpose(1, 2), None


def fused_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The same by the fused kernel; always causal, where transformers' own would take skipped positions for
    a border between packed documents and mask it."""
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


class Loss(nn.Module):
    """Mean next-token loss in nats of one batch of windows."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def windows(tokens: np.ndarray, length: int, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Endless batches (batch, length + 1); each epoch cuts the text at another offset."""
    while True:
        starts = np.arange(rng.integers(length), len(tokens) - length - 1, length)
        rng.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            rows = [tokens[s : s + length + 1].astype(np.int64) for s in starts[i : i + batch]]
            yield torch.from_numpy(np.stack(rows))


def positions_for(batch: int, length: int, skipped: float, rng: np.random.Generator) -> Tensor:
    """Position ids (batch, length): counted from 0, except that a share of the rows skips ahead once."""
    rows = np.tile(np.arange(length), (batch, 1))
    for row in rows[rng.random(batch) < skipped]:
        at = int(rng.integers(1, length))
        row[at:] += rng.integers(POSITIONS - length)
    return torch.from_numpy(rows)


def rate(step: int, progress: float) -> float:
    """Share of the peak learning rate: warm-up by steps, then a cosine over the time that is left."""
    cosine = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest; each group keeps its peak rate in `peak`."""
    layers = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(layers, lr=MUON_LR, weight_decay=0.02, momentum=0.95)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        optimizer.param_groups[0]["peak"] = optimizer.param_groups[0]["lr"]
    return [muon, adam]


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Write the bf16 weights and the configs; each file is replaced whole, so no reader sees half of one."""
    part = out / ".part"
    copy: Any = LlamaForCausalLM(model_config())
    copy.load_state_dict(model.state_dict())
    generation: Any = GenerationConfig  # untyped in transformers
    copy.generation_config = generation(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False)
    copy.to(torch.bfloat16).save_pretrained(part)
    for file in part.iterdir():
        file.chmod(0o644)
        os.replace(file, out / file.name)
    part.rmdir()


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """Mean loss of 64 held-out windows of 256 tokens, spread evenly."""
    starts = np.linspace(0, len(tokens) - 258, 64).astype(int)
    ids = torch.from_numpy(np.stack([tokens[s : s + 257].astype(np.int64) for s in starts]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def train(work: Path, out: Path, budget_s: float) -> None:
    """Run all stages within `budget_s`; the log gets a line every ten steps."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tokens, heldout = np.load(work / "train.npy"), np.load(work / "heldout.npy")
    AttentionInterface.register("grouped", grouped_attention)
    AttentionInterface.register("fused", fused_attention)
    model = LlamaForCausalLM(model_config())
    groups = optimizers(model)
    plain = Loss(model)
    compiled = torch.compile(plain, dynamic=False)
    begin = saved = time.monotonic()
    step = seen = 0
    stage_end = 0.0
    with (out / "training_log.jsonl").open("w", buffering=1) as log:
        for length, count, share, skipped in STAGES:
            stage_end += share
            model.config._attn_implementation = "fused" if length > LONG else "grouped"
            loss_of = plain if length > LONG else compiled
            for batch in windows(tokens, length, count, rng):
                progress = (time.monotonic() - begin) / budget_s
                if progress >= stage_end:
                    break
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(batch, positions_for(len(batch), length, skipped, rng))
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in groups:
                    group = optimizer.param_groups[0]
                    group["lr"] = group["peak"] * rate(step, progress)
                    optimizer.step()
                    optimizer.zero_grad()
                step, seen = step + 1, seen + length * len(batch)
                if step % 10 == 0:
                    line = {
                        "step": step,
                        "tokens": seen,
                        "window": length,
                        "loss": round(loss.item(), 4),
                        "lr": round(rate(step, progress), 5),
                        "time_s": round(time.monotonic() - begin, 1),
                    }
                    if step % 100 == 0:
                        line["heldout_loss"] = round(heldout_loss(model, heldout), 4)
                    log.write(json.dumps(line) + "\n")
                if time.monotonic() - saved > CHECKPOINT_S:
                    export(model, out)
                    saved = time.monotonic()
    export(model, out)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--minutes", type=float, default=50.0)
    args.add_argument("--threads", type=int, default=1)
    options = args.parse_args()
    torch.set_num_threads(options.threads)
    train(options.work, options.out, options.minutes * 60)


if __name__ == "__main__":
    main()
