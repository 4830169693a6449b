"""Where it was measured: processor, memory, versions, and what else was going on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from penstock.config import memory_limit_bytes

__all__ = ["describe_machine"]

_VECTOR_FLAGS = ("avx2", "avx512f", "asimd", "sve")


def describe_machine() -> dict[str, Any]:
    """The machine's description for a report. Reads files under /proc and /sys; names no host, user or path."""
    info = _cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name", platform.machine()),
        "arch": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "vector": [flag for flag in _VECTOR_FLAGS if flag in flags],
        "cache": info.get("cache size", ""),
        "memory_free_gib": round(memory_limit_bytes() / (1 << 30), 1),
        "huge_pages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "huge_pages_shmem": _chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("penstock", "numpy", "numba", "llvmlite")},
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu_info() -> dict[str, str]:
    """Fields of the first processor."""
    fields = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def _chosen(path: Path) -> str:
    """The word in brackets of a sysfs choice file, "" if there is none."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
