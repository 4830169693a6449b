"""`penstock rm`."""

from __future__ import annotations

import os
from pathlib import Path

from penstock.errors import KeeperRunning, NoPool, NotOurs
from penstock.pool import segment as segments
from penstock.pool.locks import KEEPER_BYTE, ByteLock

__all__ = ["rm"]


def rm(name: str, path: Path | None) -> None:
    """Delete a segment. Clients that still map it keep their memory until they end. The lock file stays.

    Works on a segment of any version or state. Raises NoPool, NotOurs, or KeeperRunning.
    """
    where = path or segments.default_path(name)
    if not where.exists():
        raise NoPool(f"no segment at {where}")
    if where.stat().st_uid != os.geteuid():
        raise NotOurs(f"{where} belongs to user {where.stat().st_uid}")
    locks = ByteLock(segments.lock_path(where))
    try:
        if not locks.try_acquire(KEEPER_BYTE):
            raise KeeperRunning(f"a keeper serves {where}; stop it first")
        segments.delete(where)
    finally:
        locks.close()
    print(f"removed {where}")
