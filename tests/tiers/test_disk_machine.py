"""Any sequence of calls, restarts and damage to the files, beside a dict: what is found was written, and nothing that
was neither damaged nor evicted is lost.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from penstock.testing.tier_blocks import empty, version_of
from penstock.tiers.base import Found, Keys, Placed
from penstock.tiers.disk import DiskTier
from tests.conftest import Scale
from tests.tiers.disk_support import NEVER, ODD, SPACE, chain, change, consistent, open_disk, place_of, tear_row, write

SPACES, N_CHAINS, LENGTH = (SPACE, ODD), 4, 12
VERSIONS = range(3)

spaces = st.integers(0, len(SPACES) - 1)
chains = st.integers(0, N_CHAINS - 1)
ends = st.integers(1, LENGTH)
Block = tuple[int, int, int]
"""Space, chain, place in the chain."""


class DiskMachine(RuleBasedStateMachine):
    """`size`: with room for everything, nothing is lost but by damage; without, a block may be gone at any time."""

    size = "2M"
    roomy = True

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-disk-"))
        self.tier: DiskTier = self.open()
        self.model: dict[Block, int] = {}
        """What is there, and which version of it."""
        self.spoiled: set[Block] = set()
        """Bytes on the disk are not what was written: found by the root, or gone."""

    def open(self) -> DiskTier:
        return open_disk(self.folder, size=self.size)

    def keys(self, space: int, number: int) -> Keys:
        return chain(number, LENGTH, SPACES[space])

    @rule(space=spaces, number=chains, first=ends, stop=ends, version=st.sampled_from(VERSIONS))
    def write(self, space: int, number: int, first: int, stop: int, version: int) -> None:
        first, stop = min(first, stop) - 1, max(first, stop)
        placed = write(self.tier, self.keys(space, number)[:stop], SPACES[space], version, first)
        for place, became in enumerate(placed, first):
            block = (space, number, place)
            if became == Placed.PRESENT:
                assert block in self.model
            elif became == Placed.STORED:
                assert not self.roomy or block not in self.model, "it was there"
                self.model[block] = version
                self.spoiled.discard(block)
            else:
                assert became == Placed.NO_ROOM and not self.roomy
                self.model.pop(block, None)

    @rule(space=spaces, number=chains)
    def read(self, space: int, number: int) -> None:
        keys = self.keys(space, number)
        batch = empty(SPACES[space], keys)
        found = self.tier.read(batch, NEVER)
        for place in range(LENGTH):
            block = (space, number, place)
            if found[place] == Found.HERE:
                assert block in self.model
                right = version_of(batch, place, VERSIONS) == self.model[block]
                assert right or block in self.spoiled
            else:
                assert found[place] == Found.ABSENT
                assert block not in self.model or not self.roomy
                self.model.pop(block, None)

    @rule(space=spaces, number=chains)
    def holds(self, space: int, number: int) -> None:
        held = self.tier.holds(SPACES[space], self.keys(space, number), NEVER)
        for place, here in enumerate(held.tolist()):
            known = (space, number, place) in self.model
            assert here == known if self.roomy else here <= known

    @rule(space=spaces, number=chains, first=ends, stop=ends)
    def remove(self, space: int, number: int, first: int, stop: int) -> None:
        self.tier.remove(SPACES[space], self.keys(space, number)[first - 1 : stop], NEVER)
        for place in range(first - 1, stop):
            self.model.pop((space, number, place), None)

    @rule(space=spaces, number=chains)
    def touch(self, space: int, number: int) -> None:
        self.tier.touch(SPACES[space], self.keys(space, number))

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self.open()

    # ---- damage while it is closed; what was there is known from the tier itself

    def here(self) -> list[Block]:
        """The blocks that the tier holds."""
        found = []
        for space, number in [(space, number) for space in range(len(SPACES)) for number in range(N_CHAINS)]:
            held = self.tier.holds(SPACES[space], self.keys(space, number), NEVER)
            found += [(space, number, int(place)) for place in np.flatnonzero(held)]
        return found

    def place(self, block: Block) -> tuple[Path, Path, int, int]:
        return place_of(self.tier, self.keys(block[0], block[1])[block[2]], SPACES[block[0]])

    @precondition(lambda self: self.here())
    @rule(data=st.data(), byte=st.integers(0, 63))
    def tear_a_row(self, data: st.DataObject, byte: int) -> None:
        block = data.draw(st.sampled_from(self.here()))
        _, rows, slot, _ = self.place(block)
        self.tier.close()
        tear_row(rows, slot, byte)
        self.tier = self.open()
        assert self.tier.counters()["torn_rows"] == 1
        del self.model[block]

    @precondition(lambda self: self.here())
    @rule(data=st.data(), byte=st.integers(0, 4095))
    def flip_a_bit(self, data: st.DataObject, byte: int) -> None:
        block = data.draw(st.sampled_from(self.here()))
        file, _, slot, stride = self.place(block)
        change(file, slot * stride + byte, lambda old: old ^ 1)
        self.spoiled.add(block)

    @precondition(lambda self: self.here())
    @rule(data=st.data(), bytes_left=st.integers(0, 65536))
    def cut_a_slab(self, data: st.DataObject, bytes_left: int) -> None:
        file = self.place(data.draw(st.sampled_from(self.here())))[0]
        beyond = [
            block
            for block in self.here()
            for path, _, slot, stride in [self.place(block)]
            if path == file and (slot + 1) * stride > bytes_left
        ]
        self.tier.close()
        os.truncate(file, bytes_left)
        self.tier = self.open()
        for block in beyond:
            del self.model[block]

    @precondition(lambda self: self.here())
    @rule(data=st.data(), suffix=st.sampled_from([".data", ".rows"]))
    def lose_a_file(self, data: st.DataObject, suffix: str) -> None:
        file = self.place(data.draw(st.sampled_from(self.here())))[0]
        there = [block for block in self.here() if self.place(block)[0] == file]
        self.tier.close()
        file.with_suffix(suffix).unlink()
        self.tier = self.open()
        for block in there:
            del self.model[block]

    @invariant()
    def sound(self) -> None:
        consistent(self.tier)
        assert len(self.here()) == self.tier.usage().blocks
        assert not self.roomy or len(self.model) == self.tier.usage().blocks
        assert set(self.here()) <= self.model.keys()

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.folder)
        super().teardown()


class CrampedMachine(DiskMachine):
    size = "300K"
    roomy = False


@pytest.mark.parametrize("machine", [DiskMachine, CrampedMachine])
def test_against_a_dict(machine: type[DiskMachine], scale: Scale) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=scale.of(12, 150),
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
