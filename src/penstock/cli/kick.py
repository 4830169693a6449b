"""`penstock kick`."""

from __future__ import annotations

from penstock.cli.ask import ask
from penstock.errors import KeeperError

__all__ = ["kick"]


def kick(name: str, lane: int) -> None:
    """Kill the client of a lane and wait until the keeper has taken back what it held."""
    answer = ask(name, "kick", lane)
    if not answer["exited"]:
        raise KeeperError(f"pid {answer['pid']} was killed but has not ended; its slots stay quarantined until it has")
    print(f"killed {answer['name']} (pid {answer['pid']}); {answer['reclaimed']} lane taken back")
