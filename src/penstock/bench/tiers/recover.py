"""How long a disk tier of a million blocks takes from nothing to its first read.

The files are laid out as the tier leaves them: rows of blocks in chains of 256, and data files that are allocated and
were never written, since the rows are all that recovery reads. Reads are served as soon as the tier is open.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.bench.tiers.disk import disk_space, huge_memory
from penstock.bench.tiers.folder import bench_folder
from penstock.tiers.base import Batch, BlockSpace, Found
from penstock.tiers.disk import DiskOptions, DiskTier
from penstock.tiers.disk_format import ROW_USED, Header, check_rows, pack_header, row_dtype

__all__ = ["run"]

_BLOCK = 64 << 10
_SLAB = 64 * MIB
_CHAIN = 256


def run(group: Group, scale: Scale) -> Iterator[Result]:
    n_blocks, rounds = (1_000_000, 7) if scale.name == "full" else (20_000, 2)
    with bench_folder() as folder:
        space = _lay_out(folder, n_blocks)
        took = [_open_and_read(folder, space, n_blocks) for _ in range(rounds)]
    yield result(group.goals[0], estimate(took), note=f"{n_blocks} blocks of 64 KiB")


def _options(n_blocks: int) -> DiskOptions:
    return DiskOptions(size=str(2 * n_blocks * _BLOCK), keep_free="0", slab=str(_SLAB))


def _lay_out(folder: Path, n_blocks: int) -> BlockSpace:
    space = disk_space(_BLOCK)
    tier = DiskTier(folder, _options(n_blocks))
    store = tier._store
    if store is None:
        raise RuntimeError("the disk tier did not open")
    number, salt = store.folder.number(space), store.folder.salt
    tier.close()
    if json.loads((folder / "penstock.spaces").read_text())["spaces"][0]["number"] != number:
        raise RuntimeError("the disk tier's space is not in its file")
    n_slots, random = _SLAB // _BLOCK, np.random.default_rng(1)
    for slab in range(-(-n_blocks // n_slots)):
        rows = np.zeros(n_slots, row_dtype)
        rows["key"] = random.integers(0, 1 << 63, (n_slots, 2), dtype=np.uint64)
        rows["parent"][1:] = rows["key"][:-1]
        rows["parent"][::_CHAIN] = np.frombuffer(space.root, "<u8")
        rows["space"], rows["state"], rows["stamp"] = number, ROW_USED, slab + 1
        rows["check"] = check_rows(rows.view(np.uint64).reshape(n_slots, 8), slab, np.arange(n_slots))
        header = pack_header(Header(slab, salt, slab, _BLOCK, n_slots))
        (folder / f"slab-{slab:06d}.rows").write_bytes(header + rows.tobytes())
        with open(folder / f"slab-{slab:06d}.data", "wb") as data:
            data.truncate(_SLAB)
    return space


def _open_and_read(folder: Path, space: BlockSpace, n_blocks: int) -> float:
    memory = huge_memory(_BLOCK)
    key = np.random.default_rng(1).integers(0, 1 << 63, (1, 2), dtype=np.uint64)
    batch = Batch(space, key, np.frombuffer(space.root, "<u8")[None].copy(), np.zeros(1, np.uint64), [memory])
    started = time.perf_counter()
    tier = DiskTier(folder, _options(n_blocks))
    try:
        there = tier.holds(space, key, started + 60).all() and tier.read(batch, time.monotonic() + 60)[0] == Found.HERE
        seconds = time.perf_counter() - started
        if not there or (tier.usage().blocks or 0) < n_blocks:
            raise RuntimeError("the disk tier did not recover every block")
    finally:
        tier.close()
    return seconds
