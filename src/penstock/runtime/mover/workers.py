"""Threads that run transfers, a few for each tier, in the order that `core/queue.py` gives.

A transfer that hangs in a device or a library cannot be interrupted: it keeps its thread and its place, and what it was
given to write into stays reserved until it comes back. Others go on with the remaining threads; a tier all of whose
threads hang is `stuck`, and nothing is asked of it until one comes back. One thread is kept for fetches: for all else a
tier is stuck when the others hang.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from penstock.core.queue import Job, TransferQueue
from penstock.types import Urgency

__all__ = ["Transfer", "Workers"]

log = logging.getLogger("penstock.mover")

STUCK_S = 2.0
"""A tier all of whose places have been taken for this long by the same transfers counts as stuck."""


class Transfer:
    """One transfer: queued, running, done or cancelled."""

    __slots__ = ("_finished", "_run", "job", "started_s")

    def __init__(self, job: Job, run: Callable[[], None]) -> None:
        self.job = job
        self.started_s = 0.0
        self._run = run
        self._finished = threading.Event()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is over; False when the time was over first."""
        return self._finished.wait(max(0.0, timeout_s))


class Workers:
    """`places` threads for each tier. `caps` and `tenant_caps` as in `TransferQueue`, bytes a second."""

    def __init__(
        self, places: Sequence[int], *, caps: Mapping[int, float] | None = None,
        tenant_caps: Mapping[int, float] | None = None,
    ) -> None:  # fmt: skip
        self._places = list(places)
        self._queue = TransferQueue(len(places), places, caps=caps or {}, tenant_caps=tenant_caps or {})
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: dict[int, Transfer] = {}
        self._running: dict[int, Transfer] = {}
        self._stopping = False
        self.failed = 0
        """Transfers that ended with an error nobody foresaw."""
        for tier, n in enumerate(places):
            for number in range(n):
                name = f"penstock-tier-{tier}-{number}"
                threading.Thread(target=self._work, args=(tier,), name=name, daemon=True).start()

    def submit(
        self, tier: int, urgency: Urgency, tenant: int, n_bytes: int, deadline: float | None, run: Callable[[], None]
    ) -> Transfer:
        """Queue a transfer; `run` is called on one of the tier's threads when its turn comes."""
        with self._changed:
            job = Job(next(self._numbers), tier, urgency, tenant, n_bytes, deadline)
            transfer = self._waiting[job.id] = Transfer(job, run)
            self._queue.put(job)
            self._changed.notify_all()
        return transfer

    def cancel(self, transfer: Transfer) -> bool:
        """True if it had not started: then it never runs. False if it runs or is over."""
        with self._changed:
            if not self._queue.cancel(transfer.job.id):
                return False
            self._waiting.pop(transfer.job.id, None)
        transfer._finished.set()
        return True

    def stuck(self, tier: int, urgency: Urgency = Urgency.FETCH) -> bool:
        """Whether every thread of the tier that may do such work has been in one and the same call for long."""
        before = time.monotonic() - STUCK_S
        with self._changed:
            hanging = [each.job for each in self._running.values() if each.job.tier == tier and each.started_s < before]
        places = self._places[tier]
        if len(hanging) >= places:
            return True
        others = sum(job.urgency != Urgency.FETCH for job in hanging)
        return urgency != Urgency.FETCH and others >= max(1, places - 1)

    def hanging(self, tier: int) -> int:
        """Transfers that have been running for so long that they may never end."""
        before = time.monotonic() - STUCK_S
        with self._changed:
            return sum(each.job.tier == tier and each.started_s < before for each in self._running.values())

    def overdue(self, transfer: Transfer) -> bool:
        """Whether it has been running, or cannot start because all others have been, for so long that it may hang."""
        with self._changed:
            started = transfer.started_s
        if not started:
            return self.stuck(transfer.job.tier)
        return not transfer.wait(0.0) and time.monotonic() - started > STUCK_S

    def waiting_bytes(self, tier: int, urgency: Urgency | None = None) -> int:
        """Bytes of transfers that have not started."""
        with self._changed:
            return self._queue.waiting_bytes(tier, urgency)

    def ready_bytes(self, tier: int, urgency: Urgency) -> int:
        """Of those, what is not held back by a tenant's cap."""
        with self._changed:
            return self._queue.ready_bytes(tier, urgency)

    def hurry(self, transfer: Transfer) -> None:
        """Somebody waits for it now: as urgent as a fetch, if it has not started."""
        with self._changed:
            job = transfer.job
            if job.urgency != Urgency.FETCH and self._queue.cancel(job.id):
                transfer.job = replace(job, urgency=Urgency.FETCH)
                self._queue.put(transfer.job)
                self._changed.notify_all()

    def running(self, tier: int) -> int:
        """Transfers that run now."""
        with self._changed:
            return self._queue.running(tier)

    def stop(self) -> None:
        """Start nothing more. Does not wait for what runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _work(self, tier: int) -> None:
        while (transfer := self._next(tier)) is not None:
            try:
                transfer._run()
            except Exception:
                # The boundary of a thread: the transfer's own end tells whoever waits that nothing came of it.
                self.failed += 1
                log.exception("a transfer failed")
            with self._changed:
                self._running.pop(transfer.job.id, None)
                self._queue.done(transfer.job.id, time.monotonic())
                self._changed.notify_all()
            transfer._finished.set()

    def _next(self, tier: int) -> Transfer | None:
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                if (job := self._queue.take(tier, now)) is not None:
                    transfer = self._running[job.id] = self._waiting.pop(job.id)
                    transfer.started_s = now
                    return transfer
                at = self._queue.next_time(tier, now)
                self._changed.wait(None if at is None else max(0.001, at - now))
        return None
