"""What is explored: the scenarios, and for each part of the protocol a mutation that takes it away.

`python -m penstock.testing.model` explores all of it and prints a table; with a mutation's name it prints
the trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.testing.model import sleep
from penstock.testing.model.clients import copying_reader, death_of, reader, writer
from penstock.testing.model.explorer import Explorer, Result
from penstock.testing.model.keeper import keeper
from penstock.testing.model.machine import Model, Process
from penstock.testing.model.pool import Pool, Shape

Build = Callable[[frozenset[str]], Model]


@dataclass(frozen=True)
class Mutation:
    """A part of the protocol that is missing, and where that must show."""

    name: str
    scenario: str
    needs_buffers: bool = False
    """Invisible under sequential consistency: only a machine with store buffers shows it."""
    behind: str = ""
    """A second part that must be missing too: with that one in place the first alone does no harm."""


def lease(mutations: frozenset[str], *, rounds: int = 1, deaths: int = 0, reader_deaths: int = 0) -> Model:
    """One slot with key 1: a reader of key 1, a keeper that evicts it, a writer to refill it with key 2."""
    pool = Pool(Shape(slots=1, lanes=2, keys=3, grants=1, evictions=2, ready=(1,), reader_lanes=(1,)), mutations)
    pool.model.processes = [
        Process("keeper", lambda: keeper(pool), deaths, restart=True),
        Process("writer", lambda: writer(pool, 0, (2,))),
        Process("reader", lambda: reader(pool, 1, 1, rounds), reader_deaths, on_death=death_of(pool, 1)),
    ]
    return pool.model


def two_readers(mutations: frozenset[str]) -> Model:
    """The same with a reader of the old key, a reader of the new one, and one that copies without a lease."""
    pool = Pool(Shape(slots=1, lanes=3, keys=3, grants=1, evictions=2, ready=(1,), reader_lanes=(1, 2)), mutations)
    pool.model.processes = [
        Process("keeper", lambda: keeper(pool)),
        Process("writer", lambda: writer(pool, 0, (2,))),
        Process("old reader", lambda: reader(pool, 1, 1)),
        Process("new reader", lambda: reader(pool, 2, 2)),
        Process("copying reader", lambda: copying_reader(pool, 1)),
    ]
    return pool.model


def copying(mutations: frozenset[str]) -> Model:
    """A reader without a lease, under eviction, refilling and a keeper that dies twice."""
    pool = Pool(Shape(slots=1, lanes=1, keys=3, grants=2, evictions=2, ready=(1,)), mutations)
    pool.model.processes = [
        Process("keeper", lambda: keeper(pool), 2, restart=True),
        Process("writer", lambda: writer(pool, 0, (2, 1))),
        Process("copying reader", lambda: copying_reader(pool, 1)),
    ]
    return pool.model


def two_writers(mutations: frozenset[str], *, slots: int = 1, same_key: bool = False, deaths: int = 2) -> Model:
    """Two writers and few slots; the keeper may die twice and the first writer once."""
    pool = Pool(Shape(slots=slots, lanes=2, keys=3, grants=3, evictions=1), mutations)
    pool.model.processes = [
        Process("keeper", lambda: keeper(pool), deaths, restart=True),
        Process("writer 0", lambda: writer(pool, 0, (1,)), 1, on_death=death_of(pool, 0)),
        Process("writer 1", lambda: writer(pool, 1, (1,) if same_key else (2,))),
    ]
    return pool.model


def one_writer(mutations: frozenset[str], *, ring: int = 1, evictions: int = 2, may_abort: bool = False) -> Model:
    """One writer, three blocks through rings that wrap around, two slots; the keeper may die twice."""
    shape = Shape(slots=2, lanes=1, keys=4, ring=ring, grants=4, evictions=evictions)
    pool = Pool(shape, mutations)
    pool.model.processes = [
        Process("keeper", lambda: keeper(pool), 2, restart=True),
        Process("writer", lambda: writer(pool, 0, (1, 2, 3), may_abort=may_abort)),
    ]
    return pool.model


def successor(mutations: frozenset[str]) -> Model:
    """A writer that may die at any point, and another that gets its lane; the keeper may die twice."""
    pool = Pool(Shape(slots=2, lanes=1, keys=3, grants=3, evictions=1), mutations)
    pool.model.processes = [
        Process("keeper", lambda: keeper(pool), 2, restart=True),
        Process("writer", lambda: writer(pool, 0, (1,)), 1, on_death=death_of(pool, 0)),
        Process("successor", lambda: writer(pool, 0, (2,), joins=True)),
    ]
    return pool.model


def bells(mutations: frozenset[str], **shape: int | str) -> Model:
    return sleep.Bells(sleep.Shape(**shape), mutations).model  # type: ignore[arg-type]


SCENARIOS: dict[str, Build] = {
    "lease": lease,
    "lease twice, keeper and reader die": lambda m: lease(m, rounds=2, deaths=2, reader_deaths=1),
    "two readers and a copying one": two_readers,
    "copying reader": copying,
    "two writers, one slot": two_writers,
    "two writers, two slots": lambda m: two_writers(m, slots=2, deaths=1),
    "two writers, one key": lambda m: two_writers(m, slots=2, same_key=True, deaths=1),
    "one writer, wrapping rings": one_writer,
    "one writer, commits in batches, no eviction": lambda m: one_writer(m, ring=2, evictions=0),
    "one writer that may abort": lambda m: one_writer(m, may_abort=True),
    "lane reuse": successor,
    "sleep, two writers": lambda m: bells(m, writers=2, commits=2, stops=1),
    "sleep, a writer and a waiter": lambda m: bells(m, writers=1, waiters=1, grants=2),
    "sleep, the keeper dies": lambda m: bells(m, writers=1, commits=2, keeper_deaths=1),
    "sleep, a flag that clients clear": lambda m: bells(m, writers=2, commits=2, style="flag"),
    "sleep, a flag that a stopped client cleared": lambda m: bells(m, writers=2, commits=2, stops=1, style="flag"),
}

UNSOUND = {"sleep, a flag that a stopped client cleared"}
"""Designs that were considered and must fail: kept because they say why the protocol is not simpler."""

MUTATIONS = (
    Mutation("no reader fence", "lease", needs_buffers=True),
    Mutation("no keeper fence", "lease", needs_buffers=True),
    Mutation("no re-validation", "lease"),
    Mutation("no lease scan", "lease"),
    Mutation("state read before generation", "lease"),
    Mutation("high-water mark after the fence", "lease", needs_buffers=True),
    Mutation("re-validation of the generation only", "lease"),
    Mutation("re-validation of the state only", "lease"),
    Mutation("no key check", "lease"),
    Mutation("recovery frees LEAVING", "lease twice, keeper and reader die"),
    Mutation("reclaim without proof", "lease"),
    Mutation("lock let go while reading", "lease"),
    Mutation("lock let go while filling", "two writers, one slot"),
    Mutation("no generation check after the copy", "copying reader"),
    Mutation("no sfence", "lease", needs_buffers=True),
    Mutation("no new generation on grant", "lease"),
    Mutation("GRANTED after publishing", "two writers, one slot"),
    Mutation("grant head before its entry", "two writers, one slot"),
    Mutation("commit head before its entry", "two writers, one slot"),
    Mutation("READY before the record's fields", "two writers, one slot"),
    Mutation("tail before applying", "two writers, one slot"),
    Mutation("recovery grants first", "two writers, two slots"),
    Mutation("recovery keeps unpublished grants", "two writers, one slot"),
    Mutation("recovery frees every grant", "two writers, one slot"),
    Mutation("recovery leaves the directory", "two writers, one slot"),
    Mutation("reclaim without draining", "two writers, one slot"),
    Mutation("drained before the proof", "two writers, one slot"),
    Mutation("no owner check", "two writers, one slot"),
    Mutation("no duplicate check", "two writers, one key"),
    Mutation("old grants stay in the ring", "lane reuse"),
    Mutation("join before reclaim", "lane reuse"),
    Mutation("no keeper fence before sleeping", "sleep, two writers", needs_buffers=True),
    Mutation("no second look by the keeper", "sleep, two writers"),
    Mutation("no writer fence", "sleep, two writers", needs_buffers=True),
    Mutation("flag cleared after ringing", "sleep, a flag that clients clear"),
    Mutation("no doorbell after WANT", "sleep, a writer and a waiter"),
    Mutation("grants of the second look not rung for", "sleep, a writer and a waiter"),
    Mutation("sleep numbers start again", "sleep, the keeper dies"),
    Mutation("no keeper fence after a grant", "sleep, a writer and a waiter", needs_buffers=True),
    Mutation("no client fence before sleeping", "sleep, a writer and a waiter", needs_buffers=True),
    Mutation("no second look by the client", "sleep, a writer and a waiter"),
    Mutation(
        "eviction and grant before the tail",
        "one writer, wrapping rings",
        behind="no new generation on grant",
    ),
    Mutation("no generation check", "one writer, wrapping rings", behind="eviction and grant before the tail"),
)

REDUNDANT = (
    ("no epoch check", "lane reuse"),
    ("no generation check", "lane reuse"),
    ("no generation check", "one writer, wrapping rings"),
    ("eviction and grant before the tail", "one writer, wrapping rings"),
)
"""Parts that alone could be missing here without harm: they stand behind others."""


def explore(scenario: str, *mutations: str, sequential: bool = False) -> Result:
    """Explore one scenario with some parts of the protocol missing."""
    return Explorer(SCENARIOS[scenario](frozenset(mutations)), sequential=sequential).run()
