"""Random traffic on engines that have too few pages, with aborts, damage and equal prompts: at every step only clean
blocks in the pool, at the end the tokens of a clean run and nothing held."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conftest import Scale
from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.support import MIB, Keeper, small_geometry, until

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small budget": {"budget": 40},
    "beside": {"extra": {"sync_load_ms": 0.0}},
    "no prefix caching": {"prefix_caching": False, "budget": 64},
    "drafts": {"drafts": 3},
    "overlap": {"overlap": True},
    "overlap, small budget": {"overlap": True, "budget": 40},
    "overlap, drafts": {"overlap": True, "drafts": 3, "budget": 64},
    "two ranks": {"ranks": 2},
    "two ranks, overlap, drafts": {"ranks": 2, "overlap": True, "drafts": 2},
}


class Traffic:
    """A seeded script of what users and accidents do to some engines."""

    def __init__(self, house: House, engines: list[Engine], seed: int, *, damage: bool) -> None:
        self.house, self.engines, self.rng = house, engines, random.Random(seed)
        self.damage = damage
        self.live: list[tuple[Engine, str]] = []
        self.said: list[list[int]] = [prompt(seed * 100 + i, 20 + 30 * i) for i in range(4)]

    def turn(self) -> None:
        engine, chance = self.rng.choice(self.engines), self.rng.random()
        if chance < 0.25:
            self._add(engine)
        elif chance < 0.32:
            self._abort(engine)
        elif chance < 0.36 and self.damage:
            self._damage(engine)
        elif chance < 0.37 and not engine.in_flight:
            engine.scheduler.reset_prefix_cache()
        else:
            for _ in range(self.rng.randrange(1, 4)):
                engine.step()
        assert not self.house.poisoned, self.house.poisoned

    def _add(self, engine: Engine) -> None:
        tokens = self.rng.choice(self.said)
        if self.rng.random() < 0.5:
            tokens = [*tokens[: self.rng.randrange(1, len(tokens) + 1)], *prompt(self.rng.randrange(50), 30)]
        n = self.rng.choice([1, 5, 20, 50])
        for _ in range(self.rng.choice([1, 1, 1, 3])):
            name = self.house.add(engine, tokens, n)
            self.live.append((engine, name))
        if len(tokens) < 250 and self.rng.random() < 0.4:
            _, _, right = self.house.asked[-1]
            self.said.append([*tokens, *right, *prompt(self.rng.randrange(50), 12)])

    def _abort(self, engine: Engine) -> None:
        mine = [name for owner, name in self.live if owner is engine and not engine.is_done(name)]
        if mine:
            name = self.rng.choice(mine)
            if self.rng.random() < 0.5:
                engine.abort(name)
            else:
                engine.aborted.add(name)
                engine.aborts.append(name)
                engine.step()

    def _damage(self, engine: Engine) -> None:
        tokens = self.rng.choice(self.said)
        there = self.house.resident(engine, tokens)
        if any(there):
            block = self.rng.choice([at for at, is_there in enumerate(there) if is_there])
            rank = self.rng.randrange(engine.setup.ranks)
            if self.house.resident(engine, tokens, rank)[block]:
                self.house.damage(engine, tokens, block, rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [False, True], ids=["", "damage"])
def test_random_traffic(house: House, kind: str, damage: bool, scale: Scale) -> None:
    for seed in range(scale.of(2, 40)):
        engines = [house.engine(pages=44, n_seqs=8, seed=i + seed, **KINDS[kind]) for i in range(2)]
        engines[0].runner.prompt_saves = True
        traffic = Traffic(house, engines, seed, damage=damage)
        for _ in range(250):
            traffic.turn()
        house.finish()
        house.end_engines()


@pytest.mark.parametrize("kind", ["plain", "beside", "overlap, drafts", "two ranks"])
def test_random_traffic_on_a_pool_that_is_too_small(kind: str, scale: Scale) -> None:
    """Blocks come and go all the time, also while they are being loaded."""
    with Keeper(small_geometry(5 * MIB, lanes=12, slab=MIB // 4)) as keeper:
        small = House(keeper)
        try:
            for seed in range(scale.of(2, 20)):
                engines = [small.engine(pages=44, n_seqs=8, seed=i + seed, **KINDS[kind]) for i in range(2)]
                traffic = Traffic(small, engines, seed, damage=True)
                for _ in range(250):
                    traffic.turn()
                small.finish()
                small.end_engines()
            assert any(n for name, n in keeper.counters().items() if name.startswith("evicted")), "it was large enough"
        finally:
            small.close()


@pytest.mark.parametrize("kind", ["plain", "beside", "overlap, drafts", "two ranks"])
def test_random_traffic_while_the_keeper_is_killed(house: House, keeper: Keeper, kind: str) -> None:
    engines = [house.engine(pages=44, n_seqs=8, seed=i, **KINDS[kind]) for i in range(2)]
    traffic = Traffic(house, engines, 5, damage=False)
    for _ in range(3):
        for _ in range(60):
            traffic.turn()
        keeper.kill()
        for _ in range(60):
            traffic.turn()
        keeper.start()
        for pool in (house.keeper_pool, *(pool for engine in engines for pool in engine.pools)):
            until(lambda pool=pool: pool._link.alive, "back")
    house.finish()
    keeper.fsck()
