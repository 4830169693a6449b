"""Measure the exported bf16 weights on the held-out text and write `metrics.json` next to them.

    python evaluate.py --work DIR --out MODEL_DIR

Perplexity and bits per byte over the whole held-out text in windows of 1,024 tokens (the first token of a
window is not scored); the loss by position in windows of 16,384 tokens, which says how far past its
training lengths the model can be trusted; prefill time; and a few greedy continuations. Reads
`heldout.npy`, `sources.json` from DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

WINDOW = 1024
POSITION_EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384)
PROMPTS = (
    "The king said to his people,",
    "To install the package, you must first",
    "When the function is called with a negative number, it",
    "The old wizard looked at the orcs and said:",
)


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Loss in nats of every token of each window (batch, tokens) but the first: (batch, tokens - 1), fp32."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def cut(tokens: np.ndarray, length: int) -> Tensor:
    """All whole windows of `length` tokens, without overlap."""
    count = len(tokens) // length
    return torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length)


def perplexity(model: Any, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> dict[str, Any]:
    """Over all windows of WINDOW tokens; an end-of-text token costs loss but no bytes."""
    nats, scored, size = 0.0, 0, 0
    for ids in torch.split(cut(tokens, WINDOW), 8):
        losses = token_losses(model, ids)
        nats, scored = nats + losses.sum().item(), scored + losses.numel()
        size += sum(len(t.encode()) for t in tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True))
    return {
        "window": WINDOW,
        "tokens": scored,
        "loss_nats": round(nats / scored, 4),
        "perplexity": round(math.exp(nats / scored), 3),
        "bits_per_byte": round(nats / math.log(2) / size, 4),
    }


def by_position(model: Any, tokens: np.ndarray, windows: int) -> dict[str, dict[str, float]]:
    """Perplexity of the tokens in each range of positions: with all the text before them, in windows of all
    16,384 positions, and the same tokens seen in windows of WINDOW only, which tells position from text."""
    length = POSITION_EDGES[-1]
    whole = cut(tokens, length + 1)[:windows]
    long = torch.cat([token_losses(model, row[None]) for row in whole])
    inputs, targets = whole[:, :-1].reshape(-1, WINDOW), whole[:, 1:].reshape(-1, WINDOW)
    pieces = torch.cat([inputs, targets[:, -1:]], 1)
    short = torch.cat([token_losses(model, part) for part in torch.split(pieces, 8)]).view(windows, length)
    return {
        f"{a}-{b}": {name: round(math.exp(x[:, a:b].mean().item()), 3) for name, x in rows}
        for a, b in pairwise(POSITION_EDGES)
        for rows in [(("all_before", long), (f"windows_of_{WINDOW}", short))]
    }


@torch.no_grad()
def prefill_seconds(model: Any, tokens: np.ndarray, length: int, threads: int) -> float:
    """The fastest of ten prefills of `length` tokens with `threads` threads: other work only adds to it."""
    ids = torch.from_numpy(tokens[:length].astype(np.int64))[None]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return round(min(times), 3)


def sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, str]:
    """A greedy continuation and one drawn at temperature 0.7 from the 40 likeliest tokens (seed 1)."""
    ids = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(1)
    out = {"prompt": prompt}
    for name, how in (("greedy", {}), ("drawn", {"do_sample": True, "temperature": 0.7, "top_k": 40})):
        row = model.generate(**ids, max_new_tokens=60, **how)[0]
        out[name] = str(tokenizer.decode(row[ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return out


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--long-windows", type=int, default=3)
    options = args.parse_args()
    torch.set_num_threads(options.threads)
    model: Any = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    tokens = np.load(options.work / "heldout.npy")
    log = [json.loads(line) for line in (options.out / "training_log.jsonl").read_text().splitlines()]
    report = {
        "parameters": model.num_parameters(),
        "weights_bytes": (options.out / "model.safetensors").stat().st_size,
        "trained_tokens": log[-1]["tokens"],
        "trained_s": log[-1]["time_s"],
        "heldout": perplexity(model, tokenizer, tokens),
        "long_windows": options.long_windows,
        "perplexity_by_position": by_position(model, tokens, options.long_windows),
        "prefill_3000_tokens_s": {f"{n}_threads": prefill_seconds(model, tokens, 3000, n) for n in (1, 2)},
        "samples": [sample(model, tokenizer, p) for p in PROMPTS],
        "sources": json.loads((options.work / "sources.json").read_text()),
    }
    (options.out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "sources"}, indent=1))


if __name__ == "__main__":
    main()
