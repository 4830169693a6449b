"""Pools with a disk below them, for tests of those who use them: stored there, gone from memory, damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from penstock.pool.layout import Geometry
from tests.support import Keeper, small_geometry, until

__all__ = ["damage", "replace_pool", "tiered_keeper", "wait_stored"]


@contextlib.contextmanager
def tiered_keeper(folder: Path, options: str = "", geometry: Geometry | None = None) -> Iterator[Keeper]:
    """A pool, empty, above a disk that may have blocks already; everything is written there at once. Comes when what
    moves blocks answers."""
    address = f"disk:{folder}?size=64M&slab=1M&write=through" + (f"&{options}" if options else "")
    with Keeper(geometry or small_geometry(), tiers=[address]) as keeper:
        keeper.tier_report()
        yield keeper


def replace_pool(keeper: Keeper) -> None:
    """Restart the pool as after a reboot: nothing is left but what the tiers have."""
    keeper.stop()
    keeper.remove()
    keeper.start()
    keeper.wait_touched()
    keeper.tier_report()


def wait_stored(keeper: Keeper) -> int:
    """Wait until everything that is in the pool is on disk; how many blocks that is."""
    n_blocks = int(keeper.stat()["blocks"])
    until(lambda: (keeper.tier("disk")["blocks"] or 0) >= n_blocks, f"{n_blocks} blocks are on disk")
    return n_blocks


def damage(place: Path, block: bytes) -> None:
    """Flip one bit of this block, wherever its bytes lie in this file, or in the files of this folder."""
    n_found = 0
    for path in (path for path in (place, *place.rglob("*")) if path.is_file()):
        data, at = path.read_bytes(), -1
        while (at := data.find(block, at + 1)) >= 0:
            n_found += 1
            with path.open("r+b") as file:
                file.seek(at + 1000)
                file.write(bytes([block[1000] ^ 4]))
    assert n_found, "the block is in no file"
