"""What the connector adds to `model.generate`: checks before it, and a watch on every new token.

Covers which calls fit one plain cache of one sequence. Does not cover loading and saving (`connector.py`).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from penstock.errors import Refused

__all__ = ["Watch", "check_generation", "fresh_kwargs", "prefill"]

# Settings of `generate` that need more than one sequence, or take tokens back.
_SINGLE = ("num_beams", "num_return_sequences")
_ABSENT = (
    "assistant_early_exit",
    "assistant_model",
    "cache_implementation",
    "constraints",
    "custom_generate",
    "dola_layers",
    "force_words_ids",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "use_mtp",
)
_OURS = ("past_key_values", "input_ids", "inputs", "inputs_embeds", "max_length", "return_dict_in_generate")


class Watch(StoppingCriteria):
    """Sees the sequence after every new token and stops nothing.

    When it is called the cache holds all tokens but the newest one.
    """

    def __init__(self, prompt_tokens: int, on_tokens: Callable[[torch.Tensor], None]) -> None:
        self.first_s: float | None = None
        self._prompt_tokens = prompt_tokens
        self._on_tokens = on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first_s is None:
            self.first_s = time.perf_counter()
        self._on_tokens(input_ids[0])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def prefill(model: Any, tokens: list[int], cache: Any) -> None:
    """Compute these tokens behind those that the cache holds, into it."""
    # Of their logits none is wanted, and one is the least that can be had.
    least = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, **least)


def check_generation(
    model: Any, prompt_tokens: int, max_new_tokens: int, positions: int | None, kwargs: Mapping[str, Any]
) -> None:
    """Refused for a request that does not fit one plain cache of one sequence, or the model's positions."""
    # The newest token needs a position only when another one follows it.
    needed = prompt_tokens + max(max_new_tokens - 1, 0)
    if positions is not None and needed > positions:
        raise Refused(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones need {needed} positions, the model "
            f"has {positions}: shorten the request"
        )
    for name in _OURS:
        if name in kwargs:
            raise Refused(f"{name} is the connector's to give: use load() and save() around your own call")
    tensors = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name != "attention_mask"]
    if tensors:
        raise Refused(f"{', '.join(tensors)}: keys name token ids only, so nothing else may enter the model")
    _check_mask(kwargs.get("attention_mask"), prompt_tokens)
    settings = (kwargs, vars(kwargs.get("generation_config") or model.generation_config))
    for name in _SINGLE:
        if (_first(settings, name) or 1) != 1:
            raise Refused(f"{name}={_first(settings, name)}: one request holds one sequence, use {name}=1")
    for name in _ABSENT:
        if _first(settings, name):
            raise Refused(f"{name} does not go through one plain cache: leave it out")


def _check_mask(mask: Any, prompt_tokens: int) -> None:
    if mask is None:
        return
    if not bool(mask.bool().all()) or mask.numel() != prompt_tokens:
        raise Refused("the attention mask hides tokens: leave padding out, one request needs none")


def _first(settings: tuple[Mapping[str, Any], ...], name: str) -> Any:
    """The value that counts: the call's own before the configuration's."""
    return next((values[name] for values in settings if name in values), None)


def fresh_kwargs(prompt: torch.Tensor, watch: Watch, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with the watch added, and a mask of ones: without one, transformers guesses
    padding from the token ids and would hide pad tokens that are part of the text."""
    criteria = StoppingCriteriaList([watch, *(kwargs.get("stopping_criteria") or ())])
    return {**kwargs, "attention_mask": torch.ones_like(prompt), "stopping_criteria": criteria}
