"""A pool in memory that is not coherent between hosts: keeper and writer on one, a reader that copies out on the other.

Covers what has to be written back and invalidated, in which order, and what each of it is for: publication, eviction,
the next grant, a keeper that dies. What must hold: a reader accepts only bytes that belong to its key; and whoever is
told of a block, after everything is written back, finds it. Order within the publishing host (store buffers, rings,
leases) is the other scenarios' matter. Remote leases and remote writers do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from penstock.testing.model.caches import add_line, invalidate, put, see, write_back
from penstock.testing.model.explorer import Explorer, Result
from penstock.testing.model.machine import Model, Option, Process, Program, Value, check, choose, kernel, load, own
from penstock.testing.model.pool import FREE, GRANTED, LEAVING, READY

__all__ = ["MUTATIONS", "REDUNDANT", "SCENARIOS", "Loss", "explore"]

GENERATION, STATE, KEY = range(3)
"""Fields of a record's first line."""


@dataclass(frozen=True)
class Shape:
    """What happens in a scenario. There is one slot; keys are 1 and 2."""

    first: int = 0
    """The key of the block that is in the slot at the start, 0 for none."""
    writes: tuple[int, ...] = ()
    """Keys that the writer commits, one after the other."""
    reads: int = 1
    """The key that the reader looks for."""
    told: bool = False
    """The reader waits to be told of the block, and then must find it."""
    halves: int = 1
    """Lines of a payload."""
    keeper_deaths: int = 0
    keeps: bool = False
    """A block that is to leave turns out to be leased, and stays; the reader is told of that."""


class Shared:
    """The cells of one model, by name. Compares by identity, so that programs may hold it in a local."""

    def __init__(self, shape: Shape, missing: frozenset[str]) -> None:
        self.shape = shape
        self.missing = missing
        self.model = model = Model()
        model.processes = [
            Process("keeper", partial(keeper, self), shape.keeper_deaths, restart=True),
            Process("writer", partial(writer, self)),
            Process("reader", partial(reader, self)),
        ]
        ready = READY if shape.first else FREE
        self.record = add_line(model, "RECORD", 1, ready, shape.first)
        self.directory = add_line(model, "DIRECTORY", 0, *(int(key == shape.first) for key in (1, 2)))
        self.data = tuple(add_line(model, f"DATA[{half}]", shape.first) for half in range(shape.halves))
        self.want = model.cell("WANT")
        self.granted = model.cell("GRANT_HEAD")
        self.committed = model.cell("COMMIT_HEAD")
        self.applied = model.cell("COMMIT_TAIL")
        self.told = model.cell("told")
        self.evictions_left = model.cell("evictions left", int(bool(shape.first) and not shape.keeps))
        self.keeps_left = model.cell("keeps left", int(shape.keeps))

    def has(self, missing: str) -> bool:
        return missing in self.missing


def _set_to_0(_old: Value) -> Value:
    return 0


def _set_to_1(_old: Value) -> Value:
    return 1


def _set_to_2(_old: Value) -> Value:
    return 2


_CHANGES = (_set_to_0, _set_to_1, _set_to_2)


# ---- the publishing host


def keeper(shared: Shared) -> Program:
    """Recover, then apply, evict and grant in any order."""
    yield from _recover(shared)
    while True:
        options: tuple[Option, ...] = yield from _options(shared)
        action = yield choose(*options)
        if action == "apply":
            yield from _apply(shared)
        elif action == "evict":
            yield from _evict(shared)
        elif action == "keep":
            yield from _keep(shared)
        else:
            yield from _grant(shared)
        del options, action


def _recover(shared: Shared) -> Program:
    """Repair, then write back all of it: the one before may have died between storing and writing back."""
    line = yield own(shared.record)
    _, state, key = line.cache
    del line
    granted = yield own(shared.granted)
    applied = yield own(shared.applied)
    if state == LEAVING:
        yield put(shared.record, STATE, READY)
    if state == GRANTED and granted == applied:  # stored, and never published
        yield put(shared.record, STATE, FREE)
    if state in (LEAVING, READY):
        yield put(shared.directory, key, 1)
    if not shared.has("recovery writes nothing back"):
        yield write_back(shared.record)
        yield write_back(shared.directory)


def _options(shared: Shared) -> Program:
    line = yield own(shared.record)
    granted = yield own(shared.granted)
    applied = yield own(shared.applied)
    left = yield own(shared.evictions_left)
    options: tuple[Option, ...] = (Option("apply", shared.committed, tuple(range(applied + 1))),)
    if line.cache[STATE] == READY and left:
        options += (Option("evict"),)
    keeps = yield own(shared.keeps_left)
    if line.cache[STATE] == READY and keeps:
        options += (Option("keep"),)
    if line.cache[STATE] == FREE:
        options += (Option("grant", shared.want, tuple(range(granted + 1))),)
    return options


def _evict(shared: Shared) -> Program:
    """LEAVING, nobody leases it, out of the directory, FREE. Nothing of this needs to be seen elsewhere at once."""
    yield kernel(shared.evictions_left, _set_to_0)
    yield put(shared.record, STATE, LEAVING)
    line = yield own(shared.record)
    key = line.cache[KEY]
    del line
    yield put(shared.directory, key, 0)
    yield put(shared.record, STATE, FREE)


