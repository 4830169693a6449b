"""What a pool with a disk below it meets: devices that fail, hang or fill up, harmed files, clocks, and its own deaths.

In each case: no wrong byte, "absent" told apart from "could not be read", nobody blocked beyond its deadline, recovery
without a restart of the client, and a reason in the counters.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock import KeyChain, SpaceHandle
from penstock.types import FetchEnd
from tests.conftest import Scale
from tests.faults.harmed import harming, jumping, said
from tests.faults.tier_load import (
    FETCH_S,
    GRACE_S,
    check,
    disk,
    displace,
    fetch,
    must_store,
    on_tier,
)
from tests.support import MIB, SPACE, Client, Keeper, chain, contents, small_geometry, until, wait_stopped

pytestmark = pytest.mark.faults

N_BLOCKS = 24
STOCK = 20


class Pair:
    """A pool over two disks, "one" and "two", that can be harmed; every block goes to both."""

    def __init__(self, keeper: Keeper, folder: Path) -> None:
        self.keeper = keeper
        self.one, self.two = folder / "one", folder / "two"
        self.pool = keeper.open()
        self.handle = self.pool.space(SPACE)
        self.number = 0
        self.stock: list[KeyChain] = []
        self.numbers: list[int] = []
        self.seed = (0, 0)
        """Of the chain that was given last."""

    def below(self) -> KeyChain:
        """A chain that no test had before, that both disks have and the pool has not."""
        if not self.stock or self.pool.resident(self.handle, self.stock[-1].array).any():
            self._restock()
        self.seed = (50, self.numbers.pop())
        return self.stock.pop()

    def _restock(self) -> None:
        """Many at once: a pool full of other blocks has to be stored until they have left."""
        self.stock, self.numbers = [], []
        for _ in range(STOCK):
            self.number += 1
            self.numbers.append(self.number)
            self.stock.append(chain(50, self.number, blocks=N_BLOCKS))
            must_store(self.pool, self.handle, self.stock[-1])
        until(self._idle, "both have them")
        self.displace(self.stock[-1])
        assert not any(self.pool.resident(self.handle, keys.array).any() for keys in self.stock)

    def displace(self, keys: KeyChain) -> None:
        """Until nothing of this chain, and of what was stored before, is in the pool."""
        self.number += 1
        displace(self.pool, self.handle, keys, 60_000 + self.number)
        until(self._idle, "what displaced it is written, too")

    def _idle(self) -> bool:
        orders = self.keeper.tier_report()["orders"]
        return bool(orders["in_flight"] == 0 and orders["waiting"] == 0)

    @contextlib.contextmanager
    def only_one(self, **harm: str) -> Iterator[None]:
        """The second disk has nothing, and the first one does that."""
        with said(self.two, holds="hidden", read="hidden"), said(self.one, **harm):
            yield

    def fetch(self, keys: KeyChain, seconds: float = FETCH_S) -> FetchEnd:
        return fetch(self.pool, self.handle, keys, seconds)

    def counters(self, tier: str = "one") -> dict[str, int]:
        counted: dict[str, int] = self.keeper.tier(tier)["counters"]
        return counted

    def recovers(self, keys: KeyChain) -> None:
        """The same client gets it all, once there is nothing wrong any more."""
        until(lambda: self.fetch(keys) is FetchEnd.DONE, "it is back")
        assert check(self.pool, self.handle, keys) == len(keys)
        self.keeper.fsck()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    tiers = [disk(folder / name, "harmed", name=name, timeout="0.5") for name in ("one", "two")]
    keeper = Keeper(small_geometry(16 * MIB, lanes=6), tiers=tiers, replicas=["2"])
    try:
        keeper.start(harming)
        keeper.wait_touched()
        keeper.tier_report()
        world = Pair(keeper, folder)
        yield world
        world.pool.close()
    finally:
        keeper.__exit__()


# ---- a device that fails, or does nothing


@pytest.mark.parametrize("kind", ["error", "short", "defect", "late"])
def test_a_read_that_fails_is_not_an_absence(pair: Pair, kind: str) -> None:
    keys = pair.below()
    before = pair.counters()
    with pair.only_one(read=kind):
        fetched = pair.pool.fetch(pair.handle, keys, FETCH_S)
        assert fetched.wait() is FetchEnd.READ_FAILED
        assert (fetched.arrived, fetched.tier) == (0, "one")
    after = pair.counters()
    reason = {"error": "unavailable", "short": "failed", "defect": "defects", "late": "timeouts"}[kind]
    assert after[reason] > before[reason]
    assert pair.keeper.tier("one")["why"] and "hunter2" not in pair.keeper.tier("one")["why"]
    pair.recovers(keys)
    until(lambda: pair.keeper.tier("one")["up"], "it is asked again")


def test_while_a_tier_is_left_alone_its_blocks_are_not_absent(pair: Pair) -> None:
    """The breaker is open: nobody asks the tier, so nobody knows that it lacks the block."""
    keys, absent = pair.below(), chain(51, blocks=3)
    with pair.only_one(read="error", holds="error"):
        assert pair.fetch(keys) is FetchEnd.READ_FAILED
        assert pair.fetch(absent) is FetchEnd.READ_FAILED
    until(lambda: pair.fetch(absent) is FetchEnd.ABSENT, "it answers again")
    pair.recovers(keys)


def test_a_flipped_bit_is_damage_and_the_copy_is_dropped(pair: Pair) -> None:
    keys = pair.below()
    before = pair.counters()["damaged"]
    with pair.only_one(read="flip"):
        assert pair.fetch(keys) is FetchEnd.DAMAGED
    assert pair.counters()["damaged"] > before
    assert check(pair.pool, pair.handle, keys) == 0
    pair.recovers(keys)  # from the other disk


def test_a_wrong_root_is_damage_too(pair: Pair) -> None:
    keys = pair.below()
    with pair.only_one(read="root"):
        assert pair.fetch(keys) is FetchEnd.DAMAGED
    pair.recovers(keys)


def test_blocks_that_are_swapped_are_damage(pair: Pair) -> None:
    """Whole blocks with good roots, under each other's keys."""
    keys = pair.below()
    with pair.only_one(read="swap"):
        assert pair.fetch(keys) is FetchEnd.DAMAGED
    assert check(pair.pool, pair.handle, keys) == 0
    pair.recovers(keys)


