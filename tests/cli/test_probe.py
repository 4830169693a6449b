"""`penstock probe` as it is called."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from penstock.cli.app import app
from penstock.errors import ConfigError
from penstock.profile import Direction, load_profile
from tests.support import PATIENCE_S, ROOT, environment, penstock_cli, until

runner = CliRunner()
QUICK = ["probe", "--sizes", "64K,4K", "--seconds-per-point", "0.01"]


def test_it_measures_and_writes(tmp_path: Path) -> None:
    folder, out, png = tmp_path / "d", tmp_path / "profile.json", tmp_path / "p.png"
    folder.mkdir()
    done = penstock_cli(*QUICK, "--dir", str(folder), "--out", str(out), "--plot", str(png), "--json")
    document = json.loads(done.stdout)
    assert document["version"] == 1 and str(out) in done.stderr
    profile = load_profile(out)
    assert profile.machine["cores"] >= 1 and not profile.left_out
    tier = profile.tier(f"dir:{folder}")
    assert tier is not None and tier.model(Direction.READ) is not None
    assert [point.size_bytes for point in tier.points] == [4096, 65536] * 2
    assert os.listdir(folder) == [] and png.stat().st_size > 10_000


def test_what_was_named_and_cannot_be_measured_is_an_exit_status(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    done = runner.invoke(app, [*QUICK, "--dir", "/proc", "--dir", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 1, done.exception
    assert "dir:/proc: left out" in done.output
    assert [each.name for each in load_profile(out).left_out] == ["dir:/proc"]
    assert load_profile(out).tier(f"dir:{tmp_path}") is not None


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tier", "nosuch:/x"], "'nosuch' is unknown"),
        (["--sizes", "64,many"], "size 'many'"),
        (["--sizes", "100"], "multiples of 64"),
        (["--sizes", "2G"], "up to 1 GiB"),
        (["--plot", "picture.pdf"], "PNG"),
    ],
)
def test_what_is_refused_before_anything_is_measured(arguments: list[str], why: str, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    done = runner.invoke(app, ["probe", *arguments, "--out", str(out)])
    assert isinstance(done.exception, ConfigError) and why in str(done.exception)
    assert not out.exists()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    folder, out = tmp_path / "d", tmp_path / "profile.json"
    folder.mkdir()
    command = [sys.executable, "-m", "penstock", "probe", "--sizes", "1M", "--seconds-per-point", "1"]
    process = subprocess.Popen(
        [*command, "--dir", str(folder), "--out", str(out)],
        env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or _has_file_in(folder, process.pid), "it measures the folder")
        assert process.poll() is None, "it ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode not in (0, -signal.SIGKILL), said
    assert "Traceback" not in said
    assert os.listdir(folder) == [] and not out.exists()


def _has_file_in(folder: Path, pid: int) -> bool:
    """Whether the process has a file there open, with a name or without."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(entry).startswith(f"{folder}/"):
                return True
    return False
