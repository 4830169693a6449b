"""GPU transfers against a plain pinned asynchronous copy of the same bytes.

    python benchmarks/gpu/transfers.py                # writes benchmarks/results/gpu.json
    python benchmarks/gpu/transfers.py --output FILE

Blocks of 16 tokens of a model of 8B parameters (32 layers, 8 KV heads of 128, bf16: 64 segments of 32 KiB) between
slots in pinned memory and scattered pages, and 16 single tokens scattered over 16 slots. Each pair is one plain copy
and one transfer, one after the other, timed by events of the device; latency is the host's, from the call to the last
byte.
Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ImportError:
    sys.exit("benchmarks/gpu needs PyTorch with CUDA and an NVIDIA GPU: PyTorch is not installed here")

from penstock import TensorMap
from penstock.bench.machine import describe_machine
from penstock.connectors.cuda.copies import Limits, copy_runs, fused, have_kernels, measure_limits
from penstock.connectors.cuda.pieces import Pieces
from penstock.connectors.cuda.registration import Registration, register

RESULTS = Path(__file__).resolve().parent.parent / "results"
N_SEGMENTS, TOKEN_BYTES, BLOCK_TOKENS = 64, 8 * 128 * 2, 16
GOALS = {"kernel_over_pinned_copy": 0.9, "scattered_16_tokens_us": 250.0}
_PAIRS = 31
_N_BLOCKS = 128
_PAGE = 4096


class Rig:
    """Registered host memory with slots, paged tensors on the device, and the plain copy between the same amounts."""

    def __init__(self, n_blocks: int, segment_bytes: int) -> None:
        self.n_bytes = n_blocks * N_SEGMENTS * segment_bytes
        raw = np.ones(2 * self.n_bytes + _PAGE, np.uint8)
        start = -raw.ctypes.data % _PAGE
        self.memory: Registration = register(raw[start : start + 2 * self.n_bytes])
        self.device = torch.device("cuda")
        self.pages = torch.zeros(2 * self.n_bytes, dtype=torch.uint8, device=self.device)
        self.flat = torch.zeros(self.n_bytes, dtype=torch.uint8, device=self.device)
        rng = np.random.default_rng(5)
        slots = self.memory.address + rng.permutation(2 * n_blocks)[:n_blocks] * (N_SEGMENTS * segment_bytes)
        layers = self.pages.data_ptr() + np.arange(N_SEGMENTS, dtype=np.int64) * (2 * n_blocks * segment_bytes)
        index = rng.permutation(2 * n_blocks)[:n_blocks].astype(np.int64)
        segs = np.arange(N_SEGMENTS, dtype=np.int64)
        self.pieces = Pieces(slots.astype(np.int64), segs, TensorMap(layers, index, segment_bytes), segment_bytes)

    def plain(self, to_pages: bool) -> None:
        near = self.memory.tensor[: self.n_bytes]
        if to_pages:
            self.flat.copy_(near, non_blocking=True)
        else:
            near.copy_(self.flat, non_blocking=True)

    def kernel(self, to_pages: bool) -> None:
        fused(self.pieces, self.device, to_pages=to_pages)

    def copies(self, to_pages: bool) -> None:
        copy_runs(self.pieces, self.memory.tensor, self.device, to_pages=to_pages)


def device_s(move: Callable[[bool], None], to_pages: bool) -> float:
    """Seconds on the device, from before the first command to behind the last one."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    move(to_pages)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def host_s(move: Callable[[bool], None], to_pages: bool) -> float:
    """Seconds from the call until its bytes are there."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    move(to_pages)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def against_plain(rig: Rig, way: Callable[[bool], None], to_pages: bool) -> dict[str, float]:
    """GB/s of a way and of the plain copy, and the median of the pairs' ratios with its quartiles."""
    for _ in range(3):
        rig.plain(to_pages)
        way(to_pages)
    pairs = [(device_s(rig.plain, to_pages), device_s(way, to_pages)) for _ in range(_PAIRS)]
    ratios = sorted(plain / ours for plain, ours in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "gb_per_s": round(rig.n_bytes / statistics.median(ours for _, ours in pairs) / 1e9, 2),
        "plain_gb_per_s": round(rig.n_bytes / statistics.median(plain for plain, _ in pairs) / 1e9, 2),
        "over_plain": round(middle, 4),
        "over_plain_low": round(low, 4),
        "over_plain_high": round(high, 4),
    }


def latency_us(move: Callable[[bool], None], to_pages: bool) -> dict[str, float]:
    """Median and the 90th percentile of a transfer, as the host sees it."""
    for _ in range(5):
        move(to_pages)
    taken = [1e6 * host_s(move, to_pages) for _ in range(10 * _PAIRS)]
    return {"p50": round(statistics.median(taken), 1), "p90": round(statistics.quantiles(taken, n=10)[-1], 1)}


def measure() -> dict[str, Any]:
    """Everything, as it goes into the report."""
    ways = ["kernel", "copies"] if have_kernels() else ["copies"]
    blocks = Rig(_N_BLOCKS, BLOCK_TOKENS * TOKEN_BYTES)
    tokens = Rig(16, TOKEN_BYTES)
    one = Rig(1, BLOCK_TOKENS * TOKEN_BYTES)
    found: dict[str, Any] = {}
    for direction, to_pages in (("gather", True), ("scatter", False)):
        found[direction] = {
            way: {
                "blocks_of_16_tokens": against_plain(blocks, getattr(blocks, way), to_pages),
                "scattered_16_tokens_us": latency_us(getattr(tokens, way), to_pages),
                "one_block_us": latency_us(getattr(one, way), to_pages),
            }
            for way in ways
        }
    if have_kernels():
        limits = measure_limits()
        found["limits"] = {"one_run_bytes": limits.one_run_bytes, "many_runs_bytes": limits.many_runs_bytes}
    found["default_limits"] = {"one_run_bytes": Limits().one_run_bytes, "many_runs_bytes": Limits().many_runs_bytes}
    for rig in (blocks, tokens, one):
        rig.memory.close()
    return found


def describe_gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"benchmarks/gpu needs an NVIDIA GPU: PyTorch {torch.__version__} sees none here")
    report = {"machine": describe_machine() | describe_gpu(), "goals": GOALS, "results": measure()}
    chosen.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["results"], indent=2))


if __name__ == "__main__":
    main()
