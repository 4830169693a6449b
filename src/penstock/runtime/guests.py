"""The keeper's guests: one connection each, from hello to death. Garbage from one ends that connection only."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import selectors
import signal
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from penstock.errors import KeeperError, PenstockError
from penstock.pool.wire import (
    PROTOCOL,
    Confirm,
    Error,
    Forget,
    FrameReader,
    Hello,
    Json,
    Names,
    Ok,
    Query,
    Reply,
    Request,
    SpaceIs,
    SpaceOf,
    Welcome,
    encode,
)
from penstock.runtime.keeper import Keeper
from penstock.runtime.report import fsck_report, ls_report, stat_report

__all__ = ["Guest", "Guests"]

log = logging.getLogger("penstock.keeper")

MAX_GUESTS = 1024
# Descriptors of one guest (socket, bell, pidfd), and those that the keeper needs for everything else.
_GUEST_FDS = 3
_OTHER_FDS = 32
# How long `kick` waits for the killed client's exit.
KICK_WAIT_MS = 5000
# How long a client may take from hello to holding its lane's lock; mapping a large segment takes milliseconds.
CONFIRM_WITHIN_S = 30.0


@dataclass(slots=True, eq=False)
class Guest:
    """One connection. `lane` is -1 for those that only ask."""

    socket: socket.socket
    reader: FrameReader = field(default_factory=FrameReader)
    name: str = ""
    pid: int = 0
    lane: int = -1
    bell: int = -1
    pidfd: int = -1
    since_s: float = field(default_factory=time.monotonic)


class Guests:
    """All connections, registered with the server's selector under the Guest as data."""

    def __init__(self, keeper: Keeper, path: Path, keeper_bell: int, selector: selectors.BaseSelector) -> None:
        self._keeper = keeper
        self._path = path
        self._keeper_bell = keeper_bell
        self._selector = selector
        self._guests: set[Guest] = set()
        # Beyond the limit of open files `accept` fails, and the listener would call for it for ever.
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(2, min(MAX_GUESTS, (soft - _OTHER_FDS) // _GUEST_FDS))
        self.refused = 0
        """Connections ended because they did not speak the protocol."""
        self.failed = 0
        """Requests that met an error nobody foresaw."""

    # ---- traffic

    def accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if not isinstance(error, (BlockingIOError, ConnectionAbortedError)):
                log.error("a connection cannot be accepted: %s", error)
            return
        if len(self._guests) >= self._most:
            log.warning("a connection is refused: %d are open; raise the limit of open files", self._most)
            connection.close()
            return
        # A guest that does not read its answers must not hold the keeper up: sends fail instead of waiting.
        connection.setblocking(False)
        guest = Guest(connection, pid=_peer_pid(connection))
        self._guests.add(guest)
        self._selector.register(connection, selectors.EVENT_READ, guest)

    def serve(self, guest: Guest) -> None:
        """Answer what a connection sent; end it when it is closed or speaks nonsense."""
        if guest not in self._guests:
            return
        try:
            data = guest.socket.recv(1 << 16)
            if not data:
                self._leave(guest)
                return
            for request in guest.reader.feed(data):
                self._answer(guest, request)
        except BlockingIOError:
            return
        except (OSError, KeeperError) as error:
            self.refused += not isinstance(error, OSError)
            log.warning("connection of pid %d ended: %s", guest.pid, error)
            self._leave(guest)

    def _answer(self, guest: Guest, request: Request) -> None:
        fds: list[int] = []
        try:
            reply = self._reply(guest, request)
            frame = encode(reply)
            if isinstance(reply, Welcome):
                fds = [self._keeper_bell, guest.bell]
        except PenstockError as error:
            frame = encode(Error(str(error)))
        except Exception as error:  # one guest's question must not end the service of all others
            self.failed += 1
            log.exception("a request of pid %d failed", guest.pid)
            frame = encode(Error(f"the keeper failed at this request ({type(error).__name__}); see its log"))
        try:
            sent = socket.send_fds(guest.socket, [frame], fds) if fds else guest.socket.send(frame)
        except BlockingIOError:
            sent = 0
        if sent != len(frame):
            raise OSError("it does not read its answers")

    def _reply(self, guest: Guest, request: Request) -> Reply:
        if isinstance(request, Hello):
            return self._hello(guest, request)
        if isinstance(request, Query):
            return self._query(request)
        if guest.lane < 0:
            raise KeeperError("say hello first")
        if isinstance(request, Confirm):
            return self._confirm(guest)
        if isinstance(request, Names):
            self._keeper.learn_names(request.names)
            return Ok()
        if isinstance(request, Forget):
            return Json({"left": self._keeper.forget(request.digest, request.keys)})
        return self._space(request)

    def _hello(self, guest: Guest, hello: Hello) -> Welcome:
        if hello.protocol != PROTOCOL:
            raise KeeperError(
                f"protocol {hello.protocol}; this keeper speaks {PROTOCOL}: run the same Penstock on both sides"
            )
        if guest.lane >= 0:
            raise KeeperError("this connection has a lane already")
        segment = self._keeper.authority.segment
        known = hello.uuid == segment.uuid and self._keeper.lane_is(hello.lane, hello.epoch)
        opened = (hello.lane, hello.epoch) if known else self._keeper.open_lane()
        if opened is None:
            raise KeeperError(f"all {segment.geometry.n_lanes} lanes are taken; end a client, or recreate the pool")
        guest.lane, guest.name = opened[0], hello.name[:64]
        guest.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        guest.pidfd = _pidfd(guest.pid)
        return Welcome(str(self._path), segment.uuid, *opened, True)

    def _confirm(self, guest: Guest) -> Ok:
        if not self._keeper.lane_alive(guest.lane):
            raise KeeperError(f"lane {guest.lane} is not locked")
        self._keeper.confirm_lane(guest.lane)
        return Ok()

    def _space(self, request: SpaceOf) -> SpaceIs:
        sizes = (request.block_bytes, request.block_tokens, request.n_segments, request.segment_bytes)
        row = self._keeper.space(request.digest, request.root, sizes, request.label)
        return SpaceIs(row.id, row.slot_class)

    # ---- life

    def ring(self, lanes: list[int]) -> None:
        """Wake the clients of these lanes."""
        if lanes:
            for guest in self._guests:
                if guest.lane in lanes:
                    # The client has this bell too, and may have filled it up: then it rings.
                    with contextlib.suppress(OSError):
                        os.eventfd_write(guest.bell, 1)

    def dismiss_silent(self) -> None:
        """End connections that were given a lane and never said that they hold its lock."""
        now = time.monotonic()
        for guest in list(self._guests):
            if guest.lane in self._keeper.opening and now - guest.since_s > CONFIRM_WITHIN_S:
                log.warning("pid %d took lane %d and never confirmed it", guest.pid, guest.lane)
                self._leave(guest)

    def _leave(self, guest: Guest) -> None:
        """A connection ended. Whether its client died, only the lane's lock can say; if so, all is taken back."""
        self._guests.discard(guest)
        self._selector.unregister(guest.socket)
        guest.socket.close()
        for fd in (guest.bell, guest.pidfd):
            if fd >= 0:
                os.close(fd)
        if guest.lane >= 0:
            self._keeper.confirm_lane(guest.lane)
            self._keeper.reclaim_dead()

    def close(self) -> None:
        for guest in list(self._guests):
            self._guests.discard(guest)
            guest.socket.close()
            for fd in (guest.bell, guest.pidfd):
                if fd >= 0:
                    os.close(fd)

    # ---- questions

    def _query(self, query: Query) -> Json:
        if query.what == "kick":
            return Json(self._kick(query.argument))
        clients = [
            {"lane": guest.lane, "pid": guest.pid, "name": guest.name} for guest in self._guests if guest.lane >= 0
        ]
        if query.what == "stat":
            return Json(
                stat_report(self._keeper, clients)
                | {
                    "connections_refused": self.refused,
                    "requests_failed": self.failed,
                }
            )
        if query.what == "ls":
            return Json(ls_report(self._keeper))
        if query.what == "fsck":
            return Json(fsck_report(self._keeper, bytes_too=query.argument != 0))
        raise KeeperError(f"unknown question {query.what!r}; ask stat, ls, fsck or kick")

    def _kick(self, lane: int) -> dict[str, object]:
        """Kill the client of a lane, wait for its end, take everything back."""
        guest = next((guest for guest in self._guests if guest.lane == lane), None)
        if guest is None:
            raise KeeperError(f"no connected client has lane {lane}; see `penstock stat`")
        if guest.pidfd < 0 or guest.pid == os.getpid():
            raise KeeperError(f"the client of lane {lane} cannot be signalled from here; end it by hand")
        signal.pidfd_send_signal(guest.pidfd, signal.SIGKILL)
        poll = select.poll()
        poll.register(guest.pidfd, select.POLLIN)
        exited = bool(poll.poll(KICK_WAIT_MS))
        reclaimed = self._keeper.reclaim_dead()
        return {"pid": guest.pid, "name": guest.name, "exited": exited, "reclaimed": reclaimed}


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[0])


def _pidfd(pid: int) -> int:
    """A descriptor for the process, so that a later process of the same number is never hit; -1 if it cannot be had."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
