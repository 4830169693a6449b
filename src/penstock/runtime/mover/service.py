"""The mover's socket: clients' questions, each answered by a thread, and their hanging up seen at once.

The thread in `serve` only reads and accepts. Garbage from one connection ends that connection only, and one that does
not read its answers is hung up on: nobody here waits for a client.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import PenstockError
from penstock.pool.handles import PlacedSpace
from penstock.pool.stage import Stage
from penstock.pool.tier_wire import MAX_KEYS, Arrived, Ended, FetchOf, LocatedAt, LocateOf, Report, Run, questions
from penstock.pool.wire import Error, FrameReader, Json, encode
from penstock.runtime.mover.fetches import Fetcher, FetchOrder, Outcome
from penstock.runtime.mover.places import Places
from penstock.runtime.mover.spaces import as_tiers_know_it
from penstock.types import FetchEnd, Urgency

__all__ = ["Service"]

log = logging.getLogger("penstock.mover")

FETCHES_AT_ONCE = 16
FETCHES_WAITING = 256
"""Fetches beyond those that run; a further one is told BUSY."""
_PREFETCHES_AT_ONCE = 4
PREFETCHES_WAITING = 128
"""They have threads and places of their own: nobody waits for them, so that one may wait long, and then no fetch waits
for it."""
_LOCATES_AT_ONCE = 4
_MAX_CONNECTIONS = 1024
_OTHER_FDS = 256
"""Descriptors that tiers and the pool need beside the connections."""
_MAX_WAIT_S = 3600.0
_MAX_LOCATE_S = 5.0
_HALF = 1 << 63
_MAX_RUNS = 2048
"""In one answer, which has to fit into a socket's buffer: whoever does not read is not waited for."""


class _Guest:
    """One connection. Sends come from the thread that answers; closing and sending exclude each other."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.reader = FrameReader(questions)
        self.busy = False
        """A question is being answered."""
        self.gone = threading.Event()
        self._lock = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Send, or hang up on one who does not read."""
        frame = encode(message)
        with self._lock:
            if self.gone.is_set():
                return
            try:
                if self.socket.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(frame):
                    return
            except OSError:
                pass
            self.gone.set()
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # the serving thread sees the end and closes

    def close(self) -> None:
        with self._lock:
            self.gone.set()
            self.socket.close()


