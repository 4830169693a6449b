"""Every bench of the pool runs to its end at a tiny size. No speed is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.bench.pool import runner
from penstock.bench.pool.base import FULL, GROUPS, TINY, Group, goals, select
from penstock.errors import ConfigError

# The names and targets that were asked for: these do not change because a machine misses them.
TARGETS = {
    "match64_us_p50": 4, "match64_us_p99": 20, "match1_us_p50": 2, "read_2mib_of_memcpy": 0.9,
    "read_64kib_of_memcpy": 0.8, "verified_read_64kib_of_memcpy": 0.72, "write_2mib_of_memcpy": 0.75,
    "write_64kib_of_memcpy": 0.7, "commits_per_s": 1_000_000, "commits_per_s_full": 300_000,
    "commit_to_visible_us_p99": 500, "hash_keys_per_s": 3_000_000, "two_readers_scaling": 0.9,
    "brain_us_per_event": 1, "keeper_idle_cpu_pct": 1, "import_s": 0.6,
}  # fmt: skip


def leftovers() -> set[str]:
    """Segments of this bench; that of the tiers may run beside it."""
    names = {path.name for path in Path("/dev/shm").glob(f"penstock-{os.geteuid()}-bench*")}
    return {name for name in names if "bench-tiers" not in name}


def test_names_and_targets() -> None:
    assert {goal.name: goal.target for goal in goals() if goal.target is not None} == TARGETS
    assert FULL.blocks >= 1_000_000


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_runs(name: str) -> None:
    before = leftovers()
    results = runner.run_group(name, GROUPS[name], TINY)
    assert [row.name for row in results] == [goal.name for goal in GROUPS[name].goals]
    for row in results:
        assert row.value is not None, row.note
        assert row.low is not None
        assert row.high is not None
        assert 0 < row.low <= row.value <= row.high or row.unit == "%"
    assert leftovers() <= before


def test_a_group_that_fails_or_hangs_costs_its_own_results_only() -> None:
    broken = replace(TINY, name="no-such-scale")
    group = GROUPS["hashing"]
    began: list[str] = []
    results = runner.run_groups({"hashing": group, "brain": GROUPS["brain"]}, broken, began.append)
    assert began == ["hashing", "brain"]
    assert [row.met for row in results] == [False, False]
    assert "no-such-scale" in results[0].note
    (late,) = runner.run_group("brain", replace(GROUPS["brain"], timeout_s=0.01), TINY)
    assert late.value is None
    assert "not done" in late.note


def test_selection() -> None:
    assert select(None) == GROUPS
    assert list(select("match1_us_p50")) == ["matching"]
    assert list(select("copy-2mib")) == ["copy-2mib"]
    with pytest.raises(ConfigError, match="match1_us_p50"):
        select("nothing")


def test_a_group_knows_its_goals() -> None:
    group: Group = GROUPS["idle"]
    assert group.goal("keeper_idle_cpu_pct").target == 1


def test_the_command_writes_its_file(tmp_path: Path) -> None:
    import json

    out = tmp_path / "results" / "pool.json"
    command = [
        sys.executable, "-m", "penstock", "bench", "pool", "--json", "--only", "hash_keys_per_s", "--scale", "tiny",
        "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert set(document) == {"machine", "results"}
    assert [row["name"] for row in document["results"]] == ["hash_keys_per_s"]
    assert done.returncode == (0 if document["results"][0]["met"] else 1)
