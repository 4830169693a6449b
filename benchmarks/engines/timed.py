"""Penstock's connector with a clock around every call that the engine makes into it.

Writes what it counted where PENSTOCK_BENCH_TIMES says, one small file a process, always up to date, so that nothing
depends on how the engine ends. A call costs about a microsecond more than without.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.times import FIELDS, FOLDER_VARIABLE
from penstock.connectors.vllm import PenstockConnector

__all__ = ["TimedPenstockConnector"]

_UNTIMED = ("__init__", "register_kv_caches", "get_handshake_metadata", "shutdown")


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return method(self, *args, **kwargs)
        finally:
            self._times[0] += time.thread_time() - started
            self._times[3] += 1

    return call


class TimedPenstockConnector(PenstockConnector):
    """PenstockConnector, timed."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        folder = Path(os.environ[FOLDER_VARIABLE])
        self._times = np.memmap(
            folder / f"{role.name.lower()}-{os.getpid()}.times", np.float64, "w+", shape=(len(FIELDS),)
        )
        self._own_threads: list[int] = []
        super().__init__(vllm_config, role, kv_cache_config)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        self._times[2] += scheduler_output.total_num_scheduled_tokens > 0
        meta = _timed(PenstockConnector.build_connector_meta)(self, scheduler_output)
        self._add_threads()
        return meta

    def get_finished(self, finished_req_ids: set[str]) -> Any:
        finished = _timed(PenstockConnector.get_finished)(self, finished_req_ids)
        self._add_threads()
        return finished

    def _add_threads(self) -> None:
        if not self._own_threads:
            found = [thread for thread in threading.enumerate() if thread.name.startswith("penstock")]
            self._own_threads = [time.pthread_getcpuclockid(thread.ident) for thread in found if thread.ident]
        self._times[1] = sum(time.clock_gettime(clock) for clock in self._own_threads)


def _time_all() -> None:
    for name, value in vars(PenstockConnector).items():
        plain = callable(value) and not isinstance(value, (staticmethod, classmethod, type))
        if plain and name not in _UNTIMED and name not in vars(TimedPenstockConnector) and not name.startswith("_"):
            setattr(TimedPenstockConnector, name, _timed(value))


_time_all()
