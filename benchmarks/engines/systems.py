"""What is compared: two vLLM servers for each system, with what they share beside them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines.client import MODEL_NAME, Answer, ask, healthy
from benchmarks.engines.processes import Process, cpu_seconds, free_port, settle, wait_until
from benchmarks.engines.settings import Settings, environment
from benchmarks.engines.times import FOLDER_VARIABLE
from benchmarks.engines.traffic import fresh_prompt
from penstock.config import memory_limit_bytes
from penstock.pool.layout import plan_geometry

__all__ = ["SYSTEMS", "Rig", "Server", "System", "unavailable"]

ROOT = Path(__file__).resolve().parents[2]
SERVER = "vllm.entrypoints.openai.api_server"
_START_S = 300.0
_READY_S = 60.0
# Two servers with three processes each, what they store, and some air.
_SYSTEM_BYTES = 4500 << 20
SYSTEMS = {
    "none": "vLLM without a connector",
    "example": "vLLM's ExampleConnector, files",
    "offload": "vLLM's OffloadingConnector, memory and `fs` tier",
    "lmcache": "LMCache multi-process, engine-driven",
    "penstock": "Penstock",
}
"""By name, in the order of the table."""


@dataclass
class Server:
    """A vLLM server."""

    process: Process
    port: int

    def ask(self, prompt: list[int], max_tokens: int = 4) -> Answer:
        """A completion; RuntimeError with the server's log if it failed."""
        try:
            answer = ask(self.port, prompt, max_tokens)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"{self.process.name}: {error}\n{self.process.tail()}") from error
        assert answer is not None
        return answer


@dataclass
class System:
    """A system that runs: its servers (usually two) and what serves them."""

    name: str
    servers: list[Server] = field(default_factory=list)
    helpers: list[Process] = field(default_factory=list)
    times_folder: Path | None = None

    @property
    def processes(self) -> list[Process]:
        return [server.process for server in self.servers] + self.helpers

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.processes)

    def stop(self) -> None:
        """End all its processes, servers first. Idempotent."""
        for server in self.servers:
            server.process.interrupt()
        for process in self.processes:
            process.stop()

    def settle(self) -> None:
        """Wait until all that it does behind answers is done."""
        settle(self.processes)


def unavailable(name: str) -> str:
    """Why a system cannot run in this Python; empty if it can."""
    if name == "lmcache" and importlib.util.find_spec("lmcache") is None:
        return "lmcache is not installed (benchmarks/engines/README.md)"
    free_bytes = memory_limit_bytes()
    if free_bytes < _SYSTEM_BYTES:
        return f"{free_bytes >> 20} MiB of memory are free, and its servers need {_SYSTEM_BYTES >> 20}"
    return ""


