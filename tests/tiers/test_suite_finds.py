"""The suite of tiers passes an honest tier, and finds what is wrong with every one of many broken ones."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.errors import TierError, TierTimeout, TierUnavailable
from penstock.testing.dict_tier import DictTier, Kept
from penstock.testing.tier_machine import TierMachine
from penstock.testing.tiers import TierSuite
from penstock.tiers.base import Batch, BlockSpace, Found, Placed, Usage

Name = tuple[bytes, bytes]


class TestDictTier(TierSuite):
    survives_reopen = True

    def open_tier(self) -> DictTier:
        return DictTier()

    def reopen(self, tier: DictTier) -> DictTier:  # type: ignore[override]
        return DictTier(content=tier.content)

    def open_small(self, capacity_bytes: int) -> DictTier:
        return DictTier(capacity_bytes=capacity_bytes)


# ---- broken ones: each differs from the honest tier in the one thing that its name says


class ReturnsAnothersBytes(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        found = super()._fill(batch, i, name)
        if found is Found.HERE and i == 7:
            batch.payloads[i][:] = batch.payloads[i - 1]
        return found


class OneBitIsWrong(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        found = super()._fill(batch, i, name)
        if found is Found.HERE:
            batch.payloads[i][-1] ^= 1
        return found


class ForgetsTheRoot(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        placed = super()._store(batch, i, name)
        if placed is Placed.STORED:
            self.content[name] = Kept(self.content[name].payload, 0)
        return placed


class DoesNotFillTheRoot(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        before = batch.roots[i]
        found = super()._fill(batch, i, name)
        batch.roots[i] = before
        return found


class KeepsTheOldRoot(DictTier):
    """Of a block that was removed and came again with other bytes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.roots: dict[Name, int] = {}

    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        placed = super()._store(batch, i, name)
        if placed is Placed.STORED:
            self.content[name] = Kept(self.content[name].payload, self.roots.setdefault(name, int(batch.roots[i])))
        return placed


