"""A machine with x86-TSO store buffers whose processes can be killed at any step: its memory, operations and
programs.

The search through its states is `explorer.py`; what the processes do is in the sibling files. Not covered:
memory weaker than TSO (there the acquire and release operations that a test finds in the assembly must do)
and liveness beyond "no state in which nothing moves is a wrong one".

A program is a generator that yields operations and is sent what they return.

Memory, after Owens, Sarkar and Sewell, "A better x86 memory model: x86-TSO" (TPHOLs 2009): each process has
a FIFO store buffer that drains one store at a time, whenever it likes; loads look there first; a full fence
waits until it is empty. Non-temporal stores wait in a second buffer that drains in any order and that only
`sfence` or a full fence waits for. A system call waits for both: the kernel's locked instructions do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Value = Any
"""What a cell holds: an int or a tuple of ints, always hashable."""
Memory = tuple[Value, ...]
Effect = tuple[tuple[int, Value | Callable[[Value], Value]], ...]
"""Ghost cells that change in the same instant: (cell, new value) or (cell, old value -> new value)."""

LOAD, STORE, STORE_NT, FENCE, SFENCE, OWN, PEEK, GHOST, CHECK, CHOOSE, KERNEL, END = range(12)


class Op(NamedTuple):
    """One operation of a program; made by the functions below."""

    kind: int
    cell: int = -1
    value: Value = None
    also: Effect = ()


Program = Generator[Op, Value, Any]


def load(cell: int, unless: Value = None) -> Op:
    """Read a cell that others write. With `unless` it waits: not enabled while the cell holds that value."""
    return Op(LOAD, cell, unless)


def own(cell: int) -> Op:
    """Read a cell that no other process writes while this one lives: not a step."""
    return Op(OWN, cell)


def store(cell: int, value: Value, also: Effect = ()) -> Op:
    """Put a store into the buffer; `also` changes ghosts in the moment it reaches memory."""
    return Op(STORE, cell, value, also)


def store_nt(cell: int, value: Value) -> Op:
    """A non-temporal store: drains in any order."""
    return Op(STORE_NT, cell, value)


fence = Op(FENCE)
sfence = Op(SFENCE)


def peek(cell: int) -> Op:
    """Look at memory as it is now, past all buffers: for ghosts and checks, never for the protocol itself."""
    return Op(PEEK, cell)


def ghost(*also: tuple[int, Value | Callable[[Value], Value]]) -> Op:
    """Change ghost cells now."""
    return Op(GHOST, also=also)


def check(holds: bool, complaint: str) -> Op:
    """Report `complaint` with its trace if the condition does not hold."""
    return Op(CHECK, int(holds), complaint)


class Option(NamedTuple):
    """One way to go on: taken only while `cell` (if any) holds none of `unless`."""

    result: Value
    cell: int = -1
    unless: tuple[Value, ...] = ()


def choose(*options: Option) -> Op:
    """Go on in one of several ways, whichever are enabled: the explorer tries all of them."""
    return Op(CHOOSE, value=options)


def kernel(cell: int, change: Callable[[Value], Value | None]) -> Op:
    """A system call: waits for the own buffers, then changes the cell at once.

    Returns the old value; not enabled while `change` returns None (the call blocks).
    """
    return Op(KERNEL, cell, change)


@dataclass(frozen=True)
class Process:
    name: str
    program: Callable[[], Program]
    deaths: int = 0
    """How often it may be killed."""
    restart: bool = False
    """Whether it is started again (by a step of its own) after each death."""
    on_death: Effect = ()
    """What the kernel and the ghosts do in the instant of its death: its locks become free."""


@dataclass(eq=False)
class Model:
    """Cells with names and first values, processes, and what must hold."""

    names: list[str] = field(default_factory=list)
    initial: list[Value] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    invariant: Callable[[Memory], str | None] = lambda _memory: None
    """Looks at memory in every state; a complaint or None."""
    at_rest: Callable[[Memory, tuple[str, ...]], str | None] = lambda _memory, _status: None
    """Looks at memory and each process's status (running, done, dead) where only deaths can happen."""

    def cell(self, name: str, value: Value = 0) -> int:
        self.names.append(name)
        self.initial.append(value)
        return len(self.names) - 1
