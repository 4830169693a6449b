"""The fused kernel without a GPU: run by Triton's interpreter on host memory, and compiled for a GPU that is not there.

What a device makes of it is for `tests/gpu`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")


def child(what: str, cache: Path, **extra: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.engines.interpreted", what],
        env=environment(TRITON_CACHE_DIR=str(cache), **extra),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_interpreted_kernel_moves_every_byte_as_numpy_does(tmp_path: Path) -> None:
    child("interpret", tmp_path, TRITON_INTERPRET="1")


def test_the_compiled_kernel_loads_and_stores_as_wide_as_the_alignment_allows(tmp_path: Path) -> None:
    lines = [line.split() for line in child("compile", tmp_path, TRITON_INTERPRET="0").splitlines()]
    widths = {16: "v2.b64", 8: "b64", 4: "b32", 2: "b16", 1: "b8"}
    assert len(lines) == 2 * len(widths)
    for alignment, way, *accesses in lines:
        wide = widths[int(alignment)]
        # The table is read 8 bytes at a time, at every alignment.
        assert set(accesses) == {"ld.global.b64", f"ld.global.{wide}", f"st.global.{wide}"}, (alignment, way, accesses)
