"""What the connector counted, step by step, and under which metric each count is shown."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from penstock.connectors.counters import Counters
from penstock.connectors.vllm import tallies
from penstock.connectors.vllm.tallies import METRICS, TIMES, Tally, merge, place, plain, summary


def test_each_step_has_what_was_counted_in_it() -> None:
    counters = Counters()
    tally = Tally(counters)
    assert tally.take() is None
    counters.add("requests")
    counters.add("load.bytes", 4096)
    counters.add("load.us", 1500)
    assert tally.take() == {
        "counts": {"requests": 1, "load.bytes": 4096, "load.us": 1500},
        "seconds": {"load.us": [0.0015]},
    }
    assert tally.take() is None
    counters.add("requests", 2)
    assert tally.take() == {"counts": {"requests": 2}, "seconds": {}}


def test_sums_of_steps_and_ranks_are_the_counters() -> None:
    counters = Counters()
    tally, total = Tally(counters), plain({})
    for step in range(20):
        counters.add("save.blocks", step)
        counters.add(f"drop.{step % 3}")
        counters.add("save.us", 10 + step)
        total = merge(total, tally.take() or {})
    assert total["counts"] == counters.read()
    assert sum(total["seconds"]["save.us"]) * 1e6 == pytest.approx(counters.read()["save.us"])


def test_merging_changes_neither_and_takes_nothing_for_nothing() -> None:
    one, other = plain({"requests": 1, "load.us": 5}), plain({"requests": 2, "load.us": 7})
    both = merge(one, other)
    assert both == {"counts": {"requests": 3, "load.us": 12}, "seconds": {"load.us": [5e-6, 7e-6]}}
    assert one == plain({"requests": 1, "load.us": 5}) and other == plain({"requests": 2, "load.us": 7})
    assert merge({}, {}) == plain({})
    assert merge({}, one) == merge(one, {}) == one


def test_times_are_bounded_and_their_sum_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "_MAX_TIMES", 3)
    total = plain({})
    for _ in range(10):
        total = merge(total, plain({"load.us": 5}))
    assert len(total["seconds"]["load.us"]) == 3 and total["counts"]["load.us"] == 50


def test_data_survives_the_way_to_other_processes() -> None:
    data = plain({"requests": 1, "load.us": 5})
    assert pickle.loads(pickle.dumps(data)) == data
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(data)) == data


@pytest.mark.parametrize(
    ("count", "name", "value"),
    [
        ("requests", "vllm:penstock_requests", ""),
        ("hit_tokens", "vllm:penstock_hit_tokens", ""),
        ("lookup.absent", "vllm:penstock_lookups", "absent"),
        ("load.failed_blocks", "vllm:penstock_load_failed_blocks", ""),
        ("load.failed.checksum", "vllm:penstock_load_failures", "checksum"),
        ("load.bytes", "vllm:penstock_load_bytes", ""),
        ("drop.no_room", "vllm:penstock_dropped_blocks", "no_room"),
        ("left_alone.pooling", "vllm:penstock_left_alone", "pooling"),
        ("no_keeper", "vllm:penstock_counts", "no_keeper"),
        ("intent.malformed", "vllm:penstock_counts", "intent.malformed"),
        ("drop.", "vllm:penstock_counts", "drop."),
        ("never heard of", "vllm:penstock_counts", "never heard of"),
    ],
)
def test_every_count_has_a_place(count: str, name: str, value: str) -> None:
    metric, label = place(count)
    assert (metric.name, label) == (name, value)
    assert metric in METRICS and bool(metric.label) == bool(value)


def test_names_are_told_apart() -> None:
    names = [metric.name for metric in (*METRICS, *TIMES.values())]
    assert len(set(names)) == len(names)
    assert all(name.startswith("vllm:penstock_") for name in names)


def test_the_line_in_the_log() -> None:
    counts = {"prompt_tokens": 200, "hit_tokens": 150, "load.bytes": 3_000_000, "load.us": 1000, "lookup.none": 1}
    assert summary(plain(counts)) == {
        "hit_tokens": 150,
        "load.bytes": 3_000_000,
        "lookup.none": 1,
        "prompt_tokens": 200,
        "hit_pct": 75.0,
        "load.gb_per_s": 3.0,
    }
    assert summary({}) == {}
