"""How a process comes to have a pool: attach to the keeper's, or serve one itself.

Covers `penstock.open`. Attaching, and coming back after a keeper restarted, is `pool/attaching.py`.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from pathlib import Path

from penstock.errors import ConfigError, KeeperError, NoKeeper
from penstock.pool import segment as segments
from penstock.pool.attaching import attach
from penstock.pool.attachment import Attachment, LaneGrant
from penstock.pool.client import Pool
from penstock.pool.layout import MIB, Geometry, plan_geometry
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock

__all__ = ["open_pool"]

log = logging.getLogger("penstock.client")


def open_pool(
    name: str = "default",
    *,
    embedded: int | None = None,
    path: str | os.PathLike[str] | None = None,
    client: str = "",
    geometry: Geometry | None = None,
) -> Pool:
    """Open the pool `name`: attach to its keeper; or, with `embedded` bytes and no keeper, serve one in this process.

    `path` places an embedded pool's file (default: shared memory). `client` is what `penstock stat` calls this process.
    `geometry` replaces the default layout of an embedded pool of `embedded` bytes.
    Says in one log line which of the two it did. Raises NoKeeper, KeeperError, SegmentError, NoSpaceLeft, ConfigError.
    """
    _warm_keys()
    segments.check_name(name)
    client = client or f"pid-{os.getpid()}"
    try:
        pool = attach(name, client)
    except NoKeeper:
        if embedded is None and geometry is None:
            raise
        pool = _embed(name, geometry or plan_geometry(embedded or 0), path)
    log.info("pool %s: %s, %d MiB", name, pool.mode, pool._at.geometry.total_bytes // MIB)
    return pool


def _warm_keys() -> None:
    """Load the key kernel in the background; hashlib serves until it is there."""
    from penstock import identity

    if not identity.is_warm():
        threading.Thread(target=identity.warm, name="penstock-warm-keys", daemon=True).start()


def _embed(name: str, geometry: Geometry, path: str | os.PathLike[str] | None) -> Pool:
    from penstock.runtime.embedded import EmbeddedLink

    where = Path(path) if path is not None else segments.default_path(f"{name}.{os.getpid()}")
    if segments.exists(where):
        raise ConfigError(f"{where} exists already; an embedded pool needs a file of its own")
    segment = segments.create(where, geometry)
    lock_file = segments.lock_path(where)
    link = EmbeddedLink(segment, lock_file)
    opened = link.keeper.open_lane()
    if opened is None:
        raise KeeperError("no lane in a new pool")
    locks = ByteLock(lock_file)
    locks.try_acquire(FIRST_LANE_BYTE + opened[0])
    link.keeper.confirm_lane(opened[0])
    pool = Pool(name, Attachment(segment, locks, LaneGrant(*opened)), link, "embedded")
    # A pool that is dropped without close leaves no file behind.
    pool._on_close.append(weakref.finalize(pool, link.close))
    return pool
