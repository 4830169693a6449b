"""Two processes race on one pool of a few slots: `python -m tests.stress.race [--seconds S] [--slots N] MUTANT...`.

The parent is the keeper. In one arrangement it is also the writer and the child reads; in the other, which shows stores
that are not ordered before their publication, it also reads and the child writes. Prints one JSON object per
mutant; a mutant's race ends with its first torn reads, that of the real code ("" or "apart") after the whole time.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from penstock.pool import segment as segments
from penstock.pool.attachment import Attachment, LaneGrant
from penstock.pool.layout import COMMIT_BYTES, KIND_COMMIT, Geometry
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock
from penstock.pool.wire import SpaceOf
from penstock.runtime.embedded import EmbeddedLink
from tests.stress.loops import both, keeper_loop, newest_loop, reader_loop, writer_loop
from tests.stress.mutants import kernels

# A short block is read before the last of it has left the writer's write-combining buffers.
LONG_BLOCK, SHORT_BLOCK = 4096, 512
READER, WRITER = 0, 1
ROOT = bytes(range(16))
# Rounds between two looks at the clock and at the other process.
BATCH = 20_000
# More than the caches hold.
COLD_BYTES = 64 << 20
ENOUGH_TORN = 1
# The mutant that only the second arrangement shows, and the name of the real code in it.
WRITES_APART = {"writer's sfence", "apart"}


class Side:
    """What both processes know: the segment, a lane, keys and their blocks."""

    def __init__(self, path: Path, lane: int, epoch: int, space: int, n_keys: int, block: int, cold_bytes: int) -> None:
        segment = segments.open_existing(path)
        self.locks = ByteLock(segments.lock_path(path))
        assert self.locks.try_acquire(FIRST_LANE_BYTE + lane)
        self.at = Attachment(segment, self.locks, LaneGrant(lane, epoch))
        segment.close()
        self.words = block // 8
        self.shape = space | block << 32
        rng = np.random.default_rng(7)
        self.keys = rng.integers(1, 1 << 63, (n_keys, 2), np.uint64)
        self.blocks = np.repeat(self.keys[:, :1], self.words, axis=1)
        self.sources = self.blocks.ctypes.data + np.arange(n_keys, dtype=np.int64) * block
        self.seed = np.array([os.getpid()], np.int64)
        self.cold = np.zeros(cold_bytes // 8, np.int64)
        self.out = np.zeros(3, np.int64)
        self.slots = np.zeros((64, 3), np.int64)
        self.rows = np.zeros((64, COMMIT_BYTES // 8), np.int64)
        self.rows[:, 0], self.rows[:, 3] = KIND_COMMIT, epoch
        self.rows[:, 6:8] = np.frombuffer(ROOT, np.int64)
        self.rows[:, 8], self.rows[:, 9] = block, space

    def reading(self, mutant: str) -> tuple[Any, tuple[Any, ...]]:
        """The reader's loop and its arguments; the last two are rounds and results."""
        loop = reader_loop(*kernels("penstock.pool.reader", mutant, "match", "release"))
        return loop, (self.at.ctx, self.keys, self.shape, self.words, self.cold, self.seed)

    def reading_newest(self, keeper: int, events: int) -> tuple[Any, tuple[Any, ...]]:
        """The loop of a reader that shares a thread with the keeper, and all its arguments."""
        loop = newest_loop(*kernels("penstock.pool.reader", "", "match", "release"))
        key = np.zeros((1, 2), np.uint64)
        return loop, (self.at.ctx, keeper, events, key, self.shape, self.words, self.out)

    def writing(self, mutant: str) -> tuple[Any, tuple[Any, ...]]:
        """The writer's loop and its arguments but the rounds."""
        loop = writer_loop(*kernels("penstock.pool.writer", mutant, "take_grants", "publish"))
        return loop, (self.at.ctx, self.keys, self.sources, self.words, self.slots, self.rows, self.seed)


def child(path: str, lane: int, epoch: int, space: int, n_keys: int, block: int, mutant: str, writes: bool) -> None:
    """Compile, say so, wait for "go", race until a line comes, print what was seen."""
    side = Side(Path(path), lane, epoch, space, n_keys, block, 64 if writes else COLD_BYTES)
    loop, args = side.writing(mutant) if writes else side.reading(mutant)
    rest = () if writes else (side.out,)
    loop(*args, 1, *rest)
    print("ready", flush=True)
    sys.stdin.readline()
    while not select.select([sys.stdin], [], [], 0)[0]:
        loop(*args, BATCH, *rest)
        if side.out[1] >= ENOUGH_TORN:
            break
    print(json.dumps(side.out.tolist()), flush=True)


