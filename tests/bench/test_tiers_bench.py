"""Every bench of the tiers runs to its end at a tiny size, on real files and servers. No speed is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.bench.pool import runner
from penstock.bench.pool.base import TINY, goals
from penstock.bench.tiers.base import GROUPS, PACKAGE
from penstock.bench.tiers.folder import FOLDER_VARIABLE
from tests.tiers.servers import need_valkey

# The names and targets that were asked for: these do not change because a machine misses them.
TARGETS = {
    "disk_write_of_device_64kib": 0.85, "disk_read_of_device_64kib": 0.85, "disk_write_of_device_2mib": 0.85,
    "disk_read_of_device_2mib": 0.85, "recover_1m_blocks_s": 5, "valkey_of_bare_client": 0.9,
    "mooncake_of_batch_api": 0.9, "checksum_gb_s": 8, "checksum_share_of_fetch": 0.1, "ttft_over_best": 1.05,
    "restart_first_hit_s": 1,
}  # fmt: skip


def test_names_and_targets() -> None:
    assert {goal.name: goal.target for goal in goals(GROUPS)} == TARGETS


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "valkey":
        need_valkey()
    if name == "mooncake" and subprocess.run([sys.executable, "-c", "import mooncake.store"], check=False).returncode:
        pytest.skip("Mooncake cannot be loaded here (extra `mooncake`)")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    results = runner.run_group(name, GROUPS[name], TINY, PACKAGE)
    assert [row.name for row in results] == [goal.name for goal in GROUPS[name].goals]
    for row in results:
        assert row.value is not None, row.note
        assert row.low is not None
        assert row.high is not None
        assert 0 < row.low <= row.value <= row.high
    assert not list(tmp_path.iterdir())
    assert not list(Path("/dev/shm").glob(f"penstock-{os.geteuid()}-bench-tiers*"))
