"""Blocks that lie below the pool: whether a request fetches or recomputes them, and the fetch within its time.

For every connector. The decision compares what the tiers' measured speeds say with the engine's measured prefill speed
(`penstock.core.cost`); what comes later than it should is given up in time (`pace.py`), and what arrived by then is
used. Does not cover when an engine may wait (its connector does).

An engine that can compute the front of a chain while its back comes (`Front`) does so where the two together are
expected to take less time than either way alone (CacheFlow; `shared/facts.md`).

Before any prefill was measured everything that lies below is fetched: an engine that has just started, on a pool that
has, is what the tiers are for, and a guess of its speed may be wrong by two orders of magnitude. In return such a fetch
gets hardly more time than the tiers promise.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from penstock import FetchEnd, Intent, KeyChain, Pool, SpaceHandle
from penstock.connectors.counters import Counters
from penstock.connectors.pace import Pace
from penstock.core.cost import Part, choose
from penstock.core.speed import PrefillMeter
from penstock.pool.below import Below, Fetch

__all__ = ["NOTHING", "Bringer", "Brought", "FetchMode", "Front", "Wanted", "Wish"]

Wanted = Sequence[tuple[SpaceHandle, KeyChain]]
"""The same blocks of a chain as each rank of an engine keeps them; an engine of one rank has one."""
Front = Callable[[int, float], bool]
"""`front(n, until_s)` computes those of the chain's first n blocks that are not in the pool, and stores them there;
after `until_s` on the monotonic clock nobody needs them there. False where it could not."""

_ASK_S = 0.25
"""How long the tiers, some of them on other machines, may be asked where blocks are, where nothing says how long."""
_ASK_LEAST_S, _ASK_MOST_S = 0.005, 0.5
_ASK_SHARE = 0.1
"""Of the time that computing would take: what is never found costs no more than that."""
_QUIET_S = 1.0
"""Nobody is asked for so long after no answer came: what is stuck would cost every request the wait."""
_LOOK_S = 0.005
"""How often a fetch looks whether it is still wanted, and still worth it."""
_UNMEASURED_S = 0.25
"""What a fetch may take beyond twice what the tiers promise, while nothing is known of the engine's own speed."""
_MOST_OVERHEAD_S = 0.05
_FRONT_SHARE = 0.5
"""Of the time that a fetch has; computing may take twice as long as it was expected to."""
_LEARN, _FORGET = 0.3, 0.95


class FetchMode(StrEnum):
    """What a request does about blocks below the pool."""

    AUTO = "auto"
    """Fetches what is expected to be faster to fetch than to compute."""
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What one request wants."""

    n_tokens: int
    """The prompt's length."""
    mode: FetchMode = FetchMode.AUTO
    have_tokens: int = 0
    """Tokens that the engine has by itself and would not compute."""
    min_hit_tokens: int = 0
    """Beyond those; a shorter hit is of no use."""
    load_s_per_block: float = 0.0
    """What the engine needs to take a block out of the pool."""
    intent: Intent | None = None


@dataclass(frozen=True, slots=True)
class Brought:
    """What came of it."""

    n_blocks: int = 0
    """Blocks, from the first, that every rank has in the pool now, as far as was seen."""
    moved: int = 0
    """Blocks that were fetched for this request, all ranks."""


