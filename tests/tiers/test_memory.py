"""The second memory: the suite of all tiers, what differs in a pool, and its keeper killed under reads and writes.

Most tests join a keeper that the fork server starts, which costs milliseconds; those of the child process start it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule, run_state_machine_as_test

import penstock
from penstock.errors import ConfigError, KeeperError, TierError, TierTimeout, TierUnavailable
from penstock.identity import root_key
from penstock.pool import segment as segments
from penstock.pool.layout import Geometry, plan_geometry
from penstock.pool.link import SocketLink
from penstock.pool.remote import Copied, RemoteReader
from penstock.pool.wire import Forget
from penstock.testing.pool import chain, make_space, target
from penstock.testing.tier_blocks import (
    assert_right,
    block_keys,
    contents,
    empty,
    filled,
    parents_of,
    roots_of,
    tier_space,
)
from penstock.testing.tier_machine import CHAIN, TierMachine, picks, spaces, versions
from penstock.testing.tiers import TierSuite
from penstock.tiers import registry
from penstock.tiers.base import BlockSpace, Found, Placed, Tier
from penstock.tiers.memory import MemoryTier, pool_name
from penstock.types import Miss, WriteRule
from tests.support import MIB, PATIENCE_S, Keeper, environment, until, wait_stopped

ROOMY = plan_geometry(72 * MIB, unit_bytes=4096, slab_bytes=4 * MIB, n_lanes=4)
STORED, FAILED = int(Placed.STORED), int(Placed.FAILED)
SPACE = tier_space()


def soon(seconds: float = PATIENCE_S) -> float:
    return time.monotonic() + seconds


def joined(keeper: Keeper) -> MemoryTier:
    """A tier over a segment that the keeper serves already."""
    config = registry.parse_tier(f"memory:{keeper.path}?pool={keeper.name}")
    tier = registry.open_tier(config)
    assert isinstance(tier, MemoryTier)
    return tier


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A path in shared memory that nothing has; cleared at the end."""
    path = segments.default_path(f"m{os.getpid()}-{time.monotonic_ns() % 10**9}")
    try:
        yield path
    finally:
        for each in (path, segments.lock_path(path)):
            each.unlink(missing_ok=True)


def started(path: Path, options: str = "size=48M&slab=1M") -> MemoryTier:
    """A tier that starts its own keeper."""
    tier = registry.open_tier(registry.parse_tier(f"memory:{path}?{options}"))
    assert isinstance(tier, MemoryTier)
    return tier


class ChainMachine(TierMachine):
    """The suite's machine for a store of chains: they are written from their heads, and removed to their ends."""

    def __init__(self) -> None:
        super().__init__()
        self.keys[0] = block_keys(self.spaces[0], 1, CHAIN)

    @rule(space=spaces, pick=picks, version=versions)
    def write(self, space: int, pick: list[int], version: int) -> None:
        super().write(space, list(range(max(pick) + 1)), version)

    @rule(space=spaces, pick=picks)
    def remove(self, space: int, pick: list[int]) -> None:
        super().remove(space, list(range(min(pick), CHAIN)))


