"""What all systems have in common, and how much is measured."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FULL", "QUICK", "Scale", "Settings", "environment"]

MIB = 1 << 20
# glibc copies blocks of 1 to 32 MiB half as fast as this machine can with its own threshold; every system gets this.
TUNABLES = "glibc.cpu.x86_non_temporal_threshold=0x80000"


@dataclass(frozen=True)
class Settings:
    """The engine's settings, the same for every server."""

    block_tokens: int = 32
    max_model_len: int = 9216
    max_batched_tokens: int = 8192
    """A whole document fits in one step: ExampleConnector stores no more of a prompt than its first step computes."""
    kv_cache_bytes: int = 128 * MIB
    """vLLM's own KV cache, of each server."""
    store_bytes: int = 1536 * MIB
    """What each system may keep outside the engine: room for all that a run stores."""
    threads: int = len(os.sched_getaffinity(0))

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "glibc_tunables": TUNABLES, "enforce_eager": True, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    document_tokens: int
    n_documents: int
    n_trace_requests: int
    n_fresh_rounds: int
    n_lookups: int
    n_loaded: int
    warm_up_tokens: int
    """Computed by each server before anything is measured: at least its whole KV cache, so that every page of it was
    touched, and every store was used."""


FULL = Scale(
    document_tokens=5000, n_documents=6, n_trace_requests=40, n_fresh_rounds=14, n_lookups=400, n_loaded=4,
    warm_up_tokens=16500,
)  # fmt: skip
QUICK = Scale(
    document_tokens=5000, n_documents=2, n_trace_requests=10, n_fresh_rounds=2, n_lookups=30, n_loaded=1,
    warm_up_tokens=5000,
)  # fmt: skip


def environment(settings: Settings, python_path: str) -> dict[str, str]:
    """The variables of every process that is measured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "LMCACHE_", "OMP_"))}
    return kept | {
        "PYTHONPATH": python_path,
        "GLIBC_TUNABLES": TUNABLES,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "LMCACHE_DISABLE_BANNER": "1",
        "LMCACHE_TRACK_USAGE": "false",
        # All servers share the cores and one works at a time; bound threads would keep copying threads on one core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads),
        # Seeds the chain of vLLM's block hashes where a peer relies on equal ones.
        "PYTHONHASHSEED": "0",
    }
