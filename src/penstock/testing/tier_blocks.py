"""Blocks for tests of tiers: spaces, keys, page-aligned batches with real checksums, and the check of what came back.

What a block holds follows from its key and a version: engines that compute the same block twice get other bytes in its
last bits, so one key may have several right contents, each with its own root. Does not cover blocks in a pool
(`pool.py`).
"""

from __future__ import annotations

import mmap
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from penstock.pool.copies import seal
from penstock.tiers.base import Batch, BlockSpace, Found, Keys

__all__ = [
    "AWKWARD_KEYS",
    "PAGE_BYTES",
    "Buffers",
    "assert_right",
    "block_keys",
    "contents",
    "empty",
    "filled",
    "parents_of",
    "roots_of",
    "tier_space",
    "version_of",
]

PAGE_BYTES = 4096
AWKWARD_KEYS: Keys = np.frombuffer(
    bytearray(
        bytes(16) + b"\xff" * 16 + bytes(15) + b"\x01" + b"\x01" + bytes(15) + b"\r\n" * 8 + b"\n" * 16
        + b"$-1\r\n*0\r\n+OK\r\n\r\n" b"../../../etc/pwd" + b"/" * 16 + b" " * 16 + b"%00%2f%2e?a=b#cd"
        + b"\x80\xfe" * 8 + b"{tag}{tag}{tag}}" b"KEYKEYKEYKEYKEYK" b"keykeykeykeykeyk" b"'; DROP TABLE b;"
    ),
    "<u8",
).reshape(-1, 2)  # fmt: skip
"""Keys that texts, paths, line protocols and letter case trip over."""
_CANARY, _NOISE = 0xA5, 0x3C


def tier_space(number: int = 0, n_segments: int = 4, segment_bytes: int = 1024, block_tokens: int = 16) -> BlockSpace:
    """The space of that number; its digest and root hold bytes that texts and paths trip over."""
    name = f"{number}/{n_segments}x{segment_bytes}".encode()
    odd = b"\x00\n\r/\xff%"
    return BlockSpace(
        odd + blake2b(name, digest_size=32 - len(odd)).digest(),
        blake2b(name, digest_size=16 - len(odd)).digest() + odd,
        n_segments * segment_bytes,
        block_tokens,
        n_segments,
        segment_bytes,
        f"test {number}/Größe 16",
    )


def block_keys(space: BlockSpace, chain: int, n: int, first: int = 0) -> Keys:
    """(n, 2): the keys of blocks `first` to `first + n - 1` of a chain, the same in every process."""
    parts = (
        blake2b(f"{chain} {i}".encode(), key=space.digest, digest_size=16).digest() for i in range(first, first + n)
    )
    return np.frombuffer(bytearray(b"".join(parts)), "<u8").reshape(-1, 2)


def parents_of(space: BlockSpace, keys: Keys) -> Keys:
    """(n, 2): the parents of a chain's blocks from its head on."""
    above = np.empty_like(keys)
    above[:1] = np.frombuffer(space.root, "<u8")
    above[1:] = keys[:-1]
    return above


