"""Loads that fail: every request still gets the tokens of a clean run, and nothing computed from what was not loaded
reaches the pool or stays in the engine's own prefix cache."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import Miss
from penstock.connectors.vllm import scheduler
from penstock.connectors.vllm.requests import Tracked
from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.runner import BLOCK

KINDS: dict[str, dict[str, Any]] = {
    "at once": {},
    "at once, small budget": {"budget": 48},
    "at once, drafts": {"drafts": 2},
    "beside": {"extra": {"sync_load_ms": 0.0}},
    "beside, small budget": {"extra": {"sync_load_ms": 0.0}, "budget": 48},
    "overlap": {"overlap": True},
    "overlap, small budget, drafts": {"overlap": True, "budget": 48, "drafts": 2},
    "no prefix caching": {"prefix_caching": False},
}
P = prompt(5, 10 * BLOCK)


def with_damage(house: House, *blocks: int, **kind: Any) -> Engine:
    """An engine that finds P in the pool, with these blocks damaged."""
    one = house.engine()
    house.ask(one, P)
    for block in blocks:
        house.damage(one, P, block)
    engine = house.engine(**kind, seed=3)
    engine.runner.prompt_saves = True
    return engine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [0, 4, 9])
def test_a_damaged_block_costs_its_hit_only(house: House, kind: str, block: int) -> None:
    engine = with_damage(house, block, **KINDS[kind])
    house.ask(engine, [*P, *prompt(6, 30)], 20)
    # Of a hit that is lost as a whole the request asks once more, maybe before the keeper has dropped the block.
    assert engine.counter("load.failed.checksum") in {10 - block, 0 if block else 20}
    house.finish()
    house.wait_dropped()
    # Whoever computes what is missing now brings it back for others.
    house.ask(house.engine(), [*P, 1, 2])
    assert house.hit(house.engine(), [*P, 3]) == len(P)
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_token_of_a_prompt_that_is_all_there(house: House, kind: str) -> None:
    engine = with_damage(house, 9, **KINDS[kind])
    house.ask(engine, P, 20)
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_several_damaged_blocks(house: House, kind: str) -> None:
    engine = with_damage(house, 2, 3, 7, **KINDS[kind])
    for n in (0, 5, 40):
        house.ask(engine, [*P, *prompt(6, n)], 3)
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_share_the_invalid_pages_in_the_same_step(house: House, kind: str) -> None:
    engine = with_damage(house, 3, **KINDS[kind])
    for seed in (1, 1, 2, 3):
        house.add(engine, [*P, *prompt(seed, 40)], 12)
    house.finish()
    again = house.engine()
    for seed in (1, 2, 3):
        house.ask(again, [*P, *prompt(seed, 40)])
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("later", [1, 2, 3])
def test_a_request_that_comes_while_the_blocks_are_recomputed(house: House, kind: str, later: int) -> None:
    engine = with_damage(house, 3, **KINDS[kind])
    house.add(engine, [*P, *prompt(1, 40)], 12)
    for _ in range(later):
        engine.step()
    house.add(engine, [*P, *prompt(1, 40)], 12)
    house.add(engine, [*P, *prompt(2, 40)], 12)
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["while it loads", "after one step", "after two"])
def test_abort_of_the_loader(house: House, kind: str, when: str) -> None:
    """What it computed on top of the failed load is in nobody's way later."""
    engine = with_damage(house, 3, **KINDS[kind])
    name = house.add(engine, [*P, *prompt(1, 40)], 12)
    if when == "while it loads":
        engine.aborted.add(name)
        engine.aborts.append(name)
        engine.step()
    else:
        for _ in range(1 if when == "after one step" else 2):
            engine.step()
        engine.abort(name)
    # The first brings the blocks of P back, the second goes on as the aborted request did.
    house.add(engine, [*P, *prompt(2, 40)], 12)
    engine.settle()
    house.ask(engine, [*P, *prompt(1, 40)], 12)
    house.finish()


def aborted_then_asked_again(house: House, engine: Engine) -> None:
    """A request is aborted in the step in which its load fails, another one brings back the blocks that it lacked, and
    a third one goes on as the first did."""
    name = house.add(engine, [*P, *prompt(1, 40)], 12)
    engine.aborted.add(name)
    engine.aborts.append(name)
    engine.step()
    house.wait_dropped()
    house.add(engine, [*P, *prompt(2, 40)], 12)
    engine.settle()
    house.add(engine, [*P, *prompt(1, 40)], 12)


