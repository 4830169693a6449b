"""The keeper as a program of the modelled machine: recovery, then for ever apply, grant, evict, reclaim, in
any order.

It always begins with recovery, as the real one does, and every step of that can be its last. `mutations`
take parts of the protocol away; `scenarios.py` says what each of them must lead to.
"""

from __future__ import annotations

from penstock.testing.model.machine import (
    Effect,
    Option,
    Program,
    Value,
    choose,
    fence,
    ghost,
    load,
    own,
    store,
)
from penstock.testing.model.pool import ABORT, FREE, GRANTED, LANE_FREE, LANE_USED, LEAVING, READY, Pool


def one_more(count: Value) -> Value:
    return count + 1


def one_less(count: Value) -> Value:
    return count - 1


def keeper(pool: Pool) -> Program:
    """Recover, then serve for ever."""
    free: tuple[int, ...] = yield from _recover(pool)
    while True:
        options = yield from _options(pool, free)
        action, which = yield choose(*options)
        if action == "apply":
            free += yield from _apply(pool, which)
        elif action == "grant":
            yield from _grant(pool, which, free[0])
            free = free[1:]
        elif action == "evict":
            free += yield from _evict(pool, which)
        elif action == "reclaim":
            free += yield from _reclaim(pool, which)
        else:
            yield from _attach(pool, which)
        del options, action, which
        free = tuple(sorted(set(free)))


def _options(pool: Pool, free: tuple[int, ...]) -> Program:
    """What the keeper may do next; guards look at the cells that others write."""
    options: tuple[Option, ...] = ()
    grants_left = yield own(pool.grants_left)
    for lane in range(pool.shape.lanes):
        used = yield own(pool.lane_state[lane])
        if used == LANE_USED:
            tail = yield own(pool.commit_tail[lane])
            head = yield own(pool.grant_head[lane])
            options += (Option(("apply", lane), pool.commit_head[lane], tuple(range(tail + 1))),)
            proof = () if pool.has("reclaim without proof") else (1,)
            options += (Option(("reclaim", lane), pool.lock[lane], proof),)
            if free and grants_left:
                options += (Option(("grant", lane), pool.want[lane], tuple(range(head + 1))),)
        answered = yield own(pool.welcome[lane])
        if not answered:
            options += (Option(("attach", lane), pool.hello[lane], (0,)),)
    evictions_left = yield own(pool.evictions_left)
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        if state == READY and evictions_left:
            options += (Option(("evict", unit)),)
    return options


def _recover(pool: Pool) -> Program:
    """After any death: repair the directory, drain the rings, reclaim the dead, free what is unpublished."""
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        if state == LEAVING:
            yield store(pool.state[unit], FREE if pool.has("recovery frees LEAVING") else READY)
    if not pool.has("recovery leaves the directory"):
        yield from _repair_directory(pool)
    if pool.has("recovery grants first"):
        yield from _grant_early(pool)
    for lane in range(pool.shape.lanes):
        yield from _apply(pool, lane, serving=False)
    for lane in range(pool.shape.lanes):
        used = yield own(pool.lane_state[lane])
        alive = yield load(pool.lock[lane])
        if used == LANE_USED and not alive:
            yield from _reclaim(pool, lane, drain=not pool.has("drained before the proof"))
    return (yield from _free_slots(pool))


def _repair_directory(pool: Pool) -> Program:
    """Clear entries that point to nothing, insert READY records that are not listed."""
    for key in range(1, pool.shape.keys):
        entry = yield own(pool.directory[key])
        if entry:
            state = yield own(pool.state[entry - 1])
            recorded = yield own(pool.key[entry - 1])
            if state != READY or recorded != key:
                yield store(pool.directory[key], 0)
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        if state == READY:
            key = yield own(pool.key[unit])
            entry = yield own(pool.directory[key])
            if entry == 0:
                yield store(pool.directory[key], unit + 1)
            elif entry != unit + 1:
                yield store(pool.state[unit], FREE)


def _free_slots(pool: Pool) -> Program:
    """Free the grants that were never published; returns all that is FREE."""
    free: tuple[int, ...] = ()
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        if state >= GRANTED:
            _epoch, stamp = yield own(pool.owner[unit])
            head = yield own(pool.grant_head[state - GRANTED])
            unpublished = stamp >= head
            if pool.has("recovery keeps unpublished grants"):
                unpublished = False
            if pool.has("recovery frees every grant"):
                unpublished = True
            if unpublished:
                yield store(pool.state[unit], FREE)
                state = FREE
        if state == FREE:
            free += (unit,)
    return free


def _grant_early(pool: Pool) -> Program:
    """A mutation: a grant from the slots that look free, before the unpublished ones are freed."""
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        left = yield own(pool.grants_left)
        for lane in range(pool.shape.lanes):
            want = yield load(pool.want[lane])
            head = yield own(pool.grant_head[lane])
            if state == FREE and left and want > head:
                yield from _grant(pool, lane, unit)
                return