class TestSuite(TierSuite):
    """Four of the suite's tests ask for what a pool does not do; they stand below as it does it."""

    survives_reopen = True
    examples = 5

    @pytest.fixture(autouse=True)
    def _keepers(self) -> Iterator[None]:
        self.keepers: dict[str, Keeper] = {}
        self.tiers: list[Tier] = []
        yield
        for tier in self.tiers:
            tier.close()
        for keeper in self.keepers.values():
            keeper.__exit__()

    def _open(self, geometry: Geometry) -> Tier:
        keeper = Keeper(geometry)
        self.keepers[str(keeper.path)] = keeper
        keeper.start()
        tier = joined(keeper)
        self.tiers.append(tier)
        return tier

    def open_tier(self) -> Tier:
        return self._open(ROOMY)

    def open_small(self, capacity_bytes: int) -> Tier:
        return self._open(Geometry(4096, 64 << 10, capacity_bytes // (64 << 10), 4, 256, 128, 8))

    def reopen(self, tier: Tier) -> Tier:
        assert isinstance(tier, MemoryTier)
        keeper = self.keepers[str(tier.path)]
        keeper.stop()
        keeper.start()
        again = joined(keeper)
        self.tiers.append(again)
        return again

    def test_every_answer_is_at_its_blocks_place(self, tier: Tier) -> None:
        """In any order of reading; what is written without its parent is refused, and so is what continues it."""
        keys = block_keys(SPACE, 0, 40)
        parents = parents_of(SPACE, keys)
        assert self.write(tier, filled(SPACE, keys[10:], parents=parents[10:])) == [FAILED] * 30
        assert self.write(tier, filled(SPACE, keys[:30])) == [STORED] * 30
        order = np.random.default_rng(0).permutation(40)
        self.check_read(tier, SPACE, keys[order], order < 30)
        assert self.write(tier, filled(SPACE, keys[30:], parents=parents[30:])) == [STORED] * 10
        self.check_read(tier, SPACE, keys[::-1])

    def test_spaces_are_apart(self, tier: Tier) -> None:
        """A key belongs to one space (it grows from the space's root): in another one it is neither seen nor removed,
        and not stored a second time."""
        first, second = tier_space(0), tier_space(1)
        keys = block_keys(first, 0, 4)
        self.must_write(tier, first, keys)
        self.check_read(tier, second, keys, False)
        assert self.write(tier, filled(second, keys)) == [FAILED] * 4
        tier.remove(second, keys, self.deadline())
        self.check_read(tier, first, keys)
        self.check_read(tier, second, keys, False)

    def test_threads_on_overlapping_batches(self, tier: Tier) -> None:
        space = tier_space(0, *self.sizes[1])
        keys = block_keys(space, 0, 24)

        def work(number: int) -> None:
            for step in range(6):
                part = keys[: 8 + (4 * number + 3 * step) % 17]
                placed = self.write(tier, filled(space, part))
                assert set(placed) <= {STORED, int(Placed.PRESENT)}, placed
                batch = empty(space, part)
                assert_right(batch, tier.read(batch, self.deadline()))

        self.in_threads(4, work)
        assert tier.usage().blocks == 24
        self.check_read(tier, space, keys)

    def test_usage(self, tier: Tier) -> None:
        keys = block_keys(SPACE, 0, 20)
        before = tier.usage()
        self.must_write(tier, SPACE, keys)
        self.write(tier, filled(SPACE, keys))
        full = tier.usage()
        assert (before.blocks, full.blocks) == (0, 20)
        assert full.used_bytes == 20 * SPACE.block_bytes
        tier.remove(SPACE, keys[5:6], self.deadline())  # and what continues it
        after = tier.usage()
        assert (after.blocks, after.used_bytes) == (5, 5 * SPACE.block_bytes)

    def test_against_the_model_in_any_order(self) -> None:
        machine = type("Machine", (ChainMachine,), {"suite": self})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.examples, stateful_step_count=30, deadline=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )  # fmt: skip


# ---- the child that serves it


@pytest.fixture(scope="module")
def own() -> Iterator[MemoryTier]:
    """A tier with a keeper of its own, which the tests kill and stop."""
    with place() as path:
        tier = started(path)
        yield tier
        tier.close()


def keeper_pid(tier: MemoryTier) -> int:
    """The keeper's process, once it serves."""
    until(lambda: tier._server.pool.keeper_alive and tier.keeper_pid, "a keeper serves")
    assert tier.keeper_pid is not None
    return tier.keeper_pid


def test_any_process_reads_it_in_place(own: MemoryTier) -> None:
    whole = make_space("in place")
    space = BlockSpace(
        whole.digest(), bytes(root_key(whole)), whole.block_bytes, whole.block_tokens, whole.n_segments,
        whole.segment_bytes,
    )  # fmt: skip
    keys = chain(whole, range(12))
    batch = filled(space, keys.array.copy())
    assert own.write(batch, soon()).tolist() == [STORED] * 12
    with penstock.open(own.pool, client="reader") as pool:
        handle = pool.space(whole)
        with pool.match(handle, keys) as lease:
            assert len(lease) == 12
            # What the tier stored has tables that give the roots it was given: a client's gather verifies them.
            memory, tensors = target(handle, 12)
            assert lease.gather(tensors, verify=True) == 12
            assert np.array_equal(memory, contents(keys.array, space.block_bytes))
            assert np.array_equal(lease.views(3), memory[3])
            # What is read in place is not evicted meanwhile.
            with pytest.raises(TierTimeout, match=r"being read|answer"):
                own.remove(space, keys.array[5:], soon(0.05))
        own.remove(space, keys.array, soon())
        assert not own.holds(space, keys.array, soon()).any()


def test_what_is_not_keys_is_refused_and_nothing_ends(own: MemoryTier) -> None:
    link = own._server.pool._link
    assert isinstance(link, SocketLink)
    with pytest.raises(KeeperError, match="not keys"):
        link.forget(Forget(SPACE.digest, bytes(17)))
    assert link.forget(Forget(bytes(32), bytes(16))) == 0


def test_a_wrong_root_stays_wrong(own: MemoryTier) -> None:
    """Damage that comes from above is not sealed as if it were right: whoever verifies finds it."""
    space = tier_space(40)
    keys = block_keys(space, 0, 3)
    batch = filled(space, keys)
    batch.roots[1] ^= np.uint64(1)
    given = batch.roots.tolist()
    assert own.write(batch, soon()).tolist() == [STORED] * 3
    back = empty(space, keys)
    own.read(back, soon())
    assert back.roots.tolist() == given


class Traffic:
    """Threads that write and read chains and check every byte and the clock of every call."""

    def __init__(self, tier: MemoryTier) -> None:
        self.tier = tier
        self.wrong: list[str] = []
        self.done = {"write": 0, "read": 0, "refused": 0}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(3)]

    def _work(self, number: int) -> None:
        space = tier_space(50 + number)
        turn = 0
        while not self._stop.is_set():
            keys = block_keys(space, turn % 7, 16)
            try:
                self._timed(lambda until, keys=keys: self._write(space, keys, until))
                self._timed(lambda until, keys=keys: self._read(space, keys, until))
            except TierError:
                self.done["refused"] += 1
            except BaseException as error:  # noqa: BLE001 - told to the test
                self.wrong.append(repr(error))
            turn += 1

    def _timed(self, call: Callable[[float], None]) -> None:
        deadline = soon(0.3)
        try:
            call(deadline)
        finally:
            late = time.monotonic() - deadline
            if late > 0.1:
                self.wrong.append(f"{late:.3f} s past the deadline")

    def _write(self, space: BlockSpace, keys: np.ndarray, until: float) -> None:
        placed = self.tier.write(filled(space, keys), until)
        if set(placed.tolist()) <= {STORED, int(Placed.PRESENT)}:
            self.done["write"] += 1

    def _read(self, space: BlockSpace, keys: np.ndarray, until: float) -> None:
        batch = empty(space, keys)
        found = self.tier.read(batch, until)
        here = found == Found.HERE
        right, roots = contents(keys, space.block_bytes), roots_of(space, keys)
        for i in np.flatnonzero(here):
            if not np.array_equal(np.frombuffer(batch.payloads[i], np.uint8), right[i]) or batch.roots[i] != roots[i]:
                self.wrong.append(f"block {i} has other bytes")
        self.done["read"] += int(here.sum())

    def progress(self, kind: str) -> None:
        """Wait for more of it."""
        before = self.done[kind]
        until(lambda: self.done[kind] > before, f"another {kind}")

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_its_keeper_is_killed_under_reads_and_writes(own: MemoryTier) -> None:
    space = tier_space(41)
    keys = block_keys(space, 0, 8)
    assert own.write(filled(space, keys), soon()).tolist() == [STORED] * 8
    before = own.counters()["keeper_restarts"]
    first = keeper_pid(own)
    with Traffic(own) as traffic:
        traffic.progress("write")
        os.kill(first, signal.SIGKILL)
        traffic.progress("read")  # nobody is needed for those
        traffic.progress("refused")
        until(lambda: own.keeper_pid != first, "another keeper")
        keeper_pid(own)
        traffic.progress("write")
    assert traffic.wrong == []
    assert own.counters()["keeper_restarts"] == before + 1
    batch = empty(space, keys)
    assert_right(batch, own.read(batch, soon()))


