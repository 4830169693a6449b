"""Sizes as people write them, and the size that a pool has when nobody says."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import config
from penstock.config import MIN_POOL_BYTES, default_size, memory_limit_bytes, parse_size
from penstock.errors import ConfigError, NoSpaceLeft

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("1048576", MIB), ("512M", 512 * MIB), ("512m", 512 * MIB), ("20GiB", 20 * GIB), ("20 gb", 20 * GIB),
        (" 2T ", 2 << 40), ("1.5G", 3 * GIB // 2), ("4k", 4096), ("7B", 7), ("64 MiB", 64 * MIB),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "1X", "1 2", "1e9", "0x10", "1,5G", "nan", "inf", "1PB", "0.0G"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="512M"):
        parse_size(text)


@given(st.integers(1, 1 << 44))
def test_bytes_are_exact(n: int) -> None:
    assert parse_size(str(n)) == n


class Machine:
    """What /proc and /sys/fs/cgroup say, in a folder, and what a file system has."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        read, real = config._read, Path.read_text
        monkeypatch.setattr(config, "_read", lambda path: read(self.inside(path)))
        monkeypatch.setattr(Path, "read_text", lambda path: real(self.inside(path)))
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=self.room // 4096, f_frsize=4096))
        self.room = 1 << 50
        self.write("/proc/self/cgroup", "")
        self.memory(64 * GIB)

    def inside(self, path: Path) -> Path:
        return path if path.is_relative_to(self.folder) else self.folder / str(path).lstrip("/")

    def write(self, path: str, text: str) -> None:
        where = self.inside(Path(path))
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)

    def memory(self, available: int) -> None:
        self.write("/proc/meminfo", f"MemTotal: {1 << 40} kB\nMemAvailable:   {available >> 10} kB\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_half_of_what_is_available(machine: Machine) -> None:
    assert memory_limit_bytes() == 64 * GIB
    assert default_size(Path("/dev/shm")) == 32 * GIB


def test_no_more_than_the_file_system_has(machine: Machine) -> None:
    machine.room = 10 * GIB
    assert 7 * GIB < default_size(Path("/dev/shm")) <= 8 * GIB


def test_a_plain_containers_shared_memory(machine: Machine) -> None:
    """64 MB in Docker: large enough for a small pool; where it is not, the remedy is named."""
    machine.room = 64 * MIB
    assert default_size(Path("/dev/shm")) == 48 * MIB
    machine.room = MIN_POOL_BYTES
    with pytest.raises(NoSpaceLeft, match=r"--shm-size.*--path"):
        default_size(Path("/dev/shm"))


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        (
            "0::/a/b\n",
            {"/sys/fs/cgroup/a/memory.max": f"{6 * GIB}\n", "/sys/fs/cgroup/a/memory.current": f"{2 * GIB}\n"},
        ),
        (
            "0::/a/b\n",
            {
                "/sys/fs/cgroup/a/memory.max": "max\n",
                "/sys/fs/cgroup/a/memory.current": "5\n",
                "/sys/fs/cgroup/a/b/memory.max": f"{5 * GIB}\n",
                "/sys/fs/cgroup/a/b/memory.current": f"{1 * GIB}\n",
            },
        ),
        (
            "4:cpu:/x\n7:memory:/x\n0::/\n",
            {
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{4 * GIB}\n",
                "/sys/fs/cgroup/memory/x/memory.usage_in_bytes": "0\n",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            },
        ),
        # A container sees its own group as the root.
        (
            "0::/\n",
            {"/sys/fs/cgroup/memory.max": f"{5 * GIB}\n", "/sys/fs/cgroup/memory.current": f"{1 * GIB}\n"},
        ),
    ],
)
def test_the_tightest_cgroup_counts(machine: Machine, groups: str, files: dict[str, str]) -> None:
    machine.write("/proc/self/cgroup", groups)
    for path, text in files.items():
        machine.write(path, text)
    assert memory_limit_bytes() == 4 * GIB
    assert default_size(Path("/dev/shm")) == 2 * GIB


def test_a_full_cgroup_is_an_error_that_says_so(machine: Machine) -> None:
    machine.write("/proc/self/cgroup", "0::/a\n")
    machine.write("/sys/fs/cgroup/a/memory.max", "1000")
    machine.write("/sys/fs/cgroup/a/memory.current", "2000")
    assert memory_limit_bytes() == 0
    with pytest.raises(NoSpaceLeft, match="memory 0 MiB"):
        default_size(Path("/dev/shm"))


def test_on_this_machine() -> None:
    assert memory_limit_bytes() > 0
