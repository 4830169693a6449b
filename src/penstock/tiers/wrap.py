"""Wrappers around a tier: slower, faulty, recorded. Each is a tier itself and changes one thing.

`Slow` models a slower device; users reach it with `latency=` and `bandwidth=` in any tier's address. `Faulty` injects
what devices and networks do, by a plan, so that a run can be repeated. `Recorded` keeps the list of calls. Wrappers
stack; none keeps blocks.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.errors import TierTimeout, TierUnavailable
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier, Usage

__all__ = ["Call", "Fault", "FaultKind", "Faulty", "Plan", "Recorded", "Slow", "at", "at_random"]


class _Wrapped(Tier):
    """Hands everything on."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier.name)
        self.tier = tier
        self.kind, self.local, self.shared, self.durable = tier.kind, tier.local, tier.shared, tier.durable

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        return self.tier.holds(space, keys, deadline)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        return self.tier.write(batch, deadline)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        return self.tier.read(batch, deadline)

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        self.tier.remove(space, keys, deadline)

    def usage(self) -> Usage:
        return self.tier.usage()

    def close(self) -> None:
        self.tier.close()

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        self.tier.touch(space, keys)

    def counters(self) -> dict[str, int]:
        return self.tier.counters()


class Slow(_Wrapped):
    """A device that answers `latency_s` later and moves `bytes_per_s` (None: as many as it gives), all calls together.

    Reads wait for the bytes of blocks that are HERE. Asking what is there costs the latency only where the tier would
    do I/O for it. A call that cannot be done by its deadline waits until then, raises TierTimeout and takes nothing of
    the bandwidth; a write then stored nothing.
    """

    def __init__(
        self,
        tier: Tier,
        latency_s: float,
        bytes_per_s: float | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(tier)
        self._latency_s, self._bytes_per_s = latency_s, bytes_per_s
        self._sleep, self._clock = sleep, clock
        self._free_at = float("-inf")
        self._lock = threading.Lock()

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        if not self.local:
            self._pass(0, self._clock(), deadline)
        return self.tier.holds(space, keys, deadline)

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        self._pass(len(batch) * batch.space.block_bytes, self._clock(), deadline)
        return self.tier.write(batch, deadline)

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        began = self._clock()
        found = self.tier.read(batch, deadline)
        self._pass(int((found == Found.HERE).sum()) * batch.space.block_bytes, began, deadline)
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        if not self.local:
            self._pass(0, self._clock(), deadline)
        self.tier.remove(space, keys, deadline)

    def _pass(self, n_bytes: int, began: float, deadline: float) -> None:
        """Wait as long as the modelled device takes for this many bytes, after those that came before."""
        with self._lock:
            start = max(began, self._free_at)
            free_at = start + (n_bytes / self._bytes_per_s if self._bytes_per_s else 0.0)
            done = free_at + self._latency_s
            late = done > deadline
            if n_bytes and not late:
                self._free_at = free_at
        left = (min(done, deadline) if late else done) - self._clock()
        if left > 0:
            self._sleep(left)
        if late:
            raise TierTimeout(f"tier {self.name}, slowed by its options, cannot do this by the deadline")


class FaultKind(Enum):
    """What goes wrong in a call."""

    ERROR = "error"
    """TierUnavailable, and nothing was done."""
    LATE = "late"
    """TierTimeout: of a write, although it was done; of another call, and nothing was done."""
    SHORT = "short"
    """The blocks FAILED; what was read of them is in half of the buffer."""
    FLIP = "flip"
    """One bit of what a read returns is wrong."""
    ROOT = "root"
    """One bit of the root that a read returns is wrong."""
    SWAP = "swap"
    """A read returns the next block's bytes and root, of those that it found."""
    LOST = "lost"
    """A write answers STORED and stores nothing."""
    HIDDEN = "hidden"
    """Blocks that are there are ABSENT."""
    UNSURE = "unsure"
    """Blocks that are not there FAILED."""
    HANG = "hang"
    """The call stands still, whatever its deadline, until `Faulty.release` or `close`; then it goes on."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault; `blocks` are places in the batch (none: all of it), `bit` counts from the payload's first."""

    kind: FaultKind
    blocks: tuple[int, ...] = ()
    bit: int = 0


Plan = Callable[[str, int], Fault | None]
"""From a method's name (`holds`, `write`, `read`, `remove`) and how many of its calls came before, to its fault."""


def at(faults: Mapping[tuple[str, int], Fault]) -> Plan:
    """These faults at these calls."""
    return lambda call, nth: faults.get((call, nth))


def at_random(seed: int, share: float, kinds: Sequence[FaultKind], most_blocks: int = 4) -> Plan:
    """A fault in this share of the calls, of one of these kinds; the same for the same seed, whatever the threads do.

    It concerns up to `most_blocks` blocks of the first 16, or the whole batch.
    """

    def plan(call: str, nth: int) -> Fault | None:
        dice = random.Random(f"{seed} {call} {nth}")
        if dice.random() >= share:
            return None
        blocks = tuple(dice.sample(range(16), dice.randint(0, most_blocks)))
        return Fault(dice.choice(kinds), blocks, dice.randrange(1 << 20))

    return plan


class Faulty(_Wrapped):
    """A tier of which a plan says what goes wrong in which call. A kind that a method does not know does nothing."""

    def __init__(self, tier: Tier, plan: Plan) -> None:
        super().__init__(tier)
        self._plan = plan
        self._calls: dict[str, int] = {}
        self._lock = threading.Lock()
        self._released = threading.Event()
        self.hanging = threading.Event()
        """Set while or after a call hangs: what a test waits for."""

    def release(self) -> None:
        """What hangs goes on, and nothing hangs any more."""
        self._released.set()

    def close(self) -> None:
        self.release()
        self.tier.close()

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        fault = self._next("holds")
        held = self.tier.holds(space, keys, deadline)
        if fault and fault.kind is FaultKind.HIDDEN:
            held[_chosen(fault, len(keys))] = False
        return held

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        fault = self._next("write")
        if fault is None or fault.kind not in (FaultKind.LOST, FaultKind.SHORT, FaultKind.LATE):
            return self.tier.write(batch, deadline)
        if fault.kind is FaultKind.LATE:
            self.tier.write(batch, deadline)
            raise TierTimeout(f"tier {self.name}: injected, after a write that was done")
        chosen = _chosen(fault, len(batch))
        placed = np.full(len(batch), Placed.STORED if fault.kind is FaultKind.LOST else Placed.FAILED, np.uint8)
        rest = np.setdiff1d(np.arange(len(batch)), chosen)
        if len(rest):
            placed[rest] = self.tier.write(_pick(batch, rest), deadline)
        return placed

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        fault = self._next("read")
        found = self.tier.read(batch, deadline)
        if fault:
            self._spoil(batch, found, fault)
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        self._next("remove")
        self.tier.remove(space, keys, deadline)

    def _next(self, call: str) -> Fault | None:
        with self._lock:
            nth = self._calls.get(call, 0)
            self._calls[call] = nth + 1
        fault = self._plan(call, nth)
        if fault is None:
            return None
        if fault.kind is FaultKind.ERROR:
            raise TierUnavailable(f"tier {self.name}: injected, {call} {nth}")
        if fault.kind is FaultKind.LATE and call != "write":
            raise TierTimeout(f"tier {self.name}: injected, {call} {nth}")
        if fault.kind is FaultKind.HANG:
            self.hanging.set()
            self._released.wait()
        return fault

    @staticmethod
    def _spoil(batch: Batch, found: npt.NDArray[np.uint8], fault: Fault) -> None:
        chosen = _chosen(fault, len(batch))
        here = chosen[found[chosen] == Found.HERE]
        match fault.kind:
            case FaultKind.FLIP:
                for i in here:
                    batch.payloads[i][fault.bit // 8 % batch.space.block_bytes] ^= 1 << fault.bit % 8
            case FaultKind.ROOT:
                batch.roots[here] ^= np.uint64(1) << np.uint64(fault.bit % 64)
            case FaultKind.SWAP if len(here) > 1:
                payloads = [bytes(batch.payloads[i]) for i in np.roll(here, -1)]
                batch.roots[here] = batch.roots[np.roll(here, -1)]
                for i, payload in zip(here, payloads, strict=True):
                    batch.payloads[i][:] = payload
            case FaultKind.SHORT:
                found[chosen] = Found.FAILED
                for i in here:
                    half = batch.space.block_bytes // 2
                    batch.payloads[i][half:] = bytes(batch.space.block_bytes - half)
            case FaultKind.HIDDEN:
                found[chosen] = Found.ABSENT
            case FaultKind.UNSURE:
                found[chosen[found[chosen] == Found.ABSENT]] = Found.FAILED


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a recorded tier."""

    method: str
    n_blocks: int
    n_bytes: int
    """Of all its blocks for `write`, of those that were HERE for `read`, otherwise 0."""
    answers: tuple[int, ...]
    """What became of each block; none where there is no answer."""
    error: str
    """The class of what it raised, or nothing."""


class Recorded(_Wrapped):
    """A tier whose calls are listed in `calls`, in the order in which they ended."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self.calls: list[Call] = []

    def holds(self, space: BlockSpace, keys: Keys, deadline: float) -> npt.NDArray[np.bool_]:
        held: npt.NDArray[np.bool_] = self._note("holds", len(keys), lambda: self.tier.holds(space, keys, deadline))
        return held

    def write(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        size = batch.space.block_bytes
        placed: npt.NDArray[np.uint8] = self._note(
            "write", len(batch), lambda: self.tier.write(batch, deadline), lambda _: len(batch) * size
        )
        return placed

    def read(self, batch: Batch, deadline: float) -> npt.NDArray[np.uint8]:
        size = batch.space.block_bytes
        found: npt.NDArray[np.uint8] = self._note(
            "read", len(batch), lambda: self.tier.read(batch, deadline),
            lambda answers: answers.count(Found.HERE) * size,
        )  # fmt: skip
        return found

    def remove(self, space: BlockSpace, keys: Keys, deadline: float) -> None:
        self._note("remove", len(keys), lambda: self.tier.remove(space, keys, deadline))

    def touch(self, space: BlockSpace, keys: Keys) -> None:
        self._note("touch", len(keys), lambda: self.tier.touch(space, keys))

    def _note(
        self,
        method: str,
        n_blocks: int,
        call: Callable[[], Any],
        moved: Callable[[tuple[int, ...]], int] = lambda _: 0,
    ) -> Any:
        answers: tuple[int, ...] = ()
        error = ""
        try:
            answer = call()
            answers = () if answer is None else tuple(int(each) for each in answer)
            return answer
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            self.calls.append(Call(method, n_blocks, 0 if error else moved(answers), answers, error))


def _chosen(fault: Fault, n: int) -> npt.NDArray[np.intp]:
    """The places of a batch of n that a fault concerns."""
    return np.array([i for i in fault.blocks if i < n] if fault.blocks else range(n), np.intp)


def _pick(batch: Batch, places: npt.NDArray[np.intp]) -> Batch:
    return Batch(
        batch.space, batch.keys[places], batch.parents[places], batch.roots[places],
        [batch.payloads[i] for i in places],
    )  # fmt: skip
