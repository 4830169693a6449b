"""A shared store that is killed, stops, forgets, remembers too much, refuses, is slow, and lies.

Works on the Valkey tier itself, with a real server. What two pools make of it is tested with the mover.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from penstock.errors import TierError, TierTimeout, TierUnavailable
from penstock.pool.copies import seal
from penstock.testing.tier_blocks import assert_right, block_keys, contents, empty, filled, tier_space
from penstock.tiers.base import Batch, Found, Keys, Placed, Tier
from penstock.tiers.envelope import HEADER_BYTES, Header, header_at, object_name, pack
from penstock.tiers.registry import open_tier, parse_tier
from tests.conftest import Scale
from tests.support import until
from tests.tiers.proxy import Proxy
from tests.tiers.servers import LOOPBACK, ValkeyServer, need_valkey

pytestmark = pytest.mark.faults

SPACE = tier_space()
LARGE = tier_space(1, 4, 64 << 10)
KEYS = block_keys(SPACE, 0, 8)
OTHERS = block_keys(SPACE, 1, 8)


def soon() -> float:
    """A deadline that nothing sound exceeds."""
    return time.monotonic() + 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    need_valkey()
    with ValkeyServer(tmp_path) as server:
        yield server


@pytest.fixture
def tier(server: ValkeyServer) -> Iterator[Tier]:
    with opened(f"valkey://{LOOPBACK}:{server.port}") as tier:
        yield tier


class opened:
    """A tier that is closed at the end."""

    def __init__(self, address: str) -> None:
        self.tier = open_tier(parse_tier(address))

    def __enter__(self) -> Tier:
        return self.tier

    def __exit__(self, *_: object) -> None:
        self.tier.close()


def must_write(tier: Tier, keys: Keys = KEYS) -> None:
    assert tier.write(filled(SPACE, keys), soon()).tolist() == [Placed.STORED] * len(keys)


def check(tier: Tier, keys: Keys, here: bool) -> None:
    """All of these blocks are there and right, or none is."""
    assert tier.holds(SPACE, keys, soon()).tolist() == [here] * len(keys)
    batch = empty(SPACE, keys)
    assert_right(batch, tier.read(batch, soon()), here)


def calls(tier: Tier) -> dict[str, Callable[[float], object]]:
    """Everything that needs an answer, by its deadline."""
    return {
        "holds": lambda by: tier.holds(SPACE, KEYS, by),
        "write": lambda by: tier.write(filled(SPACE, KEYS), by),
        "write large": lambda by: tier.write(filled(LARGE, KEYS), by),
        "read": lambda by: tier.read(empty(SPACE, KEYS), by),
        "remove": lambda by: tier.remove(SPACE, OTHERS, by),
    }


def verifies(batch: Batch, i: int) -> bool:
    """Whether block i has the root that came with it: what the mover finds out about each."""
    space, data = batch.space, np.frombuffer(batch.payloads[i], np.uint8)
    table, root = np.zeros(space.n_segments, np.uint64), np.zeros(1, np.uint64)
    at = [np.array([each.ctypes.data], np.int64) for each in (data, table)]
    segments = np.arange(space.n_segments, dtype=np.int64)
    seal(1, at[0], segments, space.segment_bytes, space.n_segments, at[1], batch.keys[i : i + 1], root)
    return bool(root[0] == batch.roots[i])


# ---- killed and started again


def test_killed_and_back_without_its_data(server: ValkeyServer, tier: Tier) -> None:
    must_write(tier)
    check(tier, KEYS, True)
    server.kill()
    for call in calls(tier).values():
        with pytest.raises(TierUnavailable, match="is it running"):
            call(soon())
    server.start()
    check(tier, KEYS, False)
    must_write(tier)
    check(tier, KEYS, True)


def test_back_with_old_data(server: ValkeyServer, tier: Tier) -> None:
    """Blocks of then are still right: a block's content follows from its key. Later ones are absent, not failed."""
    must_write(tier)
    server.save()
    must_write(tier, OTHERS)
    tier.remove(SPACE, KEYS, soon())
    server.kill()
    server.start()
    check(tier, KEYS, True)
    check(tier, OTHERS, False)


