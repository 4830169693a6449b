"""What an absent, full, closed, damaged or slow pool does to requests: nothing but a counted miss."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

import penstock
from penstock import Drop, Miss, Stored
from penstock.connectors.counters import Counters
from penstock.connectors.transformers import Connector, RequestOptions
from penstock.connectors.transformers.attachment import Attachment
from penstock.connectors.transformers.cache import ReservedCache, snapshot_of
from penstock.connectors.transformers.saver import SaveJob, Saver
from penstock.errors import ConfigError, NoKeeper, NoSpaceLeft
from tests.connectors.models import alone, make_model, make_prompt, unique_name

Connect = Callable[..., Connector]
PROMPT = make_prompt(100)


def ask(connector: Connector, prompt: list[int] = PROMPT, **options: Any) -> Any:
    return connector.generate(prompt, 8, options=RequestOptions(**options), do_sample=False)


def test_without_a_keeper_it_serves_warns_once_and_counts(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "penstock.connector")
    with Connector(llama, name=unique_name()) as connector:
        results = [ask(connector) for _ in range(3)]
        assert connector.flush()
        assert connector.counters()["no_keeper"] == 3
    assert {result.miss for result in results} == {Miss.NO_KEEPER}
    assert results[0].tokens == alone(llama, PROMPT, 8)
    warnings = [record.getMessage() for record in caplog.records if record.name == "penstock.connector"]
    assert len(warnings) == 1 and "penstock serve" in warnings[0]


def test_it_attaches_when_a_keeper_comes_trying_once_a_second(pool: penstock.Pool, llama: PreTrainedModel) -> None:
    now, tries, there = [0.0], [0], [False]

    def open_pool(name: str) -> penstock.Pool:
        tries[0] += 1
        if not there[0]:
            raise NoKeeper(f"no keeper of {name}")
        return pool

    attachment = Attachment(None, "p", Counters(), open_pool=open_pool, now_s=lambda: now[0])
    with Connector(llama, pool) as connector:
        space = connector.space
    for time_s, expected_tries in ((0.0, 1), (0.5, 1), (0.99, 1), (1.0, 2), (1.5, 2)):
        now[0] = time_s
        assert attachment.handle(space, "") is Miss.NO_KEEPER
        assert tries[0] == expected_tries
    there[0] = True
    assert attachment.handle(space, "") is Miss.NO_KEEPER
    now[0] = 2.0
    found = attachment.handle(space, "")
    assert found == (pool, pool.space(space))
    now[0] = 9.0
    attachment.handle(space, "")
    assert tries[0] == 3


def test_a_connector_uses_the_keeper_that_came(
    pool: penstock.Pool, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock, "open", lambda name: pool, raising=False)
    with Connector(llama, name="any") as connector:
        assert ask(connector).miss is Miss.ABSENT
        assert connector.flush()
        assert ask(connector).hit_tokens == 96
    assert pool.closed, "a pool that the connector opened is closed with it"


def test_a_closed_pool_costs_only_the_hit(connect: Connect, pool: penstock.Pool, llama: PreTrainedModel) -> None:
    used, fresh = connect(llama), connect(llama)
    first = ask(used)
    used.flush()
    pool.close()
    for connector in (used, fresh):
        again = ask(connector)
        assert (again.hit_tokens, again.miss) == (0, Miss.CLOSED)
        assert again.tokens == first.tokens
        connector.flush()


def test_a_pool_that_raises_anything_of_its_own_costs_only_the_hit(
    connect: Connect, pool: penstock.Pool, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = connect(llama)
    first = ask(connector)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NoSpaceLeft("nothing left")

    for name in ("match", "store"):
        monkeypatch.setattr(pool, name, fail)
    again = ask(connector)
    assert again.tokens == first.tokens
    connector.flush()
    counters = connector.counters()
    assert counters["pool_error.NoSpaceLeft"] == 1
    assert counters["save_dropped.error"] > 0


def flip_byte(pool: penstock.Pool, connector: Connector, block: int, at: int) -> None:
    """Damage a block of PROMPT in the segment."""
    handle = pool.space(connector.space)
    with pool.match(handle, penstock.chain_keys(connector.space, PROMPT)) as lease:
        view = lease.views(block)
        address = view.ctypes.data + at
        ctypes.memset(address, ctypes.c_ubyte.from_address(address).value ^ 0x10, 1)
        del view


@pytest.mark.parametrize("block", [0, 3, 5])
def test_a_flipped_byte_is_a_miss_and_never_data(
    connect: Connect, pool: penstock.Pool, llama: PreTrainedModel, block: int
) -> None:
    connector = connect(llama)
    first = ask(connector)
    assert connector.flush()
    flip_byte(pool, connector, block, at=1234)
    again = ask(connector)
    assert (again.hit_tokens, again.miss) == (16 * block, Miss.CHECKSUM)
    assert again.tokens == first.tokens == alone(llama, PROMPT, 8)
    assert connector.flush()
    # The keeper dropped it when the lease ended, with what continued it, and the same request stored it again.
    handle, keys = pool.space(connector.space), penstock.chain_keys(connector.space, PROMPT)
    with pool.match(handle, keys) as lease:
        assert lease.verify() == len(lease) == 6
    assert ask(connector).hit_tokens == 96


def test_a_flipped_byte_reaches_the_tokens_where_checksums_are_off(
    connect: Connect, pool: penstock.Pool, llama: PreTrainedModel
) -> None:
    """The control of the test above: without the check, damage is data."""
    connector = connect(llama)
    ask(connector)
    assert connector.flush()
    pool.verify = False
    before = connector.load(PROMPT).cache.layers[0].keys.clone()
    flip_byte(pool, connector, 0, at=3)
    loaded = connector.load(PROMPT)
    assert loaded.hit_tokens == 96
    assert not torch.equal(loaded.cache.layers[0].keys, before)


def test_a_short_hit_after_damage_still_minds_the_minimum(
    connect: Connect, pool: penstock.Pool, llama: PreTrainedModel
) -> None:
    connector = connect(llama)
    ask(connector)
    assert connector.flush()
    flip_byte(pool, connector, 2, at=0)
    result = ask(connector, min_hit_tokens=64)
    assert (result.hit_tokens, result.miss) == (0, Miss.CHECKSUM)


def test_a_full_pool_drops_counts_and_goes_on(llama: PreTrainedModel) -> None:
    with penstock.open(unique_name(), embedded=16 << 20) as pool, Connector(llama, pool) as connector:
        handle = pool.space(connector.space)
        leases = []
        for seed in range(200):
            prompt = make_prompt(400, seed=seed)
            with torch.inference_mode():
                loaded = connector.load(prompt)
                llama(input_ids=torch.tensor([prompt]), past_key_values=loaded.cache, logits_to_keep=1)
            connector.save(prompt, loaded.cache)
            assert connector.flush()
            leases.append(pool.match(handle, penstock.chain_keys(connector.space, prompt)))
            if "save_dropped.no_room" in connector.counters():
                break
        else:
            pytest.fail("the pool never filled")
        # Everything is leased, so nothing can make room; requests go on, with the prefixes that are there.
        assert ask(connector).tokens == alone(llama, PROMPT, 8)
        assert connector.load(make_prompt(400, seed=0)).hit_tokens > 0
        for lease in leases:
            lease.release()
        ask(connector)
        assert connector.flush()
        assert ask(connector).hit_tokens == 96


def test_blocks_that_no_pool_can_hold_are_refused_at_the_start(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="block_tokens=1"):
        Connector(llama, block_tokens=1)


class SlowPool:
    """A pool whose `store` waits until it is let go; counts what it was given."""

    def __init__(self, pool: penstock.Pool) -> None:
        self.pool, self.stored = pool, []
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def match(self, *args: Any, **kwargs: Any) -> Any:
        return self.pool.match(*args, **kwargs)

    def store(self, handle: Any, keys: Any, tensors: Any, **kwargs: Any) -> Stored:
        self.entered.release()
        self.go.acquire()
        self.stored.append((keys.start_block, len(keys)))
        return Stored(len(keys), Drop.NONE)


@pytest.fixture
def slow(pool: penstock.Pool, llama: PreTrainedModel) -> tuple[SlowPool, Callable[[], SaveJob], Any]:
    with Connector(llama, pool) as connector:
        handle = pool.space(connector.space)
        shape = connector._shape
    cache = ReservedCache(shape, 64)
    states = torch.zeros(1, shape.n_heads, 64, shape.head_dim)
    for layer in range(shape.n_layers):
        cache.update(states, states, layer)
    slow_pool = SlowPool(pool)

    def job() -> SaveJob:
        tokens = make_prompt(64)
        return SaveJob(cast(Any, slow_pool), handle, None, tokens, n_saved=0, look_first=False)

    return slow_pool, job, snapshot_of(cache, shape)


def test_the_engine_never_waits_for_a_slow_pool(slow: Any) -> None:
    pool, make_job, snapshot = slow
    counters = Counters()
    saver = Saver(counters, max_requests=2, wait_s=0.0)
    jobs = [make_job() for _ in range(4)]
    assert saver.submit(jobs[0], snapshot, 2)
    pool.entered.acquire()
    # The worker is stuck in the pool. Two requests fit into the queue, one of them growing; the third does not.
    assert saver.submit(jobs[1], snapshot, 1)
    assert saver.submit(jobs[2], snapshot, 1)
    assert saver.submit(jobs[1], snapshot, 3)
    assert not saver.submit(jobs[3], snapshot, 4)
    assert counters.read() == {"save_dropped.queue_full": 4}
    assert not saver.flush(0.0)
    for _ in range(4):
        pool.go.release()
    assert saver.flush(30.0)
    assert pool.stored == [(0, 2), (0, 3), (0, 1)]
    assert saver.submit(jobs[0], snapshot, 4)
    assert saver.close(30.0)
    assert pool.stored[3:] == [(2, 2)]
    assert not saver.submit(jobs[0], snapshot, 4)


def test_a_bug_below_does_not_end_the_saving(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, make_job, snapshot = slow
    counters = Counters()
    saver = Saver(counters, max_requests=2, wait_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "store", lambda *args, **kwargs: 1 / 0)
        assert saver.submit(make_job(), snapshot, 2)
        assert saver.flush(30.0)
    assert counters.read()["save_dropped.error"] == 2
    pool.go.release()
    assert saver.submit(make_job(), snapshot, 2)
    assert saver.close(30.0)
    assert pool.stored == [(0, 2)]


def test_requests_from_several_threads(connect: Connect, llama: PreTrainedModel) -> None:
    connector = connect(llama)
    prompts = [PROMPT[:64] + make_prompt(40, seed=seed) for seed in range(4)]
    expected = [alone(llama, prompt, 8) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]

    def serve(index: int) -> None:
        for _ in range(3):
            found[index] = ask(connector, prompts[index]).tokens

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert connector.flush()
    assert [connector.load(prompt).hit_tokens for prompt in prompts] == [96] * 4


def test_a_forked_child_computes_and_touches_nothing(connect: Connect) -> None:
    model = make_model("llama")
    connector = connect(model)
    first = ask(connector)
    assert connector.flush()
    child = os.fork()
    if child == 0:
        result = ask(connector)
        good = result.miss is Miss.FORKED and result.hit_tokens == 0 and result.tokens == first.tokens
        os._exit(0 if good and not connector.flush() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ask(connector).hit_tokens == 96
