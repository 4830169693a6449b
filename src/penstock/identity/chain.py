"""Key chains: the identity of every full block of a token sequence.

Covers how keys are derived (`docs/formats.md` has vectors), and the append-only `KeyChain` that holds them as
an array. Keys are hashed with hashlib until `warm()` has loaded the kernel of `blake2b.py`; both give the
same bytes. Does not cover what a space is (`space.py`), nor where blocks are (`pool/`).
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NewType, overload

import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError
from penstock.identity.space import Space

__all__ = [
    "KEY_BYTES",
    "Key",
    "KeyChain",
    "chain_keys",
    "is_warm",
    "pack_keys",
    "root_key",
    "unpack_keys",
    "warm",
]

Key = NewType("Key", bytes)
"""The 16-byte identity of a block."""
KEY_BYTES = 16

# BLAKE2b personalisations: a root, a key and a key with an extra identity can never be taken for one another.
ROOT_PERSON = b"penstock-root"
KEY_PERSON = b"penstock-key-v1"
EXTRA_PERSON = b"penstock-keyx-v1"

MAX_TOKEN = 0xFFFFFFFF
# Below this many blocks the call into the kernel costs more than hashlib does.
_KERNEL_FROM = 4

KeyArray = npt.NDArray[np.uint64]
TokenArray = npt.NDArray[np.uint32]
TokenIds = Sequence[int] | npt.NDArray[Any] | Iterable[int]
Extras = Mapping[int, bytes]
_State = tuple[Space, Key, int, KeyArray, TokenArray, dict[int, bytes]]


def root_key(space: Space) -> Key:
    """The parent of the first block of every chain in `space`; no block has it as its own key."""
    return Key(blake2b(space.digest(), digest_size=KEY_BYTES, person=ROOT_PERSON).digest())


def pack_keys(keys: Sequence[Key]) -> KeyArray:
    """The keys as a (n, 2) uint64 array, each row a key read as two little-endian words."""
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    return np.frombuffer(bytearray(b"".join(keys)), dtype="<u8").reshape(-1, 2)


def unpack_keys(rows: KeyArray) -> list[Key]:
    """The inverse of `pack_keys`."""
    data = np.ascontiguousarray(rows, dtype="<u8").tobytes()
    return [Key(data[at : at + KEY_BYTES]) for at in range(0, len(data), KEY_BYTES)]


def chain_keys(
    space: Space,
    token_ids: TokenIds,
    *,
    parent: Key | None = None,
    start_block: int = 0,
    extras: Extras | None = None,
) -> KeyChain:
    """The chain of the full blocks of `token_ids`; ids beyond the last full block wait in the chain for
    `extend`.

    `parent` and `start_block` continue a chain whose last key and number of blocks are known. `extras` gives,
    by the block's index in the whole sequence, what its content depends on besides token ids: the hash of an
    image with its position in the block, of prompt embeddings, and so on. Raises ConfigError for ids outside
    u32 and for extras that no block to come can carry.
    """
    chain = KeyChain(space, parent=parent, start_block=start_block)
    chain.extend(token_ids, extras=extras)
    return chain


class KeyChain:
    """Keys of consecutive blocks of one token sequence; append-only.

    `array` holds them as a C-contiguous (n, 2) uint64 array: row i is the key of block `start_block + i`,
    read as two little-endian words. A slice shares the keys and does not copy; `extend` never changes keys
    that exist, so slices and earlier values of `array` stay true. Do not write to `array`. One thread at a
    time may extend a chain.
    """

    __slots__ = ("_buffer", "_pending", "_pending_extras", "array", "parent", "space", "start_block")

    array: KeyArray
    parent: Key
    """The key before the first one: the space's root where the chain starts at block 0."""
    space: Space
    start_block: int

    def __init__(self, space: Space, *, parent: Key | None = None, start_block: int = 0) -> None:
        root = root_key(space)
        parent = root if parent is None else parent
        if start_block < 0 or (parent == root) != (start_block == 0):
            raise ConfigError(
                f"start_block={start_block} with parent={parent.hex()}: a chain starts at block 0 with the "
                "space's root, or later with the key of the block before it"
            )
        if len(parent) != KEY_BYTES:
            raise ConfigError(f"a parent key has {KEY_BYTES} bytes, not {len(parent)}")
        self.space = space
        self.parent = parent
        self.start_block = start_block
        self._buffer = np.empty((0, 2), dtype=np.uint64)
        self.array = self._buffer
        self._pending = np.empty(0, dtype=np.uint32)
        self._pending_extras: dict[int, bytes] = {}

    @staticmethod
    def known(space: Space, keys: KeyArray, *, parent: Key, start_block: int) -> KeyChain:
        """A chain of keys that were derived elsewhere, as for blocks that another process names; `keys` is not
        copied. Raises ConfigError as the constructor does, and for an array of another form."""
        if keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2 or not keys.flags.c_contiguous:
            raise ConfigError(f"keys must be a contiguous (n, 2) uint64 array, not {keys.dtype} {keys.shape}")
        chain = KeyChain(space, parent=parent, start_block=start_block)
        chain.__setstate__((space, parent, start_block, keys, np.empty(0, dtype=np.uint32), {}))
        return chain

    @property
    def end_block(self) -> int:
        """Index of the block after the last one that has a key."""
        return self.start_block + len(self)

    @property
    def last(self) -> Key:
        """The key of the last block, or `parent` while there is none: what the next key grows from."""
        return self[-1] if len(self) else self.parent

    @property
    def n_pending(self) -> int:
        """Token ids that wait for their block to become full."""
        return self._pending.size

    def extend(self, token_ids: TokenIds, *, extras: Extras | None = None) -> int:
        """Append token ids; returns how many blocks became full. If it raises, the chain is as before.

        `extras` as in `chain_keys`; those of a block that is not full yet are kept until it is.
        """
        tokens = _as_u32(token_ids)
        merged = self._merged_extras(extras)
        if self._pending.size:
            tokens = np.concatenate((self._pending, tokens))
        block_tokens = self.space.block_tokens
        full = tokens.size // block_tokens
        if full:
            end = self.end_block + full
            now = {block - self.end_block: extra for block, extra in merged.items() if block < end}
            self._append(tokens, full, now)
            merged = {block: extra for block, extra in merged.items() if block >= end}
        # A copy: the caller's array may change, and would stay alive as a whole.
        self._pending = tokens[full * block_tokens :].copy()
        self._pending_extras = merged
        return full

    def _merged_extras(self, extras: Extras | None) -> dict[int, bytes]:
        merged = self._pending_extras
        if not extras:
            return merged
        merged = dict(merged)
        for block, extra in extras.items():
            if not _is_extra(extra):
                raise ConfigError(f"extras[{block}] must be non-empty bytes: leave blocks without an extra out")
            if block < self.end_block:
                raise ConfigError(
                    f"extras[{block}]: the chain's next block is {self.end_block}. Extras are named by the "
                    "block's index in the whole sequence and come no later than the ids that fill it"
                )
            if merged.setdefault(block, extra) != extra:
                raise ConfigError(f"extras[{block}] was already given as other bytes")
        return merged

    def _append(self, tokens: TokenArray, n_blocks: int, extras: dict[int, bytes]) -> None:
        start = len(self)
        end = start + n_blocks
        buffer = self._buffer
        if end > len(buffer):
            # The first fill is exact (most chains never grow); growth doubles: appending
            # stays linear.
            buffer = np.empty((max(end, 2 * start), 2), dtype=np.uint64)
            buffer[:start] = self.array
        _fill(buffer[start:end], tokens, self.last, self.space.block_tokens, extras)
        self._buffer = buffer
        self.array = buffer[:end]

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> Key: ...

    @overload
    def __getitem__(self, index: slice) -> KeyChain: ...

    def __getitem__(self, index: int | slice) -> Key | KeyChain:
        """A key as bytes, or a part of the chain (step 1 only), which ends at its last key: it holds no
        pending ids."""
        if isinstance(index, slice):
            return self._part(index)
        return Key(self.array[index].tobytes())

    def _part(self, index: slice) -> KeyChain:
        first, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError("a chain can only be sliced with step 1: its blocks are consecutive")
        part = KeyChain.__new__(KeyChain)
        parent = self[first - 1] if first else self.parent
        keys = self.array[first : max(first, stop)]
        part.__setstate__((self.space, parent, self.start_block + first, keys, np.empty(0, dtype=np.uint32), {}))
        return part

    def __getstate__(self) -> _State:
        return self.space, self.parent, self.start_block, self.array, self._pending, self._pending_extras

    def __setstate__(self, state: _State) -> None:
        self.space, self.parent, self.start_block, self.array, self._pending, self._pending_extras = state
        # Exactly as long as the keys, so that extending a part or a copy moves to a buffer of its own.
        self._buffer = self.array

    def __iter__(self) -> Iterator[Key]:
        return iter(unpack_keys(self.array))

    def __eq__(self, other: object) -> bool:
        """Same blocks at the same place: pending ids do not count."""
        if not isinstance(other, KeyChain):
            return NotImplemented
        same_place = self.parent == other.parent and self.start_block == other.start_block
        return same_place and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"KeyChain(blocks {self.start_block}..{self.end_block}, {self.n_pending} pending ids)"