def test_a_device_that_hangs_costs_the_deadline_and_no_more(pair: Pair) -> None:
    """What it returns later goes into slots that nobody has been given meanwhile."""
    keys, here = pair.below(), chain(52, blocks=30)
    with pair.only_one(read="stand"):
        started = time.monotonic()
        assert pair.fetch(keys, 0.3) is FetchEnd.DEADLINE
        assert time.monotonic() - started >= 0.3
        must_store(pair.pool, pair.handle, here)
        assert check(pair.pool, pair.handle, here) == 30
        ends = [pair.fetch(keys, 0.2) for _ in range(4)]
        assert set(ends) <= {FetchEnd.DEADLINE, FetchEnd.READ_FAILED}
        until(lambda: not pair.keeper.tier("one")["up"], "it is seen to hang")
        assert pair.keeper.tier("one")["why"]
        assert pair.fetch(keys, 5.0) is FetchEnd.READ_FAILED, "nobody waits for it any more"
    assert check(pair.pool, pair.handle, here) == 30
    pair.recovers(keys)
    until(lambda: mover_row(pair.keeper)["grants"] == 0, "every slot was given back", timeout_s=30)


def mover_row(keeper: Keeper) -> dict[str, int]:
    return {row["name"]: row for row in keeper.stat()["clients"]}["mover"]


def test_what_one_tier_does_not_give_another_does(pair: Pair) -> None:
    for kind in ("error", "short", "flip", "defect"):
        keys = pair.below()
        with said(pair.one, read=kind):
            assert pair.fetch(keys) is FetchEnd.DONE, kind
    pair.recovers(keys)


