"""Movement kernels: bytes land where the arguments say, at any alignment and run shape, and nowhere else."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.pool import checksum, copies

Bytes = NDArray[np.uint8]
GUARD = 0xA5


def aligned(n_bytes: int, offset: int = 0) -> Bytes:
    """`n_bytes` bytes of GUARD that start `offset` bytes past a multiple of 4096."""
    raw = np.full(n_bytes + 8192, GUARD, dtype=np.uint8)
    start = -raw.ctypes.data % 4096 + offset
    return raw[start : start + n_bytes]


@dataclass
class Shape:
    """Blocks on both sides; the engine's tensor is [segments][runs][blocks][run_bytes], with guard bytes."""

    n_blocks: int
    n_segments: int
    segment_bytes: int
    runs: int = 1
    engine_offset: int = 0
    gap: int = 0
    n_engine_blocks: int = 0
    seed: int = 0
    slots: Bytes = field(init=False)
    engine: Bytes = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.n_engine_blocks = self.n_engine_blocks or self.n_blocks + 2
        self.run_bytes = self.segment_bytes // self.runs
        self.slot_bytes = -(-self.n_segments * self.segment_bytes // 4096) * 4096
        self.slots = aligned(self.slot_bytes * (self.n_blocks + 2))
        order = rng.permutation(self.n_blocks + 2)[: self.n_blocks]
        self.slot_index = order
        self.payload_addrs = (self.slots.ctypes.data + order * self.slot_bytes).astype(np.int64)
        self.block_index = rng.permutation(self.n_engine_blocks)[: self.n_blocks].astype(np.int64)
        self.block_stride = self.run_bytes + self.gap
        self.run_stride = self.block_stride * self.n_engine_blocks
        self.segment_stride = self.run_stride * self.runs
        self.engine = aligned(self.segment_stride * self.n_segments, self.engine_offset)
        tables = np.zeros((self.n_blocks, self.n_segments + 1), dtype=np.uint64)
        self.tables = tables
        self.table_addrs = tables.ctypes.data + np.arange(self.n_blocks, dtype=np.int64) * tables.strides[0]
        self.keys = rng.integers(0, 2**64, size=(self.n_blocks, 2), dtype=np.uint64)
        self.roots = np.zeros(self.n_blocks, dtype=np.uint64)
        self.bad = np.full(self.n_blocks, 7, dtype=np.uint8)

    def slot(self, i: int, segment: int) -> Bytes:
        at = int(self.slot_index[i]) * self.slot_bytes + segment * self.segment_bytes
        return self.slots[at : at + self.segment_bytes]

    def run(self, i: int, segment: int, run: int) -> Bytes:
        at = segment * self.segment_stride + run * self.run_stride
        at += int(self.block_index[i]) * self.block_stride
        return self.engine[at : at + self.run_bytes]

    def fill(self, side: Bytes) -> None:
        side[:] = np.random.default_rng(self.seed + 1).integers(0, 256, len(side), dtype=np.uint8)

    def move_args(self, segs: NDArray[np.int64]) -> tuple[Any, ...]:
        bases = (self.engine.ctypes.data + segs * self.segment_stride).astype(np.int64)
        near = (self.n_blocks, self.payload_addrs, segs, bases, self.block_index)
        return (*near, self.block_stride, self.runs, self.run_stride, self.segment_bytes)

    def sums_args(self) -> tuple[Any, ...]:
        return (self.n_segments, self.table_addrs, self.keys, self.roots)

    def expected_engine(self, segs: NDArray[np.int64], before: Bytes) -> Bytes:
        after = before.copy()
        live, self.engine = self.engine, after
        for i in range(self.n_blocks):
            for segment in segs.tolist():
                pieces = self.slot(i, segment).reshape(self.runs, self.run_bytes)
                for run in range(self.runs):
                    self.run(i, segment, run)[:] = pieces[run]
        self.engine = live
        return after

    @property
    def every(self) -> NDArray[np.int64]:
        return np.arange(self.n_segments, dtype=np.int64)

    def gather_verified(self, segs: NDArray[np.int64], streaming: bool) -> int:
        return copies.gather_verified(*self.move_args(segs), *self.sums_args(), self.bad, streaming)

    def scatter(self, segs: NDArray[np.int64]) -> None:
        copies.scatter(*self.move_args(segs), *self.sums_args())

    def seal(self) -> None:
        args = (self.n_blocks, self.payload_addrs, self.every, self.segment_bytes)
        copies.seal(*args, *self.sums_args())

    def assert_reference_checksums(self) -> None:
        for i in range(self.n_blocks):
            key = self.keys[i].tobytes()
            table = [
                checksum.reference_segment(self.slot(i, s).tobytes(), key, s, self.n_segments)
                for s in range(self.n_segments)
            ]
            assert self.tables[i, : self.n_segments].tolist() == table
            assert int(self.roots[i]) == checksum.reference_root(table, key, self.segment_bytes)
        assert not self.tables[:, self.n_segments].any()  # nothing is written behind a table


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    stripes = draw(st.sampled_from([4, 5, 8, 12, 16, 17, 32, 63, 64, 65, 68, 96, 127, 128, 129, 144, 192, 200]))
    segment_bytes = 64 * stripes
    divisors = [runs for runs in (1, 2, 3, 4, 5, 8, 12, 16, 40) if segment_bytes % runs == 0]
    return Shape(
        n_blocks=draw(st.integers(1, 5)),
        n_segments=draw(st.integers(1, 4)),
        segment_bytes=segment_bytes,
        runs=draw(st.sampled_from(divisors)),
        engine_offset=draw(st.sampled_from([0, 0, 1, 2, 4, 8, 16, 32, 48, 63, 64])),
        gap=draw(st.sampled_from([0, 0, 64, 128, 16, 1])),
        seed=draw(st.integers(0, 2**32)),
    )


def subset(shape: Shape, mask: int) -> NDArray[np.int64]:
    chosen = [s for s in range(shape.n_segments) if mask >> s & 1]
    return np.array(chosen[::-1], dtype=np.int64)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.integers(0, 15), st.booleans())
