"""BLAKE2b as a machine-code kernel, for one purpose: the keys of a chain of blocks.

Covers the compression function (RFC 7693, section 3.2) and the walk along a chain. Does not cover what is
hashed and why (`chain.py`), nor extra identities of a block, which are rare and go through hashlib there.

Importing this module compiles the kernel (seconds, once per machine) or loads it (milliseconds):
`chain.warm()` is the one place that does so.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from penstock.jit import inline_kernel, kernel

__all__ = ["chain_kernel", "initial_state"]

U64 = np.uint64
Words = npt.NDArray[np.uint64]
State = tuple[U64, U64, U64, U64, U64, U64, U64, U64]
Work = tuple[U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64, U64]

# RFC 7693, section 2.6: the first 64 bits of the fractional parts of the square roots of the first eight
# primes.
IV0 = U64(0x6A09E667F3BCC908)
IV1 = U64(0xBB67AE8584CAA73B)
IV2 = U64(0x3C6EF372FE94F82B)
IV3 = U64(0xA54FF53A5F1D36F1)
IV4 = U64(0x510E527FADE682D1)
IV5 = U64(0x9B05688C2B3E6C1F)
IV6 = U64(0x1F83D9ABFB41BD6B)
IV7 = U64(0x5BE0CD19137E2179)
NOT_LAST = U64(0)
LAST = U64(0xFFFFFFFFFFFFFFFF)


def initial_state(digest_bytes: int, person: bytes) -> Words:
    """The eight state words before the first compression: unkeyed, unsalted, sequential BLAKE2b.

    The parameter block is that of the BLAKE2 paper, section 2.8: digest length, fan-out 1 and depth 1 in the
    first word, the personalisation (at most 16 bytes, padded with zeros) in the last two.
    """
    if not 1 <= digest_bytes <= 64 or len(person) > 16:
        raise ValueError("BLAKE2b takes a digest of 1 to 64 bytes and a personalisation of at most 16")
    state = np.array([IV0, IV1, IV2, IV3, IV4, IV5, IV6, IV7], dtype=np.uint64)
    state[0] ^= U64(0x01010000 | digest_bytes)
    state[6:] ^= np.frombuffer(person.ljust(16, b"\0"), dtype="<u8")
    return state


@inline_kernel
def _rotated(x: U64, bits: int) -> U64:
    return (x >> U64(bits)) | (x << U64(64 - bits))


@inline_kernel
def _mix(a: U64, b: U64, c: U64, d: U64, x: U64, y: U64) -> tuple[U64, U64, U64, U64]:
    """The mixing function G (RFC 7693, section 3.1)."""
    a = a + b + x
    d = _rotated(d ^ a, 32)
    c = c + d
    b = _rotated(b ^ c, 24)
    a = a + b + y
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 63)
    return a, b, c, d


@inline_kernel
def _round(
    v: Work,
    m0: U64,
    m1: U64,
    m2: U64,
    m3: U64,
    m4: U64,
    m5: U64,
    m6: U64,
    m7: U64,
    m8: U64,
    m9: U64,
    m10: U64,
    m11: U64,
    m12: U64,
    m13: U64,
    m14: U64,
    m15: U64,
) -> Work:
    """One round: four mixes down the columns, four along the diagonals."""
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15 = v
    v0, v4, v8, v12 = _mix(v0, v4, v8, v12, m0, m1)
    v1, v5, v9, v13 = _mix(v1, v5, v9, v13, m2, m3)
    v2, v6, v10, v14 = _mix(v2, v6, v10, v14, m4, m5)
    v3, v7, v11, v15 = _mix(v3, v7, v11, v15, m6, m7)
    v0, v5, v10, v15 = _mix(v0, v5, v10, v15, m8, m9)
    v1, v6, v11, v12 = _mix(v1, v6, v11, v12, m10, m11)
    v2, v7, v8, v13 = _mix(v2, v7, v8, v13, m12, m13)
    v3, v4, v9, v14 = _mix(v3, v4, v9, v14, m14, m15)
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@inline_kernel
def _compressed(h: State, words: Words, at: int, counter: U64, last: U64) -> State:
    """The state after the 16 message words that start at `at`; `counter` is the bytes hashed up to their end.

    Written out: the message schedule (RFC 7693, section 2.7) as constants keeps all words in registers, half
    again as fast as indexing it.
    """
    m0, m1, m2, m3 = words[at], words[at + 1], words[at + 2], words[at + 3]
    m4, m5, m6, m7 = words[at + 4], words[at + 5], words[at + 6], words[at + 7]
    m8, m9, m10, m11 = words[at + 8], words[at + 9], words[at + 10], words[at + 11]
    m12, m13, m14, m15 = words[at + 12], words[at + 13], words[at + 14], words[at + 15]
    h0, h1, h2, h3, h4, h5, h6, h7 = h
    v = (h0, h1, h2, h3, h4, h5, h6, h7, IV0, IV1, IV2, IV3, IV4 ^ counter, IV5, IV6 ^ last, IV7)
    v = _round(v, m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15)
    v = _round(v, m14, m10, m4, m8, m9, m15, m13, m6, m1, m12, m0, m2, m11, m7, m5, m3)
    v = _round(v, m11, m8, m12, m0, m5, m2, m15, m13, m10, m14, m3, m6, m7, m1, m9, m4)
    v = _round(v, m7, m9, m3, m1, m13, m12, m11, m14, m2, m6, m5, m10, m4, m0, m15, m8)
    v = _round(v, m9, m0, m5, m7, m2, m4, m10, m15, m14, m1, m11, m12, m6, m8, m3, m13)
    v = _round(v, m2, m12, m6, m10, m0, m11, m8, m3, m4, m13, m7, m5, m15, m14, m1, m9)
    v = _round(v, m12, m5, m1, m15, m14, m13, m4, m10, m0, m7, m6, m3, m9, m2, m8, m11)
    v = _round(v, m13, m11, m7, m14, m12, m1, m3, m9, m5, m0, m15, m4, m8, m6, m2, m10)
    v = _round(v, m6, m15, m14, m9, m11, m3, m0, m8, m12, m2, m13, m7, m1, m4, m10, m5)
    v = _round(v, m10, m2, m8, m4, m7, m6, m1, m5, m15, m11, m9, m14, m3, m12, m13, m0)
    v = _round(v, m0, m1, m2, m3, m4, m5, m6, m7, m8, m9, m10, m11, m12, m13, m14, m15)
    v = _round(v, m14, m10, m4, m8, m9, m15, m13, m6, m1, m12, m0, m2, m11, m7, m5, m3)
    return (
        h0 ^ v[0] ^ v[8],
        h1 ^ v[1] ^ v[9],
        h2 ^ v[2] ^ v[10],
        h3 ^ v[3] ^ v[11],
        h4 ^ v[4] ^ v[12],
        h5 ^ v[5] ^ v[13],
        h6 ^ v[6] ^ v[14],
        h7 ^ v[7] ^ v[15],
    )


@inline_kernel
def _pack_tokens(words: Words, tokens: npt.NDArray[np.uint32], first: int, count: int) -> None:
    """Write `count` token ids as little-endian u32 from word 2 on; words 0 and 1 hold the parent key."""
    for pair in range(count // 2):
        low = U64(tokens[first + 2 * pair])
        words[2 + pair] = low | (U64(tokens[first + 2 * pair + 1]) << U64(32))
    if count % 2:
        words[2 + count // 2] = U64(tokens[first + count - 1])


@kernel("void(uint32[::1], uint64[::1], uint64[::1], int64, uint64[:, ::1])")
def chain_kernel(tokens: npt.NDArray[np.uint32], parent: Words, state: Words, block_tokens: int, keys: Words) -> None:
    """Fill `keys` (n, 2) with the keys of the first n blocks of `tokens`, the first one the child of `parent`
    (2,).

    `state` is `initial_state(16, person)`. `tokens` must hold at least n * block_tokens ids: nothing is
    checked here.
    """
    size = 16 + 4 * block_tokens
    chunks = (size + 127) // 128
    words = np.zeros(16 * chunks, dtype=np.uint64)
    words[0], words[1] = parent[0], parent[1]
    start = (state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7])
    for block in range(keys.shape[0]):
        _pack_tokens(words, tokens, block * block_tokens, block_tokens)
        h = start
        for chunk in range(chunks - 1):
            h = _compressed(h, words, 16 * chunk, U64(128 * (chunk + 1)), NOT_LAST)
        h = _compressed(h, words, 16 * (chunks - 1), U64(size), LAST)
        keys[block, 0], keys[block, 1] = h[0], h[1]
        words[0], words[1] = h[0], h[1]
