"""SGLang's own classes, and a keeper."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connectors.sglang import standin
from tests.support import MIB, Keeper, small_geometry

# Before pytest turns warnings into errors: SGLang's modules warn while they are imported.
if not standin.prepare() and os.environ.get("PENSTOCK_TEST_ENGINES"):
    raise pytest.UsageError("SGLang is not installed in this Python; `make test-engines` makes one that has it")


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(32 * MIB)) as running:
        yield running


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder."""
    from tests.connectors.sglang import pools

    return pools.make_model(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture
def rank(keeper: Keeper, model: Path) -> Iterator[Any]:
    """Makes ranks of the keeper's pool, closed at the end."""
    from tests.connectors.sglang import pools

    made: list[pools.SglangRank] = []

    def make(**changes: Any) -> pools.SglangRank:
        made.append(pools.SglangRank(**({"pool": keeper.name, "model": model} | changes)))
        return made[-1]

    yield make
    for each in made:
        each.storage.close()
    pools.forget_settings()
