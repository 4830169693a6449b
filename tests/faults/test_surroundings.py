"""What a pool meets outside itself: too little memory, other versions, other keepers, other users, other programs."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import penstock
from penstock.errors import Damaged, FormatMismatch, KeeperRunning, NoKeeper, NoSpaceLeft, NotOurs, PenstockError
from penstock.pool import layout
from penstock.pool import segment as segments
from penstock.pool.wire import Query, encode, socket_path
from penstock.runtime.serve import Server
from tests.support import (
    MIB,
    PATIENCE_S,
    SPACE,
    Client,
    Keeper,
    assert_resident,
    chain,
    must_store,
    penstock_cli,
    small_geometry,
    store,
    unique_name,
    until,
    wait_stopped,
)

pytestmark = pytest.mark.faults


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper(small_geometry(8 * MIB)) as running:
        yield running


@pytest.fixture
def stopped() -> Iterator[Keeper]:
    """A pool with a few blocks whose keeper has ended."""
    with Keeper(small_geometry(8 * MIB)) as one:
        with one.open() as pool:
            must_store(pool, pool.space(SPACE), chain(1, blocks=8))
        one.stop()
        yield one


def serves(name: str, path: Path) -> Server:
    return Server(name, path, small_geometry(8 * MIB))


# ---- memory


def test_a_size_beyond_shared_memory_names_the_remedy() -> None:
    name = unique_name()
    done = penstock_cli("serve", "--name", name, "--size", "900T", check=False)
    assert done.returncode == 1
    for remedy in ("--size", "--path", "--shm-size", "remount"):
        assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not segments.default_path(name).exists()
    segments.lock_path(segments.default_path(name)).unlink()


def test_an_embedded_pool_beyond_shared_memory_says_so() -> None:
    with pytest.raises(NoSpaceLeft, match="smaller"):
        penstock.open(unique_name(), embedded=900 << 40)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    # The pre-toucher of a keeper that was killed ends a moment later.
    until(lambda: subprocess.run(["umount", folder], capture_output=True).returncode == 0, "it is not used any more")


def test_memory_that_others_take_meanwhile_makes_the_pool_smaller_not_deadly(small_tmpfs: Path) -> None:
    """Room at creation, none when memory is touched: the pool serves what it got, and nobody gets SIGBUS."""
    keeper = Keeper(small_geometry(20 * MIB), path=small_tmpfs / "pool")
    with contextlib.ExitStack() as stack:
        stack.callback(keeper.__exit__)
        hog = small_tmpfs / "hog"
        keeper.launch(_take_room, str(hog), 12 * MIB)
        assert keeper.wait_ready()
        until(lambda: keeper.stat()["touched_bytes"] > 0, "some memory is ready")
        pool = stack.enter_context(keeper.open())
        handle = pool.space(SPACE)
        for number in range(400):
            store(pool, handle, chain(2, number, blocks=16), wait_s=1.0)
        report = keeper.stat()
        assert 0 < report["touched_bytes"] < keeper.geometry.n_slabs * keeper.geometry.slab_bytes
        assert report["counters"]["keeper"]["evicted"] > 0
        keeper.fsck()


def _take_room(path: str, size: int) -> None:
    """Just before the keeper starts to touch its memory, take most of it away."""
    original = Server._start_toucher

    def start(self: Server) -> object:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        return original(self)

    Server._start_toucher = start  # type: ignore[assignment, method-assign]


# ---- the segment's file


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_segment_of_another_format_version_is_refused_and_kept(stopped: Keeper) -> None:
    patch(stopped.path, layout.H_VERSION, struct.pack("<Q", layout.FORMAT_VERSION + 1))
    with pytest.raises(FormatMismatch, match="penstock rm"):
        serves(stopped.name, stopped.path)
    done = penstock_cli("serve", "--name", stopped.name, check=False)
    assert done.returncode == 1 and "format" in done.stderr and "Traceback" not in done.stderr
    patch(stopped.path, layout.H_VERSION, struct.pack("<Q", layout.FORMAT_VERSION))
    stopped.start()
    assert stopped.fsck()["blocks"] == 8


def test_a_client_of_another_format_version_does_not_map_it(keeper: Keeper) -> None:
    patch(keeper.path, layout.H_VERSION, struct.pack("<Q", layout.FORMAT_VERSION + 1))
    with pytest.raises(FormatMismatch):
        keeper.open()
    patch(keeper.path, layout.H_VERSION, struct.pack("<Q", layout.FORMAT_VERSION))
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), chain(1, blocks=2))
    until(lambda: keeper.stat()["clients"] == [], "no lane is left behind by the one that was refused")


@pytest.mark.parametrize("size", [0, 100, layout.PAGE, 3 * layout.PAGE + 17, 2 * MIB])
def test_a_truncated_segment_is_refused(stopped: Keeper, size: int) -> None:
    os.truncate(stopped.path, size)
    with pytest.raises(Damaged):
        segments.open_existing(stopped.path)
    if size >= 8:  # without its magic number it never was a segment, and is made anew
        with pytest.raises(Damaged, match="remove"):
            serves(stopped.name, stopped.path)
        done = penstock_cli("fsck", "--path", str(stopped.path), check=False)
        assert done.returncode == 1 and "Traceback" not in done.stderr
    penstock_cli("rm", "--path", str(stopped.path))
    stopped.start()
    assert stopped.fsck()["blocks"] == 0


def test_headers_of_random_bytes_are_refused(stopped: Keeper) -> None:
    good = stopped.path.read_bytes()[: layout.PAGE]
    for cell in range(layout.H_TOTAL_BYTES, layout.H_MAX_SPACES + 8, 8):
        for value in (0, (1 << 64) - 1, 1 << 40):
            patch(stopped.path, 0, good)
            patch(stopped.path, cell, struct.pack("<Q", value))
            with pytest.raises(Damaged):
                segments.open_existing(stopped.path)
    patch(stopped.path, 0, good)
    segments.open_existing(stopped.path).close()


def test_a_creation_that_was_interrupted_is_done_again() -> None:
    """Without its magic number, which is written last, a file is no segment yet."""
    with Keeper() as keeper:
        keeper.kill()
        patch(keeper.path, layout.H_MAGIC, bytes(8))
        keeper.start()
        assert keeper.fsck()["blocks"] == 0


# ---- other keepers


def test_two_keepers_of_one_name_or_one_segment(keeper: Keeper, tmp_path: Path) -> None:
    with pytest.raises(KeeperRunning, match="--name"):
        serves(keeper.name, tmp_path / "elsewhere")
    with pytest.raises(KeeperRunning, match="serves"):
        serves(unique_name(), keeper.path)
    done = penstock_cli("serve", "--name", keeper.name, "--size", "64M", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    with keeper.open() as pool:
        must_store(pool, pool.space(SPACE), chain(1, blocks=4))
    keeper.fsck()


def test_a_stopped_keeper_is_not_replaced(keeper: Keeper) -> None:
    """It may wake in the middle of a store."""
    os.kill(keeper.pid, signal.SIGSTOP)
    wait_stopped(keeper.pid)
    with pytest.raises(KeeperRunning):
        serves(keeper.name, keeper.path)
    os.kill(keeper.pid, signal.SIGCONT)
    keeper.fsck()


# ---- other users

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")


def test_everything_is_private_to_its_user(keeper: Keeper, runtime_dir: Path) -> None:
    files = (keeper.path, segments.lock_path(keeper.path), socket_path(keeper.name))
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((runtime_dir / "penstock").stat().st_mode) == 0o700


@as_root
def test_a_segment_of_another_user_is_refused(stopped: Keeper) -> None:
    os.chown(stopped.path, NOBODY, NOBODY)
    with pytest.raises(NotOurs, match="--name"):
        serves(stopped.name, stopped.path)
    done = penstock_cli("rm", "--name", stopped.name, check=False)
    assert done.returncode == 1 and "belongs to" in done.stderr
    assert stopped.path.exists()


@as_root
def test_another_user_cannot_open_a_segment(stopped: Keeper) -> None:
    with Client(_open_as_nobody, str(stopped.path)) as other:
        assert other.receive() == ("NotOurs", "PermissionError")


def _open_as_nobody(connection: Connection, path: str) -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    said = []
    for attempt in (lambda: segments.open_existing(Path(path)), Path(path).read_bytes):
        try:
            attempt()
            said.append("opened")
        except (PenstockError, OSError) as error:
            said.append(type(error).__name__)
    connection.send(tuple(said))


# ---- garbage on the socket


def dial(keeper: Keeper) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE_S)
    connection.connect(os.fspath(socket_path(keeper.name)))
    return connection


GARBAGE = {
    "random bytes": bytes((i * 197 + 31) % 256 for i in range(5000)),
    "a huge length": struct.pack("<I", 0xFFFFFFFF) + b"x",
    "an empty frame": struct.pack("<I", 0),
    "not msgpack": struct.pack("<I", 3) + b"\xc1\xc1\xc1",
    "an unknown message": struct.pack("<I", 8) + b"\x81\xa4type\xa1x",
    "a reply": struct.pack("<I", 9) + b"\x81\xa4type\xa2ok",
    "a frame with more fields": encode(Query("stat"))[:4] + b"\x84" + encode(Query("stat"))[5:],
}


@pytest.mark.parametrize("sort", GARBAGE)
def test_garbage_on_the_socket_ends_that_connection_only(keeper: Keeper, sort: str) -> None:
    with keeper.open() as pool, dial(keeper) as connection:
        handle = pool.space(SPACE)
        connection.sendall(GARBAGE[sort])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        must_store(pool, handle, chain(1, blocks=4))
        assert keeper.stat()["requests_failed"] == 0
        assert keeper.stat()["connections_refused"] == 1
        assert len(keeper.stat()["clients"]) == 1


def test_requests_out_of_turn_are_answered_with_an_error(keeper: Keeper) -> None:
    from penstock.pool.wire import Confirm, Hello, Names, SpaceOf

    for request in (
        Confirm(),
        Names({1: "x"}),
        SpaceOf(b"", b"", -1, 0, 1 << 60, 7),
        Query("nonsense"),
        Query("kick", 10**6),
        Hello(99, "x"),
    ):
        with dial(keeper) as connection:
            connection.sendall(encode(request))
            assert b"error" in connection.recv(1000)
    assert keeper.stat()["requests_failed"] == 0


def test_a_client_that_registers_nonsense_is_refused(keeper: Keeper) -> None:
    from penstock.errors import KeeperError
    from penstock.pool.wire import SpaceOf

    digest, root = bytes(32), bytes(16)
    with keeper.open() as pool:
        for sizes in ((0, 16, 1, 0), (4096, 16, 4, 1000), (1 << 50, 1, 1, 1 << 50), (-4096, 16, -4, 1024)):
            with pytest.raises(KeeperError):
                pool._link.space(SpaceOf(digest, root, sizes[0], sizes[1], sizes[2], sizes[3]))
        must_store(pool, pool.space(SPACE), chain(1, blocks=4))
    assert keeper.stat()["requests_failed"] == 0


def test_half_a_frame_and_a_reader_that_never_reads_keep_nobody_waiting(keeper: Keeper) -> None:
    with dial(keeper) as half, dial(keeper) as deaf, keeper.open() as pool:
        half.sendall(encode(Query("stat"))[:7])
        deaf.settimeout(0.0)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for _ in range(100_000):
                deaf.sendall(encode(Query("stat")))
        handle = pool.space(SPACE)
        for number in range(20):
            must_store(pool, handle, chain(number, blocks=4))
        keeper.fsck()
        half.sendall(encode(Query("stat"))[7:])
        assert len(half.recv(100)) > 4  # one that is merely slow is served


def test_more_connections_than_descriptors_do_not_end_the_keeper() -> None:
    keeper = Keeper(small_geometry(8 * MIB))
    with contextlib.ExitStack() as stack:
        stack.callback(keeper.__exit__)
        keeper.start(_few_descriptors, 48)
        keeper.wait_touched()
        pool = stack.enter_context(keeper.open())
        handle = pool.space(SPACE)
        with contextlib.ExitStack() as crowd:
            for _ in range(60):
                connection = crowd.enter_context(dial(keeper))
                with contextlib.suppress(BrokenPipeError):  # refused
                    connection.sendall(encode(Query("stat"))[:5])
            must_store(pool, handle, chain(1, blocks=4))
        until(lambda: _answers(keeper), "it serves again once the crowd has gone")
        assert_resident(pool, handle, chain(1, blocks=4))
        keeper.fsck()


def _few_descriptors(n: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))


def _answers(keeper: Keeper) -> bool:
    try:
        return bool(keeper.stat())
    except NoKeeper:
        return False
