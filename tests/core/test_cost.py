"""Fetch or recompute, against trying everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.cost import Part, choose
from penstock.core.speed import PrefillMeter
from penstock.errors import ConfigError

parts_of_a_chain = st.lists(
    st.builds(Part, st.integers(0, 3), st.integers(0, 9), st.floats(0, 3), st.floats(0, 1)), max_size=4
)


def quadratic(n: int, before: int) -> float:
    return 0.02 * n + 0.001 * n * (before + n / 2)


def fetch_seconds(parts: list[Part], first: int, stop: int) -> float:
    """Block by block."""
    seconds, begin = 0.0, 0
    for part in parts:
        mine = [block for block in range(begin, begin + part.n_blocks) if first <= block < stop]
        if mine:
            seconds += part.seconds_first + len(mine) * part.seconds_per_block
        begin += part.n_blocks
    return seconds


def everything(
    n_here: int, parts: list[Part], n_tokens: int, block_tokens: int, load: float, overlap: bool, ahead: int
) -> dict[tuple[int, int], float]:
    """Seconds by (first block to fetch, block behind the last one)."""
    usable = min(sum(part.n_blocks for part in parts), max(0, n_tokens // block_tokens - n_here))
    here, found = min(n_here * block_tokens, n_tokens), {}
    for stop in range(usable + 1):
        behind = here + stop * block_tokens
        rest = quadratic(n_tokens - behind, behind)
        for first in {0, *range(max(1, stop - ahead), stop if overlap else 0)}:
            front = quadratic(first * block_tokens, here)
            found[first, stop] = max(front, fetch_seconds(parts, first, stop) + load * (stop - first)) + rest
    return found


@settings(max_examples=300, deadline=None)
@given(
    n_here=st.integers(0, 5), parts=parts_of_a_chain, n_tokens=st.integers(0, 120), block_tokens=st.integers(1, 7),
    load=st.floats(0, 0.3), overlap=st.booleans(), ahead=st.integers(0, 40), margin=st.sampled_from([0.0, 0.05, 0.3]),
)  # fmt: skip
def test_the_choice_is_the_best_of_everything(
    n_here: int,
    parts: list[Part],
    n_tokens: int,
    block_tokens: int,
    load: float,
    overlap: bool,
    ahead: int,
    margin: float,
) -> None:
    ways = everything(n_here, parts, n_tokens, block_tokens, load, overlap, ahead)
    choice = choose(
        n_here,
        parts,
        n_tokens,
        block_tokens,
        quadratic,
        load_s_per_block=load,
        overlap=overlap,
        most_ahead=ahead,
        margin=margin,
    )
    assert choice.recompute_s == pytest.approx(ways[0, 0])
    assert choice.expected_s <= choice.recompute_s
    one_after_the_other = min(seconds for (first, _), seconds in ways.items() if first == 0)
    least = min(ways.values())
    if least > one_after_the_other * (1 - margin) + 1e-9 or choice.expected_s == pytest.approx(one_after_the_other):
        least = one_after_the_other  # splitting would gain too little
    if choice.fetch_blocks:
        assert choice.expected_s == pytest.approx(least)
        assert choice.expected_s <= choice.recompute_s * (1 - margin) + 1e-12
        first = choice.split_at or 0
        assert ways[first, first + choice.fetch_blocks] == pytest.approx(choice.expected_s)
    else:
        assert choice.split_at is None and choice.expected_s == choice.recompute_s
        assert least >= choice.recompute_s * (1 - margin) - 1e-9
    if not overlap:
        assert choice.split_at is None


def test_a_fast_tier_is_fetched_whole_and_a_slow_one_not_at_all() -> None:
    fast, slow = Part(0, 100, 1e-4, 1e-5), Part(0, 100, 0.1, 1.0)
    compute = PrefillMeter(1e-3, 1e-4, 1e-9).estimate
    assert choose(0, [fast], 1601, 16, compute).fetch_blocks == 100
    assert choose(0, [slow], 1601, 16, compute).fetch_blocks == 0


def test_the_fast_part_is_fetched_and_the_slow_one_behind_it_computed() -> None:
    parts = [Part(0, 10, 1e-4, 1e-5), Part(1, 90, 5.0, 1.0)]
    choice = choose(0, parts, 1601, 16, PrefillMeter(1e-3, 1e-4, 1e-9).estimate)
    assert choice.fetch_blocks == 10 and choice.split_at is None
    assert choice.expected_s < choice.recompute_s < choice.fetch_all_s


def test_a_slow_part_before_a_fast_one_is_worth_it_where_the_sum_is() -> None:
    parts = [Part(1, 2, 0.05, 0.001), Part(0, 98, 1e-4, 1e-5)]
    assert choose(0, parts, 1601, 16, PrefillMeter(1e-3, 1e-4, 1e-9).estimate).fetch_blocks == 100


def test_a_gain_within_the_uncertainty_is_left() -> None:
    def linear(n: int, before: int) -> float:
        return n * 0.01

    part = [Part(0, 10, 0.0, 0.01 * 16 * 0.97)]
    assert choose(0, part, 160, 16, linear).fetch_blocks == 0
    assert choose(0, part, 160, 16, linear, margin=0.01).fetch_blocks == 10


def test_overlap_takes_the_time_of_two_at_once() -> None:
    """Equal speeds, no latency: half each, in half the time (CacheFlow: Tc Tio / (Tc + Tio))."""

    def linear(n: int, before: int) -> float:
        return n * 0.001

    choice = choose(0, [Part(0, 100, 0.0, 0.016)], 1600, 16, linear, overlap=True)
    assert choice.split_at == 50 and choice.fetch_blocks == 50
    assert choice.expected_s == pytest.approx(0.8)
    faster = choose(0, [Part(0, 100, 0.0, 0.008)], 1600, 16, linear, overlap=True)
    assert faster.expected_s == pytest.approx(1.6 * 0.8 / 2.4, rel=0.02)


def test_a_function_that_branches_is_asked_once_for_each_length() -> None:
    def branching(n: int, before: int) -> float:
        return 0.0 if n == 0 else 1.0 + n * 0.01 + before * 0.0

    parts = [Part(0, 10, 0.1, 0.001)]
    choice = choose(0, parts, 160, 16, branching)
    assert choice.fetch_blocks == 10 and choice.expected_s == pytest.approx(0.11)
    assert choose(0, parts, 160, 16, lambda n, before: 0.05).fetch_blocks == 0


def test_nothing_to_fetch_and_nothing_to_compute() -> None:
    for n_here, parts, n_tokens in ((0, [], 100), (10, [Part(0, 5, 0.0, 0.0)], 100), (0, [Part(0, 0, 1.0, 1.0)], 5)):
        choice = choose(n_here, parts, n_tokens, 10, quadratic, overlap=True)
        assert choice.fetch_blocks == 0 and choice.expected_s == choice.recompute_s


def test_a_chain_of_a_million_tokens_is_one_pass() -> None:
    parts = [Part(i % 3, 625, 1e-3, 1e-4) for i in range(100)]
    meter = PrefillMeter()
    calls = 0

    def counted(n: int, before: int) -> float:
        nonlocal calls
        calls += 1
        return meter.estimate(n, before)

    for overlap in (False, True):
        assert choose(0, parts, 1_000_000, 16, counted, overlap=overlap).fetch_blocks > 0
    assert calls == 4
    assert np.isfinite(choose(0, parts, 1_000_000, 16, counted).fetch_all_s)


def test_what_cannot_be_is_refused() -> None:
    for n_here, n_tokens, block_tokens in ((-1, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(ConfigError):
            choose(n_here, [], n_tokens, block_tokens, quadratic)
    for part in (Part(0, -1, 0.0, 0.0), Part(0, 1, -1.0, 0.0), Part(0, 1, 0.0, float("nan"))):
        with pytest.raises(ConfigError):
            choose(0, [part], 10, 1, quadratic)