def test_nobody_finds_what_an_aborted_loader_computed(house: House) -> None:
    aborted_then_asked_again(house, with_damage(house, 3))
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_abort_of_one_that_shares_while_the_other_loads(house: House, kind: str) -> None:
    """What the other computes in that step on top of the failed load is among its blocks, and not to be stored."""
    engine = with_damage(house, 3, **KINDS[kind])
    house.add(engine, [*P, *prompt(1, 40)], 12)
    name = house.add(engine, [*P, *prompt(1, 60)], 12)
    engine.aborted.add(name)
    engine.aborts.append(name)
    engine.step()
    engine.settle()
    house.ask(engine, [*P, *prompt(1, 60)], 12)
    house.finish()


def loader_aborted_beside_a_sharer(house: House, engine: Engine) -> None:
    """The second request counts on pages that the first was to load; the first is aborted when the load has failed."""
    name = house.add(engine, [*P, *prompt(1, 10)], 12)
    house.add(engine, [*P, *prompt(1, 30)], 12)
    engine.step()
    engine.abort(name)


@pytest.mark.parametrize("kind", KINDS)
def test_abort_of_the_loader_while_another_shares(house: House, kind: str) -> None:
    loader_aborted_beside_a_sharer(house, with_damage(house, 3, **KINDS[kind]))
    house.finish()


def test_leaving_the_recomputation_to_the_loader_would_fail(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.32 by itself lets those that share the pages go on, for the first of them computes them again."""
    monkeypatch.setattr(scheduler, "roll_back", lambda *args, **more: [])
    loader_aborted_beside_a_sharer(house, with_damage(house, 3))
    assert poisoned(house)


def test_a_load_without_leases_fails_and_is_computed(house: House) -> None:
    """The engine counts on tokens of which the connector does not know any more."""
    engine = with_damage(house)
    matched = engine.half.matched

    def forgotten(request: Any, n_computed: int) -> Any:
        answer = matched(request, n_computed)
        engine.half._drop_lookup(engine.half._tracked[request.request_id])
        return answer

    engine.half.matched = forgotten  # type: ignore[method-assign]
    name = house.add(engine, [*P, *prompt(1, 40)], 12)
    engine.step()
    assert engine.half._tracked[name].miss is Miss.CHECKSUM
    house.finish()


# ---- what each safety guards


def poisoned(house: House) -> bool:
    """Whether anything went wrong by the end."""
    try:
        house.finish()
    except AssertionError:
        return True
    finally:
        house.poisoned.clear()
        house.asked.clear()
        house.chains.clear()
    return False


def test_without_the_rollback_it_would_fail(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "roll_back", lambda *args, **more: [])
    engine = with_damage(house, 3, budget=48)
    name = house.add(engine, [*P, *prompt(1, 40)], 12)
    engine.step()
    engine.abort(name)
    house.add(engine, [*P, *prompt(2, 40)], 12)
    assert poisoned(house)


def test_without_the_eviction_it_would_fail(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = with_damage(house, 3, budget=48)
    monkeypatch.setattr(engine.scheduler.kv_cache_manager, "evict_blocks", lambda pages: None)
    name = house.add(engine, [*P, *prompt(1, 40)], 12)
    engine.step()
    engine.abort(name)
    house.add(engine, [*P, *prompt(2, 40)], 12)
    assert poisoned(house)


def test_storing_shared_pages_in_the_step_that_loads_them_would_poison(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracked, "admitted", property(lambda self: -1, lambda self, step: None))
    engine = with_damage(house, 3)
    for seed in (1, 1, 2, 3):
        house.add(engine, [*P, *prompt(seed, 40)], 12)
    assert poisoned(house)


def test_forgetting_what_an_aborted_loader_computed_would_poison(house: House) -> None:
    class Forgetful(list[list[int]]):
        def append(self, pages: list[int]) -> None:
            pass

    engine = with_damage(house, 3)
    engine.half._left = Forgetful()
    aborted_then_asked_again(house, engine)
    assert poisoned(house)


def test_loading_inside_overlapping_steps_would_fail(house: House) -> None:
    """vLLM 0.32 hears of a failed load when the next step is under way already: it takes the request's count of
    computed tokens back by what the failed step had, and the drawn tokens of the next one are kept. So the connector
    loads beside the steps where they overlap."""
    engine = with_damage(house, 3, overlap=True)
    engine.half._overlapping = False
    for seed in (1, 1, 2):
        house.add(engine, [*P, *prompt(seed, 40)], 12)
    assert poisoned(house)
