"""What happens in vLLM's scheduler after a load failed inside a step.

vLLM takes back the computed tokens of the request that loaded, but leaves its pages in the engine's own prefix cache
until they are recomputed, and lets requests that share them count on that happening in one step. With a long prompt
it takes several, and the request may be aborted before; whoever finds those pages meanwhile reads what was never
written. So they are taken out of the prefix cache, and everybody who shares them computes them again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from penstock.connectors.vllm.requests import Tracked

__all__ = ["roll_back"]


def roll_back(
    cache_manager: Any,
    tracked: Iterable[Tracked],
    left: Iterable[list[int]],
    invalid_pages: set[int],
    block_tokens: int,
) -> list[str]:
    """Remove pages that depend on `invalid_pages` from the prefix cache, and have every request that uses one compute
    from there on. `left` has the pages of each request that ended while the step ran. Returns the ids of the requests
    that go on."""
    affected, to_evict = [], set(invalid_pages)
    for one in tracked:
        request = one.request
        name = request.request_id
        (pages,) = cache_manager.get_block_ids(name) or ([],)
        first = _first_invalid(pages, invalid_pages)
        if first == len(pages):
            continue
        affected.append(name)
        to_evict.update(pages[first:])
        request.num_computed_tokens = min(request.num_computed_tokens, first * block_tokens)
    for pages in left:
        to_evict.update(pages[_first_invalid(pages, invalid_pages) :])
    cache_manager.evict_blocks(to_evict)
    return affected


def _first_invalid(pages: list[int], invalid_pages: set[int]) -> int:
    return next((at for at, page in enumerate(pages) if page in invalid_pages), len(pages))