def _keep(shared: Shared) -> Program:
    """LEAVING, somebody leases it, READY again. Memory may have seen the first and not the second."""
    yield kernel(shared.keeps_left, _set_to_0)
    yield put(shared.record, STATE, LEAVING)
    yield put(shared.record, STATE, READY)
    if not shared.has("record not written back when it stays"):
        yield write_back(shared.record)
    yield kernel(shared.told, _set_to_1)


def _grant(shared: Shared) -> Program:
    """The new generation is in memory before anybody may write to the slot."""
    line = yield own(shared.record)
    generation = line.cache[GENERATION]
    del line
    yield put(shared.record, GENERATION, generation + 1)
    yield put(shared.record, STATE, GRANTED)
    if not shared.has("record not written back before the grant"):
        yield write_back(shared.record)
    granted = yield own(shared.granted)
    yield kernel(shared.granted, _CHANGES[granted + 1])


def _apply(shared: Shared) -> Program:
    applied = yield own(shared.applied)
    key = shared.shape.writes[applied]
    line = yield own(shared.record)
    if line.cache[STATE] == GRANTED:
        yield from _publish(shared, key)
    del line
    if shared.shape.told:
        yield kernel(shared.told, _set_to_1)
    yield kernel(shared.applied, _CHANGES[applied + 1])


def _publish(shared: Shared, key: int) -> Program:
    if not shared.has("payload not written back"):
        for line in shared.data:
            yield write_back(line)
    if shared.has("READY before the record's fields"):
        yield put(shared.record, STATE, READY)
        yield put(shared.record, KEY, key)
    else:
        yield put(shared.record, KEY, key)
        yield put(shared.record, STATE, READY)
    if not shared.has("record not written back after READY"):
        yield write_back(shared.record)
    yield put(shared.directory, key, 1)
    if not shared.has("directory not written back"):
        yield write_back(shared.directory)


def writer(shared: Shared) -> Program:
    """For each key: wait for a grant, fill the slot, commit it."""
    for number, key in enumerate(shared.shape.writes):
        yield kernel(shared.want, _CHANGES[number + 1])
        yield load(shared.granted, unless=number)
        for line in shared.data:
            yield put(line, 0, key)
        yield kernel(shared.committed, _CHANGES[number + 1])


# ---- the reading host


def reader(shared: Shared) -> Program:
    """Look the key up, copy, look again; use the copy only if the record has not changed."""
    key = shared.shape.reads
    if shared.shape.told:
        yield load(shared.told, unless=0)
    accepted: bool = yield from _read(shared, key)
    if shared.shape.told:
        yield check(accepted, f"the reader was told of key {key} and does not find it")


def _read(shared: Shared, key: int) -> Program:
    entry = yield from _look(shared, shared.directory, "directory not invalidated")
    if not entry[key]:
        return False
    before = yield from _look(shared, shared.record, "record not invalidated before the copy")
    if before[STATE] != READY or before[KEY] != key:
        return False
    copied: tuple[int, ...] = ()
    for line in shared.data:
        half = yield from _look(shared, line, "payload not invalidated")
        copied += half
        del half
    if not shared.has("no second look"):
        after = yield from _look(shared, shared.record, "record not invalidated after the copy")
        if after != before:
            return False
    yield check(set(copied) == {key}, f"the reader accepted {copied} as key {key}")
    return True


def _look(shared: Shared, line: int, without: str) -> Program:
    """Invalidate and load."""
    if not shared.has(without):
        yield invalidate(line)
    answer = yield see(line)
    return answer.copy


# ---- what is explored


@dataclass(frozen=True)
class Loss:
    """A part that is missing, and the scenario in which that must show."""

    name: str
    scenario: str


SCENARIOS: dict[str, Shape] = {
    "incoherent: the block leaves while it is read": Shape(first=1, writes=(2,), keeper_deaths=1),
    "incoherent: the block comes while it is looked for": Shape(first=1, writes=(2,), reads=2, keeper_deaths=1),
    "incoherent: payloads of two lines": Shape(first=1, writes=(2,), halves=2),
    "incoherent: the reader is told": Shape(writes=(1,), told=True, keeper_deaths=1),
    "incoherent: the block stays": Shape(first=1, keeps=True, told=True, keeper_deaths=2),
}

_LEAVES, _COMES, _LINES, _TOLD, _STAYS = SCENARIOS
MUTATIONS = (
    Loss("payload not written back", _COMES),
    Loss("record not written back before the grant", _LEAVES),
    Loss("READY before the record's fields", _LEAVES),
    Loss("payload not invalidated", _COMES),
    Loss("record not invalidated after the copy", _LEAVES),
    Loss("no second look", _LEAVES),
    Loss("record not written back after READY", _TOLD),
    Loss("directory not written back", _TOLD),
    Loss("recovery writes nothing back", _TOLD),
    Loss("record not written back when it stays", _STAYS),
    Loss("directory not invalidated", _TOLD),
    Loss("record not invalidated before the copy", _TOLD),
)

REDUNDANT = (
    ("directory not invalidated", _COMES),
    ("record not invalidated before the copy", _COMES),
    ("directory not written back", _COMES),
)
"""Without these a reader misses what is there; it takes nothing for what it is not."""


def explore(scenario: str, *missing: str) -> Result:
    """Explore one scenario with some parts missing."""
    return Explorer(Shared(SCENARIOS[scenario], frozenset(missing)).model).run()