class Service:
    """Answers clients until `stop`. `report` gives what `penstock tiers` shows."""

    def __init__(
        self, path: Path, stage: Stage, places: Places, fetcher: Fetcher, report: Callable[[], dict[str, Any]]
    ) -> None:
        self._stage, self._places, self._fetcher, self._report = stage, places, fetcher, report
        self._listener = _listen(path)
        # Beyond the limit of open files `accept` fails, and the listener would call for it for ever.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(8, min(_MAX_CONNECTIONS, soft - _OTHER_FDS))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, "wake")
        self._guests: set[_Guest] = set()
        self._fetching = ThreadPoolExecutor(FETCHES_AT_ONCE, "penstock-fetch")
        self._prefetching = ThreadPoolExecutor(_PREFETCHES_AT_ONCE, "penstock-prefetch")
        self._asking = ThreadPoolExecutor(_LOCATES_AT_ONCE, "penstock-locate")
        self._reporting = ThreadPoolExecutor(1, "penstock-report")
        self._stopping = False
        self._count_lock = threading.Lock()
        self._running = {False: 0, True: 0}
        """Fetches, and prefetches."""
        ends = (f"ended.{end.name.lower()}" for end in FetchEnd)
        names = ["asked", "located", "refused_connections", "refused_questions", "blocks", "failed", *ends]
        self._counters = dict.fromkeys(names, 0)

    def counters(self) -> dict[str, int]:
        """Fetches by how they ended, blocks they brought, questions answered."""
        with self._count_lock:
            return {**self._counters, "running": sum(self._running.values())}

    # ---- the loop

    def serve(self) -> None:
        """Accept and read until `stop`."""
        while not self._stopping:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._accept()
                elif isinstance(key.data, _Guest):
                    self._read(key.data)
        for guest in list(self._guests):
            self._leave(guest)
        self._listener.close()
        self._selector.close()  # but not `_wake`: somebody may call `stop` again, and must not write to another file

    def stop(self) -> None:
        """Make `serve` return. Safe from any thread."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionAbortedError)):
                log.error("a connection cannot be accepted: %s", error)
            return
        if len(self._guests) >= self._most:
            self._count("refused_connections")
            connection.close()
            return
        connection.setblocking(False)
        guest = _Guest(connection)
        self._guests.add(guest)
        self._selector.register(connection, selectors.EVENT_READ, guest)

    def _read(self, guest: _Guest) -> None:
        try:
            data = guest.socket.recv(1 << 20)
            messages = guest.reader.feed(data) if data else []
        except BlockingIOError:
            return
        except (OSError, PenstockError) as error:
            self._refuse(guest, str(error))
            return
        if not data:
            self._leave(guest)
        for message in messages:
            if guest.busy:
                self._refuse(guest, "a question before the last one was answered")
                return
            guest.busy = True
            self._take(guest, message)

    def _refuse(self, guest: _Guest, why: str) -> None:
        self._count("refused_connections")
        log.warning("a connection is ended: %s", why)
        self._leave(guest)

    def _leave(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._guests.discard(guest)
            self._selector.unregister(guest.socket)
            guest.close()

    # ---- questions

    def _take(self, guest: _Guest, message: Any) -> None:
        if isinstance(message, FetchOf):
            self._take_fetch(guest, message)
        elif isinstance(message, LocateOf):
            self._count("located")
            deadline = time.monotonic() + _seconds(message.wait_s, _MAX_LOCATE_S)
            self._asking.submit(self._guarded, guest, lambda: self._locate(guest, message, deadline))
        elif isinstance(message, Report):
            self._reporting.submit(self._guarded, guest, lambda: Json(self._report()))

    def _take_fetch(self, guest: _Guest, message: FetchOf) -> None:
        self._count("asked")
        prefetch = message.urgency == Urgency.PREFETCH
        most = _PREFETCHES_AT_ONCE + PREFETCHES_WAITING if prefetch else FETCHES_AT_ONCE + FETCHES_WAITING
        with self._count_lock:
            busy = self._running[prefetch] >= most
            self._running[prefetch] += not busy
        if busy:
            self._count("ended.busy")
            self._answer(guest, Ended(0, FetchEnd.BUSY, 0, ""))
            return
        deadline = time.monotonic() + _seconds(message.wait_s, _MAX_WAIT_S)
        threads = self._prefetching if prefetch else self._fetching
        threads.submit(self._guarded, guest, lambda: self._fetch(guest, message, deadline))

    def _guarded(self, guest: _Guest, work: Callable[[], msgspec.Struct]) -> None:
        try:
            answer = work()
        except PenstockError as error:
            self._count("refused_questions")
            answer = Error(str(error))
        except Exception as error:
            # The boundary of a thread: one question that meets a defect must not end the mover for all.
            self._count("failed")
            log.exception("a question failed")
            answer = Error(f"the mover failed at this question ({type(error).__name__}); see its log")
        self._answer(guest, answer)

    def _answer(self, guest: _Guest, answer: msgspec.Struct) -> None:
        guest.busy = False  # before the answer: the next question may follow it at once
        guest.send(answer)

    def _fetch(self, guest: _Guest, message: FetchOf, deadline: float) -> Ended:
        try:
            ended = self._run(guest, message, deadline)
        finally:
            with self._count_lock:
                self._running[message.urgency == Urgency.PREFETCH] -= 1
        self._count_outcome(ended)
        return Ended(ended.n, ended.why, ended.moved, ended.tier)

    def _run(self, guest: _Guest, message: FetchOf, deadline: float) -> Outcome:
        space, keys = self._asked_for(message)
        parent = _keys(message.parent)
        if len(parent) != 1 or len(message.intent) != 5 or not all(-_HALF <= word < _HALF for word in message.intent):
            raise PenstockError("a fetch names one parent, and an intent of five numbers of 64 bits")
        if not 0 <= message.start < len(keys):
            raise PenstockError("a fetch starts at one of its blocks")
        prefetch = message.urgency == Urgency.PREFETCH
        if prefetch and message.start:
            raise PenstockError("a prefetch outlives who asked for it, and would wait for blocks that nobody stores")
        order = FetchOrder(
            space,
            keys,
            np.concatenate([parent, keys[:-1]]),
            deadline,
            Urgency.PREFETCH if prefetch else Urgency.FETCH,
            message.intent,
            message.start,
        )
        return self._fetcher.fetch(
            order, lambda n: guest.send(Arrived(n)), lambda: guest.gone.is_set() and not prefetch
        )

    def _locate(self, guest: _Guest, message: LocateOf, deadline: float) -> LocatedAt:
        space, keys = self._asked_for(message)
        here = self._fetcher.here(space, keys)
        if guest.gone.is_set() or time.monotonic() > deadline:
            return LocatedAt(here, [])  # nobody waits for the rest any more
        where = self._places.where(as_tiers_know_it(space), keys[here:], deadline, frozenset())
        return LocatedAt(here, self._runs(where.tiers, space.block_bytes))

    def _asked_for(self, message: FetchOf | LocateOf) -> tuple[PlacedSpace, npt.NDArray[np.uint64]]:
        """Raises PenstockError for a space or keys that this pool cannot have."""
        space = self._stage.space(message.space) if message.uuid == self._stage.pool.uuid else None
        keys = _keys(message.keys)
        if space is None or not 0 < len(keys) <= MAX_KEYS:
            raise PenstockError("a question about a space or keys that this pool does not have")
        return space, keys

    def _runs(self, where: npt.NDArray[np.int64], block_bytes: int) -> list[Run]:
        """Blocks in the same tier, one after the other, up to the first that is nowhere, and not too many."""
        if (where < 0).any():
            where = where[: int((where < 0).argmax())]
        runs: list[Run] = []
        bounds = [0, *(np.flatnonzero(np.diff(where)) + 1).tolist(), len(where)]
        seconds = 0.0
        for first, stop in itertools.islice(itertools.pairwise(bounds), _MAX_RUNS):
            if stop > first:
                tier = int(where[first])
                seconds += self._places.seconds(tier, (stop - first) * block_bytes)
                runs.append(Run(self._places.tiers[tier].name, stop - first, seconds))
        return runs

    def _count(self, name: str) -> None:
        with self._count_lock:
            self._counters[name] += 1

    def _count_outcome(self, ended: Outcome) -> None:
        with self._count_lock:
            self._counters[f"ended.{ended.why.name.lower()}"] += 1
            self._counters["blocks"] += ended.moved


def _keys(data: bytes) -> npt.NDArray[np.uint64]:
    if len(data) % 16:
        raise PenstockError("keys have 16 bytes each")
    return np.frombuffer(data, np.uint64).reshape(-1, 2).copy()


def _seconds(wait_s: float, most: float) -> float:
    """A wait that a client may ask for: 0 for what is negative or no number."""
    return min(wait_s, most) if wait_s > 0 else 0.0


def _listen(path: Path) -> socket.socket:
    """The socket, private to the user. There is one mover to a keeper, which holds the name's lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(mask)
    listener.listen(_MAX_CONNECTIONS)
    return listener