def contents(keys: Keys, block_bytes: int, version: int = 0) -> npt.NDArray[np.uint8]:
    """(n, block_bytes): what the blocks with these keys hold; versions differ in every word."""
    keys = np.ascontiguousarray(keys, np.uint64).reshape(-1, 2)
    steps = np.arange(1, block_bytes // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = keys[:, :1] ^ (keys[:, 1:] + steps + np.uint64(version))
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(32)
    return words.view(np.uint8)


class Buffers:
    """n page-aligned buffers for blocks of a space, each with room up to the next page, and a canary page around each.

    The memory lives as long as one of the views.
    """

    def __init__(self, space: BlockSpace, n: int) -> None:
        self.room_bytes = -(-space.block_bytes // PAGE_BYTES) * PAGE_BYTES
        stride = self.room_bytes + PAGE_BYTES
        memory = np.frombuffer(mmap.mmap(-1, PAGE_BYTES + max(n, 1) * stride), np.uint8)
        memory[:] = _CANARY
        self._memory = memory
        self._rooms = memory[PAGE_BYTES:].reshape(-1, stride)[:n, : self.room_bytes]
        self._rooms[:] = _NOISE
        self.blocks = self._rooms[:, : space.block_bytes]
        """(n, block_bytes): the same memory as one array."""
        self.addresses = memory.ctypes.data + PAGE_BYTES + np.arange(n, dtype=np.int64) * stride

    def views(self, read_only: bool = False) -> list[memoryview]:
        """One view per block, as a batch's payloads."""
        views = [memoryview(block) for block in self.blocks]
        return [view.toreadonly() for view in views] if read_only else views

    def snapshot(self) -> bytes:
        """All of the memory, canaries too, to compare with later."""
        return self._memory.tobytes()

    def assert_only_rooms_changed(self) -> None:
        """Raise AssertionError if anything but the blocks and the room behind each was written to."""
        stray = self._memory != _CANARY
        stray[PAGE_BYTES:].reshape(-1, self.room_bytes + PAGE_BYTES)[: len(self._rooms), : self.room_bytes] = False
        at = np.flatnonzero(stray)
        assert not len(at), f"{len(at)} bytes outside the buffers were written, the first {at[0] - PAGE_BYTES} in"

    def scribble(self, value: int = 0xEE) -> None:
        """What the caller does with the memory after a call: something else."""
        self._rooms[:] = value


def filled(
    space: BlockSpace,
    keys: Keys,
    version: int = 0,
    *,
    parents: Keys | None = None,
    buffers: Buffers | None = None,
    read_only: bool = True,
) -> Batch:
    """A batch to write: the blocks' contents with their roots. `parents`: those of a chain from its head by default."""
    keys = np.ascontiguousarray(keys, np.uint64)
    buffers = buffers or Buffers(space, len(keys))
    buffers.blocks[:] = contents(keys, space.block_bytes, version)
    roots = _seal(space, keys, buffers)
    return Batch(space, keys, parents_of(space, keys) if parents is None else parents, roots, buffers.views(read_only))


def empty(space: BlockSpace, keys: Keys, *, parents: Keys | None = None, buffers: Buffers | None = None) -> Batch:
    """A batch to read into: noise in the buffers and roots that belong to no block."""
    keys = np.ascontiguousarray(keys, np.uint64)
    buffers = buffers or Buffers(space, len(keys))
    roots = np.full(len(keys), 0xDEAD, np.uint64)
    return Batch(space, keys, parents_of(space, keys) if parents is None else parents, roots, buffers.views())


def roots_of(space: BlockSpace, keys: Keys, version: int = 0) -> npt.NDArray[np.uint64]:
    """(n,): the checksum roots of these blocks' contents."""
    return filled(space, keys, version).roots


def version_of(batch: Batch, i: int, versions: range = range(1)) -> int | None:
    """Which version block i of a batch that was read holds, bytes and root; None for none of them."""
    key, have = batch.keys[i : i + 1], np.frombuffer(batch.payloads[i], np.uint8)
    for version in versions:
        if np.array_equal(have, contents(key, batch.space.block_bytes, version)[0]):
            return version if batch.roots[i] == roots_of(batch.space, key, version)[0] else None
    return None


def assert_right(batch: Batch, found: npt.NDArray[np.uint8], here: npt.NDArray[np.bool_] | bool = True) -> None:
    """Raise AssertionError unless exactly the blocks of `here` are HERE, bytes and roots right, the rest ABSENT."""
    assert found.dtype == np.uint8 and found.shape == (len(batch),), (found.dtype, found.shape)
    expected = np.where(np.broadcast_to(here, len(batch)), np.uint8(Found.HERE), np.uint8(Found.ABSENT))
    assert found.tolist() == expected.tolist(), f"found {found.tolist()}, expected {expected.tolist()}"
    expected_roots = roots_of(batch.space, batch.keys)
    right = contents(batch.keys, batch.space.block_bytes)
    for i in np.flatnonzero(found == Found.HERE):
        assert np.array_equal(np.frombuffer(batch.payloads[i], np.uint8), right[i]), f"block {i} has other bytes"
        assert batch.roots[i] == expected_roots[i], f"block {i} has another root"


def _seal(space: BlockSpace, keys: Keys, buffers: Buffers) -> npt.NDArray[np.uint64]:
    n = len(keys)
    tables = np.zeros((n, space.n_segments), np.uint64)
    at = tables.ctypes.data + np.arange(n, dtype=np.int64) * tables.strides[0]
    roots = np.zeros(n, np.uint64)
    segments = np.arange(space.n_segments, dtype=np.int64)
    seal(n, buffers.addresses, segments, space.segment_bytes, space.n_segments, at, keys, roots)
    return roots
