"""Recompute every identity vector of the published formats; as a script, fail on the first that differs.

A script too, because keys must not depend on the process: `test_vectors.py` runs it with other hash seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from penstock.identity import (
    DigestCache,
    Key,
    Rank,
    Space,
    TensorBytes,
    chain_keys,
    config_digest,
    join_digests,
    root_key,
    tensors_digest,
    warm,
    weights_digest,
)

Vectors = dict[str, list[dict[str, Any]]]


def load() -> Vectors:
    """The fenced block `identity-vectors` of docs/formats.md; of the section's own file until it is in
    there."""
    docs = Path(__file__).parents[2] / "docs"
    for name in ("formats.md", "_identity.md"):
        path = docs / name
        _, fence, rest = path.read_text().partition("```json identity-vectors\n") if path.exists() else ("",) * 3
        if fence:
            vectors: Vectors = json.loads(rest.partition("\n```")[0])
            return vectors
    raise FileNotFoundError("docs/formats.md has no identity vectors")


def space_of(fields: dict[str, Any]) -> Space:
    made: dict[str, Any] = {name: Rank(*value) if name.endswith("_rank") else value for name, value in fields.items()}
    return Space(**made | {"tenant": bytes.fromhex(fields["tenant"])})


def check_spaces(vectors: Vectors) -> None:
    for vector in vectors["spaces"]:
        space = space_of(vector["fields"])
        found = (space.encode().hex(), space.digest().hex(), root_key(space).hex())
        assert found == (vector["encoded"], vector["digest"], vector["root"]), vector["name"]
        assert Space.decode(bytes.fromhex(vector["encoded"])) == space, vector["name"]


def check_chains(vectors: Vectors) -> None:
    spaces = {vector["name"]: space_of(vector["fields"]) for vector in vectors["spaces"]}
    for vector in vectors["chains"]:
        first, step, count = vector["ids"]
        ids = [(first + step * index) % 2**32 for index in range(count)]
        parent = Key(bytes.fromhex(vector["parent"])) if vector["parent"] else None
        extras = {int(block): bytes.fromhex(extra) for block, extra in vector["extras"].items()}
        for given in (ids, np.array(ids), np.array(ids, dtype=np.uint32)):
            chain = chain_keys(
                spaces[vector["space"]],
                given,
                parent=parent,
                start_block=vector["start_block"],
                extras=extras,
            )
            assert [key.hex() for key in chain] == vector["keys"], vector["note"]


def check_digests(vectors: Vectors) -> None:
    for vector in vectors["digests"]:
        if "files" in vector:
            found = _files_digest(vector["files"])
        elif "tensors" in vector:
            found = tensors_digest({name: _tensor(parts) for name, parts in vector["tensors"].items()})
        elif "config" in vector:
            found = config_digest(vector["config"])
        else:
            found = join_digests(*vector["joined"])
        assert found == vector["digest"], vector


def _files_digest(files: dict[str, str]) -> str:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in files]
        for path in paths:
            path.write_bytes(bytes.fromhex(files[path.name]))
        return weights_digest(paths, cache=DigestCache(None))


def _tensor(parts: dict[str, Any]) -> TensorBytes:
    return TensorBytes(parts["dtype"], tuple(parts["shape"]), bytes.fromhex(parts["data"]))


def check_all() -> None:
    vectors = load()
    check_spaces(vectors)
    check_chains(vectors)
    check_digests(vectors)


if __name__ == "__main__":
    if "--warm" in sys.argv:
        assert warm()
    check_all()
