"""A pool's blocks to a device and back, through registered memory: the CPU kernels say what the bytes are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from penstock import KeyChain, Lease, SpaceHandle, TensorMap
from penstock.connectors.cuda import Limits, Mover, Registration, register, register_pool
from penstock.errors import ConfigError, ViewsAlive
from penstock.pool.layout import plan_geometry
from penstock.testing.pool import Site, assert_consistent, chain, check_lease, make_space, source
from tests.support import MIB, unique_name

pytestmark = pytest.mark.gpu

# 16 tokens of a model of 8B parameters: 32 layers, keys and values, 8 heads of 128, bf16.
SPACE = make_space(block_tokens=16, n_segments=64, segment_bytes=32 << 10)
N_BLOCKS = 8
# Long enough for every look at a transfer under way; the device counts clocks, of about 1 to 2 GHz.
BUSY_CLOCKS = 2_000_000_000
WAYS = {
    "kernel": Limits(one_run_bytes=1 << 60, many_runs_bytes=1 << 60),
    "copies": Limits(one_run_bytes=0, many_runs_bytes=0),
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site.opened(unique_name("gpu"), plan_geometry(128 * MIB, slab_bytes=16 * MIB)) as opened:
        yield opened


@pytest.fixture(scope="module")
def memory(site: Site) -> Iterator[Registration]:
    with register_pool(site.pool) as registered:
        yield registered


@pytest.fixture(params=list(WAYS))
def mover(memory: Registration, request: pytest.FixtureRequest) -> Iterator[Mover]:
    with Mover(memory, limits=WAYS[request.param]) as opened:
        yield opened


@pytest.fixture(scope="module")
def stored(site: Site) -> tuple[SpaceHandle, KeyChain]:
    handle, keys = site.pool.space(SPACE), chain(SPACE, range(N_BLOCKS))
    assert site.pool.store(handle, keys, source(handle, keys), wait_s=5.0).n_blocks == N_BLOCKS
    assert site.pool.flush(60.0)
    return handle, keys


def paged(seed: int = 0) -> tuple[torch.Tensor, TensorMap]:
    """[segments, pages, bytes] on the device, pages in random order."""
    n_pages = 2 * N_BLOCKS
    cache = torch.zeros((SPACE.n_segments, n_pages, SPACE.segment_bytes), dtype=torch.uint8, device="cuda")
    bases = cache.data_ptr() + np.arange(SPACE.n_segments, dtype=np.int64) * (n_pages * SPACE.segment_bytes)
    index = np.random.default_rng(seed).permutation(n_pages)[:N_BLOCKS].astype(np.int64)
    return cache, TensorMap(bases, index, SPACE.segment_bytes, keep_alive=cache)


def expected(site: Site, handle: SpaceHandle, keys: KeyChain, tensors: TensorMap) -> np.ndarray:
    """The same pages as the CPU kernels fill them."""
    cache = np.zeros((SPACE.n_segments, 2 * N_BLOCKS, SPACE.segment_bytes), np.uint8)
    bases = cache.ctypes.data + np.arange(SPACE.n_segments, dtype=np.int64) * cache.strides[0]
    with site.pool.match(handle, keys) as lease:
        map_ = TensorMap(bases, tensors.block_index, SPACE.segment_bytes, keep_alive=cache)
        assert lease.gather(map_, verify=True) == len(keys)
    return cache


def leased(site: Site, handle: SpaceHandle, keys: KeyChain) -> Lease:
    lease = site.pool.match(handle, keys)
    assert len(lease) == len(keys)
    return lease


def test_gather_brings_what_the_cpu_kernels_bring(
    site: Site, mover: Mover, stored: tuple[SpaceHandle, KeyChain]
) -> None:
    handle, keys = stored
    cache, tensors = paged(1)
    transfer = mover.gather(leased(site, handle, keys), handle, tensors, verify=True)
    assert transfer.wait(60.0) and transfer.good == N_BLOCKS and transfer.error is None
    assert np.array_equal(cache.cpu().numpy(), expected(site, handle, keys, tensors))
    assert site.pool._at.n_leased() == 0


def test_the_callers_stream_can_wait_for_a_gather(
    site: Site, mover: Mover, stored: tuple[SpaceHandle, KeyChain]
) -> None:
    handle, keys = stored
    cache, tensors = paged(2)
    transfer = mover.gather(leased(site, handle, keys), handle, tensors)
    transfer.order()
    copied = cache.clone()
    assert transfer.wait(60.0) and transfer.good == N_BLOCKS
    assert np.array_equal(copied.cpu().numpy(), expected(site, handle, keys, tensors))


def test_scatter_stores_what_the_device_computed(site: Site, mover: Mover, stored: object) -> None:
    """Begins behind the caller's stream, which is still busy computing the pages."""
    handle = site.pool.space(SPACE)
    keys = chain(SPACE, [100 + list(WAYS.values()).index(mover._limits), *range(N_BLOCKS - 1)])
    cache, tensors = paged(3)
    wanted = source(handle, keys).keep_alive
    assert isinstance(wanted, np.ndarray)
    blocks = torch.from_numpy(wanted.reshape(N_BLOCKS, SPACE.n_segments, -1)).cuda()
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CLOCKS // 20)
    cache[:, torch.from_numpy(tensors.block_index).cuda()] = blocks.transpose(0, 1)
    with site.pool.reserve(handle, N_BLOCKS, wait_s=5.0) as reservation:
        assert len(reservation) == N_BLOCKS
        transfer = mover.scatter(reservation, handle, tensors)
        assert transfer.wait(60.0) and transfer.good == N_BLOCKS
        assert reservation.commit(keys) == N_BLOCKS
    assert site.pool.flush(60.0)
    with leased(site, handle, keys) as lease:
        check_lease(lease, keys)
    assert_consistent(site.pool)


