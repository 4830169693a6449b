"""What there is to measure: this machine's memories, devices and GPUs, and the folders and tiers that were named."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from penstock.bench.probe.base import Subject
from penstock.bench.probe.dax import DaxDevice
from penstock.bench.probe.directory import Directory
from penstock.bench.probe.memory import MemoryNode, nodes
from penstock.bench.probe.tier import TierSubject
from penstock.profile import profile_path
from penstock.tiers.registry import parse_tier

__all__ = ["default_folders", "machine_subjects", "named_subjects"]

_DEV = Path("/dev")


def machine_subjects() -> list[Subject]:
    """What every machine has, and its devices and GPUs if any."""
    found: list[Subject] = [MemoryNode(node) for node in nodes()]
    found += [DaxDevice(path) for path in sorted(_DEV.glob("dax*"))]
    return found + _gpus()


def named_subjects(folders: Sequence[Path], tiers: Sequence[str]) -> list[Subject]:
    """Folders, and tiers by their addresses. Raises ConfigError for an address that is none."""
    found: list[Subject] = [Directory(path) for path in dict.fromkeys(path.absolute() for path in folders)]
    return found + [TierSubject(parse_tier(address)) for address in dict.fromkeys(tiers)]


def default_folders() -> list[Path]:
    """Shared memory, and the disk under the user's cache."""
    cache = profile_path().parent
    while not cache.exists():
        cache = cache.parent
    return [path for path in (Path("/dev/shm"), cache) if path.is_dir()]


def _gpus() -> list[Subject]:
    if not (_DEV / "nvidiactl").exists() and not (_DEV / "kfd").exists():
        return []  # no driver: importing torch would only cost time
    if find_spec("torch") is None:
        return []
    from penstock.bench.probe.gpu import GpuLink, devices

    return [GpuLink(index) for index in range(devices())]
