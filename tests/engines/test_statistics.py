"""The connector's events and statistics in vLLM's own classes. No server; everything around them is the engine's."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from penstock import chain_keys
from penstock.connectors.counters import Counters
from penstock.connectors.vllm.events import PoolEvents
from penstock.testing.pool import Site, make_space, source
from tests.support import unique_name

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the engine imports has warnings of its own
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.request import Request

    from penstock.connectors.vllm.stats import PenstockPromMetrics, PenstockStats, StatsSource

BLOCK = 16
SPACE = make_space(block_tokens=BLOCK)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.opened(unique_name("ev")) as opened:
        yield opened


def make_request(**fields: Any) -> Request:
    init_none_hash(sha256)
    return Request(
        "one", list(range(100, 100 + 4 * BLOCK + 3)), SamplingParams(max_tokens=1), None,
        block_hasher=get_request_block_hasher(BLOCK, sha256), **fields,
    )  # fmt: skip


def vllms_own(request: Request, first: int, last: int) -> BlockStored:
    """What vLLM publishes when its own prefix cache takes these blocks."""
    pool = BlockPool(16, True, BLOCK, enable_kv_cache_events=True)
    blocks = pool.get_new_blocks(last)
    pool.cache_full_blocks(request, blocks, first, last, BLOCK, 0)
    (event,) = pool.take_events()
    return event


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cache_salt": "secret", "session_id": "s"},
        {"lora_request": LoRARequest("poet", 3, "/nowhere")},
    ],
)
@pytest.mark.parametrize("first", [0, 2])
def test_events_are_those_of_the_engine(site: Site, fields: dict[str, Any], first: int) -> None:
    request = make_request(**fields)
    pool, handle = site.pool, site.pool.space(SPACE)
    keys = chain_keys(SPACE, request.prompt_token_ids)
    events = PoolEvents(lambda: pool, BLOCK)
    pool.store(handle, keys, source(handle, keys), wait_s=5.0)
    assert pool.flush()
    events.stored(request, first, 4 - first, [(handle, keys.array[first:])])
    (stored,) = told = events.take()
    own = vllms_own(request, first, 4)
    own.medium = "CPU"
    assert isinstance(stored, BlockStored) and stored == own
    events.reset()
    (removed,) = events.take()
    assert removed == BlockRemoved(block_hashes=own.block_hashes, medium="CPU", group_idx=0)
    # As the publisher packs them, what travels.
    assert KVEventBatch(ts=0.0, events=[*told, removed])


# ---- statistics


def stats(**counts: int) -> PenstockStats:
    counters = Counters()
    stats_of = StatsSource(counters)
    for name, n in counts.items():
        counters.add(name.replace("__", "."), n)
    taken = stats_of.take()
    assert taken is not None and stats_of.take() is None
    return taken


def test_stats_add_up_over_ranks_and_steps() -> None:
    one, other = stats(requests=1, load__us=1000, load__bytes=4096), stats(requests=2, no_keeper=1)
    assert pickle.loads(pickle.dumps(one)) == one
    both = one.aggregate(other)
    assert both.reduce() == {"load.bytes": 4096, "no_keeper": 1, "requests": 3, "load.gb_per_s": 0.0}
    assert not both.is_empty()
    both.reset()
    assert both.is_empty() and both.reduce() == {} and PenstockStats().is_empty()
    assert PenstockStats().aggregate(stats(requests=1)).reduce() == {"requests": 1}


def test_an_aggregate_does_not_change_what_it_was_given() -> None:
    other = stats(requests=2)
    before = json.dumps(other.data)
    stats(requests=1).aggregate(other)
    assert json.dumps(other.data) == before


class Config:
    kv_transfer_config = KVTransferConfig(kv_connector="PenstockConnector", kv_role="kv_both")


@pytest.fixture
def metrics() -> Iterator[PenstockPromMetrics]:
    unregister_vllm_metrics()
    kinds = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    yield PenstockPromMetrics(Config(), kinds, ["model_name", "engine"], {0: ["tiny", "0"], 1: ["tiny", "1"]})
    unregister_vllm_metrics()


def value(metric: str, engine: int = 0, /, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(metric, {"model_name": "tiny", "engine": str(engine), **labels})


def test_metrics(metrics: PenstockPromMetrics) -> None:
    assert value("vllm:penstock_hit_tokens_total") == 0.0, "there before anything happens"
    for _ in range(2):
        counted = {"hit_tokens": 5, "lookup__absent": 1, "drop__no_room": 3, "save__us": 20_000, "odd__name": 4}
        metrics.observe(stats(**counted).data, 0)
    metrics.observe(stats(hit_tokens=1).data, 1)
    assert value("vllm:penstock_hit_tokens_total") == 10.0
    assert value("vllm:penstock_hit_tokens_total", 1) == 1.0
    assert value("vllm:penstock_lookups_total", result="absent") == 2.0
    assert value("vllm:penstock_dropped_blocks_total", reason="no_room") == 6.0
    assert value("vllm:penstock_counts_total", name="odd.name") == 8.0
    assert value("vllm:penstock_save_seconds_count") == 2.0
    assert value("vllm:penstock_save_seconds_sum") == pytest.approx(0.04)
    assert value("vllm:penstock_counts_total", name="save.us") is None
    metrics.observe({}, 0)


def test_no_end_of_series(metrics: PenstockPromMetrics) -> None:
    for number in range(300):
        metrics.observe(stats(**{f"odd{number}": 1}).data, 0)
    assert value("vllm:penstock_counts_total", name="odd5") == 1.0
    assert value("vllm:penstock_counts_total", name="odd299") is None
    assert value("vllm:penstock_counts_total", name="other") == 200.0