def test_opened_before_the_server_is_there(tmp_path: Path) -> None:
    need_valkey()
    server = ValkeyServer(tmp_path)
    with opened(f"valkey+unix://{server.unix}") as tier:
        with pytest.raises(TierUnavailable):
            check(tier, KEYS, False)
        with server:
            check(tier, KEYS, False)
            must_write(tier)


def test_killed_again_and_again_while_others_write(server: ValkeyServer, tier: Tier, scale: Scale) -> None:
    """Whatever the calls say meanwhile: nothing that is read is wrong, and none hangs."""
    over = threading.Event()
    problems: list[object] = []
    done = [0] * 3

    def work(number: int) -> None:
        keys = block_keys(LARGE, number, 4)
        while not over.is_set():
            batch = empty(LARGE, keys)
            try:
                tier.write(filled(LARGE, keys), time.monotonic() + 2)
                found = tier.read(batch, time.monotonic() + 2)
            except TierError:
                continue
            done[number] += 1
            right = contents(keys, LARGE.block_bytes)
            for i in np.flatnonzero(found == Found.HERE):
                if not np.array_equal(np.frombuffer(batch.payloads[i], np.uint8), right[i]):
                    problems.append((number, i))
            if Found.FAILED in found:
                problems.append(found.tolist())

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(scale.of(3, 50)):
        served = list(done)
        until(lambda served=served: all(now > then for now, then in zip(done, served)), "each is served")
        connects = tier.counters()["connects"]
        server.kill()
        server.start()
        until(lambda connects=connects: tier.counters()["connects"] > connects, "a call noticed")
    over.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert problems == []


# ---- stopped


