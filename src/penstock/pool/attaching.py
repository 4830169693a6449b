"""How a client comes to its keeper: hello, mappings, the lane's lock; and how it comes back to the next one.

Covers attaching, and the one background thread that looks after an attached pool. What `penstock.open` does where there
is no keeper is `runtime/opening.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import weakref
from pathlib import Path

from penstock.errors import Damaged, LaneTaken, NoKeeper, PenstockError, PoolClosed
from penstock.pool import segment as segments
from penstock.pool.attachment import Attachment, LaneGrant
from penstock.pool.client import Pool
from penstock.pool.link import SocketLink
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock
from penstock.pool.wire import Welcome

__all__ = ["attach"]

log = logging.getLogger("penstock.client")

# Unused grants go back after this long without a reservation, which is also how often an idle client wakes for it.
IDLE_S = 2.0
ATTACH_TRIES = 3
_RETRY_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def attach(name: str, client: str) -> Pool:
    """Attach to the keeper of the pool `name`; `client` is what `penstock stat` calls this process.

    Starts the thread that looks after the pool, which ends with it. Raises NoKeeper, KeeperError, SegmentError.
    """
    link = SocketLink(name)
    try:
        at = _attachment(link, client)
        pool = Pool(name, at, link, "attached")
    except BaseException:
        link.close()
        raise
    stop = link.errands = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    thread = threading.Thread(
        target=_look_after, args=(weakref.ref(pool), link, client, stop), name=f"penstock-{name}", daemon=True
    )
    pool._on_close.append(weakref.finalize(pool, link.send_errand))
    thread.start()
    return pool


def _attachment(link: SocketLink, client: str) -> Attachment:
    """A new attachment; tried again where a keeper that restarted meanwhile had given the lane to somebody else."""
    for _ in range(ATTACH_TRIES - 1):
        try:
            return _new_attachment(link, client)
        except LaneTaken as error:
            log.info("pool %s: %s", link.name, error)
    return _new_attachment(link, client)


def _new_attachment(link: SocketLink, client: str) -> Attachment:
    """Say hello, map the segment, lock the lane, confirm."""
    welcome = link.connect(client)
    locks, at = _map(welcome)
    try:
        link.confirm()
    except BaseException:
        locks.close()
        raise
    return at


def _map(welcome: Welcome) -> tuple[ByteLock, Attachment]:
    path = Path(welcome.path)
    segment = segments.open_existing(path)
    locks = ByteLock(segments.lock_path(path))
    try:
        if segment.uuid != welcome.uuid:
            raise Damaged(f"{path} is not the segment that the keeper serves; was it replaced by hand?")
        if not locks.try_acquire(FIRST_LANE_BYTE + welcome.lane):
            raise LaneTaken(f"lane {welcome.lane} is still locked by another process; try again")
        return locks, Attachment(segment, locks, LaneGrant(welcome.lane, welcome.epoch))
    except BaseException:
        locks.close()
        raise
    finally:
        segment.close()


def _look_after(pool_ref: weakref.ref[Pool], link: SocketLink, client: str, stop: int) -> None:
    """The client's one background thread: notices that the keeper went, greets the next one, returns idle grants.

    Ends with the pool. Sleeps in the kernel and looks up every IDLE_S: nothing tells it that grants came in.
    """
    attempt = 0
    while (pool := pool_ref()) is not None and not pool.closed:
        pause = IDLE_S
        if not link.alive:
            pause = _RETRY_S[min(attempt, len(_RETRY_S) - 1)]
            attempt = 0 if _come_back(pool, link, client) else attempt + 1
        else:
            link.tell_names()
            pool.tidy(IDLE_S)
        del pool
        if link.alive:
            if link.hung_up(pause, stop):
                log.warning("pool %s: the keeper is gone; reads go on, writes are dropped until it is back", link.name)
        else:
            _nap(stop, pause)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(stop)
    link.close()  # again: the pool may have been closed while this thread was greeting a keeper
    link.end_errands()


def _nap(stop: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    poll.poll(int(seconds * 1000))


def _come_back(pool: Pool, link: SocketLink, client: str) -> bool:
    """Greet the next keeper with the lane that is held, or take a new one where the segment was replaced."""
    at = pool._at
    try:
        welcome = link.connect(client, at.given, at.uuid)
        if welcome.uuid == at.uuid and welcome.lane == at.given.lane and welcome.epoch == at.given.epoch:
            link.confirm()
        else:
            locks, fresh = _map(welcome)
            try:
                link.confirm()
                pool.replace(fresh)
            except BaseException:
                locks.close()
                link.close()  # from its start once more
                raise
    except NoKeeper:
        return False
    except PoolClosed:
        return False
    except (PenstockError, OSError) as error:
        log.warning("pool %s: cannot come back to its keeper yet: %s", pool.name, error)
        return False
    log.info("pool %s: back with its keeper", pool.name)
    return True
