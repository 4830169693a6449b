"""Asking a keeper, or its mover, one thing."""

from __future__ import annotations

from typing import Any

from penstock.errors import KeeperError
from penstock.pool.below import TierLine
from penstock.pool.segment import check_name
from penstock.pool.wire import Connection, Json, Query

__all__ = ["ask", "ask_mover"]


def ask(name: str, what: str, argument: int = -1, *, timeout_s: float = 30.0) -> dict[str, Any]:
    """The keeper's answer to `what`. Raises NoKeeper or KeeperError."""
    connection = Connection(check_name(name), timeout_s=timeout_s)
    try:
        reply, _ = connection.ask(Query(what, argument))
    finally:
        connection.close()
    if not isinstance(reply, Json):
        raise KeeperError(f"unexpected answer {type(reply).__name__} to {what}")
    return reply.body


def ask_mover(name: str, *, timeout_s: float = 30.0) -> dict[str, Any]:
    """What the mover of a pool says of its tiers. Raises NoKeeper, or KeeperError where there are none."""
    ask(name, "stat")  # says what is wrong where not even a keeper is there
    line = TierLine(check_name(name))
    try:
        return line.report(timeout_s)
    finally:
        line.close()
