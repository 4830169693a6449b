"""`penstock fsck`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Any

import typer

from penstock.cli.ask import ask
from penstock.errors import NoKeeper
from penstock.pool import segment as segments

__all__ = ["fsck"]


def fsck(name: str, path: Path | None, quick: bool, json: bool) -> None:
    """Let the keeper check its pool; without a keeper, check the segment as it lies."""
    try:
        if path is not None:
            raise NoKeeper("a path was given")
        report = ask(name, "fsck", 0 if quick else 1, timeout_s=600.0)
    except NoKeeper:
        report = _offline(path or segments.default_path(name), quick)
    if json:
        print(json_module.dumps(report, indent=2))
    else:
        for problem in report["problems"]:
            print(problem)
        verified = f", {report['checksums_verified']} checksums verified" if not quick else ""
        print(f"{report['blocks']} blocks{verified}, {len(report['problems'])} problems")
    raise typer.Exit(1 if report["problems"] else 0)


def _offline(path: Path, quick: bool) -> dict[str, Any]:
    """Take the keeper's lock, put the segment in order as a starting keeper would, and check it."""
    from penstock.errors import KeeperRunning
    from penstock.pool.locks import KEEPER_BYTE, ByteLock
    from penstock.runtime.keeper import Keeper
    from penstock.runtime.report import fsck_report

    segment = segments.open_existing(path)
    locks = ByteLock(segments.lock_path(path))
    try:
        if not locks.try_acquire(KEEPER_BYTE):
            raise KeeperRunning(f"a keeper serves {path}; ask it by --name")
        return fsck_report(Keeper(segment, locks), bytes_too=not quick)
    finally:
        locks.close()
        segment.close()
