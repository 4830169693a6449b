"""Two engines on one pool: what is found, by how many tokens, and that the answers are those of an engine without."""

from __future__ import annotations

import pytest

from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.model import answer
from tests.engines.sim.runner import BLOCK, Setup

KINDS = [
    {},
    {"budget": 48},
    {"prefix_caching": False},
    {"extra": {"sync_load_ms": 0.0}},
    {"overlap": True},
    {"drafts": 3},
    {"overlap": True, "drafts": 3, "budget": 48},
]


def expected_hit(n_tokens: int, n_stored: int) -> int:
    """Full blocks of what is stored, all but the prompt's last token."""
    return min(n_stored // BLOCK * BLOCK, n_tokens - 1)


def test_the_model_of_arithmetic_notices_a_wrong_byte() -> None:
    """A check of the check: any flipped bit in a page that was read before changes what follows."""
    engine = Engine(Setup())
    name = engine.add(prompt(1, 60), 40)
    for _ in range(5):
        engine.step()
    page = engine.runner.states[name].pages[1]
    engine.runner.ranks[0].layers[1][page, 3, 7] ^= 1 << 40
    engine.run()
    assert engine.tokens[name] != answer(prompt(1, 60), 40)
    assert engine.tokens[name][:4] == answer(prompt(1, 60), 4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("n_tokens", [15, 16, 17, 64, 65, 300])
def test_a_second_engine_gets_the_firsts_prefix(house: House, kind: dict[str, object], n_tokens: int) -> None:
    one, other = house.engine(**kind), house.engine(**kind, seed=1)
    asked = prompt(n_tokens, n_tokens)
    assert house.hit(one, asked) == 0
    assert house.hit(other, asked) == expected_hit(n_tokens, n_tokens)
    longer = [*asked, *prompt(7, 50)]
    assert house.hit(one, longer) == (0 if one.setup.prefix_caching else expected_hit(n_tokens + 50, n_tokens))
    house.finish()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks_written_while_decoding_are_hits_in_the_next_turn(house: House, kind: dict[str, object]) -> None:
    """A conversation whose turns go to two engines by turns: each finds what the other has answered."""
    engines = [house.engine(**kind, seed=seed) for seed in range(2)]
    said, n_stored, n_local = prompt(3, 70), 0, {0: 0, 1: 0}
    for turn in range(4):
        engine = engines[turn % 2]
        hit = house.hit(engine, said, 45)
        assert hit == n_stored - n_local[turn % 2], turn
        # Of the answer's last token nothing is kept.
        n_stored = (len(said) + 45 - 1) // BLOCK * BLOCK
        if engine.setup.prefix_caching:
            n_local[turn % 2] = n_stored
        said = [*said, *house.asked[-1][2], *prompt(turn + 10, 20)]
    house.finish()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_prompts_at_once_and_a_prompt_that_fills_all_pages(house: House, kind: dict[str, object]) -> None:
    engine = house.engine(**kind, pages=40)
    for _ in range(6):
        house.add(engine, prompt(4, 200), 30)
    house.add(engine, prompt(5, 38 * BLOCK), 8)
    for seed in range(3):
        house.add(engine, prompt(seed, 300), 60)
    house.finish()
    other = house.engine(**kind)
    assert house.hit(other, prompt(5, 38 * BLOCK)) == 38 * BLOCK - 1
    house.finish()
