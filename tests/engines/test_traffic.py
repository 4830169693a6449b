"""Mixed requests on real servers under pressure: every answer is right, and nothing is left behind.

Two servers share a pool that is too small for their prompts, so that blocks are evicted all the time; one of them has
so few pages that requests are preempted. A third one, without a connector, is the reference.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.pool.layout import plan_geometry
from tests.conftest import Scale
from tests.engines.client import RequestFailed, complete, complete_all, metrics, open_stream, stream
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.pairs import float32, until_idle
from tests.engines.server import MODEL_NAME, VllmServer, penstock_transfer
from tests.support import MIB, Keeper, until

LONGEST = 4096
PAGES = 250
"""Of 32 tokens, 48 KiB each."""
AT_ONCE = 32
Answers = dict[str, Future[object]]
"""Of the reference, by the case."""
FIXED = {"abort": None, "hang up": None, "too long": 400}
DOCUMENTS = [prompt_tokens(n, 40, n) for n in (120, 350, 700, 1300, 2100, 3000)]


@dataclass(frozen=True)
class Case:
    """A request and what is done with it."""

    kind: str
    prompt: list[int]
    n_answer: int = 16
    extra: dict[str, Any] = field(default_factory=dict)

    def run(self, server: VllmServer) -> object:
        """What came of it; equal for equal cases on any server."""
        if self.kind == "stream":
            done = stream(server, self.prompt, self.n_answer, **self.extra)
            return done.tokens, done.text, done.finish_reason
        if self.kind == "abort":
            with open_stream(server, self.prompt, 500) as chunks:
                for _ in itertools.islice(chunks, self.n_answer):
                    pass
            return None
        if self.kind == "hang up":
            return _hang_up(server, self.prompt)
        try:
            done = complete(server, self.prompt, self.n_answer, **self.extra)
        except RequestFailed as error:
            return error.status
        return done.choices, done.text, done.finish_reason


def _hang_up(server: VllmServer, prompt: list[int]) -> None:
    """Send a request and leave without waiting for any answer."""
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 500, "temperature": 0, "ignore_eos": True}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})


def cases(number: int, stop: str) -> list[Case]:
    """One round's requests. Most start with documents that all rounds and servers share, some are new each time."""
    drawn = []
    for i in range(AT_ONCE):
        document = DOCUMENTS[(i + number) % len(DOCUMENTS)]
        own = prompt_tokens(20 + 7 * i, 41, i, number if i % 4 == 0 else 0)
        prompt = [*document[: len(document) - 50 * (i % 3)], *own]
        drawn.append(_case(i, prompt, stop))
    return drawn


