"""A second memory as a tier (CXL, another NUMA node, huge pages, tmpfs): a segment of its own, with its own keeper.

    memory:/mnt/cxl/penstock?size=256G&numa=2

The blocks lie there as they lie in the pool, so that any process of this user may read them in place:
`penstock.open(NAME)` with the pool's name that the option `pool` gives (by default derived from the path). Covers the
tier's interface; the keeper's process is `memory_server.py`, the moves are `memory_client.py`.

Room is that keeper's business: it evicts the least recently used chains from their tails. A block whose parent is not
there is refused (FAILED), as in every pool.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.config import parse_size
from penstock.errors import ConfigError, PoolClosed, TierTimeout, TierUnavailable
from penstock.pool.segment import check_name
from penstock.tiers.base import Batch, BlockSpace, Keys, Tier, Usage
from penstock.tiers.memory_client import BlockClient
from penstock.tiers.memory_server import MemoryServer, Serving
from penstock.tiers.numa import check_node
from penstock.tiers.registry import options_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "MemoryOptions", "MemoryTier", "open_tier", "pool_name"]

DEFAULT_WRITE = WriteRule.EVICTION


class MemoryOptions(msgspec.Struct, frozen=True):
    """What may follow the `?` of a memory tier's address."""

    size: str = ""
    """Of a new segment; one that is there keeps its own."""
    pool: str = ""
    """The name under which other processes open it."""
    numa: int | None = None
    """Node to take its memory from."""
    slab: str = ""
    coherent: bool = True
    """Whether every host that maps the memory sees the others' stores at once. Of a new segment."""


def open_tier(location: str, options: Mapping[str, str], name: str) -> MemoryTier:
    """Serve the segment at `location`, or join who serves it.

    Raises ConfigError for options that cannot be used, TierUnavailable where no keeper comes up.
    """
    chosen = options_of(MemoryOptions, _booleans(options), "memory")
    if not location.startswith("/"):
        raise ConfigError(f"memory:{location}: give an absolute path, such as memory:/mnt/cxl/penstock?size=64G")
    for size in filter(None, (chosen.size, chosen.slab)):
        parse_size(size)
    if chosen.numa is not None:
        check_node(chosen.numa)
    path = Path(os.path.normpath(location))
    if not chosen.size and not path.exists():
        raise ConfigError(f"memory:{location}: there is no segment yet; give its size=")
    pool = check_name(chosen.pool) if chosen.pool else pool_name(path)
    return MemoryTier(Serving(pool, path, chosen.size, chosen.slab, chosen.numa, chosen.coherent), name)


def pool_name(path: Path) -> str:
    """The name of the pool at this path unless another is given: readable, and different for every path."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", path.name)[:24]
    return f"memory-{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}-{readable}".rstrip("-")


def _booleans(options: Mapping[str, str]) -> dict[str, str]:
    """`yes` and `no` as msgspec takes them."""
    words = {"yes": "true", "no": "false"}
    return {key: words.get(value, value) if key == "coherent" else value for key, value in options.items()}


class MemoryTier(Tier):
    """Blocks in a second segment. Thread-safe."""

    kind = "memory"
    local = True
    shared = False
    durable = False

    def __init__(self, serving: Serving, name: str) -> None:
        super().__init__(name)
        self.path = serving.path
        self._server = MemoryServer(serving)
        self._client = BlockClient(self._server.pool)
        self._closed = False

    @property
    def pool(self) -> str:
        """The name under which other processes open this memory."""
        return self._server.pool.name

    @property
    def keeper_pid(self) -> int | None:
        """The keeper's process, where this tier started it."""
        return self._server.child_pid

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        with self._open(deadline):
            return self._client.holds(space, keys)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        with self._open(deadline):
            return self._client.write(batch, deadline)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        with self._open(deadline):
            return self._client.read(batch, deadline)

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        with self._open(deadline):
            self._client.remove(space, keys, deadline)

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        if not self._closed:
            self._client.touch(space, keys)

    def usage(self) -> Usage:
        return self._client.usage()

    def counters(self) -> dict[str, int]:
        return {"keeper_restarts": self._server.restarts}

    def close(self) -> None:
        """Leave; the keeper stops if this tier started it, and the segment stays with what it holds."""
        if not self._closed:
            self._closed = True
            self._server.close()
            self._client.close()

    @contextlib.contextmanager
    def _open(self, deadline: float) -> Iterator[None]:
        if self._closed:
            raise TierUnavailable(f"the memory tier {self.name!r} is closed")
        if time.monotonic() >= deadline:
            raise TierTimeout(f"the memory tier {self.name!r}: the deadline is over")
        try:
            yield
        except PoolClosed as error:  # by `close`, or because somebody replaced the segment
            raise TierUnavailable(f"the memory tier {self.name!r} was closed or replaced meanwhile") from error
