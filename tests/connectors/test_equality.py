"""The rule that says when two sequences of tokens are equal enough."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from penstock.connectors.equality import BF16_BOUND, Equality, compare_tokens, default_bound


class Table:
    """A model whose logits depend on the last token alone; counts its passes."""

    device = torch.device("cpu")

    def __init__(self, rows: dict[int, list[float]], dtype: torch.dtype = torch.bfloat16) -> None:
        self.rows, self.dtype, self.passes = rows, dtype, 0

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.passes += 1
        logits = [self.rows[int(token)] for token in input_ids[0]]
        return SimpleNamespace(logits=torch.tensor([logits]))


# After 0 comes 1, or almost as well 2; after 1 and 2 comes 0, and by no means 3.
ROWS = {
    0: [0.0, 5.0, 4.9, 0.0],
    1: [5.0, 0.0, 0.0, 1.0],
    2: [5.0, 0.0, 0.0, 1.0],
    3: [5.0, 0.0, 0.0, 0.0],
}


def test_equal_sequences_need_no_pass_of_the_model() -> None:
    model = Table(ROWS)
    assert compare_tokens(model, [0], [1, 0, 1], [1, 0, 1]) == Equality(equal=3)
    assert model.passes == 0


def test_a_near_tie_is_excused_counted_and_what_follows_judged_in_its_own_context() -> None:
    found = compare_tokens(Table(ROWS), [0], [1, 0, 1], [2, 0, 1])
    assert (found.equal, found.near_ties, found.violations) == (2, 1, 0)
    assert found.widest == pytest.approx(0.1, abs=1e-6)
    assert found.ok


def test_a_token_beyond_the_bound_is_a_violation() -> None:
    found = compare_tokens(Table(ROWS), [0], [1, 0], [1, 3])
    assert (found.equal, found.near_ties, found.violations) == (1, 0, 1)
    assert found.widest == 4.0
    assert not found.ok


def test_a_violation_after_an_excused_token_is_found() -> None:
    found = compare_tokens(Table(ROWS), [0], [1, 0], [2, 3])
    assert (found.near_ties, found.violations) == (1, 1)


def test_the_bound_decides() -> None:
    assert compare_tokens(Table(ROWS), [0], [1], [2], bound=0.05).violations == 1
    assert compare_tokens(Table(ROWS), [0], [1], [2], bound=0.2).violations == 0


def test_in_float32_no_token_may_differ_not_even_one_that_this_pass_prefers() -> None:
    # The reference took 2; a pass over everything at once says 1, as the candidate does. Still not equal.
    found = compare_tokens(Table(ROWS, torch.float32), [0], [2], [1])
    assert (found.near_ties, found.violations) == (0, 1)


def test_a_sequence_that_ends_early_is_a_violation() -> None:
    assert compare_tokens(Table(ROWS), [0], [1, 0, 1], [1]) == Equality(equal=1, violations=2)


def test_counts_add_up() -> None:
    assert Equality(1, 2, 3, 0.5) + Equality(10, 20, 30, 0.25) == Equality(11, 22, 33, 0.5)


def test_bounds_by_dtype() -> None:
    assert default_bound(torch.float32) == 0.0
    assert default_bound(torch.bfloat16) == BF16_BOUND