def _grant(pool: Pool, lane: int, unit: int) -> Program:
    """Give a FREE slot to a lane: the record first, then the ring, then the head."""
    yield ghost((pool.grants_left, one_less))
    head = yield own(pool.grant_head[lane])
    epoch = yield own(pool.epoch[lane])
    generation = yield own(pool.generation[unit])
    if not pool.has("no new generation on grant"):
        generation += 1
        yield store(pool.generation[unit], generation)
    late = pool.has("GRANTED after publishing")
    if not late:
        yield store(pool.owner[unit], (epoch, head))
        yield store(pool.state[unit], GRANTED + lane)
    if pool.has("grant head before its entry"):
        yield store(pool.grant_head[lane], head + 1)
    yield store(pool.grants[lane][head % pool.shape.ring], (unit, generation))
    yield store(pool.grant_head[lane], head + 1)
    if late:
        yield store(pool.owner[unit], (epoch, head))
        yield store(pool.state[unit], GRANTED + lane)


def _apply(pool: Pool, lane: int, *, serving: bool = True) -> Program:
    """Take in a lane's commits; returns the slots that became FREE."""
    tail = yield own(pool.commit_tail[lane])
    head = yield load(pool.commit_head[lane])
    if head == tail:
        return ()
    if pool.has("tail before applying"):
        yield store(pool.commit_tail[lane], head)
    freed: tuple[int, ...] = ()
    for sequence in range(tail, head):
        entry = yield load(pool.commits[lane][sequence % pool.shape.ring])
        freed += yield from _apply_entry(pool, lane, entry)
    if serving and pool.has("eviction and grant before the tail"):
        freed = yield from _reuse_early(pool, freed)
    yield fence
    yield store(pool.commit_tail[lane], head)
    return freed


def _apply_entry(pool: Pool, lane: int, entry: tuple[int, ...]) -> Program:
    unit, generation, epoch, key, kind = entry
    lane_epoch = yield own(pool.epoch[lane])
    state = yield own(pool.state[unit])
    recorded_generation = yield own(pool.generation[unit])
    is_same = generation == recorded_generation or pool.has("no generation check")
    if epoch != lane_epoch and not pool.has("no epoch check"):
        return ()
    if (state != GRANTED + lane and not pool.has("no owner check")) or not is_same:
        return ()  # a READY record of this generation and key was applied before a crash; all else is refused
    listed = yield own(pool.directory[key])
    if kind == ABORT:
        yield store(pool.state[unit], FREE)
        return (unit,)
    if listed and not pool.has("no duplicate check"):
        yield store(pool.state[unit], FREE, also=((pool.settled[key], one_more),))
        return (unit,)
    applied: Effect = ((pool.settled[key], one_more),)
    if pool.has("READY before the record's fields"):
        yield store(pool.state[unit], READY, also=applied)
        yield store(pool.key[unit], key)
    else:
        yield store(pool.key[unit], key)
        yield store(pool.state[unit], READY, also=applied)
    yield store(pool.directory[key], unit + 1)
    return ()


def _reuse_early(pool: Pool, freed: tuple[int, ...]) -> Program:
    """A mutation: evict what was just applied and grant it again while the tail is not yet stored."""
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        left = yield own(pool.evictions_left)
        if state == READY and left:
            freed += yield from _evict(pool, unit)
    left = yield own(pool.grants_left)
    for lane in range(pool.shape.lanes):
        want = yield load(pool.want[lane])
        head = yield own(pool.grant_head[lane])
        if freed and left and want > head:
            yield from _grant(pool, lane, freed[0])
            return freed[1:]
    return freed


def _evict(pool: Pool, unit: int) -> Program:
    """LEAVING, full fence, look at every lease; returns the slot if nobody held it."""
    yield ghost((pool.evictions_left, one_less))
    yield store(pool.state[unit], LEAVING)
    if not pool.has("no keeper fence"):
        yield fence
    held = False
    for lane in pool.shape.reader_lanes if not pool.has("no lease scan") else ():
        bound = yield load(pool.hwm[lane])
        lease = (yield load(pool.lease[lane])) if bound else 0
        held = held or lease == unit + 1
        del bound, lease
    if held:
        yield store(pool.state[unit], READY)
        return ()
    key = yield own(pool.key[unit])
    yield store(pool.directory[key], 0)
    yield store(pool.state[unit], FREE)
    return (unit,)


def _reclaim(pool: Pool, lane: int, *, drain: bool = True) -> Program:
    """After the proof of death: drain, take back, and open the lane to the next client under a new epoch."""
    freed: tuple[int, ...] = ()
    if drain and not pool.has("reclaim without draining"):
        freed = yield from _apply(pool, lane, serving=False)
    for unit in range(pool.shape.slots):
        state = yield own(pool.state[unit])
        if state == GRANTED + lane:
            yield store(pool.state[unit], FREE)
            freed += (unit,)
    # Everything of the lane from COMMIT_TAIL on is zeroed in the order of addresses; a death in between is
    # survived because entries that are read again are refused by their generation.
    yield store(pool.lease[lane], 0)
    epoch = yield own(pool.epoch[lane])
    for cell in (pool.commit_tail[lane], pool.grant_head[lane], pool.commit_head[lane]):
        yield store(cell, 0)
    if not pool.has("old grants stay in the ring"):
        yield store(pool.grant_tail[lane], 0)
    for cell in (pool.hwm[lane], pool.want[lane], pool.welcome[lane]):
        yield store(cell, 0)
    yield store(pool.epoch[lane], epoch + 1)
    yield store(pool.lane_state[lane], LANE_FREE)
    return freed


def _attach(pool: Pool, lane: int) -> Program:
    """Answer a client that holds the lane's lock: the lane is USED before the client hears of it."""
    yield store(pool.lane_state[lane], LANE_USED)
    epoch = yield own(pool.epoch[lane])
    yield store(pool.welcome[lane], epoch)
