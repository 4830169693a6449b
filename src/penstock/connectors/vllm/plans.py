"""Which blocks of a request are stored next, and what came of those that are being stored. Scheduler's half.

Covers the order of one request's blocks and blocks that several requests have at once. Does not cover when a request
may store at all (`scheduler.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock import Drop, Miss
from penstock.connectors.vllm.events import PoolEvents
from penstock.connectors.vllm.messages import RankId, SaveOrder, Variant
from penstock.connectors.vllm.ranks import Handles, Ranks
from penstock.connectors.vllm.requests import Tracked
from penstock.identity import unpack_keys

__all__ = ["SavePlans"]

_log = logging.getLogger("vllm.penstock")


@dataclass(frozen=True, slots=True)
class _Saving:
    """A save in flight."""

    tracked: Tracked
    variant: Variant
    first_block: int
    keys: list[bytes]
    """Of the first rank."""
    of_rank: dict[RankId, npt.NDArray[np.uint64]]


class SavePlans:
    """The saves of one engine. For one thread."""

    def __init__(self, ranks: Ranks, numbers: Iterator[int], block_tokens: int, events: PoolEvents | None) -> None:
        self._ranks, self._numbers, self._block, self._events = ranks, numbers, block_tokens, events
        self._saves: dict[int, _Saving] = {}
        self._in_flight: set[bytes] = set()
        """Keys, of the first rank, that are being stored."""

    def __len__(self) -> int:
        return len(self._saves)

    def plan(self, tracked: Tracked, pages_of: Callable[[str], list[int]]) -> SaveOrder | None:
        """An order for the settled blocks that the pool lacks and nobody is storing, if there are any."""
        n_full = tracked.n_settled // self._block
        handles = self._ranks.handles(tracked.variant)
        if not tracked.may_save or n_full <= tracked.n_planned or isinstance(handles, Miss):
            return None
        tracked.n_planned = n_full
        tracked.extend(self._ranks.spaces(tracked.variant), n_full * self._block)
        if tracked.n_saved is None:
            tracked.n_saved = _present(tracked, handles, n_full)
        first = tracked.n_saved
        keys: list[bytes] = [*unpack_keys(next(iter(tracked.chains.values())).array[first:n_full])]
        while keys and keys[0] in self._in_flight:
            del keys[0]
            first += 1
        tracked.n_saved = n_full
        if not keys:
            return None
        return self._order(tracked, first, keys, pages_of(tracked.request.request_id)[first:n_full])

    def _order(self, tracked: Tracked, first: int, keys: list[bytes], pages: list[int]) -> SaveOrder:
        number = next(self._numbers)
        parts = {rank: chain[first : first + len(keys)] for rank, chain in tracked.chains.items()}
        self._saves[number] = _Saving(tracked, tracked.variant, first, keys, {r: p.array for r, p in parts.items()})
        self._in_flight.update(keys)
        tracked.saving.add(number)
        return SaveOrder(
            number=number,
            request=tracked.request.request_id,
            variant=tracked.variant,
            first_block=first,
            keys={rank: part.parent + part.array.tobytes() for rank, part in parts.items()},
            pages=pages,
            intent=tracked.intent,
        )

    def dropped(self, number: int, drop: Drop) -> None:
        """A rank did not store every block of a save."""
        found = self._saves.get(number)
        if found is not None:
            # The next block that fills looks at what the pool has and tries again from there.
            found.tracked.n_saved = None
            _log.debug("request %s: blocks were not stored (%s)", found.tracked.request.request_id, drop.name.lower())

    def ended(self, number: int, epoch: int) -> Variant:
        """Every rank has ended a save: its variant. Its blocks are published unless they are of an epoch before."""
        saving = self._saves.pop(number)
        self._in_flight.difference_update(saving.keys)
        saving.tracked.saving.discard(number)
        if self._events is not None and saving.variant.epoch == epoch:
            handles = self._ranks.handles(saving.variant)
            if not isinstance(handles, Miss):
                parts = [(handle, saving.of_rank[rank]) for rank, handle in handles[1].items()]
                self._events.stored(saving.tracked.request, saving.first_block, len(saving.keys), parts)
        return saving.variant

    def reset(self) -> None:
        """What was published is void."""
        if self._events is not None:
            self._events.reset()

    def take_events(self) -> list[Any]:
        """The engine's KV events of what it stored and what left, since the last call."""
        return [] if self._events is None else self._events.take()


def _present(tracked: Tracked, handles: Handles, n_full: int) -> int:
    """Leading blocks that every rank's space has in the pool."""
    pool, of_rank = handles
    for rank, handle in of_rank.items():
        with pool.match(handle, tracked.chains[rank][:n_full]) as lease:
            n_full = min(n_full, len(lease))
    return n_full
