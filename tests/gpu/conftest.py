"""Tests on a CUDA device. Without one, or without PyTorch or Triton, each file is reported as skipped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def missing() -> str:
    """What these tests lack here, "" if nothing."""
    for name in ("torch", "triton"):
        if find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return "" if torch.cuda.is_available() else "PyTorch sees no CUDA device"


MISSING = missing()


class NeedsGpu(pytest.Module):
    """Stands for a file of tests that cannot run here."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip(f"{MISSING}; these tests run on a machine with an NVIDIA GPU", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return NeedsGpu.from_parent(parent, path=module_path) if MISSING else None
