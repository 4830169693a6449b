"""Blocks of 2 MiB put and got through the Mooncake tier over TCP, against Mooncake's own batch calls.

A real master, and the memory of another process, both on loopback. The bare side calls `batch_put_from` and
`batch_get_into` on registered memory of its own; tier and bare side take turns. The tier's look at what is there is
part of its time, and so is the copy through its bounce buffers, which makes a call that hangs safe to leave behind.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from penstock.bench.pool.base import MIB, Group, Scale
from penstock.bench.report import Result, result
from penstock.bench.stats import estimate, paired_ratios
from penstock.bench.tiers.disk import huge_memory
from penstock.tiers.base import Batch, BlockSpace, Found, Placed, Tier
from penstock.tiers.mooncake_link import import_store
from penstock.tiers.registry import open_tier, parse_tier

__all__ = ["run"]

_BLOCK = 2 * MIB
_BLOCKS = 16
_SPACE = BlockSpace(bytes(range(32)), bytes(16), _BLOCK, 128, 32, _BLOCK // 32)
_HOST = "127.0.0.1"
_START_S = 30.0


def run(group: Group, scale: Scale) -> Iterator[Result]:
    pairs = 40 if scale.name == "full" else 2
    with _master() as port:
        address = f"mooncake://{_HOST}:{port}"
        with _lender(f"{address}?segment=512M&buffer=32M"):
            bare, tier = _Bare(port), open_tier(parse_tier(f"{address}?segment=0"))
            took = [_round(bare, tier, number) for number in range(-2, pairs)][2:]
            tier.close()
    theirs, ours = (np.array(each) for each in zip(*took, strict=True))
    moved = 2 * _BLOCKS * _BLOCK / 1e9
    speed, baseline = (moved / float(np.median(each)) for each in (ours, theirs))
    note = f"{speed:.2f} GB/s put and got, the batch calls {baseline:.2f}"
    yield result(group.goals[0], estimate(paired_ratios(theirs, ours)), baseline=baseline, note=note)


@contextmanager
def _master() -> Iterator[int]:
    """A master; its port."""
    here = Path(sys.executable).parent / "mooncake_master"
    program = shutil.which(str(here)) or shutil.which("mooncake_master")
    if program is None:
        raise RuntimeError("Mooncake is not installed: pip install 'penstock[mooncake]'")
    port, metrics = _free_port(), _free_port()
    command = [
        program, f"--rpc_address={_HOST}", f"--rpc_port={port}", f"--metrics_port={metrics}",
        f"--metrics_host={_HOST}", "--default_kv_lease_ttl=10s",
    ]  # fmt: skip
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        _wait_listening(port)
        yield port
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _wait_listening(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection((_HOST, port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def _lender(address: str) -> Iterator[None]:
    command = [sys.executable, "-m", "penstock.bench.tiers.lender", address]
    with ExitStack() as stack:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        stack.callback(process.wait)
        assert process.stdin is not None and process.stdout is not None
        stack.enter_context(process.stdin)
        while (line := process.stdout.readline()) and line != "lends\n":
            pass  # its library logs there, too
        if not line:
            raise RuntimeError("the process that lends memory ended")
        yield


class _Bare:
    """Mooncake's client with one registered region."""

    def __init__(self, port: int) -> None:
        self.client: Any = import_store()()
        if self.client.setup(_HOST, "P2PHANDSHAKE", 0, 0, "tcp", "", f"{_HOST}:{port}"):
            raise RuntimeError("the bare client could not join")
        self._memory = np.frombuffer(huge_memory(_BLOCKS * _BLOCK), np.uint8)
        if self.client.register_buffer(self._memory.ctypes.data, self._memory.nbytes):
            raise RuntimeError("the bare client could not register its memory")
        self._addresses = [self._memory.ctypes.data + at * _BLOCK for at in range(_BLOCKS)]
        self._sizes = [_BLOCK] * _BLOCKS

    def put_and_get(self, names: list[str]) -> float:
        """Seconds."""
        started = time.perf_counter()
        wrong = any(self.client.batch_put_from(names, self._addresses, self._sizes))
        wrong |= self.client.batch_get_into(names, self._addresses, self._sizes) != self._sizes
        took = time.perf_counter() - started
        if wrong:
            raise RuntimeError("the bare client lost a block")
        return took


def _round(bare: _Bare, tier: Tier, number: int) -> tuple[float, float]:
    """Seconds of the bare side and of the tier, for blocks that nobody had before."""
    keys = np.stack([np.arange(_BLOCKS), np.full(_BLOCKS, number + 3)], axis=1).astype(np.uint64)
    memory = huge_memory(_BLOCKS * _BLOCK)
    payloads = [memory[i * _BLOCK : (i + 1) * _BLOCK] for i in range(_BLOCKS)]
    batch = Batch(_SPACE, keys, keys, np.zeros(_BLOCKS, np.uint64), payloads)
    names = [f"bare/{number}/{at}" for at in range(_BLOCKS)]
    if number % 2:
        theirs, ours = bare.put_and_get(names), _put_and_get(tier, batch)
    else:
        ours, theirs = _put_and_get(tier, batch), bare.put_and_get(names)
    bare.client.batch_remove(names, True)
    tier.remove(_SPACE, keys, time.monotonic() + 60)
    return theirs, ours


def _put_and_get(tier: Tier, batch: Batch) -> float:
    started = time.perf_counter()
    placed = tier.write(batch, time.monotonic() + 60)
    found = tier.read(batch, time.monotonic() + 60)
    took = time.perf_counter() - started
    if not (placed == Placed.STORED).all() or not (found == Found.HERE).all():
        raise RuntimeError("the tier lost a block")
    return took
