"""The connector's half in a vLLM worker: copies blocks between the pool and the engine's pages.

Covers one rank. Does not cover what is copied (`scheduler.py`) nor how (`loads.py`, `saves.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from penstock import Drop, Pool, Space
from penstock.connectors.counters import Counters
from penstock.connectors.vllm.config import ConnectorConfig
from penstock.connectors.vllm.layout import group_spec, inspect_caches
from penstock.connectors.vllm.loads import Copier, Loader
from penstock.connectors.vllm.messages import LoadOrder, Orders, RankHello, RankId, Report
from penstock.connectors.vllm.saves import Saver
from penstock.connectors.vllm.spaces import engine_space, varied
from penstock.connectors.vllm.tie import Tie

__all__ = ["WorkerHalf"]

_log = logging.getLogger("vllm.penstock")

# How long a step without tokens waits for transfers: else the engine would spin until they end.
_IDLE_WAIT_S = 0.002
_CLOSE_S = 5.0
# How long a load waits for its space to be registered: on its thread, and, which only a keeper that hangs at the wrong
# moment brings about, inside a step.
_BESIDE_WAIT_S = 5.0
_INSIDE_WAIT_S = 0.25

# A shorter step says more about the engine's overhead than about what prefill costs.
_MEASURE_FROM_TOKENS = 64


class WorkerHalf:
    """What `PenstockConnector` does in one worker. Called from the worker's own thread only."""

    def __init__(self, config: ConnectorConfig, vllm_config: Any, kv_cache_config: Any, counters: Counters, tie: Tie):
        self._config, self._vllm_config, self._counters, self._tie = config, vllm_config, counters, tie
        self._spec = group_spec(kv_cache_config)
        self._rank: RankId = (0, 0)
        self._space: Space | None = None
        self._orders = Orders()
        self._delayed: set[str] = set()
        self._invalid: set[int] = set()
        self._finished_loads: set[str] = set()
        self._report = Report()
        self._told_pool: bytes | None = None
        self._computing_since = 0.0

    # ---- start

    def caches(self, kv_caches: Mapping[str, torch.Tensor], rank: RankId) -> None:
        """The engine allocated its pages. Reads the weights' digest, attaches, and starts the threads.

        Raises Refused for a layout or model that cannot be shared.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        caches = inspect_caches(kv_caches, self._spec, layers)
        self._rank = rank
        self._space = engine_space(self._vllm_config, caches, self._spec, rank, self._config.weights, layers)
        self._tie.start(self._space)
        self._copier = Copier(rank, caches, self._counters, self._ready)
        self._loader = Loader(self._copier)
        self._saver = Saver(rank, caches, self._counters, wait_s=self._config.save_wait_s)
        _log.info(
            "rank %s: %d layers, blocks of %d tokens and %d bytes, layout %s",
            rank,
            len(caches.layers),
            self._space.block_tokens,
            self._space.block_bytes,
            self._space.layout,
        )

    def hello(self) -> RankHello | None:
        """What the scheduler's half must know of this rank; None before there are caches."""
        return None if self._space is None else RankHello(self._space.encode(), self._tie.uuid)

    # ---- a step

    def before(self, orders: Orders) -> None:
        """Before the step's pages are written: end the saves whose pages were given away."""
        if orders.preempted:
            self._saver.call_off(set(orders.preempted))

    def begin(self, orders: Orders) -> None:
        """The step's orders are there."""
        self._orders = orders
        for variant in orders.variants:
            self._tie.handle(self._base(variant))

    def start_loads(self) -> None:
        """Copy what this step needs; hand the rest to the thread."""
        for order in self._orders.loads:
            if order.beside:
                self._loader.submit(order)
            else:
                self._load_ended(order, self._copier.copy(order))
        self._computing_since = time.perf_counter()

    def submit_saves(self) -> None:
        """Hand this step's saves to the thread."""
        if self._orders.n_tokens >= _MEASURE_FROM_TOKENS:
            seconds = time.perf_counter() - self._computing_since
            self._report.computed = (self._orders.n_tokens, self._orders.n_before, seconds)
        for order in self._orders.saves:
            space = self._base(order.variant)
            self._saver.submit(order, self._tie.pool, self._tie.handle(space))
        self._delayed.update(self._orders.delayed)

    def end(self, finished: set[str]) -> tuple[set[str], set[str]]:
        """After the step: (requests whose saves have ended, requests whose loads beside the steps have).

        `finished` ended since the last step: their loads are called off.
        """
        if finished:
            self._loader.call_off(finished)
        for order, good in self._loader.take_ended():
            self._load_ended(order, good)
            self._finished_loads.add(order.request)
        for number, drop in self._saver.take_ended().items():
            self._report.saved[number] = 1
            if drop is not Drop.NONE:
                self._report.dropped[number] = drop
        done = {request for request in self._delayed if self._saver.is_idle(request)}
        self._delayed -= done
        loaded, self._finished_loads = self._finished_loads, set()
        return done, loaded

    def idle(self) -> None:
        """A step without tokens: wait a little for what the engine is waiting for."""
        if self._loader.is_busy():
            self._loader.wait_some(_IDLE_WAIT_S)
        elif self._delayed:
            self._saver.wait_some(_IDLE_WAIT_S)
        elif self._orders.waiting:
            time.sleep(_IDLE_WAIT_S)

    def take_invalid(self) -> set[int]:
        """Pages that a load left without their content, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def take_report(self) -> Report | None:
        """What ended since the last call; None for nothing."""
        report, self._report = self._report, Report()
        uuid = self._tie.uuid
        if uuid != self._told_pool:
            self._told_pool = uuid
            report.pools = {self._rank: uuid}
        if not (report.loaded or report.saved or report.pools or report.computed):
            return None
        report.bytes_per_s = self._copier.bytes_per_s
        return report

    def close(self) -> None:
        """End the threads, then leave the pool: nothing touches the pages after that."""
        if self._space is not None:
            self._loader.close(_CLOSE_S)
            self._saver.close(_CLOSE_S)
        self._tie.close()

    # ---- inside

    def _base(self, variant: Any) -> Space:
        assert self._space is not None
        return varied(self._space, variant)

    def _ready(self, order: LoadOrder) -> Pool | None:
        remaining = max(0.0, order.deadline_s - time.monotonic())
        patience = _BESIDE_WAIT_S if order.beside else _INSIDE_WAIT_S
        handle = self._tie.wait_handle(self._base(order.variant), min(remaining, patience))
        return self._tie.pool if handle is not None else None

    def _load_ended(self, order: LoadOrder, good: int) -> None:
        self._report.loaded[order.number] = 1
        if good < len(order.pages):
            self._invalid.update(order.pages[good:])
            self._report.failed_loads += 1
