"""A client's line to the tiers below its pool: where blocks are, and bringing them.

Covers the connection to the mover and what the client sees of a fetch. The pool works without it: no mover, or one that
is slow, stopped or dies, is the same answer here: nothing is below. Every wait ends at the caller's deadline.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import KeeperError
from penstock.pool.tier_wire import (
    MAX_KEYS,
    Arrived,
    Ended,
    FetchOf,
    LocatedAt,
    LocateOf,
    Report,
    Run,
    answers,
    tier_socket,
)
from penstock.pool.wire import Error, FrameReader, Json, encode
from penstock.types import FetchEnd, Urgency

__all__ = ["Below", "Fetch", "Run", "TierLine"]

# Where the mover's socket was not found, it is not looked for again for this long: a match must not cost a system call.
_ABSENT_FOR_S = 0.5
_MAX_IDLE = 4
# Connecting and sending a question, where the mover is alive but busy.
_SEND_S = 0.2
# A fetch ends itself at its deadline; this much later the client stops waiting for it to say so.
_GRACE_S = 0.05
# The longest wait that is one; sockets take no larger numbers, and infinity least of all.
_MAX_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Below:
    """The whole story of a chain: how much of it is in the pool, and what could be fetched from where, by when."""

    here: int
    """Blocks, from the first, that are in the pool now."""
    runs: tuple[Run, ...] = ()
    """What follows them, tier by tier."""
    why: FetchEnd = FetchEnd.DONE
    """NO_TIERS or DEADLINE where nobody could be asked; DONE where `runs` is all there is."""

    @property
    def n_blocks(self) -> int:
        """Blocks below the pool that continue what is in it."""
        return sum(run.n_blocks for run in self.runs)

    @property
    def seconds(self) -> float:
        """By when, from now, all of them could be in the pool."""
        return self.runs[-1].seconds if self.runs else 0.0


class TierLine:
    """Connections to the mover of one pool, used by one question each. Thread-safe; never raises, never hangs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._absent_until = 0.0
        self._closed = False
        self.present = False
        """Whether a mover answered when it was last asked for."""

    def locate(self, uuid: bytes, space: int, keys: npt.NDArray[np.uint64], wait_s: float) -> Below:
        """Ask where blocks are; waits at most about `wait_s`."""
        wait_s = _bounded(wait_s)
        deadline = time.monotonic() + wait_s
        try:
            answer = self._ask(LocateOf(uuid, space, keys[:MAX_KEYS].tobytes(), wait_s), deadline + _GRACE_S)
        except (TimeoutError, BlockingIOError):
            return Below(0, why=FetchEnd.DEADLINE)
        except (OSError, KeeperError):
            return Below(0, why=FetchEnd.NO_TIERS)
        if not isinstance(answer, LocatedAt):
            return Below(0, why=FetchEnd.NO_TIERS)
        return Below(answer.here, tuple(answer.runs))

    def fetch(
        self,
        uuid: bytes,
        space: int,
        keys: npt.NDArray[np.uint64],
        parent: bytes,
        wait_s: float,
        urgency: Urgency,
        intent: list[int],
        start: int = 0,
    ) -> Fetch:
        """Start bringing blocks. Returns at once."""
        wait_s = _bounded(wait_s)
        deadline = time.monotonic() + wait_s
        question = FetchOf(uuid, space, keys[:MAX_KEYS].tobytes(), parent, wait_s, urgency, intent, start)
        try:
            connection = self._send(question, min(deadline, time.monotonic() + _SEND_S))
        except (TimeoutError, BlockingIOError):
            return Fetch(self, None, deadline, FetchEnd.BUSY)
        except OSError:
            return Fetch(self, None, deadline, FetchEnd.NO_TIERS)
        return Fetch(self, connection, deadline, FetchEnd.DEADLINE)

    def expected(self) -> bool:
        """Whether there is, or was, a mover's socket."""
        return tier_socket(self.name).exists()

    def look(self) -> bool:
        """Whether there is a mover now; a system call or two."""
        try:
            self.keep(self._connect(time.monotonic() + _SEND_S))
        except OSError:
            return False
        return True

    def report(self, wait_s: float) -> dict[str, Any]:
        """What `penstock tiers` shows. Raises KeeperError where no mover answers."""
        try:
            answer = self._ask(Report(), time.monotonic() + wait_s)
        except OSError as error:
            raise KeeperError(
                f"pool {self.name!r} has no tiers, or what moves their blocks is not running; "
                "`penstock serve --tier ...` starts it"
            ) from error
        if not isinstance(answer, Json):
            raise KeeperError(f"unexpected answer {type(answer).__name__}")
        return answer.body

    def close(self) -> None:
        """End the idle connections. Fetches that run keep theirs."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def forked(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._lock = threading.Lock()
        self.close()

    # ---- connections

    def _ask(self, question: msgspec.Struct, deadline: float) -> Any:
        connection = self._send(question, deadline)
        try:
            answer = _Answers(connection).next(deadline)
        except BaseException:
            connection.close()  # an answer that comes later would be taken for the next question's
            raise
        self.keep(connection)
        if isinstance(answer, Error):
            raise KeeperError(answer.text)
        return answer

    def _send(self, question: msgspec.Struct, deadline: float) -> socket.socket:
        """A connection on which the question was asked. Raises OSError, TimeoutError among them."""
        frame = encode(question)
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            # The mover may have gone meanwhile; then a fresh connection finds the next one.
            with contextlib.suppress(OSError):
                return _sent(kept, frame, deadline)
            kept.close()
        return _sent(self._connect(deadline), frame, deadline)

    def _connect(self, deadline: float) -> socket.socket:
        now = time.monotonic()
        if now < self._absent_until or self._closed:
            raise ConnectionRefusedError("no mover")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(max(0.001, deadline - now))
            connection.connect(os.fspath(tier_socket(self.name)))
        except OSError as error:
            connection.close()
            if not isinstance(error, (TimeoutError, BlockingIOError)):  # more who wait than may: it is there
                self._absent_until, self.present = now + _ABSENT_FOR_S, False
            raise
        self.present = True
        return connection

    def keep(self, connection: socket.socket) -> None:
        """A connection that nothing is outstanding on."""
        with self._lock:
            if len(self._idle) < _MAX_IDLE and not self._closed:
                self._idle.append(connection)
                return
        connection.close()


class Fetch:
    """Blocks on their way into the pool. `cancel` it, or leave its `with` block, when they are no longer wanted.

    For one thread at a time. What arrived is found by `Pool.match`, and may be evicted again like any block.
    """

    def __init__(self, line: TierLine, connection: socket.socket | None, deadline: float, why: FetchEnd) -> None:
        self._line = line
        self._connection = connection
        self._answers = _Answers(connection) if connection is not None else None
        self._deadline = deadline
        self.arrived = 0
        """Blocks, from the first that was asked for, that are in the pool as far as this object knows."""
        self.moved = 0
        """Blocks that this fetch brought; known when it ended."""
        self.tier = ""
        """The tier that something went wrong with."""
        self.why: FetchEnd = why if connection is None else FetchEnd.DONE
        """Why it ended; DONE while it runs."""

    @property
    def done(self) -> bool:
        """Whether it ended, however it did."""
        return self._connection is None

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is news (for `select`); -1 when it ended."""
        return -1 if self._connection is None else self._connection.fileno()

    def poll(self) -> bool:
        """Take in all there is to hear, without waiting. True when it ended."""
        while not self.done and self._listen(0.0):
            pass
        return self.done

    def wait(self, timeout_s: float | None = None) -> FetchEnd:
        """Wait until it ends: at its deadline at the latest, or after `timeout_s` (then `done` is False)."""
        limit = self._deadline + _GRACE_S
        until = limit if timeout_s is None else min(limit, time.monotonic() + _bounded(timeout_s))
        while not self.done:
            left = until - time.monotonic()
            if not self._listen(max(0.0, left)) and left <= 0:
                if until >= limit:
                    self._end(FetchEnd.DEADLINE)
                break
        return self.why

    def cancel(self) -> None:
        """Stop it; what is on its way is given up. Idempotent."""
        self._end(FetchEnd.CANCELLED)

    def _listen(self, timeout_s: float) -> bool:
        """Take in one answer; False where none came in time."""
        if self._answers is None:
            return False
        try:
            answer = self._answers.next(time.monotonic() + timeout_s)
        except (TimeoutError, BlockingIOError):
            return False
        except (OSError, KeeperError):
            self._end(FetchEnd.NO_TIERS)
            return True
        if isinstance(answer, Arrived):
            self.arrived = answer.n
        elif isinstance(answer, Ended):
            self._ended(answer)
        else:
            self._end(FetchEnd.NO_TIERS)
        return True

    def _ended(self, answer: Ended) -> None:
        self.arrived, self.moved, self.tier = answer.n, answer.moved, answer.tier
        self.why = FetchEnd(answer.why)
        connection, self._connection, self._answers = self._connection, None, None
        if connection is not None:
            self._line.keep(connection)

    def _end(self, why: FetchEnd) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = self._answers = None
            self.why = why

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.cancel()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.cancel()

    def __repr__(self) -> str:
        return f"<Fetch, {self.arrived} arrived, {self.why.name if self.done else 'running'}>"


class _Answers:
    """Answers from one connection, one at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader(answers)
        self._ready: list[Any] = []

    def next(self, deadline: float) -> Any:
        """The next answer. Raises TimeoutError or BlockingIOError past `deadline`, ConnectionResetError at its end."""
        while not self._ready:
            left = deadline - time.monotonic()
            self._connection.settimeout(max(0.0, left))
            data = self._connection.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the mover hung up")
            self._ready = self._reader.feed(data)
        return self._ready.pop(0)


def _bounded(wait_s: float) -> float:
    """A wait as it is meant: 0 for what is negative or no number."""
    return min(wait_s, _MAX_WAIT_S) if wait_s > 0 else 0.0


def _sent(connection: socket.socket, frame: bytes, deadline: float) -> socket.socket:
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.sendall(frame)
    except OSError:
        connection.close()
        raise
    return connection
