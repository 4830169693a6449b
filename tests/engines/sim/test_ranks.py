"""Two tensor ranks: each has its own blocks, a hit is what all of them have, and what fails at one fails for all."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import Drop
from penstock.pool.client import Stored
from tests.engines.sim.engine import Engine
from tests.engines.sim.house import House, prompt
from tests.engines.sim.runner import BLOCK
from tests.support import until

P = prompt(15, 10 * BLOCK)
LONGER = [*P, *prompt(16, 40)]
KINDS: dict[str, dict[str, Any]] = {
    "at once": {"ranks": 2},
    "at once, small budget": {"ranks": 2, "budget": 48},
    "beside": {"ranks": 2, "extra": {"sync_load_ms": 0.0}},
    "overlap, drafts": {"ranks": 2, "overlap": True, "drafts": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_share_with_two_ranks(house: House, kind: str) -> None:
    one, other = house.engine(**KINDS[kind]), house.engine(**KINDS[kind])
    assert house.hit(one, P) == 0
    assert house.hit(other, LONGER) == len(P)
    house.finish()


def test_other_sizes_do_not_share(house: House) -> None:
    house.ask(house.engine(ranks=2), P)
    assert house.hit(house.engine(ranks=1), P) == 0
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_at_one_rank(house: House, kind: str, rank: int) -> None:
    """The other rank has loaded well what follows; nobody may use it, nor store what was computed with it."""
    house.ask(house.engine(ranks=2), P)
    engine = house.engine(**KINDS[kind], seed=4)
    house.damage(engine, P, 3, rank)
    for seed in (1, 1, 2):
        house.add(engine, [*P, *prompt(seed, 40)], 12)
    house.finish()
    failed = [worker._report.failed_loads for worker in engine.workers]
    assert failed == [0, 0] and engine.counter("load.failed.checksum") >= 7
    house.wait_dropped()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hit_is_the_minimum_over_ranks(house: House, rank: int) -> None:
    one = house.engine(ranks=2)
    house.ask(one, P)
    house.damage(one, P, 3, rank)
    # A request that neither loads nor stores finds the damage; then the keeper drops the block with what follows.
    finder = house.engine(ranks=2, role="kv_consumer")
    house.ask(finder, P)
    house.wait_dropped()
    until(lambda: house.resident(one, P, rank) == [True] * 3 + [False] * 7, "dropped")
    assert house.resident(one, P, 1 - rank) == [True] * 10
    other = house.engine(ranks=2)
    assert house.hit(other, LONGER) == 3 * BLOCK
    house.finish()
    assert house.resident(one, P, rank) == [True] * 10, "what one rank lacked was stored again"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_that_one_rank_drops(house: House, rank: int) -> None:
    engine = house.engine(ranks=2)
    pool = engine.workers[rank]._tie.pool
    assert pool is not None
    store = pool.store
    pool.store = lambda *args, **more: Stored(0, Drop.NO_ROOM)  # type: ignore[method-assign]
    house.ask(engine, P)
    assert engine.counter("drop.no_room") > 0
    assert not any(house.resident(engine, P, rank)) and all(house.resident(engine, P, 1 - rank))
    pool.store = store  # type: ignore[method-assign]
    other = house.engine(ranks=2)
    assert house.hit(other, P) == 0
    assert house.hit(house.engine(ranks=2), P) == len(P) - 1
    house.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_every_load_and_save_is_answered_once_by_every_rank(house: House, kind: str) -> None:
    engines = [house.engine(**KINDS[kind], pages=40, n_seqs=4, seed=i) for i in range(2)]
    answered: dict[tuple[int, int, str], int] = {}
    for engine in engines:
        count_answers(engine, answered)
    for seed in range(12):
        house.add(engines[seed % 2], [*P[: 20 * (seed % 8 + 1)], *prompt(seed // 2, 30)], 30)
        engines[seed % 2].step()
    house.finish()
    assert answered and set(answered.values()) == {1}


def count_answers(engine: Engine, answered: dict[tuple[int, int, str], int]) -> None:
    for rank, worker in enumerate(engine.workers):
        take = worker.take_report

        def counted(take: Any = take, rank: int = rank) -> Any:
            report = take()
            for kind in ("loaded", "saved"):
                for number in getattr(report, kind, ()):
                    at = (id(engine), number * 10 + rank, kind)
                    answered[at] = answered.get(at, 0) + 1
            return report

        worker.take_report = counted  # type: ignore[method-assign]
