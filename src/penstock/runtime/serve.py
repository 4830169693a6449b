"""The keeper's process: bells, control socket, pre-touching, signals, and the loop that puts them around `Keeper.step`.

One thread. It sleeps in `select` until a client rings, a socket speaks, the pre-toucher reports, or a second is over
(when it looks for clients that died without closing their sockets).

Loading the kernels takes a second, for the mover as for the keeper. So the keeper's are imported in here, once the
mover was started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.errors import ConfigError, KeeperRunning
from penstock.pool import segment as segments
from penstock.pool.layout import Geometry
from penstock.pool.locks import KEEPER_BYTE, ByteLock
from penstock.pool.wire import socket_path
from penstock.runtime.latency import take_short_slices
from penstock.runtime.mover.plan import MoverPlan
from penstock.runtime.mover_child import MoverChild

if TYPE_CHECKING:
    from penstock.runtime.guests import Guests
    from penstock.runtime.keeper import Keeper

__all__ = ["Server"]

log = logging.getLogger("penstock.keeper")

# How often the keeper looks for dead clients when nothing wakes it.
TICK_S = 1.0
# While commits come in, and this long after, it looks every NAP_S instead of sleeping: to wake it for each batch costs
# a writer tens of microseconds, an eighth of what copying a batch of 4 MiB takes. Idle, it sleeps.
LINGER_S = 0.001
NAP_S = 0.0001
# How long hit reports may wait while blocks are read: a lane's ring holds 4096 of them.
HITS_S = 0.002


class Server:
    """A keeper with its socket. `run` serves until `stop` is called or SIGINT or SIGTERM arrives.

    Raises KeeperRunning if one serves this name or segment already, and SegmentError, NoSpaceLeft or ConfigError for a
    segment that cannot be used.
    """

    def __init__(
        self, name: str, path: Path, geometry: Geometry | None, *, policy: str = "lru", tiers: MoverPlan | None = None,
        coherent: bool = True,
    ) -> None:  # fmt: skip
        """Open the segment at `path`, or create it with `geometry` (None: it must be there). `tiers` lie below it.

        Not `coherent`: other hosts map the segment and see this host's stores only when they are written back.
        """
        self.name = segments.check_name(name)
        self.path = path
        self._stopping = False
        self._failure: ConfigError | None = None
        self.mover = None if tiers is None else MoverChild(name, tiers)
        with contextlib.ExitStack() as undo:
            # One lock keeps two keepers off one segment, the other off one name; neither file is ever unlinked.
            self._locks = _lock(segments.lock_path(path), f"a keeper serves {path} already")
            undo.callback(self._locks.close)
            socket_file = socket_path(name, create=True)
            self._name_lock = _lock(
                socket_file.with_suffix(".lock"), f"a keeper named {name!r} runs already; choose a --name"
            )
            undo.callback(self._name_lock.close)
            if self.mover is not None:
                # It takes as long to start as the keeper does, beside it, and waits for it.
                undo.callback(self.mover.stop)
                self.mover.tend()
            self._open(geometry, policy, socket_file, coherent)
            undo.pop_all()

    def _open(self, geometry: Geometry | None, policy: str, socket_file: Path, coherent: bool) -> None:
        from penstock.pool.coherence import need_instructions
        from penstock.runtime.guests import Guests
        from penstock.runtime.keeper import Keeper

        if segments.exists(self.path) or geometry is None:
            self.segment = segments.open_existing(self.path)
        else:
            if not coherent:
                need_instructions()
            self.segment = segments.create(self.path, geometry, writes_back=not coherent)
        if not coherent and not self.segment.writes_back:
            self.segment.close()
            raise ConfigError(f"{self.path} was made for coherent memory; `penstock rm` it first")
        self.keeper: Keeper = Keeper(self.segment, self._locks, policy=policy)
        self.keeper.authority.sign(os.getpid())
        if self.mover is not None:
            self.keeper.tell, self.keeper.tell_gap = self.mover.tell, self.mover.gap
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ, "bell")
        self._listener = _listen(socket_file)
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self.guests: Guests = Guests(self.keeper, self.path, self._bell, self._selector)
        self._toucher_rest = b""
        self._toucher = self._start_toucher()
        self._next_tick = self._linger_until = 0.0

    # ---- the loop

    def run(self) -> None:
        """Serve until stopped, then leave the segment in order for the next keeper.

        Raises ConfigError, after that, where the tiers turn out to be impossible.
        """
        take_short_slices()
        with _signals(self.stop):
            while not self._stopping:
                self._turn()
        self.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Make `run` return after its present turn. Safe in a signal handler and from another thread."""
        self._stopping = True
        os.eventfd_write(self._bell, 1)

    def _turn(self) -> None:
        self.guests.ring(self.keeper.step())
        asleep, timeout_s = self._rest()
        ready = self._selector.select(timeout_s)
        if asleep:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)
            self.keeper.announce_awake()
        for key, _ in ready:
            if key.data == "listener":
                self.guests.accept(self._listener)
            elif key.data == "toucher":
                self._read_toucher()
            elif key.data != "bell":
                self.guests.serve(key.data)
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + TICK_S
            self.keeper.reclaim_dead()
            self.guests.dismiss_silent()
            self._tend_mover()

    def _tend_mover(self) -> None:
        if self.mover is None:
            return
        try:
            self.mover.tend()
        except ConfigError as error:
            self._failure = error
            self._stopping = True

    def _rest(self) -> tuple[bool, float]:
        """After a step: whether the keeper has announced its sleep, and how long `select` may take."""
        now = time.monotonic()
        if self.keeper.took_commits:
            self._linger_until = now + LINGER_S
        if now < self._linger_until:
            time.sleep(NAP_S)
            return False, 0.0
        if not self.keeper.announce_sleep():
            return False, 0.0
        until_tick = max(0.0, self._next_tick - now)
        return True, min(until_tick, HITS_S) if self.keeper.has_hits() else until_tick

    def close(self) -> None:
        """Stop serving; the segment stays. Idempotent."""
        if self.mover is not None:
            self.mover.stop()
        if self._toucher is not None:
            self._toucher.kill()
            self._toucher.wait()
            self._end_toucher()
        self.keeper.stop()
        self.guests.close()
        self._listener.close()
        self._selector.close()
        os.close(self._bell)
        self._locks.close()
        self._name_lock.close()
        log.info("stopped; the pool's memory stays at %s (`penstock rm` deletes it)", self.path)

    # ---- memory

    def _start_toucher(self) -> subprocess.Popen[bytes] | None:
        geometry = self.segment.geometry
        touched = self.keeper.authority.touched_bytes
        if touched >= geometry.n_slabs * geometry.slab_bytes:
            return None
        command = [sys.executable, "-m", "penstock.pool.pretouch", str(self.path), str(geometry.data_offset + touched)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, "toucher")
        return process

    def _read_toucher(self) -> None:
        if self._toucher is None or self._toucher.stdout is None:
            return
        data = os.read(self._toucher.stdout.fileno(), 1 << 16)
        *lines, self._toucher_rest = (self._toucher_rest + data).split(b"\n")
        if lines:
            touched = int(lines[-1]) - self.segment.geometry.data_offset
            # The keeper may have been ahead: it makes ready what it needs at once.
            self.keeper.authority.set_touched(max(touched, self.keeper.authority.touched_bytes))
        if data:
            return
        if self._toucher.wait() != 0:
            log.warning("making memory ready ended early: %s is full", self.path.parent)
        self._end_toucher()

    def _end_toucher(self) -> None:
        if self._toucher is not None and self._toucher.stdout is not None:
            self._selector.unregister(self._toucher.stdout)
            self._toucher.stdout.close()
            self._toucher = None


def _lock(path: Path, refusal: str) -> ByteLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = ByteLock(path)
    if not lock.try_acquire(KEEPER_BYTE):
        lock.close()
        raise KeeperRunning(refusal)
    return lock


def _listen(path: Path) -> socket.socket:
    """The control socket, private to the user. The name's lock is held, so whatever is there is left over."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(mask)
    listener.listen(64)
    return listener


@contextlib.contextmanager
def _signals(stop: object) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop` meanwhile."""
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda *_: stop())  # type: ignore[operator]
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
