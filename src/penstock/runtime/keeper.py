"""The keeper: the one process (or, embedded, the one object) that serves a pool.

Each `step` takes in what clients published, tells the brain, makes room as the brain decides, and grants slots. It
waits for nothing; sockets, sleep and signals are in `serve.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from penstock.core.brain import Brain, ConsistencyError
from penstock.errors import KeeperError
from penstock.pool import layout
from penstock.pool.authority import Authority, Events, Survivors
from penstock.pool.cells import peek, poke, poke_and_fence
from penstock.pool.keeper_context import G_DAMAGED, G_RELEARNED
from penstock.pool.layout import N_CLASSES, LaneState
from penstock.pool.locks import FIRST_LANE_BYTE, ByteLock
from penstock.pool.pretouch import touch_range
from penstock.pool.segment import Segment
from penstock.pool.spaces import SpaceRow
from penstock.pool.survey import SURVEY_COLUMNS, V_COMMITS, V_HITS, V_WAITING, V_WANTS, survey, wants_of
from penstock.runtime.slabs import Turnover, coldest_foreign_slab, take_fresh_slab, with_descendants
from penstock.types import EventKind, Eviction

__all__ = ["Keeper"]

log = logging.getLogger("penstock.keeper")

# Grants that clients hold without having filled them: at most this share of a class's slots, and once more as much that
# is guaranteed to single lanes; a sixteenth of the pool in all.
GRANT_SHARE = 32
# Evicting in batches spreads the cost of one fence and one scan of all lanes; a reserve of free slots follows from it.
EVICT_AHEAD = 512
# ... but never more than this share of what the class could hold.
EVICT_SHARE = 64
# Batches tried where all blocks of one turn out to be leased; more would keep the keeper from its clients.
EVICT_TRIES = 16
# Blocks used within as many uses as this share of a class's slots are not evicted.
RECENT_SHARE = 8
# ... unless nothing could be evicted for this long.
STUCK_MS = 1000
MAX_NAMES, MAX_NAME = 100_000, 200
# How often the keeper tries again to drop a damaged block that a lease holds.
DAMAGED_RETRY_MS = 100


class Keeper:
    """Serves a mapped segment. The caller holds the keeper's lock.

    The memory of slabs is made ready as they are needed; `set_touched` on the authority, by whoever does that ahead of
    need, saves the keeper the work. A slab that cannot be had (the file system is full) is as if it were not there.
    """

    def __init__(self, segment: Segment, locks: ByteLock, *, policy: str = "lru") -> None:
        self.authority = Authority(segment)
        self.geometry = segment.geometry
        self.brain = Brain(self.geometry.n_units, N_CLASSES, policy)
        self._locks = locks
        self._rows = np.zeros((self.geometry.n_lanes, SURVEY_COLUMNS), np.int64)
        self._wants = np.zeros(N_CLASSES, np.int64)
        self._victims = np.zeros(len(self.authority.events), np.uint32)
        # A sleep has a number that no sleep of an earlier keeper had: clients ring once for each.
        self._sleep_number = 0
        self._first_lane = 0
        self._owed: set[int] = set()
        self._stuck_since: list[int | None] = [None] * N_CLASSES
        self._turnover = [Turnover() for _ in range(N_CLASSES)]
        self.took_commits = False
        """Whether the last step found commits (or aborts)."""
        self.opening: set[int] = set()
        """Lanes handed out to clients that have not confirmed yet that they hold the lane's lock."""
        self.started_ms = self._now()
        """Uses before this are known by their order only."""
        self._full = False
        self._damaged: set[int] = set()
        self._damaged_again_ms = 0
        self.names: dict[int, str] = {}
        self.tell: Callable[[Events], None] | None = None
        """Told of every batch of events that the brain took in."""
        self.tell_gap: Callable[[], None] | None = None
        """Told when the brain was rebuilt, because events were missing."""
        self._recover()

    # ---- start

    def _recover(self) -> None:
        started = time.perf_counter()
        authority = self.authority
        self._learn(authority.recover())
        for lane in range(self.geometry.n_lanes):
            if authority.lane_state(lane) == LaneState.USED:
                self._drain(lane)
        dead = self.reclaim_dead()
        unpublished = authority.free_unpublished_grants()
        authority.tell_removals()
        log.info(
            "recovered %d blocks in %.0f ms (%d dead clients, %d unpublished grants)",
            authority.n_ready,
            1e3 * (time.perf_counter() - started),
            dead,
            unpublished,
        )

    # ---- one step

    def step(self) -> list[int]:
        """Do what there is to do now. Returns the lanes whose clients wait and for which something was done."""
        survey(self.authority.ctx, self._rows)
        progressed, self._owed = self._owed, set()
        active = np.flatnonzero(self._rows[:, V_COMMITS] | self._rows[:, V_HITS])
        self.took_commits = bool(self._rows[:, V_COMMITS].any())
        for lane in active:
            self._drain(int(lane))
            progressed.add(int(lane))
        self._drop_damaged()
        if len(active):
            survey(self.authority.ctx, self._rows)  # slots that were just filled leave wants behind
        progressed |= self._grant_wanted()
        if not progressed:
            return []
        self.authority.save_stamp()
        # Fences, then reads who waits: what was published above is seen by whoever is not seen waiting here.
        survey(self.authority.ctx, self._rows)
        return [lane for lane in progressed if self._rows[lane, V_WAITING]]

    def has_work(self) -> bool:
        """Whether a step would find commits. Hits can wait: they only tell what was used."""
        survey(self.authority.ctx, self._rows)
        return bool(self._rows[:, V_COMMITS].any())

    def has_hits(self) -> bool:
        """Whether the last look at the lanes saw hit reports."""
        return bool(self._rows[:, V_HITS].any())

    def announce_sleep(self) -> bool:
        """Say that the keeper sleeps, then look again. True if it may sleep; False if work came in meanwhile.

        Hits wake nobody: with `has_hits`, sleep briefly.
        """
        self._sleep_number += 1
        epoch = peek(self.authority.header(layout.H_KEEPER_EPOCH))
        poke_and_fence(self.authority.header(layout.H_SLEEPING), epoch << 32 | self._sleep_number)
        busy = self.has_work()
        # Whoever is granted something here is rung for by the next step.
        self._owed |= self._grant_wanted()
        if busy or self._owed:
            self.announce_awake()
            return False
        return True

    def announce_awake(self) -> None:
        poke_and_fence(self.authority.header(layout.H_SLEEPING), 0)

    def _drain(self, lane: int) -> None:
        """Take in all hits and commits of a lane; hits first, so that they protect what they touched from evictions."""
        # Once each, which is what a ring holds: a client that publishes on and on must not keep the others waiting.
        self._observe(self.authority.touched(lane))
        self._observe(self.authority.apply(lane))

    def _observe(self, events: Events) -> None:
        """Tell the brain. If it contradicts the segment, the segment is right: the brain learns everything anew."""
        if not len(events):
            return
        try:
            self.brain.observe(events, self._now())
        except ConsistencyError as error:
            self.authority.count(G_RELEARNED, 1)
            log.error("the brain lost track (%s); it is rebuilt from the segment", error)
            self._learn(self.authority.survivors())
            if self.tell_gap is not None:
                self.tell_gap()
            return
        if self.tell is not None:
            self.tell(events)

    def _learn(self, survivors: Survivors) -> None:
        self.brain.restore(survivors.units, survivors.parents, survivors.classes, survivors.stamps)

    def _now(self) -> int:
        return time.monotonic_ns() // 1_000_000

    # ---- grants

    def _grant_wanted(self) -> set[int]:
        """Top up every lane to what it wants, as far as there is room. Starts at another lane each time."""
        granted: set[int] = set()
        lanes = np.flatnonzero(self._rows[:, V_WANTS]).tolist()
        if not lanes:
            return granted
        self._first_lane += 1
        first = self._first_lane % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            wants_of(self.authority.ctx, lane, self._wants)
            for slot_class in np.flatnonzero(self._wants[: len(self.authority.shapes)]):
                if self._grant(lane, int(slot_class), int(self._wants[slot_class])):
                    granted.add(lane)
        return granted

    def _grant(self, lane: int, slot_class: int, n: int) -> int:
        outstanding, limit = self.authority.outstanding(), self.grant_limit(slot_class)
        # A few for each lane whatever others hold: one that is stopped with all of them must not stall the rest.
        own = max(1, limit // self.geometry.n_lanes) - int(outstanding[lane, slot_class])
        n = min(
            n,
            self.geometry.ring - int(outstanding[lane].sum()),
            max(own, limit - int(outstanding[:, slot_class].sum())),
        )
        if n <= 0:
            return 0
        self.make_room(slot_class, n)
        return self.authority.grant(lane, slot_class, n)

    def class_slots(self, slot_class: int) -> int:
        """Slots that a class would have if the whole pool were its own."""
        return self.geometry.n_slabs * self.authority.shapes[slot_class].slots_per_slab

    def grant_limit(self, slot_class: int) -> int:
        """How many grants of a class may be outstanding before only guaranteed ones are given."""
        slots = self.class_slots(slot_class)
        return max(slots // GRANT_SHARE, min(64, slots // 2), 1)

    def make_room(self, slot_class: int, n: int) -> None:
        """Have at least n free slots of a class if the brain and the leases allow it."""
        authority = self.authority
        while authority.n_free(slot_class) < n:
            if self._fresh_slab(slot_class) or self._outgrow(slot_class):
                continue
            if self._evict(slot_class, n - authority.n_free(slot_class)):
                continue
            if not self._clear_foreign_slab(slot_class):
                return

    def _outgrow(self, slot_class: int) -> bool:
        """Take another class's slab if nobody used it while this class evicted as much as it holds."""
        authority, turnover = self.authority, self._turnover[slot_class]
        slots = authority.shapes[slot_class].slots_per_slab
        if len(authority.shapes) < 2 or turnover.evicted < slots * turnover.patience:
            return False
        classes = authority.slab_classes()
        held = int((classes == slot_class).sum()) * slots
        if turnover.evicted < held * turnover.patience or not ((classes >= 0) & (classes != slot_class)).any():
            return False
        taken = self._clear_foreign_slab(slot_class, turnover.since)
        turnover.looked(taken)
        return taken

    def _fresh_slab(self, slot_class: int) -> bool:
        if take_fresh_slab(self.authority, slot_class):
            return True
        slab, size = self.authority.touched_slabs(), self.geometry.slab_bytes
        if slab >= self.geometry.n_slabs or self._full:
            return False
        # Nobody evicts while memory lies idle, and no writer waits for a slow pre-toucher.
        if not touch_range(self.authority.segment.fd, self.geometry.data_offset + slab * size, size):
            self._full = True
            log.error("the file system is full: the pool serves %d MiB of what it was given", slab * size >> 20)
            return False
        self.authority.set_touched((slab + 1) * size)
        return take_fresh_slab(self.authority, slot_class)

    def _evict(self, slot_class: int, n: int) -> int:
        """Evict at least n blocks of a class if possible; more, to spread the cost. Returns how many went."""
        ahead = min(EVICT_AHEAD, self.class_slots(slot_class) // EVICT_SHARE)
        batch = min(max(n, ahead), len(self._victims))
        before = self.authority.n_free(slot_class)
        # Where all else is leased, a chain that is being stored must not push out its own head.
        newest = self._newest_victim(slot_class)
        for _ in range(EVICT_TRIES):
            picked = self.brain.victims(slot_class, batch, self._victims)
            if not picked:
                break
            self._observe(self.authority.evict(self._victims[:picked], Eviction.CAPACITY, newest))
            if freed := self.authority.n_free(slot_class) - before:
                self._turnover[slot_class].add(freed, self.authority.stamp)
                self._stuck_since[slot_class] = None
                return freed
            # All of them stay, and count as just used now: the next ones are others.
        return 0

    def _newest_victim(self, slot_class: int) -> int:
        """The latest use count of a block that may go: not the most recent ones, unless that has left no room for long.

        One recent chain may be all there is, and where nothing is used nothing grows old.
        """
        since, now = self._stuck_since[slot_class], self._now()
        if since is None:
            self._stuck_since[slot_class] = now
        elif now - since > STUCK_MS:
            return self.authority.stamp
        return self.authority.stamp - self.class_slots(slot_class) // RECENT_SHARE

    def _clear_foreign_slab(self, slot_class: int, unused_since: int | None = None) -> bool:
        """Evict the coldest slab of another class, with what hangs on its blocks, and take it, unless leases forbid."""
        slab = coldest_foreign_slab(self.authority, slot_class, unused_since)
        if slab is None:
            return False
        self._evict_with_descendants(self.authority.slab_blocks(slab), Eviction.SLAB)
        if int(self.authority.slab_used()[slab]):
            return False
        return take_fresh_slab(self.authority, slot_class)

    def _evict_with_descendants(self, blocks: npt.NDArray[np.uint32], why: Eviction) -> int:
        """Evict these blocks and all that continues their chains, except what leases hold and its ancestors."""
        doomed = with_descendants(self.authority, blocks, self.brain.facts.resident())
        parents, protected, evicted = self.authority.parents(), np.zeros(self.geometry.n_units, bool), 0
        for start in range(0, len(doomed), len(self._victims)):
            part = doomed[start : start + len(self._victims)]
            part = np.ascontiguousarray(part[~protected[part]])
            events = self.authority.evict(part, why)
            for unit in events["unit"][events["kind"] == EventKind.KEPT]:
                above = int(parents[unit])
                while above >= 0 and not protected[above]:
                    protected[above] = True
                    above = int(parents[above])
            evicted += int((events["kind"] == EventKind.EVICTED).sum())
            self._observe(events)
        return evicted

    # ---- damage

    def _drop_damaged(self) -> None:
        """Evict blocks whose checksums are really wrong, with what continues their chains, once no lease holds them."""
        suspects = self.authority.take_suspects()
        self._damaged.update(int(unit) for unit in suspects)
        if not self._damaged or (not len(suspects) and self._now() < self._damaged_again_ms):
            return
        self._damaged_again_ms = self._now() + DAMAGED_RETRY_MS
        self._damaged = {unit for unit in self._damaged if self.authority.is_damaged(unit)}
        before = len(self._damaged)
        evicted = self._evict_with_descendants(np.array(sorted(self._damaged), np.uint32), Eviction.CHECKSUM)
        self._damaged = {unit for unit in self._damaged if self.authority.is_damaged(unit)}
        if gone := before - len(self._damaged):
            self.authority.count(G_DAMAGED, gone)
            log.error("%d damaged blocks dropped, with all that continued them: %d", gone, evicted)

    def forget(self, digest: bytes, keys: bytes) -> int:
        """Evict the blocks of a space with these keys, n x 16 bytes, and what continues their chains.

        Returns how many are still there: leased, or above something leased. Raises KeeperError for bytes that are no
        keys.
        """
        if len(keys) % 16:
            raise KeeperError(f"{len(keys)} bytes are not keys of 16 bytes")
        space = self.authority.spaces.get(digest)
        if space is None:
            return 0
        words = np.frombuffer(keys, np.uint64).reshape(-1, 2).copy()
        self._evict_with_descendants(self.authority.units_of(space.id, words), Eviction.FORGOTTEN)
        return len(self.authority.units_of(space.id, words))

    # ---- clients

    def open_lane(self) -> tuple[int, int] | None:
        """A lane for a new client, and its epoch. The client must take the lane's lock and confirm (`confirm_lane`)."""
        opened = self.authority.open_lane(self.lane_alive)
        if opened is not None:
            self.opening.add(opened[0])
        return opened

    def confirm_lane(self, lane: int) -> None:
        self.opening.discard(lane)

    def lane_alive(self, lane: int) -> bool:
        """Whether the kernel says that some process holds the lane's lock."""
        return self._locks.held_by_other(FIRST_LANE_BYTE + lane)

    def reclaim_dead(self) -> int:
        """Drain and take back the lanes whose owners the kernel proves gone. Returns how many."""
        dead = 0
        for lane in range(self.geometry.n_lanes):
            if self.authority.lane_state(lane) != LaneState.USED or lane in self.opening or self.lane_alive(lane):
                continue
            self._drain(lane)
            self.authority.close_lane(lane)
            dead += 1
        return dead

    def lane_is(self, lane: int, epoch: int) -> bool:
        """Whether a client that says it owns this lane does: same epoch, in use, and its lock held."""
        if not 0 <= lane < self.geometry.n_lanes or self.authority.lane_state(lane) != LaneState.USED:
            return False
        return peek(self.authority.lane(lane) + layout.L_EPOCH) == epoch and self.lane_alive(lane)

    def space(self, digest: bytes, root: bytes, sizes: tuple[int, int, int, int], label: str) -> SpaceRow:
        return self.authority.space(digest, root, sizes, label)

    def learn_names(self, names: dict[int, str]) -> None:
        """What session and tenant digests stand for. Bounded; for display only."""
        if len(self.names) + len(names) <= MAX_NAMES:
            self.names |= {digest: name[:MAX_NAME] for digest, name in names.items()}

    def stop(self) -> None:
        """Leave the segment in order. It stays; another keeper can go on from here."""
        for lane in range(self.geometry.n_lanes):
            if self.authority.lane_state(lane) == LaneState.USED:
                self._drain(lane)
        self.authority.save_stamp()
        poke(self.authority.header(layout.H_CLEAN), 1)
