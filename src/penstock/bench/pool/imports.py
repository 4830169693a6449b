"""How long `import penstock` takes in a new process, and opening an embedded pool on top of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from penstock.bench.pool.base import Group, Scale
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate

__all__ = ["run"]

_IMPORT = """
import sys, time
started = time.perf_counter()
import penstock
print(time.perf_counter() - started)
assert "torch" not in sys.modules
"""
_OPEN = """
import time
started = time.perf_counter()
import penstock
pool = penstock.open("bench-import", embedded=64 << 20)
print(time.perf_counter() - started)
pool.close()
"""


def run(group: Group, scale: Scale) -> Iterator[Result]:
    for goal, program in zip(group.goals, (_IMPORT, _OPEN), strict=True):
        _seconds(program)  # the first one may read files from a disk, or compile
        took = [_seconds(program) for _ in range(scale.imports)]
        yield result(goal, estimate(took), note=f"{len(took)} new processes, files warm")


def _seconds(program: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ, check=True
    )
    return float(done.stdout.splitlines()[-1])
