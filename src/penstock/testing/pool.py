"""Pools for tests: a tiny geometry, blocks whose bytes follow from their keys, and the check after every step.

`assert_consistent` is `penstock fsck` on an embedded pool. `PoolMachine` (in `pool_machine.py`) drives a pool with
several clients beside a plain model. Nothing here needs an engine or a keeper process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.errors import PenstockError
from penstock.identity import KeyChain, Space, chain_keys
from penstock.pool import layout
from penstock.pool.attachment import Attachment, LaneGrant
from penstock.pool.client import Pool
from penstock.pool.handles import PlacedSpace, SpaceHandle
from penstock.pool.layout import Geometry, SlotState
from penstock.pool.lease import Lease
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock
from penstock.pool.tensors import TensorMap
from penstock.pool.wire import Names, SpaceIs, SpaceOf
from penstock.runtime.embedded import EmbeddedLink
from penstock.runtime.keeper import Keeper
from penstock.runtime.opening import open_pool
from penstock.runtime.report import fsck_report
from penstock.types import Miss

__all__ = [
    "TINY",
    "Site",
    "assert_consistent",
    "block_bytes",
    "chain",
    "check_lease",
    "embedded_keeper",
    "make_space",
    "resident_keys",
    "source",
    "target",
]

TINY = Geometry(
    unit_bytes=4096, slab_bytes=64 << 10, n_slabs=4, n_lanes=4, leases=48, ring=32, max_spaces=8
)  # fmt: skip
"""Four slabs of 64 KiB: a few dozen slots, so that eviction, full lease tables and full rings happen all the time."""


def make_space(tenant: str = "", *, block_tokens: int = 4, n_segments: int = 2, segment_bytes: int = 1024) -> Space:
    """A space of a model that does not exist."""
    return Space(
        weights="blake2b-256:" + "a" * 64,
        config="blake2b-256:" + "b" * 64,
        engine="test/1",
        layout="bytes",
        dtype="float32",
        block_tokens=block_tokens,
        n_segments=n_segments,
        segment_bytes=segment_bytes,
        tenant=tenant.encode(),
    )


def chain(space: Space, path: Sequence[int]) -> KeyChain:
    """The chain whose i-th block consists of the token path[i]: paths that share a beginning share its blocks."""
    return chain_keys(space, np.repeat(np.asarray(path, np.uint32), space.block_tokens))


def block_bytes(key: bytes, size: int) -> npt.NDArray[np.uint8]:
    """What a block of this key holds in every test: (size,) bytes that no other key has."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(key, "little"))).integers(0, 256, size, np.uint8)


def source(handle: SpaceHandle, keys: KeyChain) -> TensorMap:
    """A paged engine cache with the right bytes of these blocks, page i block i."""
    memory = np.stack([block_bytes(bytes(key), handle.block_bytes) for key in keys])
    return _paged(handle, memory, range(handle.n_segments))


def target(
    handle: PlacedSpace, n_blocks: int, segments: Sequence[int] | None = None
) -> tuple[npt.NDArray[np.uint8], TensorMap]:
    """An empty engine cache of n blocks with the given segments, (n_blocks, segments x segment_bytes), and its map."""
    chosen = range(handle.n_segments) if segments is None else segments
    memory = np.zeros((n_blocks, len(chosen) * handle.segment_bytes), np.uint8)
    return memory, _paged(handle, memory, range(len(chosen)))


def _paged(handle: PlacedSpace, memory: npt.NDArray[np.uint8], columns: Sequence[int]) -> TensorMap:
    base = memory.ctypes.data + np.asarray(columns, np.int64) * handle.segment_bytes
    return TensorMap(base, np.arange(len(memory), dtype=np.int64), memory.shape[1], keep_alive=memory)


def check_lease(lease: Lease, keys: KeyChain, segments: Sequence[int] | None = None) -> None:
    """Raise AssertionError unless every block of the lease holds what its key says, copied (verified) and in place."""
    handle, n = lease._handle, len(lease)
    chosen = list(range(handle.n_segments)) if segments is None else list(segments)
    memory, tensors = target(handle, n, chosen)
    assert lease.gather(tensors, segments=chosen, verify=True) == n, f"a block is not good: {lease}"
    for i in range(n):
        expected = block_bytes(bytes(keys[i]), handle.block_bytes)
        assert np.array_equal(lease.views(i), expected), f"block {i} in place has other bytes"
        parts = expected.reshape(handle.n_segments, -1)[chosen].reshape(-1)
        assert np.array_equal(memory[i], parts), f"block {i} was copied with other bytes"


