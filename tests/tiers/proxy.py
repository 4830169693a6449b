"""A TCP proxy on loopback for tests of what networks do: hold up, flip bits, cut.

It passes on what it is given between a client and a server, in threads of this process. Its faults concern what flows
after they were set, on open connections, too.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading

from tests.support import PATIENCE_S
from tests.tiers.servers import LOOPBACK

__all__ = ["Proxy"]


class Proxy:
    """Listens at `port` and passes on to `target` of this machine."""

    def __init__(self, target: int, seed: int = 0) -> None:
        self.target = target
        self.latency_s = 0.0
        """How long the server's answers are held up."""
        self.flip_one_in = 0
        """One in this many bytes, each way, gets a bit flipped; 0 for none."""
        self.cut_after: int | None = None
        """The server's bytes from now on, of all connections together, until all connections are cut."""
        self.flipped = 0
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._begin(self._accept)

    def close(self) -> None:
        """Cut everything and end the threads."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self._listener.close()
        for each in self._open:
            each.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((LOOPBACK, self.target))
            except OSError:
                near.close()
                continue
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open += [near, far]
            self._begin(self._pass_on, near, far, False)
            self._begin(self._pass_on, far, near, True)

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self._over.wait(self.latency_s):
                    return
                data = self._damaged(data)
                if answers and self.cut_after is not None:
                    data, self.cut_after = data[: self.cut_after], self.cut_after - len(data)
                    sink.sendall(data)
                    if self.cut_after <= 0:
                        self.cut_after = None
                        self._cut()
                        return
                else:
                    sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _damaged(self, data: bytes) -> bytes:
        if not self.flip_one_in:
            return data
        damaged = bytearray(data)
        with self._lock:
            at = int(self._random.expovariate(1 / self.flip_one_in))
            while at < len(damaged):
                damaged[at] ^= 1 << self._random.randrange(8)
                self.flipped += 1
                at += 1 + int(self._random.expovariate(1 / self.flip_one_in))
        return bytes(damaged)

    def _cut(self) -> None:
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
