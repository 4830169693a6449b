"""Keys from another engine's own hashes.

Some engines hand a connector no token ids, only names of blocks that already stand for the whole sequence up to
the block's end (SGLang's chained page hashes). Covers deriving pool keys from such names. Does not cover keys from
token ids (`chain.py`), and does not make a weak name strong: two blocks of one name are one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from penstock.errors import ConfigError
from penstock.identity.chain import KEY_BYTES, Key, KeyArray, KeyChain, root_key
from penstock.identity.space import Space

__all__ = ["foreign_chain", "foreign_keys"]

# Never taken for a root or for a key made from token ids.
FOREIGN_PERSON = b"penstock-foreign"


def foreign_keys(space: Space, names: Sequence[bytes]) -> KeyArray:
    """The keys of blocks with these names, (n, 2) uint64: BLAKE2b-128 over the space's root and the name.

    Raises ConfigError for an empty name.
    """
    if not all(names):
        raise ConfigError("a block's name is empty: every block needs the hash that stands for it")
    start = blake2b(root_key(space), digest_size=KEY_BYTES, person=FOREIGN_PERSON)
    keys = bytearray()
    for name in names:
        hashed = start.copy()
        hashed.update(name)
        keys += hashed.digest()
    return np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)


def foreign_chain(space: Space, names: Sequence[bytes], *, before: Sequence[bytes] = ()) -> KeyChain:
    """The chain of the blocks with these names, which follow the blocks named in `before` from the sequence's
    start.

    Each key's parent is the key of the block before it, and the space's root for the first one. Without `before` the
    first of `names` hangs from the root, whether or not it starts the sequence: its own key is the same either way.
    """
    parent = Key(foreign_keys(space, before[-1:]).tobytes()) if before else root_key(space)
    return KeyChain.known(space, foreign_keys(space, names), parent=parent, start_block=len(before))
