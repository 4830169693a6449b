"""The harness itself, on servers without a connector: they start, answer, are shared, and leave nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.client import (
    RequestFailed,
    complete,
    complete_all,
    metrics,
    open_stream,
    parse_metrics,
    stream,
)
from tests.engines.fleet import Fleet
from tests.engines.models import SHIPPED, prompt_tokens, tiny_llama
from tests.engines.server import ServerConfig, VllmServer, running
from tests.support import Keeper, until


@pytest.fixture(scope="session")
def plain(models: Path) -> ServerConfig:
    return ServerConfig(tiny_llama(models / "tiny-float32"))


def test_answers_are_the_same_twice_and_depend_on_the_whole_prompt(fleet: Fleet, plain: ServerConfig) -> None:
    [server] = fleet.get(plain)
    prompt = prompt_tokens(1000, 1)
    first = complete(server, prompt, 32)
    again = complete(server, prompt, 32)
    assert first.tokens == again.tokens and len(first.tokens) == 32 and first.prompt_tokens == 1000
    assert len(set(first.tokens)) > 8, "a constant answer would hide wrong contents"
    assert first.cached_tokens == 0
    assert again.cached_tokens == 1000 // 32 * 32
    for at in (0, 300, 700, 990):
        changed = [*prompt]
        changed[at : at + 32] = prompt_tokens(32, 2)[: len(changed[at : at + 32])]
        assert complete(server, changed, 32).tokens != first.tokens, f"tokens at {at} do not matter"


def test_streamed_and_at_once_are_the_same_answers(fleet: Fleet, plain: ServerConfig) -> None:
    [server] = fleet.get(plain)
    prompts = [prompt_tokens(100 + 10 * i, 3, i) for i in range(8)]
    alone = [complete(server, prompt).tokens for prompt in prompts]
    streamed = stream(server, prompts[0], logprobs=2)
    assert streamed.tokens == alone[0] and 0 < streamed.ttft_s <= streamed.total_s
    assert len(streamed.logprobs) == 16 and streamed.cached_tokens == 96
    assert [done.tokens for done in complete_all(server, prompts)] == alone
    assert [done.tokens for done in complete_all(server, prompts, streamed=True)] == alone
    both = complete(server, prompts[0], n=2, temperature=1, top_k=1)
    assert both.choices == (alone[0], alone[0])


def test_a_request_is_aborted_by_hanging_up(fleet: Fleet, plain: ServerConfig) -> None:
    [server] = fleet.get(plain)
    n_tokens = 10_000
    before = metrics(server).total("vllm:generation_tokens_total")
    with open_stream(server, prompt_tokens(50, 4), n_tokens) as chunks:
        next(chunks)
    # The gauges stay as they are while the engine idles; another request's steps bring them up to date.
    until(lambda: complete(server, [20], 1) and not metrics(server).total("vllm:num_requests_running"), "nothing runs")
    assert metrics(server).total("vllm:generation_tokens_total") - before < n_tokens


def test_an_error_is_an_error(fleet: Fleet, plain: ServerConfig) -> None:
    [server] = fleet.get(plain)
    with pytest.raises(RequestFailed, match="maximum context length") as caught:
        complete(server, prompt_tokens(plain.max_model_len + 1, 5))
    assert caught.value.status == 400


def test_metrics_are_parsed() -> None:
    text = '# HELP a b\nx_total{engine="0",why="a \\"b\\", c"} 2.0\nx_total{engine="1",why="d"} 3\ny 1e-3\n'
    parsed = parse_metrics(text)
    assert parsed.total("x_total") == 5 and parsed.total("x_total", engine="1") == 3
    assert parsed.total("y") == 0.001 and parsed.total("z") == 0
    with pytest.raises(AssertionError, match="not a sample"):
        parse_metrics("nonsense")


def test_two_servers_start_side_by_side_and_the_shipped_model_writes(fleet: Fleet) -> None:
    config = ServerConfig(SHIPPED, max_model_len=8192)
    one, other = fleet.get(config, replace(config, replica=1, block_size=64))
    assert one.pid != other.pid and one.port != other.port
    prompt = "Once upon a time there was"
    answer = complete(one, prompt, 24)
    assert any(character.isalpha() for character in answer.text)
    assert complete(other, prompt, 24).prompt_tokens == answer.prompt_tokens
    assert fleet.get(config) == [one], "a configuration that runs is not started again"


def test_a_server_that_died_is_replaced_and_leaves_nothing(fleet: Fleet, plain: ServerConfig) -> None:
    [server] = fleet.get(plain)
    members = server.members()
    assert len(members) >= 3 and server.role("EngineCore") and server.role("Worker")
    os.kill(server.role("EngineCore")[0], signal.SIGKILL)
    until(lambda: not server.alive, "the server notices")
    [fresh] = fleet.get(plain)
    assert fresh is not server and fresh.alive
    assert not running(members)
    assert complete(fresh, prompt_tokens(64, 6)).tokens
    left = fresh.members()
    fleet.end(plain)
    assert left and fresh.process is None and not running(left)


def test_a_server_that_cannot_start_says_why(tmp_path: Path, plain: ServerConfig) -> None:
    server = VllmServer(replace(plain, arguments=("--no-such-option",)), tmp_path / "log")
    with pytest.raises(AssertionError, match="no-such-option"):
        server.start()
    assert not server.members()


def test_a_pool_of_ones_own_takes_its_servers_along(request: pytest.FixtureRequest, fleet: Fleet, models: Path) -> None:
    shared: Keeper = request.getfixturevalue("shared_keeper")
    own: Keeper = request.getfixturevalue("keeper")
    on_pool = request.getfixturevalue("on_pool")
    assert own.name != shared.name and own.stat()["touched_bytes"] > 0
    config = on_pool(own, tiny_llama(models / "tiny-float32"))
    one, other = fleet.get(config, replace(config, replica=1))
    prompt = prompt_tokens(1000, 7)
    first = complete(one, prompt)
    until(lambda: own.stat()["blocks"] >= 1000 // 32, "the prompt is stored")
    second = complete(other, prompt)
    assert second.tokens == first.tokens and second.cached_tokens == 1000 // 32 * 32 and first.cached_tokens == 0
