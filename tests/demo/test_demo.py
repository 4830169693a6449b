"""`penstock demo` as a user runs it: a keeper that is killed, two engines, the shipped model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def demo_segments() -> set[str]:
    """Segments of demos on this machine; a demo that somebody killed left one."""
    return {name for name in os.listdir("/dev/shm") if "demo-" in name}


def test_demo(tmp_path: Path) -> None:
    before = demo_segments()
    out = tmp_path / "demo.json"
    command = [sys.executable, "-m", "penstock", "demo", "--conversations", "3", "--turns", "2", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "every expected hit was there" in ran.stdout
    report = json.loads(out.read_text())
    phases = {one["phase"] for one in report["requests"]}
    seen = {"first time seen", "seen by the other process", "keeper dead", "keeper restarted", "back from disk"}
    assert seen <= phases
    assert all(one["hit_tokens"] >= one["expected_tokens"] for one in report["requests"])
    assert sum(one["hit_tokens"] for one in report["requests"]) > 5000
    back = [one for one in report["requests"] if one["phase"] == "back from disk"]
    assert len({one["conversation"] for one in back}) == 3
    assert all(one["fetched_blocks"] and one["hit_tokens"] for one in back)
    assert demo_segments() <= before


def test_a_model_that_cannot_be_loaded_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = demo_segments()
    command = [sys.executable, "-m", "penstock", "demo", "--model", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 1
    assert "engine A ended" in ran.stderr
    assert demo_segments() <= before
