"""Requests whose blocks lie on disk: the keeper, what moves blocks, and the files are real; so are the tokens."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

import penstock
from penstock import Miss, chain_keys
from penstock.connectors import below
from penstock.connectors.transformers import Connector, FetchMode, RequestOptions, front
from penstock.connectors.transformers.generation import prefill
from penstock.connectors.transformers.support import inspect_model
from tests.connectors.models import SHAPES, alone, make_model, make_prompt
from tests.support import PATIENCE_S, Keeper, small_geometry, unique_name, until, wait_stopped
from tests.tiered import damage, replace_pool, tiered_keeper, wait_stored

PROMPTS = [make_prompt(400, seed=seed) for seed in range(1, 4)]
PROMPT = PROMPTS[0]
N_BLOCKS = 24
"""Blocks that a hit on PROMPT has: those of all tokens but the last."""
HIT = N_BLOCKS * 16


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, runtime_dir: Path) -> Path:
    """A disk on which an engine's blocks of all PROMPTS are; to be copied."""
    folder = tmp_path_factory.mktemp("stored") / "disk"
    with tiered_keeper(folder) as keeper:
        store(make_model("llama"), keeper, *PROMPTS)
    return folder


@pytest.fixture
def disk(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "disk")


@pytest.fixture
def keeper(disk: Path) -> Iterator[Keeper]:
    """An empty pool above that disk."""
    with tiered_keeper(disk) as running:
        yield running


@pytest.fixture
def slow_keeper(disk: Path, request: pytest.FixtureRequest) -> Iterator[Keeper]:
    """The same with a disk that takes its time."""
    with tiered_keeper(disk, f"latency={getattr(request, 'param', 0.5)}") as running:
        yield running


@contextlib.contextmanager
def connected(model: PreTrainedModel, keeper: Keeper, **settings: Any) -> Iterator[Connector]:
    """A connector of an engine that has just started, which stores everything, however busy the machine is."""
    settings.setdefault("save_wait_s", PATIENCE_S)
    with keeper.open() as pool, Connector(model, pool, **settings) as connector:
        yield connector


def ask(connector: Connector, prompt: list[int] = PROMPT, **options: Any) -> Any:
    options.setdefault("skip_save", True)
    return connector.generate(prompt, 8, options=RequestOptions(**options), do_sample=False)


def store(model: PreTrainedModel, keeper: Keeper, *prompts: list[int]) -> None:
    """Have prompts computed, and wait until they are on disk."""
    with connected(model, keeper) as connector:
        for prompt in prompts:
            ask(connector, prompt, skip_save=False)
        assert connector.flush()
    wait_stored(keeper)


def ends(connector: Connector) -> dict[str, int]:
    """How fetches ended."""
    counted = connector.counters()
    return {name.removeprefix("fetch.end."): n for name, n in counted.items() if name.startswith("fetch.end.")}


def test_tokens_with_blocks_from_disk_are_those_without_a_pool(keeper: Keeper) -> None:
    """For every family of models, one of which was stored before."""
    models = [make_model(family, **overrides) for family, overrides in SHAPES]
    for model in models:
        store(model, keeper, PROMPT)
    replace_pool(keeper)
    for model in models:
        with connected(model, keeper) as connector:
            result = ask(connector, fetch=FetchMode.ALWAYS)
            assert (result.hit_tokens, result.miss, result.fetched_blocks) == (HIT, Miss.NONE, N_BLOCKS)
            assert result.tokens == alone(model, PROMPT, 8)
            assert ends(connector) == {"done": 1} and connector.counters()["fetch.blocks"] == N_BLOCKS
            again = ask(connector, fetch=FetchMode.ALWAYS)
            assert (again.hit_tokens, again.fetched_blocks) == (HIT, 0), "it is in the pool now"
    keeper.fsck()


