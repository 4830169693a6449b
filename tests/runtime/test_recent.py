"""Recently used blocks are spared by eviction, but one recent chain cannot hold a pool for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.pool.layout import plan_slots
from penstock.runtime import keeper as keeper_module
from penstock.testing.pool import TINY, Site, chain, make_space, source
from tests.support import unique_name

SPACE = make_space()


def test_one_recent_chain_makes_room_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = replace(TINY)
    slots = plan_slots(geometry, SPACE.block_bytes, SPACE.n_segments).slots_per_slab * geometry.n_slabs
    with Site.opened(unique_name("r"), geometry) as site:
        pool = site.pool
        handle = pool.space(SPACE)
        long = chain(SPACE, list(range(2 * slots)))
        for first in range(0, len(long), 2):
            part = long[first : first + 2]
            if pool.store(handle, part, source(handle, part), wait_s=0.05).n_blocks < 2:
                break
            pool.flush()
        other = chain(SPACE, [10_000])
        monkeypatch.setattr(keeper_module, "STUCK_MS", 10)
        assert pool.store(handle, other, source(handle, other), wait_s=5.0).n_blocks == 1
