"""The GPU library's bookkeeping without a GPU: what is registered, held and given back, and the copy engine's runs.

The kernel is in `tests/engines/test_triton_interpreted.py`, devices in `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from penstock import Lease, Reservation, SpaceHandle, TensorMap
from penstock.connectors.cuda import Limits, Mover, Registration, Transfer, register, register_pool
from penstock.connectors.cuda.copies import copy_runs, measure_limits
from penstock.connectors.cuda.pieces import Pieces
from penstock.errors import ConfigError, NoSpaceLeft, PoolClosed, Refused, ViewsAlive
from penstock.identity import KeyChain
from penstock.testing.pool import Site, assert_consistent, chain, check_lease, make_space, source, target
from penstock.types import Miss
from tests.gpu.paged import Paged
from tests.gpu.stand_ins import Runtime, SlowStream
from tests.support import unique_name

COPIES = Limits(one_run_bytes=0, many_runs_bytes=0)
SPACE = make_space()


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.opened(unique_name("g")) as opened:
        yield opened


@pytest.fixture
def memory(site: Site) -> Iterator[Registration]:
    with register_pool(site.pool, runtime=Runtime()) as registered:
        yield registered


@pytest.fixture
def stream() -> SlowStream:
    return SlowStream()


@pytest.fixture
def mover(memory: Registration, stream: SlowStream) -> Iterator[Mover]:
    with Mover(memory, "cpu", limits=COPIES, stream=stream) as opened:
        yield opened


def stored(site: Site, n: int = 3) -> tuple[SpaceHandle, KeyChain]:
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(n))
    assert site.pool.store(handle, keys, source(handle, keys)).n_blocks == n
    assert site.pool.flush()
    return handle, keys


def leased(site: Site, handle: SpaceHandle, keys: KeyChain) -> Lease:
    lease = site.pool.match(handle, keys)
    assert len(lease) == len(keys)
    return lease


def n_leased(site: Site) -> int:
    return site.pool._at.n_leased()


# ---- registration


def test_a_range_is_registered_once_in_pieces_and_given_up_with_its_last_share() -> None:
    array, runtime = np.zeros(10_000, np.uint8), Runtime()
    first = register(array, piece_bytes=4096, runtime=runtime)
    second = register(array, piece_bytes=4096, runtime=runtime)
    start = array.ctypes.data
    assert runtime.registered == {start: 4096, start + 4096: 4096, start + 8192: 1808}
    first.close()
    first.close()
    assert len(runtime.registered) == 3
    second.close()
    assert not runtime.registered
    with register(array, runtime=runtime):
        assert runtime.registered == {start: 10_000}
    assert not runtime.registered


@pytest.mark.parametrize(
    ("code", "error", "remedy"),
    [(2, NoSpaceLeft, "ulimit -l"), (712, ConfigError, "let only Penstock"), (801, ConfigError, "/dev/shm")],
)
def test_a_refused_piece_undoes_those_before_it_and_names_the_remedy(
    code: int, error: type[Exception], remedy: str
) -> None:
    array, runtime = np.zeros(8192, np.uint8), Runtime(0, code)
    with pytest.raises(error, match=remedy):
        register(array, piece_bytes=4096, runtime=runtime)
    assert not runtime.registered
    with register(array, runtime=runtime):
        assert runtime.registered, "the failure left nothing that stands in the way"


def test_a_pools_pieces_cut_no_slab(site: Site) -> None:
    runtime, slab = Runtime(), site.pool._at.geometry.slab_bytes
    with register_pool(site.pool, piece_bytes=slab + 1, runtime=runtime) as memory:
        assert set(runtime.registered.values()) == {slab}
        assert sum(runtime.registered.values()) == memory.n_bytes
    with pytest.raises(PoolClosed, match="register the pool again"):
        memory.require(np.zeros(1, np.int64), 1)


# ---- pieces


@pytest.mark.parametrize("to_pages", [True, False])
@pytest.mark.parametrize("gap", [0, 64])
def test_the_copy_engines_runs_move_every_byte(to_pages: bool, gap: int) -> None:
    shape = Paged(n_blocks=3, n_segments=4, segment_bytes=320, gap=gap, seed=4)
    expected = shape.after(to_pages=to_pages)
    copy_runs(shape.pieces(), shape.host, shape.pages.device, to_pages=to_pages)
    shape.assert_is(expected)


def test_pieces_join_where_they_follow_on_both_sides_and_never_across_slots() -> None:
    slots, segs = np.array([4096, 4096 + 256], np.int64), np.arange(4, dtype=np.int64)
    block_after_block = TensorMap(1 << 20 | segs * 64, np.array([0, 1]), 256)
    assert Pieces(slots, segs, block_after_block, 64).runs().tolist() == [
        [4096, 1 << 20, 256],
        [4352, (1 << 20) + 256, 256],
    ]
    layer_after_layer = TensorMap((1 << 20) + segs * 128, np.array([0, 1]), 64)
    assert len(Pieces(slots, segs, layer_after_layer, 64).runs()) == 8


def test_tensors_in_runs_and_maps_of_another_size_are_refused() -> None:
    one = np.zeros(1, np.int64)
    with pytest.raises(Refused, match="2 runs"):
        Pieces(one, one, TensorMap(one, one, 64, runs=2, run_stride=8), 64)
    with pytest.raises(ValueError, match="1 blocks"):
        Pieces(np.zeros(2, np.int64), one, TensorMap(one, one, 64), 64)


def test_short_or_scattered_is_the_kernels_and_long_the_copy_engines() -> None:
    limits = Limits()
    assert not limits.prefer_copies(1, 4095) and limits.prefer_copies(1, 4096)
    assert not limits.prefer_copies(64, 64 * (32 << 10)), "a block of an 8B model"
    assert limits.prefer_copies(64, 64 * (256 << 10))


def test_measuring_gives_limits_within_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (64, 128)
    monkeypatch.setattr("penstock.connectors.cuda.copies.fused", lambda *args, **kwargs: None)
    measured = measure_limits("cpu", sizes)
    assert {measured.one_run_bytes, measured.many_runs_bytes} <= {64, 128, 256}


# ---- transfers


def test_gather_holds_its_lease_until_the_event_and_releases_it_once(
    site: Site, mover: Mover, stream: SlowStream
) -> None:
    handle, keys = stored(site)
    pages, tensors = target(handle, len(keys))
    lease = leased(site, handle, keys)
    transfer = mover.gather(lease, handle, tensors, verify=True)
    assert not transfer.done() and not transfer.wait(0.0) and transfer.good == 0
    assert n_leased(site) == len(keys)
    with pytest.raises(ViewsAlive):
        lease.release()
    stream.events[0].passed = True
    assert transfer.done() and transfer.wait(0.0) and transfer.good == len(keys) and transfer.error is None
    assert n_leased(site) == 0
    wanted, map_ = target(handle, len(keys))
    with leased(site, handle, keys) as other:
        assert other.gather(map_, verify=True) == len(keys)
        transfer.cancel()
        assert n_leased(site) == len(keys), "ended once: the other lease stands"
    assert np.array_equal(pages, wanted) and pages.any()


def test_cancelling_waits_and_closing_waits_for_all(site: Site, mover: Mover, stream: SlowStream) -> None:
    handle, keys = stored(site)
    transfers = [mover.gather(leased(site, handle, keys), handle, target(handle, 3)[1]) for _ in range(3)]
    transfers[0].cancel()
    assert stream.events[0].passed and not stream.events[1].passed
    assert mover.reap() == 2
    mover.close()
    assert [transfer.good for transfer in transfers] == [3, 3, 3] and n_leased(site) == 0
    with pytest.raises(PoolClosed):
        mover.gather(leased(site, handle, keys), handle, target(handle, 3)[1])
    assert n_leased(site) == 0


def test_a_transfer_that_nobody_kept_is_ended_by_the_next_call(site: Site, mover: Mover, stream: SlowStream) -> None:
    handle, keys = stored(site)
    mover.gather(leased(site, handle, keys), handle, target(handle, 3)[1])
    assert n_leased(site) == 3
    stream.events[0].passed = True
    assert mover.reap() == 0 and n_leased(site) == 0


@pytest.mark.parametrize("where", ["copy", "event", "map", "handle"])
def test_an_exception_in_between_drains_the_stream_and_releases(
    site: Site, mover: Mover, stream: SlowStream, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    handle, keys = stored(site)
    tensors = target(handle, 2 if where == "map" else 3)[1]
    asked = site.pool.space(make_space(segment_bytes=2048)) if where == "handle" else handle

    def fail(*args: object, **kwargs: object) -> None:
        assert n_leased(site) == 3
        raise RuntimeError("half-way")

    if where == "copy":
        monkeypatch.setattr("penstock.connectors.cuda.movers.copy_runs", fail)
    stream.broken = where == "event"
    lease = leased(site, handle, keys)  # kept: garbage collection would release it, too
    with pytest.raises((RuntimeError, ValueError)):
        mover.gather(lease, asked, tensors)
    assert n_leased(site) == 0
    assert stream.drained == (where in ("copy", "event"))


def test_two_that_see_the_end_at_once_give_back_once(stream: SlowStream) -> None:
    calls: list[bool] = []
    transfer = Transfer(stream, stream.mark(), lambda arrived: calls.append(arrived) or 1)
    transfer._end(None)
    transfer._end(RuntimeError("late"))
    assert calls == [True] and transfer.good == 1 and transfer.error is None


def test_a_lost_device_ends_the_transfer_with_nothing_good(site: Site, mover: Mover, stream: SlowStream) -> None:
    handle, keys = stored(site)
    transfer = mover.gather(leased(site, handle, keys), handle, target(handle, 3)[1])
    stream.events[0].failure = RuntimeError("an illegal memory access was encountered")
    assert transfer.done() and transfer.good == 0 and transfer.error is stream.events[0].failure
    assert n_leased(site) == 0


def test_a_slot_that_changed_under_the_copy_does_not_count(site: Site, mover: Mover, stream: SlowStream) -> None:
    """As after a keeper that took a dead-looking client's slots: the generation is another one."""
    handle, keys = stored(site)
    lease = leased(site, handle, keys)
    transfer = mover.gather(lease, handle, target(handle, 3)[1])
    generations = site.pool._at._lists[2]
    cell = lease._cell
    second = int(site.pool._at._lists[0][cell])
    generations[second] += 1
    stream.events[0].passed = True
    assert transfer.done() and transfer.good == 1 and lease.miss is Miss.CHANGED