def test_an_engine_that_stays_gets_them_from_the_new_pool(keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, keeper) as connector:
        ask(connector, skip_save=False)
        assert connector.flush()
        wait_stored(keeper)
        replace_pool(keeper)
        results = []
        until(lambda: results.append(ask(connector, fetch=FetchMode.ALWAYS)) or results[-1].hit_tokens, "it is back")
        assert results[-1].fetched_blocks == N_BLOCKS
        assert all(result.tokens == alone(llama, PROMPT, 8) for result in results)


def test_a_conversation_goes_on_where_the_disk_ends(keeper: Keeper, llama: PreTrainedModel) -> None:
    longer = [*PROMPT, *make_prompt(60, seed=5)]
    with connected(llama, keeper) as connector:
        result = ask(connector, longer, fetch=FetchMode.ALWAYS)
        assert (result.hit_tokens, result.miss) == (25 * 16, Miss.ABSENT)
        assert result.tokens == alone(llama, longer, 8)


def test_what_is_in_the_pool_is_not_fetched(keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, keeper) as connector:
        ask(connector, PROMPT[:200], fetch=FetchMode.ALWAYS)
        result = ask(connector, fetch=FetchMode.ALWAYS)
        assert (result.hit_tokens, result.fetched_blocks) == (HIT, N_BLOCKS - 12)


def test_a_damaged_block_is_recomputed(disk: Path, llama: PreTrainedModel) -> None:
    with tiered_keeper(disk) as keeper, connected(llama, keeper) as connector, keeper.open() as pool:
        ask(connector, fetch=FetchMode.ALWAYS)
        with pool.match(pool.space(connector.space), chain_keys(connector.space, PROMPT)) as lease:
            block = bytes(lease.views(9))
    damage(disk, block)
    with tiered_keeper(disk) as keeper:
        with connected(llama, keeper) as connector:
            for fetched in (9, 0):
                result = ask(connector, fetch=FetchMode.ALWAYS)
                assert (result.hit_tokens, result.fetched_blocks) == (9 * 16, fetched)
                assert result.tokens == alone(llama, PROMPT, 8)
            assert ends(connector) == {"damaged": 1, "nothing_below": 1}, "what is damaged is dropped"
            ask(connector, fetch=FetchMode.ALWAYS, skip_save=False)
            assert connector.flush()
        wait_stored(keeper)
        until(lambda: keeper.tier("disk")["blocks"] >= len(PROMPTS) * (N_BLOCKS + 1), "and written again")
        assert keeper.tier("disk")["counters"]["damaged"] == 1


# ---- the choice


