"""The cache of compiled kernels: unwritable, and filled by two processes at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support import PATIENCE_S, ROOT, environment

USE_KERNELS = """
import numpy as np
from penstock.pool import cells, writer, survey
words = np.arange(8)
cells.poke(words.ctypes.data + 8, 77)
cells.clear(words.ctypes.data + 16, 24)
print(words.tolist(), cells.peek(words.ctypes.data + 8))
"""
RIGHT = "[0, 77, 0, 0, 0, 5, 6, 7] 77"


def compile_in(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", USE_KERNELS],
        env=environment(PENSTOCK_CACHE_DIR=str(cache)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT,
    )  # fmt: skip


def test_an_unwritable_kernel_cache_warns_once_and_goes_on(tmp_path: Path) -> None:
    in_the_way = tmp_path / "a file"
    in_the_way.touch()
    out, err = compile_in(in_the_way).communicate(timeout=4 * PATIENCE_S)
    assert out.strip() == RIGHT
    assert err.count("PENSTOCK_CACHE_DIR") == 1, err


def test_two_processes_that_compile_at_once_are_both_right(tmp_path: Path) -> None:
    processes = [compile_in(tmp_path / "cache") for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=4 * PATIENCE_S)
        assert (out.strip(), err) == (RIGHT, "")
    assert list((tmp_path / "cache").rglob("*.nbc"))