def embedded_keeper(pool: Pool) -> Keeper:
    """The keeper inside this process. Raises PenstockError for a pool that another process serves."""
    link = pool._link
    if isinstance(link, _SharedLink):
        link = link.site.link
    if not isinstance(link, EmbeddedLink):
        raise PenstockError(f"{pool!r} is served by another process; ask `penstock fsck`")
    return link.keeper


def assert_consistent(pool: Pool) -> dict[str, Any]:
    """Raise AssertionError with every problem that `penstock fsck` finds in an embedded pool, bytes too.

    Returns the report. No other thread may use the pool meanwhile.
    """
    report = fsck_report(embedded_keeper(pool))
    assert not report["problems"], "\n".join(report["problems"])
    return report


def resident_keys(pool: Pool) -> dict[bytes, int]:
    """Key of every block in an embedded pool -> the id of its space, read straight from the slot records."""
    records = embedded_keeper(pool).authority.records()
    words = records[:, layout.R_STATE // 8]
    ready = records[(words & np.uint64(0xFF)) == SlotState.READY]
    return {row[2:4].tobytes(): int(row[layout.R_STATE // 8]) >> 32 for row in ready}


class _SharedLink:
    """A second client's line to a keeper inside the process; that the client leaves does not end the keeper."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.alive = True

    def ring(self) -> None:
        if not self.site.deaf:
            self.site.link.ring()

    def wait(self, timeout_s: float) -> None:
        self.ring()

    def space(self, request: SpaceOf) -> SpaceIs:
        return self.site.link.space(request)

    def names(self, request: Names) -> None:
        self.site.link.names(request)

    def close(self) -> None:
        self.alive = False

    def abandon(self) -> None:
        self.alive = False


@dataclass(eq=False)
class Site:
    """A pool inside the process with as many clients as wanted, whose keeper can be deafened and crashed."""

    pool: Pool
    link: EmbeddedLink
    deaf: bool = False
    """The keeper does not hear the bells of the clients that `client` made: what they publish stays in their rings."""
    clients: list[Pool] = field(default_factory=list)

    @staticmethod
    @contextmanager
    def opened(name: str, geometry: Geometry = TINY) -> Iterator[Site]:
        """An embedded pool of its own; closed, with all its clients, at the end."""
        pool = open_pool(name, geometry=geometry)
        assert isinstance(pool._link, EmbeddedLink)
        site = Site(pool, pool._link)
        try:
            yield site
        finally:
            for client in site.clients:
                client.close()
            pool.close()

    def client(self) -> Pool:
        """Another client of the pool, with a lane of its own."""
        keeper = self.link.keeper
        opened = keeper.open_lane()
        assert opened is not None, "all lanes are taken"
        segment, lock_file = self.link._files
        locks = ByteLock(lock_file)
        assert locks.try_acquire(FIRST_LANE_BYTE + opened[0])
        keeper.confirm_lane(opened[0])
        at = Attachment(self.link._segment, locks, LaneGrant(*opened))
        pool = Pool(f"{segment.name}-{opened[0]}", at, _SharedLink(self), "attached")
        self.clients.append(pool)
        return pool

    def crash_keeper(self) -> None:
        """The keeper loses everything it knows, between two of its steps, and another one recovers the segment.

        It grants and evicts nothing before it hears.
        """
        link = self.link
        link.keeper = Keeper(link._segment, link._locks)
        self.deaf = True

    def hear(self) -> None:
        """The keeper does what was left for it, and hears every bell from here on."""
        self.deaf = False
        self.link.ring()

    def kill(self, client: Pool) -> None:
        """What remains when a client's process is killed: its lane as it was, and a lock that nobody holds."""
        at = client._at
        at.dead = Miss.FORKED  # its finalizers touch nothing, like a dead process's
        at.locks.close()
        self.clients.remove(client)
        self.link.keeper.reclaim_dead()