def test_gather_moves_exactly_the_selected_bytes(shape: Shape, mask: int, streaming: bool) -> None:
    shape.fill(shape.slots)
    segs = subset(shape, mask)
    expected = shape.expected_engine(segs, shape.engine)
    slots = shape.slots.copy()
    copies.gather(*shape.move_args(segs), streaming)
    np.testing.assert_array_equal(shape.engine, expected)
    np.testing.assert_array_equal(shape.slots, slots)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.integers(0, 15), st.booleans())
def test_gather_verified_moves_the_same_and_passes(shape: Shape, mask: int, streaming: bool) -> None:
    shape.fill(shape.slots)
    shape.seal()
    segs = subset(shape, mask)
    expected = shape.expected_engine(segs, shape.engine)
    assert shape.gather_verified(segs, streaming) == 0
    assert not shape.bad.any()
    np.testing.assert_array_equal(shape.engine, expected)


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_scatter_is_the_inverse_of_gather_and_touches_nothing_else(shape: Shape) -> None:
    shape.fill(shape.engine)
    engine = shape.engine.copy()
    untouched = shape.slots.copy()
    shape.scatter(shape.every)
    for i in range(shape.n_blocks):
        for segment in range(shape.n_segments):
            runs = [shape.run(i, segment, run) for run in range(shape.runs)]
            np.testing.assert_array_equal(shape.slot(i, segment), np.concatenate(runs))
            shape.slot(i, segment)[:] = GUARD
    np.testing.assert_array_equal(shape.slots, untouched)
    np.testing.assert_array_equal(shape.engine, engine)


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_scatter_and_seal_write_the_reference_checksums(shape: Shape) -> None:
    shape.fill(shape.engine)
    shape.scatter(shape.every)
    shape.assert_reference_checksums()
    shape.tables[:], shape.roots[:] = 0, 0
    shape.seal()
    shape.assert_reference_checksums()


@pytest.mark.parametrize("offset", range(64))
def test_every_alignment_of_the_engine(offset: int) -> None:
    shape = Shape(n_blocks=3, n_segments=2, segment_bytes=4096 * 3 + 64, engine_offset=offset)
    shape.fill(shape.slots)
    shape.seal()
    expected = shape.expected_engine(shape.every, shape.engine)
    copies.gather(*shape.move_args(shape.every), True)
    np.testing.assert_array_equal(shape.engine, expected)
    shape.engine[:] = GUARD
    assert shape.gather_verified(shape.every, True) == 0
    np.testing.assert_array_equal(shape.engine, expected)
    slots, roots = shape.slots.copy(), shape.roots.copy()
    shape.roots[:] = 0
    shape.scatter(shape.every)
    np.testing.assert_array_equal(shape.slots, slots)
    np.testing.assert_array_equal(shape.roots, roots)


def test_one_aligned_segment_does_not_make_a_misaligned_one_stream() -> None:
    """Bases are checked one by one: streaming into a misaligned one would be a segmentation fault."""
    shape = Shape(n_blocks=9, n_segments=2, segment_bytes=4096)
    shape.fill(shape.slots)
    other = aligned(shape.segment_stride, 8)
    args = list(shape.move_args(shape.every))
    args[3] = np.array([shape.engine.ctypes.data, other.ctypes.data], dtype=np.int64)
    copies.gather(*args, True)
    for i in range(shape.n_blocks):
        at = int(shape.block_index[i]) * shape.block_stride
        np.testing.assert_array_equal(other[at : at + 4096], shape.slot(i, 1))


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="other machines store anywhere")
def test_streaming_into_a_misaligned_target_would_be_a_segmentation_fault() -> None:
    """What the alignment check guards against: the same store without the check kills the process."""
    source = """
import sys, numba, numpy as np
from penstock.pool.vector import stream_1

@numba.njit("void(int64, int64)")
def move(sources, targets):
    stream_1(sources, targets, 0, 2)

memory = np.zeros(4096, dtype=np.uint8)
start = memory.ctypes.data + -memory.ctypes.data % 64
for offset in (0, 8):
    words = np.array([start, start + 1024 + offset])
    move(words.ctypes.data, words.ctypes.data + 8)
    print("moved", offset, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "moved 0\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_scatter_layer_by_layer_gives_the_same_root() -> None:
    shape = Shape(n_blocks=2, n_segments=3, segment_bytes=1024)
    shape.fill(shape.engine)
    for segment in (2, 0, 1):
        shape.scatter(np.array([segment], dtype=np.int64))
    shape.assert_reference_checksums()


def test_no_blocks_and_no_segments_are_allowed() -> None:
    shape = Shape(n_blocks=1, n_segments=1, segment_bytes=256)
    shape.fill(shape.slots)
    shape.seal()
    before = shape.engine.copy()
    none = np.zeros(0, dtype=np.int64)
    copies.gather(*shape.move_args(none), True)
    assert shape.gather_verified(none, True) == 0
    copies.gather(0, *shape.move_args(shape.every)[1:], True)
    np.testing.assert_array_equal(shape.engine, before)