def _is_extra(extra: object) -> bool:
    return isinstance(extra, bytes) and 0 < len(extra) <= MAX_TOKEN


def _as_u32(token_ids: TokenIds) -> TokenArray:
    """The ids as a one-dimensional uint32 array that a kernel can take; not a copy where it is one
    already."""
    if hasattr(token_ids, "__array__"):
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ConfigError(f"token ids must be a flat row of integers, not {ids.dtype} of shape {ids.shape}")
        _check_range(ids)
        tokens = ids.astype(np.uint32, copy=False)
        # Kernels are compiled for contiguous, aligned, writable arrays.
        return tokens if tokens.flags.carray else tokens.copy()
    if isinstance(token_ids, (str, bytes, bytearray)):
        raise ConfigError(f"token ids must be integers, not {type(token_ids).__name__}: tokenize the text first")
    row = token_ids if isinstance(token_ids, (list, tuple)) else list(token_ids)
    try:
        return np.frombuffer(array("I", row), dtype=np.uint32)
    except OverflowError:
        _check_range(np.array(row, dtype=object))
        raise
    except TypeError as error:
        raise ConfigError(f"token ids must be a flat row of integers: {error}") from error


def _check_range(ids: npt.NDArray[Any]) -> None:
    if not ids.size or (ids.dtype.kind == "u" and ids.dtype.itemsize <= 4):
        return
    if ids.dtype == np.int64:
        # One pass: a negative id sets the top bit.
        if int(np.bitwise_or.reduce(ids)) >> 32 == 0:
            return
    elif ids.min() >= 0 and ids.max() <= MAX_TOKEN:
        return
    at = int(np.flatnonzero((ids < 0) | (ids > MAX_TOKEN))[0])
    raise ConfigError(
        f"token id {ids[at]} at position {at} is outside 0..{MAX_TOKEN}: ids are hashed as u32. Where it "
        "stands for an image or an embedding, pass a valid placeholder and the content's hash as an extra"
    )