def test_stopped_calls_end_at_their_deadline(server: ValkeyServer, tier: Tier) -> None:
    """On connections that are open already, and on new ones."""
    must_write(tier)
    server.pause()
    late = []
    for name, call in [*calls(tier).items(), *calls(tier).items()]:
        by = time.monotonic() + 0.15
        with pytest.raises(TierTimeout):
            call(by)
        late.append((time.monotonic() - by, name))
        assert late[-1][0] < 5.0, f"{name} hangs"
    # Another process may have had the processor for a while; most calls tell.
    assert sorted(late)[len(late) // 2][0] < 0.1, late
    server.resume()
    check(tier, KEYS, True)


def test_no_late_answer_is_taken_for_another_questions(server: ValkeyServer, tier: Tier) -> None:
    """The server answers the old questions once it goes on; the new ones must not get these answers."""
    must_write(tier)
    check(tier, OTHERS, False)
    for ask_while_stopped in (False, True):
        server.pause()
        for _ in range(3):
            with pytest.raises(TierTimeout):
                tier.holds(SPACE, KEYS, time.monotonic() + 0.05)
            with pytest.raises(TierTimeout):
                tier.read(empty(SPACE, KEYS), time.monotonic() + 0.05)
        asked = threading.Event()
        answers: list[list[bool]] = []

        def ask(asked: threading.Event = asked, answers: list[list[bool]] = answers) -> None:
            asked.set()
            answers.append(tier.holds(SPACE, OTHERS, soon()).tolist())

        if not ask_while_stopped:
            server.resume()
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        assert asked.wait(20)
        # Where it is asked while the server stands, wait until the question is on its way.
        if ask_while_stopped:
            until(lambda thread=thread: sleeps(thread), "the question is asked")
            server.resume()
        thread.join(20)
        assert answers == [[False] * len(OTHERS)]
        check(tier, KEYS, True)
        check(tier, OTHERS, False)


def sleeps(thread: threading.Thread) -> bool:
    """Whether it waits for something; as nobody else runs long here, for the server."""
    return Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_write_that_ran_out_of_time_is_whole_or_absent(server: ValkeyServer, tier: Tier) -> None:
    keys = block_keys(LARGE, 0, 8)
    tier.holds(LARGE, keys, soon())
    server.pause()
    with pytest.raises(TierTimeout):
        tier.write(filled(LARGE, keys), time.monotonic() + 0.1)
    server.resume()
    batch = empty(LARGE, keys)
    found = tier.read(batch, soon())
    assert Found.FAILED not in found
    assert_right(batch, found, found == Found.HERE)


# ---- refused


def test_full(tmp_path: Path) -> None:
    """Each block that does not fit is said to have had no room; those that were stored are right."""
    need_valkey()
    with (
        ValkeyServer(tmp_path, "--maxmemory", "6mb") as server,
        opened(f"valkey://{LOOPBACK}:{server.port}") as tier,
    ):
        keys = block_keys(LARGE, 0, 40)
        placed = tier.write(filled(LARGE, keys), soon())
        assert set(placed.tolist()) == {Placed.STORED, Placed.NO_ROOM}
        stored = placed == Placed.STORED
        assert tier.holds(LARGE, keys, soon()).tolist() == stored.tolist()
        batch = empty(LARGE, keys)
        assert_right(batch, tier.read(batch, soon()), stored)
        assert tier.usage().capacity_bytes == 6 << 20
        tier.remove(LARGE, keys[stored], soon())
        assert Placed.STORED in tier.write(filled(LARGE, keys[:1]), soon())


def test_a_replica_says_where_to_go(server: ValkeyServer, tier: Tier) -> None:
    server.ask("REPLICAOF", LOOPBACK, "1")
    server.ask("CONFIG", "SET", "replica-serve-stale-data", "yes")
    with pytest.raises(TierUnavailable, match="replica"):
        tier.write(filled(SPACE, KEYS), soon())
    server.ask("REPLICAOF", "NO", "ONE")
    must_write(tier)


def test_still_loading(tmp_path: Path) -> None:
    """While a server loads its data it is not there; afterwards its blocks are."""
    need_valkey()
    # Slow to load: 10 ms a block.
    slowly = ("--key-load-delay", "10000", "--loading-process-events-interval-bytes", "1024")
    server = ValkeyServer(tmp_path)
    keys = block_keys(SPACE, 0, 60)
    with opened(f"valkey+unix://{server.unix}") as tier:
        with server:
            must_write(tier, keys)
            server.save()
        server.options = slowly
        server.launch()
        try:
            until(server.listening, "it listens")
            with pytest.raises(TierUnavailable, match="loads its data"):
                check(tier, keys, True)
            until(server.ready, "it has loaded")
            check(tier, keys, True)
        finally:
            server.kill()


# ---- slow


def test_latency(server: ValkeyServer) -> None:
    with Proxy(server.port) as proxy, opened(f"valkey://{LOOPBACK}:{proxy.port}/1") as tier:
        must_write(tier)
        proxy.latency_s = 0.2
        check(tier, KEYS, True)
        with pytest.raises(TierTimeout):
            tier.read(empty(SPACE, KEYS), time.monotonic() + 0.1)
        # A new connection costs two more round trips, each within its own time and all of them beyond the deadline.
        begin = time.monotonic()
        with pytest.raises(TierTimeout):
            tier.read(empty(SPACE, KEYS), begin + 0.3)
        assert time.monotonic() - begin < 5.0
        check(tier, KEYS, True)


# ---- lies


def test_flipped_bits_on_the_wire(server: ValkeyServer, scale: Scale) -> None:
    """Whatever is flipped: what is read verifies and is right, or it does not verify; nothing hangs."""
    rounds = scale.of(40, 2000)
    caught = {"right": 0, "told": 0, "root": 0, "error": 0}
    with Proxy(server.port, seed=1) as proxy, opened(f"valkey://{LOOPBACK}:{proxy.port}") as tier:
        for number in range(rounds):
            keys = block_keys(SPACE, number, 3)
            right = contents(keys, SPACE.block_bytes)
            batch = empty(SPACE, keys)
            proxy.flip_one_in = (3000, 20000)[number % 2]
            try:
                tier.write(filled(SPACE, keys), time.monotonic() + 0.5)
                found = tier.read(batch, time.monotonic() + 0.5)
            except TierError:
                caught["error"] += 1
                continue
            for i in range(3):
                same = np.array_equal(np.frombuffer(batch.payloads[i], np.uint8), right[i])
                if found[i] != Found.HERE:
                    caught["told"] += 1
                elif verifies(batch, i):
                    assert same, (number, i)
                    caught["right"] += 1
                else:
                    caught["root"] += 1
        assert proxy.flipped > rounds // 4
        assert caught["right"] and caught["root"], caught
        proxy.flip_one_in = 0
        must_write(tier)
        check(tier, KEYS, True)


def test_cut_in_the_middle_of_an_answer(server: ValkeyServer) -> None:
    keys = block_keys(LARGE, 0, 4)
    with Proxy(server.port) as proxy, opened(f"valkey://{LOOPBACK}:{proxy.port}") as tier:
        tier.write(filled(LARGE, keys), soon())
        for after in (1, 5, 60, 137, 5000, LARGE.block_bytes + HEADER_BYTES + 11, 3 * LARGE.block_bytes):
            proxy.cut_after = after
            with pytest.raises(TierUnavailable):
                tier.read(empty(LARGE, keys), soon())
            batch = empty(LARGE, keys)
            assert_right(batch, tier.read(batch, soon()))


def wrong_values() -> dict[str, bytes]:
    """What may lie under the name of KEYS[0] and is not that block."""
    batch = filled(SPACE, KEYS)
    block, payload = pack(header_at(batch, 0)), bytes(batch.payloads[0])
    other_space = Header(bytes(32), KEYS[0].tobytes(), bytes(16), 0, SPACE.block_bytes)
    return {
        "half of it": (block + payload)[: HEADER_BYTES + SPACE.block_bytes // 2],
        "its header alone": block,
        "its payload alone": payload,
        "more than it": block + payload + b"x",
        "far more": block + payload * 300,
        "one byte": b"x",
        "garbage of its length": bytes(range(256)) * ((HEADER_BYTES + SPACE.block_bytes) // 256)
        + bytes((HEADER_BYTES + SPACE.block_bytes) % 256),
        "another block": pack(header_at(batch, 1)) + payload,
        "a block of another space": pack(other_space) + payload,
    }


@pytest.mark.parametrize("what", list(wrong_values()))
def test_another_value_under_a_blocks_name(server: ValkeyServer, tier: Tier, what: str) -> None:
    """It failed, the blocks around it are not touched by that, and it can be removed and stored anew."""
    must_write(tier)
    server.set(object_name(SPACE, KEYS[0].tobytes()), value := wrong_values()[what])
    right_length = len(value) == HEADER_BYTES + SPACE.block_bytes
    assert tier.holds(SPACE, KEYS, soon()).tolist() == [right_length] + [True] * 7
    batch = empty(SPACE, KEYS)
    found = tier.read(batch, soon())
    assert found.tolist() == [Found.FAILED] + [Found.HERE] * 7
    assert_right(batch.part(1, 8), found[1:])
    tier.remove(SPACE, KEYS[:1], soon())
    check(tier, KEYS[:1], False)
    must_write(tier)
    check(tier, KEYS, True)


def test_a_write_replaces_what_is_wrong(server: ValkeyServer, tier: Tier) -> None:
    """Also where it looks first: half a block or another one's is not taken for what is there already."""
    keys = block_keys(LARGE, 0, 4)
    assert tier.write(filled(LARGE, keys), soon()).tolist() == [Placed.STORED] * 4
    batch = filled(LARGE, keys)
    name = [object_name(LARGE, key.tobytes()) for key in keys]
    server.set(name[0], pack(header_at(batch, 0)) + bytes(100))
    server.set(name[1], pack(header_at(batch, 2)) + bytes(batch.payloads[2]))
    server.ask("DEL", name[2])
    server.ask("LPUSH", name[2], "a list")
    assert tier.write(batch, soon()).tolist() == [Placed.STORED] * 3 + [Placed.PRESENT]
    again = empty(LARGE, keys)
    assert_right(again, tier.read(again, soon()))


def test_a_list_under_a_blocks_name(server: ValkeyServer, tier: Tier) -> None:
    server.ask("LPUSH", object_name(SPACE, KEYS[0].tobytes()), "a list")
    assert not tier.holds(SPACE, KEYS, soon()).any()
    assert tier.read(empty(SPACE, KEYS), soon()).tolist() == [Found.FAILED] + [Found.ABSENT] * 7
    must_write(tier)
    check(tier, KEYS, True)
