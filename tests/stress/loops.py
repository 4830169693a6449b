"""Tight loops around the pool's kernels: a reader that leases and looks, a keeper that evicts and grants what it
evicted, a writer that refills it. Each takes its kernels as arguments, so that a mutant's can be put in.

A block holds its key's first word in every word, so any mix of two blocks shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from penstock.pool.atomics import load, load32, store
from penstock.pool.context import X_UNITS
from penstock.pool.keeper_context import Y_RECORDS
from penstock.pool.layout import COMMIT_BYTES, R_KEY, R_STATE, RECORD_BYTES
from penstock.pool.lookup import READY
from penstock.pool.reader import COUNT_MASK, HEAD_BITS, HEAD_MASK
from penstock.pool.slots import _payload_and_table
from penstock.pool.vector import stream_1
from penstock.types import event_dtype

Loop = Callable[..., Any]

# How often a reader reads a block that it has leased: longer than a keeper needs to give the slot to somebody else.
PASSES = 2
COLD_STORES = 6
# A use count that none is after.
EVER = 1 << 62
EVENT_UNIT = int(event_dtype.fields["unit"][1])  # type: ignore[index]
# Seeds of the loops' dice (a linear congruential generator with Knuth's constants).
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


@numba.njit(nogil=True)
def dice(state: Any, n: int) -> int:
    """A number below n; `state` is one int64."""
    state[0] = state[0] * _MULTIPLIER + _INCREMENT
    return ((state[0] >> 33) & 0x7FFFFFFF) % n


@numba.njit(nogil=True)
def scribble(cold: Any, state: Any) -> None:
    """Store into lines that are in no cache: a store that follows waits behind them in the store buffer, and what the
    fences are there for happens often instead of once in millions of rounds. A fence waits, however long it takes."""
    lines = cold.shape[0] // 8
    for _ in range(COLD_STORES):
        cold[8 * dice(state, lines)] = 1


@numba.njit(nogil=True)
def other_words(payload: int, words: int, want: int, passes: int) -> int:
    """How many words of a block are not what they should be; the ends first, where the last stores went."""
    wrong = 0
    for _ in range(passes):
        for back in range(words):
            if load(payload + 8 * (words - 1 - back)) != want:
                wrong += 1
    return wrong


def reader_loop(match: Any, release: Any) -> Loop:
    """(ctx, keys, shape, words, cold, seed, rounds, out): lease one block at random and read it. out: reads, torn."""

    @numba.njit(nogil=True)
    def run(
        ctx: int, keys: Any, shape: int, words: int, cold: Any, seed: Any, rounds: int, out: Any
    ) -> None:  # fmt: skip
        units = load(ctx + X_UNITS)
        k = dice(seed, keys.shape[0])
        for _ in range(rounds):
            k = (k + 1) % keys.shape[0]
            scribble(cold, seed)
            packed = match(ctx, keys[k : k + 1], shape)
            if packed >> HEAD_BITS & COUNT_MASK == 1:
                cell = packed & HEAD_MASK
                payload, _table = _payload_and_table(ctx, load(units + 8 * cell))
                if other_words(payload, words, np.int64(keys[k, 0]), PASSES) != 0:
                    out[1] += 1
                out[0] += 1
                release(ctx, cell, 1)

    return run


def keeper_loop(evict: Any, grant: Any, apply_commits: Any) -> Loop:
    """(ctx, lane, slot_class, starts, marks, events, room, cold, seed, rounds, out): evict a block at random, grant its
    slot, take in commits. out[2]: evicted."""

    @numba.njit(nogil=True)
    def run(
        ctx: int, lane: int, slot_class: int, starts: Any, marks: Any, events: int, room: int, cold: Any, seed: Any,
        rounds: int, out: Any,
    ) -> None:  # fmt: skip
        victims = np.zeros(1, np.uint32)
        records = load(ctx + Y_RECORDS)
        for _ in range(rounds):
            scribble(cold, seed)
            unit = starts[dice(seed, starts.shape[0])]
            if load(records + unit * RECORD_BYTES + R_STATE) & 0xFF == READY:
                victims[0] = unit
                out[2] += evict(ctx, victims, 1, marks, events, 0, EVER)
            grant(ctx, lane, slot_class, 2)
            apply_commits(ctx, lane, events, room)

    return run


def writer_loop(take_grants: Any, publish: Any) -> Loop:
    """(ctx, keys, sources, words, slots, rows, seed, rounds): fill what was granted with blocks at random, past the
    cache, and publish them. `rows` are commit entries that are complete but for unit, generation and key."""

    @numba.njit(nogil=True)
    def run(
        ctx: int, keys: Any, sources: Any, words: int, slots: Any, rows: Any, seed: Any, rounds: int
    ) -> None:  # fmt: skip
        table = np.zeros(2, np.int64)
        at = rows.ctypes.data
        for _ in range(rounds):
            n = take_grants(ctx, slots)
            for i in range(n):
                k = dice(seed, keys.shape[0])
                payload, _table = _payload_and_table(ctx, slots[i, 0])
                table[0], table[1] = sources[k], payload
                stream_1(table.ctypes.data, table.ctypes.data + 8, 0, words // 8)
                entry = at + i * COMMIT_BYTES
                store(entry + 8, slots[i, 0])
                store(entry + 16, slots[i, 2])
                store(entry + 32, np.int64(keys[k, 0]))
                store(entry + 40, np.int64(keys[k, 1]))
            if n > 0:
                publish(ctx, at, n)

    return run


def newest_loop(match: Any, release: Any) -> Loop:
    """(ctx, keeper's ctx, events, key, shape, words, out): lease and read the block that the keeper took in last, which
    is the earliest that anybody can see it. `key` is room for one. out: reads, torn."""

    @numba.njit(nogil=True)
    def run(ctx: int, keeper: int, events: int, key: Any, shape: int, words: int, out: Any) -> None:
        record = load(keeper + Y_RECORDS) + load32(events + EVENT_UNIT) * RECORD_BYTES
        key[0, 0], key[0, 1] = np.uint64(load(record + R_KEY)), np.uint64(load(record + R_KEY + 8))
        packed = match(ctx, key, shape)
        if packed >> HEAD_BITS & COUNT_MASK == 1:
            cell = packed & HEAD_MASK
            payload, _table = _payload_and_table(ctx, load(load(ctx + X_UNITS) + 8 * cell))
            if other_words(payload, words, np.int64(key[0, 0]), 1) != 0:
                out[1] += 1
            out[0] += 1
            release(ctx, cell, 1)

    return run


def both(first: Loop, second: Loop) -> Callable[[tuple[Any, ...], tuple[Any, ...], int], None]:
    """One loop and another taking turns in one thread, `rounds` times a round each."""

    @numba.njit(nogil=True)
    def run(a: Any, b: Any, rounds: int) -> None:
        for _ in range(rounds):
            first(*a)
            second(*b)

    return run  # type: ignore[no-any-return]


__all__ = ["Loop", "both", "keeper_loop", "newest_loop", "reader_loop", "writer_loop"]
