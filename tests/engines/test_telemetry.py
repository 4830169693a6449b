"""What a server with the connector tells the world: KV events of what it stored in the pool, and `/metrics`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import penstock
from penstock.pool.layout import plan_geometry
from tests.engines.blocks import forget
from tests.engines.client import complete, metrics
from tests.engines.models import prompt_tokens, tiny_llama
from tests.engines.pairs import BLOCK, applied
from tests.engines.server import ServerConfig, VllmServer, free_port, penstock_transfer
from tests.support import MIB, SPACE, Keeper, chain, store, until

N_BLOCKS = 20
PROMPT = prompt_tokens(N_BLOCKS * BLOCK + 5, 60)


class Router:
    """Subscribes to a server's KV events, as routers do; nothing of vLLM is needed to read them."""

    def __init__(self, port: int) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self.events: list[dict[str, Any]] = []

    def listen(self) -> None:
        """Take what has come."""
        while self._socket.poll(50):
            _topic, _number, body = self._socket.recv_multipart()
            self.events += msgspec.msgpack.decode(body)[1]

    def told(self, kind: str, medium: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind and event["medium"] == medium]

    def hashes(self, kind: str, medium: str) -> list[bytes]:
        return list(itertools.chain.from_iterable(event["block_hashes"] for event in self.told(kind, medium)))

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def small_pool() -> Iterator[Keeper]:
    with Keeper(plan_geometry(64 * MIB)) as running:
        yield running


def push_out(keeper: Keeper, pool: penstock.Pool, round: int) -> None:
    """Another client fills the pool with blocks of its own."""
    handle, before = pool.space(SPACE), keeper.counters()["evicted"]
    for number in itertools.count():
        store(pool, handle, chain(61, round, number, blocks=64))
        if number % 8 == 0 and keeper.counters()["evicted"] > before + 2000:
            return


def test_events_and_metrics_of_a_server(small_pool: Keeper, models: Path, tmp_path: Path) -> None:
    """A block's life, as a router sees it: stored under vLLM's own hash, found again, pushed out by somebody else."""
    port = free_port()
    publish = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    config = ServerConfig(
        tiny_llama(models / "tiny-float32"), kv_transfer=penstock_transfer(small_pool.name),
        arguments=("--kv-events-config", json.dumps(publish)), variables=(("VLLM_SERVER_DEV_MODE", "1"),),
    )  # fmt: skip
    router = Router(port)
    with VllmServer(config, tmp_path / "server.log") as server, small_pool.open() as onlooker:
        steps = itertools.count()

        def hear(kind: str, medium: str) -> bool:
            # vLLM publishes at the end of a step: another small request makes some.
            complete(server, prompt_tokens(BLOCK + 5, 62, next(steps)), 2)
            router.listen()
            return bool(router.hashes(kind, medium))

        until(lambda: hear("BlockStored", "GPU"), "the router is connected")
        before = applied(small_pool)
        complete(server, PROMPT, 1)
        until(lambda: applied(small_pool) >= before + N_BLOCKS, "the prompt is stored")
        until(lambda: hear("BlockStored", "CPU") and PROMPT[0] in _tokens(router), "its store is told")
        own, ours = (_of_prompt(router, medium) for medium in ("GPU", "CPU"))
        assert ours == own and len(ours) == N_BLOCKS, "under the same hashes, with the same tokens"
        assert not router.hashes("BlockRemoved", "CPU")

        forget(server)
        assert complete(server, PROMPT, 1).cached_tokens == N_BLOCKS * BLOCK
        told = metrics(server)
        assert told.total("vllm:penstock_hit_tokens_total") == N_BLOCKS * BLOCK
        assert told.total("vllm:penstock_saved_blocks_total") >= N_BLOCKS
        assert told.total("vllm:penstock_lookups_total", result="absent") > 0
        assert told.total("vllm:penstock_load_bytes_total") > 0 < told.total("vllm:penstock_load_seconds_count")

        for round in range(3):
            push_out(small_pool, onlooker, round)
        until(lambda: hear("BlockRemoved", "CPU") and ours.keys() <= {*router.hashes("BlockRemoved", "CPU")}, "gone")
    router.close()


def _tokens(router: Router) -> set[int]:
    return {event["token_ids"][0] for event in router.told("BlockStored", "CPU")}


def _of_prompt(router: Router, medium: str) -> dict[bytes, tuple[int, ...]]:
    """Hash and tokens of the prompt's blocks, as they were told for this medium."""
    found: dict[bytes, tuple[int, ...]] = {}
    for event in router.told("BlockStored", medium):
        size = event["block_size"]
        for at, block_hash in enumerate(event["block_hashes"]):
            found[block_hash] = tuple(event["token_ids"][at * size : (at + 1) * size])
    blocks = {tuple(PROMPT[at : at + BLOCK]) for at in range(0, N_BLOCKS * BLOCK, BLOCK)}
    return {block_hash: tokens for block_hash, tokens in found.items() if tokens in blocks}
