"""KV events against a real pool, with an engine that has hashes and events of its own: what a router would believe."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from penstock import KeyChain, SpaceHandle
from penstock.connectors.vllm.events import PoolEvents
from penstock.pool import layout
from penstock.pool.cells import peek
from penstock.pool.client import Pool
from penstock.pool.removals import Removals, Removed
from penstock.testing.pool import TINY, Site, chain, embedded_keeper, make_space, resident_keys, source
from tests.support import unique_name

SPACE, OTHER = make_space(), make_space("other rank")
BLOCK = SPACE.block_tokens


@dataclass
class Adapter:
    adapter_id: int = 7
    name: str = "poet"


@dataclass
class Request:
    """What of a request the events look at; a block's hash is its token ids, with those of its prefix."""

    path: list[int]
    lora_request: Adapter | None = None
    session_id: str | None = None

    @property
    def all_token_ids(self) -> list[int]:
        return [token for token in self.path for _ in range(BLOCK)]

    def hash(self, block: int) -> tuple[int, ...]:
        return tuple(self.path[: block + 1])


@dataclass
class Engine:
    """Events are (kind, fields)."""

    known: int = 1 << 30

    def hashes(self, request: Request, first: int, last: int) -> list[Any]:
        return [request.hash(block) for block in range(first, min(last, len(request.path), self.known))]

    def extra_keys(self, request: Request, first: int, last: int, block_size: int) -> list[Any] | None:
        assert block_size == BLOCK
        return [("extra", block) for block in range(first, last)]

    def stored(self, **fields: Any) -> Any:
        return "stored", fields

    def removed(self, **fields: Any) -> Any:
        return "removed", fields


@dataclass
class Router:
    """Believes what it is told, and checks that it is told sense."""

    there: set[tuple[int, ...]] = field(default_factory=set)
    stored: int = 0
    removed: int = 0

    def hear(self, events: list[Any]) -> None:
        for kind, fields in events:
            hashes = fields["block_hashes"]
            assert hashes and fields["medium"] == "CPU" and fields["group_idx"] == 0
            if kind == "removed":
                assert set(hashes) <= self.there and len(set(hashes)) == len(hashes)
                self.there -= set(hashes)
                self.removed += len(hashes)
                continue
            assert not set(hashes) & self.there
            assert len(fields["token_ids"]) == len(hashes) * fields["block_size"]
            assert [one[-1] for one in hashes] == fields["token_ids"][:: fields["block_size"]]
            assert fields["parent_block_hash"] == (hashes[0][:-1] or None)
            assert fields["extra_keys"] == [("extra", len(one) - 1) for one in hashes]
            self.there |= set(hashes)
            self.stored += len(hashes)


@dataclass
class Server:
    """One engine on a pool: stores, tells its events, and has a router that listens."""

    pool: Pool
    max_blocks: int = 1 << 18
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.handle = self.pool.space(SPACE)
        self.router = Router()
        self.engine = Engine()
        self.current: Pool | None = self.pool
        self.events = PoolEvents(
            lambda: self.current, BLOCK, engine=self.engine, max_blocks=self.max_blocks, now_s=lambda: self.now_s
        )
        self.keys: dict[bytes, tuple[int, ...]] = {}

    def commit(self, path: list[int], handle: SpaceHandle | None = None) -> KeyChain:
        handle = handle or self.handle
        keys = chain(handle.space, path)
        self.pool.store(handle, keys, source(handle, keys), wait_s=5.0)
        assert self.pool.flush()
        return keys

    def tell(self, path: list[int], keys: KeyChain, first: int = 0) -> None:
        self.keys |= {bytes(key): tuple(path[: at + 1]) for at, key in enumerate(keys)}
        self.events.stored(Request(path), first, len(path) - first, [(self.handle, keys.array[first:])])

    def store(self, path: list[int]) -> KeyChain:
        """As a save: what the pool has already is not stored again."""
        keys = chain(SPACE, path)
        with self.pool.match(self.handle, keys) as lease:
            n = len(lease)
        if n < len(keys):
            self.commit(path)
            self.tell(path, keys, n)
        return keys

    def step(self) -> None:
        self.router.hear(self.events.take())

    def assert_right(self) -> None:
        there = resident_keys(self.pool)
        assert self.router.there == {name for key, name in self.keys.items() if key in there}
        assert self.events.n_published == len(self.router.there)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site.opened(unique_name("ev")) as opened:
        yield opened


