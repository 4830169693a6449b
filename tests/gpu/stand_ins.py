"""Stand-ins for the CUDA runtime and for a device that is not done yet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Runtime:
    """Registers nothing, refuses what it is told to, and keeps count."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[str, int, int]] = []

    def register(self, address: int, n_bytes: int) -> int:
        code = self.codes.pop(0) if self.codes else 0
        if not code:
            assert address not in self.registered
            self.registered[address] = n_bytes
        self.calls.append(("register", address, n_bytes))
        return code

    def unregister(self, address: int) -> int:
        self.calls.append(("unregister", address, self.registered.pop(address)))
        return 0

    def describe(self, code: int) -> str:
        return f"error {code}"


class Event:
    """Passed when the test says so."""

    def __init__(self) -> None:
        self.passed = False
        self.failure: RuntimeError | None = None

    def query(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.passed

    def synchronize(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.passed = True


class SlowStream:
    """What is queued is done at once, but not known to be until its event is let pass."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.drained = 0
        self.broken = False

    def entered(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def mark(self) -> Event:
        if self.broken:
            raise RuntimeError("no event")
        self.events.append(Event())
        return self.events[-1]

    def drain(self) -> None:
        self.drained += 1

    def order(self, passing: object) -> None:
        return
