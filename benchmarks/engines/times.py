"""What the timed connector (`timed.py`) writes, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["FIELDS", "FOLDER_VARIABLE", "ConnectorTimes", "read_times"]

FOLDER_VARIABLE = "PENSTOCK_BENCH_TIMES"
FIELDS = ("engine_s", "threads_s", "steps", "calls")


@dataclass(frozen=True)
class ConnectorTimes:
    """Sums over the processes of a server, or differences of such sums."""

    engine_s: float
    """CPU time of the engine's own threads inside the connector."""
    threads_s: float
    """CPU time of the connector's threads."""
    steps: float
    """Steps that computed something."""

    def __sub__(self, other: ConnectorTimes) -> ConnectorTimes:
        return ConnectorTimes(
            self.engine_s - other.engine_s, self.threads_s - other.threads_s, self.steps - other.steps
        )


def read_times(folder: Path) -> ConnectorTimes:
    """What the connectors that write to `folder` counted so far."""
    rows = [np.fromfile(file, np.float64) for file in sorted(folder.glob("*.times"))]
    engine_s, threads_s, steps, _ = sum((row for row in rows if len(row) == len(FIELDS)), np.zeros(len(FIELDS)))
    return ConnectorTimes(float(engine_s), float(threads_s), float(steps))