def test_the_lease_stands_until_the_device_is_done(
    site: Site, mover: Mover, stored: tuple[SpaceHandle, KeyChain]
) -> None:
    handle, keys = stored
    torch.cuda._sleep(BUSY_CLOCKS)  # the transfer begins behind it
    lease = leased(site, handle, keys)
    transfer = mover.gather(lease, handle, paged(4)[1])
    assert not transfer.done() and not transfer.wait(0.001)
    assert site.pool._at.n_leased() == N_BLOCKS
    with pytest.raises(ViewsAlive):
        lease.release()
    transfer.cancel()
    assert transfer.done() and transfer.good == N_BLOCKS and site.pool._at.n_leased() == 0


def test_closing_the_mover_waits_for_what_is_under_way(
    site: Site, memory: Registration, stored: tuple[SpaceHandle, KeyChain]
) -> None:
    handle, keys = stored
    with Mover(memory) as mover:
        torch.cuda._sleep(BUSY_CLOCKS // 4)
        transfer = mover.gather(leased(site, handle, keys), handle, paged(5)[1])
    assert transfer.good == N_BLOCKS and site.pool._at.n_leased() == 0


def test_registered_memory_is_pinned_until_the_last_share_is_closed() -> None:
    array = np.zeros(4 * MIB + 4096, np.uint8)
    start = -array.ctypes.data % 4096
    pages = array[start : start + 4 * MIB]
    one, other = register(pages, piece_bytes=MIB), register(pages, piece_bytes=MIB)
    tensor = torch.from_numpy(pages)
    assert tensor.is_pinned()
    one.close()
    assert tensor.is_pinned()
    other.close()
    assert not tensor.is_pinned()


def test_memory_that_somebody_else_registered_is_refused_and_the_next_launch_is_not_disturbed() -> None:
    pinned = torch.zeros(MIB, dtype=torch.uint8).pin_memory()
    with pytest.raises(ConfigError):
        register(pinned.numpy())
    assert int(torch.ones(4, device="cuda").sum()) == 4