def test_what_a_hanging_tier_does_not_give_another_does(pair: Pair) -> None:
    """The fetch has the time: it must not spend it all on the first tier, nor must those who come after it."""
    keys = pair.below()
    with said(pair.one, read="stand"):
        several = [pair.pool.fetch(pair.handle, keys, FETCH_S) for _ in range(4)]
        assert [each.wait() for each in several] == [FetchEnd.DONE] * 4
        assert check(pair.pool, pair.handle, keys) == len(keys)
    pair.recovers(keys)


def test_one_bad_block_does_not_end_a_chain_that_only_its_tier_has_whole(pair: Pair) -> None:
    """The second disk has the first half only; a block of that half is bad on the first disk."""
    pair.number += 1
    more = chain(55, pair.number, blocks=2 * N_BLOCKS)
    must_store(pair.pool, pair.handle, more[:N_BLOCKS])
    until(lambda: held(pair, "two", more[:N_BLOCKS]) == N_BLOCKS, "the second disk has one half")
    with said(pair.two, write="lost"):
        must_store(pair.pool, pair.handle, more)
        until(lambda: held(pair, "one", more) == 2 * N_BLOCKS, "the first disk has it all")
        pair.displace(more)
        harm_block(pair.one, more, 5)
        assert pair.fetch(more) is FetchEnd.DONE
        assert check(pair.pool, pair.handle, more) == 2 * N_BLOCKS
    pair.recovers(more)


def held(pair: Pair, tier: str, keys: KeyChain) -> int:
    """How many blocks of a chain that is in the pool a tier has, by its files."""
    folder = pair.one if tier == "one" else pair.two
    files = [path.read_bytes() for path in folder.glob("*") if path.stat().st_size >= MIB]
    return sum(any(block.tobytes() in file for file in files) for block in contents(keys.array))


def harm_block(folder: Path, keys: KeyChain, number: int) -> None:
    """Flip one bit of this block, wherever it lies."""
    needle = contents(keys.array[number : number + 1])[0].tobytes()
    for path in folder.glob("*"):
        if path.is_file() and (at := path.read_bytes().find(needle)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + 1000)
                file.write(bytes([needle[1000] ^ 4]))
            return
    raise AssertionError("the block is in no file")


@pytest.mark.parametrize("kind", ["error", "short", "defect", "late", "stand"])
def test_what_could_not_be_written_is_written_later(pair: Pair, kind: str) -> None:
    pair.number += 1
    keys = chain(53, pair.number, blocks=N_BLOCKS)
    before = pair.keeper.tier_report()["orders"]["refused"]
    with said(pair.one, write=kind):
        must_store(pair.pool, pair.handle, keys)
        if kind == "stand":
            until(lambda: pair.keeper.tier("one")["queue"]["hanging"] > 0, "it is seen to hang")
        else:
            until(lambda: pair.keeper.tier_report()["orders"]["refused"] > before, "it is refused")
        assert check(pair.pool, pair.handle, keys) == N_BLOCKS
    until(lambda: held(pair, "one", keys) == N_BLOCKS, "it is written after all")
    assert check(pair.pool, pair.handle, keys) == N_BLOCKS
    pair.keeper.fsck()


# ---- clients and keepers that die meanwhile


def test_a_client_killed_in_a_fetch_leaves_nothing_behind(pair: Pair) -> None:
    keys = pair.below()
    before = pair.keeper.tier_report()["fetches"]["ended.cancelled"]
    with pair.only_one(read="stand"):
        with Client(fetch_and_hang, pair.keeper.name, pair.seed) as client:
            assert client.receive() == "fetching"
            until(lambda: pair.keeper.tier_report()["fetches"]["running"] == 1, "it runs")
            client.kill()
        until(lambda: pair.keeper.tier_report()["fetches"]["running"] == 0, "it ended with its client")
    assert pair.keeper.tier_report()["fetches"]["ended.cancelled"] == before + 1
    until(lambda: mover_row(pair.keeper)["leases"] == 0, "nothing is held")
    pair.recovers(keys)


