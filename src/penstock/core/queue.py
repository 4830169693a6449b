"""Which transfer runs next: one queue in front of all tiers.

Covers urgency, fairness between tenants, deadlines within a tenant, bandwidth caps and how many transfers run at once.
Does not run anything and reads no clock: the mover takes jobs and says when they are done. Not thread-safe.

    put --> waiting --take--> running --done--> gone
               |
               +-----cancel---> gone

Between urgencies the order is strict, but for a share of the bytes that write-backs are due (`_SHARE`). Between tenants
of one urgency it is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996, section 2): the tenant with the smallest
start tag goes next, and a tag grows by the bytes of what was started. A start tag does not depend on what is started
next, so each tenant may put its own jobs into any order; here it is the earliest deadline first. Whoever comes new
starts at the lane's virtual time, which grows as in WF2Q+ (Bennett, Zhang, INFOCOM 1996, section 3): by the bytes
started over the tenants that wait, so that an endless row of new tenants cannot starve an old one.

A cap is a bucket that may be overdrawn by one job: a job starts as soon as the bytes started before it are paid for.
So a large job cannot be starved by small ones, and in any interval of t seconds at most rate x (t + 0.1 s) bytes and
one job more are started.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from penstock.errors import ConfigError
from penstock.policies.facts import ConsistencyError
from penstock.types import Urgency

__all__ = ["Job", "TransferQueue"]

_SHARE = 16
"""While more urgent work waits, write-backs get one byte in so many: enough that the blocks they clean do not pile up
for ever, and within the noise of what a fetch takes."""

_SAVED_S = 0.1
"""How long an unused cap is saved up. Short, for a cap protects others on the same device or link."""


@dataclass(frozen=True, slots=True)
class Job:
    """One transfer between the pool and one tier."""

    id: int
    """Unique among the jobs that wait or run."""
    tier: int
    urgency: Urgency
    tenant: int
    n_bytes: int
    deadline: float | None
    """A time of the caller's clock, for the order only: a job that is late still runs, cancel it if it should not."""


@dataclass(slots=True)
class _Cap:
    bytes_per_s: float
    paid_at: float = -inf
    """When everything that was started is paid for."""

    def charge(self, n_bytes: float, now: float) -> None:
        self.paid_at = max(self.paid_at, now - _SAVED_S) + n_bytes / self.bytes_per_s

    def give_back(self, n_bytes: float) -> None:
        self.paid_at -= n_bytes / self.bytes_per_s


@dataclass(slots=True)
class _Flow:
    """One tenant's waiting jobs of one urgency on one tier, the next one last."""

    tag: float
    """Where its next job starts, in bytes of the lane's virtual time."""
    jobs: list[tuple[float, int, Job]] = field(default_factory=list)
    """(-deadline, -number, job), ascending; numbers are unique, so jobs are never compared."""


@dataclass(slots=True)
class _Lane:
    """What waits on one tier in one urgency."""

    flows: dict[int, _Flow] = field(default_factory=dict)
    time: float = 0.0
    """Virtual time: how many bytes each tenant that always waited has had."""
    waiting: int = 0
    waiting_bytes: int = 0

    def flow(self, tenant: int) -> _Flow:
        """The tenant's, which is not behind anybody if nothing of it waits."""
        if tenant not in self.flows:
            for idle in [other for other, flow in self.flows.items() if not flow.jobs and flow.tag <= self.time]:
                del self.flows[idle]
        flow = self.flows.setdefault(tenant, _Flow(self.time))
        if not flow.jobs:
            flow.tag = max(flow.tag, self.time)
        return flow

    def charge(self, tenant: int, n_bytes: int) -> _Flow:
        """A job of the tenant starts, and is still counted as waiting."""
        tags = [flow.tag for flow in self.flows.values() if flow.jobs]
        self.time = max(self.time + n_bytes / len(tags), min(tags))
        self.flows[tenant].tag += n_bytes
        return self.flows[tenant]

    def heads(self) -> Iterator[tuple[float, int, Job]]:
        """(start tag, number, job) of each tenant's next job."""
        for flow in self.flows.values():
            if flow.jobs:
                _, number, job = flow.jobs[-1]
                yield flow.tag, -number, job


@dataclass(slots=True)
class _Running:
    job: Job
    flow: _Flow


