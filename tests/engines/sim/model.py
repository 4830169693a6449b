"""A model of arithmetic in place of a neural one: what it keeps of a token depends, like keys and values do, on every
token before it, read from the pages.

A wrong byte in any earlier page changes everything that comes after it, and so does a wrong byte in what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

LAYERS = 2
KV_HEADS = 1
HEAD_DIM = 16
WORDS = KV_HEADS * 2 * HEAD_DIM * 4 // 8
"""Words of 8 bytes that a layer keeps of a token."""
VOCAB = 40

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15

Words = npt.NDArray[np.uint64]


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_all(x: Words) -> Words:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _salts(rank: int) -> Words:
    return _mix_all(np.arange(1, LAYERS * WORDS + 1, dtype=np.uint64) + np.uint64(1000 * rank)).reshape(LAYERS, WORDS)


def spread(values: Words, rank: int) -> Words:
    """What a rank keeps of tokens with these values: (n, LAYERS, WORDS). The first word is the value itself."""
    words = _mix_all(values[:, None, None] + _salts(rank)[None])
    words[:, 0, 0] = values
    return words


def part(value: int, at: int) -> int:
    """What a token whose words are whole adds to the state."""
    return mix((value + at * _STEP) & _MASK)


def read_state(kept: Sequence[Words]) -> int:
    """The state after the tokens of which each rank has kept `kept[rank]`, (n, LAYERS, WORDS)."""
    if not len(kept[0]):
        return 0
    values = kept[0][:, 0, 0]
    at = np.arange(len(values), dtype=np.uint64) * np.uint64(_STEP)
    parts = _mix_all(values + at)
    for rank, words in enumerate(kept):
        wrong = (words != spread(values, rank)).any(axis=(1, 2))
        if wrong.any():
            odd = _salts(rank) | np.uint64(1)
            parts[wrong] += _mix_all((words[wrong] * odd).sum(axis=(1, 2), dtype=np.uint64) + np.uint64(rank + 1))
    return int(parts.sum(dtype=np.uint64))


def value_of(state: int, token: int, extra: int) -> int:
    """What is kept of a token after `state`; `extra` is what else it depends on: adapter, image, embedding."""
    return mix(mix((state + _STEP) & _MASK) ^ mix((token * 3 + 7 + extra * 0x10001) & _MASK))


def draw(state: int) -> int:
    """The next token after `state`."""
    return mix(state ^ 0xABCDEF) % VOCAB


class Course:
    """What a clean run makes of a sequence: the values of its tokens, and the token after each of them."""

    def __init__(self, tokens: Sequence[int], extras: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self.values: list[int] = []
        self.state = 0
        for at, token in enumerate(self.tokens):
            value = value_of(self.state, token, extras[at] if at < len(extras) else 0)
            self.values.append(value)
            self.state = (self.state + part(value, at)) & _MASK

    def block(self, index: int, block_tokens: int, rank: int) -> bytes:
        """A pool block of these tokens, as a rank stores it: all layers one behind the other."""
        first = index * block_tokens
        values = np.array(self.values[first : first + block_tokens], np.uint64)
        return spread(values, rank).transpose(1, 0, 2).tobytes()


@lru_cache(maxsize=4096)
def _answer(prompt: tuple[int, ...], n: int, extras: tuple[int, ...]) -> tuple[int, ...]:
    """`extras` holds for the tokens that it names; what is drawn goes on with the last one."""
    course = Course(prompt, extras)
    state, tokens = course.state, []
    for at in range(len(prompt), len(prompt) + n):
        tokens.append(draw(state))
        value = value_of(state, tokens[-1], extras[-1] if extras else 0)
        state = (state + part(value, at)) & _MASK
    return tuple(tokens)


def answer(prompt: Sequence[int], n: int, extras: Sequence[int] = ()) -> list[int]:
    """The n tokens that a clean run gives to a prompt."""
    return list(_answer(tuple(prompt), n, tuple(extras)))


def next_token(tokens: Sequence[int], extra: int = 0) -> Any:
    return answer(tokens, 1, [extra] * len(tokens) if extra else [])[0]
