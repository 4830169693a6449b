"""The conformance suite of tiers: what must hold for whatever stores blocks, be it a disk, a memory or a server.

    class TestMine(TierSuite):
        @pytest.fixture(autouse=True)
        def _place(self, tmp_path):
            self.folder = tmp_path

        def open_tier(self):
            return MyTier(tempfile.mkdtemp(dir=self.folder))

`tier_blocks.py` has the blocks, `tier_machine.py` the random sequences of calls against a model. What only one tier
can do wrong (its files after a crash, its server stopped) is for its own tests.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.errors import TierTimeout, TierUnavailable
from penstock.testing.tier_blocks import (
    AWKWARD_KEYS,
    Buffers,
    assert_right,
    block_keys,
    contents,
    empty,
    filled,
    parents_of,
    roots_of,
    tier_space,
    version_of,
)
from penstock.testing.tier_machine import TierMachine
from penstock.tiers.base import Batch, BlockSpace, Found, Keys, Placed, Tier

__all__ = ["TierSuite"]

SIZES = ((4, 1024), (13, 320), (8, 8192), (1, 256))
"""(n_segments, segment_bytes): blocks of one page, of a page and 64 bytes, of 16 pages, and of less than a page."""
STORED, PRESENT = int(Placed.STORED), int(Placed.PRESENT)


class TierSuite:
    """Subclass it in a test module and give it `open_tier`. The suite needs room for 64 MiB in each tier it opens."""

    survives_reopen: ClassVar[bool] = False
    """Whether what was stored is still there after `close` and `reopen`."""
    counts_presence: ClassVar[bool] = True
    """Whether writing what is there answers PRESENT; otherwise STORED is right, too."""
    frees_at_once: ClassVar[bool] = True
    """Whether `usage().used_bytes` shrinks as soon as blocks were removed."""
    sizes: ClassVar[tuple[tuple[int, int], ...]] = SIZES
    patience_s: ClassVar[float] = 10.0
    """A guard against hangs, not a measure: a call that takes longer past its deadline hangs."""
    examples: ClassVar[int] = 15
    """How many random sequences are tried against the model."""

    def open_tier(self) -> Tier:
        """A fresh, empty tier; called several times within some tests."""
        raise NotImplementedError

    def reopen(self, tier: Tier) -> Tier:
        """Open again what `tier`, closed by now, stored in. Only for tiers whose content can survive."""
        raise NotImplementedError

    def open_small(self, capacity_bytes: int) -> Tier | None:
        """A fresh tier with that much room or a little less; None where its size cannot be chosen."""
        return None

    def can_reopen(self) -> bool:
        """Whether `reopen` was overridden."""
        return type(self).reopen is not TierSuite.reopen

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        """A fresh tier, closed at the end."""
        tier = self.open_tier()
        yield tier
        tier.close()

    # ---- calls with the checks that belong to every call

    def deadline(self) -> float:
        """Far enough for any call that does not hang."""
        return time.monotonic() + self.patience_s

    def write(self, tier: Tier, batch: Batch) -> list[int]:
        """What became of each block; also checks the answer's form."""
        placed = tier.write(batch, self.deadline())
        assert placed.dtype == np.uint8 and placed.shape == (len(batch),), (placed.dtype, placed.shape)
        assert set(placed.tolist()) <= {int(each) for each in Placed}
        return [int(each) for each in placed]

    def must_write(self, tier: Tier, space: BlockSpace, keys: Keys) -> None:
        """These blocks are stored, from memory that is used for something else afterwards."""
        buffers = Buffers(space, len(keys))
        assert self.write(tier, filled(space, keys, buffers=buffers)) == [STORED] * len(keys)
        buffers.scribble()

    def check_read(self, tier: Tier, space: BlockSpace, keys: Keys, here: npt.NDArray[np.bool_] | bool = True) -> None:
        """Exactly the blocks of `here` are there: `read` and `holds` say so, the bytes and roots are right."""
        held = tier.holds(space, keys, self.deadline())
        assert held.dtype == np.bool_ and held.shape == (len(keys),), (held.dtype, held.shape)
        assert held.tolist() == np.broadcast_to(here, len(keys)).tolist()
        batch = empty(space, keys)
        assert_right(batch, tier.read(batch, self.deadline()), here)

    # ---- storing and finding

    @pytest.mark.parametrize("n", [1, 2, 100])
    def test_what_was_written_is_read(self, tier: Tier, n: int) -> None:
        for number, size in enumerate(self.sizes):
            space = tier_space(number, *size)
            keys = block_keys(space, 0, n)
            self.must_write(tier, space, keys)
            self.check_read(tier, space, keys)

    def test_nothing_is_in_an_empty_tier(self, tier: Tier) -> None:
        space = tier_space()
        self.check_read(tier, space, block_keys(space, 0, 5), False)

    def test_an_empty_batch(self, tier: Tier) -> None:
        space = tier_space()
        none = block_keys(space, 0, 0)
        assert self.write(tier, filled(space, none)) == []
        self.check_read(tier, space, none)
        tier.remove(space, none, self.deadline())

    def test_a_batch_that_is_partly_there(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 24)
        there = np.arange(24) % 3 != 1
        self.must_write(tier, space, keys[there])
        self.check_read(tier, space, keys, there)

    def test_writing_again_is_harmless(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 8)
        self.must_write(tier, space, keys[:4])
        placed = self.write(tier, filled(space, keys))
        assert placed[4:] == [STORED] * 4
        assert set(placed[:4]) <= ({PRESENT} if self.counts_presence else {PRESENT, STORED})
        self.check_read(tier, space, keys)

    def test_removing(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 9)
        self.must_write(tier, space, keys)
        gone = np.arange(9) >= 5
        tier.remove(space, keys[gone], self.deadline())
        self.check_read(tier, space, keys, ~gone)
        tier.remove(space, block_keys(space, 1, 3), self.deadline())
        tier.remove(space, keys[gone], self.deadline())
        self.check_read(tier, space, keys, ~gone)
        self.must_write(tier, space, keys[gone])
        self.check_read(tier, space, keys)

    def test_every_answer_is_at_its_blocks_place(self, tier: Tier) -> None:
        """Whatever the order, and whether the parent is in the batch, in the tier or nowhere."""
        space = tier_space()
        keys = block_keys(space, 0, 40)
        parents = parents_of(space, keys)
        batch = filled(space, keys[10:], parents=parents[10:])
        assert self.write(tier, batch) == [STORED] * 30
        order = np.random.default_rng(0).permutation(40)
        self.check_read(tier, space, keys[order], order >= 10)
        self.check_read(tier, space, keys[::-1], np.arange(40)[::-1] >= 10)

    def test_parts_of_a_batch(self, tier: Tier) -> None:
        """What was written as one batch can be read as several, and the reverse; the roots are filled in in place."""
        space = tier_space()
        keys = block_keys(space, 0, 12)
        whole = filled(space, keys)
        for first in (0, 5, 10):
            assert set(self.write(tier, whole.part(first, min(first + 5, 12)))) == {STORED}
        batch = empty(space, keys)
        for first in (0, 4, 8):
            assert tier.read(batch.part(first, first + 4), self.deadline()).tolist() == [Found.HERE] * 4
        assert_right(batch, np.zeros(12, np.uint8))

    def test_awkward_keys(self, tier: Tier) -> None:
        space = tier_space(3)
        there = np.arange(len(AWKWARD_KEYS)) % 2 == 0
        self.must_write(tier, space, AWKWARD_KEYS[there])
        self.check_read(tier, space, AWKWARD_KEYS, there)
        self.must_write(tier, space, AWKWARD_KEYS[~there])
        self.check_read(tier, space, AWKWARD_KEYS)
        tier.remove(space, AWKWARD_KEYS[there], self.deadline())
        self.check_read(tier, space, AWKWARD_KEYS, ~there)

    def test_spaces_are_apart(self, tier: Tier) -> None:
        """Also where their keys and sizes are the same: what one wrote the other neither sees nor removes."""
        first, second, larger = tier_space(0), tier_space(1), tier_space(2, *self.sizes[2])
        keys = block_keys(first, 0, 4)
        self.must_write(tier, first, keys)
        for other in (second, larger):
            self.check_read(tier, other, keys, False)
            self.must_write(tier, other, keys[:2])
            tier.remove(other, keys[1:], self.deadline())
        self.check_read(tier, first, keys)
        self.check_read(tier, larger, keys, np.arange(4) < 1)

    def test_large_blocks(self, tier: Tier) -> None:
        space = tier_space(7, 32, 64 << 10)
        keys = block_keys(space, 0, 3)
        self.must_write(tier, space, keys)
        self.check_read(tier, space, keys)

    def test_a_removed_block_can_come_again_with_other_bytes(self, tier: Tier) -> None:
        """An engine that computes it again may get other last bits: then the root must be that of the new bytes."""
        space = tier_space(1, *self.sizes[1])
        keys = block_keys(space, 0, 4)
        for version in range(3):
            assert self.write(tier, filled(space, keys, version)) == [STORED] * 4
            self.write(tier, filled(space, keys, version + 1))
            batch = empty(space, keys)
            assert tier.read(batch, self.deadline()).tolist() == [Found.HERE] * 4
            shown = {version_of(batch, i, range(version, version + 2)) for i in range(4)}
            assert shown <= ({version} if self.counts_presence else {version, version + 1}), shown
            tier.remove(space, keys, self.deadline())

    # ---- the caller's memory

    @pytest.mark.parametrize("read_only", [True, False])
    def test_writing_leaves_the_callers_memory_alone(self, tier: Tier, read_only: bool) -> None:
        for number, size in enumerate(self.sizes):
            space = tier_space(number, *size)
            keys = block_keys(space, 0, 5)
            buffers = Buffers(space, 5)
            batch = filled(space, keys, buffers=buffers, read_only=read_only)
            before = (buffers.snapshot(), keys.tobytes(), batch.parents.tobytes(), batch.roots.tobytes())
            for _ in range(2):
                tier.write(batch, self.deadline())
                after = (buffers.snapshot(), keys.tobytes(), batch.parents.tobytes(), batch.roots.tobytes())
                assert after == before

    def test_reading_writes_into_the_buffers_only(self, tier: Tier) -> None:
        for number, size in enumerate(self.sizes):
            space = tier_space(number, *size)
            keys = block_keys(space, 0, 7)
            there = np.arange(7) % 2 == 1
            self.must_write(tier, space, keys[there])
            buffers = Buffers(space, 7)
            batch = empty(space, keys, buffers=buffers)
            before = (keys.tobytes(), batch.parents.tobytes())
            assert_right(batch, tier.read(batch, self.deadline()), there)
            assert before == (keys.tobytes(), batch.parents.tobytes())
            buffers.assert_only_rooms_changed()

    def test_read_memory_is_the_callers(self, tier: Tier) -> None:
        """What is read is a copy: writing to it afterwards changes nothing in the tier."""
        space = tier_space()
        keys = block_keys(space, 0, 3)
        self.must_write(tier, space, keys)
        buffers = Buffers(space, 3)
        tier.read(empty(space, keys, buffers=buffers), self.deadline())
        buffers.scribble()
        self.check_read(tier, space, keys)

    # ---- time

    def within_patience(self, call: Callable[[], object]) -> BaseException | None:
        """Run it in a thread; what it raised. Fails if it takes longer than the suite's patience."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - it is handed to the test
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.patience_s)
        assert not thread.is_alive(), f"a call hangs {self.patience_s:g} s past its deadline"
        return raised[0] if raised else None

    def test_past_deadlines(self, tier: Tier) -> None:
        """Answered at once or TierTimeout; either way nothing that is wrong later."""
        space = tier_space()
        keys = block_keys(space, 0, 6)
        self.must_write(tier, space, keys[:3])
        past = time.monotonic() - 1.0
        batch, more = empty(space, keys[:3]), filled(space, keys[3:])
        for call in (
            lambda: tier.holds(space, keys, past),
            lambda: tier.read(batch, past),
            lambda: tier.write(more, past),
            lambda: tier.remove(space, keys[:1], past),
        ):
            raised = self.within_patience(call)
            assert raised is None or isinstance(raised, TierTimeout), repr(raised)
        batch = empty(space, keys)
        found = tier.read(batch, self.deadline())
        assert found[1:3].tolist() == [Found.HERE] * 2
        assert_right(batch, found, found == Found.HERE)
        assert set(self.write(tier, filled(space, keys))) <= {STORED, PRESENT}
        self.check_read(tier, space, keys)

    # ---- several threads

    def in_threads(self, n: int, work: Callable[[int], None]) -> None:
        """Run work(0) to work(n - 1) at once, switching often; raises what the first of them raised."""
        barrier = threading.Barrier(n)
        raised: list[BaseException] = []

        def run(number: int) -> None:
            try:
                barrier.wait(self.patience_s)
                work(number)
            except BaseException as error:  # noqa: BLE001 - it is raised below
                raised.append(error)

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(n)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(self.patience_s)
        finally:
            sys.setswitchinterval(interval)
        if raised:
            raise raised[0]
        assert not any(thread.is_alive() for thread in threads), "a call hangs"

    def test_threads_on_overlapping_batches(self, tier: Tier) -> None:
        space = tier_space(0, *self.sizes[1])
        keys = block_keys(space, 0, 24)
        parents = parents_of(space, keys)

        def work(number: int) -> None:
            for step in range(6):
                part = slice((4 * number + 3 * step) % 16, (4 * number + 3 * step) % 16 + 8)
                placed = self.write(tier, filled(space, keys[part], parents=parents[part]))
                assert set(placed) <= {STORED, PRESENT}, placed
                batch = empty(space, keys[part], parents=parents[part])
                assert_right(batch, tier.read(batch, self.deadline()))

        self.in_threads(4, work)
        self.check_read(tier, space, keys[:23])
        blocks = tier.usage().blocks
        assert blocks is None or blocks >= 23

    def test_threads_that_write_read_and_remove_the_same_blocks(self, tier: Tier) -> None:
        """A reader sees a whole version or nothing."""
        space = tier_space(0, *self.sizes[2])
        keys = block_keys(space, 0, 4)
        right = [(contents(keys, space.block_bytes, version), roots_of(space, keys, version)) for version in range(2)]

        def work(number: int) -> None:
            for _ in range(12):
                if number < 2:
                    self.write(tier, filled(space, keys, number))
                elif number == 2:
                    tier.remove(space, keys, self.deadline())
                else:
                    check_whole(empty(space, keys))

        def check_whole(batch: Batch) -> None:
            found = tier.read(batch, self.deadline())
            for i in np.flatnonzero(found == Found.HERE):
                have = np.frombuffer(batch.payloads[i], np.uint8)
                assert any(np.array_equal(have, data[i]) and batch.roots[i] == root[i] for data, root in right), i
            assert Found.FAILED not in found.tolist()

        self.in_threads(5, work)
        check_whole(empty(space, keys))
        tier.remove(space, keys, self.deadline())
        self.check_read(tier, space, keys, False)

    def test_closing_while_others_call(self, tier: Tier) -> None:
        """Their calls end normally or with TierUnavailable."""
        space = tier_space()
        keys = block_keys(space, 0, 8)
        self.must_write(tier, space, keys)

        def work(number: int) -> None:
            for _ in range(5 if number == 0 else 1000):
                try:
                    batch = empty(space, keys)
                    assert_right(batch, tier.read(batch, self.deadline()))
                    tier.write(filled(space, keys), self.deadline())
                except TierUnavailable:
                    return
            assert number == 0, "1000 calls after close were answered"
            tier.close()

        self.in_threads(3, work)

    # ---- how full it is

    def test_usage(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 20)
        before = tier.usage()
        self.must_write(tier, space, keys)
        full = tier.usage()
        self.write(tier, filled(space, keys))
        assert tier.usage().blocks == full.blocks
        tier.remove(space, keys[:15], self.deadline())
        after = tier.usage()
        if full.blocks is not None:
            assert (full.blocks, after.blocks) == ((before.blocks or 0) + 20, (before.blocks or 0) + 5)
        if full.used_bytes is not None and after.used_bytes is not None:
            assert full.used_bytes > (before.used_bytes or 0)
            assert full.capacity_bytes is None or full.used_bytes <= full.capacity_bytes
            assert after.used_bytes < full.used_bytes or not self.frees_at_once

    def test_more_than_it_holds(self) -> None:
        """It forgets or refuses; it says which, stays within its size, and what it still has is right."""
        space = tier_space()
        tier = self.open_small(64 * space.block_bytes)
        if tier is None:
            pytest.skip("the size of this tier cannot be chosen")
        chains = [block_keys(space, chain, 8) for chain in range(32)]
        for keys in chains:
            placed = self.write(tier, filled(space, keys))
            assert Placed.FAILED not in placed and Placed.PRESENT not in placed
            held = tier.holds(space, keys, self.deadline())
            assert held.tolist() == [each == STORED for each in placed]
            usage = tier.usage()
            assert None in (usage.used_bytes, usage.capacity_bytes) or usage.used_bytes <= usage.capacity_bytes  # type: ignore[operator]
        all_keys = np.concatenate(chains)
        held = tier.holds(space, all_keys, self.deadline())
        assert 0 < held.sum() <= 64
        self.check_read(tier, space, all_keys, held)
        tier.close()

    # ---- the rest of the interface

    def test_what_it_says_of_itself(self, tier: Tier) -> None:
        assert tier.name and tier.kind
        assert {type(tier.local), type(tier.shared), type(tier.durable)} == {bool}
        space = tier_space()
        keys = block_keys(space, 0, 6)
        self.must_write(tier, space, keys[:3])
        tier.touch(space, keys)
        self.check_read(tier, space, keys, np.arange(6) < 3)
        assert all(type(name) is str and type(n) is int and n >= 0 for name, n in tier.counters().items())

    def test_closing(self, tier: Tier) -> None:
        space = tier_space()
        keys = block_keys(space, 0, 2)
        self.must_write(tier, space, keys)
        tier.close()
        tier.close()
        for call in (
            lambda: tier.holds(space, keys, self.deadline()),
            lambda: tier.write(filled(space, keys), self.deadline()),
            lambda: tier.read(empty(space, keys), self.deadline()),
            lambda: tier.remove(space, keys, self.deadline()),
        ):
            with pytest.raises(TierUnavailable):
                call()

    def test_opening_again(self, tier: Tier) -> None:
        """After an orderly end: what it keeps is right, what was removed stays away."""
        if not self.can_reopen():
            pytest.skip("nothing of this tier survives")
        spaces = [tier_space(number, *size) for number, size in enumerate(self.sizes)]
        for space in spaces:
            keys = block_keys(space, 0, 10)
            self.must_write(tier, space, keys)
            tier.remove(space, keys[7:], self.deadline())
        blocks = tier.usage().blocks
        tier.close()
        again = self.reopen(tier)
        for space in spaces:
            keys = block_keys(space, 0, 10)
            held = again.holds(space, keys, self.deadline())
            assert not held[7:].any() and (held[:7].all() or not self.survives_reopen)
            self.check_read(again, space, keys, held)
        assert not self.survives_reopen or again.usage().blocks == blocks
        again.close()

    def test_against_the_model_in_any_order(self) -> None:
        machine = type("Machine", (TierMachine,), {"suite": self})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
