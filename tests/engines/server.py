"""Real vLLM OpenAI servers for tests: described by a frozen configuration, started, watched, shared and ended.

A start costs 18 to 30 s, nearly all of it three processes that import vLLM one after the other (API server, engine,
worker), so servers are shared between tests (`fleet.py`) and several are started side by side. Requests to them are
in `client.py`, models in `models.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import MIB, environment, until

# Guards against hangs, not measures: a start under load takes a minute.
START_S = 240.0
STOP_S = 60.0
MODEL_NAME = "model"
"""What requests call the model, whatever its folder is."""

# Without binding, for vLLM binds every engine of a machine to the same first cores; one thread each, for models this
# small are no faster on two. Torch's intra-op pool follows OMP_NUM_THREADS.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
# vLLM reads these and they would change what the tests say they run.
REMOVED = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS", "PYTHONHASHSEED")


@dataclass(frozen=True)
class ServerConfig:
    """One server. Equal configurations may be served by one process; `replica` tells apart servers that must not."""

    model: Path
    dtype: str = ""
    """A vLLM dtype; empty for the checkpoint's own. (vLLM's "auto" makes bfloat16 of float32.)"""
    block_size: int = 32
    """Tokens a block."""
    max_model_len: int = 16384
    kv_cache_bytes: int = 512 * MIB
    chunked_prefill: bool = True
    max_batched_tokens: int = 2048
    """Tokens a step. Without chunked prefill a whole prompt must fit: it is raised to `max_model_len` then."""
    prefix_caching: bool = True
    kv_transfer: str | None = None
    """`--kv-transfer-config`, JSON; see `penstock_transfer`."""
    arguments: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    """Environment on top of the usual one."""
    shutdown_timeout_s: int = 0
    """0, vLLM's default, ends the engine abruptly at the end; with more its processes get to close what they hold."""
    replica: int = 0

    def command(self, port: int) -> list[str]:
        """The process's command line."""
        batched = self.max_batched_tokens if self.chunked_prefill else max(self.max_batched_tokens, self.max_model_len)
        options: dict[str, Any] = {
            "model": self.model,
            "served-model-name": MODEL_NAME,
            "host": "127.0.0.1",
            "port": port,
            "dtype": self.dtype or json.loads((self.model / "config.json").read_text())["dtype"],
            "block-size": self.block_size,
            "max-model-len": self.max_model_len,
            "kv-cache-memory-bytes": self.kv_cache_bytes,
            "max-num-batched-tokens": batched,
            "generation-config": "vllm",
            "shutdown-timeout": self.shutdown_timeout_s,
        }
        flags = [
            "enforce-eager",
            "enable-prompt-tokens-details",
            "disable-uvicorn-access-log",
            "enable-request-id-headers",
        ]
        flags.append("enable-chunked-prefill" if self.chunked_prefill else "no-enable-chunked-prefill")
        flags.append("enable-prefix-caching" if self.prefix_caching else "no-enable-prefix-caching")
        if self.kv_transfer is not None:
            options["kv-transfer-config"] = self.kv_transfer
        named = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in options.items())
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-W", "ignore", "-m", module, *named, *(f"--{flag}" for flag in flags), *self.arguments]


