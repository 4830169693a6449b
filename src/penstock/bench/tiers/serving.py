"""A whole pool with tiers, as processes, for benches that need one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from penstock.errors import KeeperError, NoKeeper
from penstock.identity import KeyChain
from penstock.pool import segment as segments
from penstock.pool.below import TierLine
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.link import SocketLink
from penstock.pool.wire import Forget
from penstock.runtime.opening import open_pool

__all__ = ["Served", "forget", "served", "wait_written"]

_READY_S = 120.0
_LOOK_S = 0.002


class Served:
    """A pool of this name that can be started and stopped."""

    def __init__(self, name: str, size: str, tiers: Sequence[str], log: Any) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "penstock", "serve", "--name", name, "--size", size]
        for tier in tiers:
            self._command += ["--tier", tier]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it without waiting."""
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)

    def open(self) -> Pool:
        """A client, as soon as the keeper serves. Raises NoKeeper if it does not."""
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                return open_pool(self.name, client="bench")
            except NoKeeper:
                if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                    raise
                time.sleep(_LOOK_S)

    def report(self) -> dict[str, Any]:
        """What `penstock tiers` shows, as soon as the mover answers. Raises KeeperError if it does not."""
        line, deadline = TierLine(self.name), time.monotonic() + _READY_S
        with contextlib.closing(line):
            while True:
                try:
                    return line.report(_READY_S)
                except KeeperError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_LOOK_S)

    def stop(self) -> None:
        """End it; the segment stays."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Delete the segment."""
        path = segments.default_path(self.name)
        path.unlink(missing_ok=True)


@contextmanager
def served(size: str, tiers: Sequence[str]) -> Iterator[Served]:
    """A pool that runs; nothing of it is left at the end."""
    name = f"bench-tiers-{os.getpid()}"
    with tempfile.TemporaryFile() as log:
        pool = Served(name, size, tiers, log)
        try:
            pool.start()
            yield pool
        finally:
            pool.stop()
            pool.remove()
            segments.lock_path(segments.default_path(name)).unlink(missing_ok=True)


def wait_written(pool: Served, blocks: int) -> None:
    """Wait until the first tier has this many blocks. Raises RuntimeError if it does not get them."""
    deadline = time.monotonic() + _READY_S
    while (pool.report()["tiers"][0]["blocks"] or 0) < blocks:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the tier did not get {blocks} blocks: {pool.report()}")
        time.sleep(0.02)


def forget(pool: Pool, handle: SpaceHandle, keys: KeyChain) -> None:
    """Have a chain's blocks leave the pool; what is below it stays. Raises RuntimeError if they do not leave."""
    link, deadline = pool._link, time.monotonic() + _READY_S
    if not isinstance(link, SocketLink):
        raise TypeError("blocks are forgotten by a keeper of its own process only")
    while link.forget(Forget(handle.digest, keys.array.tobytes())):
        if time.monotonic() > deadline:
            raise RuntimeError("blocks do not leave the pool")
        time.sleep(_LOOK_S)
