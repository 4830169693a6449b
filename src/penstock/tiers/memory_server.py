"""The keeper of a second memory: a child process that serves its segment, joined where somebody serves it already.

Covers starting it, attaching to it, starting it again when it dies, and that it does not outlive this process: the
child watches its parent by a pidfd. What the segment holds stays for the next start. Blocks are `memory_client.py`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from penstock.errors import ConfigError, KeeperError, NoKeeper, SegmentError, TierUnavailable
from penstock.pool import segment as segments
from penstock.pool.attaching import attach
from penstock.pool.client import Pool
from penstock.pool.wire import Connection

__all__ = ["MemoryServer", "Serving"]

log = logging.getLogger("penstock.tiers.memory")

# A first start on a machine compiles the kernels.
START_WITHIN_S = 120.0
_LOOK_AGAIN_S = 0.02
# After a child ended by itself: how long somebody else's keeper may take to answer.
_ELSE_WITHIN_S = 1.0
# Between two starts of a child that died, doubling up to the longest.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
# How often a keeper that is not a child of this process is looked after.
_WATCH_S = 0.2
_STOP_WITHIN_S = 5.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, and how."""

    pool: str
    path: Path
    size: str
    slab: str
    numa: int | None
    coherent: bool = True

    def command(self, parent: int) -> list[str]:
        words = [sys.executable, "-m", "penstock", "serve", "--name", self.pool, "--path", str(self.path)]
        words += ["--parent", str(parent)]
        words += ["--size", self.size] if self.size else []
        words += ["--slab", self.slab] if self.slab else []
        words += [] if self.coherent else ["--no-coherent"]
        return words + (["--numa", str(self.numa)] if self.numa is not None else [])


class MemoryServer:
    """Keeps a keeper running for one segment. Thread-safe."""

    def __init__(self, serving: Serving) -> None:
        """Join the keeper that serves the segment, or start one.

        Raises TierUnavailable with the child's own words where it ends instead, ConfigError where another segment has
        the pool's name.
        """
        self._serving = serving
        self._child: subprocess.Popen[bytes] | None = None
        self._listener: _Listener
        self._closing = threading.Event()
        self._changing = threading.Lock()
        self.restarts = 0
        """How often a keeper was started because the one before had gone."""
        try:
            self.pool = self._join(time.monotonic() + START_WITHIN_S)
        except BaseException:
            self._end_child()
            raise
        self._watcher = threading.Thread(target=self._watch, name=f"penstock-{serving.pool}-watch", daemon=True)
        self._watcher.start()

    @property
    def child_pid(self) -> int | None:
        """The keeper's process if it is this process's child."""
        child = self._child
        return None if child is None else child.pid

    def _join(self, until: float) -> Pool:
        said = ""
        while True:
            try:
                return self._attached()
            except NoKeeper:
                pass
            except (KeeperError, SegmentError) as error:
                raise TierUnavailable(f"{self._serving.path}: {error}") from error
            if time.monotonic() >= until:
                raise TierUnavailable(
                    f"{self._serving.path} cannot be served: {said or f'no keeper within {START_WITHIN_S:.0f} s'}"
                )
            if not said and (said := self._need_child()):
                # Another process may have been first, and serves in a moment.
                until = min(until, time.monotonic() + _ELSE_WITHIN_S)
            self._closing.wait(_LOOK_AGAIN_S)

    def _attached(self) -> Pool:
        serving = self._serving
        pool = attach(serving.pool, f"memory-tier-{serving.path.name}"[:64])
        try:
            segment = segments.open_existing(serving.path)
            segment.close()
            if not serving.coherent and not segment.writes_back:
                raise ConfigError(f"{serving.path} was made for coherent memory; `penstock rm` it for coherent=no")
            if segment.uuid == pool.uuid:
                return pool
        except BaseException:
            pool.close()
            raise
        pool.close()
        raise ConfigError(
            f"a pool named {serving.pool!r} is served already and is not {serving.path}; give the memory tier another "
            "pool="
        )

    def _need_child(self) -> str:
        """Start a child unless one is on its way. Its last words if it ended by itself."""
        with self._changing:
            if self._child is None:
                self._start()
            elif self._child.poll() is not None:
                return self._end_child()
        return ""

    def _start(self) -> None:
        self._child = subprocess.Popen(
            self._serving.command(os.getpid()), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._child.stderr is not None
        self._listener = _Listener(self._child.stderr)
        self._listener.start()

    def _end_child(self) -> str:
        """Have the child stop, if there is one, and wait for it. Returns its last words."""
        child, self._child = self._child, None
        if child is None:
            return ""
        child.terminate()
        try:
            child.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._listener.join(_STOP_WITHIN_S)  # what it started may still have its end of the pipe
        return self._listener.last

    # ---- afterwards

    def _watch(self) -> None:
        """Start a child whenever there is no keeper; the pool comes back to it by itself."""
        pause = _FIRST_PAUSE_S
        while not self._closing.wait(_WATCH_S if self.pool.keeper_alive else pause):
            if self.pool.keeper_alive:
                pause = _FIRST_PAUSE_S
                continue
            with self._changing:
                if self._closing.is_set() or not self._gone():
                    continue
                self.restarts += 1
                log.warning("the keeper of %s is gone; starting another", self._serving.path)
                self._start()
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _gone(self) -> bool:
        """Whether neither a child runs nor anybody else serves the pool. Takes a dead child's place in the table."""
        if self._child is not None:
            if self._child.poll() is None:
                return False
            log.warning("the keeper of %s ended: %s", self._serving.path, self._end_child())
        try:
            Connection(self._serving.pool).close()
        except NoKeeper:
            return True
        return False

    def close(self) -> None:
        """Leave the pool and stop the child; the segment stays. Idempotent."""
        self._closing.set()
        self._watcher.join()
        self.pool.close()
        with self._changing:
            self._end_child()


class _Listener(threading.Thread):
    """Reads what a child logs, so that it never waits, and remembers the last line."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(name="penstock-memory-log", daemon=True)
        self._stream = stream
        self.last = "it said nothing"

    def run(self) -> None:
        with self._stream:
            for line in self._stream:
                self.last = line.decode(errors="replace").strip() or self.last
                log.debug("%s", self.last)
