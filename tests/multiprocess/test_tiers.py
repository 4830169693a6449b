"""A pool with tiers below it, as processes: keeper, mover and clients are real, and so are the files."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock import Intent, KeyChain, SpaceHandle
from penstock.runtime.mover.claims import WAITING_AT_ONCE
from penstock.types import FetchEnd, Urgency
from tests.support import (
    PATIENCE_S,
    SPACE,
    Keeper,
    assert_resident,
    chain,
    contents,
    read,
    small_geometry,
    until,
    wait_stopped,
)
from tests.support import must_store as must_store_part
from tests.tiered import replace_pool

FETCH_S = 20.0
"""Time for a fetch that is to succeed; a guard against hangs."""


def disk(path: Path, options: str = "write=through") -> str:
    return f"disk:{path}?size=64M&slab=1M&{options}"


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    with Keeper(small_geometry(), tiers=[disk(tmp_path / "disk")]) as keeper:
        yield keeper


def on_disk(keeper: Keeper, n: int, tier: str = "disk") -> None:
    """Wait until a tier has this many blocks."""
    until(lambda: (keeper.tier(tier)["blocks"] or 0) >= n, f"{n} blocks in {tier}")


def must_store(pool: penstock.Pool, handle: SpaceHandle, keys: KeyChain) -> None:
    """Store a chain of any length; a small pool grants few slots at once."""
    for first in range(0, len(keys), 64):
        must_store_part(pool, handle, keys[first : first + 64])


def fetch(pool: penstock.Pool, handle: SpaceHandle, keys: KeyChain, seconds: float = FETCH_S) -> penstock.FetchEnd:
    with pool.fetch(handle, keys, seconds) as fetched:
        return fetched.wait()


def test_blocks_survive_the_loss_of_the_pool(keeper: Keeper) -> None:
    keys = chain(1, blocks=40)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 40)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        with pool.match(handle, keys) as lease:
            assert len(lease) == 0
        below = pool.locate(handle, keys, wait_s=PATIENCE_S)
        assert (below.here, below.n_blocks, [run.tier for run in below.runs]) == (0, 40, ["disk"])
        assert below.seconds > 0
        fetched = pool.fetch(handle, keys, FETCH_S)
        assert fetched.wait() is FetchEnd.DONE
        assert (fetched.arrived, fetched.moved) == (40, 40)
        assert_resident(pool, handle, keys)
        assert pool.locate(handle, keys, wait_s=PATIENCE_S).here == 40
    keeper.fsck()
    counters = keeper.tier("disk")["counters"]
    assert counters["good"] == 40 and counters["damaged"] == 0


def test_what_is_there_is_not_moved_again(keeper: Keeper) -> None:
    keys = chain(2, blocks=20)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, keys)
        on_disk(keeper, 20)
        fetched = pool.fetch(handle, keys, FETCH_S)
        assert fetched.wait() is FetchEnd.DONE
        assert (fetched.arrived, fetched.moved) == (20, 0)


def test_a_chain_that_no_tier_has_ends_where_it_ends(keeper: Keeper) -> None:
    keys = chain(3, blocks=30)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys[:12])
    on_disk(keeper, 12)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        fetched = pool.fetch(handle, keys, FETCH_S)
        assert fetched.wait() is FetchEnd.ABSENT
        assert fetched.arrived == 12
        assert_resident(pool, handle, keys[:12])


def test_a_pool_without_tiers_says_so() -> None:
    with Keeper(small_geometry()) as keeper, keeper.open() as pool:
        handle, keys = pool.space(SPACE), chain(4, blocks=3)
        assert pool.locate(handle, keys).why is FetchEnd.NO_TIERS
        assert fetch(pool, handle, keys) is FetchEnd.NO_TIERS


def test_a_large_chain_comes_in_pieces_through_a_pool_that_evicts(keeper: Keeper) -> None:
    """More than the pool may hand out at once, into one that is full of other blocks."""
    keys = chain(5, blocks=1500)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys[:700])
        must_store(pool, pool.space(SPACE), keys[700:])
    on_disk(keeper, 1500)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        for seed in range(4):
            must_store(pool, handle, chain(100 + seed, blocks=900))
        assert fetch(pool, handle, keys) is FetchEnd.DONE
        assert_resident(pool, handle, keys)
    keeper.fsck()


def test_two_fetches_of_one_chain_read_it_once(keeper: Keeper) -> None:
    keys = chain(6, blocks=600)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 600)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        pair = [pool.fetch(handle, keys, FETCH_S) for _ in range(2)]
        assert [each.wait() for each in pair] == [FetchEnd.DONE, FetchEnd.DONE]
        assert sum(each.moved for each in pair) == 600
        assert_resident(pool, handle, keys)


def test_a_mover_that_is_stopped_costs_the_deadline_and_no_more(keeper: Keeper) -> None:
    keys = chain(7, blocks=50)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 50)
    replace_pool(keeper)
    mover = keeper.tier_report()["mover"]["pid"]
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        os.kill(mover, signal.SIGSTOP)
        wait_stopped(mover)
        try:
            assert fetch(pool, handle, keys, 0.2) in (FetchEnd.DEADLINE, FetchEnd.BUSY)
            assert pool.locate(handle, keys, wait_s=0.1).n_blocks == 0
            must_store(pool, handle, chain(8, blocks=5))
        finally:
            os.kill(mover, signal.SIGCONT)
        assert fetch(pool, handle, keys) is FetchEnd.DONE
        assert_resident(pool, handle, keys)


def test_a_mover_that_dies_is_started_again(keeper: Keeper) -> None:
    keys = chain(9, blocks=50)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, keys)
        on_disk(keeper, 50)
        os.kill(keeper.tier_report()["mover"]["pid"], signal.SIGKILL)
        until(lambda: keeper.tier_report()["mover"]["restarts"] == 1, "it is back")
        more = chain(10, blocks=30)
        must_store(pool, handle, more)
        on_disk(keeper, 80)
        assert_resident(pool, handle, keys)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        assert [fetch(pool, handle, each) for each in (keys, more)] == [FetchEnd.DONE] * 2
        assert_resident(pool, handle, more)
    keeper.fsck()


def test_the_mover_ends_with_a_killed_keeper(keeper: Keeper) -> None:
    mover = keeper.tier_report()["mover"]["pid"]
    keeper.kill()
    until(lambda: not Path(f"/proc/{mover}").exists() or _is_zombie(mover), "the mover is gone")
    keeper.start()
    assert keeper.tier_report()["mover"]["pid"] != mover


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_damaged_blocks_never_come_back(keeper: Keeper, tmp_path: Path) -> None:
    keys = chain(11, blocks=30)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 30)
    keeper.stop()
    keeper.remove()
    _damage(tmp_path / "disk", contents(keys.array[17:18])[0])
    keeper.start()
    keeper.tier_report()
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        fetched = pool.fetch(handle, keys, FETCH_S)
        assert fetched.wait() is FetchEnd.DAMAGED
        assert (fetched.arrived, fetched.tier) == (17, "disk")
        with pool.match(handle, keys) as lease:
            assert np.array_equal(read(lease, handle), contents(keys.array[:17]))
        assert fetch(pool, handle, keys) is FetchEnd.ABSENT, "the damaged copy is dropped"
    assert keeper.tier("disk")["counters"]["damaged"] == 1


def _damage(folder: Path, block: np.ndarray) -> None:  # type: ignore[type-arg]
    """Flip one bit of this block, wherever it lies."""
    needle = block.tobytes()
    for path in folder.rglob("*"):
        if path.is_file() and (at := path.read_bytes().find(needle)) >= 0:
            with path.open("r+b") as file:
                file.seek(at + 1000)
                file.write(bytes([needle[1000] ^ 4]))
            return
    raise AssertionError("the block is in no file")


def test_a_second_tier_replaces_what_the_first_damaged(tmp_path: Path) -> None:
    tiers = [disk(tmp_path / name, f"write=through&name={name}") for name in ("one", "two")]
    keys = chain(12, blocks=30)
    with Keeper(small_geometry(), tiers=tiers, replicas=["2"]) as keeper:
        with keeper.open() as pool:
            must_store(pool, pool.space(SPACE), keys)
        on_disk(keeper, 30, "one")
        on_disk(keeper, 30, "two")
        keeper.stop()
        keeper.remove()
        _damage(tmp_path / "one", contents(keys.array[9:10])[0])
        keeper.start()
        keeper.tier_report()
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            assert fetch(pool, handle, keys) is FetchEnd.DONE
            assert_resident(pool, handle, keys)
        assert keeper.tier("one")["counters"]["damaged"] == 1


def test_one_time_blocks_stay_off_a_disk_with_second_use(tmp_path: Path) -> None:
    used, unused = chain(13, blocks=20), chain(14, blocks=20)
    with Keeper(small_geometry(), tiers=[disk(tmp_path / "disk", "write=second-use")]) as keeper:
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            must_store(pool, handle, unused)
            must_store(pool, handle, used)
            assert_resident(pool, handle, used)
            on_disk(keeper, 20)
        replace_pool(keeper)
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            assert fetch(pool, handle, unused) is FetchEnd.ABSENT
            assert fetch(pool, handle, used) is FetchEnd.DONE


def test_a_pool_that_overflows_leaves_its_blocks_below(tmp_path: Path) -> None:
    """Written ahead of eviction: nearly everything that was ever stored is in the pool or below it."""
    chains = [chain(20 + seed, blocks=100) for seed in range(60)]
    with Keeper(small_geometry(), tiers=[disk(tmp_path / "disk", "write=eviction")]) as keeper, keeper.open() as pool:
        handle = pool.space(SPACE)
        for keys in chains:
            must_store(pool, handle, keys)
            _wait_saved(keeper)
        lost = keeper.tier_report()["orders"]["lost_unsaved"]
        assert lost < 600, "a tenth of all: what the pool evicts in one go may be ahead of what is clean"
        found = 0
        for keys in chains:
            assert fetch(pool, handle, keys) in (FetchEnd.DONE, FetchEnd.ABSENT)
            with pool.match(handle, keys) as lease:
                assert np.array_equal(read(lease, handle), contents(keys.array[: len(lease)]))
                found += len(lease)
        assert found >= 6000 - lost


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tuple[Keeper, Path]]:
    """A pool over a directory that may lie on another machine, and everything is written there at once."""
    folder = tmp_path / "far"
    folder.mkdir()
    with Keeper(small_geometry(), tiers=[f"file:{folder}?name=far&write=through"]) as keeper:
        yield keeper, folder


def objects(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 4096]


def test_what_a_store_lost_is_written_to_it_again(far: tuple[Keeper, Path]) -> None:
    keeper, folder = far
    keys = chain(80, blocks=8)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, keys)
        until(lambda: len(objects(folder)) == 8, "it is there")
        for path in objects(folder):
            path.unlink()
        # The pool has it, so that nobody fetches it: it is looked after all the same.
        until(lambda: keeper.tier_report()["orders"]["dropped"] == 8, "it is seen to be gone")
        for _ in range(2):
            assert_resident(pool, handle, keys)
        until(lambda: len(objects(folder)) == 8, "it is there again")


def test_what_a_fetch_does_not_find_is_not_believed_to_be_there(far: tuple[Keeper, Path]) -> None:
    keeper, folder = far
    keys = chain(81, blocks=8)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, keys)
        until(lambda: len(objects(folder)) == 8, "it is there")
        replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        assert fetch(pool, handle, keys[:4]) is FetchEnd.DONE
        for path in objects(folder):
            path.unlink()
        assert fetch(pool, handle, keys) is FetchEnd.ABSENT
        must_store(pool, handle, keys)
        until(lambda: len(objects(folder)) >= 4, "what was not there is written")


def test_what_comes_from_a_store_is_not_written_to_it_again(far: tuple[Keeper, Path]) -> None:
    keeper, folder = far
    keys, more = chain(82, blocks=8), chain(83, blocks=2)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
        until(lambda: len(objects(folder)) == 8, "it is there")
        replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        assert fetch(pool, handle, keys) is FetchEnd.DONE
        assert_resident(pool, handle, keys)
        must_store(pool, handle, more)
        until(lambda: len(objects(folder)) == 10, "what came later is written")
        assert keeper.tier("far")["counters"]["present"] == 0
        assert keeper.tier("far")["counters"]["stored"] == 2


def _wait_saved(keeper: Keeper) -> None:
    """Wait until the mover has looked at everything that happened before, and written what it then wanted to write."""
    looks = keeper.tier_report()["mover"]["looks"]

    def saved() -> bool:
        report = keeper.tier_report()
        waiting = report["orders"]["waiting"] + report["orders"]["in_flight"]
        return bool(report["mover"]["looks"] >= looks + 2 and not waiting)

    until(saved, "what was to be written is written")


# ---- the front computed, the back fetched


@pytest.fixture
def below_only(keeper: Keeper) -> KeyChain:
    """A chain of 40 blocks that only the disk has."""
    keys = chain(17, blocks=40)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 40)
    replace_pool(keeper)
    return keys


def was_read(keeper: Keeper, n: int) -> None:
    until(lambda: keeper.tier("disk")["counters"]["good"] == n, f"{n} blocks were read")


def idle(keeper: Keeper) -> bool:
    mover = next(row for row in keeper.stat()["clients"] if row["name"] == "mover")
    return bool(mover["leases"] == 0 and mover["grants"] == 0)


def test_the_back_is_read_ahead_and_published_behind_the_front(keeper: Keeper, below_only: KeyChain) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        n_ahead = pool.most_ahead(handle)
        assert 10 < n_ahead < 35
        with pool.fetch(handle, below_only, FETCH_S, start=5) as fetched:
            was_read(keeper, n_ahead)
            assert not pool.resident(handle, below_only.array).any() and not fetched.poll()
            must_store(pool, handle, below_only[:5])
            assert fetched.wait() is FetchEnd.DONE
        assert (fetched.arrived, fetched.moved) == (40, 35)
        assert_resident(pool, handle, below_only)
    until(lambda: idle(keeper), "the mover gave everything back")
    keeper.fsck()


def test_a_front_that_is_there_already_is_none(keeper: Keeper, below_only: KeyChain) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, below_only[:15])
        assert pool.flush(PATIENCE_S)
        fetched = pool.fetch(handle, below_only, FETCH_S, start=10)
        assert fetched.wait() is FetchEnd.DONE
        assert (fetched.arrived, fetched.moved) == (40, 25)


def test_without_its_front_nothing_arrives_and_nothing_is_held(keeper: Keeper, below_only: KeyChain) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, below_only[:9])
        late = pool.fetch(handle, below_only, 0.3, start=10)
        assert late.wait() is FetchEnd.DEADLINE
        assert (late.arrived, late.moved) == (9, 0)
        given_up = pool.fetch(handle, below_only, FETCH_S, start=10)
        until(lambda: not idle(keeper), "it has read something")
        given_up.cancel()
        until(lambda: idle(keeper), "the mover gave everything back")
        assert pool.resident(handle, below_only.array).sum() == 9
        assert fetch(pool, handle, below_only) is FetchEnd.DONE


def test_who_reads_ahead_leaves_room_for_the_front(keeper: Keeper) -> None:
    """In a pool that is full, and for a chain of which it could not hold a sixteenth unpublished."""
    keys, others = chain(18, blocks=1500), chain(19, blocks=1500)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, keys)
        on_disk(keeper, 1500)
        must_store(pool, handle, others)
        on_disk(keeper, 3000)
        replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, others[:1000])
        with pool.fetch(handle, keys[:1000], FETCH_S, start=400) as fetched:
            until(lambda: not idle(keeper), "it has read something")
            must_store(pool, handle, keys[:400])
            assert fetched.wait() is FetchEnd.DONE
        assert fetched.moved == 600


def test_those_who_wait_for_fronts_leave_room_for_everybody(keeper: Keeper) -> None:
    """However many they are, and although their fronts never come."""
    chains = [chain(number, blocks=100) for number in range(20, 20 + WAITING_AT_ONCE + 4)]
    with keeper.open() as pool:
        for keys in chains:
            must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 100 * len(chains))
    replace_pool(keeper)
    with keeper.open() as pool, contextlib.ExitStack() as running:
        handle = pool.space(SPACE)
        waiting = [running.enter_context(pool.fetch(handle, keys, FETCH_S, start=5)) for keys in chains[:-1]]
        until(lambda: keeper.tier_report()["fetches"]["ended.busy"] == 3, "more may not wait")
        until(lambda: not idle(keeper), "something was read")
        must_store(pool, handle, chain(40, blocks=64))
        assert fetch(pool, handle, chains[-1]) is FetchEnd.DONE
        assert sum(each.poll() for each in waiting) == 3
    until(lambda: idle(keeper), "the mover gave everything back")


@pytest.mark.parametrize("start", [-1, 3, 1 << 70])
def test_a_start_that_cannot_be(keeper: Keeper, below_only: KeyChain, start: int) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        with pool.fetch(handle, below_only, 0.2, start=start) as fetched:
            assert fetched.wait() is (FetchEnd.DONE if start < 0 else FetchEnd.DEADLINE)
        prefetch = pool.fetch(handle, below_only, FETCH_S, start=start, urgency=Urgency.PREFETCH)
        assert prefetch.wait() is (FetchEnd.DONE if start < 0 else FetchEnd.NO_TIERS)
        assert fetch(pool, handle, below_only) is FetchEnd.DONE


def test_what_is_damaged_is_looked_for_elsewhere_before_the_front_comes(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    tiers = [disk(folder, f"write=through&name={folder.name}") for folder in folders]
    keys = chain(50, blocks=20)
    with Keeper(small_geometry(), tiers=tiers) as keeper:
        with keeper.open() as pool:
            must_store(pool, pool.space(SPACE), keys)
        for folder in folders:
            on_disk(keeper, 20, folder.name)
        keeper.stop()
        _damage(folders[0], contents(keys.array)[8])
        keeper.remove()
        keeper.start()
        keeper.wait_touched()
        keeper.tier_report()
        with keeper.open() as pool:
            handle = pool.space(SPACE)
            with pool.fetch(handle, keys, FETCH_S, start=8) as fetched:
                until(lambda: keeper.tier("second")["counters"]["good"] >= 1, "the other tier was asked")
                must_store(pool, handle, keys[:8])
                assert fetched.wait() is FetchEnd.DONE
            assert_resident(pool, handle, keys)


# ---- the end


def test_a_prefetch_goes_on_without_its_owner(keeper: Keeper) -> None:
    keys = chain(15, blocks=100)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 100)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        pool.fetch(handle, keys, FETCH_S, urgency=Urgency.PREFETCH, intent=Intent(session="s", tenant="t"))
        until(lambda: pool.resident(handle, keys.array).all(), "it came")


def test_a_plan_that_cannot_work_ends_the_keeper_with_a_reason(tmp_path: Path) -> None:
    keeper = Keeper(small_geometry(), tiers=[f"disk:{tmp_path}?szie=64M&write=through"])
    try:
        keeper.start()
        assert keeper.process is not None
        keeper.process.join(PATIENCE_S)
        assert keeper.process.exitcode not in (0, None)
    finally:
        if keeper.process is not None:
            keeper.process.close()
            keeper.process = None
        keeper.remove()


def test_nothing_is_held_when_all_is_done(keeper: Keeper) -> None:
    keys = chain(16, blocks=200)
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), keys)
    on_disk(keeper, 200)
    replace_pool(keeper)
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        fetched = pool.fetch(handle, keys, FETCH_S)
        fetched.cancel()
        assert fetch(pool, handle, keys) is FetchEnd.DONE
    until(lambda: idle(keeper), "the mover gave everything back")
