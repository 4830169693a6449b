"""Prompts: fresh ones, and the conversation trace scaled down with its sharing kept."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engines.models import VOCAB

__all__ = ["Turn", "fresh_prompt", "ideal_hits", "read_turns"]

TRACE_BLOCK = 512
"""Tokens that a hash id of the trace stands for."""
SHRINK = 16
_SPECIAL = 16
_MAX_OUTPUT = 32
_SEED = 20


@dataclass(frozen=True)
class Turn:
    """One request of the traffic."""

    prompt: list[int]
    max_tokens: int


def fresh_prompt(n_tokens: int, *name: object) -> list[int]:
    """Random token ids, none of them special; others for every name."""
    source = random.Random(repr(name))
    return [source.randrange(_SPECIAL, VOCAB) for _ in range(n_tokens)]


def read_turns(trace: Path, n: int, *, salt: str, max_tokens: int) -> list[Turn]:
    """`n` requests of whole conversations of the trace, in the trace's order, a sixteenth as long.

    Two requests are of one conversation if they share the block after the system prompt. Conversations are drawn until
    there are enough requests, the share of those with several turns being the trace's. Blocks that were equal are equal
    tokens, and others are not. `salt` makes another run's tokens others. Prompts longer than `max_tokens` are left out.
    """
    with gzip.open(trace, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    conversations: dict[int, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        if len(row["hash_ids"]) > 1 and row["input_length"] // SHRINK <= max_tokens:
            conversations[row["hash_ids"][1]].append(at)
    drawn = random.Random(_SEED).sample([*conversations.values()], len(conversations))
    chosen: list[int] = []
    for turns in drawn:
        if len(chosen) >= n:
            break
        chosen += turns[: n - len(chosen)]
    return [_turn(rows[at], salt) for at in sorted(chosen)]


def _turn(row: dict[str, object], salt: str) -> Turn:
    ids, length = row["hash_ids"], int(row["input_length"])  # type: ignore[call-overload]
    block = TRACE_BLOCK // SHRINK
    tokens = [token for number in ids for token in fresh_prompt(block, "trace", salt, number)]  # type: ignore[attr-defined]
    n_tokens = max(length // SHRINK, 2)
    if n_tokens % block == 1:
        # One token after a full block: ExampleConnector answers with a negative number of tokens there.
        n_tokens += 1
    output = int(row["output_length"]) // SHRINK  # type: ignore[call-overload]
    return Turn(tokens[:n_tokens], min(max(output, 1), _MAX_OUTPUT))


def ideal_hits(turns: Sequence[Turn], block_tokens: int) -> list[int]:
    """For each request the tokens that need not be computed if every full block of every earlier prompt is kept.

    The last token of a prompt is always computed: the next one is drawn from its logits.
    """
    seen: set[bytes] = set()
    hits = []
    for turn in turns:
        keys = _keys(turn.prompt, block_tokens)
        n_found = next((at for at, key in enumerate(keys) if key not in seen), len(keys))
        hits.append(min(n_found * block_tokens, len(turn.prompt) - 1))
        seen.update(keys)
    return hits


def _keys(tokens: list[int], block_tokens: int) -> list[bytes]:
    keys, before = [], b""
    for first in range(0, len(tokens) - block_tokens + 1, block_tokens):
        data = before + repr(tokens[first : first + block_tokens]).encode()
        before = hashlib.blake2b(data, digest_size=16).digest()
        keys.append(before)
    return keys
