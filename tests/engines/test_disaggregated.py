"""Prefill and decode on two servers, joined by the pool, behind the proxy of `examples/disaggregated`."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.engines.blocks import ALONE, hit_of
from tests.engines.client import RequestFailed, complete, complete_all, open_stream, stream
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.server import ServerConfig, VllmServer, free_port, penstock_transfer
from tests.support import ROOT, Keeper, environment, until


@dataclass
class Rig:
    prefill: VllmServer
    decode: VllmServer
    proxy: VllmServer
    """Only its port: what the client's functions need of a server."""
    log: Path


def transfer(keeper: Keeper, role: str) -> str:
    return json.dumps({**json.loads(penstock_transfer(keeper.name)), "kv_role": role})


@pytest.fixture(scope="module")
def rig(fleet: Fleet, models: Path, shared_keeper: Keeper, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    model = tiny_llama(models / "tiny-float32-seed7", seed=7)
    first = ServerConfig(model, kv_transfer=transfer(shared_keeper, "kv_producer"))
    prefill, decode = fleet.get(first, replace(first, kv_transfer=transfer(shared_keeper, "kv_consumer")))
    port, log = free_port(), tmp_path_factory.mktemp("proxy") / "log"
    command = [sys.executable, str(ROOT / "examples" / "disaggregated" / "proxy.py"), "--port", str(port)]
    with log.open("wb") as out:
        proxy = subprocess.Popen(
            [*command, "--prefill", prefill.url, "--decode", decode.url, "--patience", "60"],
            env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        until(lambda: answers(port), "the proxy answers")
        yield Rig(prefill, decode, cast(VllmServer, SimpleNamespace(port=port)), log)
    finally:
        proxy.send_signal(signal.SIGINT)
        proxy.wait(30)


def answers(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def last_request(server: VllmServer) -> str:
    return [line for line in server.read_log().splitlines() if ": prompt_tokens=" in line][-1]


@pytest.mark.parametrize("n_tokens", [20, 32, 100, 1000, 4096, 8000])
def test_the_decoder_computes_less_than_a_block(rig: Rig, n_tokens: int) -> None:
    prompt = prompt_tokens(n_tokens, 1, n_tokens)
    answer = complete(rig.proxy, prompt, 24)
    assert answer.cached_tokens == hit_of(prompt)
    assert n_tokens - answer.cached_tokens <= 32
    rig.prefill.wait_log(rf"request \S+: prompt_tokens={n_tokens} local_tokens=0 hit_tokens=0")
    rig.decode.wait_log(rf"request \S+: prompt_tokens={n_tokens} local_tokens=0 hit_tokens={hit_of(prompt)} ")
    expected = complete(rig.prefill, prompt, 24, kv_transfer_params=ALONE)
    assert answer.tokens == expected.tokens


def test_many_at_once(rig: Rig) -> None:
    prompts = [prompt_tokens(300 + 111 * i, 2, i) for i in range(12)]
    got = complete_all([rig.proxy], prompts)
    assert [one.cached_tokens for one in got] == [hit_of(prompt) for prompt in prompts]
    expected = complete_all(rig.prefill, prompts, kv_transfer_params=ALONE)
    assert [one.tokens for one in got] == [one.tokens for one in expected]


def test_answers_are_streamed_through(rig: Rig) -> None:
    prompt = prompt_tokens(500, 3)
    answer = stream(rig.proxy, prompt, 40)
    assert answer.cached_tokens == hit_of(prompt) and len(answer.tokens) == 40
    assert answer.tokens == complete(rig.prefill, prompt, 40, kv_transfer_params=ALONE).tokens
    with open_stream(rig.proxy, prompt_tokens(400, 4), 3_000) as chunks:
        assert next(chunks)["choices"], "the first chunk comes long before the last"
    until(lambda: "prompt_tokens=400 " in last_request(rig.decode), "the decode server is done with it")


def test_what_the_client_said_is_kept(rig: Rig) -> None:
    prompt = prompt_tokens(600, 5)
    params: dict[str, Any] = {"penstock": {"skip_load": True}}
    assert complete(rig.proxy, prompt, kv_transfer_params=params).cached_tokens == 0
    least = {"penstock": {"min_hit_tokens": 10_000}}
    assert complete(rig.proxy, prompt_tokens(600, 6), kv_transfer_params=least).cached_tokens == 0
    with pytest.raises(RequestFailed) as caught:
        complete(rig.proxy, prompt_tokens(20_000, 7))
    assert caught.value.status == 400


def test_without_the_prefill_server_the_decoder_computes(rig: Rig) -> None:
    """Last: it ends the prefill server."""
    prompt = prompt_tokens(700, 8)
    expected = complete(rig.prefill, prompt, kv_transfer_params=ALONE)
    rig.prefill.kill()
    answer = complete(rig.proxy, prompt)
    assert (answer.cached_tokens, answer.tokens) == (0, expected.tokens)
    until(lambda: "no prefill, the decode server computes" in rig.log.read_text(), "the proxy says so")
