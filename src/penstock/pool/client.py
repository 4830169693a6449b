"""The client: everything an engine does with a pool.

Covers match, reserve, hand-over, spaces and what happens when the keeper goes and comes back. The bytes move in
`lease.py` and `reservation.py`; how a client comes to have an attachment is `attaching.py`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from penstock.errors import ConfigError, PoolClosed
from penstock.pool.attachment import Attachment
from penstock.pool.below import Below, Fetch, TierLine
from penstock.pool.context import K_COMMITTED, K_DROP, K_RUNG, K_WRITTEN_BYTES
from penstock.pool.grants import GrantStore
from penstock.pool.handles import PlacedSpace, SpaceHandle, Stored
from penstock.pool.intents import IntentWords
from penstock.pool.layout import COMMIT_BYTES, KIND_ABORT, KIND_COMMIT, KIND_SUSPECT, bytes_ahead, slot_share
from penstock.pool.lease import Handover, Lease
from penstock.pool.link import Link
from penstock.pool.reader import COUNT_BITS, COUNT_MASK, HEAD_BITS, HEAD_MASK, adopt, match
from penstock.pool.removals import Removals, is_resident
from penstock.pool.reservation import Reservation
from penstock.pool.tensors import TensorMap
from penstock.pool.wire import SpaceIs, SpaceOf
from penstock.pool.writer import RING_BIT, must_ring, publish, set_waiting, unapplied
from penstock.types import Drop, FetchEnd, Intent, Miss, Urgency

if TYPE_CHECKING:
    from penstock.identity import KeyChain, Space

__all__ = ["Pool", "SpaceHandle", "Stored"]

log = logging.getLogger("penstock.client")

# How long a wait for the keeper sleeps before it looks whether the keeper still lives.
_WAIT_SLICE_S = 0.1
# The same where the caller may want to end it.
_GIVE_UP_SLICE_S = 0.02
# Damaged blocks that are named in the log; further ones are only counted.
_MAX_TOLD = 1000

# By value; a lookup here costs a tenth of the enum's own.
_MISSES = {int(miss): miss for miss in Miss}

_live_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """An open pool. Thread-safe; leases and reservations taken from it are each for one thread at a time.

    `mode` is "attached" (a keeper serves it, other processes share it) or "embedded" (this process serves it alone).
    """

    def __init__(self, name: str, at: Attachment, link: Link, mode: Literal["attached", "embedded"]) -> None:
        self.name = name
        self.mode = mode
        self.verify = True
        """Whether gathers check checksums unless told otherwise."""
        self._at = at
        self._link = link
        self._grants = GrantStore(at)
        self._handles: dict[bytes, SpaceHandle] = {}
        self._intents = IntentWords(link)
        self._closed = False
        # Closing, and going over to another segment: one after the other.
        self._changing = threading.RLock()
        self._tiers = TierLine(name)
        self._last_reserve = 0.0
        self._damage_told: set[bytes] = set()
        self._on_close: list[weakref.finalize[..., object]] = []
        _live_pools.add(self)

    # ---- spaces

    def space(self, space: Space, label: str = "") -> SpaceHandle:
        """Register a space with the pool, or find it. Asks the keeper the first time.

        Raises ConfigError when its blocks do not fit, KeeperError when the pool takes no more spaces, NoKeeper.
        """
        from penstock.identity import root_key

        self._require_open()
        digest = space.digest()
        if digest in self._handles:
            return self._handles[digest]
        handle = SpaceHandle(
            digest, bytes(root_key(space)), space.block_bytes, space.block_tokens, space.n_segments,
            space.segment_bytes, label, space=space,
        )  # fmt: skip
        if space.segment_bytes % 64 or space.segment_bytes < 256:
            raise ConfigError(
                f"layer segments of {space.segment_bytes} bytes: use a multiple of 64 of at least 256 "
                "(more tokens in a block)"
            )
        handle.number(self._ask_for(handle))
        with self._changing:
            self._handles[digest] = handle
        return handle

    def _ask_for(self, handle: SpaceHandle) -> SpaceIs:
        return self._link.space(
            SpaceOf(
                handle.digest, handle.root, handle.block_bytes, handle.block_tokens, handle.n_segments,
                handle.segment_bytes, handle.label,
            )
        )  # fmt: skip

    # ---- reading

    def match(self, handle: SpaceHandle, keys: KeyChain, intent: Intent | None = None) -> Lease:
        """Lease the longest prefix of `keys` that is in the pool. Never raises for a miss, never waits.

        `intent` is accepted here so that callers need not change; a lookup records none yet.
        """
        at = self._at
        if at.left:
            at.clean()
        with at.lease_lock:
            # Under the lock: without it the lane may be another client's by the time it is written to.
            if at.dead is not None:
                return Lease(self, at, handle, 0, 0, at.dead)
            packed = match(at.ctx, keys.array, handle.shape)
        return Lease(
            self, at, handle, packed & HEAD_MASK, packed >> HEAD_BITS & COUNT_MASK,
            _MISSES[packed >> (HEAD_BITS + COUNT_BITS)],
        )  # fmt: skip

    def has_tiers(self, *, look: bool = False) -> bool:
        """Whether there were tiers below this pool when somebody last asked; with `look`, asks now (a system call)."""
        return self._at.dead is None and (self._tiers.look() if look else self._tiers.present)

    def may_have_tiers(self) -> bool:
        """Whether it is worth asking: False where there is nothing to ask (microseconds, and waits for nobody)."""
        return self._at.dead is None and self._tiers.expected()

    def locate(self, handle: SpaceHandle, keys: KeyChain, wait_s: float = 0.05) -> Below:
        """Where the blocks of `keys` are: how many are in the pool, and how many more could be fetched from where, by
        when. Waits at most about `wait_s`, for stores on other machines. Leases nothing, never raises."""
        at = self._at
        if at.dead is not None:
            return Below(0, why=FetchEnd.NO_TIERS)
        return self._tiers.locate(at.uuid, handle.id, keys.array, wait_s)

    def fetch(
        self,
        handle: SpaceHandle,
        keys: KeyChain,
        deadline_s: float,
        *,
        intent: Intent | None = None,
        urgency: Urgency = Urgency.FETCH,
        start: int = 0,
    ) -> Fetch:
        """Start bringing the blocks of `keys` that are not in the pool from the tiers below it; returns at once.

        It ends within `deadline_s` seconds. What did not arrive by then is left out, and the engine recomputes from
        there: `match` tells how far. A prefetch (`urgency`) goes on when the returned object is dropped. Blocks before
        `start` are the caller's to store meanwhile: up to `most_ahead` others are read at once, and published behind
        those; a prefetch cannot do that. Never raises.
        """
        at = self._at
        if at.dead is not None:
            return Fetch(self._tiers, None, 0.0, FetchEnd.NO_TIERS)
        said = self._intents.of(intent)
        start = max(0, min(int(start), len(keys) - 1))
        return self._tiers.fetch(at.uuid, handle.id, keys.array, bytes(keys.parent), deadline_s, urgency, said, start)

    def most_ahead(self, handle: SpaceHandle) -> int:
        """How many blocks of a chain are read before those that they follow are there (`fetch` with `start`)."""
        geometry = self._at.geometry
        return bytes_ahead(geometry) // slot_share(geometry, handle.block_bytes, handle.n_segments)

    def adopt(self, data: bytes) -> Lease:
        """Take a lease of one's own on the blocks of another process's lease (`Lease.handover`).

        Every slot is checked again: what changed meanwhile ends the lease there (miss CHANGED). Raises ConfigError for
        bytes that are no hand-over, of another pool, or of a space that this client has not opened.
        """
        try:
            given = msgspec.msgpack.decode(data, type=Handover)
        except msgspec.DecodeError as error:
            raise ConfigError(f"not a lease hand-over: {error}") from error
        at = self._at
        handle = self._handles.get(given.digest)
        if given.uuid != at.uuid or handle is None:
            raise ConfigError("a lease of another pool, or of a space that was not opened here; call `space` first")
        if len(given.handles) != len(given.keys) or len(given.keys) % 16:
            raise ConfigError("not a lease hand-over: its parts differ in length")
        handles = np.frombuffer(given.handles, np.int64).reshape(-1, 2).copy()
        keys = np.frombuffer(given.keys, np.uint64).reshape(-1, 2).copy()
        with at.lease_lock:
            if at.dead is not None:
                return Lease(self, at, handle, 0, 0, at.dead)
            packed = adopt(at.ctx, handles, keys, handle.shape)
        reason = Miss(packed >> (HEAD_BITS + COUNT_BITS))
        return Lease(self, at, handle, packed & HEAD_MASK, packed >> HEAD_BITS & COUNT_MASK, reason)

    def _report_damage(self, at: Attachment, unit: int, generation: int, key: bytes) -> None:
        """Ask the keeper to look at a block, and to drop it if its checksum is wrong. Says so once for each key."""
        if key not in self._damage_told and len(self._damage_told) < _MAX_TOLD:
            self._damage_told.add(key)
            log.warning("pool %s: block %s has a wrong checksum; the engine recomputes it", self.name, key.hex())
        rows = np.zeros((1, COMMIT_BYTES // 8), np.int64)
        rows[0, :3] = KIND_SUSPECT, unit, generation
        self._put(at, rows)

    def resident(self, handle: SpaceHandle, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """[n]: which of these keys, (n, 2) words in any order, are in the pool at this moment.

        Leases nothing, counts nothing. Raises PoolClosed.
        """
        self._require_open()
        with self._changing:  # a segment and the numbers that spaces have in it belong together
            at, shape = self._at, handle.shape
        return is_resident(at, shape, keys)

    def watch_removals(self, *handles: SpaceHandle) -> Removals:
        """Follow which keys of these spaces leave the pool from now on. Costs the keeper nothing, and never waits.

        For one thread at a time. Raises PoolClosed.
        """
        self._require_open()
        return Removals(self, handles)

    # ---- writing

    def reserve(
        self, handle: SpaceHandle, n: int, wait_s: float = 0.0, *, give_up: Callable[[], bool] | None = None
    ) -> Reservation:
        """Up to n slots to fill, waiting at most `wait_s` seconds for the keeper to make room. The wait ends about 20
        ms after `give_up` says so.

        Never raises for want of room: the reservation is shorter, its `drop` says why, and the difference is counted.
        """
        return self._reserve(handle, n, n, wait_s, give_up)

    def _reserve(
        self, handle: PlacedSpace, n: int, enough: int, wait_s: float, give_up: Callable[[], bool] | None
    ) -> Reservation:
        """As `reserve`, but waits only for `enough` slots."""
        grants, deadline = self._grants, time.monotonic() + wait_s
        at = grants.at
        if n < 0:
            raise ValueError(f"{n} slots")
        if at.dead is not None:
            return Reservation(self, grants, handle, np.zeros((0, 2), np.int64), _drop_of(at.dead), deadline)
        n = min(n, at.geometry.ring)
        enough = min(n, enough)
        self._last_reserve = time.monotonic()
        slots = grants.pop(handle.slot_class, n)
        # With enough in hand the keeper learns of the want at the commit: waking it costs as much as copying 512 KiB.
        if len(slots) < n:
            grants.want(handle.slot_class, n, n - len(slots))
            if must_ring(at.ctx):
                self._link.ring()
            slots = np.concatenate([slots, grants.pop(handle.slot_class, n - len(slots))])
        while len(slots) < enough and self._wait_for_keeper(at, deadline, give_up):
            self._last_reserve = time.monotonic()  # or `tidy` would take back the want of one that waits long
            slots = np.concatenate([slots, grants.pop(handle.slot_class, n - len(slots))])
        drop = Drop.NONE
        if len(slots) < enough:
            drop = Drop.NO_ROOM if self._link.alive else Drop.NO_KEEPER
            self._count(at, K_DROP + drop, enough - len(slots))
        grants.want(handle.slot_class, n, 0)
        return Reservation(self, grants, handle, slots, drop, deadline, give_up)

    def store(
        self,
        handle: SpaceHandle,
        keys: KeyChain,
        tensors: TensorMap,
        *,
        wait_s: float = 0.0,
        intent: Intent | None = None,
        give_up: Callable[[], bool] | None = None,
    ) -> Stored:
        """Reserve, copy in and commit the blocks of `keys`, from the first on, as far as there is room. `wait_s` and
        `give_up` as in `reserve`."""
        with self.reserve(handle, len(keys), wait_s, give_up=give_up) as reservation:
            n = len(reservation)
            if not n:
                return Stored(0, reservation.drop)
            if n < len(keys):
                keys, tensors = keys[:n], tensors.blocks(slice(n))
            try:
                published = reservation.commit(keys, tensors, intent=intent)
            except PoolClosed:  # by another thread, or because the segment was replaced
                return Stored(0, _drop_of(reservation._at.dead))
            drop = reservation.drop
            if published < n:
                drop = Drop.RING_FULL if reservation._at.dead is None else _drop_of(reservation._at.dead)
        return Stored(published, drop)

    def flush(self, timeout_s: float = 1.0) -> bool:
        """Wait until the keeper has taken in everything this client committed. False when the time is over first."""
        at, deadline = self._at, time.monotonic() + timeout_s
        while at.dead is None and unapplied(at.ctx):
            if not self._wait_for_keeper(at, deadline):
                return not unapplied(at.ctx)
        return at.dead is None

    def _wait_for_keeper(self, at: Attachment, deadline: float, give_up: Callable[[], bool] | None = None) -> bool:
        """Ring the keeper if it sleeps and wait until it did something. False when the time is over or it is gone."""
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not self._link.alive or at.dead is not None or (give_up is not None and give_up()):
            return False
        try:
            grants = set_waiting(at.ctx, 1)
            if must_ring(at.ctx):
                self._link.ring()
            if not grants:
                self._link.wait(min(remaining, _WAIT_SLICE_S if give_up is None else _GIVE_UP_SLICE_S))
        finally:
            set_waiting(at.ctx, 0)
        return True

    def _publish(self, reservation: Reservation, keys: KeyChain, n: int, intent: Intent | None) -> int:
        """Commit the first n slots of a reservation under the keys of a chain."""
        said = self._intents.of(intent)
        words = keys.array[:n].view(np.int64)
        parents = np.concatenate([np.frombuffer(keys.parent, np.int64).reshape(1, 2), words[: n - 1]])
        return self._publish_words(reservation, words, parents, said)

    def _publish_words(
        self,
        reservation: Reservation,
        keys: npt.NDArray[np.int64],
        parents: npt.NDArray[np.int64],
        said: Sequence[int],
    ) -> int:
        """Commit the first slots of a reservation, whose checksums are in place, under these keys, both (n, 2) words.

        `said` is the intent as `IntentWords` makes it. Slots that find no room in the ring are kept for the next one.
        """
        handle, at, n = reservation._handle, reservation._at, len(keys)
        rows = np.empty((n, COMMIT_BYTES // 8), np.int64)
        rows[:] = (KIND_COMMIT, 0, 0, at.given.epoch, 0, 0, 0, 0, handle.block_bytes, handle.id, 0, *said)
        rows[:, 1] = reservation._units[:n]
        rows[:, 2] = reservation._generations[:n]
        rows[:, 4:6] = keys
        rows[:, 6:8] = parents
        rows[:, 10] = reservation._roots[:n].view(np.int64)
        done = self._put(at, rows)
        while done < n and self._wait_for_keeper(at, reservation._deadline, reservation._give_up):
            done += self._put(at, rows[done:])
        if done < n:
            self._count(at, K_DROP + Drop.RING_FULL, n - done)
            reservation._grants.push(handle.slot_class, rows[done:, 1:3])
        reservation._grants.used(handle.slot_class, done)
        self._count(at, K_COMMITTED, done)
        self._count(at, K_WRITTEN_BYTES, done * handle.block_bytes)
        return done

    def tidy(self, idle_s: float) -> None:
        """Return unused grants if nothing was reserved for `idle_s` seconds."""
        self._at.clean()
        if time.monotonic() - self._last_reserve >= idle_s:
            self.return_idle_grants()

    def return_idle_grants(self) -> int:
        """Give the keeper back what this client was granted and did not use. Returns how many slots."""
        grants = self._grants
        at = grants.at
        slots = grants.drain()
        if not len(slots):
            return 0
        rows = np.zeros((len(slots), COMMIT_BYTES // 8), np.int64)
        rows[:, 0], rows[:, 3] = KIND_ABORT, at.given.epoch
        rows[:, 1:3] = slots[:, 1:]
        done = self._put(at, rows)
        for slot_class in np.unique(slots[done:, 0]):
            left = slots[done:]
            grants.keep(int(slot_class), left[left[:, 0] == slot_class, 1:])
        return done

    def _put(self, at: Attachment, rows: npt.NDArray[np.int64]) -> int:
        """Entries into the commit ring; rings the keeper if it sleeps. Returns how many found room."""
        rows = np.ascontiguousarray(rows)
        with at.write_lock:
            if at.dead is not None:
                return 0
            packed = publish(at.ctx, rows.ctypes.data, len(rows))
        if packed & RING_BIT:
            self._count(at, K_RUNG, 1)
            self._link.ring()
        return int(packed & (RING_BIT - 1))

    def _count(self, at: Attachment, counter: int, by: int) -> None:
        if by:
            with at.lease_lock:
                if at.dead is None:
                    at.counters()[counter] += by

    # ---- seeing inside

    def counters(self) -> dict[str, int]:
        """What this client counted: lookups, keys, hits, misses and drops by reason, bytes."""
        from penstock.pool.counting import lane_report

        return lane_report(self._at.counters())

    def held(self) -> dict[str, int]:
        """What this client holds now: leased blocks, unused grants, commits that the keeper has not taken in."""
        at = self._at
        at.clean()
        pending = 0 if at.dead is not None else int(unapplied(at.ctx))
        return {"leases": at.n_leased(), "grants": self._grants.count(), "unapplied": pending}

    # ---- life

    def replace(self, at: Attachment) -> None:
        """Go over to another segment of the same pool. Leases on the old one stay valid and keep it mapped."""
        ids: dict[bytes, SpaceIs] = {}
        while True:
            # Asked for before anything changes: the keeper may go again, or have no room for a space.
            for digest, handle in list(self._handles.items()):
                if digest not in ids:
                    ids[digest] = self._ask_for(handle)
            with self._changing:
                if self._closed:
                    raise PoolClosed(f"pool {self.name!r} was closed meanwhile")
                if len(ids) == len(self._handles):
                    # The old one ends first: with the new numbers nothing may be reserved there.
                    self._at.end()
                    for digest, handle in self._handles.items():
                        handle.number(ids[digest])
                    self._grants = GrantStore(at)
                    self._at = at
                    return

    def close(self) -> None:
        """Give everything back and leave. Idempotent.

        Leases that still stand can only be released; until they (and the arrays made from them) are gone, their blocks
        stay where they are, and the lane stays this client's.
        """
        with self._changing:
            self._closed = True
        if self._at.dead is None:
            self._at.clean()
            self.return_idle_grants()
            self.flush(0.2)
        for finalizer in self._on_close:
            finalizer()
        self._at.end()
        self._link.close()
        self._tiers.close()

    @property
    def uuid(self) -> bytes:
        """Identity of the pool's present segment, 16 bytes: clients with the same one see the same blocks."""
        return self._at.uuid

    @property
    def keeper_alive(self) -> bool:
        """Whether a keeper serves this client now. Without one reads go on, and writes end when the rings are full."""
        return self._link.alive

    @property
    def closed(self) -> bool:
        # Not just any end of the attachment: the next one may be on its way (`replace`).
        return self._closed or self._at.dead is Miss.FORKED

    def _require_open(self) -> None:
        if self.closed:
            why = (self._at.dead or Miss.CLOSED).name.lower()
            raise PoolClosed(f"pool {self.name!r} is closed here ({why}); open it again")

    def __del__(self) -> None:
        # Leases, reservations and views refer to the pool, so none of them stands: the lane can go.
        at = getattr(self, "_at", None)
        if at is not None and at.dead is None:
            at.end()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pool {self.name!r}, {'closed' if self.closed else self.mode}>"

    def _forked(self) -> None:
        # The parent's lane, lock and socket are not ours: close our copies of the descriptors, touch nothing else. Nor
        # may what runs when the pool goes away ring bells that both share.
        for finalizer in self._on_close:
            finalizer.detach()
        self._on_close.clear()
        self._changing = threading.RLock()
        self._at.forked()
        self._link.abandon()
        self._tiers.forked()


def _drop_of(miss: Miss | None) -> Drop:
    return Drop.FORKED if miss is Miss.FORKED else Drop.CLOSED


def _after_fork() -> None:
    for pool in list(_live_pools):
        pool._forked()


os.register_at_fork(after_in_child=_after_fork)
