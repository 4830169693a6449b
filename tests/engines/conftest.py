"""Servers, pools and models for the tests on the real engine (`make test-engines`).

Where vLLM is not installed, as in the environment of `make test`, every file here is reported as skipped;
`make test-engines` sets PENSTOCK_TEST_ENGINES, with which that is an error.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from penstock.pool.layout import plan_geometry
from tests.engines.fleet import Fleet
from tests.engines.server import ServerConfig, penstock_transfer
from tests.support import MIB, Keeper

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
POOL_BYTES = 512 * MIB

if not HAVE_VLLM and os.environ.get("PENSTOCK_TEST_ENGINES"):
    raise pytest.UsageError("vLLM is not installed in this Python; `make test-engines` makes one that has it")


def pytest_configure(config: pytest.Config) -> None:
    """Some tests here use vLLM's classes in this process; its import warns about itself and about PyTorch."""
    config.addinivalue_line("filterwarnings", "ignore:::(torch|transformers|vllm)([.].*)?")


class NeedsVllm(pytest.Module):
    """Stands for a file of tests that cannot run here."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip("vLLM is not installed here; `make test-engines` runs these", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HAVE_VLLM else NeedsVllm.from_parent(parent, path=module_path)


@pytest.fixture(scope="session", autouse=True)
def ended_in_order() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the run through its fixtures, so that no server is left."""

    def leave(number: int, frame: FrameType | None) -> None:
        pytest.exit("terminated", returncode=143)

    before = signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, ended_in_order: None) -> Iterator[Fleet]:
    """Running servers, by configuration: `one, other = fleet.get(config, replace(config, replica=1))`."""
    made = Fleet(tmp_path_factory.mktemp("servers"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the models that tests write: `tiny_llama(models / "a name", ...)`."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def shared_keeper(runtime_dir: Path) -> Iterator[Keeper]:
    """A pool for tests that only store and find, so that they can share servers: leave its keeper alone."""
    with Keeper(plan_geometry(POOL_BYTES)) as running:
        yield running


@pytest.fixture
def keeper(fleet: Fleet) -> Iterator[Keeper]:
    """A pool of the test's own, empty, whose keeper may be killed. Its servers are ended with it."""
    with Keeper(plan_geometry(POOL_BYTES)) as running:
        yield running
        fleet.end_where(lambda config: config.kv_transfer is not None and f'"{running.name}"' in config.kv_transfer)


@pytest.fixture
def on_pool() -> Callable[..., ServerConfig]:
    """`on_pool(keeper, model, **options)`: a server's configuration with Penstock's connector on that pool."""

    def make(keeper: Keeper, model: Path, *, extra: dict[str, object] | None = None, **options: object) -> ServerConfig:
        return ServerConfig(model, kv_transfer=penstock_transfer(keeper.name, **(extra or {})), **options)  # type: ignore[arg-type]

    return make