def fetch_and_hang(connection: Connection, name: str, seed: tuple[int, ...]) -> None:
    pool = penstock.open(name, client="dying")
    fetched = pool.fetch(pool.space(SPACE), chain(*seed, blocks=N_BLOCKS), 600.0)
    connection.send("fetching")
    fetched.wait()


def test_a_keeper_replaced_while_fetches_run(pair: Pair) -> None:
    """Its mover goes with it: fetches end at once, not at their deadline, and the same client fetches from the next."""
    keys = pair.below()
    with pair.only_one(read="stand"):
        running = [pair.pool.fetch(pair.handle, keys, 60.0) for _ in range(8)]
        until(lambda: pair.keeper.tier_report()["fetches"]["running"] == 8, "they run")
        started = time.monotonic()
        pair.keeper.kill()
        assert {each.wait() for each in running} == {FetchEnd.NO_TIERS}
        assert time.monotonic() - started < 30.0
        assert pair.fetch(keys, 0.5) is FetchEnd.NO_TIERS
    pair.keeper.start(harming)
    pair.keeper.wait_back(pair.pool)
    pair.recovers(keys)


def test_events_that_a_stopped_mover_lost_are_made_up_for_without_new_ones(pair: Pair) -> None:
    """More happens than a socket holds, a commit last; then nothing happens, and still it gets to the disks."""
    touched, keys = chain(54, 1, blocks=16), chain(54, 2, blocks=N_BLOCKS)
    must_store(pair.pool, pair.handle, touched)
    until(lambda: mover_row(pair.keeper)["leases"] == mover_row(pair.keeper)["grants"] == 0, "it holds nothing")
    before = pair.keeper.tier_report()["mover"]
    os.kill(before["pid"], signal.SIGSTOP)
    wait_stopped(before["pid"])
    try:
        for _ in range(150):
            assert check(pair.pool, pair.handle, touched) == 16
            pair.keeper.stat()  # the keeper has told of it, in a packet of its own
        must_store(pair.pool, pair.handle, keys)
        started = time.monotonic()
        pair.pool.locate(pair.handle, keys, wait_s=0.1)
        assert time.monotonic() - started < 0.1 + GRACE_S
    finally:
        os.kill(before["pid"], signal.SIGCONT)
    until(lambda: held(pair, "one", keys) == N_BLOCKS, "it is on the disk")
    assert pair.keeper.tier_report()["mover"]["gaps"] > before["gaps"], "nothing was lost"


# ---- files


def test_clocks_that_jump_move_nothing(tmp_path: Path) -> None:
    keys = chain(3, blocks=N_BLOCKS)
    keeper = Keeper(small_geometry(8 * MIB, lanes=8), tiers=[disk(tmp_path / "disk")])
    try:
        keeper.start(jumping)
        keeper.wait_touched()
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            must_store(pool, handle, keys)
            on_tier(keeper, N_BLOCKS)
            displace(pool, handle, keys, 4)
            assert fetch(pool, handle, keys) is FetchEnd.DONE
            started = time.monotonic()
            assert fetch(pool, handle, chain(5, blocks=3), 0.2) is FetchEnd.ABSENT
            assert time.monotonic() - started < 0.2 + GRACE_S
        keeper.fsck()
    finally:
        keeper.__exit__()


HARMS = ("bit in data", "bit in index", "data cut", "index cut", "data gone", "index gone", "data empty", "index zero")


