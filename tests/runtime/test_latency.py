"""Short time slices are asked for, change nothing else, and never fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.runtime import latency

SCRIPT = """
import os, re, sys
from penstock.runtime.latency import SLICE_NS, take_short_slices
before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
done = take_short_slices()
assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == before
slices = open("/proc/self/sched").read() if os.path.exists("/proc/self/sched") else ""
found = re.search(r"se\\.slice\\s*:\\s*(\\d+)", slices)
release = tuple(int(part) for part in re.findall(r"\\d+", os.uname().release)[:2])
if done and found and release >= (6, 12):
    assert int(found[1]) == SLICE_NS, found[0]
"""


def test_in_a_process_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_machine_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.platform, "machine", lambda: "riscv64")
    assert latency.take_short_slices() is False