def _case(i: int, prompt: list[int], stop: str) -> Case:
    kinds = {
        1: Case("stream", prompt, 40),
        2: Case("several", prompt, 20, {"n": 3, "temperature": 1, "top_k": 1}),
        3: Case("stop", prompt, 60, {"stop": [stop]}),
        4: Case("abort", prompt, 1 + i // 4),
        5: Case("long answer", prompt, 150),
        6: Case("hang up", prompt),
        7: Case("too long", prompt_tokens(LONGEST, 42), 16) if i == 7 else Case("stream", prompt, 3, {"logprobs": 2}),
    }
    return kinds.get(i % 8, Case("plain", prompt))


@pytest.fixture(scope="module")
def small_pool(runtime_dir: Path) -> Iterator[Keeper]:
    """Room for some 15,000 tokens."""
    with Keeper(plan_geometry(24 * MIB)) as running:
        yield running


@dataclass(frozen=True)
class Site:
    keeper: Keeper
    plain: VllmServer
    sharing: list[VllmServer]
    """The first of them has few pages."""


@pytest.fixture
def site(fleet: Fleet, small_pool: Keeper, models: Path) -> Site:
    plain = float32(tiny_llama(models / "tiny-float32"))
    sharing = replace(plain, kv_transfer=penstock_transfer(small_pool.name), max_model_len=LONGEST)
    few = replace(sharing, kv_cache_bytes=PAGES * 48 * 1024)
    other = replace(
        sharing, kv_cache_bytes=128 * MIB, chunked_prefill=False, prefix_caching=False,
        arguments=("--no-async-scheduling",),
    )  # fmt: skip
    one, *two = fleet.get(plain, few, other)
    return Site(small_pool, one, two)


@pytest.fixture(scope="module", autouse=True)
def no_servers_without_their_pool(fleet: Fleet, small_pool: Keeper) -> Iterator[None]:
    yield
    fleet.end_where(lambda config: config.kv_transfer is not None and f'"{small_pool.name}"' in config.kv_transfer)


def test_preempted_requests_resume_with_the_same_answers(site: Site) -> None:
    """More tokens than there are pages: requests lose theirs in the middle and start again, with what was stored."""
    prompts = [prompt_tokens(400 + 10 * i, 43, i) for i in range(16)]
    [few, _] = site.sharing
    before = metrics(few)
    wanted = [done.tokens for done in complete_all(site.plain, prompts, 250)]
    for _ in range(2):
        assert [done.tokens for done in complete_all(few, prompts, 250)] == wanted
    assert metrics(few).total("vllm:num_preemptions_total") > before.total("vllm:num_preemptions_total")
    assert metrics(few).total("vllm:external_prefix_cache_hits_total") > before.total(
        "vllm:external_prefix_cache_hits_total"
    )
    until_idle(site.keeper)


def test_several_answers_to_one_prompt(site: Site) -> None:
    prompt = prompt_tokens(500, 44)
    wanted = complete(site.plain, prompt, 100).tokens
    for server in site.sharing:
        done = complete(server, prompt, 100, n=4, temperature=1, top_k=1)
        assert done.choices == (wanted,) * 4
    until_idle(site.keeper)


def test_a_refused_request_costs_nothing(site: Site) -> None:
    for server in site.sharing:
        before = metrics(server).total("vllm:request_success_total")
        with pytest.raises(RequestFailed) as caught:
            complete(server, prompt_tokens(LONGEST, 45), 16)
        assert caught.value.status == 400
        assert metrics(server).total("vllm:request_success_total") == before
    until_idle(site.keeper)


def test_hanging_up_at_any_time(site: Site) -> None:
    """Before the first token, or after some: what was whole until then can be stored, what is found later is right."""
    prompts = [prompt_tokens(600 + 40 * i, 46, i) for i in range(8)]
    wanted = [done.tokens for done in complete_all(site.plain, prompts)]
    for server, other in (site.sharing, site.sharing[::-1]):
        with ThreadPoolExecutor(16) as threads:
            todo = [Case(kind, prompt, 3 + i) for i, prompt in enumerate(prompts) for kind in ("hang up", "abort")]
            list(threads.map(lambda case, server=server: case.run(server), todo))
        until(lambda server=server: _n_open(server) == 0, "all are aborted")
        assert [done.tokens for done in complete_all(other, prompts)] == wanted
    until_idle(site.keeper)


def test_mixed_traffic_leaves_nothing(site: Site, scale: Scale) -> None:
    """Rounds of 32 requests at once, on both servers; each answer is the reference's."""
    text = complete(site.plain, DOCUMENTS[3], 60).text
    stop = text[len(text) // 2 :][:2]
    known: Answers = {}
    rounds = itertools.count()
    whole_s = scale.of(30, 120)
    _rounds(site, rounds, whole_s / 3, stop, known)
    before = _state(site)
    _rounds(site, rounds, whole_s * 2 / 3, stop, known)
    after = _state(site)
    assert site.keeper.counters()["evicted"] > 0, "the pool is too large to be of interest"
    assert after["clients"] == before["clients"]
    for now, then in zip(after["handles"], before["handles"], strict=True):
        assert now <= then + 4, (before, after)
    # Engines grow as they meet larger batches, ever more slowly; 1,000 requests that each left 256 KiB would show.
    for now, then in zip(after["rss"], before["rss"], strict=True):
        assert now < then + 192 * MIB, (before, after)


def _rounds(site: Site, rounds: Iterator[int], seconds: float, stop: str, known: Answers) -> None:
    """Rounds for so long, and three at least."""
    ends = time.monotonic() + seconds
    for n_done in itertools.count():
        if n_done >= 3 and time.monotonic() >= ends:
            return
        _round(site, next(rounds), stop, known)


def _round(site: Site, number: int, stop: str, known: Answers) -> None:
    """Run a round's cases, half of them on each server; the reference is asked what it has not answered before."""
    todo = cases(number, stop)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = [threads.submit(case.run, site.sharing[(i + i // 8 + number) % 2]) for i, case in enumerate(todo)]
        for case in todo:
            if case.kind not in FIXED and str(case) not in known:
                known[str(case)] = threads.submit(case.run, site.plain)
        for case, future in zip(todo, found, strict=True):
            wanted = FIXED[case.kind] if case.kind in FIXED else known[str(case)].result()
            assert future.result() == wanted, (number, case.kind, len(case.prompt))


def _n_open(server: VllmServer) -> float:
    now = metrics(server)
    return now.total("vllm:num_requests_running") + now.total("vllm:num_requests_waiting")


def _state(site: Site) -> dict[str, Any]:
    """What could leak, once everything has come to rest."""
    for server in site.sharing:
        until(lambda server=server: _n_open(server) == 0, "no request is left")
        complete(server, prompt_tokens(5, 47), 2)  # a step, after which the engine counts its pages
        until(lambda server=server: metrics(server).total("vllm:kv_cache_usage_perc") == 0, "all pages are free")
    until_idle(site.keeper)
    stat = site.keeper.stat()
    site.keeper.fsck()
    assert stat["granted"] == sum(row["grants"] for row in stat["clients"])
    return {
        "clients": sorted((row["lane"], row["name"], row["leases"]) for row in stat["clients"]),
        "grants": [row["grants"] for row in stat["clients"]],
        "handles": [server.n_handles() for server in site.sharing],
        "rss": [server.rss_bytes() for server in site.sharing],
    }