def _fill(out: KeyArray, tokens: TokenArray, parent: Key, block_tokens: int, extras: dict[int, bytes]) -> None:
    """Write the keys of the first len(out) blocks of `tokens`; `extras` by row of `out`."""
    at = 0
    for row in sorted(extras):
        parent = _fill_plain(out[at:row], tokens[at * block_tokens :], parent, block_tokens)
        ids = tokens[row * block_tokens : (row + 1) * block_tokens]
        parent = _key_with_extra(parent, ids, extras[row])
        out[row] = np.frombuffer(parent, dtype="<u8")
        at = row + 1
    _fill_plain(out[at:], tokens[at * block_tokens :], parent, block_tokens)


def _key_with_extra(parent: Key, ids: TokenArray, extra: bytes) -> Key:
    data = parent + ids.astype("<u4", copy=False).tobytes() + len(extra).to_bytes(4, "little") + extra
    return Key(blake2b(data, digest_size=KEY_BYTES, person=EXTRA_PERSON).digest())


def _fill_plain(out: KeyArray, tokens: TokenArray, parent: Key, block_tokens: int) -> Key:
    """Write the keys of len(out) blocks without extras; returns the last one, or `parent` if there is
    none."""
    if not len(out):
        return parent
    if _bulk is not None and len(out) >= _KERNEL_FROM:
        row = np.array(np.frombuffer(parent, dtype="<u8"), dtype=np.uint64)
        _bulk.kernel(tokens, row, _bulk.state, block_tokens, out)
        return Key(out[-1].tobytes())
    return _fill_hashlib(out, tokens, parent, block_tokens)


def _fill_hashlib(out: KeyArray, tokens: TokenArray, parent: Key, block_tokens: int) -> Key:
    size = 4 * block_tokens
    data = tokens[: len(out) * block_tokens].astype("<u4", copy=False).tobytes()
    keys = []
    key: bytes = parent
    for at in range(0, len(data), size):
        key = blake2b(key + data[at : at + size], digest_size=KEY_BYTES, person=KEY_PERSON).digest()
        keys.append(key)
    out[:] = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
    return Key(key)


@dataclass(frozen=True, slots=True)
class _Bulk:
    """The kernel, with the state that every key's hash starts from."""

    kernel: Any
    state: KeyArray


_bulk: _Bulk | None = None


def is_warm() -> bool:
    """Whether keys are hashed by the kernel."""
    return _bulk is not None


def warm() -> bool:
    """Load the kernel, or compile it (about 2 s, once per machine); blocks meanwhile, and may run on any
    thread.

    Returns whether the kernel is in use from now on: one that does not give hashlib's keys (numba's cache can
    be damaged) is warned about and never used.
    """
    global _bulk
    if _bulk is None:
        from penstock.identity import blake2b as kernels

        bulk = _Bulk(kernels.chain_kernel, kernels.initial_state(KEY_BYTES, KEY_PERSON))
        if not _agrees(bulk):
            warnings.warn(
                "the compiled BLAKE2b kernel does not match hashlib, which stays in use. Remedy: delete the "
                "compiled kernels under PENSTOCK_CACHE_DIR (default ~/.cache/penstock)",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        _bulk = bulk
    return True


def _agrees(bulk: _Bulk) -> bool:
    """Compare with hashlib where blocks take one compression (16 ids), an odd number of ids, and several
    (77)."""
    tokens = np.arange(4 * 77, dtype=np.uint32) * np.uint32(0x9E3779B1)
    parent = Key(bytes(range(KEY_BYTES)))
    row = np.array(np.frombuffer(parent, dtype="<u8"), dtype=np.uint64)
    for block_tokens in (1, 16, 77):
        expected = np.empty((4, 2), dtype=np.uint64)
        found = np.empty((4, 2), dtype=np.uint64)
        _fill_hashlib(expected, tokens, parent, block_tokens)
        bulk.kernel(tokens, row, bulk.state, block_tokens, found)
        if not np.array_equal(expected, found):
            return False
    return True
