"""What tests on real processes share: keepers, clients, known contents, bounded waits, and a clean-up that is checked.

Keepers and clients are forked from multiprocessing's fork server, which has everything imported and every kernel
loaded: a fresh process costs milliseconds. The command line's processes are plain subprocesses.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import penstock
from penstock import KeyChain, Lease, Space, TensorMap, chain_keys
from penstock.pool import segment as segments
from penstock.pool.below import TierLine
from penstock.pool.layout import Geometry, plan_geometry
from penstock.pool.wire import Connection as ControlConnection
from penstock.pool.wire import Json, Query
from penstock.testing import tier_blocks

if TYPE_CHECKING:
    from penstock.runtime.mover.plan import MoverPlan

MIB = 1 << 20
# A guard against hangs, not a measure: what takes this long is broken.
PATIENCE_S = 60.0
ROOT = Path(__file__).resolve().parent.parent

BLOCK_TOKENS = 16
SPACE = Space(
    weights="blake2b-256:" + "a" * 64,
    config="blake2b-256:" + "b" * 64,
    engine="test/1",
    layout="rows",
    dtype="float32",
    block_tokens=BLOCK_TOKENS,
    n_segments=4,
    segment_bytes=1024,
)
"""Blocks of 4 KiB: the smallest a pool has."""

_numbers = itertools.count()


def unique_name(prefix: str = "t") -> str:
    """A pool name that no other test, run or process uses."""
    return f"{prefix}{os.getpid()}-{next(_numbers)}"


def small_geometry(size: int = 16 * MIB, *, lanes: int = 16, slab: int = MIB) -> Geometry:
    """A pool of many small slots, so that few bytes have to move for much to happen."""
    return plan_geometry(size, unit_bytes=4096, slab_bytes=slab, n_lanes=lanes)


# ---- waiting


def until(condition: Callable[[], Any], what: str = "", *, timeout_s: float = PATIENCE_S) -> Any:
    """Look again and again until `condition` gives something true; return that. Fails after a bounded time."""
    deadline, pause = time.monotonic() + timeout_s, 0.0005
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still not so after {timeout_s:g} s: {what or condition}"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return value


# ---- contents


def tokens(*seed: int, blocks: int) -> npt.NDArray[np.uint32]:
    """Token ids of a sequence of full blocks, the same in every process."""
    return np.random.default_rng(seed).integers(0, 50_000, blocks * BLOCK_TOKENS, dtype=np.uint32)


def chain(*seed: int, blocks: int, space: Space = SPACE) -> KeyChain:
    """The keys of that sequence."""
    return chain_keys(space, tokens(*seed, blocks=blocks))


def contents(keys: npt.NDArray[np.uint64], block_bytes: int = SPACE.block_bytes) -> npt.NDArray[np.uint8]:
    """What blocks with these keys, (n, 2) words, hold in every test: (n, block_bytes) bytes, made from the keys."""
    return tier_blocks.contents(keys, block_bytes)


def tensors(blocks: npt.NDArray[np.uint8], space: Space = SPACE) -> TensorMap:
    """Blocks that lie one behind the other in an array, (n, block_bytes), as an engine's tensors."""
    assert blocks.flags.c_contiguous
    bases = blocks.ctypes.data + np.arange(space.n_segments, dtype=np.int64) * space.segment_bytes
    return TensorMap(bases, np.arange(len(blocks)), space.block_bytes, keep_alive=blocks)


def store(pool: penstock.Pool, handle: penstock.SpaceHandle, keys: KeyChain, *, wait_s: float = 5.0) -> penstock.Stored:
    """Store the blocks of these keys with the contents that belong to them."""
    return pool.store(handle, keys, tensors(contents(keys.array, handle.block_bytes), handle.space), wait_s=wait_s)


def must_store(pool: penstock.Pool, handle: penstock.SpaceHandle, keys: KeyChain) -> None:
    """Store them and wait until the keeper has taken them in."""
    stored = store(pool, handle, keys)
    assert stored.n_blocks == len(keys), stored
    assert pool.flush(PATIENCE_S)


