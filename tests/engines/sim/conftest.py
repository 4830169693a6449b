"""Houses for the tests on vLLM's scheduler with a model of arithmetic.

Nothing is imported from vLLM here: without it the files are skipped, which the folder above sees to.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import MIB, Keeper, small_geometry

if TYPE_CHECKING:
    from tests.engines.sim.house import House


@pytest.fixture
def keeper(runtime_dir: Path) -> Iterator[Keeper]:
    """A small pool of the test's own."""
    with Keeper(small_geometry(16 * MIB)) as running:
        yield running


@pytest.fixture
def house(keeper: Keeper) -> Iterator[House]:
    """Engines on that pool; closed at the end."""
    from tests.engines.sim.house import House

    made = House(keeper)
    yield made
    made.close()
