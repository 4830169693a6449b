"""vLLM's scheduler and Penstock's connector, both real, around a model of arithmetic: an engine that starts at once.

Covers what the engine core does between them: chunked prefill, preemption, aborts, two steps in flight. Does not cover
processes: `tests/engines` runs the real server.
"""

from __future__ import annotations

import itertools
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.structured_output import StructuredOutputManager

from penstock import Pool, SpaceHandle
from penstock.connectors.vllm.messages import Variant
from penstock.connectors.vllm.scheduler import SchedulerHalf
from penstock.connectors.vllm.worker import WorkerHalf
from tests.engines.sim.runner import BLOCK, Runner, Setup, kv_config, vllm_config

__all__ = ["Engine"]

_names = itertools.count()


class Engine:
    """An engine: requests in, tokens out, one `step` at a time."""

    def __init__(self, setup: Setup, *, seed: int = 0, open_pool: Callable[..., Pool] | None = None) -> None:
        self.setup, self.rng = setup, random.Random(seed)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        config, caches = vllm_config(setup), kv_config(setup.pages)
        kind = AsyncScheduler if setup.overlap else Scheduler
        self.scheduler = kind(config, caches, StructuredOutputManager(config), block_size=BLOCK, log_stats=False)
        self.runner = Runner(setup, config, caches, self.rng)
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.in_flight: deque[tuple[Any, list[Any]]] = deque()
        self.aborts: list[str] = []
        """To be aborted while the step that runs now runs."""
        if setup.pool:
            self._introduce(open_pool)

    def _introduce(self, open_pool: Callable[..., Pool] | None) -> None:
        halves = [self.half, *self.workers]
        if open_pool is not None:
            for half in halves:
                half._tie._open = open_pool
        for rank in self.runner.ranks:
            rank.half.caches(rank.tensors, (0, rank.rank))
        hellos = {(0, rank.rank): rank.connector.get_handshake_metadata() for rank in self.runner.ranks}
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(pickle.loads(pickle.dumps(hellos)))

    # ---- what tests look at

    @property
    def half(self) -> SchedulerHalf:
        half: SchedulerHalf = self.scheduler.connector._scheduler
        return half

    @property
    def workers(self) -> list[WorkerHalf]:
        return [rank.half for rank in self.runner.ranks]

    @property
    def pools(self) -> list[Pool]:
        """Of all halves that are attached."""
        found = [half._tie.pool for half in (self.half, *self.workers)]
        return [pool for pool in found if pool is not None]

    def handles(self, variant: Variant = Variant()) -> list[SpaceHandle]:  # noqa: B008 - frozen
        """The pool's handles of all ranks' spaces."""
        found = self.half._ranks.handles(variant)
        assert isinstance(found, tuple), found
        return list(found[1].values())

    @property
    def n_free_pages(self) -> int:
        free: int = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return free

    def counter(self, name: str) -> int:
        """Of both roles together."""
        counters = [self.scheduler.connector._counters, *(rank.connector._counters for rank in self.runner.ranks)]
        return sum(one.read().get(name, 0) for one in counters)

    def hit_tokens(self, name: str) -> int:
        """What the connector promised of a request that is running."""
        return self.half._tracked[name].hit_tokens

    # ---- requests

    def add(self, prompt: Sequence[int], n: int = 8, *, name: str = "", **more: Any) -> str:
        """Have a request wait. `more` goes to vLLM's Request."""
        name = name or f"r{next(_names)}"
        params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True, extra_args=more.pop("extra_args", None))
        tokens = None if more.pop("no_tokens", False) else list(prompt)
        request = Request(name, tokens, params, None, block_hasher=self.hasher, **more)
        self.requests[name], self.tokens[name] = request, []
        self.scheduler.add_request(request)
        return name

    def abort(self, *names: str) -> None:
        """Between steps."""
        self.aborted.update(names)
        self.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)

    def is_done(self, name: str) -> bool:
        return self.requests[name].is_finished()

    # ---- steps

    def step(self) -> None:
        """One turn of the engine's loop: schedule, execute, and take the output in; with overlapping steps that of the
        step before."""
        executed = False
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            executed = output.total_num_scheduled_tokens > 0
            self.in_flight.append((output, []))
            # A worker may be quick or slow: it runs a step at once, or only when its output is waited for.
            if not self.setup.overlap or self.rng.random() < 0.5:
                self._run_pending()
            room = self.setup.overlap and len(self.in_flight) < 2
            if room and (executed or self.scheduler.has_requests()):
                return
        if self.in_flight:
            self._take_output()

    def _run_pending(self) -> None:
        for output, result in self.in_flight:
            if not result:
                result.append(self.runner.execute(output))

    def _take_output(self) -> None:
        output, result = self.in_flight[0]
        if not result:
            result.append(self.runner.execute(output))
        self.in_flight.popleft()
        if self.aborts:
            names, self.aborts = self.aborts, []
            self.abort(*names)
        for outputs in self.scheduler.update_from_output(output, result[0]).values():
            for one in outputs.outputs:
                self.tokens[one.request_id].extend(one.new_token_ids)
        if self.setup.drafts and not self.setup.overlap and output.total_num_scheduled_tokens:
            self.scheduler.update_draft_token_ids(self.runner.take_drafts(list(output.num_scheduled_tokens)))

    def drain(self) -> None:
        """Take in what is in flight."""
        while self.in_flight:
            self._take_output()

    def run(self, *names: str, limit: int = 3000) -> None:
        """Until these requests (all, if none is named) have ended and nothing of theirs is on its way."""
        for _ in range(limit):
            if names and all(self.is_done(name) for name in names):
                return
            if not (self.scheduler.has_requests() or self.in_flight):
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps: {self.scheduler.running}")

    def ask(self, prompt: Sequence[int], n: int = 8, **more: Any) -> list[int]:
        """One request from beginning to end, and everything stored that it stores."""
        name = self.add(prompt, n, **more)
        self.settle()
        return self.tokens[name]

    def settle(self) -> None:
        """Run until nothing is left to do, and wait until the pool has taken everything in."""
        self.run()
        self.drain()
        self.idle_steps()
        for pool in self.pools:
            assert pool.flush(30.0)

    def idle_steps(self, limit: int = 3000) -> None:
        """Steps without requests until every load and save was answered. A real engine does not take them: the answers
        come with the next request."""
        for _ in range(limit):
            held = self.half.held() if self.setup.pool else {}
            if not held.get("loads") and not held.get("saves"):
                return
            self.step()
            self.drain()
        raise AssertionError(f"never answered: {self.half.held()}")

    # ---- checks

    def assert_nothing_held(self) -> None:
        """Leases, loads, saves, pages: everything was given back."""
        assert self.half.held() == {"requests": 0, "lookups": 0, "loads": 0, "saves": 0}, self.half.held()
        for pool in self.pools:
            held = pool.held()
            assert held["leases"] == 0, held
        assert not self.half._saves._in_flight and not self.half._waiting
        for worker in self.workers:
            assert not worker._delayed and not worker._saver._open and not worker._loader.is_busy()
        assert not self.scheduler.requests, list(self.scheduler.requests)
        assert self.n_free_pages == self.setup.pages - 1, "a page leaked"

    def close(self) -> None:
        self.runner.close()
        if self.scheduler.connector is not None:
            self.scheduler.shutdown()
