"""The demo's engines as vLLM servers: what `processes.EngineProcess` does, over HTTP and on the real engine.

The servers compute in float32, where the tokens with the pool must be those without it, and keep no prefix cache of
their own, so that every hit is the pool's. Requests "alone" tell the connector to leave the pool alone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any, Self

import torch

from penstock.connectors.vllm.command import server_command
from penstock.errors import KeeperError, NoKeeper
from penstock.pool.wire import Connection, Query

__all__ = ["ServerEngine", "Stored"]

START_TIMEOUT_S = 300.0
STORED_TIMEOUT_S = 30.0
_BLOCK_TOKENS = 32
_POLL_S = 0.05
_KV_BYTES = 256 << 20
# The scheduler's and the worker's client.
_HALVES = 2
_FETCHED = "vllm:penstock_fetched_blocks_total"


class Stored:
    """Which blocks the pool must have by now: those of every request that a keeper was there for."""

    def __init__(self, pool_name: str) -> None:
        self._pool_name = pool_name
        self._blocks: set[tuple[int, ...]] = set()

    def wait(self, tokens: list[int]) -> bool:
        """A request computed the KV of `tokens`: wait until its full blocks are in the pool. False if they are not in
        time, or if there is no keeper."""
        ends = range(_BLOCK_TOKENS, len(tokens) + 1, _BLOCK_TOKENS)
        wanted = self._blocks | {tuple(tokens[:end]) for end in ends}
        deadline = time.monotonic() + STORED_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                n_blocks = int(_stat(self._pool_name)["blocks"])
            except (NoKeeper, KeeperError, OSError):
                return False
            if n_blocks >= len(wanted):
                self._blocks = wanted
                return True
            time.sleep(_POLL_S)
        return False


class ServerEngine:
    """One server. Requests and answers alternate."""

    def __init__(self, label: str, model_id: str, pool_name: str, log: Any, stored: Stored) -> None:
        self.label = label
        self._model_id, self._pool_name, self._log, self._stored = model_id, pool_name, log, stored
        self._port = _free_port()
        self.facts: dict[str, Any] = {"dtype": "float32", "block_tokens": _BLOCK_TOKENS} | _facts(model_id)
        # A server saves in batches, of which the slots at hand when the keeper dies take only a part.
        self.facts["drops_without_keeper"] = True
        arguments = [
            "--dtype",
            "float32",
            "--served-model-name",
            "demo",
            "--no-enable-prefix-caching",
            "--enforce-eager",
        ]
        arguments += ["--max-model-len", str(self.facts["max_positions"]), "--enable-prompt-tokens-details"]
        command = server_command(
            model_id, arguments, pool_name, kv_bytes=_KV_BYTES, port=self._port, block_size=_BLOCK_TOKENS
        )
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=quiet | os.environ, start_new_session=True
        )

    def ready(self) -> Self:
        """Wait until the server answers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._get("/health")[0] == 200:
                    return self
            time.sleep(_POLL_S)
        raise KeeperError(f"engine {self.label} did not start; its log is {self._log.name}")

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request, as `EngineProcess.ask`."""
        answer: dict[str, Any] = getattr(self, f"_{do}")(**arguments)
        return answer

    def stop(self) -> None:
        """End the server and everything it started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _generate(self, tokens: list[int], new_tokens: int, alone: bool, session: str) -> dict[str, Any]:
        # As in `engine.py`: what is on disk is to come from there.
        asked = {"skip_load": alone, "skip_save": alone, "fetch": "always", "session": session}
        fetched_before = self._fetched_blocks()
        body = {
            "model": "demo",
            "prompt": tokens,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "kv_transfer_params": {"penstock": asked},
        }
        started = time.perf_counter()
        first_s, answer = 0.0, list[int]()
        usage: dict[str, Any] = {}
        with self._post("/v1/completions", body) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                new = [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
                first_s = first_s or (time.perf_counter() - started if new else 0.0)
                answer += new
                usage = chunk.get("usage") or usage
        hit = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        stored = alone or self._stored.wait([*tokens, *answer][:-1])
        return {
            "tokens": answer,
            "hit_tokens": hit,
            "miss": "",
            "ttft_s": first_s,
            "stored": stored,
            "fetched_blocks": self._fetched_blocks() - fetched_before,
        }

    def _compare(self, prompt: list[int], reference: list[int], candidate: list[int]) -> dict[str, Any]:
        if reference == candidate:
            return {"equal": len(reference), "near_ties": 0, "violations": 0, "widest": 0.0}
        from penstock.connectors.equality import compare_tokens
        from penstock.demo.model import load_model

        equality = compare_tokens(load_model(self._model_id).float(), prompt, reference, candidate)
        return {name: getattr(equality, name) for name in ("equal", "near_ties", "violations", "widest")}

    def _wait_for_keeper(self, timeout_s: float) -> dict[str, Any]:
        """Until both halves of the connector are back with a keeper, by themselves."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(NoKeeper, KeeperError, OSError):
                clients = _stat(self._pool_name)["clients"]
                mine = [one for one in clients if one["alive"] and _session(int(one["pid"])) == self._process.pid]
                if len(mine) >= _HALVES:
                    return {"alive": True}
            time.sleep(_POLL_S)
        return {"alive": False}

    def _fetched_blocks(self) -> int:
        """Blocks that came from below the pool since the server started."""
        _, text = self._get("/metrics")
        lines = (line for line in text.decode().splitlines() if line.startswith(f"{_FETCHED}{{"))
        return int(sum(float(line.rpartition(" ")[2]) for line in lines))

    def _get(self, path: str) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    @contextlib.contextmanager
    def _post(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise KeeperError(f"engine {self.label} answered {response.status}: {response.read()[:500]!r}")
            yield response


def _stat(pool_name: str) -> dict[str, Any]:
    with contextlib.closing(Connection(pool_name)) as connection:
        reply, _ = connection.ask(Query("stat"))
    body: dict[str, Any] = reply.body  # type: ignore[union-attr]
    return body


def _session(pid: int) -> int:
    """The session of a process: a server leads its own; 0 for one that is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _facts(model_id: str) -> dict[str, Any]:
    """What the demo's parent needs to know of the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_id)
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())  # type: ignore[no-untyped-call]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * torch.float32.itemsize
    return {
        "parameters": n_parameters,
        "max_positions": config.max_position_embeddings,
        "block_bytes": token_bytes * _BLOCK_TOKENS,
    }
