"""Geometry: what it costs, that nothing overlaps, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.pool import layout
from penstock.pool.layout import MIB, Geometry, plan_geometry, plan_slots

SIZES = [64 * MIB << power for power in range(15)]  # 64 MiB .. 1 TiB


@pytest.mark.parametrize("size", SIZES)
def test_records_and_directory_cost_at_most_one_percent(size: int) -> None:
    geometry = plan_geometry(size)
    tables = geometry.n_units * layout.RECORD_BYTES + geometry.n_buckets * layout.BUCKET_BYTES
    assert tables <= size / 100


@pytest.mark.parametrize("size", SIZES)
def test_most_of_the_file_is_slots(size: int) -> None:
    """64 KiB blocks: what slots do not hold is tables, lanes and what rounding leaves over."""
    geometry = plan_geometry(size)
    assert geometry.total_bytes <= size
    shape = plan_slots(geometry, 64 << 10, 32)
    slots = geometry.n_slabs * shape.slots_per_slab * (64 << 10)
    assert slots >= size * (0.75 if size < 512 * MIB else 0.88)


@settings(deadline=None)
@given(
    size=st.integers(32 * MIB, 1 << 42),
    unit=st.sampled_from([4096, 16384, 65536]),
    lanes=st.sampled_from([None, 1, 16, 64]),
)
def test_areas_follow_each_other(size: int, unit: int, lanes: int | None) -> None:
    try:
        g = plan_geometry(size, unit_bytes=unit, n_lanes=lanes)
    except ConfigError:
        assert size < 64 * MIB
        return
    ends = [
        (2 * layout.PAGE, g.spaces_offset),
        (g.spaces_offset + g.max_spaces * layout.SPACE_BYTES, g.slabs_offset),
        (g.slabs_offset + g.n_slabs * layout.SLAB_ROW_BYTES, g.records_offset),
        (g.records_offset + g.n_units * layout.RECORD_BYTES, g.directory_offset),
        (g.directory_offset + g.n_buckets * layout.BUCKET_BYTES, g.removals_offset),
        (g.removals_offset + g.n_removals * layout.REMOVAL_BYTES, g.lanes_offset),
        (g.lanes_offset + g.n_lanes * g.lane_bytes, g.data_offset),
        (layout.L_COUNTERS + 8 * layout.LANE_COUNTERS, g.lease_table_offset),
        (g.lease_table_offset + 8 * g.leases, g.commit_ring_offset),
        (g.commit_ring_offset + layout.COMMIT_BYTES * g.ring, g.grant_ring_offset),
        (g.grant_ring_offset + layout.GRANT_BYTES * g.ring, g.hit_ring_offset),
        (g.hit_ring_offset + layout.HIT_BYTES * g.ring, g.lane_bytes),
    ]
    assert all(end <= start and start % layout.PAGE == 0 for end, start in ends)
    assert g.data_offset % layout.HUGE_PAGE == 0
    assert g.total_bytes <= size
    assert g.n_buckets & (g.n_buckets - 1) == 0 and g.n_units * 2 <= g.n_buckets * layout.BUCKET_ENTRIES
    assert g.n_units < 1 << 32


@settings(deadline=None)
@given(block=st.integers(1, 4 * MIB), segments=st.integers(1, 200))
def test_slots_do_not_overlap(block: int, segments: int) -> None:
    """Payloads from the slab's start, tables behind them, no two slots beginning in one unit."""
    geometry = plan_geometry(1 << 30, unit_bytes=16384)
    shape = plan_slots(geometry, block, segments)
    assert shape.stride >= block and shape.stride % layout.PAGE == 0 and shape.stride >= geometry.unit_bytes
    assert shape.table_bytes >= 8 * segments and shape.table_bytes % layout.LINE == 0
    assert shape.slots_per_slab * (shape.stride + shape.table_bytes) <= geometry.slab_bytes
    units = [number * shape.stride // geometry.unit_bytes for number in range(shape.slots_per_slab)]
    assert len(set(units)) == len(units)
    # The readers' way back from the unit to the slot (`slots.slot_number`).
    assert [-(-unit * geometry.unit_bytes // shape.stride) for unit in units] == list(range(len(units)))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="power of two"):
        plan_geometry(1 << 30, unit_bytes=5000)
    with pytest.raises(ConfigError, match="multiple of the unit"):
        plan_geometry(1 << 30, slab_bytes=20_000)
    with pytest.raises(ConfigError, match="at least 32 MiB"):
        plan_geometry(1 * MIB)
    with pytest.raises(ConfigError, match="larger --slab"):
        plan_slots(plan_geometry(64 * MIB), 64 * MIB, 1)


def test_lanes_hold_what_one_request_may_need() -> None:
    """8,192 leases in a pool of ordinary size (protocol item 10)."""
    assert plan_geometry(1 << 30).leases >= 8192


def test_control_words_of_different_writers_do_not_share_a_line() -> None:
    keeper = {layout.L_EPOCH, layout.L_STATE, layout.L_COMMIT_TAIL, layout.L_GRANT_HEAD, layout.L_HIT_TAIL}
    client = {
        layout.L_COMMIT_HEAD, layout.L_GRANT_TAIL, layout.L_HIT_HEAD, layout.L_LEASE_HWM, layout.L_WAITING,
        *(layout.L_WANT + 8 * number for number in range(layout.N_CLASSES)), layout.L_COUNTERS,
    }  # fmt: skip
    assert not {cell // layout.LINE for cell in keeper} & {cell // layout.LINE for cell in client}
    assert isinstance(plan_geometry(64 * MIB), Geometry)
