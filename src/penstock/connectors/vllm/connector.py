"""PenstockConnector: vLLM's connector interface (v1), each call passed to the half that it belongs to.

Source of the interface: vLLM 0.32, distributed/kv_transfer/kv_connector/v1/base.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from penstock.connectors.counters import Counters
from penstock.connectors.vllm.config import read_config
from penstock.connectors.vllm.events import PoolEvents
from penstock.connectors.vllm.layout import group_spec
from penstock.connectors.vllm.messages import Orders, RankHello, Report
from penstock.connectors.vllm.scheduler import SchedulerHalf
from penstock.connectors.vllm.spaces import check_engine
from penstock.connectors.vllm.stats import PenstockPromMetrics, PenstockStats, StatsSource
from penstock.connectors.vllm.tie import Tie
from penstock.connectors.vllm.worker import WorkerHalf

__all__ = ["PenstockConnector"]


class PenstockConnector(KVConnectorBase_V1):
    """KV blocks from and to a pool. Raises Refused at start for an engine that cannot share, ConfigError for settings
    that it does not know."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        config = read_config(transfer.kv_connector_extra_config)
        check_engine(vllm_config)
        spec = group_spec(kv_cache_config)
        # "fail", vLLM's default, ends a request whose load failed; the scheduler reads this after its half is made.
        transfer.kv_load_failure_policy = "recompute"
        self._counters = Counters()
        self._stats = StatsSource(self._counters)
        name = "scheduler" if role is KVConnectorRole.SCHEDULER else "worker"
        tie = Tie(config.pool, f"vllm-{name}-{os.getpid()}", str(vllm_config.model_config.served_model_name or "")[:60])
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(
                config,
                may_load=transfer.is_kv_consumer,
                may_save=transfer.is_kv_producer,
                overlapping_steps=vllm_config.max_concurrent_batches > 1,
                block_tokens=int(spec.block_size),
                counters=self._counters,
                tie=tie,
                events=PoolEvents(lambda: tie.pool, int(spec.block_size)) if _publishes(vllm_config) else None,
            )
        else:
            self._worker = WorkerHalf(config, vllm_config, kv_cache_config, self._counters, tie)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a later miss, nothing more."""
        return False

    # ---- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        self._as_worker().caches(kv_caches, (get_pp_group().rank_in_group, get_tp_group().rank_in_group))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._as_worker().hello()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if isinstance(kv_connector_metadata, Orders):
            self._as_worker().before(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Orders)
        self._as_worker().begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._as_worker().start_loads()
        if forward_context.attn_metadata is None:
            self._as_worker().idle()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads that a step needs have ended before it starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored whole, when they are settled."""

    def wait_for_save(self) -> None:
        self._as_worker().submit_saves()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._as_worker().end(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._as_worker().take_invalid()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._as_worker().take_report()

    # ---- scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        hellos = {rank: hello for rank, hello in metadata.items() if isinstance(hello, RankHello)}
        self._as_scheduler().meet(hellos)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._as_scheduler().bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        self._as_scheduler().arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._as_scheduler().matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pages = blocks.get_block_ids()[0] if num_external_tokens else []
        self._as_scheduler().allocated(request, pages, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        state = scheduler_output.kv_connector_block_state

        def pages_of(name: str) -> list[int]:
            pages: list[int] = state.get_block_ids(name)[0]
            return pages

        scheduled = scheduler_output.num_scheduled_tokens
        return self._as_scheduler().orders(scheduled, pages_of, scheduler_output.preempted_req_ids or ())

    def update_connector_output(self, connector_output: Any) -> None:
        report = connector_output.kv_connector_worker_meta
        assert report is None or isinstance(report, Report)
        self._as_scheduler().reported(report, connector_output.invalid_block_ids or set())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._as_scheduler().finished(request, block_ids), None

    def take_events(self) -> Iterable[Any]:
        return self._as_scheduler().take_events()

    def reset_cache(self) -> bool | None:
        return self._as_scheduler().reset()

    # ---- both

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self._stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return PenstockStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> KVConnectorPromMetrics | None:
        return PenstockPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def _as_worker(self) -> WorkerHalf:
        assert self._worker is not None
        return self._worker

    def _as_scheduler(self) -> SchedulerHalf:
        assert self._scheduler is not None
        return self._scheduler


def _publishes(vllm_config: Any) -> bool:
    config = vllm_config.kv_events_config
    return config is not None and bool(config.enable_kv_cache_events)