@pytest.fixture
def server(site: Site) -> Server:
    return Server(site.pool)


def churn(servers: list[Server], rounds: int, every: int = 3) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        which = chance.randrange(len(servers))
        # Each server its own prompts: what two servers compute is published by the one that stored it.
        servers[which].store([which, *(chance.randrange(4) for _ in range(chance.randrange(1, 8)))])
        if number % every == 0:
            for server in servers:
                server.step()
                server.assert_right()


def test_a_router_knows_what_is_there(server: Server) -> None:
    churn([server], 400)
    assert server.router.removed > 100


def test_each_server_tells_its_own(site: Site) -> None:
    """Their stores and, whoever pushed them out, their removals."""
    servers = [Server(site.pool), Server(site.client())]
    churn(servers, 400)
    assert all(server.router.removed > 50 for server in servers)


def test_what_an_event_says(server: Server) -> None:
    keys = server.commit([1, 2, 3])
    request = Request([1, 2, 3], Adapter(), "session")
    server.events.stored(request, 1, 2, [(server.handle, keys.array[1:])])
    assert server.events.take() == [
        (
            "stored",
            {
                "block_hashes": [(1, 2), (1, 2, 3)],
                "parent_block_hash": (1,),
                "token_ids": [2] * BLOCK + [3] * BLOCK,
                "block_size": BLOCK,
                "lora_id": 7,
                "lora_name": "poet",
                "medium": "CPU",
                "extra_keys": [("extra", 1), ("extra", 2)],
                "group_idx": 0,
                "session_id": "session",
            },
        )
    ]
    assert server.events.take() == []


def test_told_twice_is_published_once(server: Server) -> None:
    for path in ([1, 2], [1, 2, 3, 4], [1, 2, 3]):
        server.tell(path, server.commit(path))
        server.step()
        server.assert_right()
    assert server.router.stored == 4


def test_a_block_without_a_hash_is_left_out(server: Server) -> None:
    server.engine.known = 2
    server.tell([1, 2, 3], server.commit([1, 2, 3]))
    server.step()
    assert server.router.there == {(1,), (1, 2)}


# ---- stores that are not there yet, or never


def test_published_only_once_the_pool_has_it(site: Site) -> None:
    server = Server(site.client())
    site.deaf = True
    keys = chain(SPACE, [1, 2, 3])
    server.pool.store(server.handle, keys[:2], source(server.handle, keys[:2]))
    server.tell([1, 2, 3], keys)
    server.step()
    assert server.router.there == set()
    site.hear()
    server.step()
    server.step()
    resident = resident_keys(site.pool)
    assert server.router.there == {server.keys[bytes(key)] for key in keys if bytes(key) in resident}


def test_a_run_of_which_a_part_comes_later(server: Server) -> None:
    keys = chain(SPACE, [1, 2, 3, 4])
    server.commit([1, 2])
    server.tell([1, 2, 3, 4], keys)
    server.step()
    assert server.router.there == {(1,), (1, 2)}
    server.commit([1, 2, 3, 4])
    server.step()
    server.assert_right()
    assert len(server.router.there) == 4 and server.events.unconfirmed == 0


def test_what_never_comes_is_forgotten(server: Server) -> None:
    server.tell([1, 2], chain(SPACE, [1, 2]))
    server.step()
    server.now_s = 60.0
    server.step()
    assert server.events.unconfirmed == 2 and not server.events._pending
    server.commit([1, 2])
    server.step()
    assert server.router.there == set()


