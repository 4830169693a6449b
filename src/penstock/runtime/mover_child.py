"""The keeper's side of its mover: starting it, telling it what happens, starting it again when it dies.

Nothing here waits. A keeper without a mover serves its pool as before; only the tiers below are out of reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError
from penstock.pool.tier_wire import tier_socket
from penstock.runtime.mover.feed import FeedWriter, feed_pair
from penstock.runtime.mover.plan import BAD_PLAN, MoverPlan

__all__ = ["MoverChild"]

log = logging.getLogger("penstock.keeper")

PROGRAM = "penstock.runtime.mover"
"""The module that is run as the mover."""
_PR_SET_PDEATHSIG = 1
# A mover that dies is started again after a pause that doubles while it does not live this long.
FIRST_PAUSE_S, LONGEST_PAUSE_S, HEALTHY_S = 0.1, 10.0, 30.0
_libc = ctypes.CDLL(None, use_errno=True)


class MoverChild:
    """One mover after the other for one keeper."""

    def __init__(self, name: str, plan: MoverPlan) -> None:
        self._name = name
        self._plan = plan
        self._process: subprocess.Popen[bytes] | None = None
        self._feed: FeedWriter | None = None
        self._pause_s = FIRST_PAUSE_S
        self._next_start = 0.0
        self._started_s = 0.0
        self.restarts = -1
        """How often it was started again."""

    @property
    def pid(self) -> int:
        """Of the mover that runs; 0 where none does."""
        return 0 if self._process is None else self._process.pid

    def tell(self, events: npt.NDArray[np.void]) -> None:
        """Pass events on (`Keeper.listener`)."""
        if self._feed is not None:
            self._feed.tell(events)

    def gap(self) -> None:
        """The brain was rebuilt: the mover must look at the segment itself."""
        if self._feed is not None:
            self._feed.gap()

    def tend(self) -> None:
        """Start the mover if it does not run and its pause is over. Called every second.

        Raises ConfigError when the first mover says that its plan can never work. What a later one meets is a change
        of its surroundings, which is no reason to end a pool that engines use.
        """
        now = time.monotonic()
        if self._process is not None and (status := self._process.poll()) is not None:
            self._ended(status, now)
        if self._process is None and now >= self._next_start:
            try:
                self._start(now)
            except OSError as error:  # too many processes or open files just now: no reason to end the pool
                self._drop()
                self._wait(now)
                log.error("the mover cannot be started: %s; tried again in %.1f s", error, self._pause_s)
        elif self._feed is not None:
            self._feed.tell_loss()

    def _start(self, now: float) -> None:
        ours, theirs = feed_pair()
        self.restarts += 1
        command = [sys.executable, "-m", PROGRAM, self._name, str(theirs.fileno()), str(self.restarts)]
        self._feed = FeedWriter(ours)
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),), preexec_fn=_dying_with(os.getpid())
            )
        assert self._process.stdin is not None
        with self._process.stdin as plan, contextlib.suppress(BrokenPipeError):
            plan.write(msgspec.json.encode(self._plan) + b"\n")
        self._feed.gap()
        self._started_s = now

    def _ended(self, status: int, now: float) -> None:
        self._drop()
        if status == BAD_PLAN and not self.restarts:
            raise ConfigError("the tiers cannot be used as they were given; the mover's message above says why")
        self._wait(now)
        log.error("the mover ended with %d; it is started again in %.1f s", status, self._pause_s)

    def _wait(self, now: float) -> None:
        """Pause before the next start: longer after each one that did not live long."""
        lived = now - self._started_s > HEALTHY_S
        self._pause_s = FIRST_PAUSE_S if lived else min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._next_start = now + self._pause_s

    def _drop(self) -> None:
        if self._feed is not None:
            self._feed.close()
        self._feed = self._process = None

    def stop(self) -> None:
        """End the mover in an orderly way, or by force where it hangs."""
        process = self._process
        if process is None:
            return
        if self._feed is not None:
            self._feed.close()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._drop()
        with contextlib.suppress(OSError):
            tier_socket(self._name).unlink(missing_ok=True)


def _dying_with(parent: int) -> Callable[[], None]:
    """What a child does between fork and exec. There is then no moment at which the keeper's death goes unnoticed."""

    def ask() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # exec keeps the setting
        if os.getppid() != parent:
            os._exit(1)

    return ask
