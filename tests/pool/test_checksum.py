"""The checksum: equal to its reference and to PyPI's xxhash, and different after every kind of damage."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.pool import checksum, copies

SIZES = (256, 320, 1024, 1088, 2048, 4096, 4160, 8128, 8192, 12800)


class Sealed:
    """Sealed blocks with their tables and roots; any of it may be damaged before `bad()` is asked."""

    def __init__(self, n_blocks: int, n_segments: int, segment_bytes: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.n_segments, self.segment_bytes = n_segments, segment_bytes
        self.payload = rng.integers(0, 256, (n_blocks, n_segments, segment_bytes), dtype=np.uint8)
        self.payload_addrs = addresses(self.payload)
        self.tables = np.zeros((n_blocks, n_segments), dtype=np.uint64)
        self.table_addrs = addresses(self.tables)
        self.keys = rng.integers(0, 2**64, (n_blocks, 2), dtype=np.uint64)
        self.roots = np.zeros(n_blocks, dtype=np.uint64)
        self.seal()

    def seal(self) -> None:
        every = np.arange(self.n_segments, dtype=np.int64)
        sums = (self.n_segments, self.table_addrs, self.keys, self.roots)
        copies.seal(len(self.payload), self.payload_addrs, every, self.segment_bytes, *sums)

    def bad(self, segs: list[int] | None = None, n_segments: int | None = None) -> list[int]:
        n_blocks = len(self.payload)
        chosen = np.array(range(self.n_segments) if segs is None else segs, dtype=np.int64)
        flags = np.full(n_blocks, 9, dtype=np.uint8)
        where = (self.payload_addrs, chosen, self.segment_bytes, n_segments or self.n_segments)
        n_bad = copies.verify(n_blocks, *where, self.table_addrs, self.keys, self.roots, flags)
        assert n_bad == flags.sum()
        # The kernel that copies must come to the same verdict.
        sink = np.zeros((n_blocks, len(chosen), self.segment_bytes), dtype=np.uint8)
        bases = sink.ctypes.data + np.arange(len(chosen), dtype=np.int64) * self.segment_bytes
        index = np.arange(n_blocks, dtype=np.int64)
        to = (bases, index, len(chosen) * self.segment_bytes, 1, 0)
        copied = np.full(n_blocks, 9, dtype=np.uint8)
        sums = (where[3], self.table_addrs, self.keys, self.roots, copied)
        copies.gather_verified(n_blocks, *where[:2], *to, self.segment_bytes, *sums, False)
        assert copied.tolist() == flags.tolist()
        return flags.tolist()


def addresses(array: NDArray[np.generic]) -> NDArray[np.int64]:
    return array.ctypes.data + np.arange(len(array), dtype=np.int64) * array.strides[0]


@pytest.mark.parametrize("n_bytes", [256, 320, 1024, 1088, 2048, 4032, 4096, 4160, 8128])
def test_the_reference_page_hash_is_xxh3(n_bytes: int) -> None:
    data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8).tobytes()
    assert checksum.reference_xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


@pytest.mark.parametrize("segment_bytes", SIZES)
@pytest.mark.parametrize("n_segments", [1, 3, 9])
def test_kernels_match_the_reference(segment_bytes: int, n_segments: int) -> None:
    blocks = Sealed(3, n_segments, segment_bytes, seed=segment_bytes)
    for i, table in enumerate(blocks.tables.tolist()):
        key = blocks.keys[i].tobytes()
        pieces = [piece.tobytes() for piece in blocks.payload[i]]
        expected = [checksum.reference_segment(p, key, s, n_segments) for s, p in enumerate(pieces)]
        assert table == expected
        assert int(blocks.roots[i]) == checksum.reference_root(expected, key, segment_bytes)
    assert blocks.bad() == [0, 0, 0]


def test_every_single_flipped_payload_bit_is_found() -> None:
    blocks = Sealed(1, 2, 320)
    flat = blocks.payload.reshape(-1)
    for at in range(flat.size):
        for bit in range(8):
            flat[at] ^= 1 << bit
            assert blocks.bad() == [1], (at, bit)
            flat[at] ^= 1 << bit
    assert blocks.bad() == [0]


def test_every_single_flipped_bit_of_table_root_and_key_is_found() -> None:
    blocks = Sealed(1, 3, 256)
    for words in (blocks.tables.reshape(-1), blocks.roots, blocks.keys.reshape(-1)):
        for at in range(words.size):
            for bit in range(64):
                words[at] ^= np.uint64(1 << bit)
                # The root covers the whole table, so even a check of no segment at all sees it.
                assert blocks.bad() == [1], (at, bit)
                assert blocks.bad(segs=[]) == [1], (at, bit)
                words[at] ^= np.uint64(1 << bit)
    assert blocks.bad() == [0]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 2**40))
def test_a_flipped_bit_fails_its_block_and_its_segment_only(
    segment_bytes: int, n_segments: int, n_blocks: int, seed: int, where: int
) -> None:
    blocks = Sealed(n_blocks, n_segments, segment_bytes, seed)
    flat = blocks.payload.reshape(-1)
    at, bit = divmod(where % (flat.size * 8), 8)
    flat[at] ^= 1 << bit
    block, rest = divmod(at, n_segments * segment_bytes)
    hit = rest // segment_bytes
    assert blocks.bad() == [int(i == block) for i in range(n_blocks)]
    assert blocks.bad([hit])[block] == 1
    assert not any(blocks.bad([s for s in range(n_segments) if s != hit]))


@pytest.mark.parametrize("segment_bytes", [256, 4096, 12288])
def test_right_bytes_in_the_wrong_place_fail(segment_bytes: int) -> None:
    def fresh() -> Sealed:
        return Sealed(2, 3, segment_bytes)

    layers = fresh()
    layers.payload[0, [0, 1]] = layers.payload[0, [1, 0]]
    assert layers.bad() == [1, 0]

    layers.tables[0, [0, 1]] = layers.tables[0, [1, 0]]  # the table swapped along
    assert layers.bad() == [1, 0]

    payloads = fresh()
    payloads.payload[[0, 1]] = payloads.payload[[1, 0]]
    assert payloads.bad() == [1, 1]
    payloads.tables[[0, 1]] = payloads.tables[[1, 0]]
    assert payloads.bad() == [1, 1]
    payloads.roots[[0, 1]] = payloads.roots[[1, 0]]  # a whole block under another's key
    assert payloads.bad() == [1, 1]
    payloads.keys[[0, 1]] = payloads.keys[[1, 0]]
    assert payloads.bad() == [0, 0]

    assert fresh().bad(segs=[0], n_segments=2) == [1, 1]


def test_the_layout_is_part_of_the_checksum() -> None:
    data = bytes(8192)
    key = bytes(16)
    one = checksum.reference_segment(data[:4096], key, 0, 2)
    assert one != checksum.reference_segment(data[:4096], key, 1, 2)
    assert one != checksum.reference_segment(data[:4096], key, 0, 1)
    assert one != checksum.reference_segment(data, key, 0, 2)
    assert one != checksum.reference_segment(data[:4096], b"\1" + key[1:], 0, 2)


def test_pages_swapped_within_a_segment_fail() -> None:
    blocks = Sealed(1, 1, 12288)
    pages = blocks.payload.reshape(3, 4096)
    pages[[0, 1]] = pages[[1, 0]]
    assert blocks.bad() == [1]


# The vectors of docs/formats.md: segment_bytes, the table, the root.
VECTORS = [
    (256, [0xA4350A18BD56ABAC], 0x57FFC121BB5C1538),
    (320, [0x18823F0B9F216C05, 0xA980EEE7A47A32C7], 0x562DAC893BB6B506),
    (4096, [0x8B40ADC19849DEC3], 0xD329B19F164244DA),
    (4160, [0x3ECFF0A03E2DB5EA, 0xDEB1E60B903EEC91], 0xD47033D04366E1B2),
    (8192, [0xB2BEBA6ECD1E7108, 0x36C4453623108490], 0xA42205A614635DC7),
    (12800, [0x7FFCF9F58AACB7BE], 0xA173BF4BC4D44881),
]


@pytest.mark.parametrize(("segment_bytes", "table", "root"), VECTORS)
def test_the_published_vectors(segment_bytes: int, table: list[int], root: int) -> None:
    blocks = Sealed(1, len(table), segment_bytes)
    at = np.arange(segment_bytes)
    for segment in range(len(table)):
        blocks.payload[0, segment] = (7 * at + 13 * segment + at // 256) % 256
    blocks.keys[0] = np.frombuffer(bytes(range(16)), dtype=np.uint64)
    blocks.seal()
    assert blocks.tables[0].tolist() == table
    assert int(blocks.roots[0]) == root


def test_place_and_key_are_what_catches_a_swap() -> None:
    """The pages' digests alone know neither: with only those, swapped layers would pass."""
    pages = [np.full(4096, layer, dtype=np.uint8).tobytes() for layer in range(2)]
    digests = {checksum.reference_xxh3_64(page) for page in pages}
    assert digests == {checksum.reference_xxh3_64(page) for page in reversed(pages)}
    key = bytes(16)
    sums = [checksum.reference_segment(page, key, s, 2) for s, page in enumerate(pages)]
    swapped = [checksum.reference_segment(page, key, s, 2) for s, page in enumerate(reversed(pages))]
    assert not set(sums) & set(swapped)