class SaysFailedForAbsent(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        return Found.FAILED if name not in self.content else super()._fill(batch, i, name)


class SaysAbsentWhenItCouldNotRead(DictTier):
    """Every second read of a block meets an error and swallows it."""

    reads = 0

    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        self.reads += 1
        return Found.ABSENT if self.reads % 8 == 0 else super()._fill(batch, i, name)


class WritesBeyondTheBuffer(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        found = super()._fill(batch, i, name)
        end = np.frombuffer(batch.payloads[i], np.uint8).ctypes.data + -(-batch.space.block_bytes // 4096) * 4096
        (memory_at(end, 8))[:] = 0
        return found


class WritesBeforeTheBuffer(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        found = super()._fill(batch, i, name)
        memory_at(np.frombuffer(batch.payloads[i], np.uint8).ctypes.data - 1, 1)[:] = 0
        return found


class ClearsTheRoomOfWhatItWrites(DictTier):
    """Sets the bytes behind a payload to zero, to write whole sectors."""

    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        size = batch.space.block_bytes
        start = np.frombuffer(batch.payloads[i], np.uint8).ctypes.data
        memory_at(start + size, -size % 4096)[:] = 0
        return super()._store(batch, i, name)


class ChangesThePayload(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        placed = super()._store(batch, i, name)
        memory_at(np.frombuffer(batch.payloads[i], np.uint8).ctypes.data, 1)[:] ^= 1
        return placed


class NeedsWritablePayloads(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        if batch.payloads[i].readonly:
            return Placed.FAILED
        return super()._store(batch, i, name)


class ChangesTheKeys(DictTier):
    def read(self, batch: Batch, deadline: float) -> Any:
        found = super().read(batch, deadline)
        batch.keys.byteswap(inplace=True)
        return found


class KeepsTheCallersBuffer(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        placed = super()._store(batch, i, name)
        if placed is Placed.STORED:
            self.content[name] = Kept(batch.payloads[i], int(batch.roots[i]))  # type: ignore[arg-type]
        return placed


class HandsOutItsOwnMemory(DictTier):
    """Keeps what it read into as its copy of the block."""

    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        found = super()._fill(batch, i, name)
        if found is Found.HERE:
            self.content[name] = Kept(batch.payloads[i], int(batch.roots[i]))  # type: ignore[arg-type]
        return found


class IgnoresTheSpace(DictTier):
    @staticmethod
    def _names(space: BlockSpace, keys: Any) -> list[Name]:
        return [(b"", key.tobytes()) for key in keys]


class CutsKeysAtZero(DictTier):
    @staticmethod
    def _names(space: BlockSpace, keys: Any) -> list[Name]:
        return [(space.digest, key.tobytes().split(b"\0")[0]) for key in keys]


class IgnoresCase(DictTier):
    @staticmethod
    def _names(space: BlockSpace, keys: Any) -> list[Name]:
        return [(space.digest, key.tobytes().lower()) for key in keys]


class DecodesKeys(DictTier):
    @staticmethod
    def _names(space: BlockSpace, keys: Any) -> list[Name]:
        return [(space.digest, key.tobytes().decode("utf-8", "replace").encode()) for key in keys]


class KeepsHalfOfTheKey(DictTier):
    @staticmethod
    def _names(space: BlockSpace, keys: Any) -> list[Name]:
        return [(space.digest, key.tobytes()[8:]) for key in keys]


class HangsPastTheDeadline(DictTier):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.released = threading.Event()

    def read(self, batch: Batch, deadline: float) -> Any:
        if deadline < time.monotonic():
            self.released.wait(60)
        return super().read(batch, deadline)

    def close(self) -> None:
        self.released.set()
        super().close()


class LateIsUnavailable(DictTier):
    def holds(self, space: BlockSpace, keys: Any, deadline: float) -> Any:
        if deadline < time.monotonic():
            raise TierUnavailable("late")
        return super().holds(space, keys, deadline)


class LateWritesAreTorn(DictTier):
    """A write that met its deadline leaves a block that is not whole."""

    def write(self, batch: Batch, deadline: float) -> Any:
        placed = super().write(batch, deadline)
        if deadline < time.monotonic():
            name = self._names(batch.space, batch.keys)[0]
            self.content[name] = Kept(bytes(len(batch.payloads[0])), int(batch.roots[0]))
            raise TierTimeout("late")
        return placed


class CountsBlocksTwice(DictTier):
    def usage(self) -> Usage:
        usage = super().usage()
        return Usage(usage.capacity_bytes, usage.used_bytes, 2 * (usage.blocks or 0))


class NeverCountsDown(DictTier):
    most = 0

    def usage(self) -> Usage:
        usage = super().usage()
        self.most = max(self.most, usage.used_bytes or 0)
        return Usage(usage.capacity_bytes, self.most, usage.blocks)


class CountsNothing(DictTier):
    def usage(self) -> Usage:
        return Usage(self.capacity_bytes, 0, len(self.content))


class GrowsPastItsSize(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        capacity, self.capacity_bytes = self.capacity_bytes, 1 << 40
        placed = super()._store(batch, i, name)
        self.capacity_bytes = capacity
        return placed


class SaysStoredWhenFull(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        if self._used + batch.space.block_bytes > self.capacity_bytes:
            return Placed.STORED
        return super()._store(batch, i, name)


class OneScratchForAllThreads(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        self.scratch = batch
        self._lock.release()
        time.sleep(0.0001)
        self._lock.acquire()
        return super()._store(self.scratch, i, name)


class ShowsABlockBeforeItsRoot(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        placed = super()._store(batch, i, name)
        if placed is Placed.STORED:
            whole = self.content[name]
            self.content[name] = Kept(whole.payload, 0)
            self._lock.release()
            time.sleep(0.0001)
            self._lock.acquire()
            if name in self.content:
                self.content[name] = whole
        return placed


class PresentWithoutStoring(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        return Placed.PRESENT if batch.space.block_bytes == 4160 else super()._store(batch, i, name)


class StoredWithoutStoring(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        return Placed.STORED if i == 20 else super()._store(batch, i, name)


class StoresAgain(DictTier):
    """Never says PRESENT, though it promised to."""

    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        self._forget(name)
        return super()._store(batch, i, name)


class HereWithoutFilling(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        return Found.HERE if name in self.content else Found.ABSENT


class FillsHalf(DictTier):
    def _fill(self, batch: Batch, i: int, name: Name) -> Found:
        kept = self.content.get(name)
        if kept is None:
            return Found.ABSENT
        half = len(kept.payload) // 2
        batch.payloads[i][:half] = kept.payload[:half]
        batch.roots[i] = kept.root
        return Found.HERE


class DropsTheOddTail(DictTier):
    """Keeps whole sectors of 512 bytes only."""

    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        placed = super()._store(batch, i, name)
        payload = self.content[name].payload
        whole = len(payload) // 512 * 512
        self.content[name] = Kept(payload[:whole] + bytes(len(payload) - whole), self.content[name].root)
        return placed


class StaysOpen(DictTier):
    def close(self) -> None:
        pass


class RaisesTheWrongErrorWhenClosed(DictTier):
    def _check_open(self) -> None:
        if self._closed:
            raise TierError("closed")


class CannotBeClosedTwice(DictTier):
    def close(self) -> None:
        self._check_open()
        super().close()


class RaisesForWhatIsAbsent(DictTier):
    def _forget(self, name: Name) -> None:
        if name not in self.content:
            raise TierUnavailable("no such block")
        super()._forget(name)


class RemovesNothing(DictTier):
    def remove(self, space: BlockSpace, keys: Any, deadline: float) -> None:
        self._check_open()


class RemovesTheSpace(DictTier):
    def remove(self, space: BlockSpace, keys: Any, deadline: float) -> None:
        for digest, key in list(self.content):
            if digest == space.digest:
                self._forget((digest, key))


class ReadsOnlyTheFirst(DictTier):
    def read(self, batch: Batch, deadline: float) -> Any:
        found = super().read(batch, deadline)
        found[1:] = Found.ABSENT
        return found


class StopsAtTheFirstAbsent(DictTier):
    def read(self, batch: Batch, deadline: float) -> Any:
        found = super().read(batch, deadline)
        found[np.cumsum(found == Found.ABSENT) > 0] = Found.ABSENT
        return found


class AnswersInTheOrderOfKeys(DictTier):
    def holds(self, space: BlockSpace, keys: Any, deadline: float) -> Any:
        return super().holds(space, keys[np.lexsort(keys.T)], deadline)


class HoldsIsAGuess(DictTier):
    def holds(self, space: BlockSpace, keys: Any, deadline: float) -> Any:
        return super().holds(space, keys, deadline) | np.bool_(len(self.content) > 0)


class AnswersWithAList(DictTier):
    def read(self, batch: Batch, deadline: float) -> Any:
        return super().read(batch, deadline).astype(np.int64)


class CannotDoEmptyBatches(DictTier):
    def write(self, batch: Batch, deadline: float) -> Any:
        if not len(batch):
            raise IndexError(0)
        return super().write(batch, deadline)


class WantsTheParentFirst(DictTier):
    def _store(self, batch: Batch, i: int, name: Name) -> Placed:
        parent = batch.parents[i].tobytes()
        if parent != batch.space.root and (name[0], parent) not in self.content:
            return Placed.FAILED
        return super()._store(batch, i, name)


class ComesBackEmpty(DictTier):
    def __init__(self, content: OrderedDict[Name, Kept] | None = None, **options: Any) -> None:
        super().__init__(**options)


class BringsBackTheRemoved(DictTier):
    """What is removed is only hidden, and there again after it was opened again."""

    def __init__(self, content: OrderedDict[Name, Kept] | None = None, **options: Any) -> None:
        super().__init__(content=content, **options)
        self.content.update(getattr(content, "hidden", {}))

    def _forget(self, name: Name) -> None:
        kept = self.content.get(name)
        super()._forget(name)
        if kept:
            hiding = Hiding(self.content)
            hiding.hidden = {**getattr(self.content, "hidden", {}), name: kept}
            self.content = hiding


class Hiding(OrderedDict[Name, Kept]):
    hidden: dict[Name, Kept]


class TouchingRemoves(DictTier):
    def touch(self, space: BlockSpace, keys: Any) -> None:
        for name in self._names(space, keys):
            self._forget(name)


class CountsInWords(DictTier):
    def counters(self) -> Any:
        return {"evictions": "none"}


BROKEN = [each for each in DictTier.__subclasses__() if each.__module__ == __name__]


def memory_at(address: int, size: int) -> Any:
    """The bytes at an address, writable whatever view of them was given out."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def calls(suite: TierSuite) -> list[tuple[str, Callable[[Any], None]]]:
    """Every test of the suite, once per parameter set; the long one last."""
    found = []
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        takes_tier = "tier" in inspect.signature(test).parameters
        for values in [{mark.args[0]: value} for mark in marks for value in mark.args[1]] or [{}]:
            found.append((name, lambda tier, t=test, v=values, with_tier=takes_tier: t(*[tier] * with_tier, **v)))
    return sorted(found, key=lambda each: each[0] == "test_against_the_model_in_any_order")


def suite_of(broken: type[DictTier]) -> TierSuite:
    class Suite(TierSuite):
        survives_reopen = True
        patience_s = 0.5 if broken is HangsPastTheDeadline else 10.0
        examples = 5

        def open_tier(self) -> DictTier:
            return broken()

        def reopen(self, tier: DictTier) -> DictTier:  # type: ignore[override]
            return broken(content=tier.content)

        def open_small(self, capacity_bytes: int) -> DictTier:
            return broken(capacity_bytes=capacity_bytes)

    return Suite()


def found_by(broken: type[DictTier]) -> str | None:
    """The first test that this tier fails."""
    for name, call in calls(suite_of(broken)):
        tier = broken()
        try:
            call(tier)
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - whatever it is, the test failed
            return name
        finally:
            with contextlib.suppress(TierError):
                tier.close()
    return None


def test_the_honest_tier_passes_the_way_the_broken_ones_are_run() -> None:
    assert found_by(DictTier) is None
    assert len({name for name, _ in calls(suite_of(DictTier))}) >= 22


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_it_is_found(broken: type[DictTier]) -> None:
    assert found_by(broken) is not None


@pytest.mark.parametrize(
    "broken",
    [KeepsTheOldRoot, IgnoresTheSpace, RemovesTheSpace, HandsOutItsOwnMemory, ComesBackEmpty],
    ids=lambda broken: broken.__name__,
)
def test_the_model_alone_finds_it(broken: type[DictTier]) -> None:
    machine = type("Machine", (TierMachine,), {"suite": suite_of(broken)})
    once = settings(
        max_examples=TierSuite.examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate,),
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=once)


def test_none_of_them_was_lost() -> None:
    assert len(BROKEN) == 53
