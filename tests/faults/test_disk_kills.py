"""A process that writes to a disk tier is killed at any moment: afterwards every block is whole or gone.

The bytes and the root of every block that is found are right without being verified; where the disk has room for
everything, a block whose write was answered is there, and one whose removal was answered is not.
"""

from __future__ import annotations

import functools
import itertools
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from penstock.testing.tier_blocks import Buffers, empty, filled
from penstock.tiers.base import Found
from penstock.tiers.disk import DiskTier
from tests.conftest import Scale
from tests.faults.disk_writer import CHAIN, N_CHAINS, SPACES, life, options
from tests.support import PATIENCE_S, fork, kill, pipe
from tests.tiers.disk_support import NEVER, chain, consistent

pytestmark = pytest.mark.faults

ROOMY, CRAMPED = "24M", "700K"
BUFFERS = [Buffers(space, CHAIN) for space in SPACES]
Told = dict[tuple[int, int], str]


def live_and_die(folder: Path, size: str, seed: int, dies_at: int, told: Told) -> None:
    """One process's life, and what it told."""
    mine, theirs = pipe()
    process = fork(life, str(folder), size, seed, dies_at, theirs)
    theirs.close()
    if not dies_at:
        assert mine.poll(PATIENCE_S)
        time.sleep(float(np.random.default_rng([seed, 1]).uniform(0, 0.05)))
        kill(process)
    take_in(mine, told)
    process.join(PATIENCE_S)
    assert process.exitcode == -9
    process.close()
    mine.close()


def take_in(mine: Connection, told: Told) -> None:
    """Everything that it said before its end."""
    while mine.poll(PATIENCE_S):
        try:
            what, space, number = mine.recv()
        except EOFError:
            return
        if what != "open":
            told[space, number] = what
    raise AssertionError("the process neither works nor ends")


@functools.cache
def right(space: int, number: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    """The bytes and roots of a chain's blocks."""
    batch = filled(SPACES[space], chain(number, CHAIN, SPACES[space]))
    return np.array(batch.payloads), batch.roots


def check(folder: Path, size: str, told: Told) -> None:
    """Open what was left behind and read all of it."""
    tier = DiskTier(folder, options(size))
    consistent(tier)
    for space, number in itertools.product(range(len(SPACES)), range(N_CHAINS)):
        batch = empty(SPACES[space], chain(number, CHAIN, SPACES[space]), buffers=BUFFERS[space])
        found = tier.read(batch, NEVER)
        assert Found.FAILED not in found
        here = found == Found.HERE
        data, roots = right(space, number)
        assert np.array_equal(BUFFERS[space].blocks[here], data[here]), (space, number)
        assert np.array_equal(batch.roots[here], roots[here]), (space, number)
        if size == ROOMY:
            said = told.get((space, number))
            assert said != "stored" or here.all(), (space, number, found)
            assert said != "removed" or not here.any(), (space, number, found)
    consistent(tier)
    tier.close()


@pytest.mark.parametrize("size", [ROOMY, CRAMPED])
def test_killed_at_any_moment(tmp_path: Path, scale: Scale, size: str) -> None:
    told: Told = {}
    for seed in range(scale.of(5, 125)):
        live_and_die(tmp_path, size, seed, 0, told)
        check(tmp_path, size, told)


@pytest.mark.parametrize("size", [ROOMY, CRAMPED])
def test_killed_within_a_call(tmp_path: Path, scale: Scale, size: str) -> None:
    """Half of the bytes of a block, or half of its row, are on the disk."""
    told: Told = {}
    random = np.random.default_rng(7)
    for seed in range(scale.of(8, 125)):
        live_and_die(tmp_path, size, seed, int(random.integers(1, 40)), told)
        check(tmp_path, size, told)
