"""What every rank holds of a block: the spaces of an engine's workers, and the pool's handles of them."""

from __future__ import annotations

from collections.abc import Mapping

from penstock import Miss, Pool, Space, SpaceHandle
from penstock.connectors.vllm.messages import RankHello, RankId, Variant
from penstock.connectors.vllm.spaces import varied
from penstock.connectors.vllm.tie import Tie

__all__ = ["Handles", "Ranks"]

Handles = tuple[Pool, dict[RankId, SpaceHandle]]

_MAX_VARIANTS = 64


class Ranks:
    """The ranks of one engine. For one thread."""

    def __init__(self, tie: Tie) -> None:
        self._tie = tie
        self._base: dict[RankId, Space] = {}
        self._pools: dict[RankId, bytes] = {}
        self._variants: dict[Variant, dict[RankId, Space]] = {}

    def meet(self, hellos: Mapping[RankId, RankHello]) -> None:
        """The workers' caches are there. Attaches to the pool, if there is one."""
        self._base = {rank: Space.decode(hello.space) for rank, hello in sorted(hellos.items())}
        self._pools = {rank: hello.pool for rank, hello in hellos.items()}
        self._tie.start(*self._base.values())

    def attached(self, pools: Mapping[RankId, bytes]) -> None:
        """Which segment these ranks are attached to now."""
        self._pools.update(pools)

    def __len__(self) -> int:
        return len(self._base)

    @property
    def largest_block(self) -> int:
        """Bytes of a block of the rank that holds most of it."""
        return max((space.block_bytes for space in self._base.values()), default=0)

    def is_new(self, variant: Variant) -> bool:
        """Whether nobody has asked for this variant's spaces yet."""
        return variant not in self._variants

    def spaces(self, variant: Variant) -> dict[RankId, Space]:
        """Every rank's space for requests of this variant."""
        spaces = self._variants.get(variant)
        if spaces is None:
            if len(self._variants) >= _MAX_VARIANTS:
                self._variants.clear()
            spaces = self._variants[variant] = {rank: varied(space, variant) for rank, space in self._base.items()}
        return spaces

    def handles(self, variant: Variant) -> Handles | Miss:
        """The pool with a handle for every rank, or why there is none: not all ranks see the same pool (NO_KEEPER), or
        the keeper has not registered the spaces yet (SPACE)."""
        pool, uuid = self._tie.pool, self._tie.uuid
        if pool is None or not self._base or any(self._pools.get(rank) != uuid for rank in self._base):
            return Miss.NO_KEEPER
        handles: dict[RankId, SpaceHandle] = {}
        for rank, space in self.spaces(variant).items():
            handle = self._tie.handle(space)
            if handle is None:
                return Miss.SPACE
            handles[rank] = handle
        return pool, handles
