"""Bringing the blocks of a chain up into the pool, before a deadline.

A fetch works through its chain in pieces, a few at once: reserve slots, let a tier's thread read into them and verify,
commit in the chain's order. While it lasts, the block before the next one is leased, so that what arrives has a parent
to hang on. A block that turns out to be damaged, unreadable or gone is looked for in the other tiers; where none has it
the fetch ends, and the engine computes from there. Two fetches never read the same block at once: the later one waits.

An engine that computes the front of a chain while its back is fetched (`FetchOrder.start`) has it read without waiting
for the front: only its commit does.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.errors import TierError
from penstock.pool.handles import PlacedSpace
from penstock.pool.lease import Lease
from penstock.pool.reservation import Reservation
from penstock.pool.stage import Stage
from penstock.runtime.mover.claims import Ahead, Claims
from penstock.runtime.mover.places import Places, TierPlace
from penstock.runtime.mover.spaces import as_tiers_know_it, buffers
from penstock.runtime.mover.workers import Transfer
from penstock.runtime.shelf import Got
from penstock.tiers.base import Batch
from penstock.types import FetchEnd, Urgency

__all__ = ["FetchOrder", "Fetcher", "Outcome"]

Keys = npt.NDArray[np.uint64]

PIECE_BYTES = 8 << 20
"""A piece is read, verified and committed as one: large enough to fill a device, small enough to give up."""
PIECES_AT_ONCE = 3
_RESTARTS = 4
_U64 = (1 << 64) - 1
_DOUBT_S = 1.0
"""How often a fetch whose tier hangs asks the others."""
_WAIT_S = 0.02
"""How often a waiting fetch looks whether its client is still there."""
_ROOT_S = 0.002
"""How often it looks for the block that what it read is to follow: the keeper, which takes that in, tells nobody."""


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """Blocks of one chain; `parents[i]` is the key before `keys[i]`."""

    space: PlacedSpace
    keys: Keys
    parents: Keys
    deadline: float
    urgency: Urgency
    said: list[int]
    """session, tenant, priority, ttl_ms, deadline_ms."""
    start: int = 0
    """Whoever ordered this puts the blocks before this one into the pool."""


@dataclass(slots=True)
class Outcome:
    """What became of a fetch."""

    n: int
    """Blocks, from the first, that are in the pool."""
    why: FetchEnd
    moved: int = 0
    tier: str = ""


@dataclass(slots=True)
class _Piece:
    """Blocks `first` to `first + n - 1` of the chain, being read into reserved slots."""

    tier: TierPlace
    first: int
    batch: Batch
    reservation: Reservation
    claimed: list[bytes]
    got: npt.NDArray[np.uint8] | None = None
    abandoned: bool = False
    doubt_at: float = 0.0
    """When to look again whether another tier should be asked instead."""
    transfer: Transfer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.batch)


class Fetcher:
    """Runs fetches, each in its caller's thread.

    `brings(tier, keys)` is called before blocks of that tier are committed, `lacks(tier, keys)` for blocks that it was
    asked for and does not have, or not as they were written.
    """

    def __init__(
        self, stage: Stage, places: Places, claims: Claims, brings: Callable[[int, Keys], None],
        lacks: Callable[[int, Keys], None],
    ) -> None:  # fmt: skip
        self._stage = stage
        self._places = places
        self._claims = claims
        self._brings, self._lacks = brings, lacks
        self._ahead = Ahead(stage.bytes_ahead)

    def here(self, space: PlacedSpace, keys: Keys) -> int:
        """How many blocks, from the first, are in the pool."""
        there = self._stage.resident(space, keys)
        return int(there.argmin()) if not there.all() else len(there)

    def fetch(self, order: FetchOrder, tell: Callable[[int], None], gone: Callable[[], bool]) -> Outcome:
        """Bring what is not there, in order, until everything is or the time is over. Never raises `TierError`.

        `tell(n)` is called when the first n blocks are in the pool; `gone()` says that nobody waits any more.
        """
        run = _Run(
            self._stage, self._places, self._claims, self._ahead, order, tell, gone, self.here, self._brings,
            self._lacks,
        )  # fmt: skip
        return run.run()


class _Run:
    """One fetch. `_at`: blocks before it are in the pool, or, until `_rooted`, still with who ordered it; pieces cover
    `_at` to `_next`."""

    def __init__(
        self, stage: Stage, places: Places, claims: Claims, ahead: Ahead, order: FetchOrder,
        tell: Callable[[int], None], gone: Callable[[], bool], here: Callable[[PlacedSpace, Keys], int],
        brings: Callable[[int, Keys], None], lacks: Callable[[int, Keys], None],
    ) -> None:  # fmt: skip
        self._brings, self._lacks = brings, lacks
        self._stage, self._places, self._claims, self._order = stage, places, claims, order
        self._tell, self._gone, self._here = tell, gone, here
        self._space = as_tiers_know_it(order.space)
        self._names = [key.tobytes() for key in order.keys]
        self._at = self._next = 0
        self._ahead, self._share = ahead, stage.slot_share(order.space)
        self._front = order.start
        self._rooted, self._waits = False, False
        self._booked = 0  # bytes of what may be read ahead
        self._told = -1
        self._pieces: deque[_Piece] = deque()
        self._where = np.zeros(0, np.int64)  # tier of each block from `_where_from` on
        self._where_from = 0
        self._avoid: frozenset[int] = frozenset()  # tiers that failed for block `_at`
        self._narrowed = False  # whether `_where` was found without asking some of them
        self._silent = ""  # a tier that could not be asked
        self._trouble: tuple[FetchEnd, str] = (FetchEnd.ABSENT, "")
        self._restarts = 0
        self._hold: Lease | None = None
        self._moved = 0
        self._stop: FetchEnd | None = None

    def run(self) -> Outcome:
        try:
            if not self._over():
                self._look()
            while self._stop is None and self._at < len(self._names):
                self._fill()
                if self._pieces:
                    self._finish_oldest()
                elif not self._rooted:
                    self._await_root()
            why = FetchEnd.DONE if self._at == len(self._names) else self._stop or FetchEnd.ABSENT
            tier = self._trouble[1] if why in (FetchEnd.READ_FAILED, FetchEnd.DAMAGED) else ""
            n = self._at if self._rooted else self._here(self._order.space, self._order.keys)
            return Outcome(n, why, self._moved, tier)
        finally:
            self._abandon_all()
            self._release()
            self._wait_no_more()

    # ---- where things are

    def _look(self) -> None:
        """Find out what is in the pool, hold the last of it, and ask the tiers for the rest."""
        here, before = self._here(self._order.space, self._order.keys), self._at
        self._at = self._next = max(here, self._front)
        if self._at > before:  # what there was trouble with has come
            self._avoid, self._trouble = frozenset(), (FetchEnd.ABSENT, "")
        self._release()
        if here >= self._front:
            self._take_root()
        elif not self._waits:
            self._waits = self._ahead.enter()
            if not self._waits:
                self._stop = FetchEnd.BUSY
                return
        self._locate()

    def _take_root(self) -> None:
        """The blocks before `_at` are in the pool: see to it that the last of them stays."""
        self._rooted, self._front = True, 0  # if they leave again, they are brought like the others
        self._wait_no_more()
        if self._at:
            self._hold = self._stage.lease_key(self._order.space, self._order.keys[self._at - 1 : self._at])
        self._say()

    def _wait_no_more(self) -> None:
        if self._waits:
            self._ahead.leave()
        self._ahead.give(self._booked)
        self._waits, self._booked = False, 0

    def _locate(self) -> None:
        keys = self._order.keys[self._at :]
        found = self._places.where(self._space, keys, self._order.deadline, self._avoid)
        for tier, lacking in found.lacking:
            self._lacks(tier, lacking)
        self._where, self._silent = found.tiers, found.silent
        self._where_from, self._narrowed = self._at, bool(self._avoid)

    def _tier_of(self, block: int) -> int:
        return int(self._where[block - self._where_from])

    def _run_length(self, block: int, most: int) -> int:
        """Blocks from this one on that lie in the same tier, at most `most`."""
        part = self._where[block - self._where_from :][:most]
        other = part != part[0]
        return int(other.argmax()) if other.any() else len(part)

    # ---- pieces

    def _fill(self) -> None:
        """Start pieces until enough are on their way. Ends the fetch where nothing can be started or waited for."""
        while self._under_way() < PIECES_AT_ONCE and self._next < len(self._names):
            if self._over():
                return
            if self._tier_of(self._next) < 0:
                if self._pieces:
                    return
                if self._avoid or not self._narrowed:
                    self._stop = self._nowhere()
                    return
                self._locate()  # tiers were left out because of a block that has come since
            elif not self._start():
                return

    def _under_way(self) -> int:
        """Pieces that count. Those that were read ahead are bounded by what was booked for them."""
        return len(self._pieces) if self._rooted else sum(piece.got is None for piece in self._pieces)

    def _nowhere(self) -> FetchEnd:
        """No tier that answers has the next block. It is absent only if every tier answered."""
        if self._trouble[0] is FetchEnd.ABSENT and self._silent:
            self._trouble = (FetchEnd.READ_FAILED, self._silent)
        return self._trouble[0]

    def _start(self) -> bool:
        """Start the next piece. False if it has to wait for what is on its way already."""
        order, first = self._order, self._next
        most = max(1, min(PIECE_BYTES // self._space.block_bytes, self._stage.most_slots // 4))
        n = self._run_length(first, most)
        claimed = self._names[first : first + n]
        n = self._claims.take(claimed)
        if n == 0:
            if not self._pieces:
                self._await_other(claimed[0])
            return False
        absent, kept, reservation = 0, 0, None
        try:
            absent = self._absent(first, n)
            if wanted := self._book(absent):
                reservation = self._reserve(wanted)
                kept = len(reservation)
        finally:
            self._claims.drop(self._names[first + kept : first + n])
        if reservation is None or not kept:
            if self._pieces or self._over():
                return False
            if not absent:
                self._look()
            elif self._rooted:
                self._stop = FetchEnd.NO_ROOM
            return False
        tier = self._places.tiers[self._tier_of(first)]
        self._read(tier, first, reservation, self._names[first : first + kept])
        self._next = first + kept
        return order.deadline > time.monotonic()

    def _book(self, n: int) -> int:
        """How many of n blocks may be read now. What is not used of that stays booked until they may be published."""
        if self._rooted:
            return n
        unused = self._booked // self._share - (self._next - self._at)
        if unused < n:
            self._booked += self._ahead.take(n - unused, self._share) * self._share
        return min(n, self._booked // self._share - (self._next - self._at))

    def _absent(self, first: int, n: int) -> int:
        """How many blocks from this one on still have to be brought. Once they are claimed nobody else brings them; who
        did so before it dropped its claims may have been quicker than this fetch's look."""
        there = self._stage.resident(self._order.space, self._order.keys[first : first + n])
        return int(there.argmax()) if there.any() else n

    def _reserve(self, n: int) -> Reservation:
        # With pieces on their way it must not wait: their commits give slots back. Nor before it may commit any.
        wait_s = 0.0 if self._pieces or not self._rooted else max(0.0, self._order.deadline - time.monotonic())
        return self._stage.reserve(self._order.space, n, wait_s, self._gone)

    def _read(self, tier: TierPlace, first: int, reservation: Reservation, claimed: list[bytes]) -> None:
        order, n = self._order, len(reservation)
        payloads, tables = self._stage.places(reservation)
        batch = Batch(
            self._space,
            np.ascontiguousarray(order.keys[first : first + n]),
            np.ascontiguousarray(order.parents[first : first + n]),
            np.zeros(n, np.uint64),
            buffers(payloads, self._space.block_bytes, read_only=False),
        )
        piece = _Piece(tier, first, batch, reservation, claimed)

        def read() -> None:
            got = np.full(n, Got.FAILED, np.uint8)
            try:
                got = tier.shelf.read(batch, tables, order.deadline)
            except TierError:
                pass  # counted by the shelf; every block of the piece could not be read
            finally:
                self._came_back(piece, got)

        piece.transfer = self._places.workers.submit(
            tier.number, order.urgency, order.said[1] & _U64, n * self._space.block_bytes, order.deadline, read
        )
        self._claims.carried(claimed, piece.transfer)
        self._pieces.append(piece)

    def _came_back(self, piece: _Piece, got: npt.NDArray[np.uint8]) -> None:
        """In the tier's thread: a piece that nobody waits for any more gives its slots back here."""
        with piece.lock:
            piece.got = got
            if piece.abandoned:
                piece.reservation.abort()

    def _abandon_all(self) -> None:
        while self._pieces:
            self._abandon(self._pieces.pop())

    def _abandon(self, piece: _Piece) -> None:
        """Give a piece up. Its slots go back now or, while a thread may still write to them, when that comes back."""
        never_ran = piece.transfer is not None and self._places.workers.cancel(piece.transfer)
        with piece.lock:
            piece.abandoned = True
            if never_ran or piece.got is not None:
                piece.reservation.abort()
        # Even if the thread hangs for ever, another tier may have these blocks.
        self._claims.drop(piece.claimed)

    # ---- what came

    def _finish_oldest(self) -> None:
        """Wait for the oldest piece, commit what is good of it, and see to what is not."""
        piece = self._pieces[0]
        while piece.transfer is not None and not piece.transfer.wait(min(_WAIT_S, self._left())):
            if self._over():
                return
            if self._better_elsewhere(piece):
                self._look_elsewhere(piece, Got.FAILED)
                return
        got = piece.got
        if got is None:
            got = np.full(len(piece), Got.FAILED, np.uint8)
        if not self._rooted and got[0] == Got.GOOD:
            self._await_root()
            return
        self._pieces.popleft()
        lacking = (got == Got.ABSENT) | (got == Got.DAMAGED)
        if lacking.any():
            self._lacks(piece.tier.number, np.ascontiguousarray(piece.batch.keys[lacking]))
        bad = got != Got.GOOD
        n = int(bad.argmax()) if bad.any() else len(piece)
        arrived = self._commit(piece, n)
        self._at += arrived
        self._moved += arrived
        self._say()
        if arrived < n:
            self._restart()
        elif n < len(piece):
            self._look_elsewhere(piece, Got(int(got[n])))
        elif arrived:
            self._avoid, self._trouble = frozenset(), (FetchEnd.ABSENT, "")

    def _await_root(self) -> None:
        """Wait a little for the blocks before `_front`."""
        parent, until = slice(self._front - 1, self._front), time.monotonic() + _WAIT_S
        while not self._rooted and not self._over() and time.monotonic() < until:
            if self._here(self._order.space, self._order.keys[parent]):
                self._take_root()
            else:
                time.sleep(_ROOT_S)

    def _better_elsewhere(self, piece: _Piece) -> bool:
        """Whether the piece's tier hangs while another has the block. One that is only slow looks the same for a while,
        so where no other has it there is nothing to do but wait."""
        now = time.monotonic()
        if now < piece.doubt_at or piece.transfer is None or not self._places.workers.overdue(piece.transfer):
            return False
        piece.doubt_at = now + _DOUBT_S
        key = self._order.keys[self._at : self._at + 1]
        found = self._places.where(self._space, key, self._order.deadline, self._avoid | {piece.tier.number})
        return bool(found.tiers[0] >= 0)

    def _commit(self, piece: _Piece, n: int) -> int:
        """Publish the first n blocks of a piece and wait until the keeper took them in. How many are in the pool."""
        order, first = self._order, piece.first
        units, generations = self._stage.slots(piece.reservation)
        batch = piece.batch.part(0, n)
        if not piece.tier.local:  # what those of this machine hold is asked of them
            self._brings(piece.tier.number, batch.keys)
        try:
            self._stage.commit(piece.reservation, batch.keys, batch.parents, batch.roots, order.said)
            self._stage.pool.flush(self._left())
            arrived = self._here(order.space, order.keys[first : first + n]) if n else 0
        finally:
            self._claims.drop(piece.claimed)
        if arrived:
            last = slice(arrived - 1, arrived)
            held = self._stage.lease(order.space, units[last], generations[last], batch.keys[last]).lease
            self._release()
            self._hold = held
        return arrived

    def _look_elsewhere(self, piece: _Piece, why: Got) -> None:
        """Block `_at` did not come from this tier: ask the others, or end."""
        self._abandon_all()
        self._next = self._at
        ends = {Got.DAMAGED: FetchEnd.DAMAGED, Got.ABSENT: FetchEnd.ABSENT, Got.FAILED: FetchEnd.READ_FAILED}
        self._trouble = (ends[why], piece.tier.name)
        moved_on = piece.first < self._at  # then it is another block's trouble than before
        self._avoid = (frozenset() if moved_on else self._avoid) | {piece.tier.number}
        self._locate()

    def _restart(self) -> None:
        """The pool did not take what was committed (its parent left, or no room for its key): look again."""
        self._abandon_all()
        self._restarts += 1
        if self._restarts > _RESTARTS:
            self._stop = FetchEnd.NO_ROOM
            return
        self._look()

    def _await_other(self, key: bytes) -> None:
        """Another fetch brings the next block: wait for it, then see what is there."""
        carrier = self._claims.carrier(key)
        if carrier is not None and self._order.urgency == Urgency.FETCH:
            self._places.workers.hurry(carrier)
        while not self._over():
            self._claims.wait(key, min(_WAIT_S, self._left()))
            if self._claims.take([key]):
                self._claims.drop([key])
                break
        if self._stop is None:
            self._look()

    # ---- the end

    def _over(self) -> bool:
        if self._stop is None and self._gone():
            self._stop = FetchEnd.CANCELLED
        if self._stop is None and self._left() <= 0:
            self._stop = FetchEnd.DEADLINE
        return self._stop is not None

    def _left(self) -> float:
        return max(0.0, self._order.deadline - time.monotonic())

    def _say(self) -> None:
        if self._rooted and self._at != self._told:
            self._told = self._at
            self._tell(self._at)

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()
            self._hold = None
