"""Waking the keeper at once: a short time slice, so that it preempts the engine thread that rang.

Since Linux 6.12 a thread of the ordinary class may ask for shorter slices (`sched_attr.sched_runtime`); one that wakes
with a shorter slice than the running one preempts it (EEVDF, PREEMPT_SHORT). Without that, a keeper that is woken on
the core of a busy engine waits for the next tick, 4 ms. It gets no more of the processor than before, only sooner.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import struct

__all__ = ["take_short_slices"]

log = logging.getLogger("penstock.keeper")

# The system call has no wrapper in Python 3.11 or glibc.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
SLICE_NS = 100_000  # the least that the kernel grants


def take_short_slices() -> bool:
    """Ask for slices of 0.1 ms for the calling thread. False, with no harm, where the system does not do that."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, SLICE_NS, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(ctypes.c_long(number), 0, attributes, 0) != 0:
        log.debug("no short time slices: %s", os.strerror(ctypes.get_errno()))
        return False
    return True
