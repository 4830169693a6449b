"""The connector's counts in vLLM's statistics: its log line, and its `/metrics`.

Source of the interface: vLLM 0.32, distributed/kv_transfer/kv_connector/v1/metrics.py. Both halves of the connector
hand out `PenstockStats` with every step; vLLM adds up the ranks', and passes the data on to the process that serves
`/metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from penstock.connectors.counters import Counters
from penstock.connectors.vllm.tallies import METRICS, TIMES, Tally, merge, place, summary

__all__ = ["PenstockPromMetrics", "PenstockStats", "StatsSource"]

# From a single block to a long prompt on a busy machine.
_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Values that one label may take; further ones are counted as "other", for every value is a series for ever.
_MAX_VALUES = 100


@dataclass
class PenstockStats(KVConnectorStats):
    """Counts by name and seconds of copying (`tallies.plain`), of one rank and step or of many together."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> PenstockStats:
        """Add what another one counted."""
        self.data = merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log line shows."""
        return summary(self.data)

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data.get("counts")


class StatsSource:
    """A connector half's `get_kv_connector_stats`: what its counters counted since the last step."""

    def __init__(self, counters: Counters) -> None:
        self._tally = Tally(counters)

    def take(self) -> PenstockStats | None:
        """Stats of the last step, None if nothing was counted."""
        data = self._tally.take()
        return None if data is None else PenstockStats(data=data)


class PenstockPromMetrics(KVConnectorPromMetrics):
    """The counters and histograms of `tallies`, for every engine of the process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            metric.name: self._counter_cls(
                name=metric.name,
                documentation=metric.text,
                labelnames=[*labelnames, metric.label] if metric.label else labelnames,
            )
            for metric in METRICS
        }
        self._times = {
            count: self._histogram_cls(
                name=metric.name, documentation=metric.text, labelnames=labelnames, buckets=_BUCKETS_S
            )
            for count, metric in TIMES.items()
        }
        self._values: dict[str, set[str]] = {}
        self._bound: dict[tuple[int, str, str], Any] = {}
        # Series without a label of their own are there, at 0, before anything happens.
        for engine in per_engine_labelvalues:
            for metric in METRICS:
                if not metric.label:
                    self._series(engine, metric.name, "")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what a step counted."""
        for count, n in transfer_stats_data.get("counts", {}).items():
            if count in TIMES:
                continue
            metric, value = place(count)
            self._series(engine_idx, metric.name, value if metric.label else "").inc(n)
        for count, each in transfer_stats_data.get("seconds", {}).items():
            if count in self._times:
                series = self._times[count].labels(*self.per_engine_labelvalues[engine_idx])
                for seconds in each:
                    series.observe(seconds)

    def _series(self, engine: int, name: str, value: str) -> Any:
        known = self._values.setdefault(name, set())
        if value not in known and len(known) >= _MAX_VALUES:
            value = "other"
        known.add(value)
        key = (engine, name, value)
        if key not in self._bound:
            labels = [*self.per_engine_labelvalues[engine], *([value] if value else [])]
            self._bound[key] = self._counters[name].labels(*labels)
        return self._bound[key]
