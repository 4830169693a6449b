"""A pool as seen beside the servers that use it: which blocks of a prompt it has, what is in them, and damage to them.

A server's space cannot be made here without its weights and its kernel; but the keeper tells the digests of the spaces
that it knows, and with its digest alone a space's keys can be derived.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from penstock import KeyChain, Lease, Space, SpaceHandle, TensorMap, chain_keys
from tests.engines.client import Completion, complete, metrics, post
from tests.engines.server import MODEL_NAME, VllmServer
from tests.support import PATIENCE_S, Keeper, until, wait_stopped

ALONE = {"penstock": {"skip_load": True, "skip_save": True}}
"""`kv_transfer_params` of a request that neither loads nor saves."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One of the spaces that a pool's servers use."""

    space: Space
    handle: SpaceHandle

    def keys(self, prompt: Sequence[int]) -> KeyChain:
        """The keys of the prompt's full blocks, where nothing but its tokens makes them."""
        return chain_keys(self.space, prompt)


class PoolView:
    """A client of a pool that looks on. Close it before the pool is removed."""

    def __init__(self, keeper: Keeper, layers: int) -> None:
        """`layers` of the model that all servers on this pool have."""
        self.keeper = keeper
        self.layers = layers
        self.pool = keeper.open("onlooker")

    def places(self) -> list[Place]:
        """The spaces that servers registered, in the order in which they did."""
        return [self._place(row["digest"], row["block_bytes"], row["block_tokens"]) for row in self._rows()]

    def _rows(self) -> list[dict[str, int | str]]:
        rows: list[dict[str, int | str]] = self.keeper.ask("ls")["spaces"]
        return rows

    def _place(self, digest: object, block_bytes: object, block_tokens: object) -> Place:
        space = Space(
            weights="blake2b-256:" + "0" * 64,
            config="blake2b-256:" + "0" * 64,
            engine="onlooker/1",
            layout="unknown",
            dtype="float32",
            block_tokens=int(str(block_tokens)),
            n_segments=self.layers,
            segment_bytes=int(str(block_bytes)) // self.layers,
        )
        object.__setattr__(space, "_digest", bytes.fromhex(str(digest)))
        return Place(space, self.pool.space(space))

    def n_resident(self, place: Place, prompt: Sequence[int]) -> int:
        """How many leading blocks of the prompt the pool has."""
        with self.match(place, prompt) as lease:
            return len(lease)

    def match(self, place: Place, prompt: Sequence[int]) -> Lease:
        return self.pool.match(place.handle, place.keys(prompt))

    def wait_stored(self, prompt: Sequence[int], *, place: Place | None = None) -> None:
        """Wait until all full blocks of the prompt are there; without a `place`, in every space."""
        for where in [place] if place is not None else self.places():
            n_blocks = len(prompt) // where.space.block_tokens
            until(lambda where=where, n=n_blocks: self.n_resident(where, prompt) == n, "the prompt is stored")

    def contents(self, place: Place, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the prompt's blocks hold, verified: (blocks, values)."""
        with self.match(place, prompt) as lease:
            out = np.zeros((len(lease), place.space.block_bytes), np.uint8)
            bases = out.ctypes.data + np.arange(self.layers, dtype=np.int64) * place.space.segment_bytes
            tensors = TensorMap(bases, np.arange(len(out)), place.space.block_bytes, keep_alive=out)
            assert lease.gather(tensors) == len(out), lease
        return out.view(np.float32)

    def damage(self, prompt: Sequence[int], block: int, *, place: Place | None = None) -> None:
        """Turn one bit of a block of the prompt, behind everybody's back."""
        with self.match(place or self.places()[0], prompt) as lease:
            assert len(lease) > block, lease
            at = lease._at
            offset = int(lease._located().payloads[block]) - at.data.address + at.geometry.data_offset + 700
            fd = os.open(self.keeper.path, os.O_RDWR)
            try:
                (byte,) = os.pread(fd, 1, offset)
                os.pwrite(fd, bytes([byte ^ 0x40]), offset)
            finally:
                os.close(fd)

    def client_counter(self, name: str) -> int:
        """What all clients counted under this name, those that left too."""
        return int(self.keeper.stat()["counters"]["clients"][name])

    def leases(self) -> int:
        """Leases that clients hold."""
        return sum(row["leases"] for row in self.keeper.stat()["clients"])

    def wait_quiet(self) -> None:
        """Wait until nobody holds a lease."""
        until(lambda: self.leases() == 0, "all leases are given back")

    def __enter__(self) -> PoolView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.close()


def hit_of(prompt: Sequence[int], block: int = 32) -> int:
    """Prompt tokens that need no computing when all full blocks are there: the last one always does."""
    return min(len(prompt) // block * block, len(prompt) - 1)


def forget(server: VllmServer) -> None:
    """Empty the server's own prefix cache, and only that: what it finds afterwards comes from the pool."""
    until(lambda: post(server, "/reset_prefix_cache")["success"], "the prefix cache is reset")


def alone(server: VllmServer, prompt: Sequence[int], max_tokens: int = 16) -> Completion:
    """The answer computed from the first token on, without the pool and without the server's own cache."""
    forget(server)
    answer = complete(server, prompt, max_tokens, kv_transfer_params=ALONE)
    assert answer.cached_tokens == 0, answer
    forget(server)
    return answer


def attached(keeper: Keeper, n_clients: int) -> bool:
    """Whether this many halves of connectors are there."""
    return sum(row["name"].startswith("vllm-") and row["pid"] > 0 for row in keeper.stat()["clients"]) == n_clients


def wait_idle(server: VllmServer) -> None:
    """Wait until no request runs or waits."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    until(lambda: sum(metrics(server).total(name) for name in names) == 0, "no request is left", timeout_s=PATIENCE_S)


@contextlib.contextmanager
def unread(server: VllmServer, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Streamed requests whose answers nobody reads; at the end the client hangs up, which aborts them."""
    with contextlib.ExitStack() as connections:
        for prompt in prompts:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60.0)
            connections.callback(connection.close)
            body = {"model": MODEL_NAME, "prompt": list(prompt), "max_tokens": 500, "stream": True, "ignore_eos": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        yield


@contextlib.contextmanager
def worker_stopped(server: VllmServer) -> Iterator[None]:
    """The server's worker stands: what is ordered of it is not done yet."""
    [worker] = server.role("VLLM::Worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        wait_stopped(worker)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
