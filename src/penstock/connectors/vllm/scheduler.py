"""The connector's half in vLLM's scheduler: what can be loaded, what may be stored, and whose leases stand.

The scheduler leases blocks when it looks a request up and holds the leases until every rank has copied; workers take
leases of their own from the hand-over and check every block again. Only settled blocks are stored: those whose tokens
are accepted and known, computed by steps whose output has been processed. So a step in which a load failed, and what
it computed from it, never reaches the pool.

Everything here runs on the engine's thread, between steps, and never waits for the keeper. Covers the order of things;
`requests.py` has what is known of one request, `worker.py` does the copying.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from penstock import Miss
from penstock.connectors.below import Bringer, Wish
from penstock.connectors.counters import Counters
from penstock.connectors.vllm.config import ConnectorConfig
from penstock.connectors.vllm.events import PoolEvents
from penstock.connectors.vllm.fetches import Fetches
from penstock.connectors.vllm.intent import read_request
from penstock.connectors.vllm.messages import LoadOrder, Orders, RankHello, RankId, Report, Variant
from penstock.connectors.vllm.plans import SavePlans
from penstock.connectors.vllm.ranks import Ranks
from penstock.connectors.vllm.recovery import roll_back
from penstock.connectors.vllm.requests import Lookup, Tracked, chain_extras, left_alone
from penstock.connectors.vllm.spaces import Adapters
from penstock.connectors.vllm.tie import Tie
from penstock.errors import PoolClosed

__all__ = ["SchedulerHalf"]

_log = logging.getLogger("vllm.penstock")

# What a copy is assumed to reach before any was measured; a fifth of a core's memcpy.
_ASSUMED_BYTES_PER_S = 2e9
# A load that failed may be tried again once the keeper had time to drop the damaged block; more often is in vain.
_MAX_FAILED_LOADS = 1


class SchedulerHalf:
    """What `PenstockConnector` does in the scheduler. For one thread."""

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        may_load: bool,
        may_save: bool,
        overlapping_steps: bool,
        block_tokens: int,
        counters: Counters,
        tie: Tie,
        events: PoolEvents | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`overlapping_steps`: the engine schedules a step before it knows the one before (asynchronous scheduling,
        pipeline parallelism); then nothing is loaded inside a step, because its failure would be known too late.
        `events` is told of stores where the engine publishes KV events."""
        self._config = config
        self._may_load, self._may_save = may_load, may_save
        self._overlapping = overlapping_steps
        self._block = block_tokens
        self._counters = counters
        self._tie = tie
        self._ranks = Ranks(tie)
        self._now_s = now_s
        self._adapters = Adapters()
        self._epoch = 0
        self._tracked: dict[str, Tracked] = {}
        self._numbers = iter(range(1, 1 << 62))
        self._loads: dict[int, tuple[str, Lookup]] = {}
        self._saves = SavePlans(self._ranks, self._numbers, block_tokens, events)
        self._opened = {Variant()}
        """Variants whose spaces every worker has registered, so that no step waits for the keeper."""
        self._waiting: dict[int, int] = {}
        """How many ranks have not answered a load or save yet."""
        self._orders = Orders()
        self._step = 0
        """The step that is being put together."""
        self._mixed = False
        """Whether the engine's own prefix cache may hold what it computed before the last reset."""
        self._left: list[list[int]] = []
        """Pages of requests that ended while their last step ran: what it computed is in the prefix cache."""
        self._speed = 0.0
        self._bringer = Bringer(counters, config.fetch_deadline_s)
        self._fetches = Fetches(self._bringer, counters, config.fetch_deadline_s)
        self._cache_manager: Any = None

    # ---- start

    def meet(self, hellos: Mapping[RankId, RankHello]) -> None:
        """The workers are there: what each of them holds of a block. Attaches to the pool, if there is one."""
        self._ranks.meet(hellos)

    def bind(self, cache_manager: Any) -> None:
        """The engine's own prefix cache, from which blocks of failed loads are removed."""
        self._cache_manager = cache_manager

    # ---- requests come

    def arrived(self, request: Any) -> Tracked:
        """A request was added: read what it asks, and whether it can be shared at all."""
        asked = read_request(request)
        for name in asked.malformed:
            self._counters.add("intent.malformed")
            _log.debug("request %s: malformed %s is ignored", request.request_id, name)
        alone = left_alone(request, self._config.trust_item_hashes)
        variant = Variant(epoch=self._epoch)
        if not alone and request.lora_request is not None:
            try:
                variant = Variant(self._adapters.digest(request.lora_request), self._epoch)
            except Exception as error:  # noqa: BLE001 - the engine's thread: whatever it is, the request needs no pool
                alone = "unknown_adapter"
                _log.warning("request %s is computed without the pool: %s", request.request_id, error)
        if alone:
            self._counters.add(f"left_alone.{alone}")
        elif self._ranks.is_new(variant):
            self._ranks.spaces(variant)
            self._ranks.handles(variant)
            self._orders.variants.append(variant)
        tracked = Tracked(
            request=request,
            variant=variant,
            intent=asked.intent,
            may_load=self._may_load and not alone and not asked.skip_load,
            may_save=self._may_save and not alone and not asked.skip_save,
            min_hit_tokens=max(1, self._config.min_hit_tokens, asked.min_hit_tokens),
            wait_s=asked.wait_s,
            extras={} if alone else chain_extras(request, self._block),
            fetch=asked.fetch or self._config.fetch,
        )
        if tracked.may_load:
            self._fetches.look_ahead(self._tie.pool)
        if asked.skip_load:
            tracked.miss = Miss.SKIPPED
        self._tracked[request.request_id] = tracked
        return tracked

    # ---- lookups

    def matched(self, request: Any, n_computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond the engine's own `n_computed` can be loaded, and whether beside the steps.

        None: ask again in the next step. May be asked again and again; the answer may be dropped. Leases what it
        promises.
        """
        tracked = self._tracked.get(request.request_id) or self.arrived(request)
        tracked.local_tokens = n_computed
        if self._mixed and n_computed:
            tracked.may_save = False
        if not tracked.may_load or tracked.loading or request.skip_reading_prefix_cache:
            return 0, False
        if self._fetch_runs(tracked):
            return None, False
        lookup = self._lookup(tracked, n_computed // self._block)
        if lookup is None:
            return 0, False
        if lookup.miss is Miss.ABSENT and self._fetch_starts(tracked, lookup, n_computed):
            return None, False
        if lookup.miss is Miss.ABSENT and self._may_wait(tracked):
            self._drop_lookup(tracked)
            self._orders.waiting = True
            return None, False
        # The last token is always computed: the next one is drawn from its logits.
        end = min((lookup.first_block + lookup.n_blocks) * self._block, request.num_tokens - 1)
        n_tokens = end - n_computed
        if n_tokens < tracked.min_hit_tokens:
            if lookup.n_blocks:
                tracked.miss = Miss.SKIPPED
            self._drop_lookup(tracked)
            return 0, False
        return n_tokens, self._beside(tracked.variant, lookup)

    def _fetch_starts(self, tracked: Tracked, lookup: Lookup, n_computed: int) -> bool:
        """Whether blocks of this request are brought from below the pool now: once for each request."""
        handles = self._ranks.handles(tracked.variant)
        if not tracked.may_fetch or isinstance(handles, Miss):
            return False
        tracked.may_fetch = False
        pool, of_rank = handles
        # The last token is always computed: a block that ends with it is of no use.
        n_blocks = (tracked.request.num_tokens - 1) // self._block
        if n_blocks <= lookup.first_block + lookup.n_blocks:
            return False
        wanted = [(handle, tracked.chains[rank][:n_blocks]) for rank, handle in of_rank.items()]
        wish = Wish(
            n_tokens=tracked.request.num_tokens,
            mode=tracked.fetch,
            have_tokens=n_computed,
            min_hit_tokens=tracked.min_hit_tokens,
            load_s_per_block=self._ranks.largest_block / (self._speed or _ASSUMED_BYTES_PER_S),
            intent=tracked.intent,
        )
        tracked.fetching = self._fetches.start(pool, wanted, wish)
        return self._fetch_runs(tracked)

    def _fetch_runs(self, tracked: Tracked) -> bool:
        """Whether the request still waits for blocks from below. When it does not any more, it is looked up anew."""
        if tracked.fetching is None:
            return False
        if not tracked.fetching.over:
            self._orders.waiting = True
            return True
        tracked.fetched_blocks = tracked.fetching.brought.moved
        tracked.fetching = None
        if tracked.lookup is not None:
            tracked.lookup.stale = True
        return False

    def _may_wait(self, tracked: Tracked) -> bool:
        if tracked.wait_until_s is None:
            tracked.wait_until_s = self._now_s() + tracked.wait_s
        return self._now_s() < tracked.wait_until_s

    def _lookup(self, tracked: Tracked, first: int) -> Lookup | None:
        """The lookup that stands, or a new one; None without a pool."""
        standing = tracked.lookup
        if standing is None:
            return self._look_up(tracked, first)
        fresh = not standing.stale and self._now_s() - standing.at_s < self._config.lease_age_s
        if standing.first_block == first and fresh:
            return standing
        try:
            # What is leased stays so until it is leased anew.
            return self._look_up(tracked, first)
        finally:
            standing.release()

    def _look_up(self, tracked: Tracked, first: int) -> Lookup | None:
        tracked.lookup = None
        n_full = tracked.request.num_tokens // self._block
        if n_full <= first:
            return None
        handles = self._ranks.handles(tracked.variant)
        if isinstance(handles, Miss):
            tracked.miss = handles
            self._counters.add("no_keeper" if handles is Miss.NO_KEEPER else "space_not_registered")
            return None
        pool, of_rank = handles
        tracked.extend(self._ranks.spaces(tracked.variant), n_full * self._block)
        leases, n_blocks, miss = {}, n_full - first, Miss.NONE
        for rank, handle in of_rank.items():
            lease = leases[rank] = pool.match(handle, tracked.chains[rank][first : first + n_blocks])
            if len(lease) < n_blocks:
                n_blocks, miss = len(lease), Miss(lease.miss)
        for lease in leases.values():
            lease.truncate(n_blocks)
        # Damage that was found is why the rest is absent now.
        tracked.miss = Miss.CHECKSUM if miss is Miss.ABSENT and tracked.n_failed_loads else miss
        tracked.lookup = Lookup(first, n_blocks, leases, self._now_s(), miss)
        return tracked.lookup

    def _beside(self, variant: Variant, lookup: Lookup) -> bool:
        """Whether the load runs beside the steps instead of before the next one."""
        if self._overlapping or self._config.sync_load_ms <= 0 or variant not in self._opened:
            return True
        estimate_s = lookup.n_blocks * self._ranks.largest_block / (self._speed or _ASSUMED_BYTES_PER_S)
        return estimate_s * 1000 > self._config.sync_load_ms

    def _drop_lookup(self, tracked: Tracked) -> None:
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is not None:
            lookup.release()

    # ---- loads

    def allocated(self, request: Any, pages: list[int], n_external: int) -> None:
        """The engine gave a request its pages and wants `n_external` tokens loaded; 0 for none."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        tracked.admitted = self._step
        if n_external <= 0:
            self._drop_lookup(tracked)
            return
        lookup, tracked.lookup = tracked.lookup, None
        if lookup is None:
            # Never seen. The engine counts on these tokens, so that the workers must report them as not loaded.
            lookup = Lookup(0, -(-request.num_tokens // self._block), {}, self._now_s(), Miss.CLOSED)
        end = lookup.first_block + lookup.n_blocks
        number = next(self._numbers)
        self._loads[number] = (request.request_id, lookup)
        self._waiting[number] = len(self._ranks)
        tracked.loading, tracked.beside = number, self._beside(tracked.variant, lookup)
        tracked.hit_tokens = n_external
        tracked.save_anew()
        self._counters.add("hit_tokens", n_external)
        self._orders.loads.append(
            LoadOrder(
                number=number,
                request=request.request_id,
                variant=tracked.variant,
                leases=_handovers(lookup),
                pages=pages[lookup.first_block : end],
                beside=tracked.beside,
                deadline_s=self._now_s() + self._config.load_deadline_s,
            )
        )

    # ---- saves

    def orders(
        self, scheduled: Mapping[str, int], pages_of: Callable[[str], list[int]], preempted: Iterable[str]
    ) -> Orders:
        """What the workers are to do in this step; the scheduler has just made it.

        `scheduled` are the requests in it with their numbers of tokens, `pages_of` gives a request's pages, `preempted`
        lost theirs since the last step.
        """
        orders, self._orders = self._orders, Orders()
        orders.n_tokens = sum(scheduled.values())
        longest = self._tracked.get(max(scheduled, key=scheduled.__getitem__, default=""))
        orders.n_before = 0 if longest is None else longest.request.num_computed_tokens
        for name in preempted:
            # Also one that ended since: its pages are given away, and its saves may still be under way.
            orders.preempted.append(name)
            if (tracked := self._tracked.get(name)) is not None:
                tracked.save_anew()
        if self._may_save:
            for name in scheduled:
                tracked = self._tracked.get(name)
                # What a request shares with another may still be loaded, and computed on top of that, in this step.
                if tracked is None or tracked.admitted == self._step:
                    continue
                if tracked.n_settled // self._block > tracked.n_planned:
                    self._plan_saves(tracked, pages_of, orders)
        self._step += 1
        self._left.clear()
        self._release_old()
        return orders

    def _plan_saves(self, tracked: Tracked, pages_of: Callable[[str], list[int]], orders: Orders) -> None:
        order = self._saves.plan(tracked, pages_of)
        if order is not None:
            self._waiting[order.number] = len(self._ranks)
            orders.saves.append(order)

    # ---- what came of it

    def reported(self, report: Report | None, invalid_pages: set[int]) -> None:
        """A step's output: what workers finished, and which pages a load left without their content."""
        if report is not None:
            self._ranks.attached(report.pools)
            self._speed = report.bytes_per_s or self._speed
            if report.computed is not None:
                self._bringer.computed(*report.computed)
            for number, n_ranks in report.loaded.items():
                if self._all_ranks(number, n_ranks):
                    self._load_ended(number)
            for number, drop in report.dropped.items():
                self._saves.dropped(number, drop)
            for number, n_ranks in report.saved.items():
                if self._all_ranks(number, n_ranks):
                    self._opened.add(self._saves.ended(number, self._epoch))
        if invalid_pages:
            self._failed(invalid_pages)

    def _all_ranks(self, number: int, n_ranks: int) -> bool:
        if number not in self._waiting:
            return False
        self._waiting[number] -= n_ranks
        if self._waiting[number] > 0:
            return False
        del self._waiting[number]
        return True

    def _load_ended(self, number: int) -> None:
        name, lookup = self._loads.pop(number)
        lookup.release()
        tracked = self._tracked.get(name)
        if tracked is not None and tracked.loading == number:
            tracked.loading = 0
            self._opened.add(tracked.variant)

    def _failed(self, invalid_pages: set[int]) -> None:
        self._counters.add("load.failed_blocks", len(invalid_pages))
        if self._cache_manager is None:
            return
        tracked_now = self._tracked.values()
        for name in roll_back(self._cache_manager, tracked_now, self._left, invalid_pages, self._block):
            tracked = self._tracked[name]
            tracked.miss = Miss.CHECKSUM
            kept = max(0, tracked.request.num_computed_tokens - tracked.local_tokens)
            tracked.hit_tokens = min(tracked.hit_tokens, kept)
            tracked.save_anew()
            tracked.n_failed_loads += 1
            # After a load beside the steps none at all: vLLM would count the request's own unmet need against the next
            # one and never give it pages, nor anybody behind it.
            if tracked.beside or tracked.n_failed_loads > _MAX_FAILED_LOADS:
                tracked.may_load = False

    # ---- requests go

    def finished(self, request: Any, pages: list[int]) -> bool:
        """A request ended, however it did. True: its pages must stay until its saves have ended."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return False
        self._drop_lookup(tracked)
        tracked.call_off_fetch()
        if request.num_in_flight_tokens:
            self._left.append(pages)
        if tracked.admitted < self._step - 1 or not request.num_in_flight_tokens:
            self._plan_saves(tracked, lambda _: pages, self._orders)
        del self._tracked[request.request_id]
        self._tell(tracked)
        if not tracked.saving or (tracked.loading and tracked.beside):
            # With a load beside the steps in flight the engine keeps the pages by itself.
            return False
        self._orders.delayed.append(request.request_id)
        return True

    def _tell(self, tracked: Tracked) -> None:
        request = tracked.request
        self._counters.add("requests")
        self._counters.add("prompt_tokens", request.num_prompt_tokens)
        self._counters.add(f"lookup.{tracked.miss.name.lower()}")
        _log.info(
            "request %s: prompt_tokens=%d local_tokens=%d hit_tokens=%d miss=%s fetched_blocks=%d blocks=%d",
            request.request_id,
            request.num_prompt_tokens,
            tracked.local_tokens,
            tracked.hit_tokens,
            tracked.miss.name.lower(),
            tracked.fetched_blocks,
            tracked.n_saved or 0,
        )

    def _release_old(self) -> None:
        """Lookups that no answer was made of, as of requests that wait long for pages. Not those of requests that wait
        for the rest to be fetched: it is to follow them."""
        limit = self._now_s() - self._config.lease_age_s
        for tracked in self._tracked.values():
            if tracked.lookup is not None and tracked.lookup.at_s <= limit and tracked.fetching is None:
                self._drop_lookup(tracked)

    def reset(self) -> bool:
        """The engine's caches are void, as after new weights: blocks of before are of another space from now on.

        The new one is this engine's alone: nobody else can say that their weights changed in the same way.
        """
        self._epoch = secrets.randbits(63) | 1
        self._mixed = any(tracked.request.num_computed_tokens for tracked in self._tracked.values())
        for tracked in self._tracked.values():
            self._drop_lookup(tracked)
            tracked.call_off_fetch()
            tracked.variant = Variant(tracked.variant.adapter, self._epoch)
            tracked.forget_keys()
            # What it has computed is of before, and what follows builds on it.
            tracked.may_save = tracked.may_save and not tracked.request.num_computed_tokens
        self._saves.reset()
        self._counters.add("resets")
        return True

    def take_events(self) -> list[Any]:
        """The engine's KV events of what it stored and what left, since the last call."""
        return self._saves.take_events()

    def held(self) -> dict[str, int]:
        """What stands now: for tests and for whoever looks for leaks."""
        return {
            "requests": len(self._tracked),
            "lookups": sum(tracked.lookup is not None for tracked in self._tracked.values()),
            "loads": len(self._loads),
            "saves": len(self._saves),
        }

    def close(self) -> None:
        """Give everything back and leave the pool."""
        for tracked in self._tracked.values():
            self._drop_lookup(tracked)
            tracked.call_off_fetch()
        for _, lookup in self._loads.values():
            lookup.release()
        self._fetches.close()
        self._tie.close()


def _handovers(lookup: Lookup) -> dict[RankId, bytes]:
    """For each rank its lease as bytes; nothing if the pool was closed meanwhile, so that the workers report the load
    as failed."""
    try:
        return {rank: lease.handover() for rank, lease in lookup.leases.items()}
    except PoolClosed:
        return {}