class Rig:
    """Starts systems, and ends all of them when its `with` block ends."""

    def __init__(
        self, settings: Settings, model: Path, folder: Path, say: Callable[[str], None], files_in: Path
    ) -> None:
        """`folder` takes the logs; `files_in` the files of the peers that store in files."""
        self.settings, self.model, self.folder, self._say = settings, model, folder, say
        self._name = f"bench-{os.getpid()}"
        self._store = files_in / f"penstock-{self._name}"
        self._env = environment(settings, os.pathsep.join((str(ROOT / "src"), str(ROOT))))
        self._stack = ExitStack()
        self._systems: list[System] = []

    def __enter__(self) -> Rig:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.callback(self._clean)
        return self

    def __exit__(self, *_: object) -> None:
        for system in self._systems:
            for server in system.servers:
                server.process.interrupt()
        self._stack.close()

    def start(self, name: str) -> System:
        """Start a system's processes; RuntimeError with a log's end if that fails, and then nothing of it is left."""
        system = System(name)
        started = time.monotonic()
        with ExitStack() as undo:
            undo.callback(system.stop)
            variables, transfer = getattr(self, f"_prepare_{name.partition('-')[0]}")(system, name)
            n_servers = 1 if "-" in name else 2
            system.servers = []
            for at in range(n_servers):
                system.servers.append(self._server(f"{name}-{'ab'[at]}", variables, transfer(at)))
            for server in system.servers:
                wait_until(lambda server=server: healthy(server.port), server.process, _START_S)  # type: ignore[misc]
            self._stack.enter_context(undo.pop_all())
        self._systems.append(system)
        self._say(f"{name}: started in {time.monotonic() - started:.0f} s")
        return system

    def warm_up(self, system: System, n_tokens: int, document_tokens: int) -> None:
        """Have each server compute that many tokens, and the other find what the first stored."""
        for at, server in enumerate(system.servers):
            for number in range(-(-n_tokens // document_tokens)):
                server.ask(fresh_prompt(document_tokens, "warm-up", at, number))
        system.settle()
        for server in system.servers:
            for at in range(len(system.servers)):
                server.ask(fresh_prompt(document_tokens, "warm-up", at, 0))
        system.settle()

    def forget_files(self) -> None:
        """Delete what peers stored in files, which they do not bound: it would fill the machine's memory."""
        for file in self._store.rglob("*"):
            if file.is_file() and file.suffix in (".bin", ".safetensors"):
                file.unlink(missing_ok=True)
        for folder in (self._store / "example").glob("*"):
            folder.rmdir()

    # ---- one for each system: (extra variables, the transfer configuration of server 0 or 1)

    def _prepare_none(self, system: System, name: str) -> tuple[Mapping[str, str], Callable[[int], Any]]:
        return {}, lambda at: None

    def _prepare_example(self, system: System, name: str) -> tuple[Mapping[str, str], Callable[[int], Any]]:
        folder = self._store / "example"
        folder.mkdir(parents=True)
        return {}, lambda at: {
            "kv_connector": "ExampleConnector",
            "kv_connector_extra_config": {"shared_storage_path": str(folder)},
        }

    def _prepare_offload(self, system: System, name: str) -> tuple[Mapping[str, str], Callable[[int], Any]]:
        folder = self._store / "offload"
        folder.mkdir(parents=True)
        extra = {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "benchmarks.engines.offload_spec",
            "cpu_bytes_to_use": self.settings.store_bytes // 6,
            "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
        }
        return {}, lambda at: {
            "kv_connector": "OffloadingConnector",
            "engine_id": f"{self._name}-{at}",
            "kv_connector_extra_config": extra,
        }

    def _prepare_lmcache(self, system: System, name: str) -> tuple[Mapping[str, str], Callable[[int], Any]]:
        port, http_port, metrics_port = free_port(), free_port(), free_port()
        command = [
            sys.executable, "-c", "from lmcache.cli.main import main; main()", "server",
            "--supported-transfer-mode", "engine_driven",
            "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http_port), "--prometheus-port",
            str(metrics_port), "--l1-size-gb", str(self.settings.store_bytes / (1 << 30)), "--no-l1-use-lazy",
            "--eviction-policy", "LRU", "--shm-name", self._name,
        ]  # fmt: skip
        helper = Process("lmcache-server", command, self._env, self.folder)
        system.helpers.append(helper)
        wait_until(lambda: _listens(port), helper, _READY_S)
        return {}, lambda at: {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }

    def _prepare_penstock(self, system: System, name: str) -> tuple[Mapping[str, str], Callable[[int], Any]]:
        """`penstock-beside` is one more server on the pool of `penstock`, whose loads all run beside its steps."""
        extra: dict[str, Any] = {"pool": self._name}
        if name == "penstock-beside":
            extra["sync_load_ms"] = 0
        else:
            self._keeper(system)
        system.times_folder = self.folder / f"{name}-times"
        system.times_folder.mkdir(parents=True, exist_ok=True)
        return {FOLDER_VARIABLE: str(system.times_folder)}, lambda at: {
            "kv_connector": "TimedPenstockConnector",
            "kv_connector_module_path": "benchmarks.engines.timed",
            "kv_connector_extra_config": extra,
        }

    def _keeper(self, system: System) -> None:
        penstock, geometry = [sys.executable, "-m", "penstock"], plan_geometry(self.settings.store_bytes)
        command = [*penstock, "serve", "--name", self._name, "--size", str(self.settings.store_bytes)]
        helper = Process("penstock-keeper", command, self._env, self.folder)
        system.helpers.append(helper)

        def touched() -> bool:
            shown = subprocess.run(
                [*penstock, "stat", "--json", "--name", self._name], env=self._env, capture_output=True, check=False
            )
            if shown.returncode != 0:
                return False
            return bool(json.loads(shown.stdout)["touched_bytes"] >= geometry.n_slabs * geometry.slab_bytes)

        wait_until(touched, helper, _READY_S)

    # ---- inside

    def _server(self, name: str, variables: Mapping[str, str], transfer: dict[str, Any] | None) -> Server:
        port = free_port()
        options: dict[str, Any] = {
            "model": self.model, "served-model-name": MODEL_NAME, "host": "127.0.0.1", "port": port,
            "block-size": self.settings.block_tokens, "max-model-len": self.settings.max_model_len,
            "max-num-batched-tokens": self.settings.max_batched_tokens, "generation-config": "vllm",
            "kv-cache-memory-bytes": self.settings.kv_cache_bytes,
        }  # fmt: skip
        if transfer is not None:
            options["kv-transfer-config"] = json.dumps({"kv_role": "kv_both", **transfer})
        flags = ("enforce-eager", "enable-prompt-tokens-details", "disable-uvicorn-access-log")
        named = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        command = [sys.executable, "-W", "ignore", "-m", SERVER, *named, *(f"--{flag}" for flag in flags)]
        return Server(Process(name, command, {**self._env, **variables}, self.folder), port)

    def _clean(self) -> None:
        """What processes that were ended hard left in shared memory."""
        shutil.rmtree(self._store, ignore_errors=True)
        for pattern in (f"vllm_offload_{self._name}*", f"penstock-*-{self._name}*", f"*{self._name}*"):
            for file in Path("/dev/shm").glob(pattern):
                with contextlib.suppress(OSError):
                    file.unlink()


def _listens(port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False
