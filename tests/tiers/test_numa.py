"""NUMA nodes: which there are, and that memory really comes from the one that was asked for."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from penstock.errors import ConfigError
from penstock.tiers import numa
from tests.support import environment

SIZE = 1 << 20


def test_listings_of_nodes(tmp_path: Path) -> None:
    listing = tmp_path / "has_memory"
    for text, nodes in (("0\n", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("\n", [])):
        listing.write_text(text)
        assert numa.memory_nodes(listing) == nodes
    assert numa.memory_nodes(tmp_path / "none") == [0]
    assert 0 in numa.memory_nodes()


def test_a_node_that_is_not_there() -> None:
    absent = max(numa.memory_nodes()) + 1
    with pytest.raises(ConfigError, match=rf"node {absent} has no memory here; nodes with memory: 0"):
        numa.check_node(absent)
    with pytest.raises(ConfigError), numa.binding(absent):
        pass


def policy_of(path: Path) -> str:
    """The policy of this process's mapping of a file, and where its pages are, as the kernel lists them."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return next(line for line in lines if f"file={path}" in line)


@pytest.mark.parametrize("through", ["libnuma", "system calls"])
def test_a_file_stays_bound(through: str) -> None:
    path = Path(f"/dev/shm/penstock-numa-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    library = None if through == "system calls" else numa._libnuma()
    try:
        os.ftruncate(fd, SIZE)
        with mock.patch.object(numa, "_libnuma", return_value=library):
            numa.bind_file(fd, SIZE, 0)
        with mmap.mmap(fd, SIZE) as mapped:  # another mapping than the one that was bound
            mapped[:] = b"x" * SIZE
            assert re.search(rf" bind:0 .*N0={SIZE // 4096}\b", policy_of(path)), policy_of(path)
    finally:
        os.close(fd)
        path.unlink()


POLICY = "print(open('/proc/self/numa_maps').readline().split()[1])"


@pytest.mark.parametrize("through", ["libnuma", "system calls"])
def test_processes_started_meanwhile_inherit_it(through: str) -> None:
    def policy() -> str:
        command = [sys.executable, "-S", "-c", POLICY]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout.strip()

    library = None if through == "system calls" else numa._libnuma()
    with mock.patch.object(numa, "_libnuma", return_value=library), numa.binding(0):
        assert policy() == "bind:0"
    assert policy() == "default"


def test_a_system_that_forbids_it() -> None:
    with mock.patch.object(numa, "check_node", lambda node: node), pytest.raises(ConfigError, match="numactl"):
        numa._set_policy(99, 0)  # no such mode: the kernel refuses
