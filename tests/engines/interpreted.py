"""What `test_triton_interpreted.py` runs in processes of its own: the fused kernel on host memory, and its compilation.

Triton decides at import whether it interprets, for the whole process.
"""

from __future__ import annotations

import re
import sys

import numpy as np
import torch

from penstock.testing.pool import Site, block_bytes, chain, check_lease, make_space, source, target
from tests.gpu.paged import Paged
from tests.gpu.stand_ins import Runtime
from tests.support import unique_name

# Pairs of grain and number of grains in a segment: less than the kernel's chunk of 16 KiB, just that, and more.
_SHORT = [(64, 4), (64, 5), (16, 16), (16, 37), (8, 1), (8, 33), (4, 1), (4, 257), (2, 1), (2, 513), (1, 1), (1, 255)]
_LONG = [(64, 255), (64, 256), (64, 257), (64, 513), (16, 1025), (8, 2049), (4, 4097), (2, 8191), (1, 16385)]


def shape(rng: np.random.Generator, grain: int, count: int) -> Paged:
    """Blocks whose addresses and sizes are multiples of `grain`, and of no more where the numbers fall so."""
    return Paged(
        n_blocks=int(rng.integers(1, 5)),
        n_segments=int(rng.integers(1, 5)),
        segment_bytes=count * grain,
        gap=grain * int(rng.integers(0, 4)),
        offset=grain * int(rng.integers(0, 4)),
        seed=int(rng.integers(1 << 20)),
    )


def every_byte_lands_where_the_oracle_says() -> None:
    from penstock.connectors.cuda.kernels import launch

    rng = np.random.default_rng(7)
    seen = set()
    for grain, count in 4 * (_SHORT + _LONG):
        made = shape(rng, grain, count)
        to_pages, programs = bool(rng.integers(2)), int(rng.choice([1, 3, 64]))
        expected = made.after(to_pages=to_pages)
        seen.add((made.pieces().alignment(), to_pages))
        launch(made.pieces(), torch.device("cpu"), to_pages=to_pages, programs=programs)
        made.assert_is(expected)
    assert seen == {(alignment, way) for alignment in (16, 8, 4, 2, 1) for way in (True, False)}, seen


def blocks_of_an_8b_model() -> None:
    """32 layers, keys and values, 8 heads of 128, bf16: 64 segments of 32 KiB for 16 tokens. Both ways."""
    from penstock.connectors.cuda.kernels import launch

    for to_pages in (True, False):
        shape = Paged(n_blocks=2, n_segments=64, segment_bytes=16 * 8 * 128 * 2, seed=2)
        expected = shape.after(to_pages=to_pages)
        launch(shape.pieces(), torch.device("cpu"), to_pages=to_pages, programs=64)
        shape.assert_is(expected)


def a_pools_blocks_go_out_and_come_back() -> None:
    """Scattered into a pool and gathered from it, each by one launch; the pool's own kernels check what is there."""
    from penstock.connectors.cuda import Limits, Mover, register_pool

    never = Limits(one_run_bytes=1 << 60, many_runs_bytes=1 << 60)
    with (
        Site.opened(unique_name("i")) as site,
        register_pool(site.pool, runtime=Runtime()) as memory,
        Mover(memory, "cpu", limits=never) as mover,
    ):
        space = make_space()
        handle, keys = site.pool.space(space), chain(space, range(5))
        reservation = site.pool.reserve(handle, 5)
        assert mover.scatter(reservation, handle, source(handle, keys)).wait() and len(reservation) == 5
        assert reservation.commit(keys) == 5 and site.pool.flush()
        with site.pool.match(handle, keys) as lease:
            check_lease(lease, keys)
        pages, tensors = target(handle, 5, [1])
        transfer = mover.gather(site.pool.match(handle, keys), handle, tensors, segments=[1], verify=True)
        assert transfer.wait() and transfer.good == 5
        wanted = np.stack([block_bytes(bytes(key), handle.block_bytes) for key in keys])
        assert np.array_equal(pages, wanted[:, handle.segment_bytes :])


def interpret() -> None:
    every_byte_lands_where_the_oracle_says()
    blocks_of_an_8b_model()
    a_pools_blocks_go_out_and_come_back()


def compile_for_hopper() -> None:
    """Print what the compiler makes of each alignment: `ALIGNMENT DIRECTION ACCESS...`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from penstock.connectors.cuda import kernels

    for alignment in (16, 8, 4, 2, 1):
        for to_pages in (True, False):
            constants = kernels.compile_arguments(alignment, to_pages=to_pages)
            counts = dict.fromkeys(("n_blocks", "n_segments", "n_units"), "i32")
            signature = {"table": "*i64", **counts, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernels.copy_pieces, signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
            found = sorted(set(re.findall(r"(?:ld|st)\.global[\w.:]*", made.asm["ptx"])))
            print(alignment, "gather" if to_pages else "scatter", *found)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_hopper}[sys.argv[1]]()