NOTHING = Brought()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to fetch: blocks `first` to `end - 1`, for `limit_s` at most."""

    heres: tuple[int, ...]
    """What each rank has."""
    end: int
    pace: Pace
    limit_s: float
    front: int = 0
    """So many of the first blocks are to be in the pool by what the engine has or computes meanwhile."""
    front_s: float = 0.0
    """What computing those is expected to take."""

    @property
    def first(self) -> int:
        return max(min(self.heres), self.front)


class Bringer:
    """Decides and fetches for one engine. Thread-safe."""

    def __init__(self, counters: Counters, deadline_s: float) -> None:
        """`deadline_s` bounds every fetch."""
        self._counters = counters
        self._deadline_s = deadline_s
        self._prefill = PrefillMeter()
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._overhead_s = 0.0
        """What a fetch takes beside the tiers' own time: the way to the mover and back, room, the keeper's intake."""

    def computed(self, n_tokens: int, before: int, seconds: float) -> None:
        """The engine computed this many tokens after `before` others in this time."""
        with self._lock:
            self._prefill.add(n_tokens, before, seconds)

    def bring(
        self,
        pool: Pool,
        wanted: Wanted,
        wish: Wish,
        *,
        give_up: Callable[[], bool] = lambda: False,
        until_s: float = float("inf"),
        front: Front | None = None,
    ) -> Brought:
        """Have what is worth it of `wanted` brought into the pool, and wait for it: at most until `until_s`, on the
        monotonic clock. `give_up` says that nobody waits any more. `front`, of an engine of one rank, is called in this
        thread while blocks come, if that is expected to be faster. Counts how it ended, as `fetch.*`."""
        if wish.mode is FetchMode.NEVER or not wanted:
            return NOTHING
        now = time.monotonic()
        if now < self._quiet_until:
            self._counters.add("fetch.end.paused")
            return NOTHING
        deadline = min(until_s, now + self._deadline_s)
        belows = self._ask(pool, wanted, min(deadline, now + self._ask_s(wish)))
        if belows is None:
            return NOTHING
        most_ahead = pool.most_ahead(wanted[0][0]) if front is not None and len(wanted) == 1 else 0
        plan = self._plan(belows, wanted[0][0].block_tokens, wish, deadline, most_ahead)
        if plan is None:
            return Brought(min(below.here for below in belows))
        return self._fetch(pool, wanted, plan, wish.intent, give_up, front)

    # ---- where the blocks are

    def _ask_s(self, wish: Wish) -> float:
        if wish.mode is FetchMode.ALWAYS:
            return self._deadline_s
        with self._lock:
            if not self._prefill.measured:
                return _ASK_S
            compute_s = float(self._prefill.estimate(wish.n_tokens - wish.have_tokens, wish.have_tokens))
        return min(_ASK_MOST_S, max(_ASK_LEAST_S, _ASK_SHARE * compute_s))

    def _ask(self, pool: Pool, wanted: Wanted, until_s: float) -> list[Below] | None:
        """Where each rank's blocks are; None where nobody could say."""
        belows = []
        for handle, keys in wanted:
            below = pool.locate(handle, keys, max(_ASK_LEAST_S, until_s - time.monotonic()))
            if below.why is FetchEnd.DEADLINE:
                self._quiet_until = time.monotonic() + _QUIET_S
                self._counters.add("fetch.end.no_answer")
            if below.why is not FetchEnd.DONE:
                return None
            belows.append(below)
        return belows

    # ---- what is worth it

    def _plan(
        self, belows: list[Below], block_tokens: int, wish: Wish, deadline: float, most_ahead: int = 0
    ) -> _Plan | None:
        """What to fetch; None for nothing, counted. `most_ahead`: so many blocks may come while those before them are
        being computed."""
        heres = tuple(below.here for below in belows)
        here = min(heres)
        end = min(below.here + below.n_blocks for below in belows)
        least = wish.have_tokens + max(1, wish.min_hit_tokens)
        if end <= here or end * block_tokens < least:
            self._counters.add("fetch.end.nothing_below" if end <= here else "fetch.end.too_little_below")
            return None
        limit_s = max(0.0, deadline - time.monotonic())
        costs = np.sum([_seconds(below, here, end) for below in belows], axis=0)
        with self._lock:
            measured, overhead_s = self._prefill.measured, self._overhead_s
        until = overhead_s + np.concatenate(([0.0], np.cumsum(costs)))
        if wish.mode is FetchMode.ALWAYS:
            return _Plan(heres, end, Pace(until), limit_s)
        if not measured:
            return _Plan(heres, end, Pace(until), min(limit_s, 2 * float(until[-1]) + _UNMEASURED_S))
        front, n = self._worth(costs, overhead_s, here, block_tokens, wish, most_ahead)
        with self._lock:
            front_s = float(self._prefill.estimate(front * block_tokens, here * block_tokens)) if front else 0.0
        if front_s > _FRONT_SHARE * limit_s:  # it could come too late for everything behind it
            front, (_, n) = 0, self._worth(costs, overhead_s, here, block_tokens, wish, 0)
        if n == 0 or (here + n) * block_tokens < least:
            self._recompute()
            return None
        until, lost = until[front : n + 1] - until[front], self._lost(here + front, here + n, block_tokens, wish)
        if not front:
            return _Plan(heres, here + n, Pace(overhead_s + until, lost), limit_s)
        pace = Pace(np.maximum(front_s, overhead_s + until), lost)
        return _Plan(heres, here + n, pace, limit_s, here + front, front_s)

    def _worth(
        self,
        costs: npt.NDArray[np.float64],
        overhead_s: float,
        here: int,
        block_tokens: int,
        wish: Wish,
        most_ahead: int,
    ) -> tuple[int, int]:
        """Of the blocks behind `here`: from which one on, and up to which one, they are worth fetching. Those that the
        engine has by itself must come, too, for the others to follow them."""
        before = min(len(costs), max(0, wish.have_tokens // block_tokens - here))
        parts = _parts(costs[before:], overhead_s + float(costs[:before].sum()))
        with self._lock:
            choice = choose(
                here + before, parts, wish.n_tokens, block_tokens, self._prefill.estimate,
                load_s_per_block=wish.load_s_per_block, overlap=most_ahead > 0 and not before, most_ahead=most_ahead,
            )  # fmt: skip
        front = choice.split_at or 0
        return front, before + front + choice.fetch_blocks if choice.fetch_blocks else 0

    def _lost(self, here: int, end: int, block_tokens: int, wish: Wish) -> npt.NDArray[np.float64]:
        """Seconds that computing would take for what a fetch up to `end` still lacks, by how much has arrived."""
        arrived = np.maximum(np.arange(here, end + 1) * block_tokens, wish.have_tokens)
        with self._lock:
            rest = self._prefill.estimate(np.maximum(0, wish.n_tokens - arrived), arrived)
        lost: npt.NDArray[np.float64] = rest - rest[-1]
        return lost

    def _recompute(self) -> None:
        self._counters.add("fetch.end.recomputed")
        with self._lock:
            # It was learnt under circumstances that may have passed, and is not learnt anew without a fetch.
            self._overhead_s *= _FORGET

    # ---- the fetch

    def _fetch(
        self,
        pool: Pool,
        wanted: Wanted,
        plan: _Plan,
        intent: Intent | None,
        give_up: Callable[[], bool],
        front: Front | None,
    ) -> Brought:
        started = time.perf_counter()
        with contextlib.ExitStack() as running:
            fetches = [
                running.enter_context(
                    pool.fetch(handle, keys[: plan.end], plan.limit_s, intent=intent, start=plan.front)
                )
                for handle, keys in wanted
            ]
            if plan.front and front is not None:
                self._counters.add("fetch.split")
                if not self._have_front(front, plan):
                    return NOTHING
            # What the fetch did meanwhile it did whether computing took as long as expected or longer.
            late_s = max(0.0, time.perf_counter() - started - plan.front_s) if plan.front else 0.0
            end = _wait(fetches, plan, give_up, started + late_s)
        took_s = time.perf_counter() - started
        moved = sum(_moved(each, max(here, plan.front)) for each, here in zip(fetches, plan.heres, strict=True))
        brought = Brought(_arrived(fetches), moved)
        self._counters.add(f"fetch.end.{end}")
        self._counters.add("fetch.us", int(1e6 * took_s))
        self._counters.add("fetch.blocks", brought.moved)
        if end == "done" and brought.moved and not plan.front:
            self._learn(took_s - plan.pace.total_s)
        return brought

    def _have_front(self, front: Front, plan: _Plan) -> bool:
        there = False
        try:
            there = front(plan.front, time.monotonic() + plan.limit_s)
        finally:
            if not there:
                self._counters.add("fetch.end.no_front")
        return there

    def _learn(self, late_s: float) -> None:
        with self._lock:
            known = self._overhead_s
            sample = min(_MOST_OVERHEAD_S, max(0.0, known + late_s))
            self._overhead_s = known + _LEARN * (sample - known)


def _wait(fetches: list[Fetch], plan: _Plan, give_up: Callable[[], bool], started: float) -> str:
    """Wait until nothing more comes, or is not worth waiting for; says why."""
    while running := [each for each in fetches if not each.done]:
        if give_up():
            return "called_off"
        # What one rank lacks is of no use to the others.
        ended = [each for each in fetches if each.done]
        if ended and min(each.arrived for each in running) >= min(each.arrived for each in ended):
            break
        if not plan.pace.holds(_arrived(fetches) - plan.first, time.perf_counter() - started):
            return "too_slow"
        running[0].wait(_LOOK_S)
        for each in running[1:]:
            each.poll()
    worst = min((each for each in fetches if each.done), key=lambda each: each.arrived)
    return worst.why.name.lower()


def _moved(fetch: Fetch, here: int) -> int:
    """Blocks that a fetch brought; one that was given up does not say it itself."""
    return max(0, fetch.arrived - here) if fetch.why is FetchEnd.CANCELLED else fetch.moved


def _arrived(fetches: list[Fetch]) -> int:
    return min(each.arrived for each in fetches)


def _seconds(below: Below, here: int, end: int) -> npt.NDArray[np.float64]:
    """What each of the blocks `here` to `end - 1` costs one rank: nothing where it is in the pool, a run's time spread
    over its blocks where it is not."""
    costs, at, before_s = np.zeros(end - here), below.here - here, 0.0
    for run in below.runs:
        costs[at : at + run.n_blocks] = max(0.0, run.seconds - before_s) / run.n_blocks
        at, before_s = at + run.n_blocks, run.seconds
    return costs


def _parts(costs: npt.NDArray[np.float64], first_s: float) -> list[Part]:
    """Runs of blocks of one cost each; `first_s` comes before all of them."""
    bounds = [0, *(np.flatnonzero(np.diff(costs)) + 1).tolist(), len(costs)]
    runs = [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]
    return [
        Part(number, stop - start, 0.0 if number else first_s, float(costs[start]))
        for number, (start, stop) in enumerate(runs)
    ]
