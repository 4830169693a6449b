"""A tier as the mover uses it: what comes back is verified, what happens is counted, and a broken tier is left alone.

Covers the check of every block that a tier returns (checksum table and root are computed from the bytes, `docs/
formats.md`), the removal of damaged ones, counters, measured times, and the pause after a failure (a circuit breaker:
M. Nygard, "Release It!", 2nd ed., section 5.2). Does not cover what is read or written when (`core/tiering.py`), nor
threads (`runtime/mover/`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from penstock.errors import TierError, TierTimeout, TierUnavailable
from penstock.pool.copies import seal
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier

__all__ = ["COUNTERS", "Got", "Shelf"]

log = logging.getLogger("penstock.tiers")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
FAIR_S = 0.05
"""A call that had less time than this and was late says nothing about the tier."""
SAMPLES, LOGGED_KEYS = 256, 1024

COUNTERS = (
    "reads", "read_bytes", "good", "absent", "failed", "damaged", "remove_failed", "writes", "written_bytes", "stored",
    "present", "no_room", "write_failed", "timeouts", "unavailable", "left_alone",
)  # fmt: skip
"""Calls: reads, writes, timeouts, unavailable (both raised by the tier), left_alone (not made, the tier is down),
remove_failed (a damaged block could not be removed). Blocks: good, absent, failed, damaged; stored, present, no_room,
write_failed. Bytes: read_bytes (of good and damaged blocks), written_bytes (of stored ones)."""


class Got(IntEnum):
    """What became of a block that was to be read, once it was verified."""

    GOOD = 0
    """The bytes are those that were written under this key; the table, where one was wanted, is in place."""
    ABSENT = 1
    FAILED = 2
    """It may be there, and could not be read."""
    DAMAGED = 3
    """What came is not what was written; it was removed from the tier."""


class Shelf:
    """A tier, its verification and its health. Every method may be called by several threads at once."""

    def __init__(self, tier: Tier, clock: Callable[[], float] = time.monotonic) -> None:
        self.tier = tier
        self._clock = clock
        self._lock = threading.Lock()
        self._health = _Health(tier.name, clock)
        self._counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._samples: deque[tuple[int, float]] = deque(maxlen=SAMPLES)
        self._read_bytes = 0
        self._logged: OrderedDict[bytes, None] = OrderedDict()

    @property
    def up(self) -> bool:
        """Whether a call would reach the tier now; while it is down, one may try each time that a pause is over."""
        return self._health.open_to_calls

    @property
    def why(self) -> str:
        """What failed last, of a tier that has not worked again since; otherwise nothing."""
        return self._health.why

    def counters(self) -> dict[str, int]:
        """Everything in `COUNTERS`, since the start."""
        with self._lock:
            return dict(self._counts)

    def samples(self) -> list[tuple[int, float]]:
        """(bytes, seconds with verification) of each read that brought blocks since the last call, up to `SAMPLES`.

        The bytes are its own and those of other reads that came while it lasted: that is what the time was for. It is
        exact for a device that serves one after the other, and right on average for one that shares itself out.
        """
        with self._lock:
            drained = list(self._samples)
            self._samples.clear()
            return drained

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        """(n,): `Tier.holds`. Raises TierError; TierUnavailable at once, without asking, while the tier is down."""
        # What a local tier remembers says nothing about its device.
        with self._call(deadline, proves=not self.tier.local):
            return self.tier.holds(space, keys, deadline)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Placed`: `Tier.write`. Raises as `holds` does."""
        with self._call(deadline) as call:
            placed = self.tier.write(batch, deadline)
            call.failed_wholly = bool(len(batch)) and bool((placed == Placed.FAILED).all())
        amounts = {
            "writes": 1,
            "written_bytes": int((placed == Placed.STORED).sum()) * batch.space.block_bytes,
            "stored": int((placed == Placed.STORED).sum()),
            "present": int((placed == Placed.PRESENT).sum()),
            "no_room": int((placed == Placed.NO_ROOM).sum()),
            "write_failed": int((placed == Placed.FAILED).sum()),
        }
        self._count(amounts)
        return placed

    def read(self, batch: Batch, tables: npt.NDArray[np.int64] | None, deadline: float) -> npt.NDArray[np.uint8]:
        """(n,) of `Got`: read, and verify what came.

        `tables`: the address, a multiple of 8, of each block's checksum table (`n_segments` words), which is filled in
        for what is GOOD and has any content for the rest. Damaged blocks are removed from the tier. Raises as `holds`
        does.
        """
        with self._lock:
            began, before = self._clock(), self._read_bytes
        with self._call(deadline) as call:
            found = self.tier.read(batch, deadline)
            # Whatever is not one of the known answers counts as a failure.
            got = np.full(len(batch), Got.FAILED, np.uint8)
            got[found == Found.HERE] = Got.GOOD
            got[found == Found.ABSENT] = Got.ABSENT
            call.failed_wholly = bool(len(batch)) and bool((got == Got.FAILED).all())
        here = np.flatnonzero(got == Got.GOOD)
        if len(here):
            got[here[_roots(batch, here, tables) != batch.roots[here]]] = Got.DAMAGED
        self._note_read(batch, got, len(here), began, before)
        self._drop(batch, np.flatnonzero(got == Got.DAMAGED), deadline)
        return got

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        """`Tier.remove`. Raises as `holds` does."""
        with self._call(deadline, proves=not self.tier.local):
            self.tier.remove(space, keys, deadline)

    # ---- what every call goes through

    @contextmanager
    def _call(self, deadline: float, proves: bool = True) -> Iterator[_Outcome]:
        """Refuse while the tier is down; otherwise note how the call ended."""
        fair = deadline - self._clock() >= FAIR_S
        try:
            trying = self._health.enter(proves)
        except TierUnavailable:
            self._count({"left_alone": 1})
            raise
        outcome = _Outcome()
        # What is no TierError is a defect of the tier; it, too, must not leave the trial open.
        why = "a call ended with an error that is not a tier's"
        try:
            yield outcome
            why = "no block of a call could be read or written" if outcome.failed_wholly else ""
        except TierTimeout as error:
            self._count({"timeouts": 1})
            why = str(error) if fair else _UNKNOWN
            raise
        except TierError as error:
            self._count({"unavailable": 1})
            why = str(error)
            raise
        finally:
            self._health.leave(trying, proves, why)

    def _count(self, amounts: dict[str, int]) -> None:
        with self._lock:
            self._counts.update(amounts)

    def _note_read(self, batch: Batch, got: npt.NDArray[np.uint8], n_here: int, began: float, before: int) -> None:
        n_bytes = n_here * batch.space.block_bytes
        amounts = {"reads": 1, "read_bytes": n_bytes} | {each.name.lower(): int((got == each).sum()) for each in Got}
        self._count(amounts)
        if n_here:
            with self._lock:
                self._read_bytes += n_bytes
                self._samples.append((self._read_bytes - before, self._clock() - began))

    # ---- damaged blocks

    def _drop(self, batch: Batch, damaged: npt.NDArray[np.intp], deadline: float) -> None:
        if not len(damaged):
            return
        keys = np.ascontiguousarray(batch.keys[damaged])
        removed = "removed"
        try:
            self.tier.remove(batch.space, keys, deadline)
        except TierError as error:
            self._count({"remove_failed": 1})
            removed = f"not removed ({error})"
        for key in keys:
            if self._first_time(key.tobytes()):
                log.warning("tier %s: block %s came back damaged; %s", self.tier.name, key.tobytes().hex(), removed)

    def _first_time(self, key: bytes) -> bool:
        """Whether this block is new among the last `LOGGED_KEYS` damaged ones."""
        with self._lock:
            new = key not in self._logged
            self._logged[key] = None
            self._logged.move_to_end(key)
            if len(self._logged) > LOGGED_KEYS:
                self._logged.popitem(last=False)
            return new