def test_harmed_files_never_give_a_wrong_byte(scale: Scale, tmp_path: Path) -> None:
    """Each slab's files are harmed in another way; what comes back is right, and the rest is counted as gone."""
    rng = np.random.default_rng(12)
    folder = tmp_path / "disk"
    chains = [chain(6, number, blocks=16) for number in range(3 * len(HARMS))]
    lost = damaged = 0
    with Keeper(small_geometry(8 * MIB, lanes=8), tiers=[disk(folder, slab="64K", size="16M")]) as keeper:
        for round_ in range(scale.of(1, 12)):
            _store_again(keeper, chains)
            keeper.stop()
            keeper.remove()
            slabs = sorted(path for path in folder.glob("*") if path.stat().st_size >= 64 << 10)
            assert len(slabs) >= len(HARMS)
            for slab, how in zip(slabs[round_ % 3 :], HARMS, strict=False):
                harm_slab(slab, how, rng)
            keeper.start()
            keeper.tier_report()
            with keeper.open() as pool:
                handle = pool.space(SPACE)
                ends = [fetch(pool, handle, keys) for keys in chains]
                assert set(ends) <= {FetchEnd.DONE, FetchEnd.ABSENT, FetchEnd.DAMAGED, FetchEnd.READ_FAILED}
                assert FetchEnd.DONE in ends
                lost += len(ends) - ends.count(FetchEnd.DONE)
                damaged += keeper.tier("disk")["counters"]["damaged"]
            keeper.fsck()
    # In sum: a file that is harmed may be one that lost its blocks in an earlier round.
    assert lost > 0 and damaged > 0


def _store_again(keeper: Keeper, chains: list[KeyChain]) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        for keys in chains:
            must_store(pool, handle, keys)
        on_tier(keeper, sum(len(keys) for keys in chains))
        until(lambda: keeper.tier_report()["orders"]["in_flight"] == 0, "all is written")


def harm_slab(slab: Path, how: str, rng: np.random.Generator) -> None:
    """Do this to a slab's file, or to the file of rows beside it."""
    [rows] = [path for path in slab.parent.glob(f"{slab.stem}.*") if path != slab]
    kind = how.split()[-1]
    path = rows if "index" in how else slab
    if how.startswith("bit in"):
        data = bytearray(path.read_bytes())
        for _ in range(16):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    elif kind == "cut":
        os.truncate(path, int(rng.integers(path.stat().st_size)))
    elif kind == "gone":
        path.unlink()
    elif kind == "empty":
        os.truncate(path, 0)
    else:
        path.write_bytes(bytes(path.stat().st_size))


# ---- the file system


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 48 MiB of its own, on a device that lies in `backing` beside it, which can be filled, too."""
    base = tmp_path_factory.mktemp("volume")
    backing, folder = base / "backing", base / "mounted"
    for each in (backing, folder):
        each.mkdir()
    with contextlib.ExitStack() as stack:
        mount(stack, "-t", "tmpfs", "-o", "size=56m", "tmpfs", str(backing))
        image = backing / "image"
        with image.open("wb") as file:
            file.truncate(48 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True, capture_output=True)
        mount(stack, "-o", "loop,errors=continue", str(image), str(folder))
        yield folder


def mount(stack: contextlib.ExitStack, *arguments: str) -> None:
    """Until the stack is closed; skips where it is not allowed."""
    if subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    where = arguments[-1]
    stack.callback(
        until, lambda: subprocess.run(["umount", where], capture_output=True).returncode == 0, "it is not used any more"
    )


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Somebody else takes all the room there is."""
    hog = folder / "hog"
    with hog.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    try:
        yield
    finally:
        hog.unlink()


@pytest.fixture(scope="module")
def mounted(volume: Path) -> Iterator[tuple[Keeper, penstock.Pool, SpaceHandle, Path]]:
    """A pool over a directory there."""
    folder = volume / "disk"
    with Keeper(
        small_geometry(8 * MIB, lanes=8), tiers=[disk(folder, size="32M", slab="1M", keep_free="4M")]
    ) as keeper:
        keeper.tier_report()
        with keeper.open() as pool:
            yield keeper, pool, pool.space(SPACE), folder


Mounted = tuple[Keeper, penstock.Pool, SpaceHandle, Path]


def written_below(mounted: Mounted, seed: int) -> KeyChain:
    """A chain that the disk has and the pool has not."""
    keeper, pool, handle, _ = mounted
    keys = chain(20, seed, blocks=N_BLOCKS)
    until(lambda: keeper.tier("disk")["up"], "it is up")
    before = keeper.tier("disk")["counters"]["stored"]
    must_store(pool, handle, keys)
    until(lambda: keeper.tier("disk")["counters"]["stored"] >= before + N_BLOCKS, "it is on the disk")
    displace(pool, handle, keys, 100 + seed)
    return keys


