"""A client's line to its keeper: a bell each way and rare questions. Nothing of it is on the data path.

`Link` is what the client needs; `SocketLink` is the real one. An embedded pool has its own (`runtime/embedded.py`).
"""

from __future__ import annotations

import logging
import os
import select
import threading
from typing import Protocol

from penstock.errors import FormatMismatch, KeeperError, NoKeeper
from penstock.pool.attachment import LaneGrant
from penstock.pool.wire import (
    PROTOCOL,
    Confirm,
    Connection,
    Forget,
    Hello,
    Json,
    Names,
    Reply,
    Request,
    SpaceIs,
    SpaceOf,
    Welcome,
)

__all__ = ["Link", "SocketLink"]

log = logging.getLogger("penstock.client")

# Names that wait to be told; further ones are shown as digests.
_MAX_UNTOLD = 1000


class Link(Protocol):
    """What a client needs of its keeper."""

    alive: bool

    def ring(self) -> None:
        """Wake the keeper. Never blocks."""

    def wait(self, timeout_s: float) -> None:
        """Wait until the keeper rings back, at most `timeout_s`. May return early."""

    def space(self, request: SpaceOf) -> SpaceIs:
        """Register a space. Raises KeeperError or NoKeeper."""

    def names(self, request: Names) -> None:
        """Tell what digests stand for, soon; lost without a keeper. Never blocks."""

    def close(self) -> None: ...

    def abandon(self) -> None:
        """In a forked child: close the descriptors, take no lock, say nothing."""


class SocketLink:
    """The control socket and two eventfds. Questions are asked under a lock, one at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = False
        self._asking = threading.Lock()
        # Bells are used under this lock: a closed descriptor's number may be another file's a moment later.
        self._bells = threading.RLock()
        self._untold: dict[int, str] = {}
        self.errands = -1
        """Eventfd of the client's background thread, which tells the keeper names, so that no engine waits for it."""
        self._connection: Connection | None = None
        self._bell = self._own_bell = -1

    def connect(self, client_name: str, held: LaneGrant | None = None, uuid: bytes = b"") -> Welcome:
        """Say hello, for a new lane or for one that is held since before the keeper started.

        Raises NoKeeper, KeeperError (refused: e.g. all lanes taken, or the lane is not this client's any more).
        """
        connection = Connection(self.name)
        try:
            hello = Hello(PROTOCOL, client_name, uuid=uuid)
            if held is not None:
                hello = Hello(PROTOCOL, client_name, held.lane, held.epoch, uuid)
            reply, fds = connection.ask(hello, n_fds=2)
            if not isinstance(reply, Welcome) or len(fds) != 2:
                raise FormatMismatch("the keeper speaks another version; run the same Penstock on both sides")
        except BaseException:
            connection.close()
            raise
        self._drop()
        self._connection = connection
        with self._bells:
            self._bell, self._own_bell = fds
        return reply

    def confirm(self) -> None:
        """Tell the keeper that the lane's lock is held; from here on the client counts as alive."""
        self._ask(Confirm())
        self.alive = True

    def _ask(self, request: Request) -> Reply:
        with self._asking:
            if self._connection is None:
                raise NoKeeper(f"no keeper serves pool {self.name!r} at the moment")
            return self._connection.ask(request)[0]

    def space(self, request: SpaceOf) -> SpaceIs:
        reply = self._ask(request)
        if not isinstance(reply, SpaceIs):
            raise KeeperError(f"unexpected answer {type(reply).__name__} to a space")
        return reply

    def names(self, request: Names) -> None:
        if len(self._untold) < _MAX_UNTOLD:
            self._untold |= request.names
            self.send_errand()

    def forget(self, request: Forget) -> int:
        """Have blocks evicted. Returns how many are still there, because somebody leases them or what continues them.

        Raises KeeperError or NoKeeper.
        """
        reply = self._ask(request)
        if not isinstance(reply, Json):
            raise KeeperError(f"unexpected answer {type(reply).__name__} to blocks to forget")
        return int(reply.body["left"])

    def send_errand(self) -> None:
        """Wake the background thread, if it still runs."""
        with self._bells:
            if self.errands >= 0:
                os.eventfd_write(self.errands, 1)

    def tell_names(self) -> None:
        """Tell the keeper what `names` was given, and wait for its answers."""
        while self._untold and self.alive:
            digest, name = self._untold.popitem()
            try:
                self._ask(Names({digest: name}))
            except KeeperError as error:
                log.debug("names not told: %s", error)

    def ring(self) -> None:
        with self._bells:
            if self._bell < 0:
                return
            try:
                os.eventfd_write(self._bell, 1)
            except OSError as error:  # its counter is full: it rings
                log.debug("bell not rung: %s", error)

    def wait(self, timeout_s: float) -> None:
        with self._bells:
            if self._own_bell < 0:
                return
            bell = os.dup(self._own_bell)
        try:
            poll = select.poll()
            poll.register(bell, select.POLLIN)
            if poll.poll(max(0, int(timeout_s * 1000 + 0.999))):
                os.eventfd_read(bell)
        except BlockingIOError:
            pass  # another thread took the ring; both look again
        finally:
            os.close(bell)

    def hung_up(self, timeout_s: float | None, wake_fd: int) -> bool:
        """Wait until the keeper's end closes (True), or `wake_fd` becomes readable or the time is over (False)."""
        connection = self._connection
        number = -1 if connection is None else connection.socket.fileno()
        gone = number < 0
        if not gone:
            poll = select.poll()
            poll.register(number, select.POLLRDHUP)
            poll.register(wake_fd, select.POLLIN)
            ready = poll.poll(None if timeout_s is None else max(1, int(timeout_s * 1000)))
            gone = any(fd == number for fd, _ in ready)
        if gone:
            self.alive = False
        return gone

    def _drop(self) -> None:
        with self._asking:
            self._close_all()

    def _close_all(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        with self._bells:
            for fd in (self._bell, self._own_bell):
                if fd >= 0:
                    os.close(fd)
            self._bell = self._own_bell = -1

    def close(self) -> None:
        self.alive = False
        if (connection := self._connection) is not None:
            connection.hang_up()  # whoever waits for an answer gives up, and does not hold this up
        self._drop()

    def end_errands(self) -> None:
        """The background thread ends."""
        with self._bells:
            errands, self.errands = self.errands, -1
            if errands >= 0:
                os.close(errands)

    def abandon(self) -> None:
        self.alive = False
        self._asking, self._bells = threading.Lock(), threading.RLock()
        self._close_all()
        self.end_errands()
