"""Who wakes whom: the keeper asleep with work in a ring, and a client asleep with a grant in its ring.

Sleeps have no timeout here: where the model comes to rest with work undone, a real process would wait for
its timeout. An eventfd is a cell that only system calls touch. The two ways to ring that are compared:

- `flag`: the keeper sets SLEEPING, whoever rings clears it first. It cannot survive a client that is stopped
  (or dies) between the two: the others see a cleared flag and leave the keeper asleep.
- `number`: the keeper alone writes SLEEPING, a new number for each sleep and 0 while awake; a client
  remembers the last number it rang for and rings at most once for each. Nobody relies on somebody else's
  ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from penstock.testing.model.machine import (
    Memory,
    Model,
    Process,
    Program,
    Value,
    fence,
    kernel,
    load,
    own,
    store,
)


@dataclass(frozen=True)
class Shape:
    writers: int = 2
    commits: int = 1
    """Commits by each writer."""
    waiters: int = 0
    """Further clients, each of which asks for grants and waits for them."""
    grants: int = 1
    """Grants that each waiter asks for, one after the other."""
    stops: int = 0
    """Whether the first writer may be stopped for ever at any point (for the others, the same as killed)."""
    keeper_deaths: int = 0
    style: str = "number"


class Bells:
    """Cells of one sleep model. Compares by identity."""

    def __init__(self, shape: Shape, mutations: frozenset[str]) -> None:
        self.shape = shape
        self.mutations = mutations
        self.model = model = Model()
        self.head = tuple(model.cell(f"COMMIT_HEAD[{i}]") for i in range(shape.writers))
        self.tail = tuple(model.cell(f"COMMIT_TAIL[{i}]") for i in range(shape.writers))
        self.want = tuple(model.cell(f"WANT[{i}]") for i in range(shape.waiters))
        self.grant_head = tuple(model.cell(f"GRANT_HEAD[{i}]") for i in range(shape.waiters))
        self.waiting = tuple(model.cell(f"WAITING[{i}]") for i in range(shape.waiters))
        self.client_bell = tuple(model.cell(f"eventfd of waiter {i}") for i in range(shape.waiters))
        self.sleeping = model.cell("SLEEPING")
        self.bell = model.cell("eventfd of the keeper")
        model.at_rest = self.all_served
        self.keeper_epoch = model.cell("KEEPER_EPOCH")
        # Its eventfd dies with the keeper. That a client gets the new one late is left out: the keeper serves
        # all rings when a client attaches again.
        on_death = ((self.bell, 0),)
        keeper_process = Process("keeper", lambda: keeper(self), shape.keeper_deaths, restart=True, on_death=on_death)
        model.processes = [keeper_process]
        for i in range(shape.writers):
            stops = shape.stops if i == 0 else 0
            model.processes.append(Process(f"writer {i}", partial(writer, self, i), stops))
        for i in range(shape.waiters):
            model.processes.append(Process(f"waiter {i}", partial(waiter, self, i)))

    def has(self, mutation: str) -> bool:
        return mutation in self.mutations

    def all_served(self, memory: Memory, status: tuple[str, ...]) -> str | None:
        """Where nothing moves, nothing may be left to do for those who still run."""
        for i in range(self.shape.writers):
            if memory[self.head[i]] != memory[self.tail[i]] and status[1 + i] != "dead":
                return f"the keeper sleeps while lane {i} has a commit, and nobody will ring"
        for i in range(self.shape.waiters):
            if memory[self.want[i]] != memory[self.grant_head[i]]:
                return f"the keeper sleeps while client {i} wants a grant, and nobody will ring"
            if status[1 + self.shape.writers + i] == "running":
                return f"client {i} sleeps while a grant is in its ring, and nobody will ring"
        return None


def ring_up(_rung: Value) -> Value:
    return 1


def wait_for_bell(rung: Value) -> Value | None:
    return 0 if rung else None


def keeper(bells: Bells) -> Program:
    """Serve, announce the sleep, look again, sleep."""
    epoch = yield own(bells.keeper_epoch)
    yield store(bells.keeper_epoch, epoch + 1)
    number = 0 if bells.has("sleep numbers start again") else 1000 * epoch
    while True:
        yield from _serve(bells)
        number += 1
        yield store(bells.sleeping, number if bells.shape.style == "number" else 1)
        if not bells.has("no keeper fence before sleeping"):
            yield fence
        idle = True
        if not bells.has("no second look by the keeper"):
            idle = yield from _is_idle(bells)
        if not idle and bells.has("grants of the second look not rung for"):
            yield from _grant_silently(bells)
        if idle:
            yield kernel(bells.bell, wait_for_bell)
        if bells.shape.style == "number":
            yield store(bells.sleeping, 0)
        del idle


def _is_idle(bells: Bells) -> Program:
    for lane in range(bells.shape.writers):
        head = yield load(bells.head[lane])
        tail = yield own(bells.tail[lane])
        if head != tail:
            return False
    for lane in range(bells.shape.waiters):
        want = yield load(bells.want[lane])
        head = yield own(bells.grant_head[lane])
        if want != head:
            return False
    return True


def _grant_silently(bells: Bells) -> Program:
    """A mutation: what the second look finds is granted at once, and nobody is rung for it."""
    for lane in range(bells.shape.waiters):
        want = yield load(bells.want[lane])
        yield store(bells.grant_head[lane], want)


def _serve(bells: Bells) -> Program:
    for lane in range(bells.shape.writers):
        head = yield load(bells.head[lane])
        yield store(bells.tail[lane], head)
    for lane in range(bells.shape.waiters):
        want = yield load(bells.want[lane])
        head = yield own(bells.grant_head[lane])
        if want != head:
            yield store(bells.grant_head[lane], want)
            if not bells.has("no keeper fence after a grant"):
                yield fence
            waiting = yield load(bells.waiting[lane])
            if waiting:
                yield kernel(bells.client_bell[lane], ring_up)


def _ring_keeper(bells: Bells, last_rung: int) -> Program:
    """After publishing: fence, look whether the keeper sleeps, ring. Returns the number rung for last."""
    if not bells.has("no writer fence"):
        yield fence
    sleeping = yield load(bells.sleeping)
    if not sleeping:
        return last_rung
    if bells.shape.style == "number":
        if sleeping != last_rung:
            yield kernel(bells.bell, ring_up)
        return sleeping
    if not bells.has("flag cleared after ringing"):
        yield store(bells.sleeping, 0)
    yield kernel(bells.bell, ring_up)
    if bells.has("flag cleared after ringing"):
        yield store(bells.sleeping, 0)
    return 0


def writer(bells: Bells, lane: int) -> Program:
    """Commit a few times, ringing as needed."""
    last_rung = 0
    for sequence in range(bells.shape.commits):
        yield store(bells.head[lane], sequence + 1)
        last_rung = yield from _ring_keeper(bells, last_rung)


def waiter(bells: Bells, lane: int) -> Program:
    """Ask for a grant, ring the keeper, announce the wait, look again, sleep until it is there."""
    last_rung = 0
    for sequence in range(bells.shape.grants):
        yield store(bells.want[lane], sequence + 1)
        if not bells.has("no doorbell after WANT"):
            last_rung = yield from _ring_keeper(bells, last_rung)
        while True:
            yield store(bells.waiting[lane], 1)
            if not bells.has("no client fence before sleeping"):
                yield fence
            head = sequence
            if not bells.has("no second look by the client"):
                head = yield load(bells.grant_head[lane])
            if head == sequence:
                yield kernel(bells.client_bell[lane], wait_for_bell)
            yield store(bells.waiting[lane], 0)
            head = yield load(bells.grant_head[lane])
            if head != sequence:
                break
        del head
