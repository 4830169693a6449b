"""Keys from other engines' hashes: as documented, apart from all other keys, and chained for the pool."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest

from penstock.errors import ConfigError
from penstock.identity import chain_keys, root_key, unpack_keys
from penstock.identity.foreign import foreign_chain, foreign_keys
from tests.support import SPACE

NAMES = [b"first", b"second", b"third", b"fourth"]


def test_keys_are_made_as_documented() -> None:
    root = blake2b(SPACE.digest(), digest_size=16, person=b"penstock-root").digest()
    expected = [blake2b(root + name, digest_size=16, person=b"penstock-foreign").digest() for name in NAMES]
    assert unpack_keys(foreign_keys(SPACE, NAMES)) == expected
    assert expected[0].hex() == "512d8121227c4c7c028f58dd65ff0fd2"


def test_a_key_says_nothing_but_its_name_and_space() -> None:
    alone = foreign_keys(SPACE, NAMES[2:3])
    assert np.array_equal(foreign_keys(SPACE, NAMES)[2:3], alone)
    other = type(SPACE)(**{name: getattr(SPACE, name) for name in ("weights", "config", "engine", "layout", "dtype")},
                        block_tokens=32, n_segments=4, segment_bytes=1024)  # fmt: skip
    assert not np.array_equal(foreign_keys(other, NAMES[2:3]), alone)


def test_a_foreign_key_is_no_token_key_and_no_root() -> None:
    """Even where the bytes that are hashed are the same: a token key hashes its parent, here the root, and ids."""
    tokens = np.arange(SPACE.block_tokens, dtype=np.uint32)
    assert foreign_chain(SPACE, [tokens.tobytes()])[0] != chain_keys(SPACE, tokens)[0]
    assert root_key(SPACE) not in foreign_chain(SPACE, NAMES)


def test_a_chain_continues_where_the_one_before_ends() -> None:
    whole = foreign_chain(SPACE, NAMES)
    rest = foreign_chain(SPACE, NAMES[2:], before=NAMES[:2])
    assert whole.parent == root_key(SPACE) and whole.start_block == 0 and len(whole) == 4
    assert rest == whole[2:] and rest.parent == whole[1]
    assert len(foreign_chain(SPACE, [])) == 0


def test_without_what_comes_before_it_hangs_from_the_root_under_the_same_key() -> None:
    run = foreign_chain(SPACE, NAMES[2:])
    assert run.parent == root_key(SPACE)
    assert list(run) == list(foreign_chain(SPACE, NAMES))[2:]


def test_a_nameless_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        foreign_chain(SPACE, [b"first", b""])