def read(lease: Lease, handle: penstock.SpaceHandle, *, verify: bool | None = None) -> npt.NDArray[np.uint8]:
    """Copy a lease's good blocks out, (n, block_bytes)."""
    out = np.zeros((len(lease), handle.block_bytes), np.uint8)
    good = lease.gather(tensors(out, handle.space), verify=verify) if len(lease) else 0
    return out[:good]


def assert_resident(pool: penstock.Pool, handle: penstock.SpaceHandle, keys: KeyChain) -> None:
    """Every one of these blocks is in the pool and holds what belongs there."""
    with pool.match(handle, keys) as lease:
        assert len(lease) == len(keys), (lease, len(keys))
        assert np.array_equal(read(lease, handle), contents(keys.array, handle.block_bytes))


# ---- processes


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, with this checkout importable."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **extra}


def penstock_cli(*arguments: str, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `penstock ...` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "penstock", *arguments],
        env=environment(**extra), capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


_context = get_context("forkserver")


def fork(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Run a module's function in a fresh process that has everything loaded and nothing open."""
    forkserver.set_forkserver_preload(["tests.preload"])
    process = _context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    return _context.Pipe()


def wait_stopped(pid: int) -> None:
    """Wait until every thread of a process that got SIGSTOP is stopped."""
    until(lambda: _state(pid) == "T", f"process {pid} stopped")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill(process: BaseProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal to a child that may be stopped or gone already, and wait for its end."""
    if process.pid is not None and process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    process.join(PATIENCE_S)
    assert process.exitcode is not None, f"{process} does not end"


# ---- keepers


def serve(
    name: str, path: str, geometry: Geometry | None, tiers: MoverPlan | None, ready: Connection,
    prepare: Callable[..., None] | None, args: Any,
) -> None:  # fmt: skip
    """A keeper's process: what `penstock serve` runs, with a word to the parent once it serves."""
    from penstock.runtime.serve import Server

    if prepare is not None:
        prepare(*args)
    server = Server(name, Path(path), geometry, tiers=tiers)
    ready.send("ready")
    server.run()


class Keeper:
    """A pool with a keeper process that can be killed and started again. Removes everything at its end."""

    def __init__(
        self, geometry: Geometry | None = None, *, name: str = "", path: Path | None = None,
        tiers: Sequence[str] = (), replicas: Sequence[str] = (), tenant_caps: Sequence[str] = (),
    ) -> None:  # fmt: skip
        from penstock.runtime.mover.plan import plan_tiers

        self.tiers = plan_tiers(list(tiers), list(replicas), list(tenant_caps))
        self.name = name or unique_name()
        self.path = path or segments.default_path(self.name)
        self.geometry = geometry or small_geometry()
        self.process: BaseProcess | None = None
        self._ready: Connection | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None and self.process.pid is not None
        return self.process.pid

    def launch(self, prepare: Callable[..., None] | None = None, *args: Any) -> None:
        """Start a keeper without waiting for it. `prepare` runs in it first."""
        assert self.process is None
        self._ready, theirs = pipe()
        self.process = fork(serve, self.name, str(self.path), self.geometry, self.tiers, theirs, prepare, args)
        theirs.close()

    def wait_ready(self) -> bool:
        """Wait until it serves. False if it ended instead."""
        assert self._ready is not None and self.process is not None
        try:
            assert self._ready.poll(PATIENCE_S), "the keeper neither serves nor ends"
            return bool(self._ready.recv() == "ready")
        except EOFError:
            return False
        finally:
            self._ready.close()

    def start(self, prepare: Callable[..., None] | None = None, *args: Any) -> None:
        """Start a keeper and wait until it serves."""
        self.launch(prepare, *args)
        assert self.wait_ready(), "the keeper ended before it served"

    def wait_touched(self) -> None:
        """Wait until all memory is ready, so that nothing is refused because it is still to come."""
        whole = self.geometry.n_slabs * self.geometry.slab_bytes
        until(lambda: self.stat()["touched_bytes"] >= whole, "the pool's memory is ready")

    def kill(self) -> None:
        assert self.process is not None
        kill(self.process)
        self.process.close()
        self.process = None

    def stop(self) -> None:
        """End it in an orderly way."""
        assert self.process is not None
        kill(self.process, signal.SIGTERM)
        code = self.process.exitcode
        self.process.close()
        self.process = None
        assert code == 0, f"the keeper ended with {code}"

    def ask(self, what: str, argument: int = -1) -> dict[str, Any]:
        """An administrative question."""
        connection = ControlConnection(self.name, timeout_s=PATIENCE_S)
        try:
            reply, _ = connection.ask(Query(what, argument))
        finally:
            connection.close()
        assert isinstance(reply, Json)
        return reply.body

    def stat(self) -> dict[str, Any]:
        return self.ask("stat")

    def counters(self) -> dict[str, int]:
        """What the keeper counted."""
        counted: dict[str, int] = self.stat()["counters"]["keeper"]
        return counted

    def fsck(self) -> dict[str, Any]:
        """Let it check everything, bytes too; fails on the first problem."""
        report = self.ask("fsck", 1)
        assert report["problems"] == [], report
        return report

    def tier_report(self) -> dict[str, Any]:
        """What `penstock tiers` shows; waits until the mover answers."""
        from penstock.errors import KeeperError

        def ask() -> dict[str, Any] | None:
            line = TierLine(self.name)
            try:
                return line.report(PATIENCE_S)
            except KeeperError:
                return None
            finally:
                line.close()

        report: dict[str, Any] = until(ask, "the mover answers")
        return report

    def tier(self, name: str) -> dict[str, Any]:
        """One tier's part of that."""
        [row] = [row for row in self.tier_report()["tiers"] if row["name"] == name]
        return dict(row)

    def open(self, client: str = "test") -> penstock.Pool:
        return penstock.open(self.name, client=client)

    def wait_back(self, pool: penstock.Pool) -> None:
        """Wait until this process's pool has come back to a keeper that was restarted."""
        lane = pool._at.given.lane
        until(lambda: any(row["lane"] == lane and row["pid"] for row in self.stat()["clients"]), "it said hello")
        until(lambda: pool._link.alive, "it is back")

    def remove(self) -> None:
        for path in (self.path, segments.lock_path(self.path)):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Keeper:
        try:
            self.start()
            self.wait_touched()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            if self.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGCONT)
            self.kill()
        self.remove()


# ---- clients


def _client_main(connection: Connection, target: Callable[..., Any], args: Any) -> None:
    target(connection, *args)
    connection.close()


class Client:
    """A process that runs `target(connection, *args)`; killed at the end if it still runs."""

    def __init__(self, target: Callable[..., Any], *args: Any) -> None:
        self.connection, theirs = pipe()
        self.process = fork(_client_main, theirs, target, args)
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, message: Any) -> None:
        self.connection.send(message)

    def receive(self) -> Any:
        """Its next message; fails if none comes."""
        assert self.connection.poll(PATIENCE_S), f"{self.process} says nothing"
        return self.connection.recv()

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def kill(self) -> None:
        kill(self.process)

    def stop(self) -> None:
        """SIGSTOP, and wait until it stands."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_stopped(self.pid)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def join(self) -> None:
        """Wait for its own, orderly end."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == 0, f"{self.process}"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.process)
        self.connection.close()


# ---- leaving nothing


def children() -> set[int]:
    """Processes whose parent is this one."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def own_segments() -> list[str]:
    """Files in shared memory that this process's tests named."""
    mine = re.compile(rf"(?<!\d){os.getpid()}(?!\d)")
    return sorted(path.name for path in Path("/dev/shm").iterdir() if mine.search(path.name))


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Ends the fork server and its helper at the end, so that a check for left-over children sees only real ones."""
    try:
        yield
    finally:
        from multiprocessing import resource_tracker

        forkserver._forkserver._stop()  # type: ignore[attr-defined]
        resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]