def penstock_transfer(pool: str, *, policy: str | None = None, **extra: Any) -> str:
    """`--kv-transfer-config` for Penstock's connector on the pool of that name; `extra` is its extra config."""
    config: dict[str, Any] = {
        "kv_connector": "PenstockConnector",
        "kv_connector_module_path": "penstock.connectors.vllm",
        "kv_role": "kv_both",
        # Saving may wait long for room: on a busy machine these tests are about what is stored, not about how soon.
        "kv_connector_extra_config": {"pool": pool, "save_wait_s": 10.0, **extra},
    }
    if policy is not None:
        config["kv_load_failure_policy"] = policy
    return json.dumps(config, sort_keys=True)


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """A server's processes, all in one session of their own, and its log."""

    def __init__(self, config: ServerConfig, log: Path) -> None:
        self.config = config
        self.log = log
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The API server's process, which leads the session."""
        assert self.process is not None, "the server was not launched"
        return self.process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start the processes without waiting for them. Call it from the main thread."""
        assert self.process is None, "launched already"
        variables = {**QUIET, **dict(self.config.variables)}
        env = {name: value for name, value in environment(**variables).items() if name not in REMOVED}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.config.command(self.port), env=env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=self.log.parent,
            )  # fmt: skip

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until it answers; fails with the log's end if it ends instead, or says nothing in time."""
        try:
            until(self._answers, f"{self.url} answers", timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None

    def start(self) -> None:
        """Start it and wait until it answers. A server that fails to start is ended at once."""
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def start_refused(self, timeout_s: float = START_S) -> str:
        """Start a server that must refuse to run: its whole log once it has ended by itself, with an error."""
        self.launch()
        try:
            until(self._ended, "the server ends by itself", timeout_s=timeout_s)
            assert self.process is not None and self.process.returncode != 0, self.tail()
        finally:
            self.kill()
        return self.read_log()

    def _answers(self) -> bool:
        assert not self._ended(), f"the server ended with {self.process and self.process.returncode} before it answered"
        return self._healthy()

    def _healthy(self) -> bool:
        try:
            return self.get("/health", timeout_s=5.0)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _ended(self) -> bool:
        assert self.process is not None, "the server was not launched"
        return self.process.poll() is not None

    @property
    def alive(self) -> bool:
        """Whether the process runs and calls its engine healthy."""
        return self.process is not None and not self._ended() and self._healthy()

    def get(self, path: str, *, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """A GET's status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    # ---- its log

    def read_log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, n_lines: int = 60) -> str:
        """The log's end, for an error message. What triton's bindings print at their end is left out."""
        lines = [line for line in self.read_log().splitlines() if not re.match(r" - |nanobind: ", line)]
        return f"--- {self.log}\n" + "\n".join(lines[-n_lines:])

    def wait_log(self, pattern: str, *, timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until the log has this; fails with the log's end otherwise."""
        try:
            found: re.Match[str] = until(lambda: re.search(pattern, self.read_log()), pattern, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None
        return found

    # ---- its processes

    def members(self) -> dict[int, str]:
        """Pid and name of every process of the server's session that has not ended."""
        return {} if self.process is None else session_members(self.process.pid)

    def role(self, name: str) -> list[int]:
        """Pids of the session's processes whose command line contains this: "EngineCore", "Worker"."""
        found = []
        for pid in self.members():
            with contextlib.suppress(OSError):
                if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return sorted(found)

    def rss_bytes(self) -> int:
        """Resident memory of all its processes; shared pages count once a process."""
        total = 0
        for pid in self.members():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return total

    def n_handles(self) -> int:
        """Open file descriptors of all its processes."""
        total = 0
        for pid in self.members():
            with contextlib.suppress(OSError):
                total += len(os.listdir(f"/proc/{pid}/fd"))
        return total

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it as a user does: a signal to the API server, then a wait until the whole session is gone.

        Returns the exit status; fails, with everything killed, if a process outlives the deadline.
        """
        if self.process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        try:
            code = self.process.wait(STOP_S)
            until(lambda: not self.members(), "no process of the server survives", timeout_s=STOP_S)
        except (subprocess.TimeoutExpired, AssertionError) as error:
            left = self.members()
            self.kill()
            raise AssertionError(f"{error}; left: {left}\n{self.tail()}") from None
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the whole session; returns once nothing of it is left."""
        if self.process is None:
            return

        # The tracker last and by itself: it removes the others' shared memory once they are gone.
        until(lambda: self._kill(spared=self.role("multiprocessing.resource_tracker")), timeout_s=STOP_S)
        with contextlib.suppress(AssertionError):
            until(lambda: not self.members(), timeout_s=5.0)
        until(lambda: self._kill(spared=[]), timeout_s=STOP_S)
        self.process.wait(STOP_S)
        self.process = None

    def _kill(self, spared: Sequence[int]) -> bool:
        """SIGKILL to all but these; whether nothing else was left."""
        victims = [pid for pid in self.members() if pid not in spared]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not victims

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def session_members(session: int) -> dict[int, str]:
    """Pid and name of every process of a session that runs."""
    every = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid: name for pid, (name, of) in _running(every).items() if of == session}


def running(pids: Iterable[int]) -> dict[int, str]:
    """Which of these processes run, with their names."""
    return {pid: name for pid, (name, _) in _running(pids).items()}


def _running(pids: Iterable[int]) -> dict[int, tuple[str, int]]:
    """Name and session of those that run: one that only waits to be reaped does not."""
    found: dict[int, tuple[str, int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
            state, _parent, _group, session, *_ = rest.split()
            if state not in "ZX":
                found[pid] = (name.partition("(")[2], int(session))
    return found