def test_a_device_that_fails_writes_still_gives_and_is_used_again(mounted: Mounted) -> None:
    """The device has no room behind it, which the file system does not know: writes fail where nothing was before."""
    keeper, pool, handle, folder = mounted
    keys = written_below(mounted, 3)
    before = failures(keeper)
    with filled(folder.parent.parent / "backing"):
        number = 0
        while failures(keeper) == before:
            number += 1
            assert number < 200, "there were no errors"
            must_store(pool, handle, chain(22, number, blocks=64))
            until(lambda: keeper.tier_report()["orders"]["in_flight"] == 0, "it was tried")
        assert fetch(pool, handle, keys) in (FetchEnd.DONE, FetchEnd.ABSENT)
    again = written_below(mounted, 4)
    until(lambda: fetch(pool, handle, again) is FetchEnd.DONE, "it takes and gives again")
    keeper.fsck()


def failures(keeper: Keeper) -> int:
    """Blocks or system calls that found no room, or failed."""
    counters = keeper.tier("disk")["counters"]
    return int(counters["errors"] + counters["no_room"])


def test_a_disk_that_others_fill_takes_less_and_gives_what_it_has(mounted: Mounted) -> None:
    keeper, pool, handle, folder = mounted
    keys = written_below(mounted, 1)
    with filled(folder.parent):
        for number in range(20):
            must_store(pool, handle, chain(21, number, blocks=64))
        assert fetch(pool, handle, keys) in (FetchEnd.DONE, FetchEnd.ABSENT)
        counters = keeper.tier("disk")["counters"]
        assert counters["no_room"] + counters["write_failed"] + counters["evictions"] > 0, counters
    again = written_below(mounted, 2)
    until(lambda: fetch(pool, handle, again) is FetchEnd.DONE, "it takes and gives again")
    keeper.fsck()


def test_a_directory_that_is_taken_away_comes_back(tmp_path: Path) -> None:
    folder, aside = tmp_path / "disk", tmp_path / "aside"
    keys = chain(23, blocks=N_BLOCKS)
    with Keeper(small_geometry(8 * MIB, lanes=8), tiers=[disk(folder)]) as keeper, keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, keys)
        on_tier(keeper, N_BLOCKS)
        displace(pool, handle, keys, 24)
        until(lambda: keeper.tier_report()["orders"]["in_flight"] == 0, "all is written")
        folder.rename(aside)
        absent = chain(28, blocks=2)
        until(lambda: fetch(pool, handle, absent) is FetchEnd.READ_FAILED, "it is gone, which is not absent")
        assert fetch(pool, handle, keys) is FetchEnd.READ_FAILED
        until(lambda: "gone" in keeper.tier("disk")["why"], "the reason is shown")
        must_store(pool, handle, chain(25, blocks=8))
        aside.rename(folder)
        until(lambda: fetch(pool, handle, keys) is FetchEnd.DONE, "it is back")
        assert check(pool, handle, keys) == N_BLOCKS
        keeper.fsck()


def test_a_directory_that_another_pool_has_is_used_when_it_is_free(tmp_path: Path) -> None:
    """Two pools, one directory: the second goes on without, and takes over when the first has ended."""
    keys, address = chain(26, blocks=N_BLOCKS), disk(tmp_path / "disk")
    with Keeper(small_geometry(8 * MIB, lanes=8), tiers=[address]) as second:
        first = Keeper(small_geometry(8 * MIB, lanes=8), tiers=[address])
        second.tier_report()
        with first:
            first.tier_report()
            assert first.tier("disk")["blocks"] is None
            with first.open() as pool:
                must_store(pool, pool.space(SPACE), keys)
                assert fetch(pool, pool.space(SPACE), chain(27, blocks=2)) is FetchEnd.READ_FAILED
            second.stop()
            on_tier(first, N_BLOCKS)
            second.start()
