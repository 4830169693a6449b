"""Exact places for a keeper to die: before or after the n-th call of one of its steps.

The keeper's code knows nothing of this; the process that is about to serve wraps the step and sends itself SIGKILL.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from importlib import import_module
from typing import Any

AUTHORITY = "penstock.pool.authority:Authority"
KEEPER = "penstock.runtime.keeper:Keeper"

# (owner, step, highest n that is worth trying)
POINTS: tuple[tuple[str, str, int], ...] = (
    (AUTHORITY, "apply", 20),
    (AUTHORITY, "touched", 20),
    (AUTHORITY, "grant", 10),
    (AUTHORITY, "evict", 10),
    (AUTHORITY, "save_stamp", 20),
    (AUTHORITY, "assign_slab", 2),
    (AUTHORITY, "unassign_slab", 1),
    (AUTHORITY, "open_lane", 1),
    (AUTHORITY, "close_lane", 1),
    (AUTHORITY, "_write_space", 1),
    (AUTHORITY, "_keep_counters", 1),
    (AUTHORITY, "_rebuild_slab", 3),
    (AUTHORITY, "free_unpublished_grants", 1),
    (AUTHORITY, "recover", 1),
    (KEEPER, "_drain", 4),
    (KEEPER, "reclaim_dead", 2),
    (KEEPER, "announce_sleep", 10),
    (KEEPER, "announce_awake", 10),
    (KEEPER, "confirm_lane", 2),
    ("penstock.pool.authority", "poke", 60),
    ("penstock.pool.authority", "poke_and_fence", 2),
    ("penstock.pool.authority", "clear", 2),
    ("penstock.pool.authority", "push_free_slab", 2),
    ("penstock.pool.authority", "settle_records", 1),
    ("penstock.pool.authority", "repair_directory", 1),
    ("penstock.pool.authority", "free_granted", 2),
    ("penstock.runtime.keeper", "survey", 30),
    ("penstock.runtime.guests:Guests", "_hello", 2),
    ("penstock.runtime.guests:Guests", "_space", 3),
    ("penstock.runtime.guests:Guests", "_leave", 2),
    ("penstock.runtime.guests:Guests", "ring", 20),
)


def die_at(owner: str, step: str, after: bool, nth: int) -> None:
    """Make the n-th call of that step this process's last."""
    module, _, name = owner.partition(":")
    holder: Any = import_module(module)
    if name:
        holder = getattr(holder, name)
    original: Callable[..., Any] = getattr(holder, step)
    calls = itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fatal = next(calls) == nth
        if fatal and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, step, wrapped)