def test_an_engine_of_unknown_speed_fetches(
    keeper: Keeper, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(below, "_UNMEASURED_S", 30.0)  # the machine may be busy
    with connected(llama, keeper) as connector:
        assert ask(connector).fetched_blocks == N_BLOCKS
        assert ends(connector) == {"done": 1}


def test_a_slow_engine_fetches(keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, keeper) as connector:
        for _ in range(10):
            connector._bringer.computed(1000, 0, 100.0)
        assert ask(connector).fetched_blocks == N_BLOCKS
        assert ends(connector) == {"done": 1}


def test_a_tier_that_is_slower_than_computing_is_left_alone(slow_keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, slow_keeper) as connector:
        first = ask(connector, PROMPTS[0], fetch=FetchMode.ALWAYS)
        assert first.fetched_blocks == N_BLOCKS and ends(connector) == {"done": 1}
        # Both speeds are measured now.
        second = ask(connector, PROMPTS[1])
        assert (second.hit_tokens, second.miss) == (0, Miss.ABSENT)
        assert ends(connector) == {"done": 1, "recomputed": 1}
        assert ask(connector, PROMPTS[2], fetch=FetchMode.ALWAYS).fetched_blocks == N_BLOCKS
        assert [first.tokens, second.tokens] == [alone(llama, prompt, 8) for prompt in PROMPTS[:2]]


def test_a_tier_that_is_slower_than_it_was_is_given_up(slow_keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, slow_keeper) as connector:
        for _ in range(10):
            connector._bringer.computed(400, 0, 0.05)
        result = ask(connector)
        assert (result.hit_tokens, result.fetched_blocks) == (0, 0)
        assert result.tokens == alone(llama, PROMPT, 8)
        assert ends(connector) == {"too_slow": 1}
        until(lambda: slow_keeper.tier_report()["fetches"]["ended.cancelled"] == 1, "the mover stops, too")


def test_a_request_may_forbid_it(keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, keeper) as connector:
        assert ask(connector, fetch=FetchMode.NEVER).miss is Miss.ABSENT
        assert ask(connector, fetch=FetchMode.ALWAYS, skip_load=True).miss is Miss.SKIPPED
        assert not ends(connector)
        longer = [*PROMPT, *make_prompt(80, seed=3)]
        assert ask(connector, longer, fetch=FetchMode.ALWAYS, min_hit_tokens=25 * 16 + 1).hit_tokens == 0
        assert ends(connector) == {"too_little_below": 1}
        assert ask(connector, longer, fetch=FetchMode.ALWAYS, min_hit_tokens=25 * 16).hit_tokens == 25 * 16


# ---- the front computed, the back fetched


class Narrow:
    """A connector above a disk that takes a second for a prompt, as is known, and so is said to take the engine. It
    computes a front just as long as the rest is being read."""

    def __init__(self, keeper: Keeper, connector: Connector, pool: penstock.Pool) -> None:
        self.keeper, self.connector = keeper, connector
        self.start = self.stop = 0
        """The blocks that were ordered last."""
        self._fetch, pool.fetch = pool.fetch, self._ordered  # type: ignore[method-assign]

    def _ordered(self, handle: Any, keys: Any, *args: Any, start: int = 0, **more: Any) -> Any:
        self.start, self.stop = start, len(keys)
        return self._fetch(handle, keys, *args, start=start, **more)

    def compute(self, model: Any, tokens: list[int], cache: Any) -> None:
        prefill(model, tokens, cache)
        n_read = N_BLOCKS + self.stop - self.start
        until(lambda: self.keeper.tier("disk")["counters"]["good"] >= n_read, "the rest was read")


@pytest.fixture
def narrow(disk: Path, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Narrow]:
    shape = inspect_model(llama)
    block_bytes = shape.token_bytes * 2 * shape.n_layers * 16
    with (
        tiered_keeper(disk, f"bandwidth={N_BLOCKS * block_bytes}") as keeper,
        keeper.open() as pool,
        Connector(llama, pool, save_wait_s=PATIENCE_S) as connector,
    ):
        assert ask(connector, PROMPTS[1], fetch=FetchMode.ALWAYS).fetched_blocks == N_BLOCKS
        for _ in range(10):
            connector._bringer.computed(400, 0, 1.0)
        narrow = Narrow(keeper, connector, pool)
        monkeypatch.setattr(front, "prefill", narrow.compute)
        yield narrow


def test_the_front_is_computed_while_the_back_comes(narrow: Narrow, llama: PreTrainedModel) -> None:
    connector = narrow.connector
    result = ask(connector, skip_save=False)
    assert 0 < narrow.start < narrow.stop <= N_BLOCKS
    came = narrow.stop - narrow.start
    assert (result.front_tokens, result.hit_tokens, result.fetched_blocks) == (16 * narrow.start, 16 * came, came)
    assert result.tokens == alone(llama, PROMPT, 8)
    assert connector.counters()["fetch.split"] == 1 and ends(connector) == {"done": 2}
    assert connector.flush() and connector.counters()["saved_blocks"] == N_BLOCKS + 1 - came
    again = ask(connector)
    assert (again.hit_tokens, again.front_tokens, again.fetched_blocks) == (HIT, 0, 0), "it is in the pool now"


def test_what_the_pool_has_is_not_computed_for_the_front(narrow: Narrow, llama: PreTrainedModel) -> None:
    connector = narrow.connector
    ask(connector, PROMPT[:65], skip_load=True, skip_save=False)
    assert connector.flush()
    result = ask(connector, skip_save=False)
    came = narrow.stop - narrow.start
    assert 4 < narrow.start < narrow.stop
    assert (result.front_tokens, result.hit_tokens) == (16 * (narrow.start - 4), 16 * (4 + came))
    assert result.fetched_blocks == came and result.tokens == alone(llama, PROMPT, 8)


@pytest.mark.parametrize("options", [{}, {"skip_save": False, "min_hit_tokens": HIT}])
def test_a_front_is_not_computed_where_that_is_not_wanted(narrow: Narrow, options: dict[str, Any]) -> None:
    result = ask(narrow.connector, **options)
    assert (result.hit_tokens, result.front_tokens) in {(HIT, 0), (0, 0)}
    assert "fetch.split" not in narrow.connector.counters()


def test_load_computes_nothing(narrow: Narrow) -> None:
    loaded = narrow.connector.load(PROMPT)
    assert loaded.front_tokens == 0 and "fetch.split" not in narrow.connector.counters()


def test_a_front_that_finds_no_room_costs_the_hit(
    narrow: Narrow, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "store", lambda *_: None)
    connector = narrow.connector
    result = ask(connector, skip_save=False)
    assert (result.hit_tokens, result.front_tokens) == (0, 16 * narrow.start)
    assert result.tokens == alone(llama, PROMPT, 8)
    assert ends(connector) == {"done": 1, "no_front": 1}
    assert connector.flush()
    assert connector.counters()["saved_blocks"] == N_BLOCKS + 1, "all the same, it is stored"


def test_a_front_that_leaves_again_is_stored_again(
    narrow: Narrow, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is replaced while the front is computed, and what was stored of it is gone with it."""
    connector, store = narrow.connector, front.store

    def store_and_lose(*args: Any) -> None:
        store(*args)
        replace_pool(narrow.keeper)

    monkeypatch.setattr(front, "store", store_and_lose)
    result = ask(connector, skip_save=False)
    assert (result.hit_tokens, result.front_tokens) == (0, 16 * narrow.start)
    assert result.tokens == alone(llama, PROMPT, 8)
    monkeypatch.undo()
    until(lambda: ask(connector, skip_save=False, fetch=FetchMode.NEVER).hit_tokens == HIT, "it is stored again")
    narrow.keeper.fsck()


def test_what_the_model_raises_for_a_front_is_the_callers(narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(front, "prefill", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(narrow.connector, skip_save=False)
    assert ends(narrow.connector) == {"done": 1, "no_front": 1}
    until(lambda: narrow.keeper.tier_report()["fetches"]["ended.cancelled"] == 1, "what came is given up")
    assert ask(narrow.connector, fetch=FetchMode.ALWAYS).hit_tokens == HIT


def test_a_damaged_block_before_the_front_is_computed_anew(narrow: Narrow, llama: PreTrainedModel) -> None:
    connector, keeper = narrow.connector, narrow.keeper
    ask(connector, PROMPT[:65], skip_load=True, skip_save=False)
    assert connector.flush()
    with keeper.open() as pool, pool.match(pool.space(connector.space), chain_keys(connector.space, PROMPT)) as lease:
        assert len(lease) == 4
        block = bytes(lease.views(2))
    damage(keeper.path, block)
    result = ask(connector, skip_save=False)
    assert (result.hit_tokens, result.front_tokens) == (2 * 16, 0)
    assert result.tokens == alone(llama, PROMPT, 8) and connector.flush()
    until(lambda: ask(connector, skip_save=False, fetch=FetchMode.NEVER).hit_tokens == HIT, "it is stored anew")
    assert connector.flush()
    keeper.fsck()


def test_no_front_that_may_come_too_late(narrow: Narrow, llama: PreTrainedModel) -> None:
    """The engine is said to be so slow that the fetch would be over first."""
    for _ in range(20):
        narrow.connector._bringer.computed(400, 0, 100.0)
    result = ask(narrow.connector, skip_save=False)
    assert (result.hit_tokens, result.front_tokens) == (HIT, 0) and narrow.start == 0


# ---- what is not there


def test_a_mover_that_is_stopped_costs_the_deadline_once(keeper: Keeper, llama: PreTrainedModel) -> None:
    mover = keeper.tier_report()["mover"]["pid"]
    with connected(llama, keeper, fetch_deadline_s=0.3) as connector:
        os.kill(mover, signal.SIGSTOP)
        wait_stopped(mover)
        try:
            results = [ask(connector, fetch=FetchMode.ALWAYS), ask(connector, fetch=FetchMode.ALWAYS)]
        finally:
            os.kill(mover, signal.SIGCONT)
        assert all(result.tokens == alone(llama, PROMPT, 8) for result in results)
        assert [result.hit_tokens for result in results] == [0, 0]
        assert ends(connector) == {"no_answer": 1, "paused": 1}
        until(lambda: ask(connector, fetch=FetchMode.ALWAYS).hit_tokens == HIT, "it comes back")


@pytest.mark.parametrize("slow_keeper", [30], indirect=True)
def test_a_fetch_ends_at_its_deadline(slow_keeper: Keeper, llama: PreTrainedModel) -> None:
    with connected(llama, slow_keeper, fetch_deadline_s=0.2) as connector:
        result = ask(connector, fetch=FetchMode.ALWAYS)
        assert (result.hit_tokens, result.tokens) == (0, alone(llama, PROMPT, 8))
        assert ends(connector) == {"deadline": 1}


def test_the_prefix_is_leased_while_the_rest_comes(keeper: Keeper, llama: PreTrainedModel) -> None:
    with keeper.open() as pool, Connector(llama, pool) as connector:
        ask(connector, PROMPT[:200], fetch=FetchMode.ALWAYS)
        held: list[int] = []
        fetch = pool.fetch

        def looked_at(*args: Any, **more: Any) -> Any:
            held.append(pool.held()["leases"])
            return fetch(*args, **more)

        pool.fetch = looked_at  # type: ignore[method-assign]
        assert ask(connector, fetch=FetchMode.ALWAYS).hit_tokens == HIT
        assert held == [12] and pool.held()["leases"] == 0


def test_without_tiers_or_a_keeper_nothing_is_counted(llama: PreTrainedModel) -> None:
    with Keeper(small_geometry()) as plain, connected(llama, plain) as connector:
        assert ask(connector, fetch=FetchMode.ALWAYS).miss is Miss.ABSENT
        assert not ends(connector)
    with Connector(llama, name=unique_name()) as connector:
        assert ask(connector, fetch=FetchMode.ALWAYS).miss is Miss.NO_KEEPER
        assert not ends(connector)


def test_requests_at_once_bring_a_prefix_once(keeper: Keeper, llama: PreTrainedModel) -> None:
    results: list[Any] = []
    with connected(llama, keeper) as connector:
        threads = [
            threading.Thread(target=lambda: results.append(ask(connector, fetch=FetchMode.ALWAYS))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [result.hit_tokens for result in results] == [HIT] * 3
        assert sum(result.fetched_blocks for result in results) == N_BLOCKS
        assert len({tuple(result.tokens) for result in results}) == 1


def test_the_log_line_says_it(keeper: Keeper, llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with connected(llama, keeper) as connector, caplog.at_level(logging.INFO, "penstock.connector"):
        ask(connector, fetch=FetchMode.ALWAYS)
    assert f"hit_tokens={HIT} miss=none fetched_blocks={N_BLOCKS}" in caplog.text
