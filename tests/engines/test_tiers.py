"""Documents on disk, between two real servers: each computed one, the pool was lost, the other gets it back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.pool.layout import plan_geometry
from tests.engines.client import Completion, complete, metrics
from tests.engines.fleet import Fleet
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.pairs import BLOCK, LEFT_ALONE, computed, float32, hit_of, stores, until_idle
from tests.engines.server import VllmServer, penstock_transfer
from tests.support import MIB, Keeper, until
from tests.tiered import replace_pool, tiered_keeper, wait_stored

N_ANSWER = 16
DOCUMENTS = [prompt_tokens(2000, 30, number) for number in range(2)]
QUESTION = prompt_tokens(30, 31)
N_BLOCKS = 2000 // BLOCK
HIT = hit_of(2000, 2030)


@pytest.fixture
def keeper(fleet: Fleet, tmp_path: Path) -> Iterator[Keeper]:
    """A pool with a disk below it."""
    with tiered_keeper(tmp_path / "disk", geometry=plan_geometry(64 * MIB)) as running:
        yield running
        fleet.end_where(lambda config: config.kv_transfer is not None and f'"{running.name}"' in config.kv_transfer)


def test_documents_come_back_from_disk(fleet: Fleet, keeper: Keeper, models: Path) -> None:
    # As vLLM starts by default, two steps at a time; and one after the other.
    one = float32(tiny_llama(models / "tiny-float32"), kv_transfer=penstock_transfer(keeper.name, fetch="always"))
    servers = fleet.get(one, replace(one, arguments=("--no-async-scheduling",)))
    for server, document in zip(servers, DOCUMENTS, strict=True):
        with stores(keeper, computed(2000, N_ANSWER) // BLOCK):
            complete(server, document, N_ANSWER)
    wait_stored(keeper)
    replace_pool(keeper)
    for server, document in zip(servers, reversed(DOCUMENTS), strict=True):
        prompt = [*document, *QUESTION]
        found = _once_back(server, prompt)
        assert found.cached_tokens == HIT
        alone = complete(server, prompt, N_ANSWER, cache_salt="alone", kv_transfer_params=LEFT_ALONE)
        assert (found.tokens, alone.cached_tokens) == (alone.tokens, 0)
        _assert_told(server)
    until_idle(keeper)
    assert keeper.tier("disk")["counters"]["damaged"] == 0


def _once_back(server: VllmServer, prompt: list[int]) -> Completion:
    """The first answer with a hit: until the server is back at the new pool it computes everything, by another salt, so
    that its own prefix cache has nothing of it."""
    tries = iter(range(1_000_000))

    def ask() -> Completion | None:
        params = {"penstock": {"skip_save": True}}
        complete(server, prompt[: BLOCK + 1], 1, cache_salt=f"try {next(tries)}", kv_transfer_params=params)
        found = re.findall("prompt_tokens=33 .* miss=(\\w+)", server.read_log())
        return complete(server, prompt, N_ANSWER, kv_transfer_params=params) if found[-1:] == ["absent"] else None

    found: Completion = until(ask, "the server is back at the pool")
    return found


def _assert_told(server: VllmServer) -> None:
    shown = metrics(server)
    assert shown.total("vllm:penstock_fetched_blocks_total") == N_BLOCKS
    assert shown.total("vllm:penstock_fetches_total", end="done") == 1
    assert shown.total("vllm:penstock_fetch_seconds_count") >= 1
    line = server.wait_log("request .*: prompt_tokens=2030 .*hit_tokens=[1-9].*")[0]
    assert f" hit_tokens={HIT} " in line and f" fetched_blocks={N_BLOCKS} " in line, line
