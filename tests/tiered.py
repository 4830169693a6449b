"""Pools with a disk below them, for tests of those who use them: stored there, gone from memory, damaged."""

from __future__ import annotations

from pathlib import Path

from tests.support import Keeper, until

__all__ = ["damage", "disk", "on_disk", "replace_pool", "wait_stored"]


def disk(path: Path, options: str = "") -> str:
    """A tier's address: everything is written at once."""
    return f"disk:{path}?size=64M&slab=1M&write=through" + (f"&{options}" if options else "")


def on_disk(keeper: Keeper, n: int, tier: str = "disk") -> None:
    """Wait until a tier has this many blocks."""
    until(lambda: (keeper.tier(tier)["blocks"] or 0) >= n, f"{n} blocks in {tier}")


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
    on_disk(keeper, n_blocks)
    return n_blocks


def damage(folder: Path, block: bytes) -> None:
    """Flip one bit of this block, in whichever file it lies."""
    for path in folder.rglob("*"):
        if path.is_file() and (at := path.read_bytes().find(block)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + 1000)
                file.write(bytes([block[1000] ^ 4]))
            return
    raise AssertionError("the block is in no file")
