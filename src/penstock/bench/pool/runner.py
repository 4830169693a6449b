"""Run groups, each in a process of its own, so that one that fails, hangs or crashes costs its own results only."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from penstock.bench.pool.base import Group, Scale
from penstock.bench.report import Result, failed

__all__ = ["run_group", "run_groups"]

# What a failed process said last is shown up to this length.
_SAID = 300


def run_groups(
    groups: dict[str, Group], scale: Scale, began: Callable[[str], None], package: str = "penstock.bench.pool"
) -> list[Result]:
    """All results of these groups of a package of benches, in order; `began` is told the name of each as it starts."""
    results = []
    for name, group in groups.items():
        began(name)
        results += run_group(name, group, scale, package)
    return results


def run_group(name: str, group: Group, scale: Scale, package: str = "penstock.bench.pool") -> list[Result]:
    """One result for each of the group's goals; those that were not measured say why. Raises nothing for a failure."""
    # A session of its own: what the group started can be ended with it.
    process = subprocess.Popen(
        [sys.executable, "-m", package, name, scale.name],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=group.timeout_s)
        why = _why(process.returncode, err)
    except subprocess.TimeoutExpired:
        _end(process)
        out, err = process.communicate()
        why = f"not done after {group.timeout_s:.0f} s"
    except BaseException:
        _end(process)
        raise
    found = {row.name: row for row in (Result(**json.loads(line)) for line in out.splitlines())}
    return [found.get(goal.name) or failed(goal, why) for goal in group.goals]


def _why(status: int, said: str) -> str:
    if status == 0:
        return "not measured"
    last = said.strip().splitlines()[-1:] or [""]
    return f"exit status {status}: {last[0][-_SAID:]}"


def _end(process: subprocess.Popen[str]) -> None:
    """End the group's session: its process, and the keepers and clients that it started."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