def test_its_keeper_is_stopped(own: MemoryTier) -> None:
    """Reads go on; what needs the keeper ends at its deadline, and counts once the keeper goes on."""
    known, new = tier_space(42), tier_space(43)
    keys = block_keys(known, 0, 8)
    assert own.write(filled(known, keys[:4]), soon()).tolist() == [STORED] * 4
    pid = keeper_pid(own)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_stopped(pid)
        batch = empty(known, keys)
        assert_right(batch, own.read(batch, soon(0.2)), np.arange(8) < 4)
        for call in (
            lambda until: own.write(filled(known, keys), until),
            lambda until: own.write(filled(new, block_keys(new, 0, 1)), until),
            lambda until: own.remove(known, keys, until),
        ):
            deadline = soon(0.2)
            with pytest.raises(TierTimeout):
                call(deadline)
            assert time.monotonic() < deadline + 0.1
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: not own.holds(known, keys, soon()).any(), "the removal that was asked for is done")
    assert own.write(filled(known, keys), soon()).tolist() == [STORED] * 8


OWNER = """
import sys, time
from penstock.testing.tier_blocks import block_keys, filled, tier_space
from penstock.tiers import registry
tier = registry.open_tier(registry.parse_tier(sys.argv[1]))
space = tier_space()
placed = tier.write(filled(space, block_keys(space, 0, 20)), time.monotonic() + 30)
print(tier.keeper_pid, placed.tolist().count(0), flush=True)
sys.stdin.read()
"""


