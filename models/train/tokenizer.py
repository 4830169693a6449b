"""Train the byte-level BPE tokenizer and encode both texts.

    python tokenizer.py --work DIR --out MODEL_DIR

Reads `train.txt` and `heldout.txt` from DIR (see prepare_text.py); writes the tokenizer files into
MODEL_DIR and `train.npy`, `heldout.npy` (uint16 token ids, one end-of-text id after each document) into
DIR.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END = "<|endoftext|>"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every string can be encoded, and decoding gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=16384,
        clean_up_tokenization_spaces=False,
    )
    return wrapped


def save(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save it under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "backend"}, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """All documents in one row of uint16 ids, each followed by the end-of-text id."""
    ids: list[int] = []
    for start in range(0, len(documents), 256):
        for row in tokenizer(documents[start : start + 256])["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    options = args.parse_args()
    texts = {n: (options.work / f"{n}.txt").read_text().split("\f") for n in ("train", "heldout")}
    tokenizer = train_tokenizer(texts["train"])
    save(tokenizer, options.out)
    for name, documents in texts.items():
        ids = encode(tokenizer, documents)
        np.save(options.work / f"{name}.npy", ids)
        size = sum(len(d.encode()) for d in documents)
        print(f"{name}: {ids.size} tokens, {size / ids.size:.3f} bytes a token")


if __name__ == "__main__":
    main()
