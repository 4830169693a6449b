"""How fast token ids become keys: `chain_keys` on int64 arrays (as engines' tensors give them), 512 blocks and more."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import BLOCK_TOKENS, bench_space
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.identity import chain_keys, warm

__all__ = ["run"]

SPACE = bench_space(n_segments=16, segment_bytes=4 << 10)
LENGTHS = (512, 1024, 2048, 8192)
_ROUNDS = 8


def run(group: Group, scale: Scale) -> Iterator[Result]:
    if not warm():
        raise RuntimeError("the compiled hash does not agree with hashlib")
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, 150_000, n * BLOCK_TOKENS, np.int64) for n in LENGTHS]
    rates = []
    for _ in range(scale.windows):
        started = time.perf_counter()
        for _ in range(_ROUNDS):
            for row in rows:
                chain_keys(SPACE, row)
        rates.append(_ROUNDS * sum(LENGTHS) / (time.perf_counter() - started))
    yield result(group.goals[0], estimate(rates), note=f"{BLOCK_TOKENS}-token blocks, chains of {LENGTHS}")