class Race:
    """The parent's side."""

    def __init__(self, folder: Path, n_slots: int, mutant: str) -> None:
        self.mutant, self.writes_apart = mutant, mutant in WRITES_APART
        self.block = SHORT_BLOCK if self.writes_apart else LONG_BLOCK
        self.cold_bytes = 64 if self.writes_apart else COLD_BYTES
        slab = -(-n_slots * (4096 + 64) // 4096) * 4096
        self.path = folder / f"race-{n_slots}-{abs(hash(mutant)) % 1000}"
        geometry = Geometry(
            unit_bytes=4096, slab_bytes=slab, n_slabs=1, n_lanes=2, leases=16, ring=16, max_spaces=2
        )  # fmt: skip
        self.link = EmbeddedLink(segments.create(self.path, geometry), segments.lock_path(self.path))
        self.keeper = keeper = self.link.keeper
        self.space = self.link.space(SpaceOf(b"d" * 32, ROOT, self.block, 16, 1, self.block)).id
        keeper.make_room(0, 1)
        assert keeper.authority.n_free(0) == n_slots
        self.lanes = [keeper.open_lane() for _ in range(2)]
        self.n_keys = 2 * n_slots
        self.starts = np.arange(n_slots, dtype=np.int64)
        self.seed = np.array([1], np.int64)

    def run(self, seconds: float) -> dict[str, Any]:
        """Race for so long or until something is torn."""
        names = ("penstock.pool.evict", self.mutant, "evict", "grant")
        apply_commits = kernels("penstock.pool.apply", "", "apply_commits")
        keeper = keeper_loop(*kernels(*names), *apply_commits)
        mine, other = (READER, WRITER) if self.writes_apart else (WRITER, READER)
        writer_lane = self.lanes[WRITER][0]  # type: ignore[index]
        with self._child(other) as process:
            assert process.stdin is not None and process.stdout is not None
            side = Side(self.path, *self.lanes[mine], self.space, self.n_keys, self.block, self.cold_bytes)  # type: ignore[misc]
            events, ctx = self.keeper.authority.events, self.keeper.authority.ctx
            if self.writes_apart:
                loop, own = side.reading_newest(ctx, events.ctypes.data)
            else:
                loop, args = side.writing(self.mutant)
                own = (*args, 1)
            marks = np.zeros(self.keeper.geometry.n_units, np.uint8)
            keeping = (
                ctx, writer_lane, 0, self.starts, marks, events.ctypes.data, len(events),
                side.cold, self.seed, 1, side.out,
            )  # fmt: skip
            run = both(keeper, loop)
            run(keeping, own, 1)
            assert process.stdout.readline() == b"ready\n"
            started = time.monotonic()
            process.stdin.write(b"go\n")
            process.stdin.flush()
            done = False
            while not done and time.monotonic() < started + seconds and side.out[1] < ENOUGH_TORN:
                run(keeping, own, BATCH)
                done = bool(select.select([process.stdout], [], [], 0)[0])
            took = time.monotonic() - started
            # What was published last is taken in, so that the child's last loop ends.
            process.stdin.close()
            theirs = np.array(json.loads(process.stdout.readline()))
            process.wait()
        reads, torn = (side.out + theirs)[:2].tolist()
        side.locks.close()
        return {
            "mutant": self.mutant, "slots": len(self.starts), "reads": reads, "torn": torn,
            "evicted": int(side.out[2]), "seconds": round(took, 2),
        }  # fmt: skip

    def _child(self, role: int) -> subprocess.Popen[bytes]:
        lane, epoch = self.lanes[role]  # type: ignore[misc]
        what = [str(self.path), lane, epoch, self.space, self.n_keys, self.block, self.mutant, role == WRITER]
        command = [sys.executable, "-m", "tests.stress.race", "--child", json.dumps(what)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def main() -> None:
    """Race each mutant in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("mutants", nargs="*")
    args = parser.parse_args()
    if args.child:
        child(*json.loads(args.child))
        return
    for mutant in args.mutants:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="penstock-race-") as folder:
            race = Race(Path(folder), args.slots, mutant)
            print(json.dumps(race.run(args.seconds)), flush=True)
            race.link.close()


if __name__ == "__main__":
    main()
