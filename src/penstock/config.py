"""Sizes: how people write them, and how large a pool is when nobody says."""

from __future__ import annotations

import os
import re
from pathlib import Path

from penstock.errors import ConfigError, NoSpaceLeft

__all__ = ["default_size", "memory_limit_bytes", "parse_size"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\Z", re.IGNORECASE)
_FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

MIN_POOL_BYTES = 32 << 20
# Half of what is free now: the engines beside the pool need the rest.
SHARE = 0.5
# What a file system must keep free after the pool took its part, so that others in /dev/shm go on working.
SHM_SHARE = 0.8


def parse_size(text: str) -> int:
    """Bytes in "1048576", "512M" or "20GiB". Raises ConfigError."""
    match = _SIZE.match(text.strip())
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"size {text!r}: write bytes, or a number with K, M, G or T such as 512M")
    return int(float(match[1]) * _FACTOR[match[2].lower()])


def default_size(folder: Path) -> int:
    """Bytes for a pool in `folder`: half of the memory that this machine and its cgroup can spare now, and no more than
    the file system has. Raises NoSpaceLeft, naming the remedy, where that is too little for a pool.
    """
    status = os.statvfs(folder)
    shm = int(status.f_bavail * status.f_frsize * SHM_SHARE)
    size = min(int(memory_limit_bytes() * SHARE), shm) // (16 << 20) * (16 << 20)
    if size < MIN_POOL_BYTES:
        raise NoSpaceLeft(
            f"{folder} can take {shm >> 20} MiB and memory {int(memory_limit_bytes() * SHARE) >> 20} MiB, too little "
            "for a pool. Enlarge it (`docker run --shm-size=...`, `mount -o remount,size=... /dev/shm`), or give a "
            "--path on another file system and a --size."
        )
    return size


def memory_limit_bytes() -> int:
    """Memory that can still be taken: of the machine, or of the tightest cgroup above this process."""
    available = _meminfo("MemAvailable")
    for limit, used in _cgroup_limits():
        available = min(available, max(0, limit - used))
    return available


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    return 0


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) of every limited cgroup above this process, versions 1 and 2."""
    limits = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        at = root / group.lstrip("/")
        for folder in (at, *at.parents):
            limit, used = (_read(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:
                limits.append((int(limit), int(used)))
            if folder == root:
                break
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
