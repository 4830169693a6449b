"""Scale, a short runtime folder, and a check that a run leaves nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Scale:
    """How much a test does: little in `make test`, the full counts with PENSTOCK_TEST_SCALE=full."""

    full: bool

    def of(self, small: int, full: int) -> int:
        return full if self.full else small


@pytest.fixture(scope="session")
def scale() -> Scale:
    return Scale(os.environ.get("PENSTOCK_TEST_SCALE") == "full")


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_look_through() -> None:
    """What earlier modules imported lives on: `gc.collect`, which some tests call often, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[Path]:
    """A folder for control sockets that belongs to this run alone; short, for a socket's path has 107 bytes."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def nothing_left(runtime_dir: Path) -> Iterator[None]:
    """Fails the run if it leaves processes, or files in shared memory."""
    from tests.support import children, environment, fork_server, own_segments, until

    # The fork server is started with this environment: its children must find this checkout and this folder.
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    with fork_server():
        yield
    until(lambda: not children(), "no child process is left", timeout_s=5)
    assert own_segments() == []