def test_verification_before_the_copy_stops_at_the_first_bad_block(
    site: Site, mover: Mover, stream: SlowStream
) -> None:
    handle, keys = stored(site)
    lease = leased(site, handle, keys)
    damaged = lease.views(1)
    address = damaged.__array_interface__["data"][0]
    del damaged
    at = address - site.pool._at.data.address
    site.pool._at.data.array[at] ^= 1
    pages, tensors = target(handle, 3)
    transfer = mover.gather(lease, handle, tensors, verify=True)
    assert transfer.wait() and transfer.good == 1
    assert pages[0].any() and not pages[1:].any()
    assert n_leased(site) == 0


def test_a_segment_that_is_not_registered_is_refused(site: Site, stream: SlowStream) -> None:
    handle, keys = stored(site)
    elsewhere = np.zeros(4096, np.uint8)
    with (
        register(elsewhere, runtime=Runtime()) as memory,
        Mover(memory, "cpu", stream=stream) as mover,
        pytest.raises(ConfigError, match="register the pool again"),
    ):
        mover.gather(leased(site, handle, keys), handle, target(handle, 3)[1])
    assert n_leased(site) == 0


def test_scatter_fills_slots_that_cannot_be_committed_before_the_event(
    site: Site, mover: Mover, stream: SlowStream
) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(3))
    reservation = site.pool.reserve(handle, 3)
    assert isinstance(reservation, Reservation) and len(reservation) == 3
    transfer: Transfer = mover.scatter(reservation, handle, source(handle, keys))
    for end in (lambda: reservation.commit(keys), reservation.abort):
        with pytest.raises(ViewsAlive):
            end()
    stream.events[0].passed = True
    assert transfer.done() and transfer.good == 3
    assert reservation.commit(keys) == 3 and site.pool.flush()
    with leased(site, handle, keys) as lease:
        check_lease(lease, keys)
    assert_consistent(site.pool)


def test_scatter_of_more_blocks_than_slots_leaves_the_reservation_free(site: Site, mover: Mover) -> None:
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(3))
    with site.pool.reserve(handle, 2) as reservation:
        with pytest.raises(ValueError, match="2 slots"):
            mover.scatter(reservation, handle, source(handle, keys))
        reservation.abort()
