"""On a device: both ways move every byte, in both directions, at every alignment, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.connectors.cuda.copies import copy_runs, fused, measure_limits
from tests.gpu.paged import Paged

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def move(way: str, shape: Paged, *, to_pages: bool) -> None:
    if way == "kernel":
        fused(shape.pieces(), CUDA, to_pages=to_pages)
    else:
        copy_runs(shape.pieces(), shape.host, CUDA, to_pages=to_pages)
    torch.cuda.synchronize()


@pytest.mark.parametrize("to_pages", [True, False])
@pytest.mark.parametrize("way", ["kernel", "copies"])
@pytest.mark.parametrize(("grain", "count"), [(64, 257), (16, 1025), (8, 33), (8, 2049), (4, 257), (2, 8191), (1, 255)])
def test_odd_sizes(way: str, grain: int, count: int, to_pages: bool) -> None:
    for seed in range(4):
        shape = Paged(
            n_blocks=1 + seed,
            n_segments=4 - seed % 2,
            segment_bytes=grain * count,
            gap=grain * seed,
            offset=grain * (seed % 3),
            device="cuda",
            seed=seed,
            pinned=True,
        )
        expected = shape.after(to_pages=to_pages)
        move(way, shape, to_pages=to_pages)
        shape.assert_is(expected)


@pytest.mark.parametrize("to_pages", [True, False])
@pytest.mark.parametrize("way", ["kernel", "copies"])
def test_blocks_of_an_8b_model(way: str, to_pages: bool) -> None:
    """16 tokens of 32 layers, keys and values, 8 heads of 128, bf16: 64 segments of 32 KiB."""
    shape = Paged(n_blocks=16, n_segments=64, segment_bytes=32 << 10, device="cuda", seed=2, pinned=True)
    expected = shape.after(to_pages=to_pages)
    move(way, shape, to_pages=to_pages)
    shape.assert_is(expected)


def test_one_compiled_kernel_serves_every_count() -> None:
    from penstock.connectors.cuda.kernels import copy_pieces

    shapes = [Paged(n, n, 64 * n, device="cuda", seed=n, pinned=True) for n in (1, 2, 4, 16, 17)]
    move("kernel", shapes[0], to_pages=True)
    before = sum(len(entry[0]) for entry in copy_pieces.device_caches.values())
    for shape in shapes:
        move("kernel", shape, to_pages=True)
    assert sum(len(entry[0]) for entry in copy_pieces.device_caches.values()) == before


def test_limits_can_be_measured() -> None:
    measured = measure_limits("cuda", (1 << 12, 1 << 16))
    assert {measured.one_run_bytes, measured.many_runs_bytes} <= set(np.array([1 << 12, 1 << 16, 1 << 17]).tolist())
