"""The Mooncake tier: the conformance suite, and what a master and other clients can do to it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from penstock.pool.copies import seal
from penstock.testing.tier_blocks import block_keys, empty, filled, tier_space, version_of
from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Batch, Found, Tier
from penstock.tiers.registry import open_tier, parse_tier
from tests.support import PATIENCE_S
from tests.tiers.mooncake_servers import Lender, MooncakeMaster, need_mooncake

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeMaster]:
    need_mooncake()
    folder = tmp_path_factory.mktemp("mooncake")
    server = MooncakeMaster(folder)
    with server, Lender(folder, server, "512M", 10):
        yield server


def mooncake_tier(master: MooncakeMaster, **options: object) -> Tier:
    """A tier with names that nobody else uses; its blocks lie in the lender's memory."""
    chosen = {"segment": "0", "buffer": "20M", "prefix": f"tier-{next(NUMBERS)}/", **options}
    return open_tier(parse_tier(master.address + "?" + "&".join(f"{name}={each}" for name, each in chosen.items())))


@pytest.fixture(scope="module")
def closings() -> Iterator[list[threading.Thread]]:
    """Threads that close tiers: leaving a cluster takes a second each, so they do it beside the next tests."""
    threads: list[threading.Thread] = []
    yield threads
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a tier does not close"


class TestMooncake(TierSuite):
    examples = 3

    @pytest.fixture(autouse=True)
    def _place(self, master: MooncakeMaster) -> None:
        self.master = master

    @pytest.fixture
    def tier(self, master: MooncakeMaster, closings: list[threading.Thread]) -> Iterator[Tier]:
        tier = self.open_tier()
        yield tier
        closings.append(threading.Thread(target=tier.close))
        closings[-1].start()

    def open_tier(self) -> Tier:
        return mooncake_tier(self.master)

    def test_threads_that_write_read_and_remove_the_same_blocks(self, tier: Tier) -> None:
        """Mooncake's forced removal frees memory that is being read: a torn block is FAILED or fails its checksum."""
        space = tier_space(0, *self.sizes[2])
        keys = block_keys(space, 0, 4)

        def work(number: int) -> None:
            for _ in range(12):
                if number < 2:
                    self.write(tier, filled(space, keys, number))
                elif number == 2:
                    tier.remove(space, keys, self.deadline())
                else:
                    check_roots(empty(space, keys))

        def check_roots(batch: Batch) -> None:
            found = tier.read(batch, self.deadline())
            for i in np.flatnonzero(found == Found.HERE):
                if sealed(batch, i) == batch.roots[i]:
                    assert version_of(batch, i, range(2)) is not None, f"block {i} passes its checksum and is wrong"

        self.in_threads(5, work)
        tier.remove(space, keys, self.deadline())
        self.check_read(tier, space, keys, False)


def sealed(batch: Batch, i: int) -> int:
    """The checksum root of the bytes that block i has now."""
    space, table, root = batch.space, np.zeros(batch.space.n_segments, np.uint64), np.zeros(1, np.uint64)
    at = np.array([np.frombuffer(batch.payloads[i], np.uint8).ctypes.data])
    segments, tables = np.arange(space.n_segments, dtype=np.int64), np.array([table.ctypes.data])
    seal(1, at, segments, space.segment_bytes, space.n_segments, tables, batch.keys[i : i + 1], root)
    return int(root[0])
