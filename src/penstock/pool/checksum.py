"""What a block's checksum is: the definition, the reference in plain Python, and the steps the kernels call.

A block has a table of one u64 per layer segment, kept beside its slot, and one u64 root over that table, kept
in the slot record. A segment's checksum depends on the block's key, the segment's index, the segment's size
and the number of segments, so the right bytes in the wrong place fail. It detects accidents; it is no defence
against someone who may write to the pool. `docs/formats.md` states the format with test vectors; `copies.py`
computes it while copying.

Definition (u64 arithmetic, all words little-endian):

    mix(x)       = the finaliser of SplitMix64
    absorb(h, w) = mix((h xor w) + GOLDEN)                  a bijection of h for each w, and of w for each h
    block        = absorb(absorb(absorb(absorb(MAGIC, segment_bytes), n_segments), key[0]), key[1])
    segment s    = absorb(... absorb(absorb(block, s + 1), xxh3_64(page 0)) ..., xxh3_64(page P - 1))
    root         = absorb(absorb(block, 0), sum over s of mix(table[s] + (s + 1) * GOLDEN))

where a segment is cut into P = max(1, segment_bytes // 4096) pages of 4096 bytes, the last of which takes
what is left over (4096 to 8128 bytes; the only page of a segment below 8192 bytes is the segment). `xxh3_64`
is XXH3_64bits with seed 0. Because `absorb` is a bijection, two segments that differ in the digest of one
page differ in their checksum, and two tables that differ in one word differ in their root.

Sources: Y. Collet, "xxHash fast digest algorithm", section "XXH3 algorithm description" (long inputs);
SplitMix64: G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with
D. Stafford's mixer 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from penstock.jit import inline_kernel
from penstock.pool.vector import fold_product, load_plain_u64, scramble, store_plain_u64

__all__ = [
    "LAST_STRIPE_SECRET",
    "MAGIC",
    "PAGE_BYTES",
    "XXH3_BLOCK_BYTES",
    "absorb",
    "begin_page",
    "block_state",
    "end_page",
    "end_xxh3_block",
    "page_lengths",
    "reference_root",
    "reference_segment",
    "reference_xxh3_64",
    "secret_address",
    "table_root",
]

PAGE_BYTES = 4096
MAGIC = int.from_bytes(b"PSTKSUM1", "little")
# XXH3 scrambles its accumulators after every 16 stripes: (192 bytes of secret - 64) / 8.
XXH3_BLOCK_BYTES = 1024
# Where the secret is read for a page's last stripe, and where for the scramble and the final merge.
LAST_STRIPE_SECRET = 192 - 64 - 7
_SCRAMBLE_SECRET = 192 - 64
_MERGE_SECRET = 11

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_AVALANCHE = 0x165667919E3779F9
_START = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)

# XXH3's default secret, a constant of its specification.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


# The reference, in plain Python.


def page_lengths(segment_bytes: int) -> list[int]:
    """The pages' lengths in bytes of a segment of `segment_bytes` (a multiple of 64, at least 256)."""
    n_pages = max(1, segment_bytes // PAGE_BYTES)
    return [PAGE_BYTES] * (n_pages - 1) + [segment_bytes - PAGE_BYTES * (n_pages - 1)]


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _absorb(state: int, word: int) -> int:
    return _mix(((state ^ word) + _GOLDEN) & _MASK)


def _block(key: bytes, segment_bytes: int, n_segments: int) -> int:
    state = MAGIC
    for word in (segment_bytes, n_segments, _word(key, 0), _word(key, 8)):
        state = _absorb(state, word)
    return state


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def reference_xxh3_64(data: bytes) -> int:
    """XXH3_64bits with seed 0, for lengths from 256 bytes that are a multiple of 64."""
    lanes = list(_START)
    n_stripes = len(data) // 64
    for stripe in range(n_stripes):
        last = stripe == n_stripes - 1
        secret = LAST_STRIPE_SECRET if last else 8 * (stripe % 16)
        for lane in range(8):
            value = _word(data, 64 * stripe + 8 * lane)
            mixed = value ^ _word(_SECRET, secret + 8 * lane)
            lanes[lane ^ 1] = (lanes[lane ^ 1] + value) & _MASK
            lanes[lane] = (lanes[lane] + (mixed & 0xFFFFFFFF) * (mixed >> 32)) & _MASK
        if stripe % 16 == 15 and not last:
            for lane, value in enumerate(lanes):
                mixed = value ^ (value >> 47) ^ _word(_SECRET, _SCRAMBLE_SECRET + 8 * lane)
                lanes[lane] = (mixed * _P32_1) & _MASK
    return _reference_merge(lanes, len(data))


def _reference_merge(lanes: list[int], length: int) -> int:
    total = length * _P64_1
    for pair in range(0, 8, 2):
        secret = _MERGE_SECRET + 8 * pair
        product = (lanes[pair] ^ _word(_SECRET, secret)) * (lanes[pair + 1] ^ _word(_SECRET, secret + 8))
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = ((total ^ (total >> 37)) * _AVALANCHE) & _MASK
    return total ^ (total >> 32)


def reference_segment(data: bytes, key: bytes, index: int, n_segments: int) -> int:
    """The checksum of segment `index` (bytes `data`) of a block with 16-byte `key`. Slow: for tests."""
    state = _absorb(_block(key, len(data), n_segments), index + 1)
    at = 0
    for length in page_lengths(len(data)):
        state = _absorb(state, reference_xxh3_64(data[at : at + length]))
        at += length
    return state


def reference_root(table: Sequence[int], key: bytes, segment_bytes: int) -> int:
    """The root over a block's table of segment checksums."""
    total = sum(_mix((word + (index + 1) * _GOLDEN) & _MASK) for index, word in enumerate(table))
    return _absorb(_absorb(_block(key, segment_bytes, len(table)), 0), total & _MASK)


# The same as steps of a kernel.

_U_GOLDEN, _U_MIX_1, _U_MIX_2 = np.uint64(_GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
_U_27, _U_30, _U_31, _U_32, _U_37 = (np.uint64(n) for n in (27, 30, 31, 32, 37))
_U_P32_1, _U_P64_1, _U_AVALANCHE = np.uint64(_P32_1), np.uint64(_P64_1), np.uint64(_AVALANCHE)
_U_MAGIC, _U_0 = np.uint64(MAGIC), np.uint64(0)
_U_START = tuple(np.uint64(word) for word in _START)


@intrinsic  # type: ignore[untyped-decorator]
def secret_address(typing_context: Any) -> Any:
    """The address of XXH3's secret, a constant inside the kernel's own machine code."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        secret_type = ir.ArrayType(ir.IntType(8), len(_SECRET))
        secret = cgutils.global_constant(
            builder.module,
            "penstock_xxh3_secret",
            ir.Constant(secret_type, bytearray(_SECRET)),
            linkage="private",
        )
        return builder.ptrtoint(secret, ir.IntType(64))

    return types.int64(), codegen


@inline_kernel
def mix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> _U_30)) * _U_MIX_1
    x = (x ^ (x >> _U_27)) * _U_MIX_2
    return x ^ (x >> _U_31)


@inline_kernel
def absorb(state: np.uint64, word: np.uint64) -> np.uint64:
    return mix((state ^ word) + _U_GOLDEN)


@inline_kernel
def block_state(segment_bytes: int, n_segments: int, key_0: np.uint64, key_1: np.uint64) -> np.uint64:
    """What every checksum of one block starts from."""
    state = absorb(absorb(_U_MAGIC, np.uint64(segment_bytes)), np.uint64(n_segments))
    return absorb(absorb(state, key_0), key_1)


@inline_kernel
def table_root(block: np.uint64, table: int, n_segments: int) -> np.uint64:
    """The root over the `n_segments` words at address `table`."""
    total = _U_0
    step = _U_GOLDEN
    for index in range(n_segments):
        total += mix(load_plain_u64(table + 8 * index) + step)
        step += _U_GOLDEN
    return absorb(absorb(block, _U_0), total)


@inline_kernel
def begin_page(accumulators: int) -> None:
    """Set the 64 bytes at `accumulators` to XXH3's start."""
    for lane in range(8):
        store_plain_u64(accumulators + 8 * lane, _U_START[lane])


@inline_kernel
def end_xxh3_block(accumulators: int, secret: int) -> None:
    """Scramble, after 1024 bytes that are not the page's end."""
    scramble(accumulators, secret + _SCRAMBLE_SECRET, _U_P32_1)


@inline_kernel
def end_page(accumulators: int, secret: int, length: int) -> np.uint64:
    """XXH3_64bits of a page of `length` bytes whose stripes have all been accumulated."""
    total = np.uint64(length) * _U_P64_1
    for pair in range(4):
        at, key = accumulators + 16 * pair, secret + _MERGE_SECRET + 16 * pair
        left = load_plain_u64(at) ^ load_plain_u64(key)
        total += fold_product(left, load_plain_u64(at + 8) ^ load_plain_u64(key + 8))
    total = (total ^ (total >> _U_37)) * _U_AVALANCHE
    return total ^ (total >> _U_32)
