"""The copy engine's way of a transfer, and the choice between it and the fused kernel.

The copy engine takes one command for each run of contiguous bytes and moves long ones without the GPU's processors; the
kernel takes one launch for any number of pieces. So short or scattered goes to the kernel, long to the copy engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import torch

from penstock.connectors.cuda.pieces import Pieces
from penstock.pool.tensors import TensorMap

__all__ = ["Limits", "copy_runs", "fused", "have_kernels", "measure_limits"]

# Few enough that an engine's own kernels find most processors free; together they keep 1 MiB in flight, more than a
# link of 64 GB/s carries in its latency of one to two microseconds.
PROGRAMS = 64
_ROUNDS = 7
_SIZES = tuple(1 << bits for bits in range(10, 23))
_SCATTERED = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """From which size of a run on the copy engine is used."""

    one_run_bytes: int = 4 << 10
    """For a transfer of one run. Beluga's guideline (arXiv 2511.20172): load/store below 4 KB, a copy engine above."""
    many_runs_bytes: int = 256 << 10
    """For the average of several runs. Calculated, not measured: a command costs about 5 us to give, in which a link
    of 50 GB/s moves 256 KB. Beluga, too, moves a block's 128 chunks of 20 KB with one kernel. `measure_limits` says
    what this machine's value is."""

    def prefer_copies(self, n_runs: int, n_bytes: int) -> bool:
        """Whether the copy engine is to move `n_bytes` in `n_runs` runs."""
        return n_bytes >= n_runs * (self.one_run_bytes if n_runs == 1 else self.many_runs_bytes)


def have_kernels() -> bool:
    """Whether Triton is installed, without which there is no fused kernel."""
    return find_spec("triton") is not None


def fused(pieces: Pieces, device: torch.device, *, to_pages: bool, programs: int = PROGRAMS) -> None:
    """Queue the fused kernel on the current stream (`kernels.launch`)."""
    from penstock.connectors.cuda.kernels import launch

    launch(pieces, device, to_pages=to_pages, programs=programs)


def copy_runs(pieces: Pieces, host: torch.Tensor, device: torch.device, *, to_pages: bool) -> None:
    """Queue one copy for each run on the current stream. `host` is the registered memory that the slots lie in,
    (n_bytes,) uint8: pinned, or else the copies would wait for the device."""
    start = host.data_ptr()
    for slot, page, n_bytes in pieces.runs().tolist():
        near, far = host[slot - start : slot - start + n_bytes], _bytes_at(page, n_bytes, device)
        if to_pages:
            far.copy_(near, non_blocking=True)
        else:
            near.copy_(far, non_blocking=True)


class _Raw:
    """Memory that somebody else owns, as tensors are made from it."""

    def __init__(self, attribute: str, address: int, n_bytes: int) -> None:
        interface = {"shape": (n_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        setattr(self, attribute, interface)


def _bytes_at(address: int, n_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes of the device's memory as a tensor, (n_bytes,) uint8; owns nothing."""
    if device.type == "cuda":
        return torch.as_tensor(_Raw("__cuda_array_interface__", address, n_bytes), device=device)
    return torch.from_numpy(np.asarray(_Raw("__array_interface__", address, n_bytes)))


# ---- measuring


def measure_limits(device: torch.device | str = "cuda", sizes: tuple[int, ...] = _SIZES) -> Limits:
    """Time both ways on this machine and return from where on the copy engine is faster, for one run and for 64.

    Blocks, seconds on a GPU; takes 2 x 64 x the largest size of memory, half of it pinned. A size beyond the last means
    that the copy engine never won.
    """
    where = torch.device(device)
    largest = max(sizes) * _SCATTERED
    host = torch.empty(largest, dtype=torch.uint8, pin_memory=where.type == "cuda")
    pages = torch.empty(2 * largest, dtype=torch.uint8, device=where)
    return Limits(*(_crossing(n, host, pages, sizes) for n in (1, _SCATTERED)))


def _crossing(n_runs: int, host: torch.Tensor, pages: torch.Tensor, sizes: tuple[int, ...]) -> int:
    """The smallest size from which on copies are at least as fast at every larger one."""
    best = 2 * max(sizes)
    for size in sorted(sizes, reverse=True):
        pieces = _scattered(n_runs, size, host, pages)
        kernel_s = _seconds(pages.device, fused, pieces, pages.device)
        copies_s = _seconds(pages.device, copy_runs, pieces, host, pages.device)
        if copies_s > kernel_s:
            break
        best = size
    return best


def _scattered(n_runs: int, size: int, host: torch.Tensor, pages: torch.Tensor) -> Pieces:
    """Runs that follow one another in the slots and lie apart in the pages."""
    slots = host.data_ptr() + np.arange(n_runs, dtype=np.int64) * size
    tensors = TensorMap(np.array([pages.data_ptr()]), np.arange(n_runs), 2 * size)
    return Pieces(slots, np.zeros(1, np.int64), tensors, size)


def _seconds(device: torch.device, move: Callable[..., None], *args: Any) -> float:
    """The median time of a call, with what it queues; the first call, which may compile, is not counted."""
    taken = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        move(*args, to_pages=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return median(taken[1:])
