"""Key chains against a reference in three lines of hashlib, with and without the kernel."""

from __future__ import annotations

import array
import copy
import hashlib
import pickle
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.identity import Key, KeyChain, Space, chain, chain_keys, pack_keys, root_key, unpack_keys, warm
from tests.identity.test_space import BASE

SPACE = Space(**BASE | {"block_tokens": 4})
same_for_each_input = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def reference(space: Space, ids: list[int], extras: dict[int, bytes] | None = None) -> list[bytes]:
    keys = [hashlib.blake2b(space.digest(), digest_size=16, person=b"penstock-root").digest()]
    size = space.block_tokens
    for block in range(len(ids) // size):
        data = keys[-1] + struct.pack(f"<{size}I", *ids[block * size : (block + 1) * size])
        person = b"penstock-key-v1"
        if extras and block in extras:
            data += struct.pack("<I", len(extras[block])) + extras[block]
            person = b"penstock-keyx-v1"
        keys.append(hashlib.blake2b(data, digest_size=16, person=person).digest())
    return keys[1:]


@pytest.fixture(params=["hashlib", "kernel"])
def hashing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of hashing, whatever other tests have warmed."""
    assert warm()
    if request.param == "hashlib":
        monkeypatch.setattr(chain, "_bulk", None)
    monkeypatch.setattr(chain, "_KERNEL_FROM", 1)


@pytest.mark.usefixtures("hashing")
@same_for_each_input
@given(st.integers(1, 512), st.integers(0, 5), st.integers(0, 2**32 - 1), st.integers(0, 511))
def test_keys_match_the_reference(block_tokens: int, blocks: int, seed: int, rest: int) -> None:
    space = Space(**BASE | {"block_tokens": block_tokens})
    count = block_tokens * blocks + rest % block_tokens
    ids = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.int64)
    keys = chain_keys(space, ids)
    assert list(keys) == reference(space, ids.tolist())
    assert keys.n_pending == rest % block_tokens


@pytest.mark.usefixtures("hashing")
@pytest.mark.parametrize("block_tokens", [1, 2, 15, 16, 27, 28, 29, 59, 60, 61, 128, 512])
def test_at_the_edges_of_a_compression(block_tokens: int) -> None:
    """28 ids and the parent fill one 128-byte chunk exactly, 60 ids two."""
    space = Space(**BASE | {"block_tokens": block_tokens})
    ids = [2**32 - 1 - 7 * index for index in range(block_tokens * 5)]
    assert list(chain_keys(space, ids)) == reference(space, ids)


@pytest.mark.usefixtures("hashing")
@same_for_each_input
@given(
    st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=11), max_size=6),
    st.dictionaries(st.integers(0, 15), st.binary(min_size=1, max_size=200), max_size=4),
)
def test_extending_in_pieces_gives_the_same_chain(pieces: list[list[int]], extras: dict[int, bytes]) -> None:
    grown = KeyChain(SPACE)
    grown.extend([], extras=extras)
    full = sum(grown.extend(piece) for piece in pieces)
    ids = [token for piece in pieces for token in piece]
    assert list(grown) == reference(SPACE, ids, extras)
    assert grown == chain_keys(SPACE, ids, extras=extras)
    assert (len(grown), grown.n_pending) == (full, len(ids) % 4)


@pytest.mark.usefixtures("hashing")
@same_for_each_input
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 9))
def test_parts_are_chains_of_their_own(first: int, stop: int, more: int) -> None:
    whole = chain_keys(SPACE, range(28))
    part = whole[first:stop]
    assert list(part) == list(whole)[first:stop]
    assert part.start_block == first
    assert part.parent == (whole[first - 1] if first else root_key(SPACE))
    assert part == chain_keys(SPACE, range(4 * first, max(4 * first, 4 * stop)), parent=part.parent, start_block=first)
    part.extend(range(100, 100 + more))
    branch = list(range(4 * max(first, stop))) + list(range(100, 100 + more))
    assert list(part) == reference(SPACE, branch)[first:]
    assert list(whole) == reference(SPACE, list(range(28)))


def test_growth_leaves_parts_copies_and_earlier_arrays_alone() -> None:
    """Room to grow belongs to one chain: two that continue from one place never write over each other."""
    one = chain_keys(SPACE, range(16))
    one.extend(range(16, 20))  # has room for more now
    others = [one[:], copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    before = one.array
    one.extend([1, 2, 3, 4])
    for number, other in enumerate(others):
        other.extend([9, 9, 9, number])
        assert list(other) == reference(SPACE, [*range(20), 9, 9, 9, number])
    assert list(one) == reference(SPACE, [*range(20), 1, 2, 3, 4])
    assert unpack_keys(before) == list(one)[:5]


def test_the_array_is_what_kernels_take() -> None:
    keys = chain_keys(SPACE, range(40))
    for part in (keys, keys[2:7], keys[3:3]):
        assert part.array.dtype == np.uint64
        assert part.array.shape == (len(part), 2)
        assert part.array.flags.carray
    assert keys.array[4].astype("<u8").tobytes() == keys[4] == keys[-6]
    assert np.shares_memory(keys.array, keys[2:7].array)
    assert np.array_equal(pack_keys(list(keys)), keys.array)
    assert unpack_keys(pack_keys([])) == []
    with pytest.raises(ValueError, match="16 bytes"):
        pack_keys([Key(b"short")])


@pytest.mark.usefixtures("hashing")
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "<u4", ">u4", "i8", ">i8", "u8"])
def test_ids_of_any_integer_type(dtype: str) -> None:
    ids = np.arange(64).astype(dtype)
    expected = reference(SPACE, list(range(64)))
    assert list(chain_keys(SPACE, ids)) == expected
    frozen = ids.copy()
    frozen.flags.writeable = False
    assert list(chain_keys(SPACE, frozen)) == expected
    assert list(chain_keys(SPACE, np.repeat(ids, 2)[::2])) == expected
    unaligned = np.frombuffer(bytearray(b"x" + ids.tobytes()), dtype=dtype, offset=1)
    assert list(chain_keys(SPACE, unaligned)) == expected


@pytest.mark.parametrize(
    "ids",
    [
        tuple(range(9)),
        range(9),
        iter(range(9)),
        array.array("q", range(9)),
        [np.int64(i) for i in range(9)],
        (i for i in range(9)),
    ],
    ids=["tuple", "range", "iterator", "array", "numpy scalars", "generator"],
)
def test_ids_of_any_sequence(ids: Any) -> None:
    assert list(chain_keys(SPACE, ids)) == reference(SPACE, list(range(9)))


@pytest.mark.parametrize("bad", [-1, 2**32, 2**63 - 1, -(2**63)])
def test_ids_out_of_range_are_refused_and_change_nothing(bad: int) -> None:
    keys = chain_keys(SPACE, range(6))
    for ids in ([1, 2, bad], np.array([1, 2, bad]), iter([1, 2, bad])):
        with pytest.raises(ConfigError, match=rf"token id {bad} at position 2 is outside 0\.\.4294967295"):
            keys.extend(ids)
        assert (len(keys), keys.n_pending) == (1, 2)
    keys.extend([6, 7])
    assert list(keys) == reference(SPACE, list(range(8)))


def test_ids_out_of_range_in_other_types() -> None:
    for ids in (np.array([3, -1], dtype=np.int8), np.array([3, 2**40], dtype=np.uint64), [3, 2**70]):
        with pytest.raises(ConfigError, match="at position 1 is outside"):
            chain_keys(SPACE, ids)


@pytest.mark.parametrize("ids", [b"abcd", "abcd", [1.5], [None], np.zeros(4), np.zeros((2, 2), int), np.array([True])])
def test_what_is_no_token_ids(ids: Any) -> None:
    with pytest.raises(ConfigError, match="token ids must be"):
        chain_keys(SPACE, ids)


def test_continuing_a_chain() -> None:
    whole = chain_keys(SPACE, range(32))
    later = chain_keys(SPACE, range(12, 32), parent=whole[2], start_block=3)
    assert later == whole[3:]
    assert (later.end_block, later.last) == (8, whole[-1])
    empty = KeyChain(SPACE)
    assert empty.last == root_key(SPACE)
    assert chain_keys(SPACE, range(32), parent=empty.last, start_block=empty.end_block) == whole
    for parent, start in ((None, 3), (whole[2], 0), (root_key(SPACE), 1), (whole[2], -1), (b"short", 2)):
        with pytest.raises(ConfigError):
            KeyChain(SPACE, parent=parent, start_block=start)  # type: ignore[arg-type]


def test_extras_are_kept_until_their_block_is_full() -> None:
    """An image in an unfinished block must not be forgotten: its key would be that of the text alone."""
    keys = chain_keys(SPACE, range(6), extras={1: b"image"})
    keys.extend([6, 7])
    assert list(keys) == reference(SPACE, list(range(8)), {1: b"image"})
    assert keys != chain_keys(SPACE, range(8))


def test_extras_cannot_be_confused() -> None:
    ids = list(range(4))
    variants = [None, {0: b"a"}, {0: b"a\0"}, {0: b"aa"}, {0: b"\1\0\0\0a"}]
    assert len({chain_keys(SPACE, ids, extras=extras)[0] for extras in variants}) == len(variants)


def test_extras_that_no_block_can_carry() -> None:
    keys = chain_keys(SPACE, range(6))
    with pytest.raises(ConfigError, match="next block is 1"):
        keys.extend([], extras={0: b"late"})
    with pytest.raises(ConfigError, match="non-empty bytes"):
        keys.extend([], extras={1: b""})
    keys.extend([], extras={1: b"a"})
    with pytest.raises(ConfigError, match="already given"):
        keys.extend([6, 7], extras={1: b"b"})
    keys.extend([6, 7], extras={1: b"a"})
    assert list(keys) == reference(SPACE, list(range(8)), {1: b"a"})


def test_other_spaces_and_other_tokens_have_other_keys() -> None:
    other = Space(**BASE | {"block_tokens": 4}, tenant=b"other")
    assert not set(chain_keys(SPACE, range(64))) & set(chain_keys(other, range(64)))
    assert chain_keys(SPACE, [1, 2, 3, 4, 5, 6, 7, 8])[1] != chain_keys(SPACE, [0, 2, 3, 4, 5, 6, 7, 8])[1]


def test_the_tail_of_a_callers_array_is_copied() -> None:
    ids = np.arange(6, dtype=np.uint32)
    keys = chain_keys(SPACE, ids)
    ids[:] = 99
    keys.extend([6, 7])
    assert list(keys) == reference(SPACE, list(range(8)))


def test_a_slice_with_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step 1"):
        chain_keys(SPACE, range(16))[::2]


def test_a_wrong_kernel_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.identity import blake2b

    def wrong(tokens: Any, parent: Any, state: Any, block_tokens: int, keys: Any) -> None:
        blake2b_kernel(tokens, parent, state, block_tokens, keys)
        keys[-1, 1] ^= np.uint64(1)

    blake2b_kernel = blake2b.chain_kernel
    monkeypatch.setattr(chain, "_bulk", None)
    monkeypatch.setattr(blake2b, "chain_kernel", wrong)
    with pytest.warns(RuntimeWarning, match="does not match hashlib"):
        assert not warm()
    assert not chain.is_warm()
    assert list(chain_keys(SPACE, range(64))) == reference(SPACE, list(range(64)))


def test_initial_state_refuses_what_blake2b_does_not_take() -> None:
    from penstock.identity.blake2b import initial_state

    for digest_bytes, person in ((0, b""), (65, b""), (16, bytes(17))):
        with pytest.raises(ValueError, match="BLAKE2b takes"):
            initial_state(digest_bytes, person)


def test_importing_identity_loads_no_compiler() -> None:
    code = (
        "import sys, penstock.identity as identity; "
        "assert not identity.is_warm(); sys.exit('numba' in sys.modules or 'penstock.jit' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