def test_the_keeper_ends_with_its_owner_and_the_blocks_stay() -> None:
    keys = block_keys(SPACE, 0, 20)
    with place() as path:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, f"memory:{path}?size=48M&slab=1M"],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        with owner:
            assert owner.stdout is not None
            keeper, stored = map(int, owner.stdout.readline().split())
            assert stored == 20
            owner.kill()
        until(lambda: not Path(f"/proc/{keeper}").exists(), "the keeper ended")
        tier = started(path, "")
        batch = empty(SPACE, keys)
        assert_right(batch, tier.read(batch, soon()))
        tier.close()
        with pytest.raises(TierUnavailable):
            tier.read(batch, soon())


# ---- hosts without coherence


def test_what_it_publishes_is_read_without_a_keeper_or_a_lease() -> None:
    """That every line is written back shows in tests/pool/test_publishing.py: on this machine no reader can tell."""
    with place() as path:
        tier = started(path, "size=48M&slab=1M&coherent=no")
        keys = block_keys(SPACE, 1, 8)
        batch = filled(SPACE, keys)
        assert (tier.write(batch, soon()) == STORED).all()
        out = np.zeros((8, SPACE.block_bytes), np.uint8)
        reader = RemoteReader(path)
        assert reader.read(SPACE.digest, keys, out) == Copied(8, Miss.NONE)
        assert [row.tobytes() for row in out] == [bytes(payload) for payload in batch.payloads]
        tier.close()
        assert reader.read(SPACE.digest, keys, out).n_blocks == 8, "no keeper is needed"


def test_a_segment_for_coherent_memory_is_not_taken_for_another() -> None:
    with place() as path:
        started(path).close()
        with pytest.raises(TierUnavailable, match="coherent memory; `penstock rm`"):
            started(path, "coherent=no")
    with Keeper(ROOMY) as keeper, pytest.raises(ConfigError, match="coherent memory; `penstock rm`"):
        registry.open_tier(registry.parse_tier(f"memory:{keeper.path}?pool={keeper.name}&coherent=no"))


# ---- what is refused


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("memory:relative?size=64M", "absolute"),
        ("memory:/dev/shm/none-such-here", "size="),
        ("memory:/dev/shm/none-such-here?size=64M&numa=999", "nodes with memory: 0"),
        ("memory:/dev/shm/none-such-here?size=many", "size 'many'"),
        ("memory:/dev/shm/none-such-here?size=64M&pool=a/b", "pool name"),
        ("memory:/dev/shm/none-such-here?sise=64M", "did you mean 'size'"),
    ],
)
def test_addresses_that_cannot_be_used(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        registry.open_tier(registry.parse_tier(address))


def test_a_file_that_is_no_segment(tmp_path: Path) -> None:
    """The child's own words reach who opened the tier."""
    path = tmp_path / "notes.txt"
    path.write_text("keep me " * 1000)
    with pytest.raises(TierUnavailable, match="not a Penstock segment"):
        started(path)
    assert path.read_text() == "keep me " * 1000


def test_another_segment_has_the_name() -> None:
    with Keeper(ROOMY) as keeper, place() as path, pytest.raises(ConfigError, match="another"):
        segments.create(path, ROOMY).close()
        started(path, f"pool={keeper.name}")


def test_names_are_readable_short_and_different() -> None:
    names = [pool_name(Path(each)) for each in ("/mnt/cxl/penstock", "/mnt/cxl2/penstock", "/a/" + "x" * 200, "/a/ü b")]
    assert len(set(names)) == 4
    assert all(segments.check_name(name) == name for name in names)
    assert registry.parse_tier("memory:/dev/shm/x?size=1G").write is WriteRule.EVICTION
