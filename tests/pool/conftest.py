"""Pools inside the process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.testing.pool import Site
from tests.support import unique_name


@pytest.fixture
def site() -> Iterator[Site]:
    """A pool of a few dozen slots, with as many clients as wanted."""
    with Site.opened(unique_name("u")) as opened:
        yield opened
