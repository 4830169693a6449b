"""The command line on a real pool, and what becomes of clients when its keeper stops, or its segment is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import penstock
from penstock import Intent
from penstock.errors import KeeperError, NoKeeper
from penstock.pool import segment as segments
from penstock.types import Drop, Miss
from tests.support import (
    MIB,
    PATIENCE_S,
    ROOT,
    SPACE,
    Client,
    Keeper,
    assert_resident,
    chain,
    contents,
    environment,
    must_store,
    penstock_cli,
    read,
    small_geometry,
    store,
    tensors,
    unique_name,
    until,
)

KEYS = chain(1, blocks=12)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(8 * MIB)) as running:
        yield running


@contextlib.contextmanager
def served(name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`penstock serve` as a user starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock", "serve", "--name", name, *options],
        env=environment(), stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def opened(name: str) -> penstock.Pool:
    """The pool, as soon as it is served."""

    def attach() -> penstock.Pool | None:
        try:
            return penstock.open(name)
        except NoKeeper:
            return None

    pool: penstock.Pool = until(attach, f"pool {name} is served")
    return pool


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_in_order_and_the_pool_stays(number: signal.Signals) -> None:
    name = unique_name()
    try:
        with served(name, "--size", "64M") as process:
            with opened(name) as pool:
                must_store(pool, pool.space(SPACE), KEYS)
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == 0
        assert json.loads(penstock_cli("fsck", "--name", name, "--json").stdout)["blocks"] == len(KEYS)
        with served(name) as process, opened(name) as pool:
            assert_resident(pool, pool.space(SPACE), KEYS)
            assert "stop it first" in penstock_cli("rm", "--name", name, check=False).stderr
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == 0
        penstock_cli("rm", "--name", name)
        assert not segments.default_path(name).exists()
        assert "no segment" in penstock_cli("rm", "--name", name, check=False).stderr
    finally:
        for path in (segments.default_path(name), segments.lock_path(segments.default_path(name))):
            path.unlink(missing_ok=True)


def test_stat_and_ls_say_what_is_there(keeper: Keeper) -> None:
    with keeper.open("an engine") as pool:
        handle = pool.space(SPACE, "a label")
        intent = Intent(session="talk", tenant="house", priority=3)
        blocks = tensors(contents(KEYS.array))
        assert pool.store(handle, KEYS, blocks, wait_s=5.0, intent=intent).n_blocks == len(KEYS)
        assert pool.flush(PATIENCE_S)
        lease = pool.match(handle, KEYS)
        until(lambda: keeper.counters()["touches"] >= len(KEYS), "the hits are taken in")
        report = json.loads(penstock_cli("stat", "--name", keeper.name, "--json").stdout)
        (client,) = report["clients"]
        assert (client["name"], client["pid"], client["alive"]) == ("an engine", os.getpid(), True)
        assert (client["leases"], report["blocks"]) == (len(KEYS), len(KEYS))
        assert report["counters"]["clients"]["blocks_hit"] == len(KEYS)
        assert report["counters"]["keeper"]["applied"] == len(KEYS)
        listed = json.loads(penstock_cli("ls", "--name", keeper.name, "--json").stdout)
        (space,), (row,) = listed["spaces"], listed["chains"]
        assert (space["label"], space["blocks"]) == ("a label", len(KEYS))
        assert (row["blocks"], row["session"], row["tenant"], row["priority"]) == (len(KEYS), "talk", "house", 3)
        assert "an engine" in penstock_cli("stat", "--name", keeper.name).stdout
        assert "a label" in penstock_cli("ls", "--name", keeper.name).stdout
        lease.release()


def test_fsck_says_what_is_wrong_and_ends_with_one(keeper: Keeper) -> None:
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), KEYS)
        assert "0 problems" in penstock_cli("fsck", "--name", keeper.name).stdout
        with pool.match(pool.space(SPACE), KEYS) as lease:
            lease._at.data.array[int(lease._located().payloads[2]) - lease._at.data.address] ^= 1
        done = penstock_cli("fsck", "--name", keeper.name, check=False)
        assert done.returncode == 1 and "wrong checksum" in done.stdout
        assert penstock_cli("fsck", "--name", keeper.name, "--quick").returncode == 0


def _linger(connection: object, name: str) -> None:
    pool = penstock.open(name, client="lingers")
    lease = pool.match(pool.space(SPACE), KEYS)
    connection.send(len(lease))  # type: ignore[attr-defined]
    signal.pause()


def test_kick_ends_a_client_and_takes_back_what_it_held(keeper: Keeper) -> None:
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), KEYS)
        with Client(_linger, keeper.name) as client:
            assert client.receive() == len(KEYS)
            (lane,) = (row["lane"] for row in keeper.stat()["clients"] if row["name"] == "lingers")
            done = penstock_cli("kick", str(lane), "--name", keeper.name)
            assert f"pid {client.pid}" in done.stdout
            client.process.join(PATIENCE_S)
            assert client.process.exitcode == -signal.SIGKILL
        assert len(keeper.stat()["clients"]) == 1
        done = penstock_cli("kick", str(lane), "--name", keeper.name, check=False)
        assert done.returncode == 1 and "stat" in done.stderr


@pytest.mark.parametrize("command", ["stat", "ls", "kick"])
def test_without_a_keeper_a_command_says_how_to_start_one(command: str) -> None:
    done = penstock_cli(command, *(["3"] if command == "kick" else []), "--name", unique_name(), check=False)
    assert done.returncode == 1
    assert "penstock serve" in done.stderr and "Traceback" not in done.stderr


def test_clients_go_over_to_a_replaced_segment_while_old_views_live(keeper: Keeper) -> None:
    """The keeper stopped, the pool removed, a new one of the same name: nothing of the client has to be restarted."""
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, KEYS)
        lease = pool.match(handle, KEYS)
        view = lease.views(4)
        first = keeper.stat()["uuid"]
        keeper.stop()
        penstock_cli("rm", "--path", str(keeper.path))
        keeper.start()
        assert keeper.stat()["uuid"] != first
        until(lambda: pool.match(handle, KEYS).miss is Miss.ABSENT, "the client uses the new segment")
        assert np.array_equal(view, contents(KEYS.array)[4])
        del view
        must_store(pool, handle, KEYS)
        assert_resident(pool, handle, KEYS)
        # Not the lane that it still holds of the old segment, and no lane left behind on the way.
        assert [row["alive"] for row in keeper.stat()["clients"]] == [True]
        lease.release()
        keeper.fsck()


def test_a_lease_on_a_replaced_segment_can_still_be_read(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, KEYS)
        lease = pool.match(handle, KEYS)
        view = lease.views(0)
        keeper.stop()
        keeper.remove()
        keeper.start()
        until(lambda: pool.match(handle, KEYS).miss is Miss.ABSENT, "the client uses the new segment")
        assert np.array_equal(view, contents(KEYS.array)[0])
        with contextlib.suppress(penstock.errors.PoolClosed):
            assert np.array_equal(read(lease, handle), contents(KEYS.array))


def test_while_no_keeper_runs_reads_go_on_and_writes_are_dropped(keeper: Keeper) -> None:
    with keeper.open() as pool:
        handle = pool.space(SPACE)
        must_store(pool, handle, KEYS)
        keeper.stop()
        assert_resident(pool, handle, KEYS)
        until(lambda: store(pool, handle, chain(2, blocks=64), wait_s=0.0).drop is Drop.NO_KEEPER, "grants are used up")
        with pytest.raises(KeeperError):
            keeper.open()
        keeper.start()
        until(lambda: store(pool, handle, chain(3, blocks=4)).n_blocks == 4, "the client is back")


def test_all_lanes_taken_is_an_error_that_says_so() -> None:
    with Keeper(small_geometry(8 * MIB, lanes=2)) as keeper, keeper.open() as first, keeper.open():
        with pytest.raises(KeeperError, match="all 2 lanes"):
            keeper.open()
        first.close()
        until(lambda: len(keeper.stat()["clients"]) == 1, "a lane is free")
        keeper.open().close()


def test_several_pools_by_name_do_not_mix() -> None:
    with Keeper() as one, Keeper() as two, one.open() as first, two.open() as second:
        must_store(first, first.space(SPACE), KEYS)
        assert second.match(second.space(SPACE), KEYS).miss is Miss.ABSENT
        assert (one.stat()["blocks"], two.stat()["blocks"]) == (len(KEYS), 0)
