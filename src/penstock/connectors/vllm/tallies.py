"""What a step counted, as plain data, and the names under which vLLM's `/metrics` shows it.

Covers differences of counters, their sums over ranks and steps, and which count belongs to which metric. Knows no
engine; `stats.py` puts it into vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.connectors.counters import Counters

__all__ = ["METRICS", "TIMES", "Metric", "Tally", "merge", "place", "plain", "summary"]

# Seconds kept one by one between two looks of vLLM's logger; beyond that only their sum is.
_MAX_TIMES = 4096


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter in `/metrics`; vLLM's names get `_total` from the Prometheus client."""

    name: str
    text: str
    label: str = ""
    """Name of its one label, empty for none."""


# Counts of exactly this name.
_EXACT = {
    "requests": Metric("vllm:penstock_requests", "Requests that ended, with the pool in reach or not."),
    "prompt_tokens": Metric("vllm:penstock_prompt_tokens", "Prompt tokens of those requests."),
    "hit_tokens": Metric("vllm:penstock_hit_tokens", "Tokens taken from the pool instead of being computed."),
    "load.bytes": Metric("vllm:penstock_load_bytes", "Bytes copied out of the pool, all ranks."),
    "load.failed_blocks": Metric("vllm:penstock_load_failed_blocks", "Blocks that a load left to be computed."),
    "fetch.blocks": Metric("vllm:penstock_fetched_blocks", "Blocks brought from the tiers below the pool, all ranks."),
    "save.blocks": Metric("vllm:penstock_saved_blocks", "Blocks stored in the pool, all ranks."),
    "save.bytes": Metric("vllm:penstock_save_bytes", "Bytes copied into the pool, all ranks."),
}
# Counts whose name begins so; the rest of the name is the label's value.
_FAMILIES = {
    "lookup.": Metric("vllm:penstock_lookups", "Requests by why their lookup ended (none: all was found).", "result"),
    "load.failed.": Metric("vllm:penstock_load_failures", "Blocks of one rank that were not loaded.", "reason"),
    "fetch.end.": Metric("vllm:penstock_fetches", "Requests that missed something, by what the tiers did.", "end"),
    "drop.": Metric("vllm:penstock_dropped_blocks", "Blocks of one rank that were not stored.", "reason"),
    "left_alone.": Metric("vllm:penstock_left_alone", "Requests that neither load nor save.", "reason"),
}
_OTHER = Metric("vllm:penstock_counts", "Everything else that the connector counts, by its name.", "name")

METRICS = (*_EXACT.values(), *_FAMILIES.values(), _OTHER)
"""Every counter there is."""

TIMES = {
    "load.us": Metric("vllm:penstock_load_seconds", "Seconds of copying out of the pool, by engine step and rank."),
    "save.us": Metric("vllm:penstock_save_seconds", "Seconds of copying into the pool, by engine step and rank."),
    "fetch.us": Metric("vllm:penstock_fetch_seconds", "Seconds of waiting for the tiers, by engine step."),
}
"""Counts of microseconds: besides their sum, what each step and rank took, as histograms."""


def place(count: str) -> tuple[Metric, str]:
    """The counter for a count of this name, and its label's value (empty if it has no label)."""
    if (metric := _EXACT.get(count)) is not None:
        return metric, ""
    for start, metric in _FAMILIES.items():
        if count.startswith(start) and len(count) > len(start):
            return metric, count[len(start) :]
    return _OTHER, count


class Tally:
    """What was counted since the last look. For one thread; the counters may be others'."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._before: dict[str, int] = {}

    def take(self) -> dict[str, Any] | None:
        """Plain data for `PenstockStats`, or None if nothing was counted."""
        now = self._counters.read()
        if now == self._before:
            return None
        before, self._before = self._before, now
        return plain({name: n - before.get(name, 0) for name, n in now.items() if n != before.get(name, 0)})


def plain(counts: Mapping[str, int]) -> dict[str, Any]:
    """One step's counts of one rank: `counts` by name, and the `seconds` of each kind of copy. Packs and pickles."""
    seconds = {name: [counts[name] / 1e6] for name in TIMES if counts.get(name)}
    return {"counts": dict(counts), "seconds": seconds}


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both together. Either may be empty; neither is changed."""
    counts: dict[str, int] = dict(one.get("counts", {}))
    for name, n in other.get("counts", {}).items():
        counts[name] = counts.get(name, 0) + n
    seconds: dict[str, list[float]] = {name: list(each) for name, each in one.get("seconds", {}).items()}
    for name, each in other.get("seconds", {}).items():
        seconds[name] = (seconds.get(name, []) + list(each))[:_MAX_TIMES]
    return {"counts": counts, "seconds": seconds}


def summary(data: Mapping[str, Any]) -> dict[str, int | float]:
    """For a line in the log: every count, with hit rate and copying speeds where they can be told."""
    counts: Mapping[str, int] = data.get("counts", {})
    shown: dict[str, int | float] = {name: n for name, n in sorted(counts.items()) if name not in TIMES}
    if prompt := counts.get("prompt_tokens", 0):
        shown["hit_pct"] = round(100 * counts.get("hit_tokens", 0) / prompt, 1)
    for kind in ("load", "save"):
        if took_us := counts.get(f"{kind}.us", 0):
            shown[f"{kind}.gb_per_s"] = round(counts.get(f"{kind}.bytes", 0) / took_us / 1e3, 2)
    return shown
