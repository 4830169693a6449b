"""Threads for calls that cannot be interrupted: who waits for them may leave at a deadline, the calls go on alone.

A client library that is asked over a network or a network file system may not come back for minutes. A crew runs such
calls on threads of its own and gives the waiting thread control back in time. A call that was left behind keeps its
thread until it ends; how many may is bounded, and beyond that the crew refuses at once (the place is not answering,
so more threads would only hang, too). Does not cover what the calls do: since a call may go on after its batch was
given up, it must never hold memory of the caller's. It returns its bytes, and the waiting thread copies them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from penstock.errors import TierTimeout, TierUnavailable

__all__ = ["Crew", "Ended"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ended(Generic[T]):
    """How a call ended: with a value, or with what it raised."""

    index: int
    value: T | None
    error: Exception | None


@dataclass(slots=True, eq=False)
class _Call(Generic[T]):
    index: int
    work: Callable[[], T]
    ends: SimpleQueue[Ended[T] | None]
    running: bool = False
    left: bool = False
    """Nobody waits for it any more."""


@dataclass(slots=True)
class _State:
    waiting: deque[_Call[object]] = field(default_factory=deque)
    threads: int = 0
    """Those that will take another call; threads with a call that was left do not."""
    idle: int = 0
    left: int = 0
    left_total: int = 0
    closed: bool = False
    batches: set[SimpleQueue[Ended[object] | None]] = field(default_factory=set)


class Crew:
    """Up to `size` threads, and up to `max_left` more with calls that were left behind. For use by several threads."""

    def __init__(self, name: str, size: int, max_left: int) -> None:
        self.size = size
        self._name = name
        self._max_left = max_left
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._state = _State()

    @property
    def left(self) -> int:
        """Calls that were left behind and still run."""
        return self._state.left

    @property
    def left_total(self) -> int:
        """Calls that were left behind since the beginning."""
        return self._state.left_total

    def run(
        self, calls: Iterator[Callable[[], T]], deadline: float, take: Callable[[Ended[T]], None], window: int = 0
    ) -> None:
        """Run the calls, up to `window` of these at a time (default: `size`), and hand each end to `take`.

        `calls` is drawn from, and `take` called, in this thread only, so both may use the caller's memory. Both run
        beside calls: one is drawn ahead, and an end is handed over after the next call took its place. Raises
        TierTimeout at the deadline and TierUnavailable if the crew was closed or too many calls were left behind; what
        `take` raises is raised. Calls that have not begun by then never do, those that run are left behind.
        """
        if time.monotonic() >= deadline:
            raise TierTimeout(f"{self._name}: the deadline had passed before the first request")
        ends: SimpleQueue[Ended[T] | None] = SimpleQueue()
        open_calls: dict[int, _Call[T]] = {}
        self._enter(ends)
        try:
            for index, work in enumerate(calls):
                ended = self._next_end(ends, open_calls, deadline) if len(open_calls) == (window or self.size) else None
                open_calls[index] = self._submit(index, work, ends)
                if ended is not None:
                    take(ended)
            while open_calls:
                take(self._next_end(ends, open_calls, deadline))
        finally:
            self._leave(ends, open_calls)

    def close(self, patience_s: float = 1.0) -> bool:
        """Wake everybody who waits (they get TierUnavailable) and give running calls a moment to end. Idempotent.

        Returns whether all of them did.
        """
        end = time.monotonic() + patience_s
        with self._lock:
            self._state.closed = True
            self._state.waiting.clear()
            for ends in self._state.batches:
                ends.put(None)
            self._work.notify_all()
            while self._state.threads + self._state.left and (wait_s := end - time.monotonic()) > 0:
                self._work.wait(wait_s)
            return self._state.threads + self._state.left == 0

    def _enter(self, ends: SimpleQueue[Ended[T] | None]) -> None:
        with self._lock:
            self._check_open()
            if self._state.left >= self._max_left:
                raise TierUnavailable(
                    f"{self._name} does not answer: {self._state.left} requests hang; trying again once they ended"
                )
            self._state.batches.add(ends)  # type: ignore[arg-type] # a queue that is only put to None here

    def _check_open(self) -> None:
        if self._state.closed:
            raise TierUnavailable(f"{self._name} is closed")

    def _submit(self, index: int, work: Callable[[], T], ends: SimpleQueue[Ended[T] | None]) -> _Call[T]:
        call = _Call(index, work, ends)
        with self._lock:
            self._check_open()
            self._state.waiting.append(call)  # type: ignore[arg-type] # what it returns goes to its own queue
            self._staff()
        return call

    def _staff(self) -> None:
        # Under the lock. An idle thread that was woken already still counts as idle, its call as waiting.
        state = self._state
        if state.idle:
            self._work.notify(len(state.waiting))
        for _ in range(min(len(state.waiting) - state.idle, self.size - state.threads)):
            state.threads += 1
            threading.Thread(target=self._serve, name=f"penstock-{self._name}", daemon=True).start()

    def _next_end(
        self, ends: SimpleQueue[Ended[T] | None], open_calls: dict[int, _Call[T]], deadline: float
    ) -> Ended[T]:
        try:
            ended = ends.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise TierTimeout(f"{self._name} did not answer by the deadline") from None
        if ended is None:
            raise TierUnavailable(f"{self._name} is closed")
        del open_calls[ended.index]
        return ended

    def _leave(self, ends: SimpleQueue[Ended[T] | None], open_calls: dict[int, _Call[T]]) -> None:
        with self._lock:
            self._state.batches.discard(ends)
            for call in open_calls.values():
                call.left = True
                if call.running:
                    self._state.left += 1
                    self._state.left_total += 1
                    self._state.threads -= 1
            if open_calls:
                self._state.waiting = deque(call for call in self._state.waiting if not call.left)
                self._staff()

    def _serve(self) -> None:
        while (call := self._next_call()) is not None:
            value, error = None, None
            try:
                value = call.work()
            except Exception as raised:  # noqa: BLE001 - the thread's boundary: who waits for the call gets it
                error = raised
            with self._lock:
                call.running = False
                if call.left:
                    self._state.left -= 1
                    self._work.notify_all()
                    return
            call.ends.put(Ended(call.index, value, error))
            del call, value, error

    def _next_call(self) -> _Call[object] | None:
        with self._lock:
            self._state.idle += 1
            while not self._state.waiting and not self._state.closed:
                self._work.wait()
            self._state.idle -= 1
            if self._state.closed:
                self._state.threads -= 1
                self._work.notify_all()
                return None
            call = self._state.waiting.popleft()
            call.running = True
            return call
