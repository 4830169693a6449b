"""`kill -9` of the keeper, the mover and clients while blocks go to a disk and come back, at random moments."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from penstock.types import FetchEnd
from tests.conftest import Scale
from tests.faults.harmed import quickly
from tests.faults.tier_load import (
    FETCH_S,
    GRACE_S,
    Lived,
    check,
    disk,
    fetch,
    must_store,
    on_tier,
    run,
)
from tests.support import MIB, SPACE, Client, Keeper, chain, small_geometry, until

pytestmark = pytest.mark.faults

LIVES_IN_A_POOL = 5
"""Keepers; each is killed behind two movers and some clients."""
MAYFLIES = 5
BUDGET = 5_000
"""Blocks that one client writes: the disk holds all that clients write, so that nothing has to leave it."""
ANCHOR = 48


class Ordeal:
    """One pool over one disk, two lasting clients, this process as a third one."""

    def __init__(self, keeper: Keeper, seed: int, mayflies: int) -> None:
        self.keeper, self.seed, self.mayflies = keeper, seed, mayflies
        self.rng = np.random.default_rng([seed, 3])
        self.pool = keeper.open("witness")
        self.handle = self.pool.space(SPACE)
        self.anchor = chain(seed, 99, 99, blocks=ANCHOR)
        must_store(self.pool, self.handle, self.anchor)
        on_tier(keeper, ANCHOR)
        self.clients = [Client(run, keeper.name, number, BUDGET) for number in (1, 2)]
        for client in self.clients:
            assert client.receive() == "working"
        self.kills: Counter[str] = Counter()
        self.damaged = 0

    def life(self, *, replaced: bool) -> None:
        """Two movers, some clients and the keeper die; with `replaced` the pool's memory is lost, too."""
        movers = [self._kill_mover() for _ in range(2)]
        assert len(set(movers)) == 2, "the keeper started another one"
        self._kill_clients()
        self._count_damage()
        self.keeper.kill()
        self.kills["keeper"] += 1
        if replaced:
            self.keeper.remove()
        self.keeper.start(quickly)
        self._must_be_true()

    def _kill_mover(self) -> int:
        """At any moment from its very start on."""
        pid: int = until(lambda: mover_of(self.keeper.pid), "there is a mover")
        if self.rng.random() < 0.7:
            self.keeper.tier_report()  # it is at work
        time.sleep(float(self.rng.uniform(0, 0.5)))  # what is waited for is chance
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        until(lambda: mover_of(self.keeper.pid) not in (0, pid), "another one")
        self.kills["mover"] += 1
        return pid

    def _kill_clients(self) -> None:
        for _ in range(self.mayflies):
            with Client(run, self.keeper.name, 1000 + self.kills["client"], BUDGET) as mayfly:
                assert mayfly.receive() == "working"
                time.sleep(float(self.rng.uniform(0, 0.1)))
                mayfly.kill()
            self.kills["client"] += 1

    def _count_damage(self) -> None:
        self.damaged += self.keeper.tier("disk")["counters"]["damaged"]

    def _must_be_true(self) -> None:
        """The pool is whole, this process is back by itself, and what was on the disk before all this comes back."""
        self.keeper.fsck()
        self.keeper.tier_report()
        self.keeper.wait_back(self.pool)
        until(
            lambda: fetch(self.pool, self.handle, self.anchor, FETCH_S) is FetchEnd.DONE,
            "the disk is there, and has what it had",
        )
        assert check(self.pool, self.handle, self.anchor) == ANCHOR
        for client in self.clients:
            client.send("pulse")
        for client in self.clients:
            assert client.receive() == "back"

    def end(self) -> tuple[list[Lived], int]:
        """What the clients lived through, and how many blocks of theirs came from the disk into an empty pool."""
        lived = []
        for client in self.clients:
            client.send("end")
        for client in self.clients:
            lived.append(client.receive())
            client.join()
        self.pool.close()
        self.keeper.stop()
        self.keeper.remove()
        self.keeper.start(quickly)
        self.keeper.tier_report()
        came = 0
        with self.keeper.open() as pool:
            handle = pool.space(SPACE)
            for each in lived:
                for seed, n in each.written:
                    keys = chain(*seed, blocks=16)[:n]
                    why = fetch(pool, handle, keys)
                    assert why in (FetchEnd.DONE, FetchEnd.ABSENT), why
                    came += check(pool, handle, keys)
            self._count_damage()
        self.keeper.fsck()
        return lived, came


def mover_of(keeper: int) -> int:
    """The keeper's mover; 0 while there is none."""
    with contextlib.suppress(OSError):
        for pid in (Path(f"/proc/{keeper}/task/{keeper}/children").read_text()).split():
            with contextlib.suppress(OSError):
                if b"penstock.runtime.mover" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return int(pid)
    return 0


def ordeal(folder: Path, seed: int, kills: int, mayflies: int) -> Counter[str]:
    """About so many kills in one pool after the other."""
    done: Counter[str] = Counter()
    while done.total() < kills:
        path = folder / f"disk-{seed}-{done.total()}"
        with Keeper(small_geometry(4 * MIB, lanes=8), tiers=[disk(path, size="96M")]) as keeper:
            one = Ordeal(keeper, seed + done.total(), mayflies)
            try:
                for life in range(LIVES_IN_A_POOL):
                    one.life(replaced=life % 2 == 1)
                    if (done + one.kills).total() >= kills:
                        break
                lived, came = one.end()
            finally:
                for client in one.clients:
                    client.__exit__()
        done += one.kills
        assert one.damaged == 0, "after kill -9 a block is whole or gone"
        assert came > 0, "nothing was on the disk"
        for each in lived:
            assert each.longest_s < GRACE_S, f"a client was blocked for {each.longest_s:.2f} s beyond its deadline"
            assert len(each.written) > 5 and each.checked > 0, "the clients did nothing"
            assert each.ends["DAMAGED"] == 0, each.ends
        assert sum(each.ends["DONE"] for each in lived) > 0, [each.ends for each in lived]
    return done


def test_kill_9_of_keeper_mover_and_clients_never_makes_a_wrong_byte(scale: Scale, tmp_path: Path) -> None:
    pools = scale.of(1, 2)  # at once, one for each processor
    each, mayflies = scale.of(4, 40), scale.of(1, MAYFLIES)
    with ThreadPoolExecutor(pools) as threads:
        pending = [threads.submit(ordeal, tmp_path, 7_000 * (1 + number), each, mayflies) for number in range(pools)]
        kills = sum((one.result() for one in pending), Counter[str]())
    print(f"killed: {dict(kills)}")
    assert kills.total() >= pools * each
