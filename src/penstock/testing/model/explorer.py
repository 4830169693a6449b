"""Exhaustive search through the states of a modelled machine.

The state of a process is where its generators stand and what their locals hold, so two histories that lead
to the same place are one state. For that every local must be hashable, and a `yield` must stand alone on the
right of an assignment (a half-evaluated expression would be hidden from the comparison).
`Explorer(merge=False)` identifies processes by their whole history instead, which is slower and trusts
nothing: a test compares both.

Reductions, all exact: a store, a fence that need not wait and a load of a cell that no other process writes
happen together with the step before them, because nobody else can tell. Death therefore throws away what is
still buffered: to have died with a store unissued and to have it thrown away is the same for everybody else,
and the stores that a real process has issued before it dies are the ones that drained first. A process that
is stopped (SIGSTOP) is one that is not scheduled, which any interleaving may do for as long as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

from penstock.testing.model.machine import (
    CHECK,
    CHOOSE,
    END,
    FENCE,
    GHOST,
    KERNEL,
    LOAD,
    OWN,
    PEEK,
    SFENCE,
    STORE,
    STORE_NT,
    Effect,
    Memory,
    Model,
    Op,
    Program,
    Value,
)


class Proc(NamedTuple):
    """A process within a state: where it stands, store buffer, non-temporal stores, deaths left."""

    node: int
    buffer: tuple[tuple[int, Value, Effect], ...]
    streaming: tuple[tuple[int, Value], ...]
    deaths: int


class State(NamedTuple):
    memory: Memory
    procs: tuple[Proc, ...]


@dataclass(frozen=True)
class Result:
    states: int
    transitions: int
    seconds: float
    complaint: str | None
    trace: list[str]

    def __str__(self) -> str:
        head = f"{self.states} states, {self.transitions} transitions, {self.seconds:.1f} s: "
        if self.complaint is None:
            return head + "holds"
        return head + self.complaint + "".join(f"\n  {i + 1:3} {line}" for i, line in enumerate(self.trace))


class Violation(Exception):
    """A check failed on this path; caught by the explorer."""


class SearchTooLarge(Exception):
    """The state limit was reached: the model says nothing. Make it smaller or raise the limit."""


class Programs:
    """The nodes that one process can stand at: operation and successors by result, found by replay."""

    def __init__(self, start: Callable[[], Program], merge: bool) -> None:
        self._start = start
        self._merge = merge
        self.ops: list[Op] = []
        self.edges: list[dict[Value, int]] = []
        self._histories: list[tuple[Value, ...]] = []
        self._places: dict[Hashable, int] = {}
        self.first = self._node(())

    def after(self, node: int, result: Value) -> int:
        """The node that follows when the operation at `node` returned `result`."""
        known = self.edges[node].get(result)
        if known is None:
            known = self.edges[node][result] = self._node((*self._histories[node], result))
        return known

    def _node(self, history: tuple[Value, ...]) -> int:
        program = self._start()
        try:
            op = next(program)
            for result in history:
                op = program.send(result)
            place: Hashable = _place_of(program) if self._merge else history
        except StopIteration:
            op, place = Op(END), "end"
        program.close()
        node = self._places.setdefault(place, len(self.ops))
        if node == len(self.ops):
            self.ops.append(op)
            self.edges.append({})
            self._histories.append(history)
        elif self.ops[node] != op:
            raise AssertionError(f"two histories meet at {place} but go on with {self.ops[node]} and {op}")
        return node


def _place_of(program: Any) -> Hashable:
    place = []
    while program is not None:
        frame = program.gi_frame
        place.append((frame.f_code, frame.f_lasti, tuple(sorted(frame.f_locals.items()))))
        program = program.gi_yieldfrom
    return tuple(place)


DEAD = -1


class Explorer:
    """Breadth-first search through every state of a model; the first violation found has the shortest trace.

    `sequential` makes stores reach memory before their process does anything else (no store buffers).
    """

    def __init__(self, model: Model, *, sequential: bool = False, merge: bool = True, limit: int = 3_000_000) -> None:
        self._model = model
        self._sequential = sequential
        self._limit = limit
        self._programs = [Programs(process.program, merge) for process in model.processes]
        self._log: list[str] | None = None

    def run(self) -> Result:
        """Explore until a violation or the end. Raises SearchTooLarge at the limit."""
        started = perf_counter()
        first, complaint = self._first_state()
        parents: dict[State, State | None] = {first: None}
        frontier, transitions = [first], 0
        while frontier and complaint is None:
            following: list[State] = []
            for state in frontier:
                successors, complaint = self._expand(state)
                transitions += len(successors)
                for successor in successors:
                    if successor not in parents:
                        parents[successor] = state
                        following.append(successor)
                if complaint is not None:
                    return self._result(parents, transitions, started, complaint, state)
            frontier = following
            if len(parents) > self._limit:
                raise SearchTooLarge(f"more than {self._limit} states")
        return self._result(parents, transitions, started, complaint, first)

    def _first_state(self) -> tuple[State, str | None]:
        memory = list(self._model.initial)
        procs = [Proc(p.first, (), (), q.deaths) for p, q in zip(self._programs, self._model.processes, strict=True)]
        try:
            for index in range(len(procs)):
                self._settle(index, memory, procs)
        except Violation as violation:
            return State(tuple(memory), tuple(procs)), str(violation)
        return State(tuple(memory), tuple(procs)), None

    def _expand(self, state: State) -> tuple[list[State], str | None]:
        """Successors of a state, and a complaint about it or about a step from it (the last one listed)."""
        successors: list[State] = []
        complaint = self._model.invariant(state.memory)
        if complaint is not None:
            return successors, complaint
        try:
            for index in range(len(state.procs)):
                self._steps(state, index, successors)
        except Violation as violation:
            return successors, str(violation)
        if not successors:
            complaint = self._model.at_rest(state.memory, self._status(state))
            if complaint is not None:
                return successors, complaint
        for index, proc in enumerate(state.procs):
            if proc.deaths and proc.node != DEAD:
                self._step(
                    state,
                    index,
                    Proc(DEAD, (), (), proc.deaths - 1),
                    successors,
                    self._model.processes[index].on_death,
                    "is killed",
                )
        return successors, None

    def _status(self, state: State) -> tuple[str, ...]:
        def of(index: int, proc: Proc) -> str:
            if proc.node == DEAD:
                return "dead"
            return "done" if self._programs[index].ops[proc.node].kind == END else "running"

        return tuple(of(index, proc) for index, proc in enumerate(state.procs))

    def _steps(self, state: State, index: int, out: list[State]) -> None:
        """Everything that process `index` or its buffers can do next, appended to `out`."""
        proc = state.procs[index]
        if proc.node == DEAD:
            if self._model.processes[index].restart:
                fresh = proc._replace(node=self._programs[index].first)
                self._step(state, index, fresh, out, (), "is started again")
            return
        if proc.buffer:
            cell, value, also = proc.buffer[0]
            self._step(
                state,
                index,
                proc._replace(buffer=proc.buffer[1:]),
                out,
                ((cell, value), *also),
                "memory receives",
            )
        for position, (cell, value) in enumerate(proc.streaming):
            rest = proc.streaming[:position] + proc.streaming[position + 1 :]
            self._step(state, index, proc._replace(streaming=rest), out, ((cell, value),), "memory receives (nt)")
        self._operate(state, index, proc, out)

    def _operate(self, state: State, index: int, proc: Proc, out: list[State]) -> None:
        op = self._programs[index].ops[proc.node]
        waiting = bool(proc.buffer or proc.streaming)
        if op.kind == LOAD and not (self._sequential and waiting):
            value = _read(proc, state.memory, op.cell)
            if op.value is None or value != op.value:
                self._proceed(state, index, proc, out, value, "loads")
        elif op.kind == CHOOSE and not (self._sequential and waiting):
            for option in op.value:
                if option.cell < 0 or state.memory[option.cell] not in option.unless:
                    self._proceed(state, index, proc, out, option.result, "decides")
        elif op.kind == KERNEL and not waiting:
            old = state.memory[op.cell]
            new = op.value(old)
            if new is not None:
                after = proc._replace(node=self._programs[index].after(proc.node, old))
                self._step(state, index, after, out, ((op.cell, new),), "system call:")

    def _proceed(self, state: State, index: int, proc: Proc, out: list[State], value: Value, verb: str) -> None:
        if self._log is not None:
            cell = self._programs[index].ops[proc.node].cell
            verb = f"{verb} {self._model.names[cell]} = {value}" if cell >= 0 else f"{verb} {value}"
        node = self._programs[index].after(proc.node, value)
        self._step(state, index, Proc(node, proc.buffer, proc.streaming, proc.deaths), out, (), verb)

    def _step(self, state: State, index: int, proc: Proc, out: list[State], effect: Effect, verb: str) -> None:
        """Append the state after a step: `effect` on memory, process `index` at `proc`, what is free."""
        memory = list(state.memory)
        if self._log is not None:
            self._log.append(self._model.processes[index].name + ": " + verb)
        self._affect(memory, effect)
        procs = list(state.procs)
        procs[index] = proc
        try:
            if proc.node != DEAD:
                self._settle(index, memory, procs)
        except Violation:
            out.append(State(tuple(memory), tuple(procs)))
            raise
        out.append(State(tuple(memory), tuple(procs)))

    def _affect(self, memory: list[Value], effect: Effect) -> None:
        for cell, change in effect:
            memory[cell] = change(memory[cell]) if callable(change) else change
            if self._log is not None:
                self._log[-1] += f" {self._model.names[cell]} := {memory[cell]};"

    def _settle(self, index: int, memory: list[Value], procs: list[Proc]) -> None:
        """Run process `index` up to its next step that others can notice."""
        programs = self._programs[index]
        node, buffer, streaming, deaths = procs[index]
        while True:
            op = programs.ops[node]
            result: Value = None
            if op.kind == STORE or (op.kind == STORE_NT and self._sequential):
                buffer = (*buffer, (op.cell, op.value, op.also))
            elif op.kind == STORE_NT:
                streaming = (*streaming, (op.cell, op.value))
            elif op.kind == OWN:
                result = _read(Proc(node, buffer, streaming, deaths), memory, op.cell)
            elif op.kind == PEEK:
                result = memory[op.cell]
            elif op.kind == GHOST:
                self._affect_quietly(memory, op.also)
            elif op.kind == CHECK:
                if not op.cell:
                    procs[index] = Proc(node, buffer, streaming, deaths)
                    raise Violation(op.value)
            elif op.kind not in (FENCE, SFENCE) or streaming or (op.kind == FENCE and buffer):
                break
            if self._log is not None and op.kind in (STORE, STORE_NT):
                self._log[-1] += f" [issues {self._model.names[op.cell]} := {op.value}]"
            node = programs.after(node, result)
        procs[index] = Proc(node, buffer, streaming, deaths)

    @staticmethod
    def _affect_quietly(memory: list[Value], effect: Effect) -> None:
        for cell, change in effect:
            memory[cell] = change(memory[cell]) if callable(change) else change

    def _result(
        self,
        parents: dict[State, State | None],
        transitions: int,
        started: float,
        complaint: str | None,
        last: State,
    ) -> Result:
        trace = [] if complaint is None else self._trace(parents, last)
        return Result(len(parents), transitions, perf_counter() - started, complaint, trace)

    def _trace(self, parents: dict[State, State | None], last: State) -> list[str]:
        path = [last]
        while (parent := parents[path[-1]]) is not None:
            path.append(parent)
        path.reverse()
        lines: list[str] = []
        for state, successor in pairwise(path):
            self._log = []
            successors, _ = self._expand(state)
            lines.append(self._log[successors.index(successor)])
        self._log = []
        successors, complaint = self._expand(last)
        if complaint is not None and successors and len(self._log) == len(successors):
            lines.append(self._log[-1])
        self._log = None
        return lines


def _read(proc: Proc, memory: Memory | list[Value], cell: int) -> Value:
    for where, value, _also in reversed(proc.buffer):
        if where == cell:
            return value
    for where, value in proc.streaming:
        if where == cell:
            return value
    return memory[cell]