_UNKNOWN = "?"
"""How a call ended that says nothing about the tier."""


class _Outcome:
    failed_wholly = False


class _Health:
    """Down from a failure until a call works again; while down, one call at a time is let through after each pause.

    Pauses grow from FIRST_PAUSE_S to LONGEST_PAUSE_S.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self._lock = threading.Lock()
        self._pause_s = 0.0
        self._until = 0.0
        self._trying = False
        self.why = ""

    @property
    def open_to_calls(self) -> bool:
        with self._lock:
            return not self.why or (not self._trying and self._clock() >= self._until)

    def enter(self, proves: bool) -> bool:
        """Whether the call that begins is the trial of a tier that is down. Raises TierUnavailable where it may not."""
        with self._lock:
            if not self.why:
                return False
            left = self._until - self._clock()
            if left > 0 or self._trying:
                when = f"tried again in {left:.1f} s" if left > 0 else "being tried"
                raise TierUnavailable(f"tier {self._name} is down ({when}): {self.why}")
            self._trying = proves
            return proves

    def leave(self, trying: bool, proves: bool, why: str) -> None:
        """How it ended: `why` it failed, nothing if it did not, `_UNKNOWN` if that cannot be told."""
        with self._lock:
            if trying:
                self._trying = False
            if why == _UNKNOWN:
                return
            if why and (trying or not self.why):
                self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                self._until = self._clock() + self._pause_s
                self.why = why
            elif not why and proves and (trying or not self.why):
                self._pause_s = 0.0
                self.why = ""


def _roots(batch: Batch, which: npt.NDArray[np.intp], tables: npt.NDArray[np.int64] | None) -> npt.NDArray[np.uint64]:
    """The roots over the bytes of these blocks, whose checksum tables are written to `tables` or nowhere."""
    space, n = batch.space, len(which)
    scratch = np.empty((n, space.n_segments), np.uint64)
    if tables is None:
        at = scratch.ctypes.data + np.arange(n, dtype=np.int64) * scratch.strides[0]
    else:
        at = np.ascontiguousarray(tables[which], np.int64)
    payloads = [np.frombuffer(batch.payloads[i], np.uint8) for i in which]
    addresses = np.array([payload.ctypes.data for payload in payloads], np.int64)
    roots = np.empty(n, np.uint64)
    segments = np.arange(space.n_segments, dtype=np.int64)
    keys = np.ascontiguousarray(batch.keys[which], np.uint64)
    seal(n, addresses, segments, space.segment_bytes, space.n_segments, at, keys, roots)
    return roots
