"""Pages that are given away while they are being stored: what is stored is what the request had in them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.runner import BLOCK
from tests.support import PATIENCE_S, until


class Gate:
    """Holds the thread up that stores, before the first piece that comes after `close`."""

    def __init__(self, house: House) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        house.before_store = self._wait

    def _wait(self) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_S)

    def close(self) -> None:
        self.open.clear()
        self.reached.clear()


def preempted_while_storing(house: House, kind: dict[str, Any], *, open_when_called_off: bool) -> Engine:
    """Two requests that outgrow the pages: the younger one loses its own while they are being stored."""
    gate = Gate(house)
    engine = house.engine(pages=24, prefix_caching=False, **kind)
    saver = engine.workers[0]._saver
    call_off = saver.call_off

    def opened(requests: set[str]) -> None:
        if open_when_called_off:
            gate.open.set()
        call_off(requests)

    saver.call_off = opened  # type: ignore[method-assign]
    house.add(engine, prompt(1, 10 * BLOCK), 90)
    victim = house.add(engine, prompt(2, 10 * BLOCK), 90)
    gate.close()
    until(lambda: (engine.step(), engine.requests[victim].num_preemptions)[1], "the younger one is preempted")
    assert gate.reached.is_set(), "nothing was being stored"
    # The older one takes over pages that the younger one had.
    for _ in range(60):
        engine.step()
    gate.open.set()
    return engine


@pytest.mark.parametrize("kind", [{}, {"overlap": True}, {"drafts": 2}, {"overlap": True, "drafts": 2}], ids=str)
def test_preempted_while_its_blocks_are_being_stored(house: House, kind: dict[str, Any]) -> None:
    preempted_while_storing(house, kind, open_when_called_off=True)
    house.finish()


def test_without_calling_off_it_would_store_another_requests_bytes(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.connectors.vllm.saves import Saver

    monkeypatch.setattr(Saver, "call_off", lambda self, requests: None)
    engine = preempted_while_storing(house, {}, open_when_called_off=False)
    engine.settle()
    assert house.poisoned
    house.poisoned.clear()


def ended_while_storing(house: House, *, abort: bool) -> tuple[Engine, Gate, int]:
    gate = Gate(house)
    engine = house.engine(pages=24, prefix_caching=False)
    gate.close()
    free = engine.n_free_pages
    name = house.add(engine, prompt(1, 10 * BLOCK + 3), 40 if abort else 2)
    for _ in range(3):
        engine.step()
    assert gate.reached.wait(PATIENCE_S)
    if abort:
        engine.abort(name)
    for _ in range(3):
        engine.step()
    assert engine.is_done(name)
    return engine, gate, free


@pytest.mark.parametrize("abort", [False, True], ids=["ended", "aborted"])
def test_a_request_that_ended_keeps_its_pages_until_they_are_stored(house: House, abort: bool) -> None:
    engine, gate, free = ended_while_storing(house, abort=abort)
    assert free - engine.n_free_pages >= 10, "its pages are kept"
    # Others run meanwhile on what is left.
    house.add(engine, prompt(2, 5 * BLOCK), 3)
    for _ in range(6):
        engine.step()
    gate.open.set()
    house.finish()
    assert engine.n_free_pages == free
    assert all(house.resident(engine, prompt(1, 10 * BLOCK)))


def test_without_keeping_them_it_would_store_another_requests_bytes(house: House) -> None:
    gate = Gate(house)
    engine = house.engine(pages=24, prefix_caching=False)
    finished = engine.half.finished
    engine.half.finished = lambda *args: finished(*args) and False  # type: ignore[method-assign]
    gate.close()
    house.add(engine, prompt(1, 20 * BLOCK + 3), 2)
    for _ in range(3):
        engine.step()
    assert gate.reached.wait(PATIENCE_S)
    house.add(engine, prompt(2, 20 * BLOCK), 3)
    with pytest.raises(AssertionError):
        for _ in range(6):
            engine.step()
        gate.open.set()
        house.finish()
    gate.open.set()
    until(lambda: house.poisoned, "the wrong bytes were stored")
    house.poisoned.clear()
