"""Only settled tokens are stored: those that are accepted and known, computed by steps that are over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penstock.connectors.vllm.requests import Tracked
from tests.engines.sim.house import House, prompt
from tests.engines.sim.runner import BLOCK

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafts": {"drafts": 4},
    "overlap": {"overlap": True},
    "overlap, drafts": {"overlap": True, "drafts": 4},
    "overlap, drafts, small budget": {"overlap": True, "drafts": 4, "budget": 48},
    "overlap, drafts, two ranks": {"overlap": True, "drafts": 2, "ranks": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accept", [0.0, 0.5, 1.0])
def test_at_every_step_the_pool_has_settled_blocks_only(house: House, kind: str, accept: float) -> None:
    engine = house.engine(**KINDS[kind])
    engine.runner.accept = accept
    names = [house.add(engine, prompt(seed, 30 + 40 * seed), 100) for seed in range(3)]
    while engine.scheduler.has_requests() or engine.in_flight:
        settled = {name: tokens_over(engine, name) for name in names}
        for pool in engine.pools:
            assert pool.flush(30)
        for name in names:
            tokens = [*engine.requests[name].prompt_token_ids, *engine.tokens[name]]
            stored = house.resident(engine, [*tokens, *[0] * 400])
            assert not any(stored[settled[name] // BLOCK :]), name
        house.look()
        engine.step()
    house.finish()
    # And all that is settled is stored: at the end everything but the last token.
    for name in names:
        tokens = [*engine.requests[name].prompt_token_ids, *engine.tokens[name]][:-1]
        assert all(house.resident(engine, tokens)), name


def tokens_over(engine: Any, name: str) -> int:
    """Tokens of which the engine knows the outcome."""
    return len(engine.requests[name].prompt_token_ids) + len(engine.tokens[name])


def test_storing_the_last_token_too_would_poison(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known, but nothing was ever computed of it."""
    monkeypatch.setattr(Tracked, "n_settled", property(lambda self: self.request.num_tokens))
    engine = house.engine()
    house.add(engine, prompt(1, 6 * BLOCK), 2 * BLOCK)
    engine.settle()
    assert house.poisoned
    house.poisoned.clear()


def test_counting_the_steps_in_flight_would_store_tokens_that_nobody_knows(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts and two steps in flight the engine's own count is ahead of the tokens."""
    ahead = []

    def n_settled(self: Tracked) -> int:
        request = self.request
        ahead.append(request.num_computed_tokens - request.num_tokens)
        return int(request.num_computed_tokens)

    monkeypatch.setattr(Tracked, "n_settled", property(n_settled))
    engine = house.engine(overlap=True, drafts=4)
    engine.runner.accept = 0.5
    for seed in range(4):
        house.add(engine, prompt(seed, 50), 100)
    engine.settle()
    assert max(ahead) > 0
    assert house.poisoned or not np.all([all(house.resident(engine, right)) for _, _, right in house.asked])
    house.poisoned.clear()
