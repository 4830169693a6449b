"""Fetch or recompute: how much of a chain to bring into the pool, given what each way costs.

A pure function of estimates (`core/speed.py`); does not know where blocks are or what runs. Times are expectations: the
one promise is that a choice is never expected to take longer than computing everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError

__all__ = ["Choice", "Part", "choose"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """A run of the chain's blocks, in order, that one tier has, and what bringing it costs now.

    Bringing the first j blocks, or any j of them in a row, takes `seconds_first + j * seconds_per_block`.
    """

    tier: int
    n_blocks: int
    seconds_first: float
    """What the transfer costs before its first byte: latency, and what waits in the queue before it."""
    seconds_per_block: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with a chain."""

    fetch_blocks: int
    """How many blocks to bring: the parts' first ones, or those from `split_at` on. 0: compute everything."""
    split_at: int | None
    """Where the two are to overlap: compute this many of the parts' blocks while the `fetch_blocks` behind them come;
    None: fetch from the first block on."""
    expected_s: float
    """Until the last token's state is there, as chosen."""
    recompute_s: float
    """The same without fetching."""
    fetch_all_s: float
    """The same with fetching all that there is, one after the other."""


def choose(
    n_here: int,
    parts: Sequence[Part],
    n_tokens: int,
    block_tokens: int,
    compute: Callable[[int, int], float],
    *,
    load_s_per_block: float = 0.0,
    overlap: bool = False,
    most_ahead: int | None = None,
    margin: float = 0.05,
) -> Choice:
    """What is expected to be fastest for a chain of `n_tokens` of which the pool has the first `n_here` blocks.

    `parts` follow one after the other and the first begins behind what is here; they are fetched one after the other.
    `compute(n, before)` is the seconds to compute n tokens behind `before` others. It is asked once with two int64
    arrays, elementwise, and only if it cannot take these once per length. A fetched block costs `load_s_per_block` more
    before the engine can use it; what is here costs that in any case and is left out. Nothing is fetched where that
    would gain less than the fraction `margin` of recomputing: estimates are not better than that.

    With `overlap` the front may be computed while the back comes (CacheFlow; `shared/facts.md`): the two then take as
    long as the slower one; at most `most_ahead` blocks are then fetched, for more could not come before the front is
    there. That, too, has to gain the fraction `margin` of what is best without. Blocks that reach
    behind the last token are not used. Raises ConfigError for negative sizes or costs.
    """
    _check(n_here, parts, n_tokens, block_tokens)
    cost = _Costs(n_here, parts, n_tokens, block_tokens, compute, load_s_per_block)
    totals = cost.sequential()
    recompute_s, fetch_all_s = float(totals[0]), float(totals[-1])
    start, stop = 0, int(np.argmin(totals))
    expected_s = float(totals[stop])
    if overlap:
        starts, totals = cost.overlapped(most_ahead)
        split = int(np.argmin(totals))
        if totals[split] < expected_s * (1 - margin) and starts[split] < split:
            start, stop, expected_s = int(starts[split]), split, float(totals[split])
    if expected_s > recompute_s * (1 - margin):
        start, stop, expected_s = 0, 0, recompute_s
    return Choice(stop - start, start or None, expected_s, recompute_s, fetch_all_s)


class _Costs:
    """The seconds of every way to get k of the parts' blocks, for k = 0 .. all that end before the last token."""

    def __init__(
        self,
        n_here: int,
        parts: Sequence[Part],
        n_tokens: int,
        block_tokens: int,
        compute: Callable[[int, int], float],
        load_s_per_block: float,
    ) -> None:
        there = sum(part.n_blocks for part in parts)
        usable = min(there, max(0, n_tokens // block_tokens - n_here))
        here = min(n_here * block_tokens, n_tokens)
        self.lengths = np.arange(usable + 1)
        fetched = self.lengths * block_tokens
        self.rest = _evaluate(compute, n_tokens - here - fetched, here + fetched)
        # Front blocks computed: how long k blocks take.
        self.front = _evaluate(compute, fetched, np.full(usable + 1, here))
        self.front[0] = 0.0
        self.until, self.saved = _fetching(parts, usable)
        load = self.lengths * load_s_per_block
        self.until, self.saved = self.until + load, self.saved + load

    def sequential(self) -> Floats:
        """(k + 1,): fetch k blocks, then compute the rest."""
        return self.until + self.rest

    def overlapped(self, most_ahead: int | None) -> tuple[Ints, Floats]:
        """(k + 1,) twice: from which block on to fetch, and the seconds, for blocks computed or fetched up to k.

        Computing the front takes longer the more of it there is, fetching the back less: the best split is on either
        side of where they balance, or where the back would be longer than it may be, as near as it may.
        """
        least = np.zeros_like(self.lengths) if most_ahead is None else np.maximum(0, self.lengths - most_ahead)
        balance = np.searchsorted(np.maximum.accumulate(self.front + self.saved), self.until)
        best, best_s = np.zeros_like(self.lengths), np.full(len(self.lengths), np.inf)
        for start in (np.zeros_like(balance), balance - 1, balance):
            start = np.maximum(np.clip(start, 0, np.maximum(self.lengths - 1, 0)), least)
            both = np.maximum(self.front[start], self.until - self.saved[start])
            better = both < best_s
            best[better], best_s[better] = start[better], both[better]
        return best, best_s + self.rest


def _fetching(parts: Sequence[Part], usable: int) -> tuple[Floats, Floats]:
    """Seconds to fetch the first k blocks, and what not fetching the first s saves: from s to k they take the first
    at k less the second at s."""
    blocks = np.array([part.n_blocks for part in parts], np.int64)
    each = np.repeat([part.seconds_per_block for part in parts], blocks)
    firsts = np.zeros(len(each))
    begins = np.cumsum(blocks) - blocks
    for part, begin in zip(parts, begins, strict=True):
        if part.n_blocks:
            firsts[begin] = part.seconds_first
    until = np.concatenate(([0.0], np.cumsum(each + firsts)))[: usable + 1]
    # A part that is begun in the middle costs its first seconds all the same.
    inside = np.concatenate(([0.0], np.repeat([part.seconds_first for part in parts], blocks)))[: usable + 1]
    ends = np.concatenate(([0], np.cumsum(blocks)))
    inside[ends[ends <= usable]] = 0.0
    return until, until - inside


def _evaluate(compute: Callable[[int, int], float], n: Ints, before: Ints) -> Floats:
    try:
        seconds = np.asarray(compute(n, before), np.float64)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        # It branches on its arguments.
        seconds = np.array([compute(int(each), int(behind)) for each, behind in zip(n, before, strict=True)])
    return np.array(np.broadcast_to(seconds, n.shape))


def _check(n_here: int, parts: Sequence[Part], n_tokens: int, block_tokens: int) -> None:
    if min(n_here, n_tokens) < 0 or block_tokens < 1:
        raise ConfigError(f"{n_here} blocks here of {block_tokens} tokens, {n_tokens} tokens in all: cannot be.")
    for part in parts:
        if part.n_blocks < 0 or not (part.seconds_first >= 0 and part.seconds_per_block >= 0):
            raise ConfigError(f"{part}: give blocks and seconds of at least 0.")
