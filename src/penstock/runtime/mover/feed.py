"""What happens in the pool, told by the keeper to the mover: batches of (kind, unit) over a socket pair.

The keeper never waits: what does not fit into the socket is dropped and said to be missing by the next batch that fits.
The mover then looks at the segment's records again, which are the truth.
"""

from __future__ import annotations

import contextlib
import select
import socket

import numpy as np
import numpy.typing as npt

from penstock.types import EventKind

__all__ = ["GAP", "FeedReader", "FeedWriter", "feed_dtype", "feed_pair"]

feed_dtype = np.dtype([("kind", "<u4"), ("unit", "<u4")])
"""One event: an `EventKind`, or GAP."""

GAP = 0
"""Events before this row are missing."""

_MOST = 8192
BUFFER_BYTES = 4 << 20
_TOLD = np.array([EventKind.COMMITTED, EventKind.TOUCHED, EventKind.EVICTED, EventKind.KEPT], np.uint32)


def feed_pair() -> tuple[socket.socket, socket.socket]:
    """The keeper's end and the mover's; packets keep their bounds, and the end of one is seen at the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end, option in ((ours, socket.SO_SNDBUF), (theirs, socket.SO_RCVBUF)):
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    ours.setblocking(False)
    return ours, theirs


class FeedWriter:
    """The keeper's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._gap = True
        self.lost = 0
        """Events that found no room."""

    def tell(self, events: npt.NDArray[np.void]) -> None:
        """Pass on what happened to blocks in a batch ([n] of event_dtype). Never waits, never raises."""
        events = events[np.isin(events["kind"], _TOLD)]
        for first in range(0, len(events), _MOST):
            part = events[first : first + _MOST]
            rows = np.zeros(len(part) + self._gap, feed_dtype)
            rows["kind"][self._gap :], rows["unit"][self._gap :] = part["kind"], part["unit"]
            self._send(rows, len(part))

    def gap(self) -> None:
        """Say that the mover has to look at everything again."""
        self._gap = True
        self.tell_loss()

    def tell_loss(self) -> None:
        """If events were lost, say so, now that there may be room: no other event may follow for long."""
        if self._gap:
            self._send(np.zeros(1, feed_dtype), 0)

    def _send(self, rows: npt.NDArray[np.void], n: int) -> None:
        try:
            self._connection.send(rows.tobytes())
            self._gap = False
        except OSError:  # full, or the mover is gone: the next one looks at everything anyway
            self._gap = True
            self.lost += n

    def close(self) -> None:
        """The mover sees the end, and ends."""
        self._connection.close()


class FeedReader:
    """The mover's end."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to take, or the time is over."""
        self._poll.poll(max(1, int(1000 * timeout_s)))

    def take(self) -> npt.NDArray[np.void] | None:
        """Everything that was told since the last call, [n] of feed_dtype; None when the keeper is gone."""
        parts: list[bytes] = []
        while len(parts) < 64:
            try:
                data = self._connection.recv(_MOST * 16)
            except BlockingIOError:
                break
            if not data:
                return None
            parts.append(data)
        return np.frombuffer(b"".join(parts), feed_dtype)
