"""A pool in one process against a plain model: whatever is done in whatever order, nothing wrong comes out.

What the machine does and checks is in `penstock.testing.pool_machine`; here it is run, and shown to fail when the
pool is broken on purpose.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.pool.authority import Authority
from penstock.pool.client import Pool
from penstock.pool.layout import Geometry
from penstock.testing.pool_machine import PoolMachine

FULL = os.environ.get("PENSTOCK_TEST_SCALE") == "full"
SETTINGS = settings(
    # Shrinking such a machine takes minutes: only where there is time.
    phases=[Phase.generate, Phase.shrink] if FULL else [Phase.generate],
    max_examples=60,
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class RoomyMachine(PoolMachine):
    """Two slabs more: two slot sizes settle beside each other instead of taking each other's only slab."""

    geometry = Geometry(
        unit_bytes=4096, slab_bytes=32 << 10, n_slabs=7, n_lanes=5, leases=24, ring=16, max_spaces=4
    )  # fmt: skip


def test_tiny_pool() -> None:
    run_state_machine_as_test(PoolMachine, settings=SETTINGS)


def test_pool_of_small_slabs() -> None:
    run_state_machine_as_test(RoomyMachine, settings=SETTINGS)


@pytest.mark.faults
@pytest.mark.skipif(not FULL, reason="PENSTOCK_TEST_SCALE=full runs it")
def test_at_length() -> None:
    run_state_machine_as_test(PoolMachine, settings=settings(SETTINGS, max_examples=300, stateful_step_count=80))


# Only to find the failure, not to shrink it.
HUNT = settings(SETTINGS, phases=[Phase.generate], max_examples=200, report_multiple_bugs=False)


def test_the_machine_sees_evictions_of_leased_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that takes every lane for free looks at no leases."""
    evict = Authority.evict

    def blind(self: Authority, *args: object) -> object:
        at = self.geometry.lanes_offset
        lanes = self.mapping.array[at : at + self.geometry.n_lanes * self.geometry.lane_bytes]
        states = lanes.view("<u8").reshape(self.geometry.n_lanes, -1)[:, 1]
        before = states.copy()
        states[:] = 0
        try:
            return evict(self, *args)  # type: ignore[arg-type]
        finally:
            states[:] = before

    monkeypatch.setattr(Authority, "evict", blind)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(PoolMachine, settings=HUNT)


def test_the_machine_sees_lost_reservations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted keeper that takes back slots which clients hold."""
    free = Authority.free_unpublished_grants

    def too_many(self: Authority) -> int:
        for lane in range(self.geometry.n_lanes):
            at = self.lane(lane) - self.mapping.address + 128
            self.mapping.array[at : at + 8] = 0
        return free(self)

    monkeypatch.setattr(Authority, "free_unpublished_grants", too_many)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(PoolMachine, settings=HUNT)


def test_the_machine_sees_wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that publishes its blocks under each other's keys."""
    publish = Pool._publish

    def swapped(self: Pool, reservation, keys, n, intent):  # type: ignore[no-untyped-def]
        reservation._units[:n] = reservation._units[:n][::-1].copy()
        reservation._generations[:n] = reservation._generations[:n][::-1].copy()
        reservation._roots[:n] = reservation._roots[:n][::-1].copy()
        return publish(self, reservation, keys, n, intent)

    monkeypatch.setattr(Pool, "_publish", swapped)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(PoolMachine, settings=HUNT)
