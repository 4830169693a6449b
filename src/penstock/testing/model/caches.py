"""Memory that two hosts share without coherence: lines, and what a publishing and a reading host may do with them.

The publishing host's processes agree with each other (its own caches are coherent); what they stored reaches the memory
line by line, whenever the cache likes, and at the latest at the fence after a write-back. The reading host keeps
copies of lines and may drop and fetch one again whenever it likes; after an invalidation and its fence it has none from
before. It never writes.

One cell holds all there is of a line, so that moving it is one step: what the publishers' cache has, what is in memory,
what the reader's cache has. A line moves as a whole; its fields are stored one at a time.

Three reductions, all exact. A line that the reader's cache does not have is one that it fetches again in the instant of
the next load, so there is always a copy and "fetch" may happen at any time. A write-back with its fence is one step:
between asking and having it done the program does nothing, and whatever else happens meanwhile may happen before. For
the same reason a write-back (or an invalidation) that no fence waits for is no step at all: the cache does the same by
itself, at any time or never.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from penstock.testing.model.machine import Model, Op, Process, Program, Value, kernel

__all__ = ["Line", "add_line", "invalidate", "put", "see", "write_back"]


class Line(NamedTuple):
    """A line's value, a tuple of fields, in each place where it is."""

    cache: tuple[int, ...]
    memory: tuple[int, ...]
    copy: tuple[int, ...]


def add_line(model: Model, name: str, *fields: int) -> int:
    """A line with these fields, the same everywhere, and what the hardware may do with it at any time."""
    cell = model.cell(name, Line(fields, fields, fields))
    model.processes.append(Process("publisher's cache", partial(_always, cell, _write_if_changed)))
    model.processes.append(Process("reader's cache", partial(_always, cell, _fetch_if_changed)))
    return cell


def _always(cell: int, change: Callable[[Value], Value | None]) -> Program:
    while True:
        yield kernel(cell, change)


def _write_if_changed(line: Line) -> Value:
    return line._replace(memory=line.cache) if line.memory != line.cache else None


def _fetch_if_changed(line: Line) -> Value:
    return line._replace(copy=line.memory) if line.copy != line.memory else None


# Programs are replayed and their operations compared: each of these changes is one function for good.


@cache
def _put(field: int, value: int) -> Callable[[Line], Value]:
    return lambda line: line._replace(cache=(*line.cache[:field], value, *line.cache[field + 1 :]))


def _written(line: Line) -> Value:
    return line._replace(memory=line.cache)


def _fetched(line: Line) -> Value:
    return line._replace(copy=line.memory)


def _as_it_is(line: Line) -> Value:
    return line


def put(cell: int, field: int, value: int) -> Op:
    """Store one field, on the publishing host."""
    return kernel(cell, _put(field, value))


def write_back(cell: int) -> Op:
    """Ask for the line to be written to memory, and wait for it."""
    return kernel(cell, _written)


def invalidate(cell: int) -> Op:
    """Ask for the reading host's copy to be dropped, and wait for it."""
    return kernel(cell, _fetched)


def see(cell: int) -> Op:
    """Load the line on the reading host: its fields are in the answer's `copy`."""
    return kernel(cell, _as_it_is)
