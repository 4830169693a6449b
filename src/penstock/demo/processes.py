"""The demo's processes: a keeper that can be killed, engines that answer JSON lines. All end with the demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Self

from penstock.errors import KeeperError, NoKeeper
from penstock.pool import segment as segments
from penstock.pool.below import TierLine
from penstock.pool.wire import Connection, Query

__all__ = ["EngineProcess", "KeeperProcess"]

START_TIMEOUT_S = 120.0


class KeeperProcess:
    """`penstock serve` as a child."""

    def __init__(self, name: str, size: str, log: Any, tier: str) -> None:
        """`tier` is the address of what lies below the pool."""
        self._command = [sys.executable, "-m", "penstock", "serve", "--name", name, "--size", size, "--tier", tier]
        self._name = name
        self._log = log
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                connection = Connection(self._name)
            except NoKeeper:
                if process.poll() is not None:
                    break
                time.sleep(0.02)
                continue
            connection.close()
            return process
        process.kill()
        process.wait()
        raise KeeperError(f"the keeper did not start; its log is {self._log.name}")

    def stat(self) -> dict[str, Any]:
        connection = Connection(self._name)
        try:
            reply, _ = connection.ask(Query("stat"))
        finally:
            connection.close()
        return reply.body  # type: ignore[union-attr]

    def tiers(self) -> dict[str, Any]:
        """What `penstock tiers` shows."""
        line = TierLine(self._name)
        try:
            return line.report(START_TIMEOUT_S)
        finally:
            line.close()

    def wait_written(self) -> bool:
        """Wait until everything that is in the pool is in the tier. False if that takes too long."""
        self.wait_mover()
        deadline = time.monotonic() + START_TIMEOUT_S
        # What happened before is seen once the mover has looked twice more: it may be in the middle of a look.
        seen = self.tiers()["mover"]["looks"] + 2
        while time.monotonic() < deadline:
            report = self.tiers()
            orders = report["orders"]
            if report["mover"]["looks"] >= seen and not orders["waiting"] and not orders["in_flight"]:
                return True
            time.sleep(0.05)
        return False

    def wait_mover(self) -> None:
        """Wait until what moves blocks answers. Raises KeeperError if it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.tiers()
                return
            except KeeperError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def lose_pool(self) -> None:
        """End it in an orderly way and delete its segment, as a reboot does."""
        self.stop()
        path = segments.default_path(self._name)
        path.unlink()
        self.restart()
        self.wait_mover()

    def kill(self) -> None:
        """SIGKILL, as if it had crashed."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def restart(self) -> None:
        self._process = self._start()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class EngineProcess:
    """One engine. Requests and answers alternate."""

    def __init__(self, label: str, model_id: str, pool_name: str, log: Any) -> None:
        self.label = label
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "penstock.demo.engine", model_id, pool_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        self.facts: dict[str, Any] = {}

    def ready(self) -> Self:
        """Wait until the model is loaded."""
        self.facts = self._answer()
        return self

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request. Raises KeeperError if the engine ended."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> KeeperError:
        return KeeperError(f"engine {self.label} ended; its log is {self._log.name}")

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
