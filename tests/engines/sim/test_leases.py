"""Lookup leases: asked again and again, dropped, refused room, let go. After each way nothing is held, and the request
gets its tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.runner import BLOCK
from tests.support import PATIENCE_S, until

P = prompt(8, 10 * BLOCK)
BESIDE = {"extra": {"sync_load_ms": 0.0}}


def filled(house: House, **settings: Any) -> Engine:
    """An engine that has P in its pool but not in its pages."""
    house.ask(house.engine(), P)
    return house.engine(**settings)


def leases(engine: Engine) -> int:
    """In the scheduler's half."""
    return engine.pools[0].held()["leases"]


def matched(engine: Engine, name: str, n_computed: int = 0) -> tuple[int | None, bool]:
    answer: tuple[int | None, bool] = engine.scheduler.connector.get_num_new_matched_tokens(
        engine.requests[name], n_computed
    )
    return answer


class Gate:
    """Holds loads up in the thread that copies."""

    def __init__(self, engine: Engine) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        for worker in engine.workers:
            worker._copier._copy = self._wrap(worker._copier._copy)  # type: ignore[method-assign]

    def _wrap(self, copy: Callable[..., Any]) -> Callable[..., Any]:
        def held_up(*args: Any) -> Any:
            self.reached.set()
            assert self.open.wait(PATIENCE_S)
            return copy(*args)

        return held_up


def test_asked_again_and_again_it_is_one_lease(house: House) -> None:
    engine = filled(house)
    name = house.add(engine, [*P, 1, 2, 3])
    for _ in range(5):
        assert matched(engine, name) == (len(P), False)
        assert leases(engine) == 10 and engine.half.held()["lookups"] == 1
    # Meanwhile the engine has the first blocks itself.
    assert matched(engine, name, 4 * BLOCK) == (len(P) - 4 * BLOCK, False)
    assert leases(engine) == 6
    house.finish()


def test_an_answer_that_is_dropped(house: House) -> None:
    engine = filled(house)
    name = house.add(engine, [*P, 1, 2, 3])
    assert matched(engine, name)[0] == len(P)
    engine.abort(name)
    assert leases(engine) == 0
    house.finish()


def test_no_external_tokens_lets_go(house: House) -> None:
    engine = filled(house)
    name = house.add(engine, [*P, 1, 2, 3])
    matched(engine, name)
    pages = engine.scheduler.kv_cache_manager.empty_kv_cache_blocks
    engine.scheduler.connector.update_state_after_alloc(engine.requests[name], pages, 0)
    assert leases(engine) == 0 and engine.half.held()["lookups"] == 0
    house.finish()


@pytest.mark.parametrize("kind", [{}, BESIDE, {"overlap": True}], ids=["at once", "beside", "overlap"])
def test_no_room_for_its_pages_then_room(house: House, kind: dict[str, Any]) -> None:
    engine = filled(house, pages=16, prefix_caching=False, **kind)
    house.add(engine, prompt(9, 5 * BLOCK), 20)
    engine.step()
    name = house.add(engine, [*P, 1, 2, 3])
    for _ in range(5):
        engine.step()
        assert engine.half.held()["lookups"] == 1 and leases(engine) == 10
        assert not engine.half._tracked[name].hit_tokens
    house.finish()
    assert engine.counter("hit_tokens") == len(P)


def test_let_go_after_a_bounded_age(house: House) -> None:
    engine = filled(house, pages=16, prefix_caching=False)
    now = 1000.0
    engine.half._now_s = lambda: now
    house.add(engine, prompt(9, 5 * BLOCK), 12)
    engine.step()
    name = house.add(engine, [*P, 1, 2, 3])
    engine.step()
    standing = engine.half._tracked[name].lookup
    assert standing is not None and leases(engine) == 10
    now += 29
    engine.step()
    assert engine.half._tracked[name].lookup is standing
    # Nobody asks for it any more, as when the engine is paused.
    now += 2
    engine.half.orders({}, lambda name: [], [])
    assert leases(engine) == 0
    engine.step()
    assert engine.half._tracked[name].lookup is not standing
    engine.half._now_s = __import__("time").monotonic
    house.finish()


