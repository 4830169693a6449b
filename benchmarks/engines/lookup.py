"""The scheduler's lookup of a long prompt, alone: the connector's scheduler half on a real pool.

`python -m benchmarks.engines.lookup N` prints the microseconds of N lookups as JSON. Each is what vLLM's scheduler does
for a request that comes: reading it, deriving the keys of all its blocks, and leasing them, all of which are there.
Blocks are small here (4 KiB), so that many prompts fit; what is looked up does not depend on it. Every request is a new
object, and prompts take turns, so that little of a prompt is in the processor's caches when it is looked up again.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

import penstock
from penstock import Pool, Space, chain_keys
from penstock.bench.pool.rig import EngineTensors, serving
from penstock.connectors.counters import Counters
from penstock.connectors.vllm.config import ConnectorConfig
from penstock.connectors.vllm.messages import RankHello
from penstock.connectors.vllm.scheduler import SchedulerHalf
from penstock.connectors.vllm.tie import Tie
from penstock.pool.layout import plan_geometry

BLOCK_TOKENS, PROMPT_TOKENS, N_PROMPTS = 32, 8000, 48
_POOL_BYTES = 256 << 20
_WARM_UP = 20
_PIECE = 50


def main(n_lookups: int) -> None:
    """Time `n_lookups` lookups and print them."""
    rng = np.random.default_rng(20)
    prompts = [rng.integers(16, 4096, PROMPT_TOKENS).tolist() for _ in range(N_PROMPTS)]
    space = _space()
    with serving(plan_geometry(_POOL_BYTES)) as (name, _), penstock.open(name) as pool:
        _store(pool, space, prompts)
        half = SchedulerHalf(
            ConnectorConfig(pool=name), may_load=True, may_save=True, overlapping_steps=False,
            block_tokens=BLOCK_TOKENS, counters=Counters(), tie=Tie(name, "bench-lookup", ""),
        )  # fmt: skip
        half.meet({(0, 0): RankHello(space.encode(), pool.uuid)})
        took_us = [_look_up(half, f"request-{at}", prompts[at % N_PROMPTS]) for at in range(_WARM_UP + n_lookups)]
        half.close()
    print(json.dumps(took_us[_WARM_UP:]))


def _space() -> Space:
    digest = "blake2b-256:" + "0" * 64
    return Space(
        weights=digest, config=digest, engine="bench/1", layout="bytes", dtype="bfloat16", block_tokens=BLOCK_TOKENS,
        n_segments=8, segment_bytes=512,
    )  # fmt: skip


def _store(pool: Pool, space: Space, prompts: list[list[int]]) -> None:
    handle = pool.space(space, "bench")
    tensors = EngineTensors(space, PROMPT_TOKENS // BLOCK_TOKENS * space.block_bytes)
    for prompt in prompts:
        chain = chain_keys(space, prompt)
        for first in range(0, len(chain), _PIECE):
            part = chain[first : first + _PIECE]
            stored = pool.store(handle, part, tensors.map(np.arange(len(part), dtype=np.int64)), wait_s=10.0)
            if stored.n_blocks < len(part):
                raise RuntimeError(f"{stored.n_blocks} of {len(part)} blocks stored: {stored.drop.name}")
    if not pool.flush(10.0):
        raise RuntimeError("the keeper did not take in what was stored")


def _look_up(half: SchedulerHalf, name: str, prompt: list[int]) -> float:
    """Microseconds of the first lookup of a request whose whole prompt is in the pool."""
    request = Request(name, prompt, SamplingParams(max_tokens=1), None)
    started = time.perf_counter()
    half.arrived(request)
    n_tokens, _ = half.matched(request, 0)
    took_us = 1e6 * (time.perf_counter() - started)
    half.finished(request, [])
    if n_tokens != PROMPT_TOKENS - 1:
        raise RuntimeError(f"{n_tokens} tokens were found, not {PROMPT_TOKENS - 1}")
    return took_us


if __name__ == "__main__":
    main(int(sys.argv[1]))
