"""Identity: spaces, the fingerprints in them, and the key chains that grow from them.

The same in every process, host and run: nothing here depends on an environment variable, a seed or Python's
own hash. Byte encodings and test vectors are in `docs/formats.md`. Importing this package loads no compiled
code; `warm()` does.
"""

from __future__ import annotations

from penstock.identity.chain import (
    KEY_BYTES,
    Key,
    KeyChain,
    chain_keys,
    is_warm,
    pack_keys,
    root_key,
    unpack_keys,
    warm,
)
from penstock.identity.fingerprint import (
    DigestCache,
    TensorBytes,
    config_digest,
    join_digests,
    tensors_digest,
    weight_files,
    weights_digest,
)
from penstock.identity.space import INLINE_SCALES, SPACE_VERSION, UNIT_SCALES, Rank, Space

__all__ = [
    "INLINE_SCALES",
    "KEY_BYTES",
    "SPACE_VERSION",
    "UNIT_SCALES",
    "DigestCache",
    "Key",
    "KeyChain",
    "Rank",
    "Space",
    "TensorBytes",
    "chain_keys",
    "config_digest",
    "is_warm",
    "join_digests",
    "pack_keys",
    "root_key",
    "tensors_digest",
    "unpack_keys",
    "warm",
    "weight_files",
    "weights_digest",
]
