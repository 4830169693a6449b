"""What the two halves of the connector tell each other: orders with every step, a report with every step's output.

Plain data that pickles. The scheduler's half numbers loads and saves; every rank answers each number exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from penstock import Drop, Intent

__all__ = ["LoadOrder", "Orders", "RankHello", "RankId", "Report", "SaveOrder", "Variant"]

RankId = tuple[int, int]
"""(pipeline rank, tensor rank)."""


@dataclass(frozen=True, slots=True)
class Variant:
    """In what a request's space differs from the engine's own."""

    adapter: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class RankHello(KVConnectorHandshakeMetadata):
    """What one worker says once its caches exist."""

    space: bytes
    """`Space.encode()` of what this rank holds of a block."""
    pool: bytes
    """UUID of the pool that it is attached to, empty for none."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Copy blocks of a lease into the engine's pages."""

    number: int
    request: str
    variant: Variant
    leases: dict[RankId, bytes]
    """For each rank its hand-over (`Lease.handover`)."""
    pages: list[int]
    """The engine's block ids, one for each block of the lease."""
    beside: bool
    """Beside other requests' steps, on a thread; else at once."""
    deadline_s: float
    """On the machine's monotonic clock."""


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Store full blocks of a request whose tokens are settled."""

    number: int
    request: str
    variant: Variant
    first_block: int
    keys: dict[RankId, bytes]
    """For each rank: the key before the first block, then one for each block."""
    pages: list[int]
    intent: Intent | None


@dataclass(slots=True)
class Orders(KVConnectorMetadata):
    """One step's orders."""

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    """Requests whose pages are no longer theirs: saves from them must end before this step runs."""
    delayed: list[str] = field(default_factory=list)
    """Requests that ended; their pages stay until their saves have, which is told as `finished_sending`."""
    variants: list[Variant] = field(default_factory=list)
    """Seen for the first time: have the keeper number their spaces, before there is something to store."""
    waiting: bool = False
    """A request waits for blocks: another engine is storing them, or they come from below the pool."""
    n_tokens: int = 0
    """Tokens that the step computes."""
    n_before: int = 0
    """Tokens before those of the request that computes most of them."""


@dataclass(slots=True)
class Report(KVConnectorWorkerMetadata):
    """What ended since the last report, of one rank or of all together."""

    loaded: dict[int, int] = field(default_factory=dict)
    """Load number -> ranks that are done with it, well or badly."""
    saved: dict[int, int] = field(default_factory=dict)
    """Save number -> ranks that are done with it."""
    dropped: dict[int, Drop] = field(default_factory=dict)
    """Saves of which a rank did not store every block, and why."""
    pools: dict[RankId, bytes] = field(default_factory=dict)
    """The pool that each rank is attached to (empty: none)."""
    bytes_per_s: float = 0.0
    """The slowest rank's copying speed as measured so far (0: not yet)."""
    failed_loads: int = 0
    computed: tuple[int, int, float] | None = None
    """A long step: tokens computed, tokens before them, seconds."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        """Both together."""
        if not isinstance(other, Report):
            raise TypeError(f"a report of this connector, not {type(other).__name__}")
        speeds = [speed for speed in (self.bytes_per_s, other.bytes_per_s) if speed > 0]
        return Report(
            loaded=_sum(self.loaded, other.loaded),
            saved=_sum(self.saved, other.saved),
            dropped=self.dropped | other.dropped,
            pools=self.pools | other.pools,
            bytes_per_s=min(speeds, default=0.0),
            failed_loads=self.failed_loads + other.failed_loads,
            computed=self.computed or other.computed,
        )


def _sum(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    total = dict(one)
    for number, ranks in other.items():
        total[number] = total.get(number, 0) + ranks
    return total
