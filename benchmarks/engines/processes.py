"""Processes of a comparison: started in sessions of their own, their CPU time read, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

__all__ = ["Process", "cpu_seconds", "free_port", "settle", "wait_until"]

_POLL_S = 0.1
_STOP_S = 20.0
# A system is at rest when all its processes together use less than this share of a core for this long.
_REST_SHARE, _REST_S, _REST_AT_MOST_S = 0.05, 0.1, 15.0


class Process:
    """A command in a session of its own, with its log. A context manager that ends the session."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._interrupted = self._stopped = False
        with self.log.open("wb") as out:
            self._popen = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._popen.pid

    def check(self) -> None:
        """Raises RuntimeError with the log's end if it ended."""
        if self._popen.poll() is not None:
            raise RuntimeError(f"{self.name} ended with {self._popen.returncode}:\n{self.tail()}")

    def tail(self, n_lines: int = 25) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        wanted = [line for line in lines if "nanobind" not in line and not line.startswith(" - ")]
        return "\n".join(wanted[-n_lines:])

    def members(self) -> list[int]:
        """Pids of the session that have not ended."""
        return [pid for pid, session, state in _processes() if session == self.pid and state not in "ZX"]

    def interrupt(self) -> None:
        """SIGINT to the leader, once. Does not wait."""
        if not self._interrupted and self._popen.poll() is None:
            self._popen.send_signal(signal.SIGINT)
        self._interrupted = True

    def stop(self) -> None:
        """Interrupt it, and SIGKILL what is left of the session after a while. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self.interrupt()
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline and self._popen.poll() is None:
            time.sleep(_POLL_S)
        while members := self.members():
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        self._popen.wait()


def _processes() -> Iterable[tuple[int, int, str]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                yield int(entry), int(fields[3]), fields[0]


def cpu_seconds(processes: Iterable[Process]) -> float:
    """CPU time used by all threads of all these sessions' processes so far.

    By each process's own clock (clock_getcpuclockid(3)): /proc counts in hundredths of a second.
    """
    total = 0.0
    for process in processes:
        for pid in process.members():
            with contextlib.suppress(OSError):
                total += time.clock_gettime((~pid << 3) | 2)
    return total


def settle(processes: list[Process]) -> None:
    """Wait until these processes are at rest: what they do after an answer, such as storing, is done."""
    deadline = time.monotonic() + _REST_AT_MOST_S
    before, at = cpu_seconds(processes), time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(_REST_S)
        after, now = cpu_seconds(processes), time.monotonic()
        if after - before < _REST_SHARE * (now - at):
            return
        before, at = after, now


def wait_until(ready: Callable[[], bool], process: Process, timeout_s: float) -> None:
    """Wait until `ready`; RuntimeError with the log's end if the process ends before, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        process.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{process.name} is not ready after {timeout_s:.0f} s:\n{process.tail()}")
        time.sleep(_POLL_S)


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
