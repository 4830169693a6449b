"""Whether an engine generates the same tokens with the pool as without it.

A prefix that was prefilled in other pieces is equal in exact arithmetic and not bit by bit: sums run in
another order. In float32 the same tokens must come out. In 16 bits a token may differ where the reference
could as well have chosen it: where its logit is less than a stated bound below the reference's best. Every
such token is counted. After the first one the two sequences have different contexts, so each later token of
the candidate is judged by what the reference says in the candidate's own context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BF16_BOUND", "Equality", "compare_tokens", "default_bound"]

BF16_BOUND = 0.25
"""In logits: a factor of 1.28 between probabilities. On the model that ships with penstock, logits of up to 18
moved by at most 0.14 when 1,000 tokens were computed in pieces of 1, 16, 100 or 256 instead of at once (two
logits may move against each other), and no best token changed over a gap wider than 0.07."""


@dataclass(frozen=True, slots=True)
class Equality:
    """Counts of one or several comparisons; add them with +."""

    equal: int = 0
    """The reference's own token, or after a near-tie its best one in the candidate's context."""
    near_ties: int = 0
    """Another token, less than the bound below the best."""
    violations: int = 0
    """Another token that the bound does not excuse, and tokens that one side lacks."""
    widest: float = 0.0
    """The largest gap of a differing token, in logits."""

    @property
    def ok(self) -> bool:
        return self.violations == 0

    def __add__(self, other: Equality) -> Equality:
        return Equality(
            self.equal + other.equal,
            self.near_ties + other.near_ties,
            self.violations + other.violations,
            max(self.widest, other.widest),
        )


def default_bound(dtype: torch.dtype) -> float:
    """0 for dtypes in which tokens must be equal, BF16_BOUND for those of 16 bits."""
    return BF16_BOUND if dtype.itemsize < 4 else 0.0


def compare_tokens(
    model: Any,
    prompt: Sequence[int],
    reference: Sequence[int],
    candidate: Sequence[int],
    *,
    bound: float | None = None,
) -> Equality:
    """Compare greedy tokens: `reference` of `model` alone, `candidate` of the engine with the pool, both
    after `prompt`.

    Runs one forward pass of `model`, without a cache, if they differ. `bound` as in `default_bound`.
    """
    same = _common(reference, candidate)
    if same == len(reference) == len(candidate):
        return Equality(equal=same)
    bound = default_bound(model.dtype) if bound is None else bound
    if same == min(len(reference), len(candidate)):
        # One ended where the other goes on, without another token: nothing that rounding does.
        return Equality(equal=same, violations=abs(len(reference) - len(candidate)))
    gaps = _gaps(model, [*prompt, *candidate], len(prompt) + same)
    # The token where they part differs from the reference's own, whatever this pass says of it.
    parted, later = gaps[0], gaps[1:]
    differing = [parted, *(gap for gap in later if gap > 0)]
    near_ties = sum(gap < bound for gap in differing)
    return Equality(
        equal=same + len(gaps) - len(differing),
        near_ties=near_ties,
        violations=len(differing) - near_ties,
        widest=max(differing),
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((index for index, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _gaps(model: Any, tokens: Sequence[int], first: int) -> list[float]:
    """How far each token from `first` on is below the best one there, in logits of one pass over all."""
    ids = torch.tensor([list(tokens)], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, first - 1 :].float()
    chosen = logits.gather(1, ids[0, first:, None])[:, 0]
    gaps: list[float] = (logits.max(dim=1).values - chosen).tolist()
    return gaps
