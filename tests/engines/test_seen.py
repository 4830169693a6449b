"""What a request may ask of the pool on a real server, and what is seen of it: hits, slot records, log, metrics.

The servers are those of `test_sharing.py`; the details of parsing are tested without a server (`tests/connectors`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines.client import Completion, complete, metrics
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens
from tests.engines.pairs import BLOCK, LEFT_ALONE, Trio, applied, computed, hit_of, stores
from tests.engines.server import VllmServer
from tests.support import Keeper, penstock_cli, unique_name, until

N_ANSWER = 16
N_PROMPT = 400
N_BLOCKS = computed(N_PROMPT, N_ANSWER) // BLOCK


@pytest.fixture
def pair(fleet: Fleet, shared_keeper: Keeper, models: Path) -> list[VllmServer]:
    """`one` and `other` of the trio."""
    trio = Trio.on(shared_keeper, models)
    return fleet.get(trio.one, trio.other)


def asks(**fields: Any) -> dict[str, Any]:
    return {"kv_transfer_params": {"penstock": fields}}


def store(keeper: Keeper, server: VllmServer, prompt: list[int], **extra: Any) -> Completion:
    """A completion that stores all its blocks."""
    with stores(keeper, computed(len(prompt), N_ANSWER) // BLOCK):
        return complete(server, prompt, N_ANSWER, **extra)


def chain_of(keeper: Keeper, session: str) -> dict[str, Any]:
    """The one chain of that session, as `penstock ls` shows it; what it shows of intent is in the slot records."""
    (chain,) = [row for row in keeper.ask("ls")["chains"] if row["session"] == session]
    return dict(chain)


def told(server: VllmServer, done: Completion) -> dict[str, str]:
    """The log's line on that request."""
    name = re.escape(done.request_id)
    line = server.wait_log(rf"request {name}\S*: ((?:\w+=\S+ ?)+)").group(1)
    return dict(part.split("=", 1) for part in line.split())


# ---- what a request asks


