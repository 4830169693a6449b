"""Clients as programs of the modelled machine: a leasing reader, one that copies unleased, a writer."""

from __future__ import annotations

from penstock.testing.model.keeper import one_more
from penstock.testing.model.machine import (
    Effect,
    Option,
    Program,
    Value,
    check,
    choose,
    fence,
    ghost,
    kernel,
    load,
    own,
    peek,
    sfence,
    store,
    store_nt,
)
from penstock.testing.model.pool import ABORT, COMMIT, LANE_USED, READY, Pool


def reader(pool: Pool, lane: int, key: int, rounds: int = 1) -> Program:
    """Look a key up, lease its slot, validate, read the payload, release. A failed round ends as a miss."""
    for _turn in range(rounds):  # this local is what tells the rounds apart
        found = yield from _look_up(pool, key)
        if found is not None:
            unit, generation = found
            yield from _lease_and_read(pool, lane, key, unit, generation)
        found = unit = generation = None


def copying_reader(pool: Pool, key: int) -> Program:
    """Copy without a lease, and use the copy only if the generation has not changed since before it."""
    found = yield from _look_up(pool, key)
    if found is None:
        return
    unit, generation = found
    first = yield load(pool.data[unit][0])
    second = yield load(pool.data[unit][1])
    after = yield load(pool.generation[unit])
    if after == generation or pool.has("no generation check after the copy"):
        yield check(first == second == key, f"a reader copied ({first}, {second}) as key {key}")


def _look_up(pool: Pool, key: int) -> Program:
    """(unit, generation) of a slot that was READY for the key, or None."""
    entry = yield load(pool.directory[key])
    if not entry:
        return None
    unit = entry - 1
    if pool.has("state read before generation"):
        state = yield load(pool.state[unit])
        generation = yield load(pool.generation[unit])
    else:
        generation = yield load(pool.generation[unit])
        state = yield load(pool.state[unit])
    if state != READY:
        return None
    recorded = yield load(pool.key[unit])
    if recorded != key and not pool.has("no key check"):
        return None
    return unit, generation


def _lease_and_read(pool: Pool, lane: int, key: int, unit: int, generation: int) -> Program:
    yield store(pool.lease[lane], unit + 1)
    late = pool.has("high-water mark after the fence")
    if not late:
        yield store(pool.hwm[lane], 1)
    if not pool.has("no reader fence"):
        yield fence
    if late:
        yield store(pool.hwm[lane], 1)
    valid = yield from _validate(pool, unit, generation)
    if pool.has("lock let go while reading"):
        yield kernel(pool.lock[lane], let_go)
    if valid:
        first = yield load(pool.data[unit][0])
        second = yield load(pool.data[unit][1])
        yield check(first == second == key, f"a reader with a lease read ({first}, {second}) as key {key}")
    yield store(pool.lease[lane], 0)


def _validate(pool: Pool, unit: int, generation: int) -> Program:
    if pool.has("no re-validation"):
        return True
    state = yield load(pool.state[unit])
    if state != READY and not pool.has("re-validation of the generation only"):
        return False
    if pool.has("re-validation of the state only"):
        return True
    now = yield load(pool.generation[unit])
    return now == generation


def writer(pool: Pool, lane: int, keys: tuple[int, ...], *, joins: bool = False, may_abort: bool = False) -> Program:
    """For each key: ask for a slot, take the grant, fill it, commit (or abort). `joins`: attach first."""
    if joins:
        yield from _join(pool, lane)
    epoch = yield own(pool.epoch[lane])
    for key in keys:
        unit, generation = yield from _take_grant(pool, lane)
        kind = COMMIT
        if may_abort:
            kind = yield choose(Option(COMMIT), Option(ABORT))
        if pool.has("lock let go while filling"):
            yield kernel(pool.lock[lane], let_go)
        yield store_nt(pool.data[unit][0], key)
        yield store_nt(pool.data[unit][1], key)
        if not pool.has("no sfence"):
            yield sfence
        yield from _publish(pool, lane, (unit, generation, epoch, key, kind))


def _join(pool: Pool, lane: int) -> Program:
    """Wait until the lane is free, lock its byte, and wait for the keeper's answer."""
    if not pool.has("join before reclaim"):
        yield load(pool.lane_state[lane], unless=LANE_USED)
    yield kernel(pool.lock[lane], take_lock)
    yield kernel(pool.hello[lane], say_hello)
    yield load(pool.welcome[lane], unless=0)


def take_lock(holder: Value) -> Value | None:
    return 1 if holder == 0 else None


def let_go(_held: Value) -> Value:
    return 0


def say_hello(_said: Value) -> Value:
    return 1


def _take_grant(pool: Pool, lane: int) -> Program:
    tail = yield own(pool.grant_tail[lane])
    yield store(pool.want[lane], tail + 1)
    yield load(pool.grant_head[lane], unless=tail)
    unit, generation = yield load(pool.grants[lane][tail % pool.shape.ring])
    holder = yield peek(pool.holder[unit])
    yield check(holder < 0, f"slot {unit} is granted to client {lane} while client {holder} has it")
    yield ghost((pool.holder[unit], lane))
    yield store(pool.grant_tail[lane], tail + 1)
    return unit, generation


def _publish(pool: Pool, lane: int, entry: tuple[int, ...]) -> Program:
    """Entry, then head: once the head is in memory the block is committed and the slot given up."""
    unit, _generation, _epoch, key, kind = entry
    head = yield own(pool.commit_head[lane])
    if head >= pool.shape.ring:
        yield load(pool.commit_tail[lane], unless=head - pool.shape.ring)
    given_up: Effect = ((pool.holder[unit], -1),)
    if kind == COMMIT:
        given_up += ((pool.committed[key], one_more),)
    if pool.has("commit head before its entry"):
        yield store(pool.commit_head[lane], head + 1, also=given_up)
        yield store(pool.commits[lane][head % pool.shape.ring], entry)
    else:
        yield store(pool.commits[lane][head % pool.shape.ring], entry)
        yield store(pool.commit_head[lane], head + 1, also=given_up)


def death_of(pool: Pool, lane: int) -> Effect:
    """What the kernel does when the client of a lane dies: lock and socket go, and it writes no more."""

    def no_longer(holder: Value) -> Value:
        return -1 if holder == lane else holder

    return ((pool.lock[lane], 0), (pool.hello[lane], 0), *((cell, no_longer) for cell in pool.holder))
