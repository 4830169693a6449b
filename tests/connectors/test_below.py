"""The choice between fetching and computing, and when a fetch is given up: the arithmetic, and all ranks at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from penstock import FetchEnd, KeyChain, SpaceHandle, chain_keys
from penstock.connectors.below import NOTHING, Bringer, Brought, FetchMode, Wish
from penstock.connectors.counters import Counters
from penstock.connectors.pace import Pace
from penstock.identity.space import Rank
from penstock.pool.below import Below, Run
from tests.support import BLOCK_TOKENS, SPACE, Keeper, must_store, tokens, wait_stopped
from tests.tiered import replace_pool, tiered_keeper, wait_stored

# ---- pace


def test_on_time_is_waited_for_to_the_end() -> None:
    pace = Pace(np.array([0.0, 0.1, 0.2, 0.3]), np.array([0.4, 0.3, 0.2, 0.0]))
    assert all(pace.holds(arrived, 0.1 * arrived) for arrived in range(4))


def test_what_lags_is_given_up_when_computing_the_rest_would_be_faster() -> None:
    expected, lost = np.linspace(0, 0.4, 5), np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    # Twice as slow as expected: 0.6 s are left, and computing takes 0.75. Three times: 0.9 s.
    assert Pace(expected, lost).holds(1, 0.2)
    assert not Pace(expected, lost).holds(1, 0.32)
    # That late from the start, but then as fast as it should be: the pace is what it was on the whole.
    pace = Pace(expected, lost)
    assert pace.holds(1, 0.2) and pace.holds(3, 0.45)


def test_silence_is_waited_for_a_quarter_of_what_it_would_save() -> None:
    pace = Pace(np.array([0.0, 0.1]), np.array([1.0, 0.0]))
    assert pace.holds(0, 0.34) and not pace.holds(0, 0.36)


def test_nothing_is_given_up_while_the_engine_is_not_measured() -> None:
    assert Pace(np.array([0.0, 0.1])).holds(0, 1e6)


@st.composite
def fetches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[float]]:  # type: ignore[type-arg]
    """What was expected, what computing would take, and when blocks really come (for ever: never)."""
    n = draw(st.integers(1, 12))
    amounts = st.floats(1e-4, 1.0)
    costs = np.array(draw(st.lists(amounts, min_size=n, max_size=n)))
    until = np.concatenate(([0.0], np.cumsum(costs)))
    each = draw(st.floats(1.05, 20.0))
    # Worth it at every point, as `choose` makes sure of.
    lost = each * (until[-1] - until)
    gaps = draw(st.lists(st.floats(0.0, 5.0) | st.just(1e9), min_size=n, max_size=n))
    return until, lost, list(np.cumsum(gaps))


@given(fetches())
def test_time_lost_to_a_bad_tier_is_bounded(fetch: tuple[np.ndarray, np.ndarray, list[float]]) -> None:  # type: ignore[type-arg]
    """However blocks come: from the last that did, nobody waits longer than is expected for the rest at this pace and a
    quarter of computing it; nor does it take more than twice as long as computing everything from there."""
    until, lost, arrivals = fetch
    pace, now, arrived, step = Pace(until, lost), 0.0, 0, float(lost[0]) / 50 + 1e-6
    since, saved = 0.0, float(lost[0])
    for _ in range(100_000):
        there = sum(at <= now for at in arrivals)
        if there > arrived:
            arrived, since, saved = there, now, float(lost[there])
        if arrived == len(arrivals) or not pace.holds(arrived, now):
            break
        assert now - since <= 1.25 * saved + 1e-9
        now += step
    else:
        raise AssertionError("it is waited for without end")


# ---- the choice


class Pool:
    """Answers `locate` as told."""

    def __init__(self, *belows: Below) -> None:
        self.belows = list(belows)
        self.asked_s: list[float] = []

    def locate(self, handle: SpaceHandle, keys: KeyChain, wait_s: float) -> Below:
        self.asked_s.append(wait_s)
        return self.belows.pop(0)


def bringer(per_token_s: float | None = None) -> Bringer:
    made = Bringer(Counters(), 10.0)
    for n_tokens in (100, 400, 1600) * 10 if per_token_s else ():
        made.computed(n_tokens, 0, n_tokens * (per_token_s or 0.0))
    return made


def planned(made: Bringer, belows: list[Below], wish: Wish) -> tuple[int, int] | None:
    plan = made._plan(belows, BLOCK_TOKENS, wish, time.monotonic() + 10.0)
    return None if plan is None else (plan.first, plan.end)


def run(n: int, seconds: float, tier: str = "disk") -> Run:
    return Run(tier, n, seconds)


WISH = Wish(n_tokens=1601)
WANTED: Any = [(SimpleNamespace(block_tokens=BLOCK_TOKENS), KeyChain(SPACE))]


@pytest.mark.parametrize(
    ("per_token_s", "seconds", "fetched"), [(1e-3, 0.1, (0, 100)), (1e-3, 10.0, None), (None, 10.0, (0, 100))]
)
def test_fetching_against_computing(per_token_s: float | None, seconds: float, fetched: tuple[int, int] | None) -> None:
    assert planned(bringer(per_token_s), [Below(0, (run(100, seconds),))], WISH) == fetched


def test_a_slow_tier_behind_a_fast_one_is_left_out() -> None:
    belows = [Below(10, (run(40, 0.01), run(50, 60.0, "far")))]
    assert planned(bringer(1e-3), belows, WISH) == (10, 50)


def test_always_and_never_do_not_ask_what_it_costs() -> None:
    slow = [Below(0, (run(100, 1e4),))]
    assert planned(bringer(1e-6), slow, replace(WISH, mode=FetchMode.ALWAYS)) == (0, 100)
    assert bringer().bring(Pool(), [], replace(WISH, mode=FetchMode.NEVER)) is NOTHING  # type: ignore[arg-type]


def test_all_ranks_are_fetched_for_one_hit() -> None:
    """Each takes its time, and a hit is what all of them have."""
    one, other = Below(0, (run(100, 0.9),)), Below(20, (run(60, 0.3),))
    assert planned(bringer(1e-3), [one, other], WISH) == (0, 80)
    # 0.9 s for one rank, 1.8 s for two; computing takes 1.6.
    assert planned(bringer(1e-3), [Below(0, (run(100, 0.9),))] * 2, WISH) is None
    assert planned(bringer(1e-3), [Below(0, (run(100, 0.9),))], WISH) == (0, 100)


def test_what_the_engine_has_by_itself_saves_nothing() -> None:
    """It has 80 blocks, which the pool lacks: they must come, too, and only 20 are worth something."""
    wish = replace(WISH, have_tokens=80 * BLOCK_TOKENS)
    assert planned(bringer(1e-3), [Below(0, (run(100, 0.2),))], wish) == (0, 100)
    assert planned(bringer(1e-3), [Below(0, (run(100, 0.5),))], wish) is None
    assert planned(bringer(1e-3), [Below(80, (run(20, 0.2),))], wish) == (80, 100)


@pytest.mark.parametrize(("least", "fetched"), [(1280, (0, 80)), (1281, None)])
def test_a_hit_that_is_too_short_is_not_fetched(least: int, fetched: tuple[int, int] | None) -> None:
    wish = replace(WISH, min_hit_tokens=least, mode=FetchMode.ALWAYS)
    assert planned(bringer(), [Below(0, (run(80, 0.1),))], wish) == fetched


def test_what_loading_costs_counts() -> None:
    below = [Below(0, (run(100, 1.0),))]
    assert planned(bringer(1e-3), below, WISH) == (0, 100)
    assert planned(bringer(1e-3), below, replace(WISH, load_s_per_block=0.01)) is None


def test_before_anything_is_measured_the_tiers_get_what_they_promise() -> None:
    plan = bringer()._plan([Below(0, (run(100, 1.0),))], BLOCK_TOKENS, WISH, time.monotonic() + 10.0)
    assert plan is not None and plan.limit_s == pytest.approx(2.25)


def test_asking_takes_a_tenth_of_computing_at_most() -> None:
    for per_token_s, wait_s in ((1e-3, 0.16), (1e-6, 0.005), (1.0, 0.5), (None, 0.25)):
        pool = Pool(Below(0))
        bringer(per_token_s).bring(pool, WANTED, WISH)  # type: ignore[arg-type]
        assert pool.asked_s == [pytest.approx(wait_s, rel=0.1)]


def test_after_no_answer_nobody_is_asked_for_a_while() -> None:
    made, pool = bringer(), Pool(Below(0, why=FetchEnd.DEADLINE), Below(7))
    assert made.bring(pool, WANTED, WISH) is made.bring(pool, WANTED, WISH) is NOTHING  # type: ignore[arg-type]
    assert made._counters.read() == {"fetch.end.no_answer": 1, "fetch.end.paused": 1}
    made._quiet_until = 0.0
    assert made.bring(pool, WANTED, WISH) == Brought(7)  # type: ignore[arg-type]


def test_what_fetches_take_beside_the_tiers_is_learnt_and_forgotten() -> None:
    made, below = bringer(1e-5), [Below(0, (run(100, 0.001),))]
    assert planned(made, below, WISH) == (0, 100)
    for _ in range(20):
        made._learn(0.03)
    assert made._overhead_s <= 0.05, "one hang must not spoil it for long"
    assert planned(made, below, WISH) is None
    for _ in range(40):
        planned(made, below, WISH)
    assert planned(made, below, WISH) == (0, 100)


# ---- with a real pool


RANKS = [replace(SPACE, tensor_rank=Rank(rank, 2)) for rank in range(2)]


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with tiered_keeper(tmp_path / "disk") as running:
        yield running


def chains(*blocks: int) -> list[KeyChain]:
    """One conversation as each rank keeps it, of so many blocks each."""
    return [chain_keys(space, tokens(3, blocks=n)) for space, n in zip(RANKS, blocks, strict=True)]


def test_every_rank_gets_its_blocks(keeper: Keeper) -> None:
    with keeper.open() as pool:
        for space, keys in zip(RANKS, chains(40, 25), strict=True):
            must_store(pool, pool.space(space), keys)
    assert wait_stored(keeper) == 65
    replace_pool(keeper)
    with keeper.open() as pool:
        wanted = list(zip([pool.space(space) for space in RANKS], chains(40, 40), strict=True))
        made = bringer()
        wish = Wish(n_tokens=40 * BLOCK_TOKENS + 1, mode=FetchMode.ALWAYS)
        assert made.bring(pool, wanted, wish) == Brought(25, 50)
        assert [int(pool.resident(handle, keys.array).sum()) for handle, keys in wanted] == [25, 25]
        assert made.bring(pool, wanted, wish) == Brought(25)
        assert made._counters.read()["fetch.end.done"] == made._counters.read()["fetch.end.nothing_below"] == 1


def test_a_fetch_that_nobody_wants_is_called_off(keeper: Keeper, tmp_path: Path) -> None:
    keys = chains(40, 40)[0]
    with keeper.open() as pool:
        must_store(pool, pool.space(RANKS[0]), keys)
    wait_stored(keeper)
    keeper.stop()
    with tiered_keeper(tmp_path / "disk", "latency=30") as slow, slow.open() as pool:
        looks = iter([False, False, True])
        made = bringer()
        wish = Wish(n_tokens=641, mode=FetchMode.ALWAYS)
        assert made.bring(pool, [(pool.space(RANKS[0]), keys)], wish, give_up=lambda: next(looks)) == NOTHING
        assert made._counters.read()["fetch.end.called_off"] == 1


def test_until_when_is_kept_whatever_happens(keeper: Keeper) -> None:
    keys = chains(40, 40)[0]
    with keeper.open() as pool:
        handle = pool.space(RANKS[0])
        must_store(pool, handle, keys)
        wait_stored(keeper)
        mover = keeper.tier_report()["mover"]["pid"]
        os.kill(mover, signal.SIGSTOP)
        wait_stopped(mover)
        try:
            wish = Wish(n_tokens=641, mode=FetchMode.ALWAYS)
            made = bringer()
            assert made.bring(pool, [(handle, keys)], wish, until_s=time.monotonic() + 0.05) is NOTHING
            assert made._counters.read() == {"fetch.end.no_answer": 1}
        finally:
            os.kill(mover, signal.SIGCONT)


def test_a_pool_that_is_closed_has_nothing_below(keeper: Keeper) -> None:
    pool: penstock.Pool = keeper.open()
    handle = pool.space(RANKS[0])
    pool.close()
    made = bringer()
    assert made.bring(pool, [(handle, chains(4, 4)[0])], WISH) is NOTHING
    assert made._counters.read() == {}
