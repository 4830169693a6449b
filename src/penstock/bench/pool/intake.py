"""How many commits a second the keeper takes in, policy included.

The keeper is the real one, driven here turn by turn; eight clients fill their rings between the turns, which is not
timed. A timed turn is what a serving keeper does with them: take in hits and commits, tell the brain, evict as it says,
grant what the clients want next, get ready to sleep. So a commit's price includes its slot's grant, and in a full
pool the eviction that made room for it. Payloads are left alone: the keeper never reads them, and the segment's data is
never touched. The blocks that are there before were committed by eight interleaved writers and lie in no order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt

from penstock.bench.pool.base import Group, Scale
from penstock.bench.pool.rig import BATCH, bench_space, new_path, random_chains, segment_file
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate
from penstock.identity import KeyChain, root_key
from penstock.pool import segment as segments
from penstock.pool.attachment import Attachment, LaneGrant
from penstock.pool.layout import COMMIT_BYTES, KIND_COMMIT, MIB, plan_geometry
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock
from penstock.pool.reader import COUNT_MASK, HEAD_BITS, match
from penstock.pool.writer import publish, take_grants, want
from penstock.runtime.keeper import GRANT_SHARE, Keeper

__all__ = ["run"]

SPACE = bench_space(n_segments=1, segment_bytes=4096)
CLIENTS = 8
# What each client publishes for one turn: eight chains of 64.
CHAINS_A_TURN = 8
TURNS_A_WINDOW = 4


def run(group: Group, scale: Scale) -> Iterator[Result]:
    n_windows = scale.windows
    measured = n_windows * TURNS_A_WINDOW * CLIENTS * CHAINS_A_TURN * BATCH
    with _Rig.open(scale.blocks + measured) as rig:
        rig.fill(scale.blocks)
        rates = rig.windows(n_windows)
        note = f"{CLIENTS} clients, {CHAINS_A_TURN * BATCH} commits each a turn; {scale.blocks} blocks before"
        yield result(group.goals[0], estimate(rates), note=note)
        rig.fill_up()
        held = rig.lease(scale.held_leases)
        evicted = rig.evicted()
        rates = rig.windows(n_windows)
        share = (rig.evicted() - evicted) / measured
        note = f"{rig.blocks} blocks; {held} leases held; {share:.2f} evictions a commit"
        yield result(group.goals[1], estimate(rates), note=note)


class _Lane:
    """One client, at the level of its rings."""

    def __init__(self, at: Attachment, space_id: int) -> None:
        self.at = at
        rows = np.zeros((at.geometry.ring, COMMIT_BYTES // 8), np.int64)
        rows[:, 0], rows[:, 3], rows[:, 8], rows[:, 9] = KIND_COMMIT, at.given.epoch, SPACE.block_bytes, space_id
        self._rows = rows
        self._granted = np.zeros((at.geometry.ring, 3), np.int64)

    def commit(self, chains: list[KeyChain]) -> int:
        """Publish these chains into granted slots as far as there are any; ask for as many for the next turn."""
        n, root = 0, np.frombuffer(root_key(SPACE), np.int64)
        granted = take_grants(self.at.ctx, self._granted)
        for chain in chains[: granted // BATCH]:
            rows, slots = self._rows[n : n + BATCH], self._granted[n : n + BATCH]
            rows[:, 1:3] = slots[:, ::2]
            rows[:, 4:6] = chain.array.view(np.int64)
            rows[0, 6:8], rows[1:, 6:8] = root, rows[:-1, 4:6]
            n += BATCH
        if granted != n:
            raise RuntimeError(f"{granted} slots granted to a client that fills {n}")
        want(self.at.ctx, 0, len(chains) * BATCH)
        return int(publish(self.at.ctx, self._rows.ctypes.data, n) & 0xFFFFFFFF)

    def lease(self, keys: npt.NDArray[np.uint64], shape: int) -> int:
        """Lease what is there of a chain; returns how many blocks."""
        return int(match(self.at.ctx, keys, shape) >> HEAD_BITS & COUNT_MASK)


class _Rig:
    """A keeper and its clients in one process."""

    def __init__(self, keeper: Keeper, lanes: list[_Lane], shape: int) -> None:
        self._keeper, self._lanes, self._shape = keeper, lanes, shape
        self._seed = 0
        self._chains: list[KeyChain] = []
        for lane in lanes:
            want(lane.at.ctx, 0, CHAINS_A_TURN * BATCH)
        self._turn()

    @classmethod
    @contextmanager
    def open(cls, blocks: int) -> Iterator[_Rig]:
        """A pool with room for `blocks` blocks and what is granted ahead."""
        a_turn = CLIENTS * CHAINS_A_TURN * BATCH
        # So large that the keeper grants every client what it fills in a turn.
        slots = max(blocks + 2 * a_turn, 2 * GRANT_SHARE * a_turn)
        geometry = plan_geometry(round(slots * (4096 + 64 + 128 + 64) * 1.04) + 64 * MIB, unit_bytes=4096)
        with ExitStack() as stack:
            path = stack.enter_context(segment_file(new_path("bench"), geometry))
            segment = segments.open_existing(path)
            stack.callback(segment.close)
            locks = ByteLock(segments.lock_path(path))
            stack.callback(locks.close)
            keeper = Keeper(segment, locks)
            # Nobody stores into these slabs, so their memory need not be there.
            keeper.authority.set_touched(geometry.n_slabs * geometry.slab_bytes)
            sizes = (SPACE.block_bytes, SPACE.block_tokens, SPACE.n_segments, SPACE.segment_bytes)
            row = keeper.space(SPACE.digest(), bytes(root_key(SPACE)), sizes, "bench")
            lanes = [_Lane(_attach(keeper, segment), row.id) for _ in range(CLIENTS)]
            for lane in lanes:
                stack.callback(lane.at.locks.close)
            yield cls(keeper, lanes, row.id | SPACE.block_bytes << 32)

    @property
    def blocks(self) -> int:
        return self._keeper.authority.n_ready

    def evicted(self) -> int:
        from penstock.runtime.report import stat_report

        return int(stat_report(self._keeper, [])["counters"]["keeper"]["evicted"])

    def _turn(self) -> float:
        """Seconds of one turn of the keeper."""
        started = time.perf_counter()
        self._keeper.step()
        self._keeper.announce_sleep()
        self._keeper.announce_awake()
        return time.perf_counter() - started

    def _round(self) -> tuple[int, float]:
        """Every client publishes, the keeper takes it in. Returns commits and the keeper's seconds."""
        self._seed += 1
        chains = random_chains(SPACE, CLIENTS * CHAINS_A_TURN, self._seed)
        self._chains += chains
        n = sum(lane.commit(chains[i::CLIENTS]) for i, lane in enumerate(self._lanes))
        return n, self._turn()

    def fill(self, blocks: int) -> None:
        while self.blocks < blocks:
            self._round()

    def fill_up(self) -> None:
        """Commit until the pool evicts."""
        before = self.evicted()
        while self.evicted() == before:
            self._round()

    def windows(self, n: int) -> list[float]:
        """Commits a second in each of n windows."""
        rates = []
        for _ in range(n):
            rounds = [self._round() for _ in range(TURNS_A_WINDOW)]
            rates.append(sum(n for n, _ in rounds) / sum(s for _, s in rounds))
        return rates

    def lease(self, each: int) -> int:
        """Have every client lease random chains until it holds about `each` blocks. Returns how many in all."""
        order = np.random.default_rng(3).permutation(len(self._chains))
        left, held = iter(order), 0
        for lane in self._lanes:
            mine = 0
            while mine < each and (i := next(left, None)) is not None:
                mine += lane.lease(self._chains[i].array, self._shape)
            held += mine
        return held


def _attach(keeper: Keeper, segment: segments.Segment) -> Attachment:
    opened = keeper.open_lane()
    if opened is None:
        raise RuntimeError("no lane left")
    locks = ByteLock(segments.lock_path(segment.path))
    locks.try_acquire(FIRST_LANE_BYTE + opened[0])
    keeper.confirm_lane(opened[0])
    return Attachment(segment, locks, LaneGrant(*opened))