def test_all_ranks_must_have_it(server: Server) -> None:
    other = server.pool.space(OTHER)
    path = [1, 2, 3]
    keys = [server.commit(path), chain(OTHER, path)]
    server.events.stored(Request(path), 0, 3, [(server.handle, keys[0].array), (other, keys[1].array)])
    server.step()
    assert not server.router.there
    server.commit(path[:2], other)
    server.step()
    assert server.router.there == {(1,), (1, 2)}
    for number in range(10, 60):  # one rank's part is used, the other's is pushed out
        with server.pool.match(server.handle, keys[0]):
            server.commit([number] * 6)
        server.step()
        both = zip(
            *(
                server.pool.resident(handle, part.array[:2])
                for handle, part in [(server.handle, keys[0]), (other, keys[1])]
            )
        )
        assert len(server.router.there) == sum(all(each) for each in both)
    assert server.pool.resident(server.handle, keys[0].array[:2]).all() and not server.router.there
    assert not server.events._published


# ---- gaps, and pools that go


def gap_by_standing_still(site: Site, server: Server) -> None:
    head = embedded_keeper(site.pool).authority.header(layout.H_REMOVED)
    number = 100
    while peek(head) <= TINY.n_removals + 8:
        server.commit([number] * 6)
        number += 1


def gap_by_another_keeper(site: Site, server: Server) -> None:
    for number in range(100, 120):
        server.commit([number] * 6)
    site.crash_keeper()
    site.hear()


@pytest.mark.parametrize("lose", [gap_by_standing_still, gap_by_another_keeper])
def test_after_a_gap_everything_is_looked_up(site: Site, server: Server, lose: Any) -> None:
    for number in range(4):
        server.store([number, 1, 2])
    server.step()
    assert len(server.router.there) == 12
    lose(site, server)
    server.step()
    server.assert_right()
    assert not server.router.there
    churn([server], 60)


def test_without_the_gap_the_router_would_believe_in_what_is_gone(
    site: Site, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hush(self: Removals) -> Removed:
        self._begin()
        return Removed(np.zeros((0, 2), np.uint64), False)

    monkeypatch.setattr(Removals, "_gap", hush)
    with pytest.raises(AssertionError):
        test_after_a_gap_everything_is_looked_up(site, server, gap_by_standing_still)


@pytest.mark.parametrize("how", ["none", "closed"])
def test_a_pool_that_goes_takes_all_with_it(site: Site, how: str) -> None:
    server = Server(site.client())
    server.store([1, 2, 3])
    server.step()
    assert len(server.router.there) == 3
    if how == "none":
        server.current = None
    else:
        server.pool.close()
    for _ in range(2):
        server.step()
        assert not server.router.there
    server.pool = server.current = site.client()
    server.handle = server.pool.space(SPACE)
    server.keys.clear()
    server.store([4, 5])
    server.step()
    assert server.router.there == {(4,), (4, 5)}


def test_a_reset_removes_everything(server: Server) -> None:
    server.store([1, 2, 3])
    server.step()
    server.tell([5], server.commit([5]))
    server.events.reset()
    server.step()
    assert not server.router.there
    server.tell([1, 2, 3], chain(SPACE, [1, 2, 3]))
    server.step()
    assert len(server.router.there) == 3


# ---- bounds


@pytest.mark.parametrize("length", [4, 12])
def test_at_most_so_many_are_published_the_newest(site: Site, length: int) -> None:
    server = Server(site.pool, max_blocks=8)
    for number in range(5):
        server.store([number] * length)
        server.step()
        assert server.events.n_published == len(server.router.there) <= 8
        assert tuple([number] * length) in server.router.there
    assert len(server.events._published) == 8


def test_two_stores_of_one_step_at_the_bound(site: Site) -> None:
    server = Server(site.pool, max_blocks=8)
    for number in range(2):
        server.store([number] * 6)
    server.step()
    assert server.events.n_published == len(server.router.there) == 8