def test_skip_save(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    for server, reader in ((one, other), (other, one)):
        kept, skipped = prompt_tokens(N_PROMPT, 30, server.port), prompt_tokens(N_PROMPT, 31, server.port)
        before = applied(shared_keeper)
        complete(server, skipped, N_ANSWER, **asks(skip_save=True))
        # Saves go in order: if there were one of the first request it would be there with the second's.
        complete(server, kept, N_ANSWER)
        until(lambda before=before: applied(shared_keeper) >= before + N_BLOCKS, "the second is stored")
        assert applied(shared_keeper) == before + N_BLOCKS
        assert complete(reader, kept, N_ANSWER).cached_tokens == hit_of(N_PROMPT, N_PROMPT)
        assert complete(reader, skipped, N_ANSWER, **asks(skip_save=True)).cached_tokens == 0


def test_skip_load(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 32)
    store(shared_keeper, other, prompt)
    for server in pair:
        with stores(shared_keeper, 0):
            done = complete(server, prompt, N_ANSWER, **asks(skip_load=True))
        assert done.cached_tokens == 0
        assert told(server, done)["miss"] == "skipped"
    # The engine's own cache is its own affair: one has it by now.
    assert complete(one, prompt, N_ANSWER, **asks(skip_load=True)).cached_tokens == N_PROMPT // BLOCK * BLOCK
    assert complete(other, prompt, N_ANSWER, **asks(skip_load=False)).cached_tokens == hit_of(N_PROMPT, N_PROMPT)


def test_minimum_hit(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 33)
    store(shared_keeper, one, prompt[:96])
    for least, expected in ((97, 0), (96, 96), (0, 96)):
        extra = asks(min_hit_tokens=least, skip_save=True)
        done = complete(other, prompt, N_ANSWER, **extra)
        assert done.cached_tokens == expected, least
        assert told(other, done)["miss"] == ("absent" if expected else "skipped")


def test_a_salt_separates(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 34)
    store(shared_keeper, one, prompt, cache_salt="ours")
    assert complete(other, prompt, N_ANSWER, cache_salt="ours").cached_tokens == hit_of(N_PROMPT, N_PROMPT)
    # Stored again under each name: none of them is a hit of another.
    assert store(shared_keeper, other, prompt, cache_salt="theirs").cached_tokens == 0
    assert store(shared_keeper, other, prompt).cached_tokens == 0
    for extra in ({"cache_salt": "ours"}, {"cache_salt": "theirs"}, {}):
        assert complete(one, prompt, N_ANSWER, **extra).cached_tokens >= N_PROMPT // BLOCK * BLOCK
    assert complete(one, prompt, N_ANSWER, cache_salt="nobody's", **asks(skip_save=True)).cached_tokens == 0


# ---- whose blocks they are


def test_session_and_priority_are_recorded(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    cases: list[tuple[VllmServer, int, Mapping[str, Any]]] = [
        (one, 7, {"session_id": "{}", **asks(session="not this", tenant="t1", priority=7)}),
        (one, 0, {"headers": {"X-Session-ID": "{}"}, **asks(tenant="t1")}),
        (other, 5, {**asks(session="{}", tenant="t1"), "priority": -5}),
        (other, -3, {"headers": {"X-Penstock-Session": "{}", "X-Penstock-Tenant": "t1", "X-Penstock-Priority": "-3"}}),
    ]
    for number, (server, priority, extra) in enumerate(cases):
        session = unique_name("session")
        store(shared_keeper, server, prompt_tokens(N_PROMPT, 35, number), **_named(extra, session))
        chain = chain_of(shared_keeper, session)
        assert (chain["blocks"], chain["tenant"], chain["priority"]) == (N_BLOCKS, "t1", priority), number
    assert session in penstock_cli("ls", "--name", shared_keeper.name, "--json").stdout


def _named(extra: Any, session: str) -> Any:
    if isinstance(extra, dict):
        return {name: _named(value, session) for name, value in extra.items()}
    return session if extra == "{}" else extra


def test_headers_ask_as_the_body_does(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 36)
    store(shared_keeper, one, prompt)
    full = hit_of(N_PROMPT, N_PROMPT)
    # What the body says wins.
    for name, value, fields, expected in (
        ("Skip-Load", "true", {}, 0),
        ("Skip-Load", "true", {"skip_load": False}, full),
        ("Min-Hit-Tokens", "5000", {}, 0),
        ("Min-Hit-Tokens", "50", {}, full),
    ):
        done = complete(other, prompt, headers={f"X-Penstock-{name}": value}, **asks(**fields))
        assert done.cached_tokens == expected, (name, value, fields)


@pytest.mark.parametrize(
    "said",
    [
        {"penstock": "nonsense"},
        {"penstock": ["session"]},
        {"penstock": {"skip_load": "yes", "min_hit_tokens": -1, "wait_s": "long", "session": 5, "no_such": 1}},
        {"of another connector": {"skip_load": True}},
        LEFT_ALONE | {"penstock": None},
    ],
)
def test_what_is_malformed_is_ignored(shared_keeper: Keeper, pair: list[VllmServer], said: dict[str, Any]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 37, len(str(said)))
    store(shared_keeper, one, prompt, kv_transfer_params=said)
    assert complete(other, prompt, N_ANSWER, kv_transfer_params=said).cached_tokens == hit_of(N_PROMPT, N_PROMPT)


def test_malformed_headers_are_ignored(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 38)
    store(shared_keeper, one, prompt)
    headers = {"X-Penstock-Skip-Load": "perhaps", "X-Penstock-Priority": "high", "X-Penstock-TTL-S": "inf"}
    assert complete(other, prompt, N_ANSWER, headers=headers).cached_tokens == hit_of(N_PROMPT, N_PROMPT)


# ---- what is told of it


def test_a_line_for_each_request(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    one, other = pair
    prompt = prompt_tokens(N_PROMPT, 39)
    full = hit_of(N_PROMPT, N_PROMPT)
    # One's own cache needs nothing of the pool, the last block being cut.
    for server, local, hit, miss in ((other, 0, 0, "absent"), (one, 0, full, "none"), (one, full, 0, "none")):
        with stores(shared_keeper, 0 if local or hit else N_BLOCKS):
            done = complete(server, prompt, N_ANSWER)
        line = told(server, done)
        assert (line["prompt_tokens"], line["local_tokens"]) == (str(N_PROMPT), str(local))
        assert (line["hit_tokens"], line["miss"]) == (str(hit), miss)


def test_metrics_say_why(shared_keeper: Keeper, pair: list[VllmServer]) -> None:
    _, other = pair
    prompt = prompt_tokens(N_PROMPT, 50)

    def counted() -> dict[str, float]:
        complete(other, prompt[:3], 2)  # statistics travel with the next step
        now = metrics(other)
        reasons = {why: now.total("vllm:penstock_lookups_total", result=why) for why in ("absent", "skipped")}
        return reasons | {
            "hit": now.total("vllm:penstock_hit_tokens_total"),
            "prompt": now.total("vllm:penstock_prompt_tokens_total") - 3 * now.total("vllm:penstock_requests_total"),
            "malformed": sum(
                value
                for (metric, labels), value in now.samples.items()
                if metric == "vllm:penstock_counts_total" and ("name", "intent.malformed") in labels
            ),
            "stored": now.total("vllm:penstock_saved_blocks_total"),
        }

    before = counted()
    store(shared_keeper, other, prompt)
    complete(other, prompt, N_ANSWER, **asks(skip_load=True))
    complete(other, prompt, N_ANSWER, **asks(skip_load="yes", session=3))
    expected = {"absent": 1, "skipped": 1, "hit": hit_of(N_PROMPT, N_PROMPT), "malformed": 2, "stored": N_BLOCKS}
    expected["prompt"] = 3 * (N_PROMPT - 3)

    def grown() -> dict[str, float]:
        return {name: value - before[name] for name, value in counted().items()}

    until(lambda: grown() == expected, "everything is counted")
    assert grown() == expected
