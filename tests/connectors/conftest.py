"""Pools inside the process, and connectors of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import penstock
from penstock.connectors.transformers import Connector
from tests.connectors.models import make_model, unique_name


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, and much slower beside another busy process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool() -> Iterator[penstock.Pool]:
    with penstock.open(unique_name(), embedded=64 << 20) as opened:
        yield opened


@pytest.fixture
def connect(pool: penstock.Pool) -> Iterator[Callable[..., Connector]]:
    """Connectors of the test's pool, closed with it."""
    made: list[Connector] = []

    def make(model: PreTrainedModel, **kwargs: Any) -> Connector:
        made.append(Connector(model, pool, **kwargs))
        return made[-1]

    yield make
    for connector in made:
        connector.close()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """Shared by tests that do not change it."""
    return make_model("llama")
