"""What a bench runs on: a keeper's process, chains of random keys, an engine's tensors, helper processes.

Everything made here is gone when its `with` block ends: processes, sockets, segment files.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.errors import PenstockError
from penstock.identity import KeyChain, Space, chain_keys, warm
from penstock.pool import segment as segments
from penstock.pool.client import Pool, SpaceHandle
from penstock.pool.layout import LINE, Geometry
from penstock.pool.tensors import TensorMap
from penstock.pool.wire import Connection, Json, Query
from penstock.runtime.opening import open_pool

__all__ = [
    "BATCH",
    "BLOCK_TOKENS",
    "Copier",
    "EngineTensors",
    "bench_space",
    "client",
    "fill",
    "helper",
    "new_path",
    "random_chains",
    "segment_file",
    "serving",
]

BLOCK_TOKENS = 16
BATCH = 64
"""Blocks of a chain, and of a batch."""
_READY_S = 90.0
_WAIT_S = 10.0


def new_path(name: str) -> Path:
    """A segment file that does not exist yet, in shared memory."""
    return segments.default_path(f"{name}-{os.getpid()}")


@contextmanager
def segment_file(path: Path, geometry: Geometry) -> Iterator[Path]:
    """A new segment; its file and its lock file are deleted at the end."""
    segments.create(path, geometry).close()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        segments.lock_path(path).unlink(missing_ok=True)


@contextmanager
def serving(geometry: Geometry) -> Iterator[tuple[str, int]]:
    """A keeper in a process of its own, all of its memory ready. Yields the pool's name and the keeper's pid."""
    name = f"bench-{os.getpid()}"
    with segment_file(new_path("bench"), geometry) as path, tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "penstock", "serve", "--name", name, "--path", str(path)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            if not _ready(name, geometry, process):
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise RuntimeError(f"the keeper did not get ready: {said[0]}")
            yield name, process.pid
        finally:
            process.terminate()
            process.wait()


def _ready(name: str, geometry: Geometry, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the keeper listens and all memory is touched. False when it ended, or the time is over."""
    deadline, wanted = time.monotonic() + _READY_S, geometry.n_slabs * geometry.slab_bytes
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if _touched_bytes(name) >= wanted:
                return True
        except PenstockError:
            pass  # not listening yet
        time.sleep(0.1)
    return False


def _touched_bytes(name: str) -> int:
    connection = Connection(name)
    try:
        reply, _ = connection.ask(Query("stat"))
    finally:
        connection.close()
    return int(reply.body["touched_bytes"]) if isinstance(reply, Json) else 0


def bench_space(n_segments: int, segment_bytes: int) -> Space:
    """A space whose blocks have these layer segments and 16 tokens."""
    digest = "blake2b-256:" + "0" * 64
    return Space(
        weights=digest, config=digest, engine="bench/1", layout="bytes", dtype="float32", block_tokens=BLOCK_TOKENS,
        n_segments=n_segments, segment_bytes=segment_bytes,
    )  # fmt: skip


def random_chains(space: Space, n_chains: int, seed: int, n_blocks: int = BATCH) -> list[KeyChain]:
    """Chains of random tokens; they share nothing."""
    warm()
    rng = np.random.default_rng(seed)
    return [chain_keys(space, rng.integers(0, 1 << 31, n_blocks * BLOCK_TOKENS, np.int64)) for _ in range(n_chains)]


class EngineTensors:
    """One paged tensor per layer segment, as an engine has them: page p of segment j at j * pages + p.

    Page-aligned as PyTorch's large tensors nearly are (64 bytes), touched, and filled with noise.
    """

    def __init__(self, space: Space, n_bytes: int) -> None:
        self.pages = max(BATCH, n_bytes // space.block_bytes)
        self._segment_bytes = space.segment_bytes
        self.array = aligned_bytes(self.pages * space.block_bytes)
        self.array[:] = np.random.default_rng(1).integers(0, 256, len(self.array), np.uint8)
        stretch = self.pages * space.segment_bytes
        self._bases = self.array.ctypes.data + stretch * np.arange(space.n_segments, dtype=np.int64)

    def map(self, pages: npt.NDArray[np.int64]) -> TensorMap:
        """The map that puts block i on page pages[i]."""
        return TensorMap(self._bases, pages, self._segment_bytes, keep_alive=self.array)

    def random_maps(self, n: int, seed: int) -> list[TensorMap]:
        """n maps of BATCH random pages each; together they pass over all pages before any comes again."""
        order = np.random.default_rng(seed).permutation(self.pages).astype(np.int64)
        rows = np.resize(order[: len(order) // BATCH * BATCH], n * BATCH).reshape(n, BATCH)
        return [self.map(row) for row in rows]


def aligned_bytes(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised bytes that start at a cache line."""
    raw = np.empty(n_bytes + LINE, np.uint8)
    skip = -raw.ctypes.data % LINE
    return raw[skip : skip + n_bytes]


class Copier:
    """`memcpy`: the fastest copy that one thread has here, `np.copyto` of one warm piece."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._source = np.ones(n_bytes, np.uint8)
        self._target = np.zeros(n_bytes, np.uint8)
        self.seconds()

    def seconds(self) -> float:
        """Copy once."""
        started = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - started


def fill(pool: Pool, handle: SpaceHandle, chains: list[KeyChain], tensors: EngineTensors) -> None:
    """Store these chains. Raises RuntimeError where the pool does not take one whole."""
    page = tensors.map(np.arange(BATCH, dtype=np.int64))
    for chain in chains:
        stored = pool.store(handle, chain, page, wait_s=_WAIT_S)
        if stored.n_blocks < len(chain):
            raise RuntimeError(f"{stored.n_blocks} of {len(chain)} blocks stored: {stored.drop.name}")
    if not pool.flush(_WAIT_S):
        raise RuntimeError("the keeper did not take in what was stored")


@contextmanager
def helper(work: Callable[..., None], *arguments: Any) -> Iterator[Pipe]:
    """`work(pipe, *arguments)` in a process of its own, ready (it sent one message). It ends when the pipe closes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_READY_S):
            raise RuntimeError("a helper process did not start")
        ours.recv()
        yield ours
    finally:
        ours.close()
        process.join(_WAIT_S)
        if process.is_alive():
            process.kill()
            process.join()


def client(name: str, space: Space) -> tuple[Pool, SpaceHandle]:
    """A client of the pool, with the space opened."""
    pool = open_pool(name, client="bench")
    return pool, pool.space(space, "bench")