def test_a_reset_lets_go(house: House) -> None:
    engine = filled(house)
    name = house.add(engine, [*P, 1, 2, 3])
    matched(engine, name)
    assert engine.scheduler.reset_connector_cache()
    assert leases(engine) == 0
    house.expect(engine, [*P, 1, 2, 3, *house.asked[-1][2]], variant=engine.half._tracked[name].variant)
    house.finish()
    assert engine.counter("hit_tokens") == 0


@pytest.mark.parametrize("kind", [BESIDE, {"overlap": True}], ids=["beside", "overlap"])
@pytest.mark.parametrize("when", ["in the queue", "while it copies", "when it was copied"])
def test_abort_of_a_load_beside_the_steps(house: House, kind: dict[str, Any], when: str) -> None:
    engine = filled(house, **kind)
    gate = Gate(engine)
    if when == "in the queue":
        house.add(engine, [*P, 7])
    name = house.add(engine, [*P, 1, 2, 3])
    until(lambda: (engine.step(), gate.reached.is_set())[1], "it copies")
    assert engine.half.held()["loads"] > 0 and leases(engine) >= 10
    if when == "when it was copied":
        gate.open.set()
        until(lambda: not engine.workers[0]._loader.is_busy(), "copied")
    free = engine.n_free_pages
    engine.abort(name)
    if when == "while it copies":
        for _ in range(5):
            engine.step()
        assert engine.n_free_pages == free, "the thread still writes to these pages"
    gate.open.set()
    house.finish()


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("kind", [{}, BESIDE, {"overlap": True}, {"overlap": True, "drafts": 2}], ids=str)
def test_abort_in_every_state(house: House, kind: dict[str, Any], steps: int) -> None:
    engine = filled(house, budget=64, **kind)
    names = [house.add(engine, [*P, *prompt(seed, 100)], 10) for seed in (1, 2)]
    for _ in range(steps):
        engine.step()
    engine.abort(names[0])
    house.finish()


def test_a_load_that_misses_its_deadline_is_computed(house: House) -> None:
    engine = filled(house, extra={"sync_load_ms": 0.0, "load_deadline_s": 0.001})
    gate = Gate(engine)
    house.add(engine, [*P, 1, 2, 3])
    until(lambda: (engine.step(), gate.reached.is_set())[1], "it copies")
    threading.Event().wait(0.005)
    gate.open.set()
    house.finish()
    assert engine.counter("load.failed.busy") == 10


def test_the_pool_is_closed_while_a_lookup_stands(house: House) -> None:
    """As after a fork, or a segment that was replaced by another one: the engine goes on without."""
    engine = filled(house, pages=16, prefix_caching=False)
    house.add(engine, prompt(9, 5 * BLOCK), 12)
    engine.step()
    house.add(engine, [*P, 1, 2, 3])
    engine.step()
    assert engine.half.held()["lookups"] == 1
    for pool in engine.pools:
        pool.close()
    engine.run()
    engine.drain()
    engine.idle_steps()
    house.tokens_right()
    assert engine.half.held() == {"requests": 0, "lookups": 0, "loads": 0, "saves": 0}


# ---- waiting for what another engine stores


WAITS = {"kv_transfer_params": {"penstock": {"wait_s": 30}}}


def test_a_request_that_may_wait_gets_what_another_engine_stores(house: House) -> None:
    one, other = house.engine(), house.engine()
    name = house.add(other, [*P, 1, 2], extra_args=WAITS)
    for _ in range(4):
        other.step()
    assert not other.is_done(name) and leases(other) == 0
    house.ask(one, P)
    other.settle()
    assert other.counter("hit_tokens") == len(P)
    house.finish()


@pytest.mark.parametrize("end", ["its time is over", "aborted"])
def test_what_never_comes_is_not_waited_for_forever(house: House, end: str) -> None:
    engine, now = house.engine(), [1000.0]
    real, engine.half._now_s = engine.half._now_s, lambda: now[0]
    name = house.add(engine, [*P, 1, 2], extra_args=WAITS)
    for _ in range(4):
        engine.step()
    assert not engine.scheduler.running
    if end == "aborted":
        engine.abort(name)
    now[0] += 31
    engine.step()
    engine.half._now_s = real
    house.finish()
    assert engine.is_done(name)