class TransferQueue:
    """`places[t]` transfers may run at once on tier t; where there are several, one is kept for fetches.

    `caps` and `tenant_caps` are bytes a second by tier and by tenant (a tenant's cap holds over all tiers together);
    what is not named is not capped. Times are seconds of any one clock. Raises ConfigError for a size, tier or cap that
    cannot be.
    """

    def __init__(
        self,
        n_tiers: int,
        places: Sequence[int],
        *,
        caps: Mapping[int, float] = {},
        tenant_caps: Mapping[int, float] = {},
    ) -> None:
        if len(places) != n_tiers or any(place < 1 for place in places):
            raise ConfigError(f"places {list(places)} for {n_tiers} tiers; give each tier a number of at least 1.")
        if any(not 0 <= tier < n_tiers for tier in caps):
            raise ConfigError(f"caps for tiers {sorted(caps)}, but there are {n_tiers}.")
        if any(not 0 < rate < inf for rate in (*caps.values(), *tenant_caps.values())):
            raise ConfigError("a cap is a number of bytes a second above 0; leave out what is not to be capped.")
        self._places = tuple(places)
        self._caps = {tier: _Cap(rate) for tier, rate in caps.items()}
        self._tenant_caps = {tenant: _Cap(rate) for tenant, rate in tenant_caps.items()}
        self._lanes = [{urgency: _Lane() for urgency in Urgency} for _ in places]
        self._running: dict[int, _Running] = {}
        self._busy = [dict.fromkeys(Urgency, 0) for _ in places]
        self._due = [0.0] * n_tiers
        """Per tier: bytes that write-backs are due because more urgent jobs were started before them."""
        self._waiting: dict[int, tuple[Job, int]] = {}
        self._number = 0

    def put(self, job: Job) -> None:
        """Let it wait. Raises ConfigError for a tier or a number of bytes that cannot be, or an id that is in use."""
        if job.id in self._waiting or job.id in self._running:
            raise ConfigError(f"transfer {job.id} is in the queue already; use each id once.")
        if not 0 <= job.tier < len(self._places) or job.n_bytes < 0:
            raise ConfigError(f"transfer {job.id} of {job.n_bytes} bytes on tier {job.tier} cannot be.")
        self._number += 1
        lane = self._lanes[job.tier][job.urgency]
        flow = lane.flow(job.tenant)
        insort(flow.jobs, _entry(job, self._number))
        lane.waiting += 1
        lane.waiting_bytes += job.n_bytes
        self._waiting[job.id] = job, self._number

    def take(self, tier: int, now: float) -> Job | None:
        """The job that runs next on this tier, which counts as running from now on; None if none may start now."""
        if self._paid_at(self._caps.get(tier)) > now:
            return None
        best = self._next(tier, now)
        if best is not None:
            self._start(best, now)
        return best

    def done(self, job_id: int, now: float, moved_bytes: int | None = None) -> None:
        """A running job ended, whatever became of it; what it did not move does not count against its tenant.

        Raises KeyError if it is not running.
        """
        running = self._running.pop(job_id)
        job = running.job
        self._busy[job.tier][job.urgency] -= 1
        spared = 0 if moved_bytes is None else job.n_bytes - moved_bytes
        if spared:
            running.flow.tag -= spared
            for cap in self._caps_of(job):
                cap.give_back(spared)

    def cancel(self, job_id: int) -> bool:
        """Whether the job was still waiting; it is then gone. A job that runs goes on until `done`."""
        if job_id not in self._waiting:
            return False
        self._take_out(job_id)
        return True

    def next_time(self, tier: int, now: float) -> float | None:
        """When `take` has a job to give, if nothing changes until then: `now`, or when a cap allows it.

        None if nothing waits that has a place; `put` or `done` will change that.
        """
        heads = [
            job
            for urgency in Urgency
            if self._has_place(tier, urgency)
            for _, _, job in self._lanes[tier][urgency].heads()
        ]
        times = (self._paid_at(self._tenant_caps.get(job.tenant)) for job in heads)
        earliest = min(times, default=None)
        return None if earliest is None else max(now, earliest, self._paid_at(self._caps.get(tier)))

    def waiting_bytes(self, tier: int, urgency: Urgency | None = None) -> int:
        """Bytes of the jobs that have not started; of all urgencies where none is given."""
        lanes = self._lanes[tier]
        return sum(lanes[each].waiting_bytes for each in Urgency if urgency is None or each == urgency)

    def ready_bytes(self, tier: int, urgency: Urgency) -> int:
        """Of those, what keeps the tier busy: of a tenant that has a cap, one job."""
        lane = self._lanes[tier][urgency]
        flows = [lane.flows[tenant] for tenant in self._tenant_caps if tenant in lane.flows]
        return lane.waiting_bytes - sum(job.n_bytes for flow in flows for _, _, job in flow.jobs[:-1])

    def running(self, tier: int) -> int:
        """How many transfers run on this tier."""
        return sum(self._busy[tier].values())

    def assert_consistent(self) -> None:
        """Raise ConsistencyError if the sums do not agree with the jobs, or a limit is broken. Reads only."""
        for tier, lanes in enumerate(self._lanes):
            _expect(self.running(tier) <= self._places[tier], f"tier {tier}: too many run at once")
            for urgency, lane in lanes.items():
                self._assert_lane(tier, urgency, lane)
        waiting = sum(lane.waiting for lanes in self._lanes for lane in lanes.values())
        _expect(waiting == len(self._waiting), "a waiting job is in no lane")

    def _assert_lane(self, tier: int, urgency: Urgency, lane: _Lane) -> None:
        what = f"tier {tier}, {urgency.name}"
        entries = [entry for flow in lane.flows.values() for entry in flow.jobs]
        for _, number, job in entries:
            _expect((job.tier, job.urgency) == (tier, urgency), f"{what}: job {job.id} belongs elsewhere")
            _expect(self._waiting.get(job.id) == (job, -number), f"{what}: job {job.id} does not wait")
        _expect(all(flow.jobs == sorted(flow.jobs) for flow in lane.flows.values()), f"{what}: out of order")
        _expect(lane.waiting == len(entries), f"{what}: the waiting jobs are miscounted")
        _expect(lane.waiting_bytes == sum(job.n_bytes for _, _, job in entries), f"{what}: bytes are miscounted")
        _expect(bool(entries) or not lane.flows, f"{what}: an empty lane remembers tenants")
        busy = sum((running.job.tier, running.job.urgency) == (tier, urgency) for running in self._running.values())
        _expect(busy == self._busy[tier][urgency], f"{what}: the running jobs are miscounted")

    def _next(self, tier: int, now: float) -> Job | None:
        """The tier's own cap aside."""
        runnable = [self._runnable(tier, urgency, now) for urgency in Urgency]
        behind = runnable[Urgency.WRITE_BACK]
        urgent = next((job for job in runnable[: Urgency.WRITE_BACK] if job is not None), None)
        if urgent is None or (behind is not None and self._due[tier] >= behind.n_bytes):
            return behind
        return urgent

    def _runnable(self, tier: int, urgency: Urgency, now: float) -> Job | None:
        if not self._has_place(tier, urgency):
            return None
        heads = (
            head
            for head in self._lanes[tier][urgency].heads()
            if self._paid_at(self._tenant_caps.get(head[2].tenant)) <= now
        )
        first = min(heads, key=lambda head: head[:2], default=None)
        return None if first is None else first[2]

    def _has_place(self, tier: int, urgency: Urgency) -> bool:
        places, busy = self._places[tier], self._busy[tier]
        if self.running(tier) >= places:
            return False
        if urgency == Urgency.FETCH or places == 1:
            return True
        return busy[Urgency.PREFETCH] + busy[Urgency.WRITE_BACK] < places - 1

    def _start(self, job: Job, now: float) -> None:
        flow = self._lanes[job.tier][job.urgency].charge(job.tenant, job.n_bytes)
        self._account(job)
        self._take_out(job.id)
        self._running[job.id] = _Running(job, flow)
        self._busy[job.tier][job.urgency] += 1
        for cap in self._caps_of(job):
            cap.charge(job.n_bytes, now)

    def _account(self, job: Job) -> None:
        """Write-backs are due their share of what is started while they wait; about one job's worth can be saved up."""
        tier, behind = job.tier, self._lanes[job.tier][Urgency.WRITE_BACK]
        if job.urgency == Urgency.WRITE_BACK:
            self._due[tier] = max(0.0, self._due[tier] - job.n_bytes)
        elif behind.waiting:
            share = job.n_bytes / (_SHARE - 1)
            largest = max(head.n_bytes for _, _, head in behind.heads())
            self._due[tier] = min(self._due[tier] + share, largest + share)

    def _take_out(self, job_id: int) -> None:
        job, number = self._waiting.pop(job_id)
        lane = self._lanes[job.tier][job.urgency]
        jobs = lane.flows[job.tenant].jobs
        del jobs[bisect_left(jobs, _entry(job, number))]
        lane.waiting -= 1
        lane.waiting_bytes -= job.n_bytes
        if not lane.waiting:
            # Nobody waits: whoever comes next owes nobody anything.
            lane.flows.clear()
            lane.time = 0.0

    def _caps_of(self, job: Job) -> list[_Cap]:
        caps = (self._caps.get(job.tier), self._tenant_caps.get(job.tenant))
        return [cap for cap in caps if cap is not None]

    @staticmethod
    def _paid_at(cap: _Cap | None) -> float:
        return -inf if cap is None else cap.paid_at


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ConsistencyError(what)


def _entry(job: Job, number: int) -> tuple[float, int, Job]:
    return -(inf if job.deadline is None else job.deadline), -number, job
