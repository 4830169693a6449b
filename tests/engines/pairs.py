"""Pairs of servers on one pool, what they are expected to find and store, and the rule by which answers are equal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from penstock.connectors.equality import Equality, compare_tokens
from penstock.connectors.vllm.command import MIDDLEWARE
from tests.engines.client import Completion, complete
from tests.engines.models import VOCAB, tiny_llama
from tests.engines.server import ServerConfig, VllmServer, penstock_transfer
from tests.support import Keeper, until

BLOCK = 32
LEFT_ALONE = {"penstock": {"skip_load": True, "skip_save": True}}
"""`kv_transfer_params` of a request that has nothing to do with the pool."""


def float32(model: Path, **options: Any) -> ServerConfig:
    """A server that computes in float32: "auto" would make 16 bits of a checkpoint of 32."""
    return ServerConfig(model, dtype="float32", **options)


@dataclass(frozen=True)
class Trio:
    """The same float32 model three times, blocks of 32 tokens."""

    plain: ServerConfig
    """No connector: the reference."""
    one: ServerConfig
    """As vLLM starts by default, with asynchronous scheduling: loads run beside the steps."""
    other: ServerConfig
    """No chunked prefill, no prefix cache of its own, one step after the other: loads run before the step. Takes
    priorities. Both take headers."""

    @staticmethod
    def on(keeper: Keeper, models: Path) -> Trio:
        model, transfer = tiny_llama(models / "tiny-float32"), penstock_transfer(keeper.name)
        headers = ("--middleware", MIDDLEWARE)
        steps = ("--no-async-scheduling", "--scheduling-policy", "priority")
        plain = float32(model)
        one = replace(plain, kv_transfer=transfer, arguments=headers)
        other = replace(one, chunked_prefill=False, prefix_caching=False, arguments=headers + steps)
        return Trio(plain, one, other)


# ---- what a pool is expected to hold


def hit_of(n_stored: int, n_prompt: int, block: int = BLOCK) -> int:
    """Prompt tokens that come from elsewhere if the first `n_stored` tokens were stored: the full blocks, less the
    prompt's last token, which is always computed."""
    return min(n_stored // block * block, n_prompt - 1)


def computed(n_prompt: int, n_answer: int) -> int:
    """Tokens whose KV exists at the end: the answer's last one is never an input."""
    return n_prompt + n_answer - 1


def applied(keeper: Keeper) -> int:
    """Blocks that the keeper took in since it started."""
    return keeper.counters()["applied"]


@contextlib.contextmanager
def stores(keeper: Keeper, n_blocks: int) -> Iterator[None]:
    """What runs inside stores exactly so many new blocks: waits until they are in the pool, and sees that no more
    come before them."""
    before = applied(keeper)
    yield
    until(lambda: applied(keeper) >= before + n_blocks, f"{n_blocks} blocks are stored")
    assert applied(keeper) == before + n_blocks


def until_idle(keeper: Keeper) -> None:
    """Wait until nobody holds a lease on a block."""
    until(lambda: not any(row["leases"] for row in keeper.stat()["clients"]), "all leases are released")


# ---- equal answers


class ServedModel:
    """What a server says of given tokens, in the shape that `compare_tokens` asks a model in.

    Its logits are log-probabilities, which differ from logits by a constant in each row; only those of the best token
    and of the one that follows are known, the others are minus infinity. Prompts with `prompt_logprobs` use no prefix
    cache, neither vLLM's nor the pool's.
    """

    device = torch.device("cpu")

    def __init__(self, server: VllmServer, dtype: torch.dtype) -> None:
        self.server, self.dtype = server, dtype

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        ids = input_ids[0].tolist()
        choice = complete(
            self.server, ids, 1,
            prompt_logprobs=1, logprobs=5, return_tokens_as_token_ids=True, kv_transfer_params=LEFT_ALONE,
        ).raw["choices"][0]  # fmt: skip
        rows = [{token: found["logprob"] for token, found in row.items()} for row in choice["prompt_logprobs"][1:]]
        rows.append({name.removeprefix("token_id:"): p for name, p in choice["logprobs"]["top_logprobs"][0].items()})
        logits = torch.full((1, len(ids), VOCAB), -torch.inf)
        for at, row in enumerate(rows):
            for token, logprob in row.items():
                logits[0, at, int(token)] = logprob
        return SimpleNamespace(logits=logits)


def compare(
    reference: VllmServer, dtype: torch.dtype, prompt: Sequence[int], wanted: Completion, found: Completion
) -> Equality:
    """By the rule of `penstock.connectors.equality`; `reference` is asked again only where the answers differ."""
    return compare_tokens(ServedModel(reference, dtype), prompt, wanted.tokens, found.tokens)
